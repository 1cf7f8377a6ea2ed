"""Documents of a Hugging Face dataset: hf:DATASET[/CONFIG][:FIELD], its train split, streamed.

DATASET is OWNER/NAME as on the Hub, or a bare NAME; CONFIG can only follow OWNER/NAME, since OWNER/NAME and
NAME/CONFIG cannot be told apart: hf:Salesforce/wikitext/wikitext-2-raw-v1, hf:openai/gsm8k/main:question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from eopc_runtime.errors import MissingExtraError, UsageError

HUB_PREFIX = "hf:"
MAX_DOCUMENTS = 2000
_FORM = "hf:DATASET[/CONFIG][:FIELD]"


def read_hub(source: str, limit: int = MAX_DOCUMENTS) -> list[str]:
    """The first `limit` documents that are not blank, at FIELD ("text" if left out).

    Raises:
        MissingExtraError: the `datasets` library is not installed.
        UsageError: the source is malformed, cannot be reached, or has no text at FIELD.
    """
    dataset, config, field = _parse(source)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingExtraError(f"Calibration text {source}", "datasets", "hf") from error
    try:
        rows = load_dataset(dataset, config, split="train", streaming=True)
        return list(islice(_texts(rows, field, source), limit))
    except UsageError:
        raise
    except Exception as error:  # datasets lets the errors of several network libraries through
        lines = str(error).splitlines() or [""]
        raise UsageError(
            f"Data set {dataset} cannot be read from the Hugging Face Hub ({type(error).__name__}: {lines[0]}). Check "
            "its name and the network, or give a file of your own: --calib NAME=FILE"
        ) from error


def _parse(source: str) -> tuple[str, str | None, str]:
    """(data set, config, field) of hf:DATASET[/CONFIG][:FIELD]."""
    path, _, field = source.removeprefix(HUB_PREFIX).partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise UsageError(f"{source!r} is not of the form {_FORM}. Example: hf:Salesforce/wikitext/wikitext-2-raw-v1")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, field or "text"


def _texts(rows: Iterable[Any], field: str, source: str) -> Iterator[str]:
    """The strings at `field` that are not blank."""
    for row in rows:
        if not isinstance(text := row.get(field), str):
            raise UsageError(f"{source} has no text at {field!r} (found: {', '.join(row)}). Name the field: {_FORM}")
        if text.strip():
            yield text

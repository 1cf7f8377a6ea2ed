"""The passes that give a build its text: domains of documents, and token windows drawn from them."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from pathlib import Path

from eopc_compiler.calibration import CalibrationSet, Domain, Split, build_calibration, read_mixture, select_calibration
from eopc_compiler.calibration.own import OWN, own_documents
from eopc_compiler.pricing import must_prune
from eopc_compiler.state import BuildArgs, CompileState
from eopc_compiler.stored_model import dense_model
from eopc_runtime import __version__


def read_text(state: CompileState) -> CompileState:
    """The domains: built in, given, and, with --own-text where tiers will be pruned, what the model writes itself."""
    domains = read_mixture(state.args.calib)
    if state.args.own_text and must_prune(state) and OWN not in [d.name for d in domains]:
        domains = (*domains, *_own_text(state))
    return replace(state, domains=domains)


def read_calibration(state: CompileState) -> CompileState:
    """Token windows from three splits that share no document: to calibrate on as asked, to judge on of every domain."""
    assert state.checkpoint is not None
    args, domains, tokenizer = state.args, state.domains, state.checkpoint.tokenizer()
    length, seed, counts = args.calibration_length, args.seed, window_counts(args)

    def windows(split: Split) -> CalibrationSet:
        return build_calibration(tokenizer, domains, counts[split], length, seed, split, allow_fewer=True)

    return replace(
        state,
        calibration=select_calibration(
            args.calib_select, tokenizer, domains, counts["calibration"], length, seed, state.say
        ),
        selection=windows("selection"),
        heldout=windows("heldout"),
    )


def window_counts(args: BuildArgs) -> dict[Split, int]:
    """How many windows of every domain a build reads."""
    n = args.calibration_windows
    return {"calibration": max(n, args.repair_windows), "selection": max(2, n // 2), "heldout": max(2, n // 3)}


def _own_text(state: CompileState) -> tuple[Domain, ...]:
    """A domain of the model's own documents, as many as its windows need; none where no token begins a text."""
    assert state.checkpoint is not None
    checkpoint, args, first = state.checkpoint, state.args, state.config.bos_token_id
    if first is None:
        state.say(f"{checkpoint.name} names no token that begins a text, so it writes none to calibrate on")
        return ()
    counts = window_counts(args)  # of five documents, three are dealt to calibration
    count = 5 * max(ceil(counts["calibration"] / 3), counts["selection"], counts["heldout"])
    inputs = {
        "version": __version__,
        "model": checkpoint.fingerprint,
        "documents": [first, count, args.calibration_length],
        "seed": args.seed,
    }

    def produce(path: Path) -> None:
        report = state.counter("writing text to calibrate on", "tokens")
        written = own_documents(
            dense_model(state), checkpoint.tokenizer(), first, count, args.calibration_length, args.seed, report
        )
        path.write_text(json.dumps(written), encoding="utf-8")

    documents = json.loads(state.cache.get("own-text", inputs, ".json", produce).read_text(encoding="utf-8"))
    return (Domain(OWN, tuple(documents)),)

"""--calib-select: how the text of the domains becomes the windows that statistics are taken on.

`domains` follows the mixture that was asked for, `ccds` looks for clusters in all text and gives each the same share
(ccds.py). Judging, on the selection and the held-out split, always goes by domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from eopc_compiler.calibration.ccds import CcdsSettings, ccds_calibration
from eopc_compiler.calibration.domains import Domain
from eopc_compiler.calibration.windows import CalibrationSet, Tokenizer, build_calibration
from eopc_runtime.errors import UsageError

CalibSelect = Literal["domains", "ccds"]


def select_calibration(
    how: CalibSelect,
    tokenizer: Tokenizer,
    domains: Sequence[Domain],
    n_seq: int,
    seq_len: int,
    seed: int = 0,
    say: Callable[[str], None] = lambda _text: None,
) -> CalibrationSet:
    """Windows of the calibration split, on average `n_seq` of `seq_len` tokens per domain, fewer of short texts.

    With `ccds` there are as many windows in all, and the set's domains are the clusters. Their names and weights play
    no part there, but text of weight 0 is left out, as it is to be judged on only.

    Raises:
        UsageError: an unknown way, or too little text.
        MissingExtraError: `ccds` without scikit-learn.
    """
    if how not in get_args(CalibSelect):
        raise UsageError(f"--calib-select {how!r} is not known. Choose from {', '.join(get_args(CalibSelect))}.")
    if how == "domains":
        return build_calibration(tokenizer, domains, n_seq, seq_len, seed, allow_fewer=True)
    used, settings = [d for d in domains if d.weight], CcdsSettings(per_cluster=True)
    say("looking for clusters in the calibration text")
    drawn = ccds_calibration(tokenizer, used, n_seq * len(domains), seq_len, seed, settings=settings, allow_fewer=True)
    sizes = ", ".join(str(count) for _, count in drawn.record.cluster_chunks)
    for line in (f"clusters of {sizes} chunks by {drawn.record.embedding}", *drawn.record.notes):
        say(line)
    return drawn.calibration

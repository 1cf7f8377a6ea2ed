"""One line of tegrastats, by token and never by position: its clock and its power rails.

Fields differ in order and presence by board, release and privilege. A rail is a whole-token name followed by
one token of two or three numbers, `now/mean` or `now/mean/peak`, in mW, with the unit written on all of them
(JetPack 5 and later) or on none (JetPack 4). Readings of a line have one shape; one that differs was damaged.
Only the first number is power now; the second is the mean since
tegrastats started and is never used. Units keep memory (`RAM 1/2MB`) apart, `@` the temperatures.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from eopc_runtime.power.rails import RAIL_NAME

# The largest module is specified for 130 W; a number far above that is a damaged one.
RAIL_LIMIT_MW = 300_000

_READING = re.compile(r"([0-9]{1,9})(mW)?/-?[0-9]{1,9}(mW)?(?:/-?[0-9]{1,9}(mW)?)?")
_MEMORY = re.compile(r"[0-9]+/[0-9]+[kMG]B")
_MEMORY_NAMES = ("RAM", "SWAP", "IRAM")
_CLOCK = re.compile(
    r"(?<!\S)([0-9]{2})-([0-9]{2})-([0-9]{4})\s+([0-9]{2}):([0-9]{2}):([0-9]{2})(?!\S)"
)  # month, day, year
_EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class Line:
    """What one line says: `clock_s` is its printed wall clock in s since 1970, without a zone."""

    clock_s: float | None
    rails_mw: Mapping[str, int]
    unreadable: frozenset[str]  # known rails that stand there without a usable number
    repeated: frozenset[str]  # known rails that stand there twice: which one is right cannot be told
    stray: bool  # a reading without a readable name, an ignored name without one, or a known name that was cut


def parse_line(text: str, known: Collection[str], ignored: Collection[str] = ()) -> Line | None:
    """Read one line; None when it is not from tegrastats.

    Args:
        known: rail names of the boards in question. Other names are read as rails too, but do not make the
            line doubtful when they are damaged or repeated.
        ignored: names to drop before anything is checked (NC, which may stand twice).
    """
    tokens = text.split()
    rails: dict[str, int] = {}
    shapes: dict[str, tuple[int, bool]] = {}
    dropped: set[str] = set()
    repeated: set[str] = set()
    memory = unit_seen = stray = False
    for i, token in enumerate(tokens):
        if "/" not in token and "mW" not in token:
            continue
        name = tokens[i - 1] if i else ""
        value = _now_mw(token)
        if name in _MEMORY_NAMES:
            memory = memory or _MEMORY.match(token) is not None
            continue
        unit_seen = unit_seen or ("mW" in token and (value is not None or name in known))
        if name in ignored:
            continue
        if value is None:
            stray = stray or ("mW" in token and name not in known)
        elif not RAIL_NAME.fullmatch(name):
            stray = True
        elif name in rails or name in dropped:
            rails.pop(name, None)
            dropped.add(name)
            if name in known:
                repeated.add(name)
        else:
            rails[name] = value
            shapes[name] = (token.count("/"), "mW" in token)
    odd = _odd_shapes(shapes, known)
    unreadable = set(_unreadable(tokens, rails, known)) | odd
    rails = {name: value for name, value in rails.items() if name not in odd}
    repeated |= unreadable & rails.keys()
    if not (memory or unit_seen or rails.keys() & set(known) or _has_cpu_list(tokens)):
        return None
    cut = _cut_names(tokens, rails, known)
    # `NC VIN 5mW/5mW`: a dropped name that lost its reading, which then looks like another rail's
    stray = stray or any(a in ignored and _now_mw(b) is None for a, b in pairwise([*tokens, ""]))
    return Line(
        clock_s=_clock_s(text),
        rails_mw={name: value for name, value in rails.items() if name not in repeated},
        unreadable=frozenset((unreadable | cut) - repeated),
        repeated=frozenset(repeated),
        stray=stray or bool(cut),
    )


def guess_release(text: str) -> str | None:
    """Guess the release of Jetson Linux from the marks of one line that holds rails; None if there is none."""
    tokens = text.split()
    readings = [token for token in tokens if _now_mw(token) is not None]
    if not readings:
        return None
    if not any("mW" in token for token in readings):
        return "r32 (JetPack 4)"
    if any(token.count("/") == 2 for token in readings):
        return "r39 (JetPack 7.2)"
    if "VDD_CPU_SOC_MSS" in tokens:
        return "r38 (JetPack 7)"
    zones = {token.partition("@")[0] for token in tokens if re.fullmatch(r"[A-Za-z]\w*@-?[0-9.]+C", token)}
    if "cpu" in zones:
        return "r36 (JetPack 6)"
    return "r35 (JetPack 5)" if "CPU" in zones else None


def _now_mw(token: str) -> int | None:
    """The first number of a reading in mW; None when the token is none, or mixes units."""
    match = _READING.fullmatch(token)
    if match is None:
        return None
    units = {match[2], match[3], match[4]} if token.count("/") == 2 else {match[2], match[3]}
    value = int(match[1])
    return value if len(units) == 1 and value <= RAIL_LIMIT_MW else None


def _odd_shapes(shapes: Mapping[str, tuple[int, bool]], known: Collection[str]) -> set[str]:
    """Known rails whose reading is not of the shape that most of them have; all of them when there is a tie."""
    votes = Counter(shape for name, shape in shapes.items() if name in known).most_common()
    if len(votes) < 2:
        return set()
    usual = votes[0][0] if votes[0][1] > votes[1][1] else None
    return {name for name, shape in shapes.items() if name in known and shape != usual}


def _unreadable(tokens: list[str], rails: Mapping[str, int], known: Collection[str]) -> Iterator[str]:
    """Known names that stand before something that is no reading, as in `VIN N/A` or `VIN -40mW/3mW`."""
    present = set(tokens)
    for name in known:
        if name not in present or (name in rails and tokens.count(name) == 1):
            continue
        for i, token in enumerate(tokens):
            if token != name:
                continue
            value = tokens[i + 1] if i + 1 < len(tokens) else ""
            # `CPU [3%@729,...` is the list of cores, not AGX Xavier's rail of that name
            if _now_mw(value) is not None or (value.startswith("[") and "@" in value):
                continue
            if name not in rails or "/" in value or "mW" in value:
                yield name


def _cut_names(tokens: list[str], rails: Mapping[str, int], known: Collection[str]) -> set[str]:
    """Known rails that the last token may be the beginning of: the line was cut there."""
    last = tokens[-1] if tokens else ""
    if not last or last in known:
        return set()
    return {name for name in known if name.startswith(last) and name not in rails}


def _has_cpu_list(tokens: list[str]) -> bool:
    """True if the list of cores stands there, as in every release."""
    return any(token == "CPU" and after.startswith("[") for token, after in pairwise(tokens))


def _clock_s(text: str) -> float | None:
    match = _CLOCK.search(text)
    if match is None:
        return None
    month, day, year, hour, minute, second = map(int, match.groups())
    try:
        return (datetime(year, month, day, hour, minute, second) - _EPOCH).total_seconds()
    except ValueError:
        return None

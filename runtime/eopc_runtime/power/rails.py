"""Which rails make up a board's total: data from a device profile, and the pure choice among such rules.

A board has one or more `total` sets in order of preference. The first is what the board should be read by;
a later one is a fallback for releases that do not show the first (a Thor without its input sensor). A set
counts only when every rail in it was read: a missing rail is missing, never 0 W.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from eopc_runtime.jsonfields import Fields

RAIL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
MARKS = ("s", "m", "u")  # documented, measured, unconfirmed: as in the profile's constants


@dataclass(frozen=True, slots=True)
class RailRule:
    """The rails of one board: sets that make its total, rails inside them, and names to drop."""

    board: str
    total: tuple[tuple[str, ...], ...]
    sub_rails: tuple[str, ...]
    ignored: tuple[str, ...]
    mark: str
    source: str

    @property
    def names(self) -> frozenset[str]:
        """Every rail the board is known to have."""
        return frozenset(name for names in (*self.total, self.sub_rails) for name in names)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One set of rails whose sum is a total, and the boards it is the total of."""

    names: tuple[str, ...]
    boards: tuple[str, ...]
    known: frozenset[str]  # every rail of those boards
    fallback: bool = False


def read_rails(fields: Fields, board: str) -> RailRule:
    """Read the `rails` of a board strictly; the reader's error on what could give a wrong total."""
    raw = fields.raw("total")
    if not isinstance(raw, list) or not raw or not all(isinstance(names, list) and names for names in raw):
        fields.fail('"total" must be a list of lists of rail names, the preferred set first.')
    total = tuple(tuple(names) for names in raw)
    rule = RailRule(
        board=board,
        total=total,
        sub_rails=fields.texts("sub_rails"),
        ignored=fields.texts("ignored"),
        mark=fields.text("mark", choices=MARKS),
        source=fields.text("source"),
    )
    for key, names in (*(("total", names) for names in total), ("sub_rails", rule.sub_rails)):
        for name in names:
            if not (isinstance(name, str) and RAIL_NAME.fullmatch(name)):
                fields.fail(f'"{key}" holds {name!r}, which is no rail name.')
        if len(set(names)) != len(names):
            fields.fail(f'"{key}" names a rail twice in {", ".join(names)}: it would be counted twice.')
    if len(set(map(frozenset, total))) != len(total):
        fields.fail('"total" holds the same set twice.')
    summed = {name for names in total for name in names}
    if both := summed & set(rule.sub_rails):
        fields.fail(f'{", ".join(sorted(both))} stands in "total" and in "sub_rails"; a sub-rail is not added.')
    if dropped := rule.names & set(rule.ignored):
        fields.fail(f'{", ".join(sorted(dropped))} is both a rail and "ignored".')
    if not rule.source.strip():
        fields.fail('"source" is empty; say where the rails are documented.')
    fields.done()
    return rule


def inherited(rule: RailRule, board: str) -> RailRule:
    """The rails of another board, unconfirmed on this one."""
    return replace(rule, board=board, mark="u", source=f"taken from {rule.board}, unconfirmed here: {rule.source}")


def candidates(rules: Sequence[RailRule]) -> tuple[Candidate, ...]:
    """Return the sets to try, in order: the preferred set of every board, then the fallbacks.

    Boards with the same set share one candidate, so that a rail of one of them is no surprise in it.
    """
    found: dict[tuple[str, ...], Candidate] = {}
    depth = max((len(rule.total) for rule in rules), default=0)
    for i in range(depth):
        for rule in rules:
            if i >= len(rule.total):
                continue
            names = rule.total[i]
            old = found.get(names, Candidate(names, (), frozenset(), fallback=i > 0))
            found[names] = replace(old, boards=(*old.boards, rule.board), known=old.known | rule.names)
    return tuple(found.values())


def asked_for(names: Sequence[str]) -> tuple[Candidate, ...]:
    """Return the one candidate that a user named, rail by rail."""
    return (Candidate(tuple(names), ("as asked",), frozenset(names)),)


def choose(
    options: Iterable[Candidate], read: Collection[str], unreadable: Collection[str] = (), clean: bool = True
) -> tuple[Candidate | None, str]:
    """Return the first set whose rails were all read, or None with the reason.

    Args:
        read: names that gave a value.
        unreadable: names that stand there without a usable value; a set with one of them blocks later ones.
        clean: False where something could not be told from a rail; then no fallback is taken, because it
            may be the preferred rail that was damaged.
    """
    options = tuple(options)
    if not read and not unreadable:
        return None, "no power rail in the line"
    for option in options:
        if bad := [name for name in option.names if name in unreadable]:
            return None, f"{', '.join(bad)} has no readable value"
        if all(name in read for name in option.names):
            return _accept(option, options, read, clean and not unreadable)
    nearest = max(options, key=lambda option: sum(name in read for name in option.names), default=None)
    if nearest is None or not any(name in read for name in nearest.names):
        return None, f"no rail of a known total among {', '.join(sorted(read)[:8])}"
    missing = [name for name in nearest.names if name not in read]
    return None, f"incomplete rail set: {', '.join(missing)} missing"


def _accept(
    option: Candidate, options: Sequence[Candidate], read: Collection[str], clean: bool
) -> tuple[Candidate | None, str]:
    """Take a complete set unless the rails beside it say that a name was damaged."""
    strangers = sorted(set(read) - option.known)
    if option.fallback and (strangers or not clean):
        what = f"{', '.join(strangers)} is unknown" if strangers else "something is unreadable"
        return None, f"{' + '.join(option.names)} is a fallback, but {what}: the preferred rail may be damaged"
    for other in options:
        present = [name for name in other.names if name in strangers]
        complete = all(name in read for name in other.names)
        if len(option.names) == 1 and present and not (complete and clean):
            # VIN beside two of AGX Orin's three rails: more likely a cut name than a new board
            why = "something is unreadable" if complete else "whose set is incomplete"
            return None, f"{option.names[0]} stands beside {', '.join(present)}, {why}"
    return option, ""

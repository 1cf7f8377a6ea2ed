"""The boards whose rails are known, in the order in which they are tried where no board is named.

`boards.json` holds that order. A board with a device profile is named there and its rails are read from the
profile; older boards, which eopc reads logs of but does not build for, carry their rails in the file itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from eopc_runtime.errors import DeviceError
from eopc_runtime.jsonfields import Fields, did_you_mean, parse_json
from eopc_runtime.power.rails import RailRule, read_rails
from eopc_runtime.profiles import list_profiles, load_profile


@dataclass(frozen=True, slots=True)
class Board:
    """A board that prints or exposes rails, by its name and its other names."""

    name: str
    aliases: tuple[str, ...]
    rails: RailRule


@cache
def list_boards() -> tuple[Board, ...]:
    """Return the known boards in the order in which their rails are tried."""
    return parse_boards(files("eopc_runtime.power").joinpath("boards.json").read_text(encoding="utf-8"))


def parse_boards(text: str) -> tuple[Board, ...]:
    """Read the table of boards strictly; DeviceError on what is malformed."""
    fields = Fields(parse_json(text, "boards.json", DeviceError), "boards.json", DeviceError)
    if (schema := fields.integer("schema")) != 1:
        fields.fail(f"schema {schema} is not known; this eopc reads schema 1. Upgrade eopc.")
    fields.text("source")
    boards = tuple(_board(child) for child in fields.children("boards"))
    fields.done()
    return boards


def board_rails(name: str) -> RailRule:
    """Return the rails of a board, by name or alias; DeviceError names the nearest, or says that it has none."""
    wanted = name.strip().lower().replace("_", "-")
    boards = list_boards()
    for board in boards:
        if wanted in (board.name, *board.aliases):
            return board.rails
    names = [board.name for board in boards]
    if wanted in {n for profile in list_profiles() for n in (profile.name, *profile.aliases)}:
        raise DeviceError(f'"{name}" has no power rails of its own. Boards with rails: {", ".join(names)}.')
    near = did_you_mean(wanted, [*names, *(a for board in boards for a in board.aliases)])
    raise DeviceError(f'eopc does not know the rails of a board "{name}".{near} It knows {", ".join(names)}.')


def _board(fields: Fields) -> Board:
    if "profile" in fields:
        profile = load_profile(fields.text("profile"))
        fields.done()
        if profile.rails is None:
            fields.fail(f"the device profile {profile.name} has no rails.")
        return Board(profile.name, profile.aliases, profile.rails)
    name = fields.text("board")
    board = Board(name, fields.texts("aliases"), read_rails(fields.child("rails"), name))
    fields.done()
    return board

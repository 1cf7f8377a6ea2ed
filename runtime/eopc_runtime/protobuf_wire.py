"""Just enough of protobuf's wire format to look at an ONNX graph before anything else does.

A message is read into its fields by number, without copying. Strict where libraries are lenient: groups, truncated or
overlong numbers and fields of the wrong kind are errors, so nobody behind this reads more than was seen here.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


class WireError(ValueError):
    """The bytes are no protobuf message."""


class Message:
    """One message: `one`, `many` and `integers` give its fields by number."""

    def __init__(self, data: memoryview) -> None:
        """Read the fields of a message, but not those of messages in it.

        Raises:
            WireError: the bytes are no message.
        """
        self._fields: dict[int, list[int | memoryview]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def many(self, number: int) -> list[memoryview]:
        """All values of a field of bytes, texts or messages."""
        return [value if isinstance(value, memoryview) else _wrong(number) for value in self._fields.get(number, ())]

    def one(self, number: int) -> memoryview | None:
        """The value of such a field that may stand once (readers would merge two), None where it does not."""
        values = self.many(number)
        if len(values) > 1:
            raise WireError(f"field {number} stands there {len(values)} times")
        return values[0] if values else None

    def text(self, number: int) -> str:
        """A field of text, empty where it does not stand."""
        value = self.one(number)
        try:
            return "" if value is None else str(value, "utf-8")
        except UnicodeDecodeError:
            raise WireError(f"field {number} is not a text") from None

    def integers(self, number: int) -> list[int]:
        """A field of integers as a signed 64-bit number each, packed or one by one."""
        found = list[int]()
        for value in self._fields.get(number, ()):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                item, at = _varint(value, at)
                found.append(item)
        return [x - (1 << 64) if x >> 63 else x for x in found]

    def integer(self, number: int) -> int:
        """A field of one integer, 0 where it does not stand."""
        values = self.integers(number)
        if len(values) > 1:
            raise WireError(f"field {number} stands there {len(values)} times")
        return values[0] if values else 0


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers with their values; fixed-width ones as bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError("a field has the number 0")
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise WireError(f"field {number} is of the kind {kind}")
        if size > end - at:
            raise WireError(f"field {number} is cut off")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """An unsigned 64-bit number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise WireError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise WireError("a number has more than 64 bits")


def _wrong(number: int) -> memoryview:
    raise WireError(f"field {number} is a number where bytes belong")

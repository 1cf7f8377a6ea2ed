"""Random changes of an input: of bytes, or of a node in a JSON value, where bytes alone would only break the syntax."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, "", "0", "t0", "t1",
    "\u0000", "\ud800", "../..", "a" * 300, "\n", [], {}, [[]], [0, 0], [-1], ["a"], {"": None}, {"type": "Sequence"},
    {"Regex": "(a+)+"}, {"String": ""},
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff", b"{", b"}", b"[", b'"', b"\\", b"0", b"-", b"e999", b"NaN", b"\n", b" ", b",", b"{{ ", b" }}",
    b"{% for x in range(9) %}", b"{% endfor %}", b"{% set x = ", b" %}", b"|list", b" * 99999", b".__class__", b"mW/",
    b"VDD_IN ", b"99999999999999999999", b"\x80\x80\x80", b"\x0a", b"\x12\x7f",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, is_json: bool) -> bytes:
    """Change an input in one to four ways; JSON mostly as a value."""
    for _ in range(rng.randint(1, 4)):
        if is_json and rng.random() < 0.85:
            try:
                data = json.dumps(mutate_value(json.loads(data), rng)).encode()
                continue
            except (ValueError, RecursionError):  # it is no JSON any more
                pass
        data = mutate_bytes(data, rng)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Remove, repeat, replace or insert a piece."""
    start = rng.randint(0, len(data))
    end = min(len(data), start + rng.randint(0, 40))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:start] + data[end:]
    if kind == 1:
        return data[:end] + data[start:end] * rng.randint(1, 50) + data[end:]
    if kind == 2 and start < len(data):
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
    if kind == 3:
        return data[:start] + rng.randbytes(rng.randint(1, 8)) + data[end:]
    return data[:start] + rng.choice(PIECES) + data[start:]


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove, add, repeat or wrap one node."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.6:
            return {**value, key: mutate_value(value[key], rng)}
        if kind < 0.75:
            return {k: v for k, v in value.items() if k != key}
        return {**value, rng.choice((*value, "x", "type", key + "s")): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.6:
            return [*value[:i], mutate_value(value[i], rng), *value[i + 1 :]]
        return value[:i] + value[i + 1 :] if kind < 0.75 else [*value, *value[i:] * rng.randint(1, 3)]
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2**16, -(2**16)))
    return rng.choice(ODD) if rng.random() < 0.9 else [value]

"""Generated arithmetic: short problems with worked answers, every step of them right."""

from __future__ import annotations

import random


def worked_sums(count: int, rng: random.Random) -> tuple[str, ...]:
    """Documents of five short problems with worked answers each."""
    kinds = (_chain, _column_addition, _purchase, _sharing, _journey, _percentage)
    return tuple("\n\n".join(rng.choice(kinds)(rng) for _ in range(5)) + "\n\n" for _ in range(count))


_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lucy")
_THINGS = (
    "apples",
    "pencils",
    "stickers",
    "books",
    "marbles",
    "eggs",
    "tickets",
    "cookies",
    "stamps",
    "shells",
)


def _chain(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 12)
    return (
        f"Question: What is ({a} + {b}) * {c}?\n"
        f"First add: {a} + {b} = {a + b}. Then multiply: {a + b} * {c} = {(a + b) * c}.\nAnswer: "
        f"{(a + b) * c}"
    )


def _column_addition(rng: random.Random) -> str:
    a, b = rng.randint(100, 9999), rng.randint(100, 9999)
    steps, carry, place = [], 0, 1
    while place <= max(a, b):
        x, y = a // place % 10, b // place % 10
        total = x + y + carry
        steps.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry, place = total // 10, place * 10
    return f"Question: Add {a} and {b} digit by digit.\n" + "\n".join(steps) + f"\nAnswer: {a + b}"


def _purchase(rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    n, price, extra = rng.randint(2, 20), rng.randint(2, 15), rng.randint(1, 60)
    paid = n * price + extra
    return (
        f"Question: {name} buys {n} {thing} for ${price} each and pays with ${paid}. How much change is "
        f"due?\nThe {thing} cost {n} * {price} = ${n * price}. The change is {paid} - {n * price} = "
        f"${extra}.\nAnswer: {extra}"
    )


def _sharing(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    thing, each, people, left = rng.choice(_THINGS), rng.randint(3, 25), rng.randint(2, 9), rng.randint(0, 1)
    total = each * people + left
    rest = f" with {left} left over" if left else ""
    return (
        f"Question: {first} and {second} share {total} {thing} equally among {people} children. How many "
        f"does each get?\n{total} divided by {people} is {each}{rest}, because {people} * {each} = "
        f"{each * people}.\nAnswer: {each}"
    )


def _journey(rng: random.Random) -> str:
    name, speed, hours, stop = rng.choice(_NAMES), rng.randint(4, 90), rng.randint(2, 9), rng.randint(1, 3)
    return (
        f"Question: {name} travels {hours} hours at {speed} km per hour and rests {stop} hours in between. "
        f"How far is the journey, and how long does it take?\nThe distance is {speed} * {hours} = "
        f"{speed * hours} km. The time is {hours} + {stop} = {hours + stop} hours.\nAnswer: {speed * hours} "
        f"km in {hours + stop} hours"
    )


def _percentage(rng: random.Random) -> str:
    percent, hundreds = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), rng.randint(1, 40)
    base = hundreds * 20
    part = percent * base // 100  # exact: base is a multiple of 20 and percent of 5
    return (
        f"Question: A price of ${base} falls by {percent} percent. What is the new price?\n"
        f"{percent} percent of {base} is {base} * {percent} / 100 = {part}. The new price is {base} - {part} "
        f"= {base - part}.\nAnswer: {base - part}"
    )

"""Generated task dialogues: a user with a request, an assistant that asks, answers, corrects and books.

Two kinds: bookings, whose slots are asked for in any order, given early, or changed later; and repairs, where steps are
tried until one helps. Values, phrases, order and length vary; totals are computed, so every sum that is said is right.
What is said comes from dialogue_phrases.py.
"""

from __future__ import annotations

from eopc_compiler.calibration.dialogue_phrases import (
    ACKNOWLEDGED,
    AGREED,
    CHANGES,
    FAILED,
    FIRST,
    GOODBYES,
    NAMES,
    NEXT,
    REPAIRS,
    SERVICES,
    SINCE,
    SUMMARIES,
    THANKS,
    WATCH,
    WORKED,
    Rng,
    Service,
    Slot,
)


def task_dialogues(count: int, rng: Rng) -> tuple[str, ...]:
    """Documents of one dialogue each, lines "User: ..." and "Assistant: ..." in turn."""
    return tuple(_book(rng, rng.choice(SERVICES)) if rng.random() < 0.75 else _mend(rng) for _ in range(count))


def _book(rng: Rng, service: Service) -> str:
    """One booking from the first request to the goodbye."""
    values = {slot.name: slot.value(rng) for slot in service.slots}
    early = rng.sample(service.slots, rng.randint(0, 2))
    passing = "".join(" " + slot.in_passing.format(values[slot.name]) for slot in early)
    turns = [rng.choice(service.openings).format(passing)]
    missing = [slot for slot in service.slots if slot not in early]
    rng.shuffle(missing)
    for slot in missing:
        turns += [rng.choice(ACKNOWLEDGED) + rng.choice(slot.questions), _answer(rng, slot, values)]
        if rng.random() < 0.15:
            question, fact = rng.choice(service.facts)
            turns[-1] += " " + question.format(who=rng.choice(NAMES))
            turns += [
                fact.format(n=rng.randint(2, 12), hour=rng.randint(6, 11), who=rng.choice(NAMES)),
                rng.choice(THANKS),
            ]
    if rng.random() < 0.3:
        changed = rng.choice(service.slots)
        before = _summary(rng, values)
        values[changed.name] = _other(rng, changed, values[changed.name])
        turns += [before, f"{rng.choice(CHANGES)} {changed.name}: {values[changed.name]}."]
    turns += [_summary(rng, values), rng.choice(AGREED), _closing(rng, service, values), rng.choice(THANKS)]
    return _script([*turns, rng.choice(GOODBYES)])


def _answer(rng: Rng, slot: Slot, values: dict[str, str]) -> str:
    return rng.choice(slot.answers).format(values[slot.name])


def _other(rng: Rng, slot: Slot, value: str) -> str:
    """A value of the slot that is not the one it has."""
    while (other := slot.value(rng)) == value:
        pass
    return other


def _summary(rng: Rng, values: dict[str, str]) -> str:
    """What has been understood, in any order."""
    items = list(values.items())
    rng.shuffle(items)
    return rng.choice(SUMMARIES).format(", ".join(f"{name} {value}" for name, value in items))


def _closing(rng: Rng, service: Service, values: dict[str, str]) -> str:
    """The reference and what it costs: per night, per person, or per piece where neither was said."""
    units = int(values.get("nights") or values.get("people") or rng.randint(2, 6))
    price, fee = rng.randint(*service.price), rng.randint(1, 9)
    total = f"{units} at ${price} each plus a fee of ${fee}, ${units * price + fee} in all"
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(3))
    return rng.choice(service.done).format(ref=f"{letters}-{rng.randint(1000, 9999)}", total=total)


def _mend(rng: Rng) -> str:
    """Steps are tried until one helps."""
    repair = rng.choice(REPAIRS)
    steps = rng.sample(repair.steps, rng.randint(2, len(repair.steps)))
    turns = [f"{rng.choice(repair.complaints)} It started {rng.choice(SINCE)}."]
    for index, (instruction, symptom) in enumerate(steps):
        lead = rng.choice(FIRST) if index == 0 else rng.choice(NEXT)
        turns.append(f"{lead} {instruction}")
        turns.append(
            f"{rng.choice(WORKED if index == len(steps) - 1 else FAILED)}{symptom if index < len(steps) - 1 else ''}"
        )
    turns += [
        f"{repair.cause} {rng.choice(WATCH).format(rng.randint(2, 10))}",
        rng.choice(THANKS),
        rng.choice(GOODBYES),
    ]
    return _script(turns)


def _script(turns: list[str]) -> str:
    """Turns under their speakers, the user first."""
    return "".join(f"{('User', 'Assistant')[i % 2]}: {turn[0].upper()}{turn[1:]}\n" for i, turn in enumerate(turns))

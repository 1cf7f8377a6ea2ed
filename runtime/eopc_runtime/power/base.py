"""The meter protocol: named windows that end in a record of joules, and of how far they can be trusted.

Windows may nest and overlap; each has its own name while it is open. A window that could not be measured is
`unverified`: its joules are None, never 0, and its notes say why. Gross energy includes idle power; the
idle-subtracted figure stands beside it where idle power is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Protocol, TypeVar

from eopc_runtime.jsonfields import plain

MEASURED, PROXY = "measured", "proxy"  # energy sources a meter can have

FAULTS = {
    "short": "shorter than MIN_WINDOW_S, or fewer than MIN_SAMPLES samples",
    "gaps": "less than MIN_COVERAGE of the window was integrated over",
    "zero": "every reading was 0 W, or the counter never moved",
    "stuck": "no reading changed for longer than a sensor under load stays still",
    "refused": "readings that cannot be, such as negative ones",
    "clock": "the clock went backwards",
    "lost": "the source stopped delivering",
    "suspect": "two ways to measure disagree",
    "none": "there is nothing to measure with",
}

MIN_WINDOW_S = 2.0  # shorter windows are dominated by the sensor's step and lag (about 0.35 s on Orin)
MIN_SAMPLES = 20  # of a sampling meter
MIN_COVERAGE = 0.98  # share of a window that must be integrated over, the rest being gaps

SelfT = TypeVar("SelfT", bound="Meter")


@dataclass(frozen=True, slots=True)
class Window:
    """One finished window. Joules are None where `verified` is False; `notes` say why, and what else to know."""

    name: str
    meter: str
    source: str  # measured | proxy
    energy_j: float | None  # gross: idle power included
    energy_idle_subtracted_j: float | None  # gross - idle_w x covered_s; None where idle power is not known
    idle_w: float | None
    mean_w: float | None  # over the covered time; also of an unverified window, for diagnosis
    duration_s: float
    covered_s: float
    samples: int
    rails: tuple[str, ...]  # whose sum the energy is
    rails_j: Mapping[str, float | None]  # each of them, and sub-rails that are not added
    steps_w: Mapping[str, float]  # the smallest change a rail can show, where known
    verified: bool
    faults: tuple[str, ...]  # names of what speaks against it, of FAULTS; empty where verified
    notes: tuple[str, ...]  # the faults in words, then other things to know

    def to_json(self) -> dict[str, object]:
        """Return the fields as a JSON object."""
        return plain(asdict(self))


@dataclass(frozen=True, slots=True)
class Sensor:
    """What a meter reads, and what identifies its figures: they compare only with figures of the same rails."""

    name: str  # ina3221, tegrastats, nvml, rapl, proxy, none
    rails: tuple[str, ...]  # whose sum is the total
    sub_rails: tuple[str, ...] = ()  # read too, but not added
    steps_w: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)  # chips, on-chip averaging, device
    remarks: tuple[str, ...] = ()  # what every window must say
    source: str = MEASURED


class Meter(Protocol):
    """Measures joules in named windows. Implementations subclass this for `with` and nothing else."""

    sensor: Sensor
    idle_w: float | None  # set it once it was measured; windows that end later carry idle-subtracted joules

    def begin(self, name: str) -> None:
        """Open a window; ValueError when one of this name is open."""
        ...

    def end(self, name: str) -> Window:
        """Close a window and return what was measured in it; ValueError when there is none of this name."""
        ...

    def energy_so_far_j(self, name: str) -> float:
        """Return the gross joules of an open window until now; MeterLostError when the source stopped delivering."""
        ...

    def close(self) -> None:
        """Release the sensor; open windows are forgotten."""
        ...

    def __enter__(self: SelfT) -> SelfT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def finish(
    meter: Meter,
    name: str,
    joules: Mapping[str, float],
    *,
    duration_s: float,
    covered_s: float,
    samples: int,
    faults: Mapping[str, str],
    remarks: Iterable[str] = (),
) -> Window:
    """Return the record of a window; any fault makes it unverified.

    Args:
        joules: per rail over the covered time; nan where a rail was not read throughout.
        faults: reasons not to trust the window, by their name in FAULTS.
        remarks: things to know that do not speak against it, beside those of the sensor.
    """
    sensor = meter.sensor
    total_j = sum(joules[rail] for rail in sensor.rails) if sensor.rails and joules else math.nan
    known = covered_s > 0 and math.isfinite(total_j)
    if not known and not faults:
        faults = {"lost": "nothing was measured"}
    verified = not faults
    idle_j = None if meter.idle_w is None else meter.idle_w * covered_s
    return Window(
        name=name,
        meter=sensor.name,
        source=sensor.source,
        energy_j=total_j if verified else None,
        energy_idle_subtracted_j=total_j - idle_j if verified and idle_j is not None else None,
        idle_w=meter.idle_w,
        mean_w=total_j / covered_s if known else None,
        duration_s=duration_s,
        covered_s=covered_s,
        samples=samples,
        rails=sensor.rails,
        rails_j={rail: j if verified and math.isfinite(j) else None for rail, j in joules.items()},
        steps_w=sensor.steps_w,
        verified=verified,
        faults=tuple(faults),
        notes=(*faults.values(), *dict.fromkeys((*sensor.remarks, *remarks))),
    )


@dataclass(frozen=True, slots=True)
class IdlePower:
    """Mean power while nothing runs; `power_w` is None where it could not be measured, and `notes` say why."""

    power_w: float | None
    seconds: float
    samples: int
    meter: str
    source: str
    rails: tuple[str, ...]
    notes: tuple[str, ...]


def measure_idle(
    meter: Meter,
    seconds: float = 10.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> IdlePower:
    """Measure mean power while this process only sleeps; the caller sees to it that nothing else runs.

    A reading that never changed is a fault under load, but normal on an idle board with a coarse sensor, so
    here it is noted and the figure is kept. A proxy cannot measure idle power: its watts are assumed.
    """
    window_name = "idle"
    meter.begin(window_name)
    until = clock() + seconds
    while (left := until - clock()) > 0:
        sleep(left)
    window = meter.end(window_name)
    notes = window.notes
    usable = set(window.faults) <= {"stuck"}
    if window.source != MEASURED:
        usable, notes = False, (*notes, f"a {window.source} meter has no idle power to measure")
    return IdlePower(
        power_w=window.mean_w if usable else None,
        seconds=window.covered_s,
        samples=window.samples,
        meter=window.meter,
        source=window.source,
        rails=window.rails,
        notes=notes,
    )

"""How the prices of a table were measured: the records that make a calibrated joule checkable.

A prior has none of these. A calibrated table says over which lengths it holds (`Hull`), what its margin is
worth (`Conformal`), which meter and rails it was read from (`MeterRecord`) and on which device, in which
power mode and with which engine (`Identity`). All are read strictly; what was not recorded is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields

# Beyond the hull a price is raised by this share for every factor of 4. Fits of 25 public AGX Orin engine sets on
# lengths up to 1024, tried at 4096, were off by 3.9 % in the mean and 16.9 % at worst.
EXTRAPOLATION = 0.2


@dataclass(frozen=True, slots=True)
class Hull:
    """The rectangle of prompt and answer lengths that were measured, in tokens, bounds included."""

    n_in: tuple[int, int]
    n_out: tuple[int, int]

    def __post_init__(self) -> None:
        for name, (low, high) in (("n_in", self.n_in), ("n_out", self.n_out)):
            if not 1 <= low <= high:
                raise BundleError(f"The calibrated range of {name} is {low} to {high}, which is no range of tokens.")

    def holds(self, n_in: int, n_out: int) -> bool:
        """True if a sequence of these lengths lies within what was measured."""
        return self.n_in[0] <= n_in <= self.n_in[1] and self.n_out[0] <= n_out <= self.n_out[1]

    def inflation(self, n_in: int, n_out: int) -> float:
        """Return the factor for prices at these lengths: 1 inside, 1.2 up to four times outside, then more."""
        excess = max(self.n_in[0] / n_in, n_in / self.n_in[1], self.n_out[0] / n_out, n_out / self.n_out[1], 1.0)
        factor = 1.0
        while excess > 1:
            factor, excess = factor * (1 + EXTRAPOLATION), excess / 4
        return factor

    def __str__(self) -> str:
        return f"{self.n_in[0]} to {self.n_in[1]} prompt and {self.n_out[0]} to {self.n_out[1]} new tokens"

    @classmethod
    def from_fields(cls, record: Fields) -> Hull:
        """Read the hull strictly."""
        hull = cls(_range(record, "n_in"), _range(record, "n_out"))
        record.done()
        return hull


@dataclass(frozen=True, slots=True)
class Conformal:
    """What a margin is worth: of k cells kept out of the fit, the level asked for and the level really held.

    A new sequence costs more than predicted x (1 + q) with a probability of at most 1 - level. The level is
    below 1 - alpha where k is too small for it (19 cells are needed for 95 %, 99 for 99 %).
    """

    alpha: float
    k: int
    q: float
    level: float

    def __post_init__(self) -> None:
        if not (0 < self.alpha < 1 and self.k >= 1 and 0 < self.level < 1 and self.q > -1):
            raise BundleError(
                f"The margin's record (alpha {self.alpha}, k {self.k}, q {self.q}, level {self.level}) is impossible. "
                "Calibrate again."
            )

    @property
    def short(self) -> bool:
        """True if there were too few cells for the level asked for."""
        return self.level < 1 - self.alpha - 1e-12

    @classmethod
    def from_fields(cls, record: Fields) -> Conformal:
        """Read the margin's record strictly."""
        found = cls(
            alpha=record.number("alpha", minimum=0),
            k=record.integer("k", minimum=1),
            q=record.number("q"),
            level=record.number("level", minimum=0),
        )
        record.done()
        return found


@dataclass(frozen=True, slots=True)
class MeterRecord:
    """The meter behind the joules: its name, the rails whose sum it reads, idle power, what it cannot resolve."""

    name: str
    rails: tuple[str, ...]
    idle_w: float | None
    quantum_j: float | None  # one sensor step x sampling period

    @classmethod
    def from_fields(cls, record: Fields) -> MeterRecord:
        """Read the meter's record strictly."""
        meter = cls(
            name=record.text("name"),
            rails=record.texts("rails"),
            idle_w=record.number_or_none("idle_w", minimum=0),
            quantum_j=record.number_or_none("quantum_j", minimum=0),
        )
        record.done()
        return meter


@dataclass(frozen=True, slots=True)
class Identity:
    """What a calibrated price belongs to; a field that is null was not recorded and matches everything."""

    module: str | None = None  # from the device tree, for example p3701-0005
    l4t: str | None = None
    power_mode: str | None = None
    clocks: str | None = None  # for example "jetson_clocks" or "dvfs"
    emc_mhz: float | None = None
    rails: tuple[str, ...] | None = None
    runner: str | None = None
    engine: str | None = None  # fingerprint of the engines or graphs
    batch: int | None = None

    def differences(self, other: Identity) -> tuple[str, ...]:
        """Return what is recorded on both sides and differs, for example `power_mode: MAXN, not 15W`."""
        found = []
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "rails" and mine is not None and theirs is not None:
                mine, theirs = "+".join(sorted(mine)), "+".join(sorted(theirs))
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{item.name}: {mine}, not {theirs}")
        return tuple(found)

    @classmethod
    def from_fields(cls, record: Fields) -> Identity:
        """Read the identity strictly."""
        identity = cls(
            module=record.text_or_none("module"),
            l4t=record.text_or_none("l4t"),
            power_mode=record.text_or_none("power_mode"),
            clocks=record.text_or_none("clocks"),
            emc_mhz=record.number_or_none("emc_mhz", minimum=0),
            rails=None if record.raw("rails") is None else record.texts("rails"),
            runner=record.text_or_none("runner"),
            engine=record.text_or_none("engine"),
            batch=record.integer_or_none("batch", minimum=1),
        )
        record.done()
        return identity


@dataclass(frozen=True, slots=True)
class Calibration:
    """The provenance of a calibrated table; mape_cv is the held-out error per tier, as a share (0.01 = 1 %)."""

    hull: Hull | None
    conformal: Conformal | None
    cells: int
    mape_cv: Mapping[str, float]
    meter: MeterRecord | None
    identity: Identity | None

    @classmethod
    def from_fields(cls, record: Fields) -> Calibration:
        """Read the provenance strictly; every part may be null, none may be missing."""
        calibration = cls(
            hull=None if record.raw("hull") is None else Hull.from_fields(record.child("hull")),
            conformal=None if record.raw("conformal") is None else Conformal.from_fields(record.child("conformal")),
            cells=record.integer("cells", minimum=0),
            mape_cv=record.numbers_by_name("mape_cv"),
            meter=None if record.raw("meter") is None else MeterRecord.from_fields(record.child("meter")),
            identity=None if record.raw("identity") is None else Identity.from_fields(record.child("identity")),
        )
        record.done()
        return calibration


def _range(record: Fields, key: str) -> tuple[int, int]:
    values = record.integers(key)
    if len(values) != 2:
        record.fail(f'"{key}" must be [lowest, highest].')
    return values[0], values[1]

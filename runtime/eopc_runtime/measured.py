"""Energy of public measurements: fitted coefficients per model, engine and precision on one device.

A device may have a file in `profiles/measured/`. It holds figures, not data: the six coefficients of each fit, the
lengths they hold for, their error, and source and licence of the measurements. They are `calibrated` for that model,
that engine and that board, power mode, clocks and rails, and for nothing else: `find` takes exact names and never the
nearest model. What no fit is there for is priced by the prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from eopc_runtime.energy import TierEnergy
from eopc_runtime.energy_model.forms import FORMS, Theta
from eopc_runtime.errors import DeviceError
from eopc_runtime.jsonfields import Fields, did_you_mean, parse_json
from eopc_runtime.provenance import Conformal, Hull, Identity, MeterRecord

MEASURED_SCHEMA = 1
KIND = "eopc measured energy"
# How sequences ran: one at a time, or many at once, sharing the energy of the weights.
SERVING = ("single", "throughput")


@dataclass(frozen=True, slots=True)
class Source:
    """Where measurements come from, under which licence, and how they were taken; what is not known is None.

    `changes` says what was done to them. `identity` leaves out the runner, which is each fit's engine.
    """

    title: str
    authors: str
    doi: str | None
    repository: str | None
    commit: str | None
    file: str | None
    licence: str
    changes: str
    meter: MeterRecord
    identity: Identity

    @classmethod
    def from_fields(cls, fields: Fields) -> Source:
        """Read the source strictly; a licence and what was changed must be named, and a way to find it."""
        found = cls(
            title=fields.text("title"),
            authors=fields.text("authors"),
            doi=fields.text_or_none("doi"),
            repository=fields.text_or_none("repository"),
            commit=fields.text_or_none("commit"),
            file=fields.text_or_none("file"),
            licence=fields.text("licence"),
            changes=fields.text("changes"),
            meter=MeterRecord.from_fields(fields.child("meter")),
            identity=Identity.from_fields(fields.child("identity")),
        )
        if not found.licence.strip():
            fields.fail('"licence" is empty; figures without a licence are not shipped.')
        if found.doi is None and found.repository is None:
            fields.fail("a source needs a doi or a repository to be found by.")
        fields.done()
        return found


@dataclass(frozen=True, slots=True)
class MeasuredFit:
    """The energy of one model on one engine: joules per sequence by θ, within `hull`.

    Errors are shares (0.01 = 1 %): mape_cv and worst_cv on cells left out of the fit, None where only the error in
    sample was published. conformal is None where no cells were kept out for a margin. `batch` is the largest number
    of sequences at once, `coarse` says that the sensor was too slow for short windows.
    """

    source: str
    model: str
    size_class: str
    engine: str
    precision: str
    serving: str
    batch: int
    form: str
    theta: Theta
    hull: Hull
    cells: int
    rows: int | None
    mape_cv: float | None
    worst_cv: float | None
    mape_in_sample: float | None
    conformal: Conformal | None
    coarse: bool
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """`model/engine/precision`."""
        return f"{self.model}/{self.engine}/{self.precision}"

    @property
    def margin(self) -> float | None:
        """The share added to a price before it is promised; None where none is known."""
        return None if self.conformal is None else max(self.conformal.q, 0.0)

    def tier(self) -> TierEnergy:
        """Return the prices by phase; their energy source is `calibrated`."""
        return self.theta.to_tier("t0", "calibrated")


@dataclass(frozen=True, slots=True)
class MeasuredEnergy:
    """All fits of a device, and their sources by name."""

    device: str
    notes: tuple[str, ...]
    sources: Mapping[str, Source]
    fits: tuple[MeasuredFit, ...]

    def identity(self, item: MeasuredFit) -> Identity:
        """Return what the prices of a fit belong to: board, power mode, clocks, rails, engine, batch."""
        return replace(self.sources[item.source].identity, runner=item.engine, batch=item.batch)

    def find(self, model: str, engine: str, precision: str) -> MeasuredFit:
        """Return the fit of exactly this model, engine and precision; DeviceError names what there is.

        There is no nearest match: coefficients of one model predicted another with an error of 30 to 48 %.
        """
        wanted = f"{model}/{engine}/{precision}"
        for item in self.fits:
            if item.key == wanted:
                return item
        known = [item.key for item in self.fits]
        raise DeviceError(
            f"{self.device} has no measured energy of {wanted}.{did_you_mean(wanted, known)} There are: "
            f"{', '.join(known)}. They do not carry over to other models; calibrate, or use the prior."
        )


@cache
def load_measured(device: str) -> MeasuredEnergy | None:
    """Return the measured energies shipped for the device of this name (no alias), None where there are none."""
    entry = files("eopc_runtime") / "_profiles" / "measured" / f"{device}.json"
    return parse_measured(entry.read_text(encoding="utf-8"), device) if entry.is_file() else None


def parse_measured(text: str, device: str) -> MeasuredEnergy:
    """Read the measured energies of a device strictly from JSON text; DeviceError says what is wrong with it."""
    where = f"measured/{device}.json"
    fields = Fields(parse_json(text, where, DeviceError), where, DeviceError)
    fields.text("kind", choices=[KIND])
    if (schema := fields.integer("schema")) != MEASURED_SCHEMA:
        fields.fail(f"schema {schema} is not known; this eopc reads schema {MEASURED_SCHEMA}. Upgrade eopc.")
    if fields.text("device") != device:
        fields.fail(f'"device" must be "{device}", the name of the file.')
    sources = {name: Source.from_fields(child) for name, child in fields.children_by_name("sources").items()}
    found = MeasuredEnergy(
        device=device,
        notes=fields.texts("notes"),
        sources=MappingProxyType(sources),
        fits=tuple(_fit(child, sources) for child in fields.children("fits")),
    )
    fields.done()
    keys = [item.key for item in found.fits]
    if not keys:
        fields.fail("there is no fit in it.")
    for key in keys:
        if keys.count(key) > 1:
            fields.fail(f"it has {key} twice; which of them holds?")
    return found


def _fit(fields: Fields, sources: Mapping[str, Source]) -> MeasuredFit:
    theta, coarse = fields.child("theta"), fields.raw("coarse")
    if not isinstance(coarse, bool):
        fields.fail('"coarse" must be true or false.')
    names = [f"theta{i}" for i in range(6)]
    found = MeasuredFit(
        source=fields.text("source", choices=sources),
        model=fields.text("model"),
        size_class=fields.text("size_class"),
        engine=fields.text("engine"),
        precision=fields.text("precision"),
        serving=fields.text("serving", choices=SERVING),
        batch=fields.integer("batch", minimum=1),
        form=fields.text("form", choices=FORMS),
        theta=Theta(theta.number(names[0]), *(theta.number(name, minimum=0) for name in names[1:])),
        hull=Hull.from_fields(fields.child("hull")),
        cells=fields.integer("cells", minimum=1),
        rows=fields.integer_or_none("rows", minimum=1),
        mape_cv=fields.number_or_none("mape_cv", minimum=0),
        worst_cv=fields.number_or_none("worst_cv", minimum=0),
        mape_in_sample=fields.number_or_none("mape_in_sample", minimum=0),
        conformal=None if fields.raw("conformal") is None else Conformal.from_fields(fields.child("conformal")),
        coarse=coarse,
        notes=fields.texts("notes"),
    )
    theta.done()
    fields.done()
    _check(fields, found)
    return found


def _check(fields: Fields, found: MeasuredFit) -> None:
    """Refuse what cannot be: no price at all, an error nobody stated, one sequence at a time in a batch."""
    if not any(astuple(found.theta)[1:]):
        fields.fail("every price in it is 0.")
    if found.mape_cv is None and found.mape_in_sample is None:
        fields.fail('it states no error; give "mape_cv" or "mape_in_sample".')
    if (found.serving == "single") != (found.batch == 1):
        fields.fail(f'"serving" is {found.serving}, but "batch" is {found.batch}.')

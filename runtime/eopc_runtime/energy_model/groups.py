"""The fit of one group of measurements with all that is known about it, and the file that carries such fits.

A coefficients file (JSON) holds one record per group: coefficients, hull, margin and errors; figures only, not the
measurements. `eopc energy predict` and `sweetspot` read it like a bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from eopc_runtime.energy_model.conformal import ALPHA, margin_of
from eopc_runtime.energy_model.fit import AUTO, choose_form, cross_validate, fit, relative_errors
from eopc_runtime.energy_model.forms import FORMS, PUBLISHED, Theta
from eopc_runtime.energy_model.rows import Group
from eopc_runtime.errors import UsageError
from eopc_runtime.jsonfields import Fields, did_you_mean, plain, read_json
from eopc_runtime.provenance import Conformal, Hull

COEFFICIENTS_SCHEMA = 1
KIND = "eopc energy coefficients"


@dataclass(frozen=True, slots=True)
class GroupFit:
    """A fitted group. Errors are shares (0.01 = 1 %); conformal is None where no cells could be kept out."""

    key: str
    by: Mapping[str, str]
    form: str
    theta: Theta
    hull: Hull
    cells: int
    rows: int
    mape_cv: float
    worst_cv: float
    mape_in_sample: float
    conformal: Conformal | None
    coarse: bool
    warnings: tuple[str, ...]

    @property
    def margin(self) -> float | None:
        """The share added to a prediction before it is promised."""
        return None if self.conformal is None else max(self.conformal.q, 0.0)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A group that cannot be fitted, and why."""

    key: str
    by: Mapping[str, str]
    reason: str
    warnings: tuple[str, ...]


def fit_group(group: Group, form: str = AUTO, alpha: float = ALPHA, seed: int = 0) -> GroupFit | Refusal:
    """Fit a group, with its error on cells left out and its margin; a group too poor to fit is a Refusal."""
    samples, cells = group.samples, group.samples.cells()
    try:
        chosen = choose_form(form, len(cells))
        whole = fit(samples, chosen)
        theta = whole.theta
        held_out = cross_validate(samples, chosen, seed=seed)
    except UsageError as error:
        return Refusal(group.key, group.by, str(error), group.warnings)
    conformal = margin_of(samples, chosen, whole, alpha, seed)
    warnings = list(group.warnings)
    if whole.given_up:
        warnings.append(f"the lengths measured cannot tell {whole.given_up} of the coefficients apart; they are 0")
    if conformal is None:
        warnings.append(f"no cells could be kept out of the fit for a margin: {len(cells)} cells, 13 are the fewest")
    elif conformal.short:
        warnings.append(f"the margin holds {conformal.level:.0%}, not {1 - alpha:.0%}: {conformal.k} cells kept out")
    return GroupFit(
        key=group.key,
        by=group.by,
        form=chosen.name,
        theta=theta,
        hull=samples.hull(),
        cells=len(cells),
        rows=len(samples),
        mape_cv=held_out.mape,
        worst_cv=held_out.worst,
        mape_in_sample=float(relative_errors(whole, samples).mean()),
        conformal=conformal,
        coarse=group.coarse,
        warnings=tuple(warnings),
    )


def compare_forms(group: Group, seed: int = 0) -> dict[str, float]:
    """Return the held-out error of each published form, by its published name, as shares."""
    return {shown: cross_validate(group.samples, FORMS[name], seed=seed).mape for name, shown in PUBLISHED.items()}


def mean_held_out(fits: Sequence[GroupFit]) -> tuple[float | None, int]:
    """Return the mean held-out error and over how many groups; coarsely sampled ones say nothing of the model."""
    errors = [item.mape_cv for item in fits if not item.coarse]
    return (sum(errors) / len(errors) if errors else None), len(errors)


def pick(fits: Sequence[GroupFit], key: str | None) -> GroupFit:
    """Return the fit with this key, or the only one; UsageError names what there is."""
    known = [item.key for item in fits]
    if key is None:
        if len(fits) == 1:
            return fits[0]
        raise UsageError(f"There are {len(fits)} fits; name one with --key: {', '.join(known)}.")
    for item in fits:
        if item.key == key:
            return item
    raise UsageError(f'There is no fit "{key}".{did_you_mean(key, known)} There are: {", ".join(known)}.')


def coefficients_json(fits: Sequence[GroupFit]) -> dict[str, object]:
    """Return the content of a coefficients file."""
    return plain({"schema": COEFFICIENTS_SCHEMA, "kind": KIND, "groups": [asdict(item) for item in fits]})


def read_coefficients(path: Path) -> tuple[GroupFit, ...]:
    """Read a coefficients file strictly; UsageError says what is wrong with it."""
    fields = Fields(read_json(path, str(path), UsageError), str(path), UsageError)
    fields.text("kind", choices=[KIND])
    if (schema := fields.integer("schema")) != COEFFICIENTS_SCHEMA:
        fields.fail(f"schema {schema} is not known; this eopc reads schema {COEFFICIENTS_SCHEMA}.")
    fits = tuple(_read_fit(child) for child in fields.children("groups"))
    fields.done()
    if not fits:
        fields.fail("there is no fit in it.")
    return fits


def _read_fit(fields: Fields) -> GroupFit:
    theta, coarse = fields.child("theta"), fields.raw("coarse")
    if not isinstance(coarse, bool):
        fields.fail('"coarse" must be true or false.')
    names = [f"theta{i}" for i in range(6)]
    found = GroupFit(
        key=fields.text("key"),
        by=fields.texts_by_name("by"),
        form=fields.text("form", choices=FORMS),
        theta=Theta(theta.number(names[0]), *(theta.number(name, minimum=0) for name in names[1:])),
        hull=Hull.from_fields(fields.child("hull")),
        cells=fields.integer("cells", minimum=1),
        rows=fields.integer("rows", minimum=1),
        mape_cv=fields.number("mape_cv", minimum=0),
        worst_cv=fields.number("worst_cv", minimum=0),
        mape_in_sample=fields.number("mape_in_sample", minimum=0),
        conformal=None if fields.raw("conformal") is None else Conformal.from_fields(fields.child("conformal")),
        coarse=coarse,
        warnings=fields.texts("warnings"),
    )
    theta.done()
    fields.done()
    if not any(astuple(found.theta)[1:]):
        fields.fail("every price in it is 0.")
    return found

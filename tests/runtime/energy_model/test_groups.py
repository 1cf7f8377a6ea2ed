"""A group's fit with all that is known of it, and the file that carries it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.energy_model.folds import Samples
from eopc_runtime.energy_model.forms import Theta
from eopc_runtime.energy_model.groups import (
    GroupFit,
    Refusal,
    coefficients_json,
    fit_group,
    mean_held_out,
    pick,
    read_coefficients,
)
from eopc_runtime.energy_model.rows import Group
from eopc_runtime.errors import EopcError, UsageError

THETA = Theta(-2.0, 0.003, 1e-6, 0.4, 1e-5, 1e-5)
LENGTHS = (16, 32, 64, 128, 256, 512)


def group(cells: int = 36, key: str = "a", coarse: bool = False) -> Group:
    """Exact energies of a θ over the first cells of a 6 x 6 grid."""
    chosen = [(n, m) for n in LENGTHS for m in LENGTHS][:cells]
    samples = Samples.of((n, m, THETA.energy_j(float(n), float(m))) for n, m in chosen)
    return Group(key, {"engine": key}, samples, (), coarse)


def fitted(**options: Any) -> GroupFit:
    """A group that can be fitted, fitted."""
    found = fit_group(group(**options))
    assert isinstance(found, GroupFit)
    return found


def test_a_group_has_its_error_margin_and_hull() -> None:
    """Exact energies of 36 cells: no error, a margin at 95 % from 19 cells, the hull of what was measured."""
    item = fitted()
    assert (item.cells, item.rows, item.form) == (36, 36, "quadratic")
    assert item.mape_cv < 1e-6
    assert item.theta.theta0 == pytest.approx(-2.0, rel=1e-3)
    assert item.conformal is not None
    assert (item.conformal.k, item.conformal.level) == (19, pytest.approx(0.95))
    assert item.margin == max(item.conformal.q, 0.0)
    assert (item.hull.n_in, item.hull.n_out) == ((16, 512), (16, 512))
    assert item.warnings == ()


def test_a_short_margin_and_a_missing_one_are_said() -> None:
    """24 cells spare 12, which hold 92 %; 12 cells spare none; asked for 99 %, 36 cells hold 96 %."""
    assert fitted(cells=24).warnings == ("the margin holds 92%, not 95%: 12 cells kept out",)
    bare = fitted(cells=12)
    assert (bare.margin, bare.conformal) == (None, None)
    assert any("12 cells, 13 are the fewest" in warning for warning in bare.warnings)
    strict = fit_group(group(), alpha=0.01)
    assert isinstance(strict, GroupFit)
    assert strict.conformal is not None
    assert strict.conformal.level == pytest.approx(24 / 25)


def test_a_poor_group_is_refused_with_the_reason() -> None:
    """Five cells, or a form that prices nothing: no coefficients, and why."""
    found = fit_group(group(cells=5))
    assert isinstance(found, Refusal)
    assert "at least 6 are needed" in found.reason
    comparison = fit_group(group(), form="b3")
    assert isinstance(comparison, Refusal)
    assert "comparison only" in comparison.reason


def test_the_mean_leaves_coarse_groups_out_and_says_how_many_it_is_over() -> None:
    """A sensor's error says nothing of the model; without any group there is no mean."""
    assert mean_held_out([fitted(), fitted(coarse=True)])[1] == 1
    assert mean_held_out([fitted(coarse=True)]) == (None, 0)


def test_a_coefficients_file_survives_reading(tmp_path: Path) -> None:
    """Writing and reading gives the same fits."""
    fits = (fitted(), fitted(cells=12, key="b"))
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(coefficients_json(fits)))
    assert read_coefficients(path) == fits


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: o.update(kind="other"), "eopc energy coefficients"),
        (lambda o: o.update(schema=9), "schema 9 is not known"),
        (lambda o: o.update(groups=[]), "no fit in it"),
        (lambda o: o["groups"][0].update(thets={}), 'unknown key "thets". Did you mean "theta"'),
        (lambda o: o["groups"][0]["theta"].update(theta3=-1), "at least 0"),
        (lambda o: o["groups"][0]["theta"].update(dict.fromkeys((f"theta{i}" for i in range(1, 6)), 0)), "price in it"),
        (lambda o: o["groups"][0]["hull"].update(n_in=[5]), "[lowest, highest]"),
        (lambda o: o["groups"][0]["conformal"].update(level=2), "impossible"),
        (lambda o: o["groups"][0].update(coarse=1), "true or false"),
    ],
)
def test_a_malformed_coefficients_file_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    """Unknown keys, wrong types and impossible numbers are named."""
    content: dict[str, Any] = coefficients_json([fitted()])
    change(content)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(content))
    with pytest.raises(EopcError) as caught:
        read_coefficients(path)
    assert says in str(caught.value)


def test_one_fit_is_picked_by_its_key() -> None:
    """The only one needs no name; of several one must be named, rightly."""
    one, two = fitted(), fitted(key="b")
    assert pick([one], None) is one
    assert pick([one, two], "b") is two
    with pytest.raises(UsageError, match="name one with --key: a, b"):
        pick([one, two], None)
    with pytest.raises(UsageError, match='no fit "c"'):
        pick([one, two], "c")

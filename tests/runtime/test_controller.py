"""The controller: the ledger, corrected by a meter; every decision follows from what it was told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.admission import Terms
from eopc_runtime.controller import Controller, Seen, Start, replay
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BudgetError, UsageError
from eopc_runtime.policy import Request
from eopc_runtime.provenance import Calibration, Conformal
from eopc_runtime.reconcile import Guard
from eopc_runtime.sequence_log import SequenceLog

STEP_J = (4.0, 2.0, 1.0)
WATTS = 40.0  # at this power; a lower tier is faster


def table(margin: float = 0.0, tiers: int = 3) -> EnergyTable:
    """Calibrated prices: steps of 4, 2 and 1 J, prompts at an eighth of that per token."""
    energies = tuple(
        TierEnergy(f"t{i}", 0.0, step / 8, 0.0, step, 0.0, 0.0, "calibrated") for i, step in enumerate(STEP_J[:tiers])
    )
    calibration = Calibration(None, Conformal(0.05, 19, margin, 0.95), 31, {}, None, None)
    return EnergyTable("board", "calibrated", margin, energies, None, calibration)


class Board:
    """A board whose steps cost the table's joules x a factor that changes with the step, at constant power.

    Its meter shows what was spent up to `lag_s` ago; from step `lost_at` on it fails.
    """

    def __init__(self, factor: Callable[[int], float], lag_s: float = 0.35, lost_at: int | None = None) -> None:
        self.factor, self.lag_s, self.lost_at = factor, lag_s, lost_at
        self.time_s, self.spent_j, self.step = 0.0, 0.0, 0
        self.history = [(0.0, 0.0)]

    def run(self, joules: float) -> None:
        """Compute something."""
        joules *= self.factor(self.step)
        self.step += 1
        self.time_s += joules / WATTS
        self.spent_j += joules
        self.history.append((self.time_s, self.spent_j))

    def reading_j(self) -> float:
        """What the meter shows now."""
        seen_s = self.time_s - self.lag_s
        for (t0, j0), (t1, j1) in pairwise(self.history):
            if t0 <= seen_s < t1:
                return j0 + (j1 - j0) * (seen_s - t0) / (t1 - t0)
        return 0.0 if seen_s < 0 else self.spent_j


def play(board: Board, start: Start, prices: EnergyTable | None = None) -> Controller:
    """Run a sequence on a board until the controller stops it."""
    controller = Controller(prices or table(), start)
    first = controller.begin(Seen(0.0))
    board.run(STEP_J[first.tier] * start.request.prompt_tokens / 8)
    while True:
        seen = Seen(board.time_s)
        if start.metered and controller.wants_reading(board.time_s):
            lost = board.lost_at is not None and board.step >= board.lost_at
            seen = Seen(board.time_s, None, "unplugged") if lost else Seen(board.time_s, board.reading_j())
        decision = controller.next(seen)
        if decision.action == "stop":
            return controller
        board.run(STEP_J[decision.tier])


def started(budget_j: float | None, wanted: int = 100, metered: bool = True, **terms: float) -> Start:
    """A request of 8 prompt tokens."""
    return Start(Request(8, wanted), budget_j, Terms(**terms), metered=metered)  # type: ignore[arg-type]


def test_without_a_meter_the_ledger_spends_the_budget_and_no_more() -> None:
    """60 J on a ladder that costs what it says: the model keeps the budget, and less than a step is left."""
    board = Board(lambda _: 1.0)
    controller = play(board, started(60.0, metered=False))
    assert controller.enforced_by == "model"
    assert controller.warnings == ()
    assert 59.0 < controller.ledger.spent_j <= 60.0
    assert board.spent_j == pytest.approx(controller.ledger.spent_j)


def test_a_board_that_costs_what_was_predicted_is_enforced_by_its_meter() -> None:
    """200 J with a meter: enforced by it, no warning, never above the budget."""
    board = Board(lambda _: 1.0)
    controller = play(board, started(200.0, wanted=60))
    assert controller.enforced_by == "meter"
    assert controller.warnings == ()
    assert board.spent_j <= 200.0
    assert "metered" not in controller.ledger.by_phase or controller.ledger.by_phase["metered"] < 10


@pytest.mark.parametrize("start_step", [0, 5, 20, 40])
def test_a_dearer_board_is_caught_by_the_meter(start_step: int) -> None:
    """From some step on everything takes and costs 1.3 times as much: the model overspends 200 J, the meter does not.

    Beyond one step's energy, that is.
    """

    def factor(step: int) -> float:
        return 1.3 if step >= start_step else 1.0

    blind = Board(factor)
    play(blind, started(200.0, wanted=400, metered=False), table(tiers=1))
    assert blind.spent_j > 200.0 + 1.3 * 4.0
    board = Board(factor)
    controller = play(board, started(200.0, wanted=400), table(tiers=1))
    assert board.spent_j <= 200.0 + 1.3 * 4.0
    assert board.spent_j > 150.0  # and most of the budget is used
    assert controller.enforced_by == "meter"
    if start_step <= 5:
        assert any("1.2" in w or "1.3" in w for w in controller.warnings)


def test_the_meter_moves_a_sequence_down_the_ladder_in_time() -> None:
    """40 steps were promised on t0; as the board drifts the rest runs on lower tiers, within the budget.

    At least 36 of them, as power that the meter may have missed is kept free; on t0 alone it would be fewer than 30.
    """
    board = Board(lambda _: 1.4)
    controller = play(board, started(172.0, wanted=41))
    tiers = [d.tier for d in controller.decisions if d.action != "stop"]
    assert controller.plan.label == "t0"
    assert tiers == sorted(tiers)
    assert tiers[-1] > 0
    assert 36 <= controller.done <= 40
    assert board.spent_j <= 172.0
    assert play(Board(lambda _: 1.4), started(172.0, wanted=41), table(tiers=1)).done < 30


def test_the_meter_never_lowers_the_debit() -> None:
    """A board that needs half of what was predicted gets no refund within the sequence."""
    board = Board(lambda _: 0.5)
    controller = play(board, started(400.0, wanted=400), table(tiers=1))
    spent = [d.spent_j for d in controller.decisions]
    assert spent == sorted(spent)
    assert board.spent_j == pytest.approx(controller.ledger.spent_j / 2, rel=0.01)
    assert controller.drift < 0.8  # but the next sequence will know


def test_a_meter_lost_in_mid_sequence_leaves_the_model_in_charge_and_says_so() -> None:
    """What it had shown stays booked; from there the debits count; the result names model and reason."""
    board = Board(lambda _: 1.3, lost_at=25)
    controller = play(board, started(200.0, wanted=400), table(tiers=1))
    assert controller.enforced_by == "model"
    (warning,) = [w for w in controller.warnings if "lost" in w]
    assert "unplugged" in warning
    assert "from there the model kept the budget" in warning
    assert controller.ledger.by_phase["metered"] > 5.0
    assert controller.ledger.spent_j <= 200.0


def test_a_meter_lost_from_the_start_is_no_meter() -> None:
    """The sequence runs as without one, and says why."""
    controller = Controller(table(), started(60.0))
    controller.begin(Seen(0.0, lost="permission denied"))
    assert not controller.wants_reading(5.0)
    assert controller.enforced_by == "model"
    assert "permission denied" in controller.warnings[0]


def test_a_stuck_meter_is_not_taken_for_a_cheap_board() -> None:
    """Constant readings for seconds end the trust; the debits went on all the while."""
    board = Board(lambda _: 1.0)
    board.reading_j = lambda: min(20.0, WATTS * max(board.time_s - 0.35, 0.0))  # type: ignore[method-assign]
    controller = play(board, started(400.0, wanted=400), table(tiers=1))
    assert controller.enforced_by == "model"
    assert "it has read 20 J" in controller.warnings[0]
    assert board.spent_j <= 400.0


def test_a_budget_that_is_spent_before_the_meter_sees_it_is_kept_by_the_model() -> None:
    """20 J last half a second; the sensor lags 0.35 s. The result does not claim otherwise."""
    board = Board(lambda _: 1.0)
    controller = play(board, started(20.0))
    assert controller.enforced_by == "model"
    assert "lags 0.35 s" in controller.warnings[0]
    assert board.spent_j <= 20.0


def test_a_meter_that_shows_nothing_enforces_nothing() -> None:
    """Zero joules for three seconds are no measurement; the model keeps the budget, and the result says so."""
    board = Board(lambda _: 1.0)
    board.reading_j = lambda: 0.0  # type: ignore[method-assign]
    controller = play(board, started(120.0, wanted=400), table(tiers=1))
    assert controller.enforced_by == "model"
    assert controller.drift == 1.0
    assert "had shown enough" in controller.warnings[0]
    assert board.spent_j <= 120.0


def test_a_meter_that_misses_a_rail_is_doubted() -> None:
    """A third of the prediction is more likely a rail that is not read than a miracle."""
    board = Board(lambda _: 1.0)
    board.reading_j = lambda: 0.3 * WATTS * max(board.time_s - 0.35, 0.0)  # type: ignore[method-assign]
    controller = play(board, started(400.0, wanted=400), table(tiers=1))
    assert any("all of the board's rails" in w for w in controller.warnings)
    assert board.spent_j <= 400.0


def test_without_a_budget_nothing_is_enforced() -> None:
    """The meter still tells the drift."""
    board = Board(lambda _: 1.3)
    controller = play(board, started(None, wanted=60))
    assert controller.enforced_by is None
    assert controller.done == 59
    assert controller.drift == pytest.approx(1.3, abs=0.1)


def test_a_drift_of_earlier_sequences_raises_the_first_price() -> None:
    """A sequence that starts with a drift of 1.3 is charged 1.3 times from the prompt on."""
    calm, hot = (Controller(table(), started(100.0, drift=d)).begin(Seen(0.0)) for d in (1.0, 1.3))
    assert hot.price_j == pytest.approx(1.3 * calm.price_j)


def test_several_steps_are_granted_only_where_they_are_paid_for() -> None:
    """With room 16 at once; near the end what is left; on a metered board one by one when power may surge past."""
    controller = Controller(table(tiers=1), started(100.0, wanted=400, metered=False))
    controller.begin(Seen(0.0))
    granted = []
    while (decision := controller.next(Seen(0.0, at_most=16))).action == "step":
        granted.append(decision.steps)
    assert granted == [16, 8]
    assert controller.ledger.spent_j == 4.0 + 24 * 4.0


def test_many_steps_at_once_keep_the_plan_of_finishing_below() -> None:
    """On a ladder a grant may not spend what the cheapest tier needs for the rest."""
    controller = Controller(table(), Start(Request(8, 41), 100.0, tier=0))
    controller.begin(Seen(0.0))
    while controller.next(Seen(0.0, at_most=16)).action == "step":
        pass
    assert controller.done == 40
    assert controller.ledger.spent_j <= 100.0


@settings(max_examples=100, deadline=None)
@given(
    st.floats(5.0, 400.0),
    st.lists(st.floats(0.5, 1.5), min_size=1, max_size=50),
    st.sampled_from([0.0, 0.03, 0.2]),
    st.booleans(),
    st.none() | st.integers(0, 40),
)
def test_every_decision_is_derivable_from_the_log(
    budget_j: float, factors: list[float], margin: float, metered: bool, lost_at: int | None
) -> None:
    """Whatever board and meter did, replaying what was seen gives the same decisions, also through JSON."""
    board = Board(lambda step: factors[step % len(factors)], lost_at=lost_at)
    prices = table(margin)
    try:
        controller = play(board, started(budget_j, wanted=80, metered=metered), prices)
    except BudgetError:
        return
    log = SequenceLog.of(controller)
    assert replay(prices, controller.start, controller.seen) == tuple(controller.decisions)
    back = SequenceLog.from_json(json.loads(json.dumps(log.to_json())))
    assert back == log
    assert back.replay(prices) == log.decisions


def test_a_log_replayed_with_other_prices_decides_otherwise() -> None:
    """The twin of the test above: the decisions do depend on the prices."""
    controller = play(Board(lambda _: 1.0), started(100.0, wanted=80))
    log = SequenceLog.of(controller)
    assert log.replay(table(0.3)) != log.decisions


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: o.update(schema=2), "schema 2"),
        (lambda o: o.update(sen=[]), 'unknown key "sen"'),
        (lambda o: o["seen"][0].pop(), "seen[0]"),
        (lambda o: o["seen"].append(["now", None, None, 1]), "cannot be 'now'"),
        (lambda o: o["decisions"][0].__setitem__(1, -1), "decisions[0][1]"),
        (lambda o: o["start"].update(metered=1), "true or false"),
        (lambda o: o["start"]["guard"].update(lag=1), 'unknown key "lag"'),
        (lambda o: o["start"]["terms"].update(safety=0.5), "1 or more"),
    ],
)
def test_a_malformed_log_is_refused(change: Callable[[dict[str, object]], None], says: str) -> None:
    """Wrong shapes and unknown keys are named."""
    content = SequenceLog.of(play(Board(lambda _: 1.0), started(50.0))).to_json()
    change(content)
    with pytest.raises(UsageError) as caught:
        SequenceLog.from_json(content)
    assert says in str(caught.value)


def test_an_overspend_that_the_meter_saw_is_said() -> None:
    """One phase that costs twice its price cannot be undone, but it is not hidden."""
    start = replace(started(60.0), guard=Guard(lag_s=0.0, settle_s=0.0))
    controller = Controller(table(tiers=1), start)
    controller.begin(Seen(0.0))
    controller.next(Seen(1.0, 70.0))
    assert controller.decisions[-1].action == "stop"
    assert controller.ledger.remaining_j < 0
    assert any("10 J more than the budget" in w for w in controller.warnings)
    assert not math.isnan(controller.ledger.spent_j)

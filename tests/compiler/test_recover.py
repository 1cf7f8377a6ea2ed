"""Recovery: a pruned model comes closer to the dense one, the same way every time, and never farther away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eopc_compiler.calibration import Domain
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.ladder import Mask, UnitOrder, full_mask
from eopc_compiler.model import Llama, build_model
from eopc_compiler.pruned import KeptLayer, slice_model
from eopc_compiler.recover import RecoverSettings, TrainingText, recover, recover_ladder, training_windows
from eopc_compiler.recover.distil import Distiller, RecoverReport
from eopc_compiler.recover.loss import Teacher, kl_divergence, normed_states, selection_losses
from eopc_compiler.recover.lowrank import add_low_rank, folded_weights
from eopc_compiler.recover.store import STATE_FILE
from eopc_compiler.recover.text import Draws
from eopc_runtime.errors import UsageError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
STEPS = RecoverSettings(
    steps=60, learning_rate=3e-3, batch_tokens=256, micro_tokens=128, checks=3, precision="fp32", save_every_s=0.0
)


def samples(model: Llama, count: int, length: int, seed: int) -> Tensor:
    """Windows [count, length] drawn from the model itself, on which no other model has a lower loss for long."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (count, 1), generator=generator)
    for _ in range(length - 1):
        chances = torch.softmax(model.score(tokens)[:, -1], -1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens


@pytest.fixture(scope="module")
def case(make_tiny: MakeTiny) -> SimpleNamespace:
    """A dense tiny model with peaked outputs, the same with a quarter of its FFN channels left out, and text."""
    config, tensors = make_tiny()
    tensors["lm_head.weight"] *= 3  # from nearly even chances to a loss of about 2 nats
    dense = build_model(config, tensors, 64)
    kept = [KeptLayer(i, (0, 1, 2, 3), tuple(range(96))) for i in range(3)]
    pruned = slice_model(config, tensors.__getitem__, kept).build(64)
    text = TrainingText((("a", samples(dense, 240, 32, 1)), ("b", samples(dense, 120, 32, 2))), (1.0, 1.0))
    selection = (("a", samples(dense, 16, 32, 3)), ("b", samples(dense, 16, 32, 4)))
    return SimpleNamespace(config=config, tensors=tensors, dense=dense, pruned=pruned, text=text, selection=selection)


def run(case: SimpleNamespace, settings: RecoverSettings = STEPS, **more: Any) -> RecoverReport:
    """Recover the case's pruned model."""
    return recover(case.pruned, case.dense, case.text, case.selection, settings, **more)


def kl_to_dense(case: SimpleNamespace, tensors: dict[str, Tensor]) -> float:
    """Mean KL(dense || model) on selection text, from whole logits: an independent formula."""
    tokens = torch.cat([windows for _, windows in case.selection])
    student = build_model(case.pruned.config, tensors, 64).score(tokens).log_softmax(-1)
    teacher = case.dense.score(tokens).log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


@pytest.fixture(scope="module")
def recovered(case: SimpleNamespace) -> RecoverReport:
    """Sixty steps of full updates."""
    return run(case)


@pytest.mark.parametrize("changes", [{}, {"rank": 8}, {"hidden_every": 1}, {"kl_share": 0.5}, {"precision": "bf16"}])
def test_recovery_takes_off_a_quarter_of_the_added_loss(case: SimpleNamespace, changes: dict[str, Any]) -> None:
    """Full and low-rank updates, all loss settings, and bf16 lower the KL divergence and the selection loss."""
    report = run(case, replace(STEPS, **changes))
    start = dict(case.pruned.named_parameters())
    before, after = (kl_to_dense(case, {n: t.detach() for n, t in w.items()}) for w in (start, report.tensors))
    dense = selection_losses(case.dense, case.selection, bf16=False)
    assert after < before * 3 / 4
    added = [sum(losses[n] - dense[n] for n in dense) for losses in (report.before, report.after)]
    assert added[1] < added[0] * 3 / 4


def test_frozen_tensors_stay_as_they_are_and_the_given_models_too(
    case: SimpleNamespace, recovered: RecoverReport
) -> None:
    """Embedding, head and final norm come back bit for bit, blocks changed; the student given is not touched."""
    given = dict(case.pruned.named_parameters())
    for name, tensor in recovered.tensors.items():
        assert torch.equal(tensor, given[name]) != name.startswith("model.layers."), name
    again = slice_model(
        case.config, case.tensors.__getitem__, [KeptLayer(i, (0, 1, 2, 3), tuple(range(96))) for i in range(3)]
    )
    assert all(torch.equal(again.tensors[name], given[name]) for name in again.tensors)
    assert set(recovered.tensors) == set(again.tensors)


def test_a_number_of_steps_gives_the_same_weights_every_time(case: SimpleNamespace) -> None:
    """Two runs of four steps agree bit for bit, with positions drawn at random; another seed does not."""
    settings = replace(STEPS, steps=4, kl_share=0.5)
    first, second, other = run(case, settings), run(case, settings), run(case, replace(settings, seed=1))
    name = "model.layers.1.mlp.down_proj.weight"
    assert all(torch.equal(t, second.tensors[n]) for n, t in first.tensors.items())
    assert not torch.equal(first.tensors[name], other.tensors[name])


def test_a_killed_run_goes_on_where_its_last_state_was_saved(case: SimpleNamespace, tmp_path: Path) -> None:
    """Killed in step 7 of 12 and started again, the weights are those of a run that was not killed."""
    settings = replace(STEPS, steps=12)
    whole = run(case, settings)

    steps = 0

    def clock() -> float:
        if steps == 7:
            raise KeyboardInterrupt
        return 0.0

    original = Distiller.parts

    def counted(self: Distiller, step: int) -> Any:
        nonlocal steps
        steps = step + 1
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "parts", counted)
        run(case, settings, folder=tmp_path, clock=clock)
    assert (tmp_path / STATE_FILE).exists()
    resumed = run(case, settings, folder=tmp_path)
    assert resumed.state.resumed
    assert resumed.before == whole.before
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(resumed.tensors[name], tensor, rtol=0, atol=1e-6)  # observed: equal
    assert not (tmp_path / STATE_FILE).exists()


def test_another_run_does_not_go_on_from_a_state(case: SimpleNamespace, tmp_path: Path) -> None:
    """A state of other settings, or a damaged one, is passed over."""
    settings = replace(STEPS, steps=1)
    (tmp_path / STATE_FILE).write_bytes(b"no state")
    assert not run(case, settings, folder=tmp_path).state.resumed


def test_folded_low_rank_updates_compute_the_same(case: SimpleNamespace) -> None:
    """A model with updates of random size equals one with the updates folded, in fp32 within 1e-5 of logits."""
    tensors = {n: p.detach() for n, p in case.pruned.named_parameters()}
    updated = build_model(case.pruned.config, tensors, 64)
    for parameter in add_low_rank(updated, 4, 0).values():
        parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(parameter)))
    folded = build_model(case.pruned.config, tensors | folded_weights(updated), 64)
    tokens = case.selection[0][1][:4]
    with torch.no_grad():
        got, want = (normed_states(model, tokens)[-1] for model in (folded, updated))
        plain = normed_states(case.pruned, tokens)[-1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (plain - want).abs().max() > 0.1  # the updates do something


def test_chunked_kl_has_the_value_and_gradient_of_the_formula() -> None:
    """Against torch's own kl_div over whole logits, with a last chunk that is shorter."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(10, 8, generator=generator) for _ in range(2))
    head, other = (torch.randn(50, 8, generator=generator) for _ in range(2))
    student.requires_grad_()
    whole = F.kl_div(
        (student @ head.T).log_softmax(-1), (teacher @ other.T).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (want,) = torch.autograd.grad(whole, student)
    chunked = kl_divergence(student, teacher, head, other, rows=4)
    (got,) = torch.autograd.grad(3 * chunked, student)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, 3 * want, rtol=1e-4, atol=1e-6)


def test_the_teachers_states_are_the_same_from_the_cache(case: SimpleNamespace) -> None:
    """Kept, computed again, or partly kept: the same states, within what fp16 keeps of the model's own."""
    tokens = case.selection[0][1]
    one = 2 * 32 * 64 * 2  # bytes of one window: two places, 32 positions, 64 wide, fp16
    kept, partly, never = (Teacher(case.dense, tokens, (0,), False, size) for size in (99 * one, 2 * one, 0))
    with torch.no_grad():
        own = normed_states(case.dense, tokens[[3, 1, 2]], (0,))
    for teacher in (kept, partly, never):
        for _ in range(2):
            for got, want in zip(teacher.states([3, 1, 2]), own, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (len(kept._kept), len(partly._kept), len(never._kept)) == (3, 2, 0)


def test_a_student_that_lost_a_layer_is_compared_with_what_its_next_layer_read(case: SimpleNamespace) -> None:
    """Layer 1 of 3 is gone: the state behind the first layer is held against the teacher's behind its layer 1."""
    kept = [KeptLayer(i, (0, 1, 2, 3), tuple(range(128))) for i in (0, 2)]
    student = slice_model(case.config, case.tensors.__getitem__, kept).build(64)
    settings = replace(STEPS, steps=20, hidden_every=1)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        original = Teacher.__init__
        patch.setattr(Teacher, "__init__", lambda self, *args: (asked.append(args[2]), original(self, *args))[1])
        report = recover(student, case.dense, case.text, case.selection, settings, sources=(0, 2))
    assert asked == [[1]]
    assert sum(report.after.values()) < sum(report.before.values()) - 0.2


def test_windows_longer_than_the_context_are_refused(case: SimpleNamespace) -> None:
    """The case's models were built for 64 positions."""
    text = TrainingText((("a", torch.zeros(1, 65, dtype=torch.long)),), (1.0,))
    with pytest.raises(UsageError, match="65 tokens do not fit the model's 64"):
        recover(case.pruned, case.dense, text, case.selection, STEPS)


# --- the ladder ---

MASKS = (
    Mask(tuple(LayerDims(i, 4, 96) for i in range(3))),
    Mask(tuple(LayerDims(i, 3, 96) for i in range(3))),
    Mask((LayerDims(0, 3, 64), LayerDims(2, 3, 96))),
)
ORDERS = [UnitOrder((2, 1, 0, 3), tuple((37 * i + layer) % 128 for i in range(128))) for layer in range(3)]


def added(losses: tuple[dict[str, float], ...], start: dict[str, float]) -> list[float]:
    """Mean loss over that of `start`, per tier."""
    return [sum(tier[n] - start[n] for n in tier) / len(tier) for tier in losses]


def test_the_sandwich_helps_every_tier_and_holds_the_whole_model(case: SimpleNamespace) -> None:
    """All tiers below lose less than before; t0 loses at most its bound, measured on the tensors that come back."""
    settings = replace(STEPS, steps=40, t0_bound=0.02, learning_rate=1e-3)
    report = recover_ladder(case.dense, case.dense, MASKS, ORDERS, case.text, case.selection, settings)
    dense = selection_losses(case.dense, case.selection, bf16=False)
    before, after = added(report.before, dense), added(report.after, dense)
    assert abs(before[0]) < 1e-6
    assert all(b < a - 0.05 for a, b in zip(before[1:], after[1:], strict=True))
    whole = selection_losses(build_model(case.config, report.tensors, 64), case.selection, bf16=False)
    assert added((whole,), dense)[0] <= 0.02 + 1e-6
    kept = []
    for dims in MASKS[-1].layers:
        order = ORDERS[dims.source_layer]
        groups, channels = order.kv_groups[: dims.num_key_value_heads], order.ffn_channels[: dims.intermediate_size]
        kept.append(KeptLayer(dims.source_layer, groups, channels))
    sliced = slice_model(case.config, report.tensors.__getitem__, kept).build(64)
    got = selection_losses(sliced, case.selection, bf16=False)
    for name, loss in report.after[-1].items():
        assert got[name] == pytest.approx(loss, abs=1e-5)


def test_the_result_is_mixed_with_the_start_until_the_bound_on_the_whole_model_holds(case: SimpleNamespace) -> None:
    """With no weight on its own loss the whole model drifts; a tight bound then keeps a part of the way."""
    settings = replace(STEPS, steps=15, t0_weight=0.0, t0_bound=0.005, learning_rate=1e-2)
    report = recover_ladder(
        case.dense, case.dense, (full_mask(case.config), *MASKS), ORDERS, case.text, case.selection, settings
    )
    dense = selection_losses(case.dense, case.selection, bf16=False)
    assert len(report.after) == 1 + len(MASKS)
    assert 0 < report.mix < 1
    assert added(report.after, dense)[0] <= 0.005 + 1e-6
    assert sum(added(report.after, dense)) < sum(added(report.before, dense))


def test_joint_recovery_of_no_ladder_is_refused(case: SimpleNamespace) -> None:
    """No tier below t0, or low-rank updates, which a prefix of units could not be cut from."""
    for masks, settings in (((full_mask(case.config),), STEPS), (MASKS, replace(STEPS, rank=4))):
        with pytest.raises(UsageError, match="joint recovery"):
            recover_ladder(case.dense, case.dense, masks, ORDERS, case.text, case.selection, settings)


# --- text ---


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 128 for c in text]


def test_training_windows_come_from_the_calibration_split_only() -> None:
    """Every document is one repeated letter, so a window tells which documents it was cut from."""
    domain = Domain("letters", tuple(chr(65 + i) * 100 for i in range(26)))
    text = training_windows(Letters(), (domain,), max_tokens=10**6, seq_len=16)
    allowed = {ord(document[0]) for document in domain.split("calibration")}
    assert set(text.tokens.flatten().tolist()) - {10} == allowed
    assert len(training_windows(Letters(), (domain,), max_tokens=160, seq_len=16).tokens) == 10


def test_draws_follow_the_weights_and_show_every_window_once_before_any_comes_again() -> None:
    """Weights 3 : 1, domains of 6 and 3 windows; and the rows of a step do not depend on the steps asked for before."""
    text = TrainingText((("a", torch.zeros(6, 2)), ("b", torch.ones(3, 2))), (3.0, 1.0))
    draws = Draws(text, seed=0)
    seen = [row for step in range(6) for row in draws.rows(step, 4)]
    first = [row for row in seen if row < 6]
    assert (len(first), len(seen)) == (18, 24)
    assert all(sorted(first[i : i + 6]) == list(range(6)) for i in range(0, 18, 6))
    assert first[:6] != first[6:12]
    assert Draws(text, seed=0).rows(5, 4) == seen[20:]


def test_weights_that_do_not_fit_the_domains_are_refused() -> None:
    """One weight for two domains."""
    with pytest.raises(UsageError, match="one weight above 0 for each of a, b"):
        TrainingText((("a", torch.zeros(1, 2)), ("b", torch.zeros(1, 2))), (1.0,))

"""A session on a fake model: budgets, downshifts, finish reasons, streaming, and sampling."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eopc_runtime.bundle import Bundle, Manifest, ModelInfo, Workload
from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.errors import BudgetError, BundleError, MeterLostError, PromptError, UsageError
from eopc_runtime.reconcile import Guard
from eopc_runtime.runners.base import Logits, Wanted
from eopc_runtime.sampling import SamplingParams
from eopc_runtime.session import Session
from eopc_runtime.tier_info import LayerInfo, TierInfo
from eopc_runtime.tokenizer import Tokenizer

from .conftest import FakeCache, byte_backend

CONTEXT = 64
EOS = 257
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
# t0, t1, t2 cost 4, 2 and 1 J per step, and a tenth of that per prompt token
STEP_J = (4.0, 2.0, 1.0)


class FakeTier:
    """Says its script byte by byte, then repeats it; `noise` flattens the logits for sampling."""

    def __init__(self, tier: str, script: Sequence[int], flat: bool) -> None:
        self.tier, self._script, self._flat = tier, script, flat

    def new_cache(self) -> FakeCache:
        return FakeCache(self.tier)

    def forward(self, cache: FakeCache, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        assert cache.tier == self.tier, "a cache must be adopted before another tier uses it"
        cache.append(tokens)
        assert cache.length <= CONTEXT
        out: npt.NDArray[np.float32] = np.zeros((1, 258), dtype=np.float32)
        if not self._flat:
            out[0, self._script[(cache.length - cache.prompt) % len(self._script)]] = 5.0
        return out.repeat(len(tokens), axis=0) if logits == "all" else out

    def prefill(self, cache: FakeCache, tokens: Sequence[int]) -> Logits:
        return self.forward(cache, tokens)

    def adopt(self, cache: FakeCache) -> FakeCache:
        if int(cache.tier[1:]) > int(self.tier[1:]):
            raise ValueError("a cache can only be handed down the ladder")
        return cache.handed_to(self.tier)


class FakePool:
    """Makes fake tiers, and counts how many were asked for."""

    def __init__(self, script: Sequence[int], flat: bool = False) -> None:
        self._script, self._flat = script, flat
        self.closed = False

    def get(self, tier: str) -> FakeTier:
        return FakeTier(tier, self._script, self._flat)

    def close(self) -> None:
        self.closed = True


def byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """One token per byte, 256 = <s>, 257 = </s>."""
    return Tokenizer(byte_backend(), chat_template=chat_template)


def table(margin: float = 0.0) -> EnergyTable:
    """Prices whose sums are exact in floating point."""
    tiers = tuple(
        TierEnergy(f"t{i}", 0.0, step / 8, 0.0, step, 0.0, 0.0, "calibrated") for i, step in enumerate(STEP_J)
    )
    return EnergyTable("fake", "calibrated", margin, tiers)


def bundle(prices: EnergyTable) -> Bundle:
    """A bundle that exists in memory only."""
    cost = TierCost(1, 1, 1, 1.0, 1.0, 1.0)
    tiers = tuple(
        TierInfo(
            tier=f"t{i}",
            budget_j=None,
            energy_j=1.0,
            energy_source="calibrated",
            perplexity=None,
            perplexity_dense=None,
            perplexity_by_domain={},
            params=1,
            keep={"layers": 1.0, "kv_groups": 1.0, "ffn": 1.0},
            layers=(LayerInfo(0, 1, 1),),
            cost=cost,
            graph=f"tiers/t{i}/model.onnx",
            mask=f"tiers/t{i}/mask.json",
            note="",
            parity={},
        )
        for i in range(len(prices.tiers))
    )
    manifest = Manifest(
        eopc_version="0",
        model=ModelInfo("fake", "fake", "llama", 258, 8, 8, 1, CONTEXT, 256, (EOS,)),
        device="fake",
        dialect="primitive",
        opset=21,
        precision="fp32",
        compute_dtype="float32",
        workload=Workload(8, 8),
        context=CONTEXT,
        tiers=tiers,
        files=(),
        tools={},
        seed=0,
        calibration={},
    )
    return Bundle(Path("nowhere"), manifest, prices)


def session(script: str = "abc", *, eos: bool = False, margin: float = 0.0, **options: Any) -> Session:
    """A session whose model says `script`, then EOS or the script again. The clock ticks 1 s per look."""
    tokenizer = byte_tokenizer(options.pop("template", None))
    ids = tokenizer.encode(script) + ([EOS] if eos else [])
    return Session(bundle(table(margin)), FakePool(ids, **options), tokenizer, clock=itertools.count(0.0).__next__)


def test_without_a_budget_the_top_tier_does_everything() -> None:
    """No budget: t0 throughout, every joule still booked, all fields as documented."""
    result = session().generate("12345678", max_new_tokens=4)
    assert result.to_json() == {
        "text": "abca",
        "tier": "t0",
        "plan": "t0",
        "tiers_used": ["t0"],
        "budget_j": None,
        "energy_j": 8 * 0.5 + 3 * 4.0,
        "energy_source": "calibrated",
        "finish_reason": "length",
        "prompt_tokens": 8,
        "completion_tokens": 4,
        "ttft_s": 1.0,
        "decode_tokens_per_s": 1.0,
        "enforced_by": None,
        "warnings": [],
    }


def test_a_plan_hands_the_cache_down_after_the_prefill() -> None:
    """With 10.5 J (9 J, and a step kept free) the answer fits only on t2, but the prompt still fits on t0."""
    result = session().generate("12345678", budget=10.5, max_new_tokens=6)
    assert (result.plan, result.tier, result.tiers_used) == ("t0>t2", "t2", ("t0", "t2"))
    assert result.energy_j == 8 * 0.5 + 5 * 1.0
    assert result.finish_reason == "length"
    assert result.text == "abcabc"


def test_a_forced_tier_downshifts_when_the_budget_gets_tight() -> None:
    """Started on t0 against the policy, the sequence moves down in time to finish all its tokens."""
    result = session().generate("12345678", budget=20.0, max_new_tokens=12, tier="t0")
    assert result.plan == result.tier == "t0"
    assert result.tiers_used[0] == "t0"
    assert result.tiers_used[-1] == "t2"
    assert list(result.tiers_used) == sorted(result.tiers_used)
    assert result.completion_tokens == 12
    assert result.finish_reason == "length"
    assert result.energy_j <= 20.0


def test_a_forced_tier_stays_when_the_budget_is_ample() -> None:
    """The negative twin: with enough joules nothing moves down."""
    result = session().generate("12345678", budget=48.0, max_new_tokens=12, tier="t0")
    assert result.tiers_used == ("t0",)
    assert result.energy_j == 4.0 + 11 * 4.0


def test_a_sequence_that_cannot_be_finished_stops_with_budget() -> None:
    """When even the lowest tier cannot pay for the rest, it stops before the step it cannot pay."""
    result = session().generate("12345678", budget=4.5, max_new_tokens=30)
    assert result.finish_reason == "budget"
    # t2 prefill 1 J, then 3 whole steps of 1 J; 0.5 J is left, which buys nothing
    assert (result.completion_tokens, result.energy_j) == (4, 4.0)


def test_the_margin_is_part_of_every_debit() -> None:
    """A margin of 25 % makes the same sequence cost 25 % more."""
    assert session(margin=0.25).generate("12345678", max_new_tokens=4).energy_j == 16.0 * 1.25


@settings(max_examples=150, deadline=None)
@given(
    budget=st.floats(0.05, 120.0),
    prompt=st.integers(1, 30),
    wanted=st.integers(1, 60),
    margin=st.sampled_from([0.0, 0.07, 0.5]),
    tier=st.sampled_from([None, "t0", "t1", "t2"]),
    stop=st.sampled_from([(), ("ca",), ("zz",)]),
)
def test_no_sequence_ever_overspends(
    budget: float, prompt: int, wanted: int, margin: float, tier: str | None, stop: tuple[str, ...]
) -> None:
    """Whatever is asked, the debits stay within the budget, tiers only go down, and the reason is true."""
    try:
        stream = session(margin=margin).stream("x" * prompt, budget=budget, max_new_tokens=wanted, tier=tier, stop=stop)
    except BudgetError:
        return
    events = list(stream)
    result = stream.result
    spent = [event.energy_j for event in events]
    assert result.energy_j <= budget
    assert spent == sorted(spent)
    assert spent[-1] == result.energy_j
    tiers = [event.tier for event in events]
    assert tiers == sorted(tiers)
    assert result.completion_tokens == len(events) <= min(wanted, CONTEXT - prompt)
    if result.finish_reason == "length":
        assert len(events) == min(wanted, CONTEXT - prompt)
    if result.finish_reason == "budget":
        assert result.energy_j + (1 + margin) * STEP_J[-1] > budget * (1 - 1e-6)


def test_a_budget_below_one_token_names_the_smallest_that_works() -> None:
    """An impossible budget fails before anything runs; a forced tier says which tier was too dear."""
    with pytest.raises(BudgetError, match=r"needs 2\.01 J"):  # prompt 1 J, and a step of 1 J kept free
        session().generate("12345678", budget=0.5)
    with pytest.raises(BudgetError, match=r"t0 needs 8\.01 J"):
        session().generate("12345678", budget=2.0, tier="t0")


def test_end_of_sequence_stops_and_is_not_shown() -> None:
    """EOS ends the text with `stop`, counts as a token, and leaves no mark in the text."""
    result = session("abc", eos=True).generate("12345678", max_new_tokens=20)
    assert (result.text, result.finish_reason, result.completion_tokens) == ("abc", "stop", 4)


def test_stop_strings_over_token_borders_end_the_text_before_them() -> None:
    """The stop string spans two tokens; neither half is emitted by any event."""
    stream = session("hello END more").stream("12345678", max_new_tokens=20, stop=["END"])
    texts = [event.text for event in stream]
    assert "".join(texts) == stream.result.text == "hello "
    assert stream.result.finish_reason == "stop"


def test_held_back_text_comes_out_when_the_sequence_ends() -> None:
    """Text that could have become a stop string is emitted when the length limit comes first."""
    result = session("xEN").generate("12345678", max_new_tokens=3, stop=["END"])
    assert (result.text, result.finish_reason) == ("xEN", "length")


def test_a_character_over_several_tokens_is_emitted_whole() -> None:
    """No event shows half a character; a cut one shows as a mark at the very end."""
    stream = session("🦙", eos=True).stream("12345678", max_new_tokens=10)
    assert [event.text for event in stream] == ["", "", "", "🦙", ""]
    assert session("🦙").generate("12345678", max_new_tokens=2).text == "\ufffd"


def test_streaming_equals_generate() -> None:
    """Events joined are the result of generate, token for token and joule for joule."""
    options: dict[str, Any] = {"budget": "15J", "max_new_tokens": 9, "tier": "t0"}
    stream = session("abcd").stream("12345678", **options)
    text = "".join(event.text for event in stream)
    whole = session("abcd").generate("12345678", **options)
    assert text == whole.text
    assert stream.result == whole


def test_equal_seeds_agree_and_unseeded_samples_differ() -> None:
    """Sampling repeats with a seed and does not without one."""
    box = session(flat=True)
    seeded = SamplingParams(temperature=1.0, seed=3)

    def tokens(params: SamplingParams) -> list[int]:
        return [event.token for event in box.stream("12345678", max_new_tokens=20, sampling=params)]

    assert tokens(seeded) == tokens(seeded)
    free = SamplingParams(temperature=1.0)
    assert tokens(free) != tokens(free)  # equal by chance at most once in 258 per token


def test_the_context_bounds_prompt_and_answer() -> None:
    """A prompt fills the context but one at most; the answer gets what is left."""
    assert session().generate("x" * 60, max_new_tokens=50).completion_tokens == 4
    assert session().generate("x" * 63, max_new_tokens=50).completion_tokens == 1
    with pytest.raises(PromptError, match=r"64 tokens.*context of 64 leaves room for 63"):
        session().generate("x" * 64)


def test_one_token_has_no_decode_speed() -> None:
    """With a single token there was no decode step, so the speed is null rather than a made-up number."""
    assert session().generate("1234", max_new_tokens=1).decode_tokens_per_s is None


def test_prompts_go_through_the_template_unless_raw() -> None:
    """A prompt is one user turn; raw leaves the template out; messages may hold a system turn."""
    box = session(template=TEMPLATE)
    assert box.tokenizer.decode(box.encode_prompt("hi")) == "user:hi;"
    assert box.tokenizer.decode(box.encode_prompt("hi", raw=True)) == "hi"
    assert box.tokenizer.decode(session().encode_prompt("hi")) == "hi"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert box.tokenizer.decode(box.encode_prompt(messages=messages)) == "system:s;user:u;"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": ""}, PromptError, "empty"),
        ({}, PromptError, "either"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, PromptError, "not both"),
        ({"messages": [{"role": "user", "content": "b"}]}, PromptError, "no chat template"),
        ({"prompt": "a", "budget": -1}, BudgetError, "-1"),
        ({"prompt": "a", "budget": float("nan")}, BudgetError, "nan"),
        ({"prompt": "a", "budget": "5 apples"}, BudgetError, "apples"),
        ({"prompt": "a", "max_new_tokens": 0}, UsageError, "max_new_tokens"),
        ({"prompt": "a", "tier": "t9"}, BundleError, "t0, t1, t2"),
        ({"prompt": "a", "stop": [""]}, UsageError, "stop"),
    ],
)
def test_bad_requests_fail_before_anything_runs(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    """Every malformed request raises when it is made, also for a stream that is never read."""
    with pytest.raises(error, match=words):
        session().stream(**arguments)


def test_prefill_and_decode_are_usable_alone() -> None:
    """The two phases by hand give what generate gives, also when the cache moves down between them."""
    box = session("abcd")
    cache, logits = box.prefill(box.tokenizer.encode("12345678"), "t0")
    tokens = [int(logits.argmax())]
    for tier in ("t0", "t1", None):
        cache, logits = box.decode(cache, tokens[-1], tier)
        tokens.append(int(logits.argmax()))
    assert box.tokenizer.decode(tokens) == "abcd"
    assert cache.tier == "t1"
    with pytest.raises(ValueError, match="down the ladder"):
        box.decode(cache, tokens[-1], "t0")


def test_a_closed_stream_has_no_result_and_a_session_closes_its_pool() -> None:
    """Stopping early is possible, asking for the result of it is an error, and close reaches the pool."""
    with session() as box:
        stream = box.stream("12345678", max_new_tokens=5)
        next(stream)
        stream.close()
        with pytest.raises(RuntimeError, match="closed"):
            _ = stream.result
    assert isinstance(box.pool, FakePool)
    assert box.pool.closed


class FakeMeter:
    """Shows a constant power from `begin` on, by the session's own clock; fails at reading number `lost_at`."""

    def __init__(self, watts: float, lost_at: int | None = None, begin_fails: bool = False) -> None:
        self.watts, self.lost_at, self.begin_fails = watts, lost_at, begin_fails
        self.time_s, self.readings, self.open = 0.0, 0, list[str]()
        self.began_s = 0.0

    def clock(self) -> float:
        """Time goes on by 0.1 s per look."""
        self.time_s += 0.1
        return self.time_s

    def begin(self, name: str) -> None:
        if self.begin_fails:
            raise MeterLostError("the sensor file is gone")
        self.open.append(name)
        self.began_s = self.time_s

    def energy_so_far_j(self, name: str) -> float:
        assert name in self.open
        self.readings += 1
        if self.lost_at is not None and self.readings >= self.lost_at:
            raise MeterLostError("the sensor file is gone")
        return self.watts * (self.time_s - self.began_s)

    def end(self, name: str) -> None:
        self.open.remove(name)


def metered(meter: FakeMeter) -> Session:
    """A session with a meter that does not lag, on the meter's clock: three looks and so 0.3 s per step."""
    tokenizer = byte_tokenizer()
    guard = Guard(lag_s=0.0)
    pool = FakePool(tokenizer.encode("abc"))
    return Session(bundle(table()), pool, tokenizer, clock=meter.clock, meter=meter, guard=guard)


def test_a_meter_that_agrees_enforces_the_budget_in_silence() -> None:
    """4 J per 0.3 s are 13 W, and 10 W are shown: the result says meter, no warning, and the window is closed."""
    meter = FakeMeter(watts=10.0)
    result = metered(meter).generate("12345678", budget=200.0, max_new_tokens=30)
    assert (result.enforced_by, result.warnings, result.finish_reason) == ("meter", (), "length")
    assert result.energy_j == 4.0 + 29 * 4.0
    assert meter.open == []
    assert meter.readings > 5


def test_a_meter_that_shows_more_than_predicted_stops_the_sequence_earlier() -> None:
    """At twice the predicted power the same budget buys fewer tokens, and the debit is what the meter showed."""
    calm = metered(FakeMeter(watts=12.0)).generate("12345678", budget=100.0, max_new_tokens=50)
    meter = FakeMeter(watts=27.0)
    box = metered(meter)
    hot = box.generate("12345678", budget=100.0, max_new_tokens=50)
    assert hot.completion_tokens < calm.completion_tokens
    assert 27.0 * (meter.time_s - meter.began_s) < 100.0 + 2 * 27.0 * 0.3  # the last looks come after the last step
    assert any("times the prediction" in warning for warning in hot.warnings)
    assert box.drift > 1.5
    with pytest.raises(BudgetError):  # and the next sequence is charged by it: 2 J no longer buy a token
        box.generate("12345678", budget=2.2, max_new_tokens=50)


def test_a_meter_lost_in_mid_sequence_is_said_and_the_model_goes_on() -> None:
    """The sequence is finished within its budget; enforced_by and the warning tell who kept it."""
    result = metered(FakeMeter(watts=12.0, lost_at=4)).generate("12345678", budget=100.0, max_new_tokens=50)
    assert result.enforced_by == "model"
    assert result.energy_j <= 100.0
    assert "The meter was lost (the sensor file is gone" in result.warnings[0]


def test_a_meter_that_cannot_begin_is_no_reason_not_to_run() -> None:
    """The model keeps the budget from the start."""
    result = metered(FakeMeter(watts=12.0, begin_fails=True)).generate("12345678", budget=100.0, max_new_tokens=5)
    assert (result.enforced_by, result.completion_tokens) == ("model", 5)
    assert "sensor file is gone" in result.warnings[0]


def test_a_reading_that_is_no_number_is_a_lost_meter() -> None:
    """NaN joules are not taken for anything."""
    meter = FakeMeter(watts=float("nan"))
    result = metered(meter).generate("12345678", budget=100.0, max_new_tokens=20)
    assert result.enforced_by == "model"
    assert "it reads nan J" in result.warnings[0]


def test_closing_a_stream_early_closes_the_meters_window() -> None:
    """No window stays open behind a sequence that nobody reads to its end."""
    meter = FakeMeter(watts=12.0)
    stream = metered(meter).stream("12345678", budget=100.0, max_new_tokens=20)
    next(stream)
    assert meter.open == ["sequence 1"]
    stream.close()
    assert meter.open == []


def test_the_log_of_a_sequence_replays_to_the_same_decisions() -> None:
    """Times, readings and decisions of a metered run are all there."""
    box = metered(FakeMeter(watts=20.0))
    stream = box.stream("12345678", budget=100.0, max_new_tokens=50)
    spent = [event.energy_j for event in stream]
    log = stream.log
    assert log.replay(box.table) == log.decisions
    assert [d.action for d in log.decisions[:2]] == ["prefill", "step"]
    assert log.decisions[-1].spent_j == spent[-1]
    assert any(seen.metered_j is not None for seen in log.seen)


def test_strict_and_safety_reach_the_admission() -> None:
    """A strict run on a calibrated table is admitted; a safety factor is in every debit; below 1 it is refused."""
    result = session().generate("12345678", budget=200.0, max_new_tokens=4, strict=True, safety=2.0)
    assert result.energy_j == 2 * 16.0
    assert "not known how often" in result.warnings[0]
    with pytest.raises(UsageError, match="1 or more"):
        session().generate("12345678", budget=200.0, safety=0.5)
    with pytest.raises(UsageError, match="no budget"):
        session().generate("12345678", strict=True)

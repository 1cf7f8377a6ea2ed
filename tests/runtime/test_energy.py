"""The energy model: closed forms, the prior against published measurements, and the strict JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eopc_runtime.energy import ENERGY_SOURCES, EnergyTable, TierCost, TierEnergy
from eopc_runtime.errors import BundleError, DeviceError
from eopc_runtime.prior import prior_energy, prior_step_s, prior_table
from eopc_runtime.profiles import list_profiles, load_profile
from eopc_runtime.provenance import Calibration, Conformal, Hull, Identity

coefficient = st.floats(min_value=1e-9, max_value=10)
tokens = st.integers(min_value=1, max_value=4096)
tier_energies = st.builds(
    TierEnergy,
    st.just("t0"),
    coefficient,
    coefficient,
    coefficient,
    coefficient,
    coefficient,
    coefficient,
    st.just("prior"),
)


def llama_cost(layers, hidden, ffn, q_heads, kv_heads, head_dim, vocab, bits, head_bits=16):
    """The work of a dense LLaMA decoder with weight-only quantization; KV in fp16, int4 scales per 128."""
    attention = 2 * hidden * q_heads * head_dim + 2 * hidden * kv_heads * head_dim
    body = layers * (attention + 3 * hidden * ffn)
    bytes_per_weight = {16: 2.0, 8: 1.0, 4: (4 + 16 / 128) / 8}
    return TierCost(
        layers=layers,
        weight_bytes=int(body * bytes_per_weight[bits] + vocab * hidden * bytes_per_weight[head_bits]),
        kv_bytes_per_token=layers * 2 * kv_heads * head_dim * 2,
        flops_per_token=2.0 * body,
        head_flops=2.0 * vocab * hidden,
        attn_flops_per_context=4.0 * head_dim * q_heads * layers,
    )


LLAMA_1B = (16, 2048, 8192, 32, 8, 64, 128256)
LLAMA_8B = (32, 4096, 14336, 32, 8, 128, 128256)
SMOLLM2_135M = (30, 576, 1536, 9, 3, 64, 49152)


def table(*tiers, margin=0.0, source="prior"):
    """An energy table from (prefill_j1, step_j0, context price) triples."""
    return EnergyTable(
        device="orin",
        source=source,
        margin=margin,
        tiers=tuple(
            TierEnergy(f"t{i}", 0.1, per_token, 1e-7, step, context, context, source)
            for i, (per_token, step, context) in enumerate(tiers)
        ),
    )


@given(tier_energies, tokens, st.integers(min_value=0, max_value=300))
def test_decode_energy_is_the_sum_of_its_steps(energy, n, m):
    """The closed form equals the explicit sum over steps 1..m-1; 1e-9 covers the rounding of 300 "
    "additions."""
    want = sum(energy.step_j(n, i) for i in range(1, m))
    assert energy.decode_j(n, m) == pytest.approx(want, rel=1e-9, abs=0)
    assert energy.sequence_j(n, m) == energy.prefill_j(n) + energy.decode_j(n, m)


@given(tier_energies, tokens, tokens)
def test_energy_rises_with_prompt_and_answer(energy, n, m):
    """One more prompt token or one more new token never costs less than nothing."""
    here = energy.sequence_j(n, m)
    assert energy.sequence_j(n + 1, m) >= here
    assert energy.sequence_j(n, m + 1) >= here


def test_the_first_token_comes_out_of_the_prefill():
    """Zero or one new token needs no decode step."""
    energy = TierEnergy("t0", 1.0, 0.1, 0.0, 5.0, 0.5, 0.5, "measured")
    assert energy.decode_j(10, 0) == energy.decode_j(10, 1) == 0
    assert energy.decode_j(10, 2) == 5.0 + 0.5 * 11  # the step attends to ten prompt tokens and itself


@pytest.mark.parametrize(
    ("bits", "precision", "tokens_per_s", "j_per_token"),
    [(16, "fp16", 61.3, 0.750), (8, "int8", 91.2, 0.493), (4, "int4", 122.3, 0.355)],
)
def test_orin_reproduces_the_published_rows_of_llama_1b(bits, precision, tokens_per_s, j_per_token):
    """Llama-3.2-1B on TensorRT-LLM, AGX Orin, 512 in and 512 out: within 2 % of speed and 4 % of J/token.

    The published joules lack what the sensor's lag misses, 0.35 s x (J/token x tokens/s - 11.1 W) over 512 steps; put
    back, what is left is 0.9 % and 2.9 %. The mean context of the steps is 768.5.
    """
    orin, cost = load_profile("orin"), llama_cost(*LLAMA_1B, bits)
    energy = prior_energy(orin, "t0", cost, precision)
    assert 1 / prior_step_s(orin, cost, precision, 768) == pytest.approx(tokens_per_s, rel=0.02)
    whole_j = j_per_token + 0.35 * (j_per_token * tokens_per_s - 11.1) / 512
    assert energy.decode_j(512, 513) / 512 == pytest.approx(whole_j, rel=0.04)


def test_orin_reproduces_the_published_8b_row():
    """Llama-3.1-8B int4, 33.1 tokens/s and 1.59 J/token, comes out within 2 % of speed and 3 % of energy."""
    orin, cost = load_profile("orin"), llama_cost(*LLAMA_8B, 4)
    assert 1 / prior_step_s(orin, cost, "int4", 768) == pytest.approx(33.1, rel=0.02)
    assert prior_energy(orin, "t0", cost, "int4").decode_j(512, 513) / 512 == pytest.approx(1.59, rel=0.03)


def test_orin_prices_long_contexts_like_the_published_slope():
    """J/token of the 1B fp16 engine after 128 prompt tokens, at 16k to 128k new ones: within 4 % of the published.

    Answers this long are in no fit; beside them the sensor's lag is nothing. 3.0 % was observed at worst.
    """
    energy = prior_energy(load_profile("orin"), "t0", llama_cost(*LLAMA_1B, 16), "fp16")
    for tokens, j_per_token in ((16384, 0.836), (32768, 0.916), (65536, 1.073), (131072, 1.386)):
        assert energy.sequence_j(128, tokens) / tokens == pytest.approx(j_per_token, rel=0.04)


def test_orin_prompts_cost_what_they_add_to_whole_runs():
    """A prompt token of the 1B adds 4.40, 3.80 and 2.56 mJ to a run (θ1 of fits to whole runs): 0.9 to 1.8 times that.

    The windows of prefill alone read 1.5-1.8 mJ, as they end within the lag of the sensor; prices are above that. One
    J/FLOP serves three precisions, whose prompts differ by 1.7 times.
    """
    rows = ((16, "fp16", 1.8e-3, 4.40e-3), (8, "int8", 1.6e-3, 3.80e-3), (4, "int4", 1.5e-3, 2.56e-3))
    for bits, precision, window_j, run_j in rows:
        energy = prior_energy(load_profile("orin"), "t0", llama_cost(*LLAMA_1B, bits), precision)
        assert window_j < energy.prefill_j(512) / 512
        assert 0.9 < energy.prefill_j1 / run_j < 1.8


def test_orin_gives_a_plausible_step_for_smollm2_135m():
    """135 MB in int8 lie between 50 and 100 mJ per step, launches included."""
    cost = llama_cost(*SMOLLM2_135M, bits=8, head_bits=8)
    assert cost.weight_bytes == pytest.approx(135e6, rel=0.01)
    assert 0.050 < prior_energy(load_profile("orin"), "t0", cost, "int8").step_j(256, 0) < 0.100


def test_the_prior_is_the_additive_roofline():
    """The polynomial equals idle power x time + energy of bytes, FLOPs and unpacking, written out independently."""
    orin, cost = load_profile("orin"), llama_cost(*SMOLLM2_135M, bits=8, head_bits=8)
    energy = prior_energy(orin, "t3", cost, "int8")
    k = {name: c.value for name, c in orin.constants.items()}
    speed = k["bandwidth"] * orin.precisions["int8"].decode_efficiency.value
    unpack = orin.precisions["int8"].unpack_j.value * cost.flops_per_token / 2
    assert unpack > 0

    def joules(moved, flops):
        t = k["fixed_s"] + 30 * k["layer_s"] + moved / speed + flops / (k["flops"] * k["prefill_efficiency"])
        return k["idle_w"] * t + k["j_per_byte"] * moved + k["j_per_flop"] * flops + unpack

    c, n = 300, 256
    step_flops = cost.flops_per_token + cost.head_flops + c * cost.attn_flops_per_context
    step = joules(cost.weight_bytes + c * cost.kv_bytes_per_token, step_flops)
    prefill_flops = n * cost.flops_per_token + cost.head_flops + cost.attn_flops_per_context * n * n / 2
    prefill = joules(cost.weight_bytes + n * cost.kv_bytes_per_token, prefill_flops)
    assert energy.step_j(c, 0) == pytest.approx(step, rel=1e-12)  # the same terms in another order
    assert energy.prefill_j(n) == pytest.approx(prefill, rel=1e-12)
    assert (energy.tier, energy.source) == ("t3", "prior")


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda p: p.name)
def test_every_device_prices_a_smaller_tier_lower(profile):
    """Fewer layers and fewer bytes cost less in both phases, at every precision the device runs."""
    full = llama_cost(*SMOLLM2_135M, bits=8, head_bits=8)
    small = llama_cost(24, *SMOLLM2_135M[1:], bits=8, head_bits=8)
    for precision in profile.precisions:
        ladder = prior_table(profile, {"t0": full, "t1": small}, precision, margin=0.1)
        assert ladder.source == profile.energy_source
        assert ladder.step_price_j(1, 256, 1) < ladder.step_price_j(0, 256, 1)
        assert ladder.prefill_price_j(1, 256) < ladder.prefill_price_j(0, 256)


def test_a_cpu_prior_is_time_times_the_assumed_power():
    """The proxy has no other energy than its power x its time."""
    cpu, cost = load_profile("cpu"), llama_cost(*SMOLLM2_135M, bits=8, head_bits=8)
    energy = prior_energy(cpu, "t0", cost, "int8")
    assert energy.source == "proxy"
    assert energy.step_j(100, 0) == pytest.approx(30.0 * prior_step_s(cpu, cost, "int8", 100), rel=1e-12)


def test_a_precision_the_device_lacks_has_no_price():
    """The prior does not guess an efficiency."""
    with pytest.raises(DeviceError, match="does not run"):
        prior_energy(load_profile("cpu"), "t0", llama_cost(*SMOLLM2_135M, bits=16), "fp16")


def test_the_margin_multiplies_every_price():
    """5 % on the table is 5 % on prefill, step and plan, and none on the plain coefficients."""
    bare, raised = table((0.01, 1.0, 0.001)), table((0.01, 1.0, 0.001), margin=0.05)
    assert raised.prefill_price_j(0, 64) == pytest.approx(1.05 * bare.prefill_price_j(0, 64))
    assert raised.step_price_j(0, 64, 1) == pytest.approx(1.05 * bare.step_price_j(0, 64, 1))
    assert raised.plan_price_j(0, 0, 64, 9) == pytest.approx(1.05 * bare.tiers[0].sequence_j(64, 9))
    assert raised.tiers == bare.tiers


def test_a_plan_is_priced_phase_by_phase():
    """Prefill on t0 and decode on t1 costs the one's prompt and the other's steps."""
    ladder = table((0.01, 1.0, 0.001), (0.005, 0.5, 0.0005))
    want = ladder.tiers[0].prefill_j(64) + ladder.tiers[1].decode_j(64, 9)
    assert ladder.plan_price_j(0, 1, 64, 9) == pytest.approx(want)


@given(st.lists(st.tuples(coefficient, coefficient, coefficient), min_size=1, max_size=5), st.floats(0, 1))
def test_a_table_survives_its_json(triples, margin):
    """Writing and reading gives the same table, bit by bit."""
    ladder = table(*triples, margin=margin)
    assert EnergyTable.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder
    assert EnergyTable.from_json(ladder.to_json()) == ladder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: o.update(marign=0.1), 'unknown key "marign". Did you mean "margin"'),
        (lambda o: o.update(schema=3), "newer eopc"),
        (lambda o: o.pop("schema"), '"schema" is missing'),
        (lambda o: o.update(margin=-0.1), "at least 0"),
        (lambda o: o.update(source="guess"), "measured, calibrated, prior, proxy"),
        (lambda o: o.update(source="measured"), "Sources may not be mixed"),
        (lambda o: o.update(tiers=[]), "no tier"),
        (lambda o: o["tiers"].reverse(), "where t0 belongs"),
        (lambda o: o["tiers"][0].update(tier="t0\n\x1b[2J"), "has t0??[2J where t0 belongs"),
        (lambda o: o["tiers"][1].update(step_j0=-1), "tiers[1]"),
        (lambda o: o["tiers"][0].update(step_j2=0.0), 'unknown key "step_j2"'),
        (lambda o: o["tiers"][0].update(step_jn=float("inf")), "finite"),
        (lambda o: o["tiers"][0].update(step_jn="1"), "must be a number, not a string"),
        (lambda o: o["tiers"][0].update(step_j0=0, step_jn=0, step_ji=0), "zero for a whole phase"),
    ],
)
def test_a_malformed_energy_table_is_refused_with_the_reason(change, says):
    """Unknown keys, wrong types and impossible numbers are named."""
    obj = table((0.01, 1.0, 0.001), (0.005, 0.5, 0.0005)).to_json()
    change(obj)
    with pytest.raises(BundleError) as caught:
        EnergyTable.from_json(obj)
    assert says in str(caught.value)


def test_an_unknown_energy_source_cannot_be_built():
    """A joule without one of the four sources does not exist."""
    with pytest.raises(BundleError, match="not one of measured, calibrated, prior, proxy"):
        replace(table((0.01, 1.0, 0.001)).tiers[0], source="estimate")


@given(st.builds(TierEnergy, st.just("t0"), *[coefficient] * 6, st.just("prior")), tokens, st.integers(0, 300))
def test_prompt_and_answer_may_cost_differently_per_step(energy, n, m):
    """With step_jn and step_ji apart the closed form still is the sum of its steps, from any step on."""
    want = sum(energy.step_j(n, i) for i in range(1, m))
    assert energy.decode_j(n, m) == pytest.approx(want, rel=1e-9, abs=0)
    done = m // 3
    rest = energy.steps_j(n, done, max(m - 1 - done, 0))
    assert energy.steps_j(n, 0, done) + rest == pytest.approx(energy.decode_j(n, max(m, done + 1)), rel=1e-9)


def test_what_a_meter_should_show_has_the_negative_constant_and_the_charge_has_not():
    """Prompt 1 J, steps 0.5 J, constant -3 J: 100 tokens show 47.5 J and are charged 50.5 J.

    Where nothing was measured, one token is never expected to be free.
    """
    energy = TierEnergy("t0", 1.0, 0.0, 0.0, 0.5, 0.0, 0.0, "calibrated", uncredited_j=-3.0)
    assert (energy.sequence_j(10, 100), energy.expected_j(10, 100)) == (50.5, 47.5)
    assert energy.expected_j(10, 1, measured=False) == 0.5 <= energy.sequence_j(10, 1)
    assert energy.expected_j(10, 1) == 0.0
    with pytest.raises(BundleError, match="at most 0"):
        replace(energy, uncredited_j=0.1)


def test_schema_1_is_read_as_it_was_written():
    """A context token cost the same in prompt and answer: step_j1 becomes both prices; what was not known is null."""
    tier = {"tier": "t0", "source": "prior", "prefill_j0": 0.1, "prefill_j1": 0.01, "prefill_j2": 1e-7}
    old = {"schema": 1, "device": "orin", "source": "prior", "margin": 0.1}
    read = EnergyTable.from_json({**old, "tiers": [{**tier, "step_j0": 0.5, "step_j1": 0.002}]})
    assert read == EnergyTable("orin", "prior", 0.1, (TierEnergy("t0", 0.1, 0.01, 1e-7, 0.5, 0.002, 0.002, "prior"),))
    assert read.tiers[0].step_j(100, 7) == pytest.approx(0.5 + 0.002 * 107)
    assert EnergyTable.from_json(read.to_json()) == read
    with pytest.raises(BundleError, match='"step_j1" is missing'):
        EnergyTable.from_json({**old, "tiers": [{**tier, "step_j0": 0.5, "step_jn": 0.002, "step_ji": 0.002}]})


def calibrated(mode, step, identity=None):
    """A calibrated one-tier table in a power mode."""
    energy = TierEnergy("t0", 0.1, 0.01, 0.0, step, 1e-5, 2e-5, "calibrated", uncredited_j=-2.0)
    provenance = Calibration(
        Hull((32, 512), (32, 512)), Conformal(0.05, 19, 0.02, 0.95), 35, {"t0": 0.006}, None, identity
    )
    return EnergyTable("orin", "calibrated", 0.02, (energy,), mode, provenance)


def test_power_modes_stand_side_by_side_and_one_is_active():
    """Three modes survive their JSON; another one can be made active, and all are still there."""
    modes = [calibrated("MAXN", 0.5), calibrated("30W", 0.4), calibrated("15W", 0.6)]
    ladder = replace(modes[0], other_modes=tuple(modes[1:]))
    assert EnergyTable.from_json(json.loads(json.dumps(ladder.to_json()))) == ladder
    active = ladder.in_mode("30W")
    assert (active.mode, active.tiers[0].step_j0) == ("30W", 0.4)
    assert {t.mode for t in active.modes()} == {"MAXN", "30W", "15W"}
    assert active.in_mode("MAXN").tiers == ladder.tiers
    with pytest.raises(DeviceError, match=r"no prices for power mode 50W; it has MAXN, 30W, 15W"):
        ladder.in_mode("50W")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (calibrated("MAXN", 0.4), "name each once"),
        (calibrated(None, 0.4), "name each once"),
        (replace(calibrated("15W", 0.4), device="thor"), "one device"),
        (replace(calibrated("15W", 0.4), other_modes=(calibrated("30W", 0.4),)), "side by side"),
        (
            replace(
                calibrated("15W", 0.4),
                tiers=(
                    calibrated("15W", 0.4).tiers[0],
                    TierEnergy("t1", 0.1, 0.01, 0.0, 0.2, 1e-5, 2e-5, "calibrated"),
                ),
            ),
            "different ladders",
        ),
    ],
)
def test_modes_that_do_not_belong_together_are_refused(other, says):
    """Each mode once, one device, one ladder, one level deep."""
    with pytest.raises(BundleError, match=says):
        replace(calibrated("MAXN", 0.5), other_modes=(other,))


def test_a_table_of_another_engine_mode_or_rail_set_is_refused():
    """The mode found is made active; whatever else differs from the calibration is named and refused, a prior holds."""
    home = Identity(module="p3701-0005", power_mode="MAXN", rails=("A", "B"), engine="e1")
    ladder = replace(
        calibrated("MAXN", 0.5, home), other_modes=(calibrated("15W", 0.6, replace(home, power_mode="15W")),)
    )
    assert ladder.on(home) is ladder
    assert ladder.on(Identity()) is ladder
    assert ladder.on(replace(home, power_mode="15W")).mode == "15W"
    for found, says in (
        (replace(home, engine="e2"), "engine: e1, not e2"),
        (replace(home, rails=("A", "B", "C")), r"rails: A\+B, not A\+B\+C"),
        (replace(home, power_mode="50W"), "no prices for power mode 50W"),
    ):
        with pytest.raises(DeviceError, match=says):
            ladder.on(found)
    prior = table((0.01, 1.0, 0.001))
    assert prior.on(home) is prior


def test_prices_are_only_ever_widened():
    """A factor multiplies every price through the margin; below 1 it is a mistake of ours; 1 changes nothing."""
    ladder = table((0.01, 1.0, 0.001), margin=0.1)
    assert ladder.widened(2.0).step_price_j(0, 64, 1) == pytest.approx(2 * ladder.step_price_j(0, 64, 1))
    assert ladder.widened(1.0) is ladder
    for factor in (0.9, math.nan, math.inf):
        with pytest.raises(ValueError, match="only ever raised"):
            ladder.widened(factor)


def test_nominal_joules_are_those_no_meter_confirmed():
    """Prior and proxy; calibrated and measured are not."""
    nominal = {source: table((0.01, 1.0, 0.001), source=source).nominal for source in ENERGY_SOURCES}
    assert nominal == {"measured": False, "calibrated": False, "prior": True, "proxy": True}

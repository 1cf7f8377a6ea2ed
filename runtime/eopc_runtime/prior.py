"""Joules of a tier before anything is measured: a roofline over its bytes and FLOPs, from a device's profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eopc_runtime.energy import EnergyTable, TierCost, TierEnergy
from eopc_runtime.profiles import DeviceProfile


def prior_table(profile: DeviceProfile, costs: Mapping[str, TierCost], precision: str, margin: float) -> EnergyTable:
    """Price a whole ladder (t0 first) on a device from its profile."""
    tiers = tuple(prior_energy(profile, name, cost, precision) for name, cost in costs.items())
    own = tuple(name for name, cost in costs.items() if cost.gather_bytes)
    return EnergyTable(profile.name, profile.energy_source, margin, tiers, own_prompts=own)


def prior_energy(profile: DeviceProfile, tier: str, cost: TierCost, precision: str) -> TierEnergy:
    """Price a tier on a device from its profile; DeviceError if the device does not run the precision.

    A decode step at context c moves weight_bytes + c kv_bytes_per_token; a prefill of n tokens reads the
    weights once, writes n tokens of KV and has n^2 / 2 query-context pairs under the causal mask. Where prompts run
    through a graph of their own, a prefill is that graph over n tokens and one step, and the gathering of weights
    between them where the tier chooses any.
    """
    own = _prior_terms(profile, cost, precision)
    prompt = own if cost.prefill is None else _prior_terms(profile, cost.prefill, precision)
    boundary = _Terms(0.0, 0.0, 0.0, 0.0) if cost.prefill is None else own
    return TierEnergy(
        tier=tier,
        prefill_j0=prompt.once_j + boundary.once_j + boundary.token_j + _gather_j(profile, cost, precision),
        prefill_j1=prompt.token_j + prompt.context_j + boundary.context_j + boundary.attn_j,
        prefill_j2=prompt.attn_j / 2,
        step_j0=own.once_j + own.token_j,
        step_jn=own.context_j + own.attn_j,  # a step attends to n + i tokens, so both cost the same
        step_ji=own.context_j + own.attn_j,
        source=profile.energy_source,
    )


def prior_step_s(profile: DeviceProfile, cost: TierCost, precision: str, context: int) -> float:
    """Seconds of one decode step under the same roofline, for speed estimates beside the joules."""
    speed = profile.constant("bandwidth") * profile.precision(precision).decode_efficiency.value
    flops = cost.flops_per_token + cost.head_flops + context * cost.attn_flops_per_context
    return (
        profile.constant("fixed_s")
        + cost.layers * profile.constant("layer_s")
        + (cost.weight_bytes + context * cost.kv_bytes_per_token) / speed
        + flops / (profile.constant("flops") * profile.constant("prefill_efficiency"))
    )


@dataclass(frozen=True, slots=True)
class _Terms:
    """Joules of a graph: per pass, per token, per token held in the cache, per query and token it attends to."""

    once_j: float
    token_j: float
    context_j: float
    attn_j: float


def _prior_terms(profile: DeviceProfile, cost: TierCost, precision: str) -> _Terms:
    byte_j = _byte_j(profile, precision)
    flop_s = 1 / (profile.constant("flops") * profile.constant("prefill_efficiency"))
    flop_j = profile.constant("idle_w") * flop_s + profile.constant("j_per_flop")
    launch_s = profile.constant("fixed_s") + cost.layers * profile.constant("layer_s")
    unpack = profile.precision(precision).unpack_j
    once_j = profile.constant("idle_w") * launch_s + byte_j * cost.weight_bytes + flop_j * cost.head_flops
    if unpack is not None:
        once_j += unpack.value * cost.flops_per_token / 2  # two FLOPs per weight
    return _Terms(
        once_j,
        flop_j * cost.flops_per_token,
        byte_j * cost.kv_bytes_per_token,
        flop_j * cost.attn_flops_per_context,
    )


def _byte_j(profile: DeviceProfile, precision: str) -> float:
    speed = profile.constant("bandwidth") * profile.precision(precision).decode_efficiency.value
    return profile.constant("idle_w") / speed + profile.constant("j_per_byte")


def _gather_j(profile: DeviceProfile, cost: TierCost, precision: str) -> float:
    """Joules of choosing and moving weights once; its small operators are launched like those of a decode step."""
    if not cost.gather_bytes:
        return 0.0
    launch_s = profile.constant("fixed_s") + cost.layers * profile.constant("layer_s")
    return profile.constant("idle_w") * launch_s + _byte_j(profile, precision) * cost.gather_bytes

"""What a tier costs in joules: closed forms for prefill and decode, and the prior computed from a device
profile.

With n prompt tokens and m generated tokens a sequence costs

    E(n, m) = prefill(n) + sum over i = 1..m-1 of step(n + i)
    prefill(n) = p0 + p1 n + p2 n^2          one pass over the prompt; it also yields the first token
    step(c)    = s0 + s1 c                   one decode step that attends to c tokens, itself included

which has the six monomials 1, n, n^2, m, n m, m^2 of the SweetSpot model (arXiv 2602.05695), written per
phase, so that the tier of the prefill and the tier of the decode can differ. No coefficient is negative:
the energy rises with n and m, and a budget has one largest affordable m.

The prior is an additive roofline, polynomial by construction. With bandwidth B, its share e reached at the
precision, F FLOP/s at share f, idle power P, w joules per byte and x joules per FLOP:

    t = fixed_s + layers layer_s + bytes / (B e) + flops / (F f)
    E = P t + w bytes + x flops

It ranks tiers; against measurements datasheet priors are wrong by up to 3.6x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields

from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields, did_you_mean, plain
from eopc_runtime.profiles import DeviceProfile

ENERGY_SCHEMA = 1
ENERGY_SOURCES = ("measured", "calibrated", "prior", "proxy")


@dataclass(frozen=True, slots=True)
class TierCost:
    """Work of one tier in bytes and FLOPs, independent of the device.

    weight_bytes is read once per decode step (output head included, embedding table not);
    kv_bytes_per_token is K and V of one context token over all kept layers; flops_per_token are the matmuls
    of one token without the head; attn_flops_per_context are the FLOPs per query token per context token
    over all layers (4 head_dim q_heads, summed).
    """

    layers: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: float
    head_flops: float
    attn_flops_per_context: float

    def to_json(self) -> dict[str, object]:
        """Return the fields as a JSON object."""
        return asdict(self)

    @classmethod
    def from_fields(cls, fields: Fields) -> TierCost:
        """Read the cost of a tier strictly; nothing may be negative or missing."""
        cost = cls(
            layers=fields.integer("layers", minimum=1),
            weight_bytes=fields.integer("weight_bytes", minimum=1),
            kv_bytes_per_token=fields.integer("kv_bytes_per_token", minimum=0),
            flops_per_token=fields.number("flops_per_token", minimum=0),
            head_flops=fields.number("head_flops", minimum=0),
            attn_flops_per_context=fields.number("attn_flops_per_context", minimum=0),
        )
        fields.done()
        return cost


@dataclass(frozen=True, slots=True)
class TierEnergy:
    """Energy coefficients of one tier in joules, without margin; all are finite and not negative."""

    tier: str
    prefill_j0: float
    prefill_j1: float  # per prompt token
    prefill_j2: float  # per prompt token squared
    step_j0: float
    step_j1: float  # per context token
    source: str

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BundleError(
                    f"The energy of tier {self.tier} has {name} = {value}, but coefficients are finite "
                    f"and not negative. Build or calibrate the bundle again."
                )
        _check_source(self.source)
        if self.step_j0 + self.step_j1 == 0 or self.prefill_j0 + self.prefill_j1 + self.prefill_j2 == 0:
            raise BundleError(
                f"The energy of tier {self.tier} is zero for a whole phase, which cannot be. "
                f"Build or calibrate the bundle again."
            )

    def prefill_j(self, n: int) -> float:
        """Joules to run n prompt tokens, the first new token included."""
        return self.prefill_j0 + n * self.prefill_j1 + n * n * self.prefill_j2

    def step_j(self, context: int) -> float:
        """Joules of one decode step that attends to `context` tokens, the new one included."""
        return self.step_j0 + context * self.step_j1

    def decode_j(self, n_in: int, n_out: int) -> float:
        """Joules of the steps after the first new token: the sum of step_j(n_in + i) for i = 1..n_out-1."""
        steps = max(n_out - 1, 0)
        contexts = steps * n_in + steps * (steps + 1) // 2
        return steps * self.step_j0 + contexts * self.step_j1

    def sequence_j(self, n_in: int, n_out: int) -> float:
        """Joules of a whole sequence with both phases on this tier."""
        return self.prefill_j(n_in) + self.decode_j(n_in, n_out)


COEFFICIENTS = tuple(f.name for f in dataclass_fields(TierEnergy) if f.name not in ("tier", "source"))


@dataclass(frozen=True, slots=True)
class EnergyTable:
    """Prices of a ladder on one device; tiers run from t0 down, and prices include the margin.

    A table has one energy source: estimates and measurements are not mixed.
    """

    device: str
    source: str
    margin: float
    tiers: tuple[TierEnergy, ...]

    def __post_init__(self) -> None:
        _check_source(self.source)
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise BundleError(f"The energy margin is {self.margin}, but must be 0 or more (0.05 adds 5 %).")
        if not self.tiers:
            raise BundleError("The energy table has no tier. Build the bundle again.")
        for i, tier in enumerate(self.tiers):
            if tier.tier != f"t{i}":
                raise BundleError(f"The energy table has {tier.tier} where t{i} belongs. Build the bundle again.")
            if tier.source != self.source:
                raise BundleError(
                    f"The energy of {tier.tier} is {tier.source}, that of the table {self.source}. "
                    f"Sources may not be mixed: calibrate all tiers or none."
                )

    def prefill_price_j(self, tier: int, n: int) -> float:
        """Joules charged for a prefill of n tokens on tier index `tier`."""
        return self.tiers[tier].prefill_j(n) * (1 + self.margin)

    def step_price_j(self, tier: int, context: int) -> float:
        """Joules charged for one decode step that attends to `context` tokens."""
        return self.tiers[tier].step_j(context) * (1 + self.margin)

    def steps_price_j(self, tier: int, context: int, steps: int) -> float:
        """Joules charged for `steps` decode steps that start from a cache of `context` tokens."""
        return self.tiers[tier].decode_j(context, steps + 1) * (1 + self.margin)

    def plan_price_j(self, prefill: int, decode: int, n_in: int, n_out: int) -> float:
        """Joules charged for a sequence whose prefill and decode run on these tier indexes."""
        return self.prefill_price_j(prefill, n_in) + self.steps_price_j(decode, n_in, n_out - 1)

    def to_json(self) -> dict[str, object]:
        """Return the content of energy.json."""
        return plain({"schema": ENERGY_SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, obj: object, where: str = "energy.json") -> EnergyTable:
        """Read energy.json strictly; BundleError on unknown keys, wrong types or a newer schema."""
        fields = Fields(obj, where, BundleError)
        schema = fields.integer("schema", minimum=1)
        if schema > ENERGY_SCHEMA:
            fields.fail(f"schema {schema} was written by a newer eopc (this one reads {ENERGY_SCHEMA}); upgrade eopc.")
        table = cls(
            device=fields.text("device"),
            source=fields.text("source", choices=ENERGY_SOURCES),
            margin=fields.number("margin", minimum=0),
            tiers=tuple(_read_tier(child) for child in fields.children("tiers")),
        )
        fields.done()
        return table


def prior_energy(profile: DeviceProfile, tier: str, cost: TierCost, precision: str) -> TierEnergy:
    """Price a tier on a device from its profile; DeviceError if the device does not run the precision.

    A decode step at context c moves weight_bytes + c kv_bytes_per_token; a prefill of n tokens reads the
    weights once, writes n tokens of KV and has n^2 / 2 query-context pairs under the causal mask.
    """
    speed = profile.constant("bandwidth") * profile.precision(precision).decode_efficiency.value
    byte_j = profile.constant("idle_w") / speed + profile.constant("j_per_byte")
    flop_s = 1 / (profile.constant("flops") * profile.constant("prefill_efficiency"))
    flop_j = profile.constant("idle_w") * flop_s + profile.constant("j_per_flop")
    launch_s = profile.constant("fixed_s") + cost.layers * profile.constant("layer_s")
    once_j = profile.constant("idle_w") * launch_s + byte_j * cost.weight_bytes + flop_j * cost.head_flops
    token_j = flop_j * cost.flops_per_token
    context_j = byte_j * cost.kv_bytes_per_token
    attn_j = flop_j * cost.attn_flops_per_context
    return TierEnergy(
        tier=tier,
        prefill_j0=once_j,
        prefill_j1=token_j + context_j,
        prefill_j2=attn_j / 2,
        step_j0=once_j + token_j,
        step_j1=context_j + attn_j,
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


def prior_table(profile: DeviceProfile, costs: Mapping[str, TierCost], precision: str, margin: float) -> EnergyTable:
    """Price a whole ladder (t0 first) on a device from its profile."""
    tiers = tuple(prior_energy(profile, name, cost, precision) for name, cost in costs.items())
    return EnergyTable(profile.name, profile.energy_source, margin, tiers)


def _read_tier(fields: Fields) -> TierEnergy:
    coefficients = {name: fields.number(name, minimum=0) for name in COEFFICIENTS}
    tier = TierEnergy(tier=fields.text("tier"), source=fields.text("source", choices=ENERGY_SOURCES), **coefficients)
    fields.done()
    return tier


def _check_source(source: str) -> None:
    if source not in ENERGY_SOURCES:
        near = did_you_mean(source, ENERGY_SOURCES)
        raise BundleError(f'The energy source "{source}" is not one of {", ".join(ENERGY_SOURCES)}.{near}')

"""What a tier costs in joules: closed forms for prefill and decode, the table of a ladder, and the prior
computed from a device profile.

With n prompt tokens and m generated tokens a sequence is charged

    E(n, m) = prefill(n) + sum over i = 1..m-1 of step(n, i)
    prefill(n) = p0 + p1 n + p2 n^2          one pass over the prompt; it also yields the first token
    step(n, i) = s0 + sn n + si i            the i-th decode step; it attends to n + i tokens, itself included

which has the six monomials 1, n, n^2, m, n m, m^2 of the SweetSpot model (arXiv 2602.05695), all of them free,
written per phase, so that the tier of the prefill and the tier of the decode can differ. No coefficient is
negative: the energy rises with n and m, and a budget has one largest affordable m. A fitted constant below zero
(a sensor lags behind the start of an isolated run) is kept apart and never credited to a budget.

The prior is an additive roofline, polynomial by construction. With bandwidth B, its share e reached at the
precision, F FLOP/s at share f, idle power P, w joules per byte, x joules per FLOP, and u joules to unpack a quantised
weight (those of the blocks, once per pass):

    t = fixed_s + layers layer_s + bytes / (B e) + flops / (F f)
    E = P t + w bytes + x flops + u weights

It ranks tiers. Its error where it was compared with measurements is in the profile (`prior_error`); datasheet priors
are wrong by up to 3.6x.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields

from eopc_runtime.errors import BundleError, DeviceError
from eopc_runtime.jsonfields import Fields, did_you_mean, plain, shown
from eopc_runtime.provenance import Calibration, Identity

ENERGY_SCHEMA = 2
ENERGY_SOURCES = ("measured", "calibrated", "prior", "proxy")
NOMINAL_SOURCES = ("prior", "proxy")  # joules that no power meter has confirmed


@dataclass(frozen=True, slots=True)
class TierCost:
    """Work of one tier in bytes and FLOPs, independent of the device.

    weight_bytes is read once per decode step (output head included, embedding table not);
    kv_bytes_per_token is K and V of one context token over all kept layers; flops_per_token are the matmuls
    of one token without the head; attn_flops_per_context are the FLOPs per query token per context token
    over all layers (4 head_dim q_heads, summed). `prefill` is the work of the graph that prompts run through where
    that is another one (prefill-only pruning); the last token of the prompt is then a step of this one. gather_bytes
    are moved once per sequence, between the two, where the tier chooses weights after its prompt.
    """

    layers: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: float
    head_flops: float
    attn_flops_per_context: float
    prefill: TierCost | None = None
    gather_bytes: int = 0

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
            prefill=_read_prefill(fields),
            gather_bytes=fields.integer("gather_bytes", minimum=0) if "gather_bytes" in fields else 0,
        )
        fields.done()
        return cost


def _read_prefill(fields: Fields) -> TierCost | None:
    """The work of a prefill graph of its own; bundles of earlier versions do not name it."""
    if "prefill" not in fields or fields.raw("prefill") is None:
        return None
    return TierCost.from_fields(fields.child("prefill"))


@dataclass(frozen=True, slots=True)
class TierEnergy:
    """Energy coefficients of one tier in joules, without margin; all but the last are finite and not negative."""

    tier: str
    prefill_j0: float
    prefill_j1: float  # per prompt token
    prefill_j2: float  # per prompt token squared
    step_j0: float
    step_jn: float  # per prompt token
    step_ji: float  # per step before and including this one
    source: str
    uncredited_j: float = 0.0  # the negative part of a fitted constant: expected of a sequence, never credited

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BundleError(
                    f"The energy of tier {shown(self.tier)} has {name} = {value}, but coefficients are finite "
                    f"and not negative. Build or calibrate the bundle again."
                )
        if not (math.isfinite(self.uncredited_j) and self.uncredited_j <= 0):
            raise BundleError(
                f"The energy of tier {shown(self.tier)} has uncredited_j = {self.uncredited_j}, but at most 0."
            )
        _check_source(self.source)
        if self.step_j(1, 1) == 0 or self.prefill_j(1) == 0:
            raise BundleError(
                f"The energy of tier {shown(self.tier)} is zero for a whole phase, which cannot be. "
                f"Build or calibrate the bundle again."
            )

    def prefill_j(self, n: int) -> float:
        """Joules charged to run n prompt tokens, the first new token included."""
        return self.prefill_j0 + n * self.prefill_j1 + n * n * self.prefill_j2

    def step_j(self, n: int, i: int) -> float:
        """Joules charged for decode step i = 1, 2, ... after a prompt of n tokens."""
        return self.step_j0 + n * self.step_jn + i * self.step_ji

    def steps_j(self, n: int, done: int, steps: int) -> float:
        """Joules charged for `steps` decode steps after `done` of them: the sum of step_j over done+1..done+steps."""
        indexes = steps * done + steps * (steps + 1) // 2
        return steps * (self.step_j0 + n * self.step_jn) + indexes * self.step_ji

    def decode_j(self, n_in: int, n_out: int) -> float:
        """Joules charged for the steps after the first new token."""
        return self.steps_j(n_in, 0, max(n_out - 1, 0))

    def sequence_j(self, n_in: int, n_out: int) -> float:
        """Joules charged for a whole sequence with both phases on this tier."""
        return self.prefill_j(n_in) + self.decode_j(n_in, n_out)

    def expected_j(self, n_in: int, n_out: int, measured: bool = True) -> float:
        """Joules a meter is expected to show for a sequence, a negative constant included.

        Outside the measured lengths that constant could make short sequences free, so there it is at least the price
        of n_out steps (but never more than what is charged).
        """
        charged = self.sequence_j(n_in, n_out)
        least = 0.0 if measured else min(charged, self.steps_j(n_in, 0, n_out))
        return max(charged + self.uncredited_j, least)


COEFFICIENTS = tuple(f.name for f in dataclass_fields(TierEnergy) if f.name not in ("tier", "source", "uncredited_j"))


@dataclass(frozen=True, slots=True)
class EnergyTable:
    """Prices of a ladder on one device; tiers run from t0 down, and prices include the margin.

    A table has one energy source: estimates and measurements are not mixed. It holds in one power mode (None:
    not known); `other_modes` are the same ladder's tables in other modes, side by side. Tiers of `own_prompts` choose
    weights by what a prompt did in them, so they answer no prompt that another tier has read.
    """

    device: str
    source: str
    margin: float
    tiers: tuple[TierEnergy, ...]
    mode: str | None = None
    calibration: Calibration | None = None
    other_modes: tuple[EnergyTable, ...] = ()
    own_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_source(self.source)
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise BundleError(f"The energy margin is {self.margin}, but must be 0 or more (0.05 adds 5 %).")
        if not self.tiers:
            raise BundleError("The energy table has no tier. Build the bundle again.")
        for i, tier in enumerate(self.tiers):
            if tier.tier != f"t{i}":
                raise BundleError(
                    f"The energy table has {shown(tier.tier)} where t{i} belongs. Build the bundle again."
                )
            if tier.source != self.source:
                raise BundleError(
                    f"The energy of {tier.tier} is {tier.source}, that of the table {self.source}. "
                    f"Sources may not be mixed: calibrate all tiers or none."
                )
        if self.other_modes:
            _check_modes(self)

    @property
    def nominal(self) -> bool:
        """True if no power meter stands behind these joules (prior, proxy)."""
        return self.source in NOMINAL_SOURCES

    def plans(self) -> tuple[tuple[int, int], ...]:
        """Pairs of a prefill tier and a decode tier at or below it, best decode tier first, then best prefill tier."""
        tiers = range(len(self.tiers))
        return tuple((p, d) for d in tiers for p in range(d + 1) if p == d or d in self.below(p))

    def below(self, tier: int) -> tuple[int, ...]:
        """The tiers that a sequence may go down to from a tier, nearest first."""
        lower = range(tier + 1, len(self.tiers))
        return tuple(t for t in lower if self.tiers[t].tier not in self.own_prompts)

    def prefill_price_j(self, tier: int, n: int) -> float:
        """Joules charged for a prefill of n tokens on tier index `tier`."""
        return self.tiers[tier].prefill_j(n) * (1 + self.margin)

    def step_price_j(self, tier: int, n: int, i: int) -> float:
        """Joules charged for decode step i after a prompt of n tokens."""
        return self.tiers[tier].step_j(n, i) * (1 + self.margin)

    def steps_price_j(self, tier: int, n: int, done: int, steps: int) -> float:
        """Joules charged for `steps` decode steps after `done` of them."""
        return self.tiers[tier].steps_j(n, done, steps) * (1 + self.margin)

    def plan_price_j(self, prefill: int, decode: int, n_in: int, n_out: int) -> float:
        """Joules charged for a sequence whose prefill and decode run on these tier indexes."""
        return self.prefill_price_j(prefill, n_in) + self.steps_price_j(decode, n_in, 0, n_out - 1)

    def widened(self, factor: float) -> EnergyTable:
        """Return the table with every price multiplied by a factor of 1 or more."""
        if not (math.isfinite(factor) and factor >= 1):
            raise ValueError(f"prices are only ever raised, not multiplied by {factor}")
        return self if factor == 1 else replace(self, margin=(1 + self.margin) * factor - 1)

    def modes(self) -> tuple[EnergyTable, ...]:
        """Return the tables of all power modes, the active one first."""
        return (replace(self, other_modes=()), *self.other_modes)

    def in_mode(self, name: str) -> EnergyTable:
        """Return the table with another power mode active; DeviceError names the modes there are."""
        tables = self.modes()
        for table in tables:
            if table.mode == name:
                return replace(table, other_modes=tuple(other for other in tables if other is not table))
        known = [table.mode or "not recorded" for table in tables]
        raise DeviceError(
            f"This table has no prices for power mode {name}; it has {', '.join(known)}.{did_you_mean(name, known)} "
            "Switch the board to one of these, or calibrate in this mode."
        )

    def on(self, found: Identity) -> EnergyTable:
        """Return the table that belongs to the device found, in its power mode; DeviceError says what differs.

        A table without an identity (a prior) holds anywhere. Clocks, rails or an engine other than those of the
        calibration are refused: coefficients do not carry over.
        """
        table = self
        if found.power_mode is not None and self.mode is not None and found.power_mode != self.mode:
            table = self.in_mode(found.power_mode)
        identity = table.calibration.identity if table.calibration else None
        if identity and (differences := identity.differences(found)):
            raise DeviceError(
                f"The prices were calibrated elsewhere ({'; '.join(differences)}) and do not carry over. "
                "Run `eopc calibrate` here, or restore the settings of the calibration."
            )
        return table

    def to_json(self) -> dict[str, object]:
        """Return the content of energy.json."""
        content = asdict(self)
        for other in content["other_modes"]:
            for key in ("device", "other_modes", "own_prompts"):
                del other[key]
        return plain({"schema": ENERGY_SCHEMA, **content})

    @classmethod
    def from_json(cls, obj: object, where: str = "energy.json") -> EnergyTable:
        """Read energy.json strictly, schema 1 or 2; BundleError on unknown keys, wrong types or a newer schema."""
        fields = Fields(obj, where, BundleError)
        schema = fields.integer("schema", minimum=1)
        if schema > ENERGY_SCHEMA:
            fields.fail(f"schema {schema} was written by a newer eopc (this one reads {ENERGY_SCHEMA}); upgrade eopc.")
        device = fields.text("device")
        others = () if schema == 1 else fields.children("other_modes")
        own = fields.texts("own_prompts", ())
        table = replace(_read_mode(fields, device, schema), own_prompts=own)
        read = []
        for other in others:
            read.append(replace(_read_mode(other, device, schema), own_prompts=own))
            other.done()
        fields.done()
        return replace(table, other_modes=tuple(read))


def _read_mode(fields: Fields, device: str, schema: int) -> EnergyTable:
    """Read the prices of one power mode; schema 1 has neither mode nor calibration."""
    new = schema > 1
    return EnergyTable(
        device=device,
        source=fields.text("source", choices=ENERGY_SOURCES),
        margin=fields.number("margin", minimum=0),
        tiers=tuple(_read_tier(child, schema) for child in fields.children("tiers")),
        mode=fields.text_or_none("mode") if new else None,
        calibration=(
            Calibration.from_fields(fields.child("calibration"))
            if new and fields.raw("calibration") is not None
            else None
        ),
    )


def _read_tier(fields: Fields, schema: int) -> TierEnergy:
    """Read one tier; in schema 1 a context token costs the same in the prompt and in the answer (step_j1)."""
    names = {name: name for name in COEFFICIENTS}
    if schema == 1:
        names |= {"step_jn": "step_j1", "step_ji": "step_j1"}
    coefficients = {name: fields.number(key, minimum=0) for name, key in names.items()}
    tier = TierEnergy(
        tier=fields.text("tier"),
        source=fields.text("source", choices=ENERGY_SOURCES),
        uncredited_j=0.0 if schema == 1 else fields.number("uncredited_j"),
        **coefficients,
    )
    fields.done()
    return tier


def _check_modes(table: EnergyTable) -> None:
    names = [t.mode for t in table.modes()]
    if None in names or len(set(names)) < len(names):
        raise BundleError(
            f"A table of several power modes must name each once, not {shown(str(names))}. Calibrate again."
        )
    if any(other.other_modes or other.device != table.device for other in table.other_modes):
        raise BundleError("The power modes of a table belong to one device, and stand side by side.")
    if any(len(other.tiers) != len(table.tiers) for other in table.other_modes):
        raise BundleError("The power modes of a table price different ladders. Calibrate every tier in each mode.")


def _check_source(source: str) -> None:
    if source not in ENERGY_SOURCES:
        near = did_you_mean(source, ENERGY_SOURCES)
        raise BundleError(f'The energy source "{shown(source)}" is not one of {", ".join(ENERGY_SOURCES)}.{near}')

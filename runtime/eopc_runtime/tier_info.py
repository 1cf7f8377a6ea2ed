"""What the manifest says of a tier, read strictly, and that the tiers are a ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eopc_runtime.bundle_files import MANIFEST_NAME
from eopc_runtime.energy import ENERGY_SOURCES, TierCost
from eopc_runtime.errors import BundleError
from eopc_runtime.jsonfields import Fields, shown

KEEP_SHARES = ("layers", "kv_groups", "ffn")
FREE = 32  # tokens of a pass that run through a layer that only a share runs through, before the share counts
PASS = 256  # tokens of a prompt that are run at once, at least, but for its last pass: prices count on it


def running_layers(depth: int, share: float, layers: int) -> int:
    """How many of so many layers a prompt runs through, with all its tokens or a share: the last one needs none."""
    return max(depth, layers - 1) if share else depth


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """What a tier keeps of one layer: the first kv_heads KV groups and the first ffn units of that layer."""

    source_layer: int
    kv_heads: int
    ffn: int

    @classmethod
    def from_fields(cls, fields: Fields) -> LayerInfo:
        """Read a layer record strictly."""
        layer = cls(
            fields.integer("source_layer", minimum=0),
            fields.integer("kv_heads", minimum=0),
            fields.integer("ffn", minimum=0),
        )
        fields.done()
        return layer


@dataclass(frozen=True, slots=True)
class PrefillInfo:
    """Prefill-only pruning (POP, arXiv 2602.03295): prompts run through the first `depth` layers, by this graph.

    It fills the caches of all layers with all tokens but the last, which is a step of the tier's own graph. FREE of
    those tokens, and a `share` of the rest, run through the other layers but the last as well, chosen anew in each.
    """

    depth: int
    graph: str
    share: float = 0.0

    def attending(self, layers: int) -> int:
        """How many of so many layers all or some of the tokens run through: the first ones."""
        return running_layers(self.depth, self.share, layers)

    @classmethod
    def from_fields(cls, tier: Fields) -> PrefillInfo | None:
        """Read the record of a tier strictly; null for none."""
        if tier.raw("prefill") is None:
            return None
        fields = tier.child("prefill")
        share = fields.number("share", minimum=0) if "share" in fields else 0.0  # bundles of earlier versions have none
        info = cls(fields.integer("depth", minimum=1), fields.text("graph"), share)
        if share >= 1:
            fields.fail(f'"share" is {share:g}, but of a prompt\'s tokens less than all can skip a layer.')
        fields.done()
        return info


@dataclass(frozen=True, slots=True)
class SelectorInfo:
    """FFN channels chosen once per sequence, by what the prompt did in them (EOP-style).

    Of every layer the first `core` channels always run. Of the `pool` behind them `graph` gathers the `chosen` ones
    that the prompt's energies favour, between prefill and decode: the choice depends on the prompt, its size does not.
    """

    graph: str
    core: tuple[int, ...]
    pool: tuple[int, ...]
    chosen: tuple[int, ...]

    @classmethod
    def from_fields(cls, tier: Fields, layers: Sequence[LayerInfo]) -> SelectorInfo | None:
        """Read the record of a tier strictly; null for none."""
        if tier.raw("selector") is None:
            return None
        fields = tier.child("selector")
        info = cls(fields.text("graph"), fields.integers("core"), fields.integers("pool"), fields.integers("chosen"))
        if not len(info.core) == len(info.pool) == len(info.chosen) == len(layers):
            fields.fail(f"core, pool and chosen have one number for each of the {len(layers)} layers.")
        for layer, core, pool, chosen in zip(layers, info.core, info.pool, info.chosen, strict=True):
            if min(core, chosen) < 0 or chosen > pool or core + pool != layer.ffn:
                fields.fail(
                    f"layer {layer.source_layer} cannot choose {chosen} of {pool} channels beside {core}, of "
                    f"{layer.ffn} in all."
                )
        fields.done()
        return info


@dataclass(frozen=True, slots=True)
class TierInfo:
    """One rung of the ladder; `keep` are shares of layers, KV groups and FFN units kept, 0 to 1."""

    tier: str
    budget_j: float | None
    energy_j: float
    energy_source: str
    perplexity: float | None
    perplexity_dense: float | None
    perplexity_by_domain: Mapping[str, float]
    params: int
    keep: Mapping[str, float]
    layers: tuple[LayerInfo, ...]
    cost: TierCost
    graph: str
    mask: str
    note: str
    parity: Mapping[str, object]
    proxy: Mapping[str, object] = field(default_factory=dict)  # of a build by TensorRT-RTX, or why there was none
    prefill: PrefillInfo | None = None  # where prompts run through a graph of their own
    selector: SelectorInfo | None = None  # where some channels are chosen after the prompt
    step: str | None = None  # the graph of single tokens, where those run through one of their own on a CPU

    @property
    def graphs(self) -> tuple[str, ...]:
        """Paths of all graphs of the tier."""
        own = (part.graph for part in (self.prefill, self.selector) if part is not None)
        return (self.graph, *own, *((self.step,) if self.step is not None else ()))

    @classmethod
    def from_fields(cls, fields: Fields) -> TierInfo:
        """Read a tier record strictly."""
        layers = tuple(LayerInfo.from_fields(child) for child in fields.children("layers"))
        tier = cls(
            tier=fields.text("tier"),
            budget_j=fields.number_or_none("budget_j", minimum=0),
            energy_j=fields.number("energy_j", minimum=0),
            energy_source=fields.text("energy_source", choices=ENERGY_SOURCES),
            perplexity=fields.number_or_none("perplexity", minimum=0),
            perplexity_dense=fields.number_or_none("perplexity_dense", minimum=0),
            perplexity_by_domain=fields.numbers_by_name("perplexity_by_domain"),
            params=fields.integer("params", minimum=1),
            keep=_read_keep(fields.child("keep")),
            layers=layers,
            cost=TierCost.from_fields(fields.child("cost")),
            graph=fields.text("graph"),
            mask=fields.text("mask"),
            note=fields.text("note"),
            parity=fields.mapping("parity"),
            proxy=fields.mapping("proxy") if "proxy" in fields else {},
            prefill=PrefillInfo.from_fields(fields) if "prefill" in fields else None,
            selector=SelectorInfo.from_fields(fields, layers) if "selector" in fields else None,
            step=fields.text_or_none("step") if "step" in fields else None,
        )
        fields.done()
        if (tier.prefill is None) != (tier.cost.prefill is None):
            fields.fail("a tier whose prompts run through another graph has its path and its cost, both or neither.")
        if (tier.selector is None) != (not tier.cost.gather_bytes) or (tier.selector and tier.prefill is None):
            fields.fail("a tier that chooses channels records its prompts by a graph of its own, and gathers weights.")
        deepest = len(tier.layers) - (tier.selector is None)
        if tier.prefill is not None and tier.prefill.depth > deepest:
            fields.fail(f"prompts cannot run through {tier.prefill.depth} of {len(tier.layers)} layers and skip some.")
        return tier


def check_ladder(tiers: tuple[TierInfo, ...], num_hidden_layers: int) -> None:
    """Raise BundleError unless tiers are t0, t1, ... and each keeps a subset of the tier that hands down to it."""
    if not tiers:
        raise BundleError(f"{MANIFEST_NAME} has no tier. Build the bundle again.")
    for i, tier in enumerate(tiers):
        if tier.tier != f"t{i}":
            raise BundleError(
                f"{MANIFEST_NAME} has the tier {shown(tier.tier)} where t{i} belongs. Build the bundle again."
            )
        indexes = [layer.source_layer for layer in tier.layers]
        if not indexes or indexes != sorted(set(indexes)) or indexes[-1] >= num_hidden_layers:
            raise BundleError(
                f"{MANIFEST_NAME}: the layers of {tier.tier} must be rising numbers below "
                f"{num_hidden_layers}, not {shown(str(indexes))}. Build the bundle again."
            )
        if i:  # nobody goes down to a tier that reads its own prompts, but everybody may go down from one
            handing_down = [tiers[0], *(t for t in tiers[1:i] if not t.selector)]
            _check_nested(tiers[0] if tier.selector else handing_down[-1], tier)
        if tier.selector and len(tier.layers) != len(tiers[0].layers):
            raise BundleError(f"{MANIFEST_NAME}: {tier.tier} chooses channels, but leaves layers out. Build it again.")


def _check_nested(above: TierInfo, tier: TierInfo) -> None:
    """Refuse a tier whose restricted KV cache of `above` would be no valid cache."""
    kept = {layer.source_layer: layer for layer in above.layers}
    for layer in tier.layers:
        where = f"{MANIFEST_NAME}: layer {layer.source_layer} of {tier.tier}"
        old = kept.get(layer.source_layer)
        if old is None:
            raise BundleError(f"{where} is not kept by {above.tier}, but tiers must nest. Build the bundle again.")
        if layer.kv_heads > old.kv_heads or layer.ffn > old.ffn:
            raise BundleError(
                f"{where} keeps {layer.kv_heads} KV heads and {layer.ffn} FFN units, more than {above.tier} "
                f"({old.kv_heads} and {old.ffn}), but tiers must nest. Build the bundle again."
            )


def _read_keep(fields: Fields) -> dict[str, float]:
    keep = {name: fields.number(name, minimum=0) for name in KEEP_SHARES}
    fields.done()
    for name, share in keep.items():
        if share > 1:
            fields.fail(f'"{name}" is {share}, but a share kept lies between 0 and 1.')
    return keep

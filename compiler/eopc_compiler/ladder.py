"""The nested ladder as data: what every tier keeps, and the one order of units that makes keeping a prefix.

A `UnitOrder` sorts the KV groups and FFN channels of one source layer by importance, once. A `Mask` says how many of
them a tier keeps, per kept layer. Because the order is shared by all tiers, a tier below keeps prefixes of the tier
above, and "nested" is the comparison of counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.energy import TierCost
from eopc_runtime.errors import ModelError

MASK_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class UnitOrder:
    """One source layer's units, most important first: original indices of KV groups and of FFN channels."""

    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mask:
    """What a tier keeps: for each kept layer its source index, and how long a prefix of each unit order."""

    layers: tuple[LayerDims, ...]

    def widened(self, channels: Sequence[int]) -> Mask:
        """The mask with so many more FFN channels, per layer."""
        pairs = zip(self.layers, channels, strict=True)
        return Mask(tuple(replace(d, intermediate_size=d.intermediate_size + n) for d, n in pairs))

    def nested_in(self, above: Mask) -> bool:
        """Whether every layer, group and channel kept here is kept by `above`."""
        upper = {d.source_layer: d for d in above.layers}
        return all(
            (u := upper.get(d.source_layer)) is not None
            and d.num_key_value_heads <= u.num_key_value_heads
            and d.intermediate_size <= u.intermediate_size
            for d in self.layers
        )


def full_mask(config: LlamaConfig) -> Mask:
    """The mask of t0: everything."""
    return Mask(config.layers)


def tier_config(config: LlamaConfig, mask: Mask) -> LlamaConfig:
    """The config of the sliced model."""
    return replace(config, layers=mask.layers)


def keep_shares(config: LlamaConfig, mask: Mask) -> dict[str, float]:
    """Shares of layers, KV groups and FFN channels kept, of the whole model's."""

    def total(layers: Sequence[LayerDims], field: str) -> int:
        return sum(getattr(d, field) for d in layers)

    return {
        "layers": len(mask.layers) / len(config.layers),
        "kv_groups": total(mask.layers, "num_key_value_heads") / total(config.layers, "num_key_value_heads"),
        "ffn": total(mask.layers, "intermediate_size") / total(config.layers, "intermediate_size"),
    }


def matrix_shapes(config: LlamaConfig, dims: LayerDims) -> dict[str, tuple[int, int]]:
    """[in, out] of the deployment-form matrices of a layer."""
    q = dims.num_key_value_heads * config.query_group_size * config.head_dim
    kv = dims.num_key_value_heads * config.head_dim
    return {
        "self_attn.qkv_proj": (config.hidden_size, q + 2 * kv),
        "self_attn.o_proj": (q, config.hidden_size),
        "mlp.gate_proj": (config.hidden_size, dims.intermediate_size),
        "mlp.up_proj": (config.hidden_size, dims.intermediate_size),
        "mlp.down_proj": (dims.intermediate_size, config.hidden_size),
    }


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a matrix is cut by columns: (units, columns per unit) of the parts side by side, and the counts kept."""

    parts: tuple[tuple[int, int], ...]
    bounds: tuple[int, ...]  # ascending, the last being all


def column_cuts(config: LlamaConfig, dims: LayerDims, masks: Sequence[Mask]) -> dict[str, Cut]:
    """The cuts of a source layer's matrices of which tiers keep columns, by module name."""
    kept = [d for mask in masks for d in mask.layers if d.source_layer == dims.source_layer]
    groups, width, head = dims.num_key_value_heads, dims.intermediate_size, config.head_dim
    group_bounds = tuple(sorted({d.num_key_value_heads for d in kept} | {groups}))
    ffn = Cut(((width, 1),), tuple(sorted({d.intermediate_size for d in kept} | {width})))
    qkv = Cut(((groups, config.query_group_size * head), (groups, head), (groups, head)), group_bounds)
    return {"self_attn.qkv_proj": qkv, "mlp.gate_proj": ffn, "mlp.up_proj": ffn}


def tier_cost(
    config: LlamaConfig,
    mask: Mask,
    bytes_per_weight: Callable[[str, int], float],
    cache_bytes: int,
    turned: Callable[[str, int], int] = lambda _name, _layer: 0,
) -> TierCost:
    """Count what a tier costs: bytes read per decode step, bytes of cache per token, FLOPs.

    Args:
        bytes_per_weight: stored bytes per element, scales included, by matrix name and source layer (-1: the head).
        cache_bytes: bytes per cache element.
        turned: inputs that are mixed with each input before the matrix reads it, by the same; 0 where none are.
    """
    layers = [(name, d.source_layer, k, n) for d in mask.layers for name, (k, n) in matrix_shapes(config, d).items()]
    sizes = [*layers, ("lm_head", -1, config.hidden_size, config.vocab_size)]
    products = sum(k * (n + turned(name, source)) for name, source, k, n in layers)
    head = config.hidden_size * config.vocab_size
    kv_heads = sum(d.num_key_value_heads for d in mask.layers)
    return TierCost(
        layers=len(mask.layers),
        weight_bytes=round(sum(k * n * bytes_per_weight(name, source) for name, source, k, n in sizes)),
        kv_bytes_per_token=2 * kv_heads * config.head_dim * cache_bytes,
        flops_per_token=2.0 * products,
        head_flops=2.0 * head,
        attn_flops_per_context=4.0 * config.head_dim * kv_heads * config.query_group_size,
    )


def prompt_cost(
    config: LlamaConfig,
    mask: Mask,
    path: PromptPath,
    bytes_per_weight: Callable[[str, int], float],
    cache_bytes: int,
    turned: Callable[[str, int], int] = lambda _name, _layer: 0,
) -> TierCost:
    """Count what the graph costs that runs prompts through part of the layers: no head, and K and V of the others.

    Where a share of S tokens runs, q, k and v and the score are of all of them, and the rest of a layer of at most
    a S + b (`PromptPath.most`); what does not depend on S stands in head_flops, as what a prompt costs once. If these
    tokens are the last, they look at a (2 - a) S² / 2 + (1 - a) b S pairs; that is charged, whichever they are.
    Arguments as those of `tier_cost`.
    """
    whole, layers = tier_cost(config, mask, bytes_per_weight, cache_bytes), mask.layers
    (run, once), running = path.most, path.running(len(layers))
    every, some, skipped = layers[: path.depth], layers[path.depth : running], layers[running:]
    sizes = [(name, d.source_layer, k, n) for d in (*every, *some) for name, (k, n) in matrix_shapes(config, d).items()]
    sizes += [
        ("self_attn.qkv_proj", d.source_layer, config.hidden_size, 2 * d.num_key_value_heads * config.head_dim)
        for d in skipped
    ]
    products = sum(k * (n + turned(name, source)) for name, source, k, n in sizes)  # of a token
    products += config.hidden_size * len(some)  # a score is one
    spared = sum(
        k * (n + turned(name, d.source_layer))
        for d in some
        for name, (k, n) in matrix_shapes(config, d).items()
        if "qkv" not in name
    )
    attending, choosing = (
        tier_cost(config, Mask(part), bytes_per_weight, cache_bytes).attn_flops_per_context for part in (every, some)
    )
    return replace(
        whole,
        weight_bytes=round(sum(k * n * bytes_per_weight(name, source) for name, source, k, n in sizes)),
        flops_per_token=2.0 * (products - (1 - run) * spared) + (1 - run) * once * choosing,
        head_flops=2.0 * spared * once,
        attn_flops_per_context=attending + run * (2 - run) * choosing,
    )


def parameter_count(config: LlamaConfig, mask: Mask) -> int:
    """Parameters of the sliced model, a tied embedding counted once."""
    return tier_config(config, mask).param_count


def mask_to_json(tier: str, mask: Mask, orders: Sequence[UnitOrder]) -> dict[str, Any]:
    """The content of mask.json: original indices of everything kept, in stored order."""
    return {
        "schema": MASK_SCHEMA,
        "tier": tier,
        "layers": [
            {
                "source_layer": d.source_layer,
                "kv_groups": list(orders[d.source_layer].kv_groups[: d.num_key_value_heads]),
                "ffn_channels": list(orders[d.source_layer].ffn_channels[: d.intermediate_size]),
            }
            for d in mask.layers
        ],
    }


def read_masks(
    paths: Sequence[Path], config: LlamaConfig, align: int
) -> tuple[tuple[UnitOrder, ...], tuple[Mask, ...]]:
    """Masks given by the user, one file per tier below t0, each inside the one before.

    Returns:
        The unit orders that make every mask a prefix, and the masks.

    Raises:
        ModelError: a file is malformed, keeps what the model does not have, is not nested, or cuts FFN channels at a
            number that is no multiple of `align`.
    """
    parsed = [_read_mask(path, config, align) for path in paths]
    masks, orders = [], []
    for path, layers in zip(paths, parsed, strict=True):
        masks.append(Mask(tuple(LayerDims(i, len(kv), len(ffn)) for i, (kv, ffn) in sorted(layers.items()))))
        if len(masks) > 1 and not masks[-1].nested_in(masks[-2]):
            raise ModelError(f"{path} keeps more than the mask before it. Give masks from large to small.")
    for source, dims in enumerate(config.layers):
        kept = [layers[source] for layers in reversed(parsed) if source in layers]  # smallest tier first
        groups = _chain([kv for kv, _ in kept], dims.num_key_value_heads, f"layer {source}: kv_groups")
        channels = _chain([ffn for _, ffn in kept], dims.intermediate_size, f"layer {source}: ffn_channels")
        orders.append(UnitOrder(groups, channels))
    return tuple(orders), tuple(masks)


def _chain(nested: Sequence[Sequence[int]], total: int, what: str) -> tuple[int, ...]:
    """One order of range(total) in which every set of the growing chain is a prefix."""
    order: list[int] = []
    for units in nested:
        if not set(order) <= set(units):
            raise ModelError(f"{what}: a smaller mask keeps units that a larger one drops. Masks must be nested.")
        order += [u for u in units if u not in set(order)]
    return (*order, *(u for u in range(total) if u not in set(order)))


def _read_mask(path: Path, config: LlamaConfig, align: int) -> dict[int, tuple[list[int], list[int]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        layers = {int(e["source_layer"]): (list(e["kv_groups"]), list(e["ffn_channels"])) for e in content["layers"]}
    except OSError as error:
        raise ModelError(f"the mask {path} cannot be read: {error.strerror}. Give a JSON file with --mask.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a mask file ({type(error).__name__}: {error}). Expected JSON with layers[]: "
            f"{{source_layer, kv_groups, ffn_channels}}, as in a bundle's tiers/tN/mask.json."
        ) from error
    if content.get("schema", MASK_SCHEMA) != MASK_SCHEMA:
        raise ModelError(f"{path} has mask schema {content['schema']}; this eopc reads schema {MASK_SCHEMA}.")
    if not layers:
        raise ModelError(f"{path} keeps no layer. A tier needs at least one.")
    if len(layers) != len(content["layers"]):
        twice = next(i for i in layers if [int(e["source_layer"]) for e in content["layers"]].count(i) > 1)
        raise ModelError(f"{path} lists layer {twice} twice. List every kept layer once.")
    for source, (kv, ffn) in layers.items():
        if not 0 <= source < len(config.layers):
            raise ModelError(f"{path}: layer {source} does not exist; the model has {len(config.layers)} layers.")
        dims = config.layers[source]
        for name, units, total in (
            ("kv_groups", kv, dims.num_key_value_heads),
            ("ffn_channels", ffn, dims.intermediate_size),
        ):
            if (
                not units
                or len(set(units)) != len(units)
                or not all(isinstance(u, int) and 0 <= u < total for u in units)
            ):
                raise ModelError(
                    f"{path}: layer {source}: {name} must be distinct indices in 0..{total - 1}, not empty."
                )
        if len(ffn) % align:
            raise ModelError(f"{path}: layer {source} keeps {len(ffn)} FFN channels, not a multiple of {align}.")
    return layers

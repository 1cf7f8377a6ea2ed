"""The layer map: a row per layer, a column per tier, and in each cell what the tier keeps of the layer."""

from __future__ import annotations

from collections.abc import Sequence

from eopc_runtime.svg import path, picture, series, text
from eopc_runtime.tier_info import TierInfo

WIDTH, LEFT, TOP = 400, 34, 24
ROW, KV_HEIGHT, FFN_HEIGHT = 14, 4, 6
MOST_GROUPS = 16  # beyond it, groups are shown as a share
KV, FFN, CHOSEN = series(1), series(0), series(6)


def layer_map(tiers: Sequence[TierInfo]) -> str:
    """Return the picture; the first tier is the whole model, to which shares refer.

    The upper bar of a cell are KV groups, the lower one FFN channels: those that always run, and beside them those
    that the prompt chooses. A cell without bars is a layer that is left out; faded ones are skipped by prompts, half
    faded ones by some of their tokens.
    """
    whole = {layer.source_layer: layer for layer in tiers[0].layers}
    rows = {source: TOP + ROW * i for i, source in enumerate(whole)}
    column = (WIDTH - LEFT) / len(tiers)
    parts = [text(LEFT - 8, y + 10, str(source), anchor="end", size=9, fill="muted") for source, y in rows.items()]
    for index, tier in enumerate(tiers):
        x, width = LEFT + index * column, column - 8
        parts.append(text(x + width / 2, 14, tier.tier, anchor="middle", weight="bold"))
        strips = [_strip(x, y, width, 1.0, KV_HEIGHT + 1 + FFN_HEIGHT) for y in rows.values()]
        parts.append(path("".join(strips), fill="grid"))
        count = len(tier.layers)
        every = tier.prefill.depth if tier.prefill else count
        some = tier.prefill.attending(count) if tier.prefill else count
        for opacity, layers in ((1.0, range(every)), (0.7, range(every, some)), (0.4, range(some, count))):
            bars = {KV: "", FFN: "", CHOSEN: ""}
            for i in layers:
                layer = tier.layers[i]
                y, dense = rows[layer.source_layer], whole[layer.source_layer]
                bars[KV] += _groups(x, y, width, layer.kv_heads, dense.kv_heads)
                core = tier.selector.core[i] if tier.selector else layer.ffn
                chosen = tier.selector.chosen[i] if tier.selector else 0
                lower, share = y + KV_HEIGHT + 1, 1 / max(dense.ffn, 1)
                bars[FFN] += _strip(x, lower, width, core * share, FFN_HEIGHT)
                bars[CHOSEN] += _strip(x + width * core * share, lower, width, chosen * share, FFN_HEIGHT)
            drawn = [path(d, fill=color) for color, d in bars.items() if d]
            parts += [f'<g opacity="{opacity:g}">', *drawn, "</g>"] if opacity < 1 and drawn else drawn
    return picture(WIDTH, TOP + ROW * len(rows) + 4, parts, "what every tier keeps of every layer")


def _groups(x: float, y: float, width: float, kept: int, total: int) -> str:
    """A bar per group kept, or one for all of them."""
    if total > MOST_GROUPS:
        return _strip(x, y, width, kept / total, KV_HEIGHT)
    each = width / max(total, 1)
    return "".join(_strip(x + i * each, y, each - 1.5, 1.0, KV_HEIGHT) for i in range(kept))


def _strip(x: float, y: float, width: float, share: float, height: float) -> str:
    """A rectangle that fills a share of a width; nothing for none."""
    across = width * min(share, 1.0)
    return f"M{x:.1f} {y:.1f}h{across:.1f}v{height:g}h-{across:.1f}z" if across > 0 else ""

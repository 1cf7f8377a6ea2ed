"""How a ladder is stored: precision of its matrices, compute type of the rest, layout of scales; what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.ladder import Mask, full_mask, prompt_cost, tier_cost
from eopc_compiler.quantize import FP8, GRIDS, PAIRED, InputRounding, choose_block
from eopc_compiler.selector import Selector
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.energy import TierCost

GRID_OF = {"int8": "int8", "int4": "int4", "fp8": FP8}  # what the matrices of a precision are rounded to
HEAD = -1  # stands for the LM head where a source layer is asked for
# Seen on SmolLM2-135M (blocks of 32, nearest rounding, perplexity added on wiki / code / maths): LM head +9.7 / 3.1 /
# 4.7 %, q/k/v +4.7 / 3.8 / 3.4 % for 13 % of the layer weights; the first three layers +7.0 / 1.3 / 0.9 %, the last
# three +2.2 / 4.4 / 5.3 %, against +7.7 / 10 / 6 % for the 24 between them.
SENSITIVE_TO_INT4 = ("lm_head", "qkv_proj")
EDGE_SHARE = 0.15  # of the layers at either end
# Their inputs come from a norm and are Gaussian after rotation. Seen on SmolLM2-135M, divergence from fp32 in 1e-2 nats
# when only these inputs are rounded to one static scale: q/k/v 0.11, gate and up 0.13; o_proj would add 0.08 and
# down_proj, whose inputs differ from token to token by orders of magnitude, 0.37 even with a scale per token.
NORMED = ("qkv_proj", "gate_proj", "up_proj")
# With a scale per token, values turned per head and channels in groups of 64, both together add nothing that can be
# told from chance: in the same unit 0.01 with them, 0.10 without; 0.45 with a static scale for o_proj.
OTHERS = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Storage:
    """How values are stored: precision of the matrices, compute type of the rest, scale layout of the dialect."""

    precision: str  # fp32, fp16, int8, int4, fp8
    dtype: str  # compute type: float32 or float16
    block: int | None  # inputs per scale; None is one scale per output
    edge_layers: frozenset[int] = frozenset()  # source layers that int4 leaves in int8
    static_inputs: bool = False  # normed inputs are rounded too, so that the device multiplies codes by codes
    token_group: int | None = None  # with one, the other inputs are as well, per token, the FFN's turned in such groups

    @classmethod
    def choose(
        cls,
        precision: str,
        compute_dtype: str,
        dialect: Dialect,
        widths: set[int],
        layers: int,
        static_inputs: bool = False,
        token_group: int | None = None,
    ) -> Storage:
        """Storage for a precision; fp32 and fp16 fix the compute type, quantised tiers follow the device."""
        dtype = {"fp32": "float32", "fp16": "float16"}.get(precision, compute_dtype)
        edge = round(EDGE_SHARE * layers)
        edges = frozenset(i for i in range(layers) if i < edge or i >= layers - edge)
        block = choose_block(widths, GRID_OF.get(precision)) if dialect.block_quantization else None
        return cls(precision, dtype, block, edges, static_inputs and precision in GRID_OF, token_group)

    @property
    def grid(self) -> str | None:
        """What the matrices are rounded to, a key of `quantize.GRIDS`; None where none is."""
        return GRID_OF.get(self.precision)

    def grid_of(self, name: str, layer: int) -> str | None:
        """The same of a matrix of a source layer: under int4 the matrices that lose most by it stay int8."""
        sensitive = layer in self.edge_layers or any(kind in name for kind in SENSITIVE_TO_INT4)
        grid = "int8" if self.grid == "int4" and sensitive else self.grid
        return PAIRED if grid == "int8" and (self._normed(name) or self._other(name)) else grid

    def has_static_inputs(self, name: str, layer: int) -> bool:
        """Whether a matrix of a source layer multiplies rounded inputs."""
        return self.grid_of(name, layer) in (PAIRED, FP8) and self._normed(name)

    def token_inputs(self, name: str, layer: int) -> InputRounding | None:
        """How inputs of a matrix are rounded that are rounded per token; None where they are not."""
        if self.grid_of(name, layer) != PAIRED or self.token_group is None or not any(kind in name for kind in OTHERS):
            return None
        return InputRounding(group=self.token_group if "down_proj" in name else 1)

    def block_of(self, name: str, layer: int) -> int | None:
        """Inputs per scale of a matrix: products of codes are summed over a whole column before they are scaled."""
        return None if self.has_static_inputs(name, layer) or self.token_inputs(name, layer) else self.block

    def bytes_per_weight(self, name: str, layer: int) -> float:
        """Stored bytes per element of a matrix, scales included."""
        grid, block = self.grid_of(name, layer), self.block_of(name, layer)
        if grid is None:
            return self.value_bytes
        return GRIDS[grid].bits / 8 + (self.value_bytes / block if block else 0.0)

    @property
    def exact_products(self) -> bool:
        """Whether products of int8 codes by int8 codes are exact on every CPU."""
        return self.static_inputs and self.grid in ("int8", "int4")

    @property
    def single_tokens(self) -> bool:
        """Whether single tokens run through a graph of their own, whose inputs are as they are, scales in blocks."""
        return self.exact_products and self.block is not None

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of the compute type: scales, caches, unquantised weights."""
        return {"float32": 4, "float16": 2}[self.dtype]

    def cost(
        self, config: LlamaConfig, mask: Mask, path: PromptPath | None = None, selector: Selector | None = None
    ) -> TierCost:
        """What a tier stored this way costs to run, counted.

        Args:
            path: how its prompts run; None for through all layers.
            selector: of channels beside those of the mask, whose weights are gathered in the compute type.
        """
        per_matrix = self.bytes_per_weight, self.value_bytes, self._turned
        cost = tier_cost(config, mask, *per_matrix)
        if path is not None:
            return replace(cost, prefill=prompt_cost(config, mask, path, *per_matrix))
        if selector is None:
            return cost
        chosen = 3 * config.hidden_size * sum(selector.chosen)
        whole, every = full_mask(config), PromptPath(len(config.layers))
        return replace(
            cost,
            weight_bytes=cost.weight_bytes + chosen * self.value_bytes,
            flops_per_token=cost.flops_per_token + 2.0 * chosen,
            prefill=prompt_cost(config, whole, every, *per_matrix),
            gather_bytes=2 * chosen * self.value_bytes,  # read, and written
        )

    def _turned(self, name: str, layer: int) -> int:
        inputs = self.token_inputs(name, layer)
        return inputs.group if inputs and inputs.group > 1 else 0

    def _normed(self, name: str) -> bool:
        return self.static_inputs and any(kind in name for kind in NORMED)

    def _other(self, name: str) -> bool:
        return self.token_group is not None and any(kind in name for kind in OTHERS)

"""Symmetric quantisation of deployment-form matrices [in, out], by rounding or error-compensated (GPTQ).

Codes are numbers of a grid: int8, int8 in pairs, int4 (int8 in memory, in [-8, 7], packed two to a byte when written),
or 8-bit floats with four bits of exponent (E4M3 without infinities, arXiv 2209.05433). One scale serves `block`
consecutive inputs of one output (DequantizeLinear with block_size along axis 0), or, with block None, all inputs of one
output (per channel: for opsets below 21, and where the inputs are codes too).

Pairs: where inputs are int8 codes as well, x86 without VNNI multiplies them, shifted to 0..255, by the codes of two
neighbouring inputs and adds the two products in 16 bits, signed (vpmaddubsw). They fit whatever the inputs are if the
two codes add up to at most 128 in magnitude: 128 x 255 < 2^15. That costs next to nothing, as weights are rarely large
side by side, and makes such products exact on every CPU.

GPTQ: Frantar et al., arXiv 2210.17323: quantise one input row at a time and spread its rounding error over the rows not
yet quantised, through the inverse Hessian X Xᵀ of the calibration inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eopc_compiler.hadamard import turned

BLOCK_CHOICES = (64, 32, 16)
SINGLE_BLOCKS = (128, 64, 32, 16)  # in graphs for single tokens: the fewer scales, the fewer bytes
GPTQ_DAMPING = 0.05  # of the Hessian's mean diagonal; the published 0.01 fits short calibration text too closely
LAZY_ROWS = 64  # rows whose updates to the rest of the matrix are applied at once
STATIC_QUANTILE = 0.99
LEAST_PEAK = 1e-20  # of a token's inputs: those of a token that has none are divided by it


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that codes stand for before they are scaled: from `low` to `high`, whole ones where `dtype` is."""

    bits: int  # of a stored code
    low: float
    high: float
    dtype: torch.dtype  # of codes in memory
    stored: str  # the type of codes in a file
    pair_limit: int | None = None  # what two neighbouring codes of an output may add up to, in magnitude

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest number of the grid to every value, ties to even, fp32."""
        clamped = values.clamp(self.low, self.high)
        return clamped.round() if self.dtype == torch.int8 else clamped.to(self.dtype).float()

    def beside(self, values: Tensor, neighbour: Tensor) -> Tensor:
        """The same for the second of a pair, whose first number is the neighbour."""
        if self.pair_limit is None:
            return self.nearest(values)
        low, high = -self.pair_limit - neighbour.clamp(max=0), self.pair_limit - neighbour.clamp(min=0)
        return torch.minimum(torch.maximum(self.nearest(values), low), high)


FP8 = "float8_e4m3fn"
PAIRED = "int8 in pairs"
GRIDS = {
    "int8": Grid(8, -127, 127, torch.int8, "int8"),
    PAIRED: Grid(8, -127, 127, torch.int8, "int8", pair_limit=128),
    "int4": Grid(4, -8, 7, torch.int8, "int4"),
    FP8: Grid(8, -448, 448, torch.float8_e4m3fn, FP8),
}
TOKEN_SCALE = 1 / GRIDS["int8"].high  # of inputs that were divided by their token's peak
SCALE_CHOICES = {"int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # of the full scale


@dataclass(frozen=True, slots=True)
class InputRounding:
    """How the inputs of a matrix are rounded to codes: with one constant scale, or with one of every token's own.

    With scales of their own, neighbouring inputs are turned before in groups of so many (`hadamard.turned`).
    """

    stored: str = "int8"  # the codes' type
    scale: float | None = None  # the constant; None for scales per token
    group: int = 1  # 1 leaves inputs as they are

    def turned(self, x: Tensor) -> Tensor:
        """Inputs x [..., width] as they stand before they are rounded."""
        return turned(x, self.group) if self.group > 1 else x

    def rounded(self, x: Tensor) -> Tensor:
        """Turned inputs [..., width] as the device multiplies them."""
        return round_tokens(x) if self.scale is None else round_inputs(x, self.scale, self.stored)


@dataclass(frozen=True, slots=True)
class Quantized:
    """codes [in, out] of a grid; scales [in / block, out], or [out] where one scale serves a whole column.

    With `inputs`, the matrix multiplies codes: inputs rounded so.
    """

    codes: Tensor
    scales: Tensor
    grid: str  # a key of GRIDS
    block: int | None
    inputs: InputRounding | None = None

    @property
    def stored(self) -> str:
        """The type of the codes in a file, and of those of the inputs if they are rounded too."""
        return GRIDS[self.grid].stored

    def dequantize(self) -> Tensor:
        """The matrix [in, out] that these codes stand for, fp32."""
        scales = self.scales if self.block is None else self.scales.repeat_interleave(self.block, 0)
        return self.codes.float() * scales.float()


def choose_block(widths: set[int], grid: str | None) -> int | None:
    """The largest block all input widths divide into: up to 64, but 32 for int4, which needs the finer scales.

    None for 8-bit floats: their errors are relative, and TensorRT multiplies them only with one scale per output.
    """
    if grid == FP8:
        return None
    return _largest(widths, [b for b in BLOCK_CHOICES if grid != "int4" or b <= 32])


def single_block(width: int) -> int:
    """The inputs that share a scale in a graph for single tokens, where all of a column share one in the file.

    Raises:
        ValueError: the width divides into no block.
    """
    block = _largest({width}, SINGLE_BLOCKS)
    if block is None:
        raise ValueError(f"a width of {width} divides into no block of {SINGLE_BLOCKS}")
    return block


def _largest(widths: set[int], blocks: Sequence[int]) -> int | None:
    """The first block, from the largest, that all widths divide into."""
    return next((b for b in blocks if all(w % b == 0 for w in widths)), None)


def round_inputs(x: Tensor, scale: float, grid: str) -> Tensor:
    """What QuantizeLinear and DequantizeLinear make of inputs."""
    if grid == "int8":  # the whole range of the type
        return (x / scale).round().clamp(-128, 127) * scale
    return GRIDS[grid].nearest(x / scale) * scale


def token_peaks(x: Tensor) -> Tensor:
    """The largest magnitude [..., 1] of every token's inputs x [..., width], above 0."""
    return x.abs().amax(-1, keepdim=True).clamp_min(LEAST_PEAK)


def round_tokens(x: Tensor) -> Tensor:
    """Inputs x [..., width] rounded to int8, every token's with the scale that its largest one needs."""
    peaks = token_peaks(x)
    return round_inputs(x / peaks, TOKEN_SCALE, "int8") * peaks


def static_scale(inputs: Sequence[Tensor], dtype: torch.dtype, grid: str = "int8") -> float:
    """The scale of codes for inputs [tokens, width], so that 99 of 100 tokens peak at the grid's end or below.

    For 8-bit floats all of them do: a larger scale costs them nothing. The value is one that `dtype` can hold. Seen on
    SmolLM2-135M in int8 after rotation: the 90th and 99th percentile and the highest peak lose about the same, twice
    the highest loses four times as much.
    """
    peaks = torch.cat([x.abs().amax(1) for x in inputs]).sort().values
    quantile = STATIC_QUANTILE if grid == "int8" else 1.0
    peak = float(peaks[math.ceil(quantile * (len(peaks) - 1))])
    return float(torch.tensor(max(peak / GRIDS[grid].high, torch.finfo(torch.float16).tiny)).to(dtype))


def round_to_nearest(weight: Tensor, grid: str, block: int | None, scale_dtype: torch.dtype) -> Quantized:
    """Quantise [in, out] by rounding each element to the nearest code."""
    scales = block_scales(weight, grid, block).to(scale_dtype)
    spread = scales.float() if block is None else scales.float().repeat_interleave(block, 0)
    codes = _nearest(weight / spread, GRIDS[grid]).to(GRIDS[grid].dtype)
    return Quantized(codes, scales, grid, block)


def _nearest(values: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers of a grid to [in, out], pairs of rows included."""
    found = grid.nearest(values)
    even = len(values) // 2 * 2
    found[1:even:2] = grid.beside(values[1:even:2], found[:even:2])
    return found


def block_scales(weight: Tensor, grid: str, block: int | None) -> Tensor:
    """Scales [in / block, out] or [out]: the largest magnitude meets the end of the code range.

    For 4 bits the scale takes the sign that puts the extreme element on -8, the longer end of the range. In pairs the
    largest sum of two neighbours meets its limit at most (neighbours of unlike signs never reach it). Seen on
    SmolLM2-135M, divergence from fp32 by the weights alone: 1.6e-3 nats, as against 1.9e-3 with some pairs cut short
    (full scales times 1.1, 1.25 or 1.5, by squared error), 0.9e-3 without a limit of pairs.
    """
    blocks = weight.unsqueeze(0) if block is None else weight.view(-1, block, weight.shape[1])
    if grid != "int4":
        numbers = GRIDS[grid]
        scales = blocks.abs().amax(1) / numbers.high
        even = blocks.shape[1] // 2 * 2
        if numbers.pair_limit is not None and even:
            sums = blocks[:, :even:2] + blocks[:, 1:even:2]
            scales = torch.maximum(scales, sums.abs().amax(1) / numbers.pair_limit)
    else:
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
        scales = extreme / -8
    tiny = torch.finfo(torch.float16).tiny  # an all-zero block, and scales that fp16 could not hold
    scales = torch.where(scales.abs() < tiny, torch.full_like(scales, tiny), scales)
    return scales.squeeze(0) if block is None else scales


def gptq(weight: Tensor, hessian: Tensor, grid: str, block: int | None, scale_dtype: torch.dtype) -> Quantized:
    """Quantise [in, out] row by row with error compensation.

    Args:
        weight: fp32 [in, out].
        hessian: X Xᵀ of the calibration inputs, [in, in], any positive scale.
        block: inputs per scale; a block's scales are taken from its compensated rows when it is reached. None takes
            one scale per output from the weights as they come.
    """
    rows = weight.shape[0]
    work, hessian = weight.clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    typical = 1.0 if dead.all() else float(hessian.diagonal()[~dead].mean())
    hessian[dead, dead] = typical  # an input that never fires constrains nothing
    hessian.diagonal().add_(GPTQ_DAMPING * typical)
    importance = hessian.diagonal().float()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    numbers = GRIDS[grid]
    codes, code = torch.empty_like(work, dtype=numbers.dtype), torch.zeros(weight.shape[1])
    scales = [] if block else [search_scales(weight, grid, importance).to(scale_dtype)]
    step = block or LAZY_ROWS  # even: no pair is cut
    for start in range(0, rows, step):
        end = min(start + step, rows)
        chunk, errors = work[start:end].clone(), torch.empty(end - start, work.shape[1])
        if block:
            scales.append(search_scales(chunk, grid, importance[start:end]).to(scale_dtype))
        scale = scales[-1].float()
        for i in range(end - start):
            row, diagonal = chunk[i], factor[start + i, start + i]
            code = numbers.beside(row / scale, code) if i % 2 else numbers.nearest(row / scale)
            codes[start + i] = code.to(codes.dtype)
            errors[i] = (row - code * scale) / diagonal
            chunk[i + 1 :] -= torch.outer(factor[start + i, start + i + 1 : end], errors[i])
        work[end:] -= factor[start:end, end:].t() @ errors
    return Quantized(codes, torch.stack(scales) if block else scales[0], grid, block)


def search_scales(chunk: Tensor, grid: str, importance: Tensor) -> Tensor:
    """Scales [out] of rows [n, out]: clipping the extremes a little often pays in few bits.

    Args:
        importance: weight of each row's squared error, [n].
    """
    full = block_scales(chunk, grid, None)
    if grid not in SCALE_CHOICES:
        return full
    best, best_error = full, torch.full_like(full, torch.inf)
    for factor in SCALE_CHOICES[grid]:
        scale = full * factor
        rounded = _nearest(chunk / scale, GRIDS[grid]) * scale
        error = ((rounded - chunk).square_() * importance[:, None]).sum(0)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] two to a byte, low nibble first along the last axis, as ONNX stores INT4."""
    nibbles = codes.to(torch.uint8) & 15
    flat = nibbles.flatten()
    assert flat.numel() % 2 == 0, "an even number of codes packs into whole bytes"
    return flat[0::2] | (flat[1::2] << 4)

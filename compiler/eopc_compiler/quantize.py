"""Weight-only symmetric quantisation of deployment-form matrices [in, out], by rounding or error-compensated (GPTQ).

Codes are int8 in memory for both widths; int4 codes lie in [-8, 7] and are packed two to a byte when written. One scale
serves `block` consecutive inputs of one output (DequantizeLinear with block_size along axis 0), or, with block None,
all inputs of one output (per-channel, for opsets below 21).

GPTQ: Frantar et al., arXiv 2210.17323: quantise one input row at a time and spread its rounding error over the rows not
yet quantised, through the inverse Hessian X Xᵀ of the calibration inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_CHOICES = (128, 64, 32)
GPTQ_DAMPING = 0.01  # of the Hessian's mean diagonal, as published
LIMITS = {8: (-127, 127), 4: (-8, 7)}


@dataclass(frozen=True, slots=True)
class Quantized:
    """codes [in, out] int8; scales [in / block, out], or [out] where one scale serves a whole column."""

    codes: Tensor
    scales: Tensor
    bits: int
    block: int | None

    def dequantize(self) -> Tensor:
        """The matrix [in, out] that these codes stand for, fp32."""
        scales = self.scales if self.block is None else self.scales.repeat_interleave(self.block, 0)
        return self.codes.float() * scales.float()


def choose_block(bits: int, widths: set[int]) -> int | None:
    """The largest block that divides every input width; int4 stays at 32, where its error is smallest."""
    choices = (32,) if bits == 4 else BLOCK_CHOICES
    return next((b for b in choices if all(w % b == 0 for w in widths)), None)


def round_to_nearest(weight: Tensor, bits: int, block: int | None, scale_dtype: torch.dtype) -> Quantized:
    """Quantise [in, out] by rounding each element to the nearest code."""
    scales = block_scales(weight, bits, block).to(scale_dtype)
    spread = scales.float() if block is None else scales.float().repeat_interleave(block, 0)
    low, high = LIMITS[bits]
    codes = (weight / spread).round_().clamp_(low, high).to(torch.int8)
    return Quantized(codes, scales, bits, block)


def block_scales(weight: Tensor, bits: int, block: int | None) -> Tensor:
    """Scales [in / block, out] or [out]: the largest magnitude meets the end of the code range.

    For 4 bits the scale takes the sign that puts the extreme element on -8, the longer end of the range.
    """
    blocks = weight.unsqueeze(0) if block is None else weight.view(-1, block, weight.shape[1])
    if bits == 8:
        scales = blocks.abs().amax(1) / 127
    else:
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
        scales = extreme / -8
    tiny = torch.finfo(torch.float16).tiny  # an all-zero block, and scales that fp16 could not hold
    scales = torch.where(scales.abs() < tiny, torch.full_like(scales, tiny), scales)
    return scales.squeeze(0) if block is None else scales


def gptq(weight: Tensor, hessian: Tensor, bits: int, block: int, scale_dtype: torch.dtype) -> Quantized:
    """Quantise [in, out] row by row with error compensation.

    Args:
        weight: fp32 [in, out].
        hessian: X Xᵀ of the calibration inputs, [in, in], any positive scale.
        block: inputs per scale; scales are taken from the compensated rows when their block is reached.
    """
    rows = weight.shape[0]
    work, hessian = weight.clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    typical = 1.0 if dead.all() else float(hessian.diagonal()[~dead].mean())
    hessian[dead, dead] = typical  # an input that never fires constrains nothing
    hessian.diagonal().add_(GPTQ_DAMPING * typical)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    low, high = LIMITS[bits]
    codes = torch.empty_like(work, dtype=torch.int8)
    scales = torch.empty(rows // block, work.shape[1], dtype=scale_dtype)
    for start in range(0, rows, block):
        end = start + block
        chunk, errors = work[start:end].clone(), torch.empty(block, work.shape[1])
        scales[start // block] = block_scales(chunk, bits, block)[0].to(scale_dtype)
        scale = scales[start // block].float()
        for i in range(block):
            row, diagonal = chunk[i], factor[start + i, start + i]
            code = (row / scale).round().clamp(low, high)
            codes[start + i] = code.to(torch.int8)
            errors[i] = (row - code * scale) / diagonal
            chunk[i + 1 :] -= torch.outer(factor[start + i, start + i + 1 : end], errors[i])
        work[end:] -= factor[start:end, end:].t() @ errors
    return Quantized(codes, scales, bits, block)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] two to a byte, low nibble first along the last axis, as ONNX stores INT4."""
    nibbles = codes.to(torch.uint8) & 15
    flat = nibbles.flatten()
    assert flat.numel() % 2 == 0, "an even number of codes packs into whole bytes"
    return flat[0::2] | (flat[1::2] << 4)

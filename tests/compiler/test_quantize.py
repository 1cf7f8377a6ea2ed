"""Rounding, GPTQ and int4 packing: error bounds, what error compensation gains, and the corner cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eopc_compiler.model import Projection
from eopc_compiler.quantize import (
    FP8,
    GRIDS,
    PAIRED,
    InputRounding,
    Quantized,
    block_scales,
    choose_block,
    gptq,
    pack_int4,
    round_inputs,
    round_to_nearest,
    round_tokens,
    static_scale,
    token_peaks,
)

FP16_TINY = torch.finfo(torch.float16).tiny


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix [in, out] whose columns and rows differ in size by up to a few hundred."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator) + torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) * sizes * 0.05


def spread(q: Quantized) -> Tensor:
    """The scale of every element."""
    scales = q.scales.float()
    return (scales if q.block is None else scales.repeat_interleave(q.block, 0)).expand(q.codes.shape)


def correlated_inputs(tokens: int, width: int) -> Tensor:
    """Inputs [tokens, width] that mostly lie in a few directions, as activations do."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(width // 4, width, generator=generator)
    return torch.randn(tokens, width // 4, generator=generator) @ directions + 0.1 * torch.randn(
        tokens, width, generator=generator
    )


@given(st.integers(0, 1000), st.sampled_from([None, 32, 64]), st.sampled_from([torch.float32, torch.float16]))
def test_int8_error_is_at_most_half_a_scale(seed: int, block: int | None, dtype: torch.dtype) -> None:
    """Every element lies within half its scale; fp16 scales move the range's end by 2⁻¹¹ of it at most."""
    weight = random_matrix(64, 6, seed)
    q = round_to_nearest(weight, "int8", block, dtype)
    assert q.codes.dtype == torch.int8 and q.scales.dtype == dtype
    assert q.scales.shape == ((6,) if block is None else (64 // block, 6))
    # 127 codes times the 2⁻¹² by which an fp16 scale may be rounded stays far below half a code
    assert bool(((q.dequantize() - weight).abs() <= 0.5001 * spread(q)).all())


@given(st.integers(0, 1000), st.sampled_from([torch.float32, torch.float16]))
def test_int4_error_is_at_most_half_a_scale_but_for_the_far_end(seed: int, dtype: torch.dtype) -> None:
    """Codes are -8..7: the extreme meets -8, and only values beyond 7.5 scales on the other side lose more."""
    weight = random_matrix(64, 6, seed)
    q = round_to_nearest(weight, "int4", 32, dtype)
    assert int(q.codes.min()) >= -8 and int(q.codes.max()) <= 7
    size = spread(q)
    ratio = weight / size
    error = (q.dequantize() - weight).abs()
    # 8 codes times the 2⁻¹² by which an fp16 scale may be rounded: 0.002 of a scale
    assert bool((error <= torch.where(ratio > 7.5, 1.003, 0.503) * size.abs()).all())
    extreme = weight.view(2, 32, 6).abs().argmax(1, keepdim=True)
    assert bool((q.codes.view(2, 32, 6).gather(1, extreme) == -8).all())


@pytest.mark.parametrize(("grid", "block"), [("int8", None), ("int8", 32), ("int4", 32), (FP8, None)])
def test_values_on_the_grid_come_back_exactly(grid: str, block: int | None) -> None:
    """A matrix that is already codes times scales round-trips without any error."""
    generator = torch.Generator().manual_seed(0)
    low, high, dtype = GRIDS[grid].low, GRIDS[grid].high, GRIDS[grid].dtype
    codes = GRIDS[grid].nearest(low + (high - low) * torch.rand(64, 5, generator=generator)).to(dtype)
    codes[::32] = torch.tensor(low).to(dtype)  # every block reaches its extreme, so that its scale is found again
    scales = 2.0 ** torch.randint(-6, 3, (64 // (block or 64), 5), generator=generator)
    weight = Quantized(codes, scales if block else scales[0], grid, block).dequantize()
    q = round_to_nearest(weight, grid, block, torch.float16)
    assert torch.equal(q.codes.float(), codes.float()) and torch.equal(q.dequantize(), weight)


@pytest.mark.parametrize("grid", ["int8", "int4", FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_blocks_and_columns_stay_zero(grid: str, dtype: torch.dtype) -> None:
    """An all-zero block has codes 0 and a scale that is neither zero nor NaN."""
    weight = random_matrix(64, 4)
    weight[:32], weight[:, 2] = 0, 0
    q = round_to_nearest(weight, grid, 32, dtype)
    assert bool((q.scales != 0).all()) and bool(q.scales.isfinite().all())
    assert bool((q.dequantize()[weight == 0] == 0).all())


@pytest.mark.parametrize("grid", ["int8", "int4", FP8])
def test_scales_below_fp16s_normal_range_are_raised_to_it(grid: str) -> None:
    """Weights too small for an fp16 scale keep an absolute error of half the smallest normal fp16."""
    weight = random_matrix(32, 4) * 1e-6
    q = round_to_nearest(weight, grid, 32, torch.float16)
    assert bool((q.scales.float().abs() >= FP16_TINY).all())
    assert float((q.dequantize() - weight).abs().max()) <= FP16_TINY / 2


def test_smaller_blocks_follow_the_matrix_more_closely() -> None:
    """Error falls from one scale per column to 64 to 32 inputs per scale."""
    weight = random_matrix(128, 8)
    errors = [
        float((round_to_nearest(weight, "int8", b, torch.float32).dequantize() - weight).norm()) for b in (None, 64, 32)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_error_of_an_8_bit_float_is_relative() -> None:
    """Three bits behind the point: within 2⁻⁴ of every value that is not tiny beside its column's largest."""
    weight = random_matrix(256, 6)
    error = (round_to_nearest(weight, FP8, None, torch.float32).dequantize() - weight).abs()
    normal = weight.abs() > weight.abs().amax(0) / 448 * 2**-6  # below lie the subnormals
    assert bool((error <= 2**-4 * 1.0001 * weight.abs())[normal].all())
    assert bool((error[~normal] <= (weight.abs().amax(0) / 448).expand_as(weight)[~normal] * 2**-10 * 1.0001).all())


def test_the_block_divides_every_width() -> None:
    """64 where every input width allows it, 32 for int4, smaller otherwise, none where a width has no such divisor."""
    assert choose_block({256, 128, 192}, "int8") == 64
    assert choose_block({256, 128, 192}, "int4") == 32
    assert choose_block({256, 128, 96}, "int8") == 32
    assert choose_block({64, 48}, "int8") == 16
    assert choose_block({72, 64}, "int8") is None
    assert choose_block({64}, FP8) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_static_scale_serves_99_of_100_tokens(dtype: torch.dtype) -> None:
    """Of tokens with peaks 1..200 the 199th meets code 127, whatever their order; the scale is exact in its type."""
    tokens = torch.zeros(200, 8)
    tokens[:, 3] = -torch.arange(1.0, 201.0)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    scale = static_scale([tokens[:50], tokens[50:]], dtype)
    assert scale * 127 == pytest.approx(199, rel=2.0**-11)  # fp16 may move the scale by that much
    assert float(torch.tensor(scale).to(dtype)) == scale


def test_a_static_scale_of_8_bit_floats_serves_every_token() -> None:
    """The largest input meets the largest float, and what is rounded by it stays within 2⁻⁴."""
    inputs = random_matrix(50, 8) * 10.0
    scale = static_scale([inputs], torch.float32, FP8)
    assert scale * 448 == pytest.approx(float(inputs.abs().max()))
    rounded = round_inputs(inputs, scale, FP8)
    large = inputs.abs() > scale * 2**-6
    assert bool(((rounded - inputs).abs() <= 2**-4 * 1.0001 * inputs.abs())[large].all())


def test_inputs_that_never_fire_get_a_static_scale_above_zero() -> None:
    """All-zero calibration inputs do not make a scale of 0 or NaN."""
    assert static_scale([torch.zeros(5, 8)], torch.float16) > 0


@pytest.mark.parametrize("grid", ["int8", "int4", FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gptq_beats_rounding_on_correlated_inputs(grid: str, dtype: torch.dtype) -> None:
    """On inputs that mostly lie in few directions, compensation leaves less than two thirds of the output error."""
    weight, x = random_matrix(128, 48), correlated_inputs(512, 128)
    want = x @ weight
    compensated = gptq(weight, x.t() @ x, grid, 32, dtype)
    rounded = round_to_nearest(weight, grid, 32, dtype)
    errors = [float((x @ q.dequantize() - want).norm()) for q in (compensated, rounded)]
    assert errors[0] < 0.66 * errors[1]  # 0.2 to 0.3 observed
    assert compensated.codes.shape == weight.shape and compensated.scales.shape == (4, 48)
    assert compensated.scales.dtype == dtype
    codes = compensated.codes.float()
    assert float(codes.min()) >= GRIDS[grid].low and float(codes.max()) <= GRIDS[grid].high


@pytest.mark.parametrize("block", [32, None])
def test_int8_gptq_on_independent_inputs_is_rounding(block: int | None) -> None:
    """With nothing to compensate through (a diagonal Hessian), codes and scales are those of rounding."""
    weight = random_matrix(64, 8)
    compensated = gptq(weight, 3.0 * torch.eye(64), "int8", block, torch.float32)
    rounded = round_to_nearest(weight, "int8", block, torch.float32)
    assert torch.equal(compensated.codes, rounded.codes) and torch.equal(compensated.scales, rounded.scales)


def test_int4_scale_search_never_loses_to_the_full_range() -> None:
    """The searched scale of every column rounds with at most the squared error of the full-range scale."""
    weight = random_matrix(64, 8)
    searched = gptq(weight, 3.0 * torch.eye(64), "int4", 32, torch.float32).dequantize()
    full = round_to_nearest(weight, "int4", 32, torch.float32).dequantize()
    error, bound = ((x - weight).square().view(2, 32, 8).sum(1) for x in (searched, full))
    assert bool((error <= bound * (1 + 1e-6)).all())  # sums of 32 fp32 squares
    assert bool((error < bound).any())


def test_gptq_does_not_depend_on_the_hessians_scale() -> None:
    """Sums or means over tokens, whatever the units of the inputs: same codes, also with inputs that never fire."""
    weight, x = random_matrix(64, 16), correlated_inputs(256, 64)
    x[:, [3, 40]] = 0
    hessian = x.double().t() @ x.double()
    results = [gptq(weight, hessian * factor, "int4", 32, torch.float32) for factor in (1.0, 2.0**-30)]
    assert torch.equal(results[0].codes, results[1].codes)


def test_gptq_survives_inputs_that_never_fire() -> None:
    """Dead inputs, even all of them, give finite codes and leave the given matrix and Hessian unchanged."""
    weight, x = random_matrix(64, 16), correlated_inputs(256, 64)
    x[:, 10:20] = 0
    hessian = x.t() @ x
    before = weight.clone(), hessian.clone()
    assert bool(gptq(weight, hessian, "int4", 32, torch.float32).dequantize().isfinite().all())
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    dead = gptq(weight, torch.zeros(64, 64), "int8", 32, torch.float32)
    assert torch.equal(dead.codes, round_to_nearest(weight, "int8", 32, torch.float32).codes)


def test_gptq_keeps_zero_blocks_zero() -> None:
    """An all-zero matrix stays all zero through compensation."""
    x = correlated_inputs(128, 64)
    assert not bool(gptq(torch.zeros(64, 4), x.t() @ x, "int4", 32, torch.float16).dequantize().any())


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_int4_packing_is_onnxs(codes: list[int]) -> None:
    """Packed bytes are the raw data ONNX writes for the same INT4 values, and unpack to them."""
    onnx = pytest.importorskip("onnx")
    import ml_dtypes

    packed = pack_int4(torch.tensor(codes, dtype=torch.int8)).numpy()
    proto = onnx.numpy_helper.from_array(np.array(codes, dtype=ml_dtypes.int4), "t")
    assert proto.data_type == onnx.TensorProto.INT4
    assert packed.tobytes() == proto.raw_data
    proto.raw_data = packed.tobytes()
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), np.array(codes, dtype=np.int8))


def test_a_matrix_packs_row_by_row() -> None:
    """Nibbles follow C order across rows, low nibble first, also where a row has an odd length."""
    codes = torch.tensor([[1, 2, 3], [-1, -8, 7]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [0x21, 0xF3, 0x78]
    assert pack_int4(codes.t().contiguous().t()).tolist() == [0x21, 0xF3, 0x78]  # memory layout does not matter


def test_an_odd_number_of_codes_is_refused() -> None:
    """Half a byte cannot be written."""
    with pytest.raises(AssertionError, match="even"):
        pack_int4(torch.zeros(3, dtype=torch.int8))


def test_the_sign_of_an_int4_scale_puts_the_extreme_on_the_longer_end() -> None:
    """A block whose extreme is positive gets a negative scale, so that -8 stands for it."""
    weight = torch.tensor([[0.8], [-0.4]]).repeat(16, 1)
    assert block_scales(weight, "int4", 32).item() == pytest.approx(-0.1)
    assert block_scales(-weight, "int4", 32).item() == pytest.approx(0.1)


def correlated() -> tuple[Tensor, Tensor]:
    """Inputs [512, 64] that depend on each other, and a weight [64, 48] with extremes side by side."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(64, 48, generator=generator)
    weight[10:12, :24], weight[20], weight[21] = 4.0, 4.0, -4.0
    return x, weight


@pytest.mark.parametrize("compensated", [True, False], ids=["gptq", "nearest"])
def test_no_two_neighbouring_codes_overflow_sixteen_bits_with_any_inputs(compensated: bool) -> None:
    """Neighbours add up to at most 128 in magnitude, so 255 times each fits; opposite ones use the whole range."""
    x, weight = correlated()
    if compensated:
        codes = gptq(weight, x.t() @ x, PAIRED, None, torch.float32).codes.int()
    else:
        codes = round_to_nearest(weight, PAIRED, None, torch.float32).codes.int()
    first, second = codes[::2], codes[1::2]
    assert int((first + second).abs().max()) <= 128
    largest = 255 * torch.maximum(first.clamp(min=0) + second.clamp(min=0), -(first.clamp(max=0) + second.clamp(max=0)))
    assert int(largest.max()) < 2**15
    assert int((first - second).abs().max()) > 128


def test_scales_leave_room_for_the_largest_pair() -> None:
    """No code of a pair is moved by more than a step: half of it to round, half where both neighbours round up."""
    _, weight = correlated()
    found = round_to_nearest(weight, PAIRED, None, torch.float32)
    assert ((found.dequantize() - weight).abs() / found.scales).max() <= 1 + 1e-5  # fp32 division and product
    sums = found.codes.int()[::2] + found.codes.int()[1::2]
    assert (torch.maximum(found.codes.abs().amax(0), sums.abs().amax(0)) >= 126).all()  # and no more room than that


def test_pairs_cost_less_than_half_the_range_would() -> None:
    """The error of outputs is nearer to that of free int8 codes than to that of codes up to 64."""
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(1024, 256, generator=generator), torch.randn(256, 128, generator=generator)

    def error(found: Quantized) -> float:
        return float((x @ (found.dequantize() - weight)).square().mean())

    free, paired = (gptq(weight, x.t() @ x, grid, None, torch.float32) for grid in ("int8", PAIRED))
    half = replace(free, codes=(free.codes / 2).round().to(torch.int8), scales=free.scales * 2)
    assert error(free) <= error(paired) < (error(free) * error(half)) ** 0.5


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
def test_onnx_runtime_multiplies_paired_codes_exactly_on_this_cpu(rows: int) -> None:
    """Codes at their limit and inputs at theirs, the worst there is: the sums are those of whole numbers."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(rows)
    half = rng.integers(1, 128, (288, 96))
    pairs = np.stack([half, np.minimum(128 - half, 127)], 1) * rng.choice([-1, 1], (288, 1, 96))
    opposite = rng.random((288, 96)) < 0.3
    pairs[:, 0][opposite], pairs[:, 1][opposite] = 127, -127
    codes = pairs.reshape(576, 96).astype(np.int8)
    helper, kept = onnx.helper, onnx.numpy_helper.from_array
    constants = {"w8": codes, "s": np.full(96, 0.5, np.float32), "one": np.float32(1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "one", "zero"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w8", "s"], ["w"], axis=1),
        helper.make_node("MatMul", ["xr", "w"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "product",
        [value("x", onnx.TensorProto.FLOAT, [rows, 576])],
        [value("y", onnx.TensorProto.FLOAT, [rows, 96])],
        [kept(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (np.full((rows, 576), 127), np.full((rows, 576), -128), rng.integers(-128, 128, (rows, 576))):
        (found,) = session.run(None, {"x": x.astype(np.float32)})
        np.testing.assert_array_equal(found, 0.5 * (x @ codes.astype(np.int64)))


def test_a_scale_per_token_rounds_each_on_its_own() -> None:
    """Tokens a thousand times apart keep the same relative error, and one without any input stays zero."""
    x = (
        torch.randn(5, 256, generator=torch.Generator().manual_seed(7))
        * torch.tensor([1e-3, 1.0, 1e3, 7.0, 0.0])[:, None]
    )
    rounded = round_tokens(x)
    assert torch.equal(rounded[4], x[4])
    relative = (rounded - x)[:4].norm(dim=1) / x[:4].norm(dim=1)
    assert float(relative.max()) < 0.012  # steps of peak / 127, the peak being some 3 standard deviations
    codes = rounded / (token_peaks(x) / 127)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert float(codes.abs().max()) <= 127.001


@pytest.mark.parametrize("rounding", ["static", "per token"])
def test_gradients_pass_through_rounded_inputs(rounding: str) -> None:
    """What is fitted by gradients, such as scores of tokens, sees the products as if inputs were not rounded."""
    output = Projection(64, 16, bias=False).fuse()
    generator = torch.Generator().manual_seed(8)
    output.weight = torch.nn.Parameter(torch.randn(64, 16, generator=generator), requires_grad=False)
    output.inputs = InputRounding(scale=0.03 if rounding == "static" else None)
    x = torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        want = output(x)
        assert not torch.equal(want, x @ output.weight)
    leaf = x.clone().requires_grad_()
    found = output(leaf)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    found.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, output.weight.sum(1).expand(3, -1))

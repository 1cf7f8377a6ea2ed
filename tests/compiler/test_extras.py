"""What a tier has of its own: within its bytes, through a file and back, and in its graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from eopc_compiler.assemble import write_weights
from eopc_compiler.calibration import Batch
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.dialects import DIALECTS
from eopc_compiler.export import export_tier
from eopc_compiler.extras import TierExtras, own_matrices, rounding
from eopc_compiler.importance import LayerCurves
from eopc_compiler.ladder import Mask, UnitOrder, full_mask, tier_config
from eopc_compiler.load_tiers import load_tier
from eopc_compiler.model import Llama, causal_mask
from eopc_compiler.quantize import Quantized
from eopc_compiler.storage import Storage
from eopc_compiler.tier_repair import repair_tier
from eopc_compiler.tracing import Target
from eopc_compiler.weights import ALIGNMENT, WeightReader

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]
CONTEXT, PROMPT, NAME = 48, 8, "tiers/t1/extras.bin"
MASK = Mask((LayerDims(0, 4, 128), LayerDims(2, 3, 96)))  # layer 0 stands before a gap, layer 2 was cut
FP32 = Storage.choose("fp32", "float32", DIALECTS["native"], {32, 64, 96, 128}, 3)


def curve(source: int, kv: float, ffn: float) -> LayerCurves:
    """A layer whose every group and parcel of 32 adds the same loss."""
    errors = tuple(kv * i for i in (1, 2, 3)), tuple(ffn * i for i in (1, 2, 3))
    return LayerCurves(LayerDims(source, 4, 128), 32, tuple(range(4)), tuple(range(128)), *errors, 0.5)


CURVES = [curve(0, 0.1, 0.1), curve(1, 0.3, 0.2), curve(2, 0.2, 0.3)]
NARROW = Mask(tuple(LayerDims(i, 3, 96) for i in range(3)))  # adds 0.2, 0.5 and 0.5 nats


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("mask", [MASK, NARROW], ids=["gap", "narrow"])
def test_own_matrices_stay_within_their_share(make_tiny: MakeTiny, mask: Mask, share: float) -> None:
    """Bytes of the chosen matrices are at most the share of the whole model's weights, and no other would fit in."""
    config, _ = make_tiny()
    own = own_matrices(config, [mask], 1, CURVES, FP32, share)
    limit = share * FP32.cost(config, full_mask(config)).weight_bytes
    sizes = {d.source_layer: 4 * 64 * d.intermediate_size for d in mask.layers}
    spent = sum(sizes[s] for s in own)
    assert spent <= limit
    assert all(spent + sizes[s] > limit for s in sizes if s not in own)


def test_layers_before_a_gap_come_first_then_loss_per_byte(make_tiny: MakeTiny) -> None:
    """One matrix: that before the gap, though the cut layer has more loss to repair; without gaps, the dearest."""
    config, _ = make_tiny()
    whole = FP32.cost(config, full_mask(config)).weight_bytes
    assert own_matrices(config, [MASK], 1, CURVES, FP32, 4 * 64 * 128 / whole) == {0}
    dearer = [*CURVES[:2], curve(2, 0.2, 0.4)]
    assert own_matrices(config, [NARROW], 1, dearer, FP32, 4 * 64 * 96 / whole) == {2}


def test_without_a_limit_every_layer_that_lost_something_has_its_own(make_tiny: MakeTiny) -> None:
    """Whole layers without a gap behind them need nothing, however much room there is."""
    config, _ = make_tiny()
    assert own_matrices(config, [NARROW], 1, CURVES, FP32, None) == {0, 1, 2}
    assert own_matrices(config, [full_mask(config)], 1, CURVES, FP32, None) == frozenset()
    assert own_matrices(config, [Mask(full_mask(config).layers[:2])], 1, CURVES, FP32, None) == {1}


def test_tiers_share_their_bytes_alike_and_a_larger_one_gets_what_smaller_ones_leave(make_tiny: MakeTiny) -> None:
    """Room for four matrices and two tiers: two each, or three for the larger one where the smaller needs only one."""
    config, _ = make_tiny()
    room = 4 * 4 * 64 * 96 / FP32.cost(config, full_mask(config)).weight_bytes
    one = Mask(NARROW.layers[:1])
    assert len(own_matrices(config, [NARROW], 2, CURVES, FP32, room)) == 2
    assert len(own_matrices(config, [NARROW, NARROW], 2, CURVES, FP32, room)) == 2
    assert own_matrices(config, [one], 2, CURVES, FP32, room) == {0}
    assert own_matrices(config, [one, NARROW], 2, CURVES, FP32, room) == {0, 1, 2}
    assert len(own_matrices(config, [one, NARROW], 3, CURVES, FP32, room)) == 1  # a third tier is to come


class Written:
    """A repaired tier of the tiny model, with weights.bin and extras.bin in a folder laid out like a bundle."""

    def __init__(
        self,
        root: Path,
        config: LlamaConfig,
        tensors: dict[str, Tensor],
        precision: str,
        own: set[int],
        dialect: str = "native",
    ):
        self.root = root
        self.storage = Storage.choose(precision, "float32", DIALECTS[dialect], {32, 64, 96, 128}, 3)
        order = UnitOrder(tuple(range(4)), tuple(range(128)))
        masks = [full_mask(config), MASK]
        table, _ = write_weights(
            root / "weights.bin", config, tensors.__getitem__, [order] * 3, masks, self.storage, CONTEXT
        )
        whole = load_tier(config, table, WeightReader(root / "weights.bin"), CONTEXT)
        windows = torch.randint(0, 160, (12, 24), generator=torch.Generator().manual_seed(1))
        batches = [Batch(0, 1 / windows.numel(), windows)]
        self.tier, self.repaired = repair_tier(whole, MASK, batches, PROMPT, own, rounding(self.storage))
        folder = root / "tiers/t1"
        folder.mkdir(parents=True)
        TierExtras.write(folder, NAME, self.repaired, self.storage)
        self.extras = TierExtras.read(folder, NAME)
        self.config = self.extras.config(tier_config(config, MASK))
        self.table = table.with_extras(self.extras.table)

    def loaded(self) -> Llama:
        """The tier from its bytes."""
        reader = WeightReader(self.root / "weights.bin", self.extras.files)
        return load_tier(self.config, self.table, reader, CONTEXT)


@pytest.mark.parametrize("own", [{0, 2}, {0}, set[int]()], ids=["both", "one", "biases"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_extras_read_back_as_what_was_repaired(
    make_tiny: MakeTiny, tmp_path: Path, precision: str, own: set[int]
) -> None:
    """The tier loaded from weights.bin and extras.bin is the repaired one, and only what is its own is in the file."""
    config, tensors = make_tiny()
    written = Written(tmp_path, config, tensors, precision, own)
    tokens = torch.arange(20)[None] * 7
    torch.testing.assert_close(written.loaded().score(tokens), written.tier.score(tokens), rtol=1e-4, atol=1e-4)
    names = {f"model.layers.{i}.mlp.down_proj.bias" for i in (0, 2)}
    names |= {f"model.layers.{i}.mlp.down_proj.weight" for i in own}
    assert set(written.extras.table.entries) == names
    assert [d.compensated for d in written.config.layers] == [True, True]
    stored = [r.weight for r in written.repaired if r.weight is not None]
    assert all(isinstance(w, Quantized) == (precision != "fp32") for w in stored)
    weights = sum(w.numel() * 4 if isinstance(w, Tensor) else w.codes.numel() for w in stored)
    scales = sum(w.scales.numel() * 4 for w in stored if isinstance(w, Quantized))
    assert (tmp_path / NAME).stat().st_size <= weights + scales + 2 * 64 * 4 + 6 * ALIGNMENT


def test_a_tier_without_extras_shares_everything(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """None written, none read: no file, the same config, the same table."""
    config, _ = make_tiny()
    TierExtras.write(tmp_path, NAME, (), FP32)
    for extras in (TierExtras.none(), TierExtras.read(tmp_path, NAME)):
        assert extras.files == {} and extras.config(config) == config and not extras.table.entries


def test_rounding_follows_the_storage() -> None:
    """fp32 and fp16 keep values as the type holds them; int8 and int4 round as the shared matrix is."""
    generator = torch.Generator().manual_seed(2)
    weight, rows = torch.randn(64, 32, generator=generator), torch.randn(200, 64, generator=generator)
    covariance = (rows.t() @ rows / 200).double()
    assert torch.equal(torch.as_tensor(rounding(FP32)(0, weight, covariance)), weight)
    half = Storage.choose("fp16", "float16", DIALECTS["native"], {64}, 10)
    assert torch.equal(torch.as_tensor(rounding(half)(0, weight, covariance)), weight.half().float())
    expected = (("int8", 5, "int8"), ("int4", 5, "int4"), ("int4", 0, "int8"))  # edge layers stay int8
    for precision, layer, grid in expected:
        storage = Storage.choose(precision, "float32", DIALECTS["native"], {64}, 10)
        stored = rounding(storage)(layer, weight, covariance)
        assert isinstance(stored, Quantized) and stored.grid == grid
        error = float((stored.dequantize() - weight).norm() / weight.norm())
        assert 0 < error < {"int8": 0.02, "int4": 0.2}[grid]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("dialect", ["native", "primitive"])
def test_the_graph_of_a_tier_with_extras_equals_torch(
    cached_traces: None, make_tiny: MakeTiny, tmp_path: Path, precision: str, dialect: str
) -> None:
    """ONNX Runtime computes from weights.bin and extras.bin what PyTorch does from the same bytes."""
    config, tensors = make_tiny()
    written = Written(tmp_path, config, tensors, precision, {0}, dialect)
    path = tmp_path / "tiers/t1/model.onnx"
    export_tier(written.config, Target(DIALECTS[dialect], "float32", CONTEXT), written.table, path)
    files = {
        e.value
        for t in onnx.load(path, load_external_data=False).graph.initializer
        for e in t.external_data
        if e.key == "location"
    }
    assert files == {"weights.bin", NAME}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    ids = torch.arange(16) * 9
    caches = [np.zeros((1, d.num_key_value_heads, 20, 16), dtype=np.float32) for d in (*MASK.layers, *MASK.layers)]
    feeds = {
        "input_ids": ids[None].numpy(),
        "position_ids": torch.arange(16)[None].numpy(),
        "write_index": np.array([0]),
        "attn_mask": causal_mask(torch.arange(16), 20, torch.float32).numpy(),
        "logits_index": np.arange(16),
        **dict(zip([f"{kind}_cache_{i}" for kind in "kv" for i in range(2)], caches, strict=True)),
    }
    got, want = session.run(["logits"], feeds)[0], written.loaded().score(ids[None]).numpy()
    assert float(np.abs(got - want).max()) < 1e-4 * float(np.abs(want).max())

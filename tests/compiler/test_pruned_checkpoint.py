"""Pruned models on disk: read back exactly by eopc, and by stock transformers where the layers are alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eopc_compiler.checkpoint import open_checkpoint
from eopc_compiler.config import LayerDims, LlamaConfig, RopeScaling, normalize_config
from eopc_compiler.ladder import read_masks
from eopc_compiler.model import build_model
from eopc_compiler.pruned import KeptLayer, PrunedModel, keep_all, slice_model
from eopc_compiler.pruned_checkpoint import config_json, expressible, is_stock, write_checkpoint
from eopc_runtime.errors import ModelError

MakeTiny = Callable[..., tuple[LlamaConfig, dict[str, Tensor]]]

RAGGED = (KeptLayer(0, (1, 3), tuple(range(96))), KeptLayer(2, (0,), tuple(range(5, 69))))
EVEN = tuple(KeptLayer(i, (0, 2), tuple(range(i, i + 96))) for i in range(3))
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def pruned(make_tiny: MakeTiny, kept: tuple[KeptLayer, ...], biased: bool, **changes: Any) -> PrunedModel:
    """A sliced tiny model, with random compensation where asked for."""
    config, tensors = make_tiny(**changes)
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.{k.source_layer}.{n}.bias" for k in kept for n in ("self_attn.o_proj", "mlp.down_proj")]
    bias = {n: torch.randn(config.hidden_size, generator=generator) for n in names} if biased else {}
    return expressible(slice_model(config, tensors.__getitem__, kept, bias))


def assert_reads_back(model: PrunedModel, folder: Path) -> None:
    """Config, names, shapes and values of the folder are the model's, and so is the number of parameters."""
    found = open_checkpoint(str(folder))
    assert found.config == model.config
    assert set(found.tensor_names) == set(model.tensors)
    assert all(torch.equal(found.tensor(n), t) for n, t in model.tensors.items())
    assert sum(t.numel() for t in model.tensors.values()) == model.config.param_count


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 8},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "sliding_window": None},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"bos_token_id": 1, "eos_token_id": [2, 5]},
    ],
)
@pytest.mark.parametrize("kept", [RAGGED, EVEN])
def test_what_is_written_reads_back_exactly(
    make_tiny: MakeTiny, tmp_path: Path, kept: tuple[KeptLayer, ...], changes: dict[str, Any], biased: bool
) -> None:
    """Layers alike or not, every model type and option: same config and tensors bit for bit, same logits."""
    model = pruned(make_tiny, kept, biased, **changes)
    write_checkpoint(model, tmp_path)
    assert_reads_back(model, tmp_path)


@pytest.mark.parametrize("kept", [RAGGED, EVEN])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
def test_the_written_form_computes_what_was_sliced(
    make_tiny: MakeTiny, kept: tuple[KeptLayer, ...], model_type: str
) -> None:
    """Zero biases and the change to llama add nothing: logits are equal bit for bit."""
    config, tensors = make_tiny(model_type=model_type, sliding_window=None)
    bias = {"model.layers.0.mlp.down_proj.bias": torch.ones(64)}
    sliced = slice_model(config, tensors.__getitem__, kept, bias)
    written = expressible(sliced)
    assert written.config.model_type == "llama"
    tokens = torch.arange(20)[None]
    assert torch.equal(written.build(64).score(tokens), sliced.build(64).score(tokens))


def test_a_model_without_compensation_keeps_its_type_and_gets_no_biases(make_tiny: MakeTiny) -> None:
    """The negative twin of the test above."""
    for model_type in ("llama", "qwen2", "mistral"):
        model = pruned(make_tiny, RAGGED, biased=False, model_type=model_type, sliding_window=None)
        assert model.config.model_type == model_type
        assert any(n.endswith("q_proj.bias") for n in model.tensors) == (model_type == "qwen2")
        assert not any(n.endswith(("o_proj.bias", "gate_proj.bias")) for n in model.tensors)


def test_a_sub_block_that_is_left_out_is_a_zero_in_the_list(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """A layer without attention and one without FFN are written, read back, and compute the same."""
    kept = (KeptLayer(0, (), tuple(range(64))), KeptLayer(1, (0, 1), ()), KeptLayer(2, (3,), (7, 9)))
    model = pruned(make_tiny, kept, biased=False)
    write_checkpoint(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["num_key_value_heads"] == [0, 2, 1] and raw["num_attention_heads"] == [0, 4, 2]
    assert raw["intermediate_size"] == [64, 0, 2]
    assert_reads_back(model, tmp_path)
    found = open_checkpoint(str(tmp_path))
    again = build_model(found.config, {n: found.tensor(n) for n in found.tensor_names}, 64)
    tokens = torch.arange(9)[None]
    assert torch.equal(again.score(tokens), model.build(64).score(tokens))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 8},  # no GQA
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "mistral", "sliding_window": None},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    ],
)
def test_transformers_loads_layers_that_are_alike_with_the_same_logits(
    make_tiny: MakeTiny, tmp_path: Path, changes: dict[str, Any], biased: bool
) -> None:
    """Stock from_pretrained, no code of ours: every weight is found and used, logits agree to fp32 rounding."""
    transformers = pytest.importorskip("transformers")
    model = pruned(make_tiny, EVEN, biased, **changes)
    assert is_stock(model.config)
    write_checkpoint(model, tmp_path)
    stock, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kind = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[model.config.model_type]
    assert type(stock).__name__ == f"{kind}ForCausalLM"
    assert sum(p.numel() for p in stock.parameters()) == model.config.param_count
    tokens = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = stock(tokens).logits
    torch.testing.assert_close(model.build(64).score(tokens), expected, rtol=1e-4, atol=1e-4)  # observed 4e-6


def test_transformers_refuses_layers_that_differ(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """The lists are an error there, not a model that computes something else."""
    transformers = pytest.importorskip("transformers")
    model = pruned(make_tiny, RAGGED, biased=False)
    assert not is_stock(model.config)
    write_checkpoint(model, tmp_path)
    with pytest.raises(Exception, match=r"num_attention_heads|intermediate_size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_stock_means_alike_whole_and_dividing(make_tiny: MakeTiny) -> None:
    """Ragged layers, a missing sub-block, and head counts that do not divide hidden_size are not stock."""
    config, _ = make_tiny()  # hidden 64, 2 query heads per group

    def with_dims(*dims: tuple[int, int]) -> LlamaConfig:
        return replace(config, layers=tuple(LayerDims(i, *d) for i, d in enumerate(dims)))

    assert is_stock(with_dims((2, 96), (2, 96)))
    assert not is_stock(with_dims((2, 96), (2, 64)))
    assert not is_stock(with_dims((0, 96), (0, 96)))
    assert not is_stock(with_dims((3, 96), (3, 96)))  # 64 / 6


def test_a_half_precision_file_is_the_rounded_model(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """bfloat16 values are the fp32 ones rounded once, and transformers opens them in that type."""
    transformers = pytest.importorskip("transformers")
    model = pruned(make_tiny, EVEN, biased=True)
    write_checkpoint(model, tmp_path, "bfloat16")
    found = open_checkpoint(str(tmp_path))
    assert all(torch.equal(found.tensor(n), t.bfloat16().float()) for n, t in model.tensors.items())
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert stock.dtype == torch.bfloat16


def test_values_beyond_half_precision_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """1e5 is infinite in fp16; the tensor and a way out are named."""
    model = pruned(make_tiny, EVEN, biased=False)
    model.tensors["model.norm.weight"][3] = 1e5
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*float16.*float32"):
        write_checkpoint(model, tmp_path, "float16")
    write_checkpoint(model, tmp_path, "bfloat16")


def test_mask_json_is_a_mask_that_the_build_command_reads(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """Source layers and original indices come back."""
    model = pruned(make_tiny, RAGGED, biased=False)
    write_checkpoint(model, tmp_path)
    config, _ = make_tiny()
    orders, (mask,) = read_masks([tmp_path / "mask.json"], config, align=1)
    assert mask.layers == (LayerDims(0, 2, 96), LayerDims(2, 1, 64))
    assert orders[2].ffn_channels[:64] == tuple(range(5, 69))


def test_config_json_says_head_dim_and_that_it_is_pruned(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """hidden_size / heads is wrong once heads are gone; stock keys are numbers where layers agree."""
    write_checkpoint(pruned(make_tiny, EVEN, biased=False), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["head_dim"], raw["num_attention_heads"], raw["num_key_value_heads"]) == (16, 4, 2)
    assert raw["intermediate_size"] == 96 and raw["eopc_pruned"] is True
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_a_dense_config_survives_the_way_through_json(make_tiny: MakeTiny) -> None:
    """Linear scaling, several stop tokens, no begin token."""
    config, _ = make_tiny()
    config = replace(config, rope_scaling=RopeScaling("linear", 4.0), bos_token_id=None, eos_token_ids=(7, 0))
    assert normalize_config(json.loads(json.dumps(config_json(config, "float32")))) == config
    assert keep_all(config)[1] == KeptLayer(1, (0, 1, 2, 3), tuple(range(128)))

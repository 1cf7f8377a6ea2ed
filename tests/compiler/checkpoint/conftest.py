"""Tiny checkpoints with random weights and a tokenizer, and the comparison of a checkpoint with its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eopc_compiler.checkpoint import open_checkpoint

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 32, 4, 2, 8, 64, 2, 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def template() -> str:
    """The chat template of `folder`."""
    return TEMPLATE


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """Makes a tiny random transformers model: (kind="Llama", **config)."""
    return make_random_model


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Callable[[], Any]:
    """Makes the tokenizer of `folder`, without a length limit."""
    return make_byte_level_tokenizer


@pytest.fixture(scope="session")
def assert_same_tensors() -> Callable[[Path, Any], None]:
    """Asserts that a checkpoint (path) holds the tensors of a transformers model."""
    return check_same_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tiny LLaMA folder with tokenizer; tests may damage it."""
    path = tmp_path / "tiny"
    make_random_model(tie_word_embeddings=False).save_pretrained(path)
    tokenizer = make_byte_level_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def make_random_model(kind: str = "Llama", **changes: Any) -> Any:
    """A tiny random transformers model of the given class; biases and norms are random too."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1)
    return model


def make_byte_level_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` over the 256 bytes with one merge and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[token] = len(vocab)
    vocab["he"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def check_same_tensors(source: Path, model: Any) -> None:
    """Every tensor of the checkpoint equals the model's bit for bit (fp32 files are copied, not computed)."""
    checkpoint = open_checkpoint(str(source))
    state = model.state_dict()
    if checkpoint.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    assert set(checkpoint.tensor_names) == set(state)
    for name in checkpoint.tensor_names:
        got = checkpoint.tensor(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, state[name]), name
    assert checkpoint.config.param_count == sum(p.numel() for p in model.parameters())

"""A tiny checkpoint with a tokenizer, and a bundle built from it, for tests that run whole commands."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_tiny_checkpoint(folder: Path, **changes: Any) -> Path:
    """Save a random LLaMA of 4 layers (hidden 64, 4 query and 2 KV heads x 16, FFN 192) with a byte-level tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    settings = {
        "vocab_size": 258, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny checkpoint; read only."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """`write_tiny_checkpoint`, for tests in folders that cannot import this file."""
    return write_tiny_checkpoint


@pytest.fixture(scope="session")
def cached_traces() -> Iterator[None]:
    """Graphs of equal tiers are traced once per session: it takes seconds, and does not depend on the weights."""
    from eopc_compiler import export

    taken: dict[Any, Any] = {}
    trace = export.trace

    def once(config: Any, target: Any, chosen: Any = ()) -> Any:
        key = (config, target.dialect.name, target.dtype, target.context, tuple(chosen))
        if key not in taken:
            taken[key] = trace(config, target, chosen)
            gc.freeze()  # the libraries are loaded by now: collections between passes need not look at their objects
        return taken[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", once)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(cached_traces: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 bundle of the tiny checkpoint for the cpu profile: t0 and two pruned tiers; read only."""
    from eopc_compiler.build import build

    output = tmp_path_factory.mktemp("bundle") / "tiny.eopc"
    build(tiny_args(tiny_checkpoint, output))
    return output


@pytest.fixture(scope="session")
def prefill_bundle(cached_traces: None, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tier t1 whose prompts run through 2 of the 4 layers; read only."""
    from eopc_compiler.build import build

    output = tmp_path_factory.mktemp("prefill") / "tiny.eopc"
    build(tiny_args(tiny_checkpoint, output, prefill_depth=2))
    return output


@pytest.fixture(scope="session")
def build_settings(cached_traces: None) -> Callable[..., Any]:
    """`tiny_args`, for tests in folders that cannot import this file."""
    return tiny_args


def tiny_args(checkpoint: Path, output: Path, **changes: Any) -> Any:
    """Settings of a build that takes seconds."""
    from dataclasses import replace

    from eopc_compiler.state import BuildArgs, Workload

    args = BuildArgs(
        model=str(checkpoint),
        device="cpu",
        budgets_j=TINY_BUDGETS_J,
        output=output,
        workload=Workload(32, 32),
        precision=("fp32",),
        context=256,
        search_seconds=0.5,
        prefill_depth="all",
        calibration_windows=2,
        repair_windows=2,
        calibration_length=64,
    )
    return replace(args, **changes)


TINY_BUDGETS_J = (2.0, 0.53, 0.47)  # the dense tiny model needs 0.57 J, the smallest mask 0.42 J

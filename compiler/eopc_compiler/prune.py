"""`prune()`: a structured-pruning method as a tool of its own, from a checkpoint to a smaller checkpoint.

Order of work: what can be refused is refused first, then the calibration text is read, the method chooses, the model is
sliced and written beside its final place. What is measured is the written folder, read back; then it is renamed.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from eopc_compiler.baselines import Method, flap, magnitude, random_units, wanda_sp
from eopc_compiler.cache import PARTIAL, StageCache
from eopc_compiler.calibration import (
    CalibrationSet,
    CalibSelect,
    Domain,
    build_calibration,
    load_calib,
    load_texts,
    read_mixture,
    select_calibration,
)
from eopc_compiler.checkpoint import Checkpoint, open_checkpoint
from eopc_compiler.config import LayerDims, LlamaConfig
from eopc_compiler.model import Llama, build_model
from eopc_compiler.perplexity import WINDOW, cut_text, perplexity
from eopc_compiler.prune_request import (
    PruneRequest,
    Say,
    Units,
    budget,
    check_align,
    choice_share,
    default_align,
    even_counts,
)
from eopc_compiler.pruned import Choice, KeptLayer, PrunedModel, keep_all, slice_model
from eopc_compiler.pruned_checkpoint import DTYPES, expressible, is_stock, write_checkpoint
from eopc_compiler.recover import RECOVERY_TOKENS, RecoverReport, RecoverSettings, recover, training_windows
from eopc_compiler.repairing_methods import iterative, obs, wifv
from eopc_compiler.whole_layers import evop, layers_to_remove, shortgpt, sleb
from eopc_runtime.errors import EopcError, UsageError

LAYER_METHODS: dict[str, Method] = {"evop": evop, "shortgpt": shortgpt, "sleb": sleb}
METHODS: dict[str, Method] = {
    "iterative": iterative,
    "obs": obs,
    "wifv": wifv,
    "flap": flap,
    "wanda-sp": wanda_sp,
    "magnitude": magnitude,
    "random": random_units,
    **LAYER_METHODS,
}
SUB_BLOCK_METHODS = ("evop", "sleb")
SEQUENCE = 256  # tokens per calibration window


@dataclass(frozen=True, slots=True)
class PruneArgs:
    """Everything `eopc prune` can be told; the CLI only parses into it."""

    ratio: float
    output: Path
    model: str | None = None
    method: str = "iterative"
    units: Units = "all"
    sub_blocks: bool = False  # of methods that remove whole layers
    uniform: bool = False
    align: int | None = None  # None: 32 for hidden sizes below 1024, else 64
    calib: tuple[str, ...] = ()
    only_calib: bool = False
    calib_select: CalibSelect = "domains"
    calibration_tokens: int = 16384  # per domain
    steps: int = 5
    seed: int = 0
    recover_minutes: float = 0.0  # of distillation from the dense model
    dtype: str = "float32"
    text: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What was written, and what it is worth."""

    args: PruneArgs
    config: LlamaConfig  # as written
    dense: LlamaConfig
    kept: tuple[KeptLayer, ...]
    perplexity: Mapping[str, Mapping[str, float | None]]  # {text: {dense, pruned}}
    calibration: tuple[tuple[str, int, int], ...]  # (domain, windows, tokens per window); empty if none was read
    align: int
    elapsed_s: float
    recovered: RecoverReport | None = None

    @property
    def ratio_blocks(self) -> float:
        """Share of the parameters in the decoder layers that went, biases that came counted against it."""
        return 1 - self.config.block_param_count / self.dense.block_param_count

    @property
    def stock(self) -> bool:
        """Whether stock transformers loads the folder."""
        return is_stock(self.config)

    def to_json(self) -> dict[str, Any]:
        """The keys of `eopc prune --json`; `kept` gives counts, mask.json the units."""
        args = self.args
        return {
            "output": str(args.output),
            "method": args.method,
            "params": self.config.param_count,
            "params_dense": self.dense.param_count,
            "ratio": args.ratio,
            "ratio_units": choice_share(self.dense, self.kept, args.units),
            "ratio_blocks": self.ratio_blocks,
            "ratio_params": 1 - self.config.param_count / self.dense.param_count,
            "units": args.units,
            "sub_blocks": args.sub_blocks,
            "align": self.align,
            "uniform": args.uniform,
            "stock": self.stock,
            "dtype": args.dtype,
            "kept": [asdict(counts(layer)) for layer in self.kept],
            "perplexity": {name: dict(values) for name, values in self.perplexity.items()},
            "calibration": [{"domain": n, "windows": w, "tokens": t} for n, w, t in self.calibration],
            "recovery": recovery_json(self.recovered, args.recover_minutes) if self.recovered else None,
            "seed": args.seed,
            "elapsed_s": round(self.elapsed_s, 2),
        }


def recovery_json(report: RecoverReport, minutes: float) -> dict[str, Any]:
    """What recovery did: training tokens, and the loss on selection text in nats before and after."""
    losses = {name: {"before": report.before[name], "after": report.after[name]} for name in report.before}
    return {"minutes": minutes, "tokens": report.tokens, "selection_loss": losses}


def prune(args: PruneArgs, say: Say = lambda _text: None, tick: Say = lambda _text: None) -> PruneResult:
    """Prune a checkpoint and write the smaller one.

    Args:
        say: called with one line whenever something new begins.
        tick: called with a count that replaces the one before.

    Raises:
        EopcError: any user mistake; nothing is written then.
    """
    started = time.monotonic()
    method = find_method(args.method)
    check_args(args)
    output = free_output(args.output)
    checkpoint = open_checkpoint(args.model)
    dense, align = checkpoint.config, args.align or default_align(checkpoint.config)
    check_align(dense, align)
    request = PruneRequest(
        args.ratio, args.units, align, args.uniform, args.seed, args.steps, args.sub_blocks, say, tick
    )
    check_reach(args.method, dense, request)
    texts = read_texts(args.text, checkpoint)
    with staged_folder(output) as staged:
        calibration = read_calibration(args, checkpoint, say) if args.ratio else None
        model = load_model(checkpoint, say, tick)
        before = measure(model, texts, "dense", say, tick)
        say(f"{args.method}: choosing what to keep")
        choice = method(model, calibration, request) if calibration else Choice(keep_all(dense))
        pruned = apply_choice(model, choice)
        recovered = None
        if args.recover_minutes and args.ratio:
            pruned, recovered = recover_pruned(args, checkpoint, model, pruned, say)
        if pruned.config.model_type != dense.model_type:
            say(f"written as llama: {dense.model_type} has no place for the biases, and computes the same")
        say(f"writing {pruned.config.param_count / 1e6:.1f} M of {dense.param_count / 1e6:.1f} M parameters")
        checkpoint.save_tokenizer(staged)
        write_checkpoint(pruned, staged, args.dtype)
        del model, pruned  # the written folder is what is measured, and two models in memory are enough
        written = open_checkpoint(str(staged))
        after = measure(load_model(written, say, tick), texts, "pruned", say, tick) if texts else {}
        staged.rename(output)
    return PruneResult(
        args,
        written.config,
        dense,
        choice.kept,
        {name: {"dense": before[name], "pruned": after[name]} for name in texts},
        tuple((n, *map(int, t.shape)) for n, t in calibration.domains) if calibration else (),  # type: ignore[misc]
        align,
        time.monotonic() - started,
        recovered,
    )


def recover_pruned(
    args: PruneArgs, checkpoint: Checkpoint, model: Llama, pruned: PrunedModel, say: Say
) -> tuple[PrunedModel, RecoverReport]:
    """The pruned model distilled from the dense one for some minutes, on all text of the calibration split."""
    domains, tokenizer = mixture(args), checkpoint.tokenizer()
    length = min(SEQUENCE, checkpoint.config.max_position_embeddings)
    text = training_windows(tokenizer, domains, RECOVERY_TOKENS, length, args.seed)
    selection = build_calibration(tokenizer, domains, 8, length, args.seed, "selection", allow_fewer=True).domains
    sources = [layer.source_layer for layer in pruned.kept]
    settings = RecoverSettings(minutes=args.recover_minutes, seed=args.seed)
    report = recover(pruned.build(WINDOW), model, text, selection, settings, sources=sources, report=say)
    return replace(pruned, tensors={**pruned.tensors, **report.tensors}), report


def apply_choice(model: Llama, choice: Choice) -> PrunedModel:
    """The sliced model, in the form that a config.json can describe."""
    return expressible(
        slice_model(model.config, lambda name: model.get_parameter(name).data, choice.kept, choice.changed)
    )


def find_method(name: str) -> Method:
    """The method of this name, or UsageError with the nearest one there is."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Choose from {', '.join(METHODS)}."
    raise UsageError(f"--method {name!r} is not known. {hint}")


def check_args(args: PruneArgs) -> None:
    """Raise UsageError for values that no model can make right."""
    if not 0 <= args.ratio < 1:  # false for not a number, too
        raise UsageError(f"--ratio {args.ratio:g} is no share to remove. Give a number of at least 0 and below 1.")
    if args.units not in get_args(Units):
        raise UsageError(f"--units {args.units!r} is not known. Choose from {', '.join(get_args(Units))}.")
    if args.sub_blocks and args.method not in SUB_BLOCK_METHODS:
        raise UsageError(
            f"--sub-blocks is for --method {' and '.join(SUB_BLOCK_METHODS)}, not {args.method}. Leave it out."
        )
    if args.sub_blocks and args.uniform:
        raise UsageError("--uniform layers all have both sub-blocks. Leave out --sub-blocks or --uniform.")
    if args.dtype not in DTYPES:
        raise UsageError(f"--dtype {args.dtype!r} is not known. Choose from {', '.join(DTYPES)}.")
    if args.only_calib and not args.calib:
        raise UsageError("--only-calib leaves no calibration text. Give some with --calib NAME=FILE.")
    if not 0 <= args.recover_minutes < math.inf:
        raise UsageError(f"--recover {args.recover_minutes:g} is no number of minutes. Give 0 or more.")
    if args.calibration_tokens < 2 or args.steps < 1:
        raise UsageError("--calibration-tokens must be at least 2 and --steps at least 1.")


def check_reach(method: str, config: LlamaConfig, request: PruneRequest) -> None:
    """Raise UsageError for a ratio that the model's units cannot give; minutes before the method would."""
    if method in LAYER_METHODS:
        layers_to_remove(config, request)
    elif request.uniform:
        even_counts(config, replace(request, say=lambda _text: None))  # the method says it again
    else:
        budget(config, request)


def free_output(output: Path) -> Path:
    """Where to write, links followed; UsageError unless it is a new or an empty folder."""
    output = output.expanduser()
    if output.name in ("", ".."):
        raise UsageError(f"-o {output} has no name of its own. Write -o NAME.")
    if output.is_symlink():
        output = output.resolve()
    try:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file; -o names a folder. Choose another name.")
        if output.exists() and any(output.iterdir()):
            raise UsageError(f"{output} is not empty, and nothing is overwritten. Choose another folder with -o.")
    except OSError as error:
        raise UsageError(f"{output} cannot be read: {error.strerror}. Choose another folder with -o.") from error
    return output


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside the output, to fill and rename; whatever is left of it afterwards is removed."""
    try:
        cache = StageCache(output.with_name(f".{output.name}.prune"), resume=False)
        staged = cache.folder / f"{PARTIAL}checkpoint"
        staged.mkdir()
    except OSError as error:
        raise EopcError(
            f"{output} cannot be written: {error.filename}: {error.strerror}. Choose another folder with -o."
        ) from error
    try:
        yield staged
        cache.clear()
    finally:
        cache.close()


def mixture(args: PruneArgs) -> tuple[Domain, ...]:
    """The domains asked for, with or without the built-in ones."""
    return load_calib(args.calib) if args.only_calib else read_mixture(args.calib)


def read_calibration(args: PruneArgs, checkpoint: Checkpoint, say: Say) -> CalibrationSet:
    """Token windows of every domain, from the split that is for calibration."""
    domains = mixture(args)
    length = min(SEQUENCE, checkpoint.config.max_position_embeddings, args.calibration_tokens)
    count = args.calibration_tokens // length
    say(f"reading calibration text: {', '.join(d.name for d in domains)}, {count} x {length} tokens each")
    found = select_calibration(args.calib_select, checkpoint.tokenizer(), domains, count, length, args.seed, say)
    for name, windows in found.domains:
        if args.calib_select == "domains" and len(windows) < count:
            say(f"{name} has only {len(windows)} windows of {length} tokens")
    return found


def read_texts(specs: Sequence[str], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Windows of the texts to measure on; UsageError for a text that does not fill one."""
    length, found = min(WINDOW, checkpoint.config.max_position_embeddings), {}
    for name, text in load_texts(specs).items():
        tokens = checkpoint.tokenizer().encode(text)
        found[name] = cut_text(tokens, length)
        if not len(found[name]):
            raise UsageError(
                f"Text {name!r} has {len(tokens)} tokens, and perplexity needs a window of {length}. Give a longer one."
            )
    return found


def load_model(checkpoint: Checkpoint, say: Say, tick: Say) -> Llama:
    """The eager model in fp32, read tensor by tensor."""
    say(f"reading {checkpoint.config.param_count / 1e6:.1f} M parameters")
    tensors, names = {}, checkpoint.tensor_names
    for i, name in enumerate(names):
        tick(f"reading: {i + 1}/{len(names)} tensors")
        tensors[name] = checkpoint.tensor(name)
    return build_model(checkpoint.config, tensors, max(WINDOW, SEQUENCE))


def measure(model: Llama, texts: Mapping[str, Tensor], what: str, say: Say, tick: Say) -> dict[str, float | None]:
    """Perplexity by text; None where it is too large for a number."""
    found = {}
    for name, windows in texts.items():
        found[name] = perplexity(
            model,
            windows,
            lambda i, n, name=name: tick(f"{what} on {name}: window {i}/{n}"),  # type: ignore[misc]
        )
        say(f"{what} on {name}: perplexity {found[name] or math.inf:.2f}, {len(windows)} x {windows.shape[1]} tokens")
    return found


def counts(layer: KeptLayer) -> LayerDims:
    """How much is kept of a layer."""
    return LayerDims(layer.source_layer, len(layer.kv_groups), len(layer.ffn_channels))

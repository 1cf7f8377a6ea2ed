"""The ONNX Runtime runner: keys and values stay in bound buffers, and grow with the sequence, not with the context.

One tier is one `InferenceSession` over the tier's model.onnx, and one more where single tokens, or prompts, run through
a graph of their own. The cache buffers are bound as input *and* output of the
graph's in-place cache write, so a decode step copies no cache. Their capacity follows the length in steps of
`GROWTH` slots: a step attends over what is used (rounded up), never over the whole context.

Loaded tiers hold their weights packed for the CPU's kernels; ONNX Runtime cannot share packed weights between
sessions: a tier with a graph for single tokens holds them twice. The pool therefore keeps tiers loaded up to a byte
limit (1.4 x the largest tier by default) and lets the least recently used go. Loading a tier again costs a fraction of
a second: the file stays in the page cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eopc_runtime.bundle import Bundle
from eopc_runtime.cpu_features import int8_products_overflow
from eopc_runtime.errors import BundleError, MissingExtraError
from eopc_runtime.jsonfields import shown
from eopc_runtime.memory import left_bytes, release_memory
from eopc_runtime.runners.base import Logits, Wanted, adoption, causal_mask, check_room
from eopc_runtime.runners.fit import require_room
from eopc_runtime.runners.ort_selector import Chosen, Selector, bind_energies
from eopc_runtime.runners.ort_session import check_interface, check_selector, execute
from eopc_runtime.runners.ort_step import StepBinding, bind_weights
from eopc_runtime.tier_info import PASS, TierInfo

GROWTH = 128  # slots a cache grows by; each growth copies the used part once
PREFILL_CHUNK = PASS  # tokens; attention of a chunk reads the cache up to its end only, so causality saves work


@dataclass(slots=True)
class OrtCache:
    """Bound key and value buffers [1, kv_heads, capacity, head_dim], one pair per kept layer."""

    tier: str
    length: int
    capacity: int
    keys: list[Any]  # arrays whose own memory onnxruntime binds; OrtValues on a GPU
    values: list[Any]
    decode_binding: StepBinding | None = None  # reused from step to step while the buffers stay the same
    chosen: Chosen | None = None  # of a tier that chooses weights by its prompt

    @property
    def nbytes(self) -> int:
        return sum(int(buffer.nbytes) for buffer in (*self.keys, *self.values)) + self.chosen_nbytes

    @property
    def chosen_nbytes(self) -> int:
        """Bytes of the weights that were gathered for this sequence."""
        weights = self.chosen.weights.values() if self.chosen else ()
        return sum(int(value.tensor_size_in_bytes()) for value in weights)


class OrtTier:
    """One tier in ONNX Runtime on the CPU."""

    device = "cpu"  # where caches are kept

    def __init__(
        self,
        bundle: Bundle,
        info: TierInfo,
        threads: int | None = None,
        exact: Mapping[str, bytes] | None = None,
        providers: Sequence[str] = (),
        own_steps: bool = True,
    ) -> None:
        """Load a tier.

        Args:
            exact: graphs by path, to run on floating-point activations in place of the tier's own.
            providers: come before the CPU, which is always the last.
            own_steps: run single tokens through the tier's graph for them if it has one, which holds all weights anew.
        """
        ort = import_onnxruntime()
        manifest = bundle.manifest
        level = "1" if exact else "4"  # 8-bit products for weight-only matrices, unless activations are to stay

        def content(path: str) -> bytes:
            return exact[path] if exact and path in exact else bundle.graph(path)

        rounds = rounds_inputs(content(info.graph)) and not providers and manifest.precision != "fp8"
        self.in_floating_point = rounds and not manifest.exact_products and int8_products_overflow()

        def load(path: str, rests: bool = False) -> Any:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            if threads:
                options.intra_op_num_threads = threads
            # graphs name weights.bin relative to the bundle, and ONNX Runtime lets no path leave the folder given here
            root = str(bundle.root.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", root)
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
            if self.in_floating_point:  # exact, but slower and with unpacked weights
                options.add_session_config_entry("session.disable_quant_qdq", "1")
            if rests:  # its threads would wait busily for milliseconds, on the cores of another session's
                options.add_session_config_entry("session.force_spinning_stop", "1")
            try:
                return ort.InferenceSession(content(path), options, providers=[*providers, "CPUExecutionProvider"])
            except Exception as error:  # onnxruntime raises many types; none means anything to a user
                raise BundleError(
                    f"ONNX Runtime {ort.__version__} cannot load {path}: {shown(str(error).strip())} "
                    f"This graph needs opset {manifest.opset}; upgrade onnxruntime or rebuild the bundle."
                ) from error

        self.own_steps = own_steps or info.step is None
        step = info.step if own_steps and not providers and (exact is None or info.step in exact) else None
        one = step or info.graph  # what single tokens run through
        many = info.graph if info.prefill is None else one  # behind a graph for prompts, nearly all are single
        self._session = load(many, rests=many != one)
        check_interface(self._session, manifest, info, many)
        self._step_session = self._session
        if one != many:
            release_memory()  # what loading left behind, before more is loaded
            self._step_session = load(one)
            check_interface(self._step_session, manifest, info, one)
        self._prompt_session: Any = None
        if info.prefill is not None:
            self._prompt_session = load(info.prefill.graph, rests=True)
            check_interface(self._prompt_session, manifest, info, info.prefill.graph)
            self._prompt_outputs = frozenset(x.name for x in self._prompt_session.get_outputs())
        self._selector: Selector | None = None
        if info.selector is not None:
            gather = load(info.selector.graph)
            check_selector(self._step_session, gather, manifest, info)
            self._selector = Selector(gather, self.device)
        release_memory()  # loading leaves unpacked copies behind: on a 135M model 60 to 90 MB of 330
        self._ort = ort
        self.mark = object()  # tells this loading of the tier from another: bindings are of one of them
        self._manifest, self._info = manifest, info
        self.tier, self._layers, self._context = info.tier, info.layers, manifest.context
        self._ladder = {t.tier: t.layers for t in manifest.tiers}
        self._head_dim, self._vocab = manifest.model.head_dim, manifest.model.vocab_size
        self._dtype = np.dtype(manifest.compute_dtype)
        count = len(info.layers)
        self._key_names = [f"k_cache_{i}" for i in range(count)]
        self._value_names = [f"v_cache_{i}" for i in range(count)]

    @property
    def has_prompt_graph(self) -> bool:
        """Whether prompts run through a graph of their own, all tokens but the last."""
        return self._prompt_session is not None

    def new_cache(self) -> OrtCache:
        """An empty cache; buffers are allocated by the first forward."""
        return OrtCache(self.tier, 0, 0, [], [])

    def forward(self, cache: OrtCache, tokens: Sequence[int], *, logits: Wanted = "last") -> Logits:
        """See `TierRunner.forward`."""
        if cache.tier != self.tier:
            raise ValueError(f"a cache of {cache.tier} was given to {self.tier}; adopt() it first")
        check_room(cache.length, len(tokens), self._context)
        if self._selector is not None:
            self._choose(cache, self._selector)
        parts = []
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            last = start + len(chunk) == len(tokens)
            parts.append(self._append(cache, chunk, logits if last or logits == "all" else "none"))
        return parts[-1] if logits != "all" else np.concatenate(parts)

    def prefill(self, cache: OrtCache, tokens: Sequence[int]) -> Logits:
        """See `TierRunner.prefill`."""
        skipping = tokens[:-1] if self.has_prompt_graph else ()
        check_room(cache.length, len(tokens), self._context)
        for start in range(0, len(skipping), PREFILL_CHUNK):
            chunk = skipping[start : start + PREFILL_CHUNK]
            self._reserve(cache, cache.length + len(chunk))
            self._fill(cache, chunk)
        return self.forward(cache, tokens[len(skipping) :])

    def _append(self, cache: OrtCache, tokens: Sequence[int], logits: Wanted) -> Logits:
        count = len(tokens)
        self._reserve(cache, cache.length + count)
        if count == 1 and logits == "last":
            return self._decode(cache, tokens[0])
        return self._run(cache, tokens, logits)

    def _run(self, cache: OrtCache, tokens: Sequence[int], logits: Wanted) -> Logits:
        """Append tokens that the buffers have room for, through buffers bound for this call."""
        last = len(tokens) - 1
        wanted = {"last": [last], "all": range(last + 1), "none": [last]}[logits]
        binding = self._bind(self._session, cache, tokens)
        bind_weights(binding, cache)
        binding.bind_cpu_input("logits_index", np.asarray(wanted, dtype=np.int64))
        binding.bind_output("logits")
        execute(self._session, binding, self.tier)
        cache.length += len(tokens)
        outputs: list[Any] = binding.get_outputs()  # in binding order: logits last
        return outputs[-1].numpy()[0]  # type: ignore[no-any-return]

    def _fill(self, cache: OrtCache, tokens: Sequence[int]) -> None:
        """Append tokens of a prompt that skips the deepest layers."""
        binding = self._bind(self._prompt_session, cache, tokens)
        if self._selector is not None:
            cache.chosen = cache.chosen or self._selector.begin(self._buffer)
            bind_energies(binding, cache.chosen.energies, self._prompt_outputs, self._shared)
        execute(self._prompt_session, binding, self.tier)
        cache.length += len(tokens)

    def _choose(self, cache: OrtCache, selector: Selector) -> None:
        """Gather the weights of this sequence, unless it has them already."""
        cache.chosen = cache.chosen or selector.begin(self._buffer)
        if not cache.chosen.weights:
            selector.choose(cache.chosen, self._shared)

    def _bind(self, session: Any, cache: OrtCache, tokens: Sequence[int]) -> Any:
        """Bind the caches and what every graph reads of tokens that follow them."""
        count = len(tokens)
        binding = session.io_binding()
        self._bind_cache(binding, cache)
        feeds = {
            "input_ids": np.asarray(tokens, dtype=np.int64)[None],
            "position_ids": np.arange(cache.length, cache.length + count, dtype=np.int64)[None],
            "write_index": np.array([cache.length], dtype=np.int64),
            "attn_mask": causal_mask(cache.length, count, cache.capacity, self._dtype),
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        return binding

    def _decode(self, cache: OrtCache, token: int) -> Logits:
        """One token through buffers that are bound once and updated in place."""
        step = cache.decode_binding
        if step is None or step.mark is not self.mark:  # the tier may have been let go and loaded again since
            step = cache.decode_binding = self._bind_step(cache)
        step.ids[0, 0], step.positions[0, 0], step.write[0] = token, cache.length, cache.length
        step.mask[..., : cache.length + 1] = 0.0
        execute(self._step_session, step.binding, self.tier)
        cache.length += 1
        return step.logits[0]  # type: ignore[no-any-return]

    def _bind_step(self, cache: OrtCache) -> StepBinding:
        binding = self._step_session.io_binding()
        self._bind_cache(binding, cache)
        bind_weights(binding, cache)
        mask = causal_mask(cache.length, 1, cache.capacity, self._dtype)
        return StepBinding.create(self.mark, binding, self._ort.OrtValue.ortvalue_from_numpy, mask, self._vocab)

    def adopt(self, cache: OrtCache) -> OrtCache:
        """See `TierRunner.adopt`; copies the kept heads of the kept layers, in use only."""
        if cache.tier == self.tier:
            return cache
        rows = adoption(self._ladder[cache.tier], self._layers)
        fresh = OrtCache(self.tier, cache.length, 0, [], [])
        self._reserve(fresh, cache.length)
        for mine, (theirs, heads) in enumerate(rows):
            for new, old in ((fresh.keys, cache.keys), (fresh.values, cache.values)):
                new[mine][:, :, : cache.length] = old[theirs][:, :heads, : cache.length]
        return fresh

    def _reserve(self, cache: OrtCache, length: int) -> None:
        if length <= cache.capacity:
            return
        capacity = min(-(-length // GROWTH) * GROWTH, self._context)
        require_room(self._manifest, self._info, capacity, left_bytes())
        for buffers in (cache.keys, cache.values):
            grown = []
            for i, layer in enumerate(self._layers):
                array = np.zeros((1, layer.kv_heads, capacity, self._head_dim), dtype=self._dtype)
                if buffers:
                    array[:, :, : cache.length] = self._read(buffers[i])[:, :, : cache.length]
                grown.append(self._buffer(array))
            buffers[:] = grown
        cache.capacity, cache.decode_binding = capacity, None

    def _bind_cache(self, binding: Any, cache: OrtCache) -> None:
        for names, buffers in ((self._key_names, cache.keys), (self._value_names, cache.values)):
            for name, buffer in zip(names, buffers, strict=True):
                value = self._shared(buffer)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(f"{name}_out", value)

    def _buffer(self, array: Any) -> Any:
        """An array as a cache keeps it."""
        return array

    def _read(self, buffer: Any) -> Any:
        """A buffer of a cache as an array."""
        return buffer

    def _shared(self, buffer: Any) -> Any:
        """A cache buffer as an OrtValue on the same memory."""
        return self._ort.OrtValue.ortvalue_from_numpy(buffer)


def rounds_inputs(graph: bytes) -> bool:
    """Whether a serialised graph rounds what its matrices read: it has QuantizeLinear, whose name is in clear."""
    return b"QuantizeLinear" in graph


def import_onnxruntime() -> Any:
    """onnxruntime, imported late.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("running a bundle on the CPU", "onnxruntime", "ort") from error
    return onnxruntime

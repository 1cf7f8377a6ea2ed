"""What is fuzzed: every reader of foreign bytes, with seeds. A target may raise EopcError in time, and nothing else."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eopc_runtime.bundle import Manifest
from eopc_runtime.chat import ChatTemplate, check_messages
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.energy_model.rows import read_measurements
from eopc_runtime.errors import BundleError, EopcError
from eopc_runtime.graph_check import check_graph
from eopc_runtime.jsonfields import parse_json
from eopc_runtime.mask import Mask
from eopc_runtime.power.boards import list_boards
from eopc_runtime.power.tegrastats_log import read_log
from eopc_runtime.sequence_record import read_records
from eopc_runtime.serve.requests import parse_ask, parse_body
from eopc_runtime.signature import Signature
from eopc_runtime.tokenizer import Tokenizer

RULES = [board.rails for board in list_boards()]
LONGEST_S = 5.0  # of one input; all are done in milliseconds on a quiet machine
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "h\u00e9 {{ x }}"}]


@dataclass(frozen=True)
class Target:
    """A reader, what it is known to read, and whether that is JSON."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    is_json: bool = False

    def run(self, data: bytes) -> bool:
        """Read an input: whether it was accepted; anything but EopcError, or too long a time, is raised."""
        start = time.monotonic()
        try:
            self.read(data)
            accepted = True
        except EopcError as error:
            accepted = False
            assert str(error) and "\n" not in str(error), f"not one line: {error!r}"
        assert time.monotonic() - start < LONGEST_S, "it takes too long"
        return accepted


def text_of(data: bytes) -> str:
    """Bytes as a reader of text files would give them."""
    return data.decode("utf-8", errors="replace")


def read_manifest(data: bytes) -> None:
    """A manifest that is accepted survives its own JSON."""
    manifest = Manifest.from_json(parse_json(text_of(data), "manifest.json", BundleError))
    assert Manifest.from_json(manifest.to_json()) == manifest


def read_energy(data: bytes) -> None:
    """An energy table that is accepted prices what a sequence may ask."""
    table = EnergyTable.from_json(parse_json(text_of(data), "energy.json", BundleError))
    for prefill, decode in table.plans()[:20]:
        assert table.plan_price_j(prefill, decode, 128, 140) >= 0
    assert EnergyTable.from_json(table.to_json()) == table


def read_tokenizer(data: bytes) -> None:
    """A tokenizer that is accepted makes ids of a text, or says that it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(data)
        (Path(folder) / "tokenizer_config.json").write_bytes(b"{}" if len(data) % 2 else data)
        tokenizer = Tokenizer.open(folder)
        ids = tokenizer.encode("Hello, w\u00f6rld 123\n")
        tokenizer.decode(ids[:20])


def read_request(data: bytes) -> None:
    """Bodies of both endpoints, as far as the text that would be read."""
    body = parse_body(data)
    ask = parse_ask(body, chat="messages" in body)
    texts = [json.dumps(message) for message in check_messages(ask.messages)] if ask.chat else ask.prompts
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_bytes(seed("tokenizer"))
        tokenizer = Tokenizer.open(folder)
    for text in texts:
        if isinstance(text, str):
            tokenizer.encode(text)


def read_csv(data: bytes) -> None:
    """Rows of measurements."""
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(data)
        file.flush()
        read_measurements(Path(file.name))


def tegrastats(data: bytes) -> None:
    """A power log, by the printed clock and at an interval."""
    lines = text_of(data).splitlines()
    for interval_s in (None, 0.5):
        log = read_log(lines, RULES, interval_s=interval_s)
        assert log.energy_j is None or log.energy_j >= 0


def seed(name: str) -> bytes:
    """A sound record."""
    cost = {
        "layers": 2, "weight_bytes": 4000, "kv_bytes_per_token": 128, "flops_per_token": 2e3, "head_flops": 1e3,
        "attn_flops_per_context": 512, "prefill": None, "gather_bytes": 0,
    }  # fmt: skip
    tiers = [
        {
            "tier": f"t{i}", "budget_j": None, "energy_j": 1.0, "energy_source": "prior", "perplexity": None,
            "perplexity_dense": None, "perplexity_by_domain": {"text": 9.5}, "params": 1000,
            "keep": {"layers": 1, "kv_groups": 1, "ffn": 1},
            "layers": [{"source_layer": n, "kv_heads": 2, "ffn": 64 >> i} for n in range(2)], "cost": cost,
            "graph": f"tiers/t{i}/model.onnx", "mask": f"tiers/t{i}/mask.json", "note": "", "parity": {}, "proxy": {},
            "prefill": None, "selector": None,
        }
        for i in range(2)
    ]  # fmt: skip
    files = ["energy.json", "weights.bin", "tokenizer/tokenizer.json"]
    files += [str(tier[kind]) for tier in tiers for kind in ("graph", "mask")]
    prices = tuple(TierEnergy(f"t{i}", 0.1, 0.01, 0.0, 0.5 - i / 10, 0.001, 0.001, "prior") for i in range(2))
    records: dict[str, object] = {
        "manifest": {
            "schema": 1, "eopc_version": "0.1.0",
            "model": {
                "name": "tiny", "source": "tests", "model_type": "llama", "vocab_size": 258, "hidden_size": 16,
                "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 64, "bos_token_id": None,
                "eos_token_ids": [2],
            },
            "device": "orin", "dialect": "native", "opset": 24, "precision": "int8", "compute_dtype": "float32",
            "workload": {"prompt_tokens": 64, "new_tokens": 16}, "context": 64, "tiers": tiers,
            "files": [{"path": path, "sha256": "00" * 32, "bytes": 8} for path in files], "tools": {"torch": "2"},
            "seed": 0, "calibration": {},
        },
        "energy": EnergyTable("orin", "prior", 0.1, prices).to_json(),
        "mask": {
            "schema": 1, "tier": "t0",
            "layers": [{"source_layer": n, "kv_groups": [1, 0], "ffn_channels": [3, 1, 2]} for n in range(2)],
        },
        "signature": Signature(bytes(32), bytes(64), "{}").to_json(),
        "tokenizer": {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [
                {"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": True}
            ],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            ]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\s+|\\w+"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ]},
            "post_processor": {
                "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
            },
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": "<u>", "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
                "vocab": {"<u>": 0, "a": 1, "l": 2, "ll": 3, "<s>": 4, "o": 5}, "merges": [["l", "l"]],
            },
        },
    }  # fmt: skip
    return json.dumps(records[name]).encode()


TEMPLATES = (
    b"{% for m in messages %}<|{{ m['role'] }}|>\n{{ m.content | trim }}\n{% endfor %}",
    b"{%- set ns = namespace(found=false) -%}{% if messages[0].role == 'system' %}{% set s = messages[0]['content'] %}"
    b"{% endif %}{% macro f(x, n=2) %}{{ x * n }}{% endmacro %}{{ f(s) }}{{ messages | tojson }}"
    b"{{ strftime_now('%d %b %Y') }}{% if not messages %}{{ raise_exception('none') }}{% endif %}",
    b"{{ 'a'.join(['b', 'c']) ~ messages[-1].content[:3] | upper }}{% generation %}x{% endgeneration %}"
    b"{% for x in range(9) %}{% if x > 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
)
BODIES = (
    b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stream": true, '
    b'"stream_options": {"include_usage": true}, "max_completion_tokens": 4, "energy_budget_j": 2.5, "seed": 1, '
    b'"stop": ["a", "b"], "logprobs": true, "top_logprobs": 2, "temperature": 0.5, "top_p": 0.9, "n": 1}',
    b'{"model": "m", "prompt": ["a", "ll"], "max_tokens": 0, "echo": true, "logprobs": 1, "stop": "x", "user": "u"}',
    b'{"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 8, "top_k": 4, "min_p": 0.1, "suffix": null}',
)
LINES = (
    b"11-29-2026 02:30:01 RAM 2448/7620MB (lfb 5x4MB) SWAP 0/3810MB (cached 0MB) CPU [3%@729,off] EMC_FREQ 0%@2133 "
    b"cpu@45.5C VDD_IN 4012mW/4012mW VDD_CPU_GPU_CV 559mW/559mW VDD_SOC 1399mW/1399mW\n",
    b"RAM 1903/3964MB CPU [1%@102] POM_5V_IN 1532/1532 POM_5V_GPU 0/0 POM_5V_CPU 123/123\n",
    b"11-29-2026 02:30:02 RAM 1/2MB "
    b"VDD_GPU_SOC 1500mW/1500mW VDD_CPU_CV 300mW/300mW VIN_SYS_5V0 3000mW/3000mW NC 0mW/0mW\n",
)
# weights.bin of 64 bytes: a model of one external tensor and one node
GRAPH = bytes.fromhex(
    "080a42040a001018"
    "3a3c0a0822064d61744d756c2a3008101001"
    "420177"
    "6a170a086c6f636174696f6e120b776569676874732e62696e"
    "6a0c0a066c656e677468120236347001"
)

TARGETS: dict[str, Target] = {
    "manifest": Target(read_manifest, (seed("manifest"),), is_json=True),
    "energy": Target(read_energy, (seed("energy"),), is_json=True),
    "mask": Target(
        lambda data: Mask.from_json(parse_json(text_of(data), "mask.json", BundleError)), (seed("mask"),), is_json=True
    ),
    "signature": Target(
        lambda data: Signature.from_json(parse_json(text_of(data), "signature.json", BundleError)),
        (seed("signature"),),
        is_json=True,
    ),
    "tokenizer": Target(read_tokenizer, (seed("tokenizer"),), is_json=True),
    "graph": Target(lambda data: check_graph(data, "model.onnx", {"weights.bin": 64}), (GRAPH, b"")),
    "tegrastats": Target(tegrastats, (LINES[0] * 2 + LINES[1], LINES[2] * 3)),
    "template": Target(lambda data: ChatTemplate(text_of(data)).render(MESSAGES), TEMPLATES),
    "request": Target(read_request, BODIES, is_json=True),
    "csv": Target(read_csv, (b"n_in,n_out,energy_j,batch\n16,8,2.5,1\n64,8,3.5,1\n",)),
    "sequences": Target(
        lambda data: read_records(text_of(data).splitlines(keepends=True), "log"),
        (b'{"schema": 1, "kind": "eopc sequence", "engine": "e", "decisions": null}\n',),
    ),
}

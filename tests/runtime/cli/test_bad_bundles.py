"""Bad bundles: files missing, foreign, linked or special, and JSON that is none; graphs are in test_bad_graphs.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from .bad_input import assert_refused, read_record, relist, replace_file

Eopc = Callable[..., Result]
Spoil = Callable[[Path], object]


def change(root: Path, name: str, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file of a bundle, and list it as it is then."""
    record = read_record(root, name)
    edit(record)
    if name == "manifest.json":
        (root / name).write_text(json.dumps(record))
    else:
        replace_file(root, name, json.dumps(record))


def link_out(root: Path, name: str) -> None:
    """Put a symbolic link in place of a file, to the same content outside the bundle."""
    outside = root.parent / "outside"
    (root / name).rename(outside)
    (root / name).symlink_to(outside)


def special(root: Path, name: str) -> None:
    """Put a pipe in place of a file: whoever opens it waits."""
    (root / name).unlink()
    os.mkfifo(root / name)


def path_of(root: Path, path: str) -> None:
    """Let the manifest list a file by this path."""
    change(root, "manifest.json", lambda m: m["files"][0].update(path=path))


LISTED = ("weights.bin", "energy.json", "tiers/t0/model.onnx", "tiers/t1/mask.json", "tokenizer/tokenizer.json")
DEEP = "[" * 100_000 + "]" * 100_000
NOT_JSON = {
    "empty": "",
    "half": '{"schema": 1,',
    "list": "[]",
    "number": "7",
    "deep": DEEP,
    "nan": '{"schema": NaN}',
    "infinity": '{"schema": -Infinity}',
    "twice": '{"schema": 1, "schema": 1}',
    "digits": '{"schema": ' + "9" * 5000 + "}",
    "comment": '{"schema": 1} // what',
    "binary": b"\xff\xfe\x00\x01",
    "nothing but blanks": " " * 1000,
    "many keys": json.dumps({f"key{i}": i for i in range(50_000)}),
    "bom": b"\xef\xbb\xbf{}",
}
PATHS = {
    "up": "../secret",
    "up inside": "tiers/../../secret",
    "absolute": "/etc/passwd",
    "empty": "",
    "dot": ".",
    "backslash": "tiers\\t0",
    "drive": "C:/secret",
    "nul": "weights\0.bin",
    "newline": "weights\n.bin",
    "surrogate": "\ud800",
    "long": "a" * 5000,
    "many parts": "a/" * 3000 + "b",
    "folder": "tiers",
    "escape": "\x1b[31mred",
}
MASKS = {
    "double channel": lambda m: m["layers"][0].update(ffn_channels=[0] * 8),
    "negative channel": lambda m: m["layers"][0].update(ffn_channels=[-1, *range(1, 8)]),
    "other layer": lambda m: m["layers"][1].update(source_layer=7),
    "no layer": lambda m: m.update(layers=[]),
    "order": lambda m: m["layers"].reverse(),
    "fewer channels": lambda m: m["layers"][0].update(ffn_channels=[0]),
    "more groups": lambda m: m["layers"][0].update(kv_groups=[0, 1]),
    "other tier": lambda m: m.update(tier="t1"),
    "newer schema": lambda m: m.update(schema=2),
    "fraction": lambda m: m["layers"][0].update(kv_groups=[0.5]),
}
MANIFESTS = {
    "newer schema": lambda m: m.update(schema=2),
    "no tiers": lambda m: m.update(tiers=[]),
    "tiers swapped": lambda m: m["tiers"].reverse(),
    "tier twice": lambda m: m["tiers"].append(m["tiers"][1]),
    "grows": lambda m: m["tiers"][1]["layers"][0].update(ffn=999),
    "layer out of range": lambda m: m["tiers"][0]["layers"][1].update(source_layer=99),
    "layers out of order": lambda m: m["tiers"][0]["layers"].reverse(),
    "file twice": lambda m: m["files"].append(m["files"][0]),
    "weights not listed": lambda m: m.update(files=[f for f in m["files"] if f["path"] != "weights.bin"]),
    "graph not listed": lambda m: m["tiers"][0].update(graph="tiers/t0/other.onnx"),
    "graph outside": lambda m: m["tiers"][0].update(graph="../../model.onnx"),
    "unknown dialect": lambda m: m.update(dialect="klingon"),
    "unknown precision": lambda m: m.update(precision="int3"),
    "unknown type": lambda m: m.update(compute_dtype="float31"),
    "share above 1": lambda m: m["tiers"][0]["keep"].update(ffn=1.5),
    "negative share": lambda m: m["tiers"][0]["keep"].update(ffn=-0.5),
    "negative joules": lambda m: m["tiers"][0].update(energy_j=-1),
    "no context": lambda m: m.update(context=0),
    "selector without prefill": lambda m: m["tiers"][1].update(
        selector={"graph": "weights.bin", "core": [1, 1], "pool": [3, 3], "chosen": [1, 1]}
    ),
    "prefill too deep": lambda m: m["tiers"][1].update(prefill={"depth": 9, "graph": "weights.bin"}),
    "text is a list": lambda m: m.update(device=["orin"]),
    "hash is a number": lambda m: m["files"][0].update(sha256=7),
    "control characters": lambda m: m.update(dialect="\x1b[2J\n\n" * 1000),
}
ENERGIES = {
    "mixed sources": lambda e: e["tiers"][0].update(source="measured"),
    "unknown source": lambda e: e.update(source="guess"),
    "negative price": lambda e: e["tiers"][0].update(step_j0=-1),
    "infinite price": lambda e: e["tiers"][0].update(step_j0=1e999),
    "negative margin": lambda e: e.update(margin=-0.1),
    "one tier less": lambda e: e["tiers"].pop(),
    "own prompts": lambda e: e.update(own_prompts=["t1"]),
    "modes without names": lambda e: e.update(other_modes=[{**e, "other_modes": []}]),
    "newer schema": lambda e: e.update(schema=99),
    "credit": lambda e: e["tiers"][0].update(uncredited_j=5.0),
}
SPOILS: dict[str, Spoil] = {
    **{f"missing {name}": lambda root, n=name: (root / n).unlink() for name in (*LISTED, "manifest.json")},
    **{f"link {name}": lambda root, n=name: link_out(root, n) for name in (*LISTED, "manifest.json")},
    **{f"pipe {name}": lambda root, n=name: special(root, n) for name in (*LISTED, "manifest.json")},
    **{
        f"longer {name}": lambda root, n=name: (root / n).write_bytes((root / n).read_bytes() + b"x") for name in LISTED
    },
    **{
        f"other {name}": lambda root, n=name: (root / n).write_bytes(b"x" * (root / n).stat().st_size)
        for name in LISTED
    },
    **{f"hard link {name}": lambda root, n=name: os.link(root / n, root.parent / "elsewhere") for name in LISTED},
    **{
        f"manifest is {how}": lambda root, c=content: spoil_text(root, "manifest.json", c)
        for how, content in NOT_JSON.items()
    },
    **{
        f"energy is {how}": lambda root, c=content: spoil_text(root, "energy.json", c)
        for how, content in NOT_JSON.items()
    },
    **{
        f"mask is {how}": lambda root, c=content: spoil_text(root, "tiers/t0/mask.json", c)
        for how, content in NOT_JSON.items()
    },
    **{f"path {how}": lambda root, p=path: path_of(root, p) for how, path in PATHS.items()},
    **{f"mask {how}": lambda root, e=edit: change(root, "tiers/t0/mask.json", e) for how, edit in MASKS.items()},
    **{f"manifest {how}": lambda root, e=edit: change(root, "manifest.json", e) for how, edit in MANIFESTS.items()},
    **{f"energy {how}": lambda root, e=edit: change(root, "energy.json", e) for how, edit in ENERGIES.items()},
    "tokenizer folder is a link out": lambda root: move_out(root),
    "a stranger in the tokenizer's folder": lambda root: (root / "tokenizer/tokenizer_config.json").write_text("{}"),
    "a link in the tokenizer's folder": lambda root: (root / "tokenizer/tokenizer_config.json").symlink_to(
        "/etc/passwd"
    ),
    "manifest too large": lambda root: (root / "manifest.json").write_bytes(b" " * (17 << 20)),
    "a link to itself": lambda root: loop(root),
    "signature is no JSON": lambda root: (root / "signature.json").write_text("{"),
    "signature too short": lambda root: (root / "signature.json").write_text(
        json.dumps({"schema": 1, "algorithm": "ed25519", "key": "AAAA", "signature": "AAAA", "manifest": ""})
    ),
    "signature of another kind": lambda root: (root / "signature.json").write_text(
        json.dumps({"schema": 1, "algorithm": "rsa", "key": "", "signature": "", "manifest": ""})
    ),
    "engines are no JSON": lambda root: engines(root, "{"),
    "engines are a list": lambda root: engines(root, "[]"),
    "engines of a newer schema": lambda root: engines(root, '{"schema": 99, "engines": []}'),
    "engines of no tier": lambda root: engines(root, '{"schema": 1, "engines": [{}]}'),
}


def spoil_text(root: Path, name: str, content: str | bytes) -> None:
    """Put other content into a JSON file."""
    data = content.encode() if isinstance(content, str) else content
    if name == "manifest.json":
        (root / name).write_bytes(data)
    else:
        replace_file(root, name, data)


def move_out(root: Path) -> None:
    """Put a link to a folder outside in place of the tokenizer's."""
    (root / "tokenizer").rename(root.parent / "tokenizer")
    (root / "tokenizer").symlink_to(root.parent / "tokenizer")


def loop(root: Path) -> None:
    """Put a link to itself in place of the weights."""
    (root / "weights.bin").unlink()
    (root / "weights.bin").symlink_to("weights.bin")


def engines(root: Path, text: str) -> None:
    """Add the record of a set of engines."""
    (root / "engines/orin-sm87").mkdir(parents=True)
    (root / "engines/orin-sm87/engines.json").write_text(text)


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_bad_bundle_is_one_sentence(eopc: Eopc, bare_bundle: Path, spoil: Spoil) -> None:
    """`eopc inspect` refuses it, whatever is wrong, and opens nothing outside."""
    spoil(bare_bundle)
    message = assert_refused(lambda: eopc("inspect", bare_bundle))
    assert "root:" not in message  # nothing of /etc/passwd


@pytest.mark.parametrize("place", ["", "nowhere", "a file", "a" * 300, "\udcff"])
def test_what_is_no_bundle_is_one_sentence(eopc: Eopc, tmp_path: Path, place: str) -> None:
    """An empty folder, no folder, a file, and names that no file can have."""
    (tmp_path / "a file").touch()
    assert_refused(lambda: eopc("inspect", tmp_path / place))


TOKENIZERS: dict[str, Callable[[Any], object]] = {
    "no model": lambda t: t.pop("model"),
    "no vocabulary": lambda t: t["model"].pop("vocab"),
    "empty vocabulary": lambda t: t["model"].update(vocab={}),
    "unknown model": lambda t: t["model"].update(type="Oracle"),
    "a cache of exabytes": lambda t: t["model"].update(cache_capacity=10**18),
    "a negative cache": lambda t: t["model"].update(cache_capacity=-1),
    "an id of 10^15": lambda t: t["model"]["vocab"].update(zz=10**15),
    "a negative id": lambda t: t["model"]["vocab"].update(zz=-1),
    "an id that is a text": lambda t: t["model"]["vocab"].update(zz="7"),
    "merges of nothing": lambda t: t["model"].update(merges=[["no", "such"]]),
    "dropout of 7": lambda t: t["model"].update(dropout=7.0),
    "a regular expression without end": lambda t: t.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
    "a choice repeated": lambda t: t.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(?:a|aa)*b"}, "behavior": "Isolated", "invert": False}
    ),
    "half a regular expression": lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "replacements that multiply": lambda t: t.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}] * 8,
        }
    ),
    "a long prefix": lambda t: t.update(normalizer={"type": "Prepend", "prepend": "a" * 100_000}),
    "an empty prefix, which panics": lambda t: t.update(normalizer={"type": "Prepend", "prepend": ""}),
    "a charsmap that panics": lambda t: t.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8AAAAA"}
    ),
    "a charsmap that is none": lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "chunks of nothing, which panic": lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a decoder that panics": lambda t: t.update(decoder={"type": "Strip", "content": "a", "start": 9999, "stop": 9999}),
    "a template without its token": lambda t: t.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[Q]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "many steps": lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 300}),
    "steps in steps": lambda t: t.update(normalizer=nested(300)),
    "an unknown step": lambda t: t.update(normalizer={"type": "Oracle"}),
    "added tokens of another kind": lambda t: t.update(added_tokens={"a": 1}),
    "truncation of another kind": lambda t: t.update(truncation="much"),
}


def nested(depth: int) -> dict[str, Any]:
    """Normalizers in normalizers."""
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


@pytest.mark.parametrize("edit", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_bad_tokenizer_is_one_sentence(eopc: Eopc, bundle: Path, edit: Callable[[Any], object]) -> None:
    """A tokenizer.json that would end, fill or stall the process is refused before a token is made of anything."""
    change(bundle, "tokenizer/tokenizer.json", edit)
    assert "tokenizer" in assert_refused(lambda: eopc("run", bundle, "--prompt", "hi", "--raw"))


FILES_OF_TOKENIZERS = {
    **{f"tokenizer.json: {how}": ("tokenizer/tokenizer.json", content) for how, content in NOT_JSON.items()},
    **{
        f"tokenizer_config.json: {how}": ("tokenizer/tokenizer_config.json", NOT_JSON[how])
        for how in ("empty", "half", "list", "deep", "binary", "twice")
    },
    "chat_template.jinja: binary": ("tokenizer/chat_template.jinja", b"\xff\xfe"),
    "chat_template.jinja: too long": ("tokenizer/chat_template.jinja", b"x" * 1_000_001),
    "chat_template.jinja: far too long": ("tokenizer/chat_template.jinja", b"x" * (5 << 20)),
}


@pytest.mark.parametrize(("name", "content"), FILES_OF_TOKENIZERS.values(), ids=FILES_OF_TOKENIZERS)
def test_a_bad_file_of_the_tokenizer_is_one_sentence(eopc: Eopc, bundle: Path, name: str, content: str | bytes) -> None:
    """Each of its files is refused where it is no JSON, no text or too large."""
    replace_file(bundle, name, content)
    assert_refused(lambda: eopc("run", bundle, "--prompt", "hi"))


TEMPLATES = {
    "endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "lists": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "a text of a gigabyte": "{{ 'x' * 10**9 }}",
    "padding": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "percent format": "{{ '%1000000000d' % 1 }}",
    "brace format": "{{ '{:1000000000}'.format(1) }}",
    "huge power": "{{ 9 ** 999999999 }}",
    "huge range": "{{ range(10**9) | list }}",
    "joined": "{{ (range(99999) | list * 99999) | join(',') }}",
    "indent": "{{ messages | tojson(indent=10**9) }}",
    "strftime": "{{ strftime_now('%Y' * 100000000) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "format attribute": "{{ '{0.__class__}'.format('') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes its input": "{{ messages.append(1) }}",
    "syntax": "{% for %}",
    "half": "{{ 'a",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "no such filter": "{{ 1 | exec }}",
    "no such name": "{{ nothing.at.all }}",
    "division by 0": "{{ 1 // 0 }}",
    "refuses": "{{ raise_exception('no') }}",
    "refuses at length": "{{ raise_exception('no\\n' * 10000) }}",
    "surrogate": "{{ '\\ud800' }}",
    "nothing": "{# nothing #}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_template_is_one_sentence(eopc: Eopc, bundle: Path, template: str) -> None:
    """Endless, huge or prying templates are refused, and the next prompt works."""
    replace_file(bundle, "tokenizer/chat_template.jinja", template)
    message = assert_refused(lambda: eopc("run", bundle, "--prompt", "hi"))
    assert "root:" not in message
    assert eopc("run", bundle, "--prompt", "hi", "--raw", "--max-new-tokens", 2).exit_code == 0


def test_a_relisted_bundle_is_sound(eopc: Eopc, bare_bundle: Path) -> None:
    """The positive twin: what the helpers here write is accepted unless it was spoiled."""
    relist(bare_bundle, read_record(bare_bundle, "manifest.json"))
    change(bare_bundle, "tiers/t0/mask.json", lambda mask: None)
    assert eopc("inspect", bare_bundle).exit_code == 0

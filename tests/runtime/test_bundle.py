"""The bundle: read strictly, checked for damage, and refused with the file and the fix named."""

from __future__ import annotations

import json
import shutil

import pytest

from eopc_runtime.bundle import Bundle, Manifest
from eopc_runtime.bundle_files import FileEntry, file_entry, sha256_file
from eopc_runtime.energy import EnergyTable, TierEnergy
from eopc_runtime.errors import BundleError


def tier_json(i, layers, ffn=64):
    """The manifest record of tier i that keeps these source layers."""
    return {
        "tier": f"t{i}",
        "budget_j": None if i == 0 else 5.0,
        "energy_j": 4.5,
        "energy_source": "prior",
        "perplexity": 21.5,
        "perplexity_dense": None,
        "perplexity_by_domain": {"text": 20, "code": 9.5},
        "params": 1000,
        "keep": {"layers": len(layers) / 3, "kv_groups": 1, "ffn": 0.5},
        "layers": [{"source_layer": layer, "kv_heads": 2, "ffn": ffn} for layer in layers],
        "cost": {
            "layers": len(layers),
            "weight_bytes": 4000,
            "kv_bytes_per_token": 128,
            "flops_per_token": 2e3,
            "head_flops": 1e3,
            "attn_flops_per_context": 512,
            "prefill": None,
            "gather_bytes": 0,
        },
        "graph": f"tiers/t{i}/model.onnx",
        "mask": f"tiers/t{i}/mask.json",
        "note": "",
        "parity": {"max_abs_logit_error": 1e-5},
        "proxy": {"target": "sm86"},
        "prefill": None,
        "selector": None,
        "step": None,
    }


@pytest.fixture
def bundle(tmp_path):
    """A small well-formed bundle of two tiers, as a directory."""
    root = tmp_path / "small.eopc"
    for i in (0, 1):
        (root / f"tiers/t{i}").mkdir(parents=True)
        (root / f"tiers/t{i}/model.onnx").write_bytes(b"graph %d" % i)
        (root / f"tiers/t{i}/mask.json").write_text("{}")
    (root / "tokenizer").mkdir()
    (root / "tokenizer/tokenizer.json").write_text("{}")
    (root / "weights.bin").write_bytes(bytes(range(256)) * 5000)  # more than one chunk of 1 MiB
    tiers = (
        TierEnergy("t0", 0.1, 0.01, 0.0, 0.5, 0.001, 0.001, "prior"),
        TierEnergy("t1", 0.1, 0.01, 0.0, 0.4, 0.001, 0.001, "prior"),
    )
    (root / "energy.json").write_text(json.dumps(EnergyTable("orin", "prior", 0.1, tiers).to_json()))
    names = [
        "weights.bin",
        "energy.json",
        *(f"tiers/t{i}/{f}" for i in (0, 1) for f in ("model.onnx", "mask.json")),
        "tokenizer/tokenizer.json",
    ]
    entries = [file_entry(root, name) for name in names]
    write(
        root,
        {
            "schema": 1,
            "eopc_version": "0.1.0",
            "model": {
                "name": "tiny",
                "source": "tests",
                "model_type": "llama",
                "vocab_size": 100,
                "hidden_size": 16,
                "head_dim": 8,
                "num_hidden_layers": 3,
                "max_position_embeddings": 256,
                "bos_token_id": None,
                "eos_token_ids": [2],
            },
            "device": "orin",
            "dialect": "native",
            "opset": 24,
            "precision": "int8",
            "compute_dtype": "float32",
            "workload": {"prompt_tokens": 64, "new_tokens": 16},
            "context": 256,
            "tiers": [tier_json(0, [0, 1, 2]), tier_json(1, [0, 2], ffn=32)],
            "files": [{"path": e.path, "sha256": e.sha256, "bytes": e.bytes} for e in entries],
            "tools": {"torch": "2.13.0"},
            "seed": 0,
            "calibration": {"text": {"tokens": 4096}},
            "exact_products": False,
        },
    )
    return root


def write(root, manifest):
    """Write manifest.json."""
    (root / "manifest.json").write_text(json.dumps(manifest))


def manifest_of(root):
    """Read manifest.json without any check."""
    return json.loads((root / "manifest.json").read_text())


def refusal(root, **options):
    """Open a bundle that must be refused and return the message, which is short and shows no traceback."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(root, **options)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_a_well_formed_bundle_opens(bundle):
    """Manifest, tiers and prices are there."""
    opened = Bundle.open(str(bundle))
    assert opened.manifest.model.name == "tiny"
    assert opened.tier("t1").layers[1].source_layer == 2
    assert opened.tier_index("t1") == 1
    assert opened.energy.tiers[1].step_j0 == 0.4
    assert opened.path("weights.bin") == bundle / "weights.bin"


def test_a_tier_may_lack_what_older_bundles_have_not(bundle):
    """A manifest from before proxy compiles and pruned prefills opens all the same."""
    manifest = manifest_of(bundle)
    for tier in manifest["tiers"]:
        del tier["proxy"], tier["prefill"], tier["cost"]["prefill"]
    write(bundle, manifest)
    opened = Bundle.open(bundle).manifest.tiers[0]
    assert (opened.proxy, opened.prefill, opened.cost.prefill) == ({}, None, None)


def test_a_manifest_survives_its_json(bundle):
    """Writing and reading gives the same manifest and the same JSON."""
    obj = manifest_of(bundle)
    manifest = Manifest.from_json(obj)
    assert manifest.to_json() == obj
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_sha256_is_the_standard_one(tmp_path):
    """The hash of `abc` as FIPS 180 prints it."""
    (tmp_path / "f").write_bytes(b"abc")
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "f") == want
    assert file_entry(tmp_path, "f") == FileEntry("f", want, 3)


def test_an_unknown_tier_names_the_nearest(bundle):
    """The message lists what exists."""
    with pytest.raises(BundleError, match=r'no tier "t11". It has t0, t1. Did you mean "t1"'):
        Bundle.open(bundle).tier("t11")


def test_what_is_not_a_bundle_is_refused(tmp_path):
    """A missing path, a file and an empty folder each get their own sentence."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "is a file, not a directory" in refusal(tmp_path / "file")
    assert "has no manifest.json" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}", '{"schema": NaN}', "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(bundle, text):
    """Truncated or foreign files do not end in a traceback."""
    (bundle / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(bundle)


def test_a_binary_manifest_is_refused(bundle):
    """Bytes that are no UTF-8 are named as such."""
    (bundle / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("schema"), 'no "schema" number'),
        (lambda m: m.update(schema=2), "written by a newer eopc"),
        (lambda m: m.update(schema="1"), "must be an integer, not a string"),
        (lambda m: m.update(schema=0), "at least 1"),
        (lambda m: m.update(devise="orin"), 'unknown key "devise". Did you mean "device"'),
        (lambda m: m.pop("seed"), '"seed" is missing'),
        (lambda m: m.update(seed=True), "must be an integer, not a boolean"),
        (lambda m: m.update(context=0), "at least 1"),
        (lambda m: m.update(dialect="fancy"), "primitive, native"),
        (lambda m: m.update(precision="int5"), 'Did you mean "int'),
        (
            lambda m: m["model"].update(vocab_sise=3),
            'model: unknown key "vocab_sise". Did you mean "vocab_size"',
        ),
        (lambda m: m["model"].update(eos_token_ids=[2, "x"]), "must hold integers"),
        (lambda m: m["tools"].update(torch=2), '"tools.torch" must be a string'),
        (lambda m: m["tiers"][1].update(energy_j=None), "tiers[1]"),
        (lambda m: m["tiers"][1].update(energy_source="guess"), "measured, calibrated, prior, proxy"),
        (lambda m: m["tiers"][0]["keep"].update(ffn=1.5), "between 0 and 1"),
        (lambda m: m["tiers"][0]["keep"].update(heads=0.5), 'unknown key "heads"'),
        (lambda m: m["tiers"][0]["cost"].pop("head_flops"), '"head_flops" is missing'),
        (lambda m: m["tiers"][0]["perplexity_by_domain"].update(text="low"), "perplexity_by_domain.text"),
        (lambda m: m.update(files={}), '"files" must be a list, not an object'),
        (lambda m: m["files"].append(m["files"][0]), "lists weights.bin twice"),
        (lambda m: m["files"].pop(1), "uses energy.json but does not list it"),
        (lambda m: m["files"].pop(0), "uses weights.bin but does not list it"),  # else it would run unverified
        (lambda m: m["files"].pop(), "uses tokenizer/tokenizer.json but does not list it"),
        (lambda m: m["tiers"][0].update(graph="tiers/t0/modle.onnx"), 'Did you mean "tiers/t0/model.onnx"'),
    ],
)
def test_a_malformed_manifest_is_refused_with_the_reason(bundle, change, says):
    """Unknown, missing and wrong entries are named, with the nearest known name."""
    manifest = manifest_of(bundle)
    change(manifest)
    write(bundle, manifest)
    assert says in refusal(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.reverse(), "where t0 belongs"),
        (lambda t: t.clear(), "no tier"),
        (lambda t: t[1].update(tier="t2"), "t2 where t1 belongs"),
        (lambda t: t[0]["layers"].pop(2), "layer 2 of t1 is not kept by t0"),
        (lambda t: t[1]["layers"][0].update(kv_heads=3), "keeps 3 KV heads"),
        (lambda t: t[1]["layers"][0].update(ffn=65), "65 FFN units, more than t0"),
        (lambda t: t[1]["layers"].reverse(), "rising numbers"),
        (lambda t: t[1]["layers"].clear(), "rising numbers"),
        (lambda t: t[0]["layers"][2].update(source_layer=3), "below 3"),
    ],
)
def test_a_ladder_that_does_not_nest_is_refused(bundle, change, says):
    """A cache of the tier above would not be valid, so the ladder is not one."""
    manifest = manifest_of(bundle)
    change(manifest["tiers"])
    write(bundle, manifest)
    assert says in refusal(bundle)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../other", "tiers/../../other", "", ".", "C:/x", "a\\..\\b", "//host/x", "a\0b"]
)
def test_a_path_that_leaves_the_bundle_is_refused(bundle, path):
    """Absolute, climbing and foreign paths are never opened."""
    manifest = manifest_of(bundle)
    manifest["files"].append({"path": path, "sha256": "0" * 64, "bytes": 0})
    write(bundle, manifest)
    assert "not inside the bundle" in refusal(bundle)
    with pytest.raises(BundleError, match="not inside the bundle"):
        file_entry(bundle, path)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    """A link may not lead to a file elsewhere, even with the right content."""
    shutil.move(bundle / "weights.bin", tmp_path / "weights.bin")
    (bundle / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert "weights.bin is a link that leads out of the bundle" in refusal(bundle)


def test_a_link_to_itself_is_refused(bundle):
    """A circle of links ends in a sentence, not in a traceback."""
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to("weights.bin")
    assert "weights.bin" in refusal(bundle)


def test_a_link_within_the_bundle_and_a_linked_bundle_open(bundle, tmp_path):
    """Links that stay inside are fine, and so is a link to the whole bundle."""
    shutil.move(bundle / "weights.bin", bundle / "shared.bin")
    (bundle / "weights.bin").symlink_to("shared.bin")
    (tmp_path / "latest").symlink_to(bundle)
    assert Bundle.open(tmp_path / "latest").tier("t0").tier == "t0"


def test_a_missing_file_is_named(bundle):
    """The message says which file and to copy or rebuild."""
    (bundle / "tiers/t1/model.onnx").unlink()
    message = refusal(bundle)
    assert "tiers/t1/model.onnx is missing" in message
    assert "Copy the bundle again, or rebuild it" in message


def test_a_truncated_file_is_named_with_both_sizes(bundle):
    """A broken copy is found without hashing."""
    (bundle / "weights.bin").write_bytes(b"short")
    message = refusal(bundle, verify=False)
    assert "weights.bin has 5 bytes, but the manifest says 1280000" in message
    assert "Copy it again, or rebuild it" in message


def test_a_flipped_bit_is_found_by_its_hash(bundle):
    """The same size with other bytes is damage; without `verify` it is not looked for."""
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[-1] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    assert "weights.bin does not match its sha256" in refusal(bundle)
    assert Bundle.open(bundle, verify=False).manifest.seed == 0


def test_prices_for_other_tiers_are_refused(bundle):
    """energy.json and the manifest describe one ladder."""
    energy = json.loads((bundle / "energy.json").read_text())
    energy["tiers"].pop()
    (bundle / "energy.json").write_text(json.dumps(energy))
    manifest = manifest_of(bundle)
    entry = file_entry(bundle, "energy.json")
    manifest["files"][1] = {"path": entry.path, "sha256": entry.sha256, "bytes": entry.bytes}
    write(bundle, manifest)
    assert "energy.json prices t0, but the manifest has t0, t1" in refusal(bundle)


def test_files_the_manifest_does_not_list_are_left_alone(bundle):
    """Engines built on the board may lie beside the rest."""
    (bundle / "engines").mkdir()
    (bundle / "engines/t0.plan").write_bytes(b"x")
    assert Bundle.open(bundle).manifest.device == "orin"

"""Signatures: what was signed verifies; unsigned, changed and foreign bundles are refused, each with its sentence."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eopc_runtime.bundle import Bundle
from eopc_runtime.calibration.publish import publish
from eopc_runtime.errors import BundleError, SignatureError, UsageError
from eopc_runtime.signature import generate_key, read_signature, sign, verify

from .conftest import vars_of, write_bundle

pytest.importorskip("cryptography")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; the public one is beside it."""
    generate_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> Path:
    """Its public key."""
    return key.with_name("key.pub")


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Path:
    """A signed bundle."""
    root = tmp_path / "small.eopc"
    write_bundle(root)
    sign(root, key)
    return root


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Edit a JSON file."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_a_signed_bundle_verifies(signed: Path, public: Path) -> None:
    """With the signer's public key, and nothing of it is the device's own."""
    found = verify(signed, public)
    signature = read_signature(signed)
    assert signature is not None and found.fingerprint == signature.fingerprint
    assert (found.own_prices, found.own_engines) == (False, False)


def test_openssl_agrees(signed: Path, public: Path, tmp_path: Path) -> None:
    """The signature is plain Ed25519 of the manifest's bytes, so other tools can check it."""
    signature = read_signature(signed)
    assert signature is not None
    (tmp_path / "sig").write_bytes(signature.signature)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    try:
        done = subprocess.run(
            [*command, "-in", str(signed / "manifest.json"), "-sigfile", str(tmp_path / "sig")],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    if "rawin" in done.stderr:
        pytest.skip("this openssl cannot verify Ed25519")
    assert done.returncode == 0, done.stderr


def test_a_private_key_is_its_owners_alone_and_never_overwritten(key: Path) -> None:
    """Mode 600, and a second key does not replace the first."""
    content = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists already"):
        generate_key(key)
    assert key.read_bytes() == content


def test_an_existing_public_key_leaves_no_half_pair(tmp_path: Path) -> None:
    """Either both files are written or none."""
    (tmp_path / "new.pub").write_text("old")
    with pytest.raises(UsageError, match=r"new\.pub exists already"):
        generate_key(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unsigned_bundle_is_refused(tmp_path: Path, public: Path) -> None:
    """It says so, and how to sign."""
    write_bundle(tmp_path / "plain.eopc")
    with pytest.raises(SignatureError, match=r"plain\.eopc is not signed.*eopc sign"):
        verify(tmp_path / "plain.eopc", public)


def test_another_key_is_refused_by_name(signed: Path, tmp_path: Path) -> None:
    """Both fingerprints are in the message."""
    other = generate_key(tmp_path / "other")
    with pytest.raises(SignatureError, match=f"signed with another key: .*{other}"):
        verify(signed, tmp_path / "other.pub")


def test_a_changed_file_is_refused(signed: Path, public: Path) -> None:
    """Its hash in the signed manifest does not fit."""
    (signed / "weights.bin").write_text("weights.bix")
    with pytest.raises(BundleError, match=r"weights\.bin does not match its sha256"):
        verify(signed, public)


def test_a_changed_file_with_its_manifest_is_refused(signed: Path, public: Path) -> None:
    """Whoever changes a file can change its hash, but not sign that."""
    (signed / "weights.bin").write_text("weights.bix")
    from eopc_runtime.bundle_files import file_entry

    entry = vars_of(file_entry(signed, "weights.bin"))
    edit(signed / "manifest.json", lambda m: m.update(files=[entry, *m["files"][1:]]))  # type: ignore[index]
    for allow_own in (False, True):
        with pytest.raises(SignatureError, match=r"is not what was signed: manifest\.json was changed"):
            verify(signed, public, allow_own)


def test_a_changed_signature_is_refused(signed: Path, public: Path) -> None:
    """The manifest inside it is the one that was signed, or nothing is verified."""
    edit(signed / "signature.json", lambda s: s.update(manifest=s["manifest"] + " "))  # type: ignore[operator]
    with pytest.raises(SignatureError, match=r"signature\.json was changed"):
        verify(signed, public)


def test_prices_of_the_device_are_refused_unless_allowed(signed: Path, public: Path) -> None:
    """`eopc calibrate` changes prices and their hash; all else is still what was signed."""
    bundle = Bundle.open(signed)
    publish(bundle, replace(bundle.energy, margin=0.25))
    with pytest.raises(SignatureError, match="has prices that were made after it was signed"):
        verify(signed, public)
    assert verify(signed, public, allow_own=True).own_prices


def test_engines_of_the_device_are_refused_unless_allowed(signed: Path, public: Path) -> None:
    """A plan is a program that no manifest lists."""
    (signed / "engines/orin-sm87").mkdir(parents=True)
    (signed / "engines/orin-sm87/t0.plan").write_bytes(b"a program")
    with pytest.raises(SignatureError, match="has engines that were made after"):
        verify(signed, public)
    assert verify(signed, public, allow_own=True).own_engines


def test_a_damaged_bundle_is_not_signed(tmp_path: Path, key: Path) -> None:
    """Nobody vouches for what they have not got."""
    write_bundle(tmp_path / "small.eopc")
    (tmp_path / "small.eopc/weights.bin").write_text("weights.bix")
    with pytest.raises(BundleError, match="does not match its sha256"):
        sign(tmp_path / "small.eopc", key)
    assert read_signature(tmp_path / "small.eopc") is None


def test_keys_of_the_wrong_half_are_refused(signed: Path, key: Path, public: Path) -> None:
    """Signing needs the private key, verifying the public one."""
    with pytest.raises(UsageError, match="no private Ed25519 key"):
        sign(signed, public)
    with pytest.raises(UsageError, match="no public Ed25519 key"):
        verify(signed, key)

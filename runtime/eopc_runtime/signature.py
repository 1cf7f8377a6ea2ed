"""Signatures of bundles: who vouches for the manifest, and through its hashes for every file it lists.

    BUNDLE/signature.json   schema 1: the manifest as it was signed, an Ed25519 signature of its bytes, the public key

A bundle changes on its device, rightly: `eopc calibrate` puts measured prices into energy.json and the manifest, and
`eopc engine` adds plans that no manifest lists. So the signed manifest travels inside the signature. What is verified
then is that everything else is as signed; that prices or engines are the device's own has to be allowed by name, since
prices decide whether a budget holds, and a plan is a program.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eopc_runtime.bundle import ENERGY_NAME, Bundle, Manifest
from eopc_runtime.bundle_files import MANIFEST_NAME, inside
from eopc_runtime.engines import ENGINES_FOLDER
from eopc_runtime.errors import BundleError, MissingExtraError, SignatureError, UsageError
from eopc_runtime.files import write_new, write_whole
from eopc_runtime.jsonfields import MAX_JSON_BYTES, Fields, parse_json, read_json, read_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE_SCHEMA = 1
SIGNATURE_NAME = "signature.json"
ALGORITHM = "ed25519"
PUBLIC_SUFFIX = ".pub"
_MAX_KEY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Signature:
    """The content of signature.json; nothing in it is verified by reading it."""

    key: bytes  # public, 32 bytes
    signature: bytes  # 64 bytes
    manifest: str  # as it was signed

    @property
    def fingerprint(self) -> str:
        """A short name of the key."""
        return key_fingerprint(self.key)

    @classmethod
    def from_json(cls, obj: object) -> Signature:
        """Read a signature strictly; SignatureError on unknown keys, wrong types or a newer schema."""
        fields = Fields(obj, SIGNATURE_NAME, SignatureError)
        if (schema := fields.integer("schema", minimum=1)) > SIGNATURE_SCHEMA:
            fields.fail(f"schema {schema} was written by a newer eopc (this one reads {SIGNATURE_SCHEMA}); upgrade it.")
        fields.text("algorithm", choices=[ALGORITHM])
        found = cls(_bytes(fields, "key", 32), _bytes(fields, "signature", 64), fields.text("manifest"))
        fields.done()
        return found

    def to_json(self) -> dict[str, object]:
        """Return the content of signature.json."""
        return {
            "schema": SIGNATURE_SCHEMA,
            "algorithm": ALGORITHM,
            "key": base64.b64encode(self.key).decode(),
            "signature": base64.b64encode(self.signature).decode(),
            "manifest": self.manifest,
        }


@dataclass(frozen=True, slots=True)
class Verified:
    """A bundle whose signature holds, and what of it the signature does not cover."""

    fingerprint: str
    own_prices: bool  # prices were changed since, as `eopc calibrate` does
    own_engines: bool  # engines were added since


def read_signature(root: Path) -> Signature | None:
    """Return the signature of a bundle, unverified; None where there is none, SignatureError for a malformed one."""
    path = inside(root, SIGNATURE_NAME)
    if not path.is_file():
        return None
    return Signature.from_json(read_json(path, SIGNATURE_NAME, SignatureError, 2 * MAX_JSON_BYTES))


def sign(root: Path, key_file: Path) -> Signature:
    """Sign a bundle's manifest with a private key, and write the signature into the bundle.

    Raises:
        BundleError: the bundle is damaged; nothing is signed then.
        UsageError: the file holds no private Ed25519 key.
    """
    key = _private_key(key_file)
    Bundle.open(root)
    text = _manifest_text(root)
    found = Signature(key.public_key().public_bytes_raw(), key.sign(text.encode()), text)
    write_whole(root / SIGNATURE_NAME, (json.dumps(found.to_json(), indent=1) + "\n").encode())
    return found


def verify(root: Path, key_file: Path, allow_own: bool = False) -> Verified:
    """Check that a bundle is as it was signed with a key.

    Args:
        key_file: the public key.
        allow_own: accept prices and engines that were made after signing, as on the device.

    Raises:
        SignatureError: the bundle is not signed, by another key, or was changed.
        BundleError: a file differs from the manifest.
        UsageError: the file holds no public Ed25519 key.
    """
    key = _public_key(key_file)
    from cryptography.exceptions import InvalidSignature

    bundle = Bundle.open(root)
    found = read_signature(root)
    if found is None:
        raise SignatureError(f"{root} is not signed. Whoever built it can sign it: eopc sign {root} --key FILE")
    if found.key != (raw := key.public_bytes_raw()):
        raise SignatureError(
            f"{root} was signed with another key: {found.fingerprint}, while {key_file} is {key_fingerprint(raw)}. "
            "Verify with the signer's key, or do not use the bundle."
        )
    try:
        key.verify(found.signature, found.manifest.encode())
    except InvalidSignature:
        raise SignatureError(
            f"the signature of {root} does not fit what it claims to sign: {SIGNATURE_NAME} was changed. Get the "
            "bundle again from where it was signed."
        ) from None
    own_prices = _manifest_text(root) != found.manifest
    if own_prices and not _differ_in_prices_only(bundle.manifest, found.manifest):
        raise SignatureError(
            f"{root} is not what was signed: {MANIFEST_NAME} was changed afterwards. Get the bundle again from where "
            "it was signed."
        )
    own_engines = any((root / ENGINES_FOLDER).glob("*"))
    if not allow_own and (own_prices or own_engines):
        what = " and ".join(name for name, own in (("prices", own_prices), ("engines", own_engines)) if own)
        raise SignatureError(
            f"{root} has {what} that were made after it was signed; all else is as signed. If they are this device's "
            "own, add --allow-own."
        )
    return Verified(found.fingerprint, own_prices, own_engines)


def generate_key(path: Path) -> str:
    """Write a new private key, readable by its owner alone, and its public key beside it as PATH.pub.

    Returns:
        The key's fingerprint.

    Raises:
        UsageError: one of the files exists.
    """
    ed25519, serialization = _import_cryptography()
    key: Ed25519PrivateKey = ed25519.Ed25519PrivateKey.generate()
    public = key.public_key()
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_new(path, private, 0o600)
    try:
        public_pem = public.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        write_new(path.with_name(path.name + PUBLIC_SUFFIX), public_pem, 0o644)
    except BaseException:
        path.unlink()  # it was written a moment ago, here
        raise
    return key_fingerprint(public.public_bytes_raw())


def key_fingerprint(key: bytes) -> str:
    """A short name of a public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key).hexdigest()[:16]


def _differ_in_prices_only(now: Manifest, signed_text: str) -> bool:
    """Whether a manifest is the signed one but for the entry of energy.json and the tiers' joules."""
    try:
        signed = Manifest.from_json(parse_json(signed_text, SIGNATURE_NAME, BundleError))
    except BundleError:  # of a schema this eopc does not read
        return False
    return _without_prices(now) == _without_prices(signed)


def _without_prices(manifest: Manifest) -> Manifest:
    tiers = tuple(replace(tier, energy_j=0.0, energy_source="prior") for tier in manifest.tiers)
    return replace(manifest, tiers=tiers, files=tuple(f for f in manifest.files if f.path != ENERGY_NAME))


def _manifest_text(root: Path) -> str:
    return read_text(inside(root, MANIFEST_NAME), MANIFEST_NAME, BundleError, MAX_JSON_BYTES)


def _private_key(path: Path) -> Ed25519PrivateKey:
    ed25519, serialization = _import_cryptography()
    content = _key_bytes(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):  # no PEM of a private key; or encrypted
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise UsageError(
            f"{path} holds no private Ed25519 key without a password, in PEM. Make one: eopc keygen FILE, or "
            "openssl genpkey -algorithm ed25519."
        )
    checked: Ed25519PrivateKey = key
    return checked


def _public_key(path: Path) -> Ed25519PublicKey:
    ed25519, serialization = _import_cryptography()
    content = _key_bytes(path)
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError:
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(
            f"{path} holds no public Ed25519 key in PEM. Give the {PUBLIC_SUFFIX} file of the signer's key."
        )
    checked: Ed25519PublicKey = key
    return checked


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read ({error.strerror}).") from None


def _import_cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("signing a bundle", "cryptography", "sign") from error
    return ed25519, serialization


def _bytes(fields: Fields, key: str, size: int) -> bytes:
    """A field of so many bytes in base64."""
    try:
        value = base64.b64decode(fields.text(key), validate=True)
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != size:
        fields.fail(f'"{key}" must be {size} bytes in base64. Get the bundle again from where it was signed.')
    return value

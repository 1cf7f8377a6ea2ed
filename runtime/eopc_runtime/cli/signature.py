"""`eopc keygen`, `eopc sign` and `eopc verify`: who vouches for a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from eopc_runtime.cli.output import print_json


@click.command()
@click.argument("key", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def keygen(key: Path, as_json: bool) -> None:
    """Write a new private key to KEY, and its public key to KEY.pub.

    Keep KEY where bundles are built, and give KEY.pub to whoever verifies them. Both are Ed25519 in PEM.
    """
    from eopc_runtime.signature import PUBLIC_SUFFIX, generate_key

    fingerprint = generate_key(key)
    if as_json:
        print_json({"key": str(key), "public_key": f"{key}{PUBLIC_SUFFIX}", "fingerprint": fingerprint})
    else:
        click.echo(f"{key} and {key}{PUBLIC_SUFFIX}: key {fingerprint}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The private key, PEM.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign BUNDLE: its manifest, and so every file the manifest lists.

    The signature is signature.json in the bundle. A bundle is verified before it is signed; sign it again after it was
    calibrated where the new prices are to be vouched for too.
    """
    from eopc_runtime.signature import SIGNATURE_NAME
    from eopc_runtime.signature import sign as sign_bundle

    fingerprint = sign_bundle(bundle, key).fingerprint
    if as_json:
        print_json({"bundle": str(bundle), "signature": str(bundle / SIGNATURE_NAME), "fingerprint": fingerprint})
    else:
        click.echo(f"{bundle} is signed with key {fingerprint}.")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The public key, PEM.")
@click.option(
    "--allow-own",
    is_flag=True,
    help="Accept prices and engines made after signing, as eopc calibrate and eopc engine make them on the device.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(bundle: Path, key: Path, allow_own: bool, as_json: bool) -> None:
    """Check that BUNDLE is what the owner of a key signed.

    Exits with 1 and the reason when it is not signed, signed by another key, or was changed.
    """
    from eopc_runtime.signature import verify as verify_bundle

    found = verify_bundle(bundle, key, allow_own)
    if as_json:
        print_json({"bundle": str(bundle), "ok": True, **asdict(found)})
        return
    own = [name for name, made in (("prices", found.own_prices), ("engines", found.own_engines)) if made]
    but = f", but for {' and '.join(own)} made after signing" if own else ""
    click.echo(f"{bundle} is as it was signed with key {found.fingerprint}{but}.")

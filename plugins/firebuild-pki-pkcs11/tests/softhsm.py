"""Real tokens: SoftHSM's, in a directory of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pkcs11
from pkcs11 import Attribute, KeyType
from pkcs11.util.ec import encode_named_curve_parameters

MODULE = next(
    (
        path
        for path in ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so")
        if Path(path).exists()
    ),
    "",
)
PIN = "pin-of-the-token-8391"
CURVES = {"p256": "secp256r1", "p384": "secp384r1"}


def make_tokens(directory: Path) -> None:
    """Make two tokens, `ca` with a key of each kind and `spare` with one; for this process from now on."""
    store = directory / "tokens"
    store.mkdir()
    configuration = directory / "softhsm2.conf"
    configuration.write_text(
        f"directories.tokendir = {store}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    os.environ["SOFTHSM2_CONF"] = str(configuration)  # read by the module when it is loaded
    program = shutil.which("softhsm2-util")
    assert program is not None
    for label in ("ca", "spare"):
        command = [program, "--init-token", "--free", "--label", label, "--so-pin", "12345678", "--pin", PIN]
        subprocess.run(command, check=True, capture_output=True)
    for number, kind in enumerate(("p256", "p384", "rsa2048"), start=1):
        _make_key("ca", kind, number)
    _make_key("spare", "p256", 1)


def token(label: str) -> Any:
    return pkcs11.lib(str(Path(MODULE).resolve())).get_token(token_label=label)


def uri(label: str, name: str, *more: str) -> str:
    return ";".join((f"pkcs11:token={label}", f"object={name}", *more)) + f"?module-path={MODULE}"


def _make_key(label: str, kind: str, number: int) -> None:
    session = token(label).open(user_pin=PIN, rw=True)
    try:
        if kind.startswith("rsa"):
            session.generate_keypair(KeyType.RSA, 2048, store=True, id=bytes([number]), label=kind)
            return
        curve = {Attribute.EC_PARAMS: encode_named_curve_parameters(CURVES[kind])}
        parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
        parameters.generate_keypair(store=True, id=bytes([number]), label=kind)
    finally:
        session.close()

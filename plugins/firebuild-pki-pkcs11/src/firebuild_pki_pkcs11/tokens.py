"""Tokens: finding the one that is meant, logging in once for a process, and signing with a key in it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import pkcs11
from cryptography.hazmat.primitives import serialization
from firebuild_pki import CAError, KeyStoreContext, SignatureAlgorithm, StoredKey, ecdsa_der
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass, TokenFlag
from pkcs11.util.ec import encode_ec_public_key

from firebuild_pki_pkcs11.uri import TokenURI, parse

MODULE_VARIABLE: Final = "PKCS11_MODULE"
"""Environment variable that names the module for URIs that name none."""

_PROXY: Final = "p11-kit-proxy.so"
_DIRECTORIES: Final = (
    "/usr/lib/pkcs11",
    "/usr/lib64/pkcs11",
    "/usr/lib/softhsm",
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


@dataclass
class _Login:
    """The login to one token. PKCS#11 has one for a process, whatever the number of its sessions."""

    session: Any
    salt: bytes
    pin: bytes = field(repr=False)
    """HMAC of the PIN, to compare that of the next user: a token that is logged in does not look at it."""
    users: int = 0


@dataclass(frozen=True)
class _Module:
    """A loaded module.

    Args:
        path: its file.
        lock: held for each call into it, as it was not told of threads (C_Initialize without arguments),
            and SoftHSM then crashes when two are in it.
        logins: by slot.
    """

    path: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    logins: dict[int, _Login] = field(default_factory=dict)


_modules: Final[dict[str, _Module]] = {}


class TokenKey(StoredKey):
    """A private key in a token."""

    def __init__(self, module: _Module, key: Any, public: bytes, release: Callable[[], None]) -> None:
        self._module = module
        self._key = key
        self._public = public
        self._release: Callable[[], None] | None = release

    def public_key(self) -> bytes:
        """See `StoredKey.public_key`."""
        return self._public

    def sign(self, message: bytes, algorithm: SignatureAlgorithm) -> bytes:
        """See `StoredKey.sign`. ECDSA signs the digest: older tokens cannot hash for it."""
        with self._module.lock, _in_words("signing"):
            if self._key is None:
                raise CAError("the key is closed")
            if algorithm is SignatureAlgorithm.RSA_SHA256:
                return bytes(self._key.sign(message, mechanism=Mechanism.SHA256_RSA_PKCS))
            digest = hashlib.new(algorithm.hash_name, message).digest()
            return ecdsa_der(bytes(self._key.sign(digest, mechanism=Mechanism.ECDSA)))

    def close(self) -> None:
        """End the session; the last user of a token logs out."""
        with self._module.lock:
            release, self._release, self._key = self._release, None, None
            if release is not None:
                release()


def open_token_key(uri: str, context: KeyStoreContext) -> TokenKey:
    """Open the private key that a URI names.

    Raises:
        CAError: module, token or key is not there, or not the only one; the PIN is missing, wrong or locked.
    """
    asked = parse(uri)
    path = _module_path(asked, context)
    module = _modules.setdefault(path, _Module(path))
    with module.lock, ExitStack() as undo:
        token = _token(asked, module)
        undo.callback(_leave, module, token.slot.slot_id, _logged_in(module, token, context))
        with _in_words("opening a session"):
            session = token.open()
        undo.callback(_end, session)
        with _in_words("looking for the key"):
            key = _private_key(asked, session)
            public = _public_key(session, key)
        return TokenKey(module, key, public, undo.pop_all().close)


def _module_path(asked: TokenURI, context: KeyStoreContext) -> str:
    named = asked.module_path or context.environ.get(MODULE_VARIABLE)
    names = (f"{asked.module_name}.so", f"lib{asked.module_name}.so") if asked.module_name else (_PROXY,)
    candidates = [named] if named else [os.path.join(place, one) for place in _DIRECTORIES for one in names]
    path = next((one for one in candidates if os.path.isfile(one)), None)
    if path is None:
        looked = f"the module {named}" if named else f"{' or '.join(names)} in {', '.join(_DIRECTORIES)}"
        hint = f"name it: {asked.text.partition('?')[0]}?module-path=/…/module.so, or in {MODULE_VARIABLE}"
        raise CAError(f"expected {looked}; there is no such file", hint=hint)
    return os.path.realpath(path)


def _token(asked: TokenURI, module: _Module) -> Any:
    try:
        library = pkcs11.lib(module.path)
        slots = library.get_slots(token_present=True)
    except (pkcs11.PKCS11Error, RuntimeError) as error:
        hint = "is it a PKCS#11 module for this machine, and is its configuration readable?"
        raise CAError(f"the module {module.path} cannot be used: {_name(error)}", hint=hint) from error
    _must_be_library(asked, library)
    tokens = [
        token for token in (slot.get_token() for slot in slots) if TokenFlag.TOKEN_INITIALIZED in token.flags
    ]
    fitting = [token for token in tokens if _fits(asked, token)]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(f'"{token.label}" (serial {token.serial.decode(errors="replace")})' for token in tokens)
    if fitting:
        raise CAError(
            f"{len(fitting)} tokens are {asked.token_words}", hint=f"add serial=…; there are {there}"
        )
    raise CAError(
        f"no token is {asked.token_words}", hint=f"there are {there or 'no tokens'} in {module.path}"
    )


def _must_be_library(asked: TokenURI, library: Any) -> None:
    major, minor = library.library_version
    found = {
        "library-manufacturer": library.manufacturer_id.encode(),
        "library-description": library.library_description.encode(),
        "library-version": f"{major}.{minor}".encode(),
    }
    for name, value in found.items():
        wanted = asked.path.get(name, value).strip()
        if name == "library-version" and b"." not in wanted:
            wanted += b".0"  # RFC 7512 section 2.3: the minor version is 0 where it is left out
        if wanted != value.strip():
            shown = value.decode(errors="replace").strip()
            raise CAError(
                f'expected a module of {asked.words(name)}, found "{shown}"', hint=f"leave {name} out"
            )


def _fits(asked: TokenURI, token: Any) -> bool:
    slot = token.slot
    found = {
        "token": token.label.encode(),
        "serial": token.serial,
        "manufacturer": token.manufacturer_id.encode(),
        "model": token.model.encode(),
        "slot-id": str(slot.slot_id).encode(),
        "slot-description": slot.slot_description.encode(),
        "slot-manufacturer": slot.manufacturer_id.encode(),
    }
    # the token's own fields are padded with blanks
    return all(
        asked.path[name].strip() == value.strip() for name, value in found.items() if name in asked.path
    )


def _logged_in(module: _Module, token: Any, context: KeyStoreContext) -> _Login:
    """Log in to a token, or join who is."""
    pin = context.secret() if context.secret is not None else None
    login = module.logins.get(token.slot.slot_id)
    if login is None:
        login = module.logins[token.slot.slot_id] = _login(token, pin)
    elif not hmac.compare_digest(login.pin, _hashed(login.salt, pin)):
        hint = "is the PIN of both the right one?"
        raise CAError(f'the token "{token.label}" is in use in this process with another PIN', hint=hint)
    login.users += 1
    return login


def _login(token: Any, pin: str | None) -> _Login:
    salt = secrets.token_bytes(16)
    if pin is None and TokenFlag.LOGIN_REQUIRED not in token.flags:
        return _Login(token.open(), salt, _hashed(salt, None))
    if pin is None and TokenFlag.PROTECTED_AUTHENTICATION_PATH not in token.flags:
        hint = "say in ca_key_passphrase where its PIN is: {env: NAME} or {file: PATH}"
        raise CAError(f'the token "{token.label}" needs a PIN', hint=hint)
    with _in_words(f'logging in to the token "{token.label}"'):
        session = token.open(user_pin=pkcs11.PROTECTED_AUTH if pin is None else pin)
    return _Login(session, salt, _hashed(salt, pin))


def _hashed(salt: bytes, pin: str | None) -> bytes:
    return hmac.digest(salt, (pin or "").encode(), "sha256")


def _leave(module: _Module, slot: int, login: _Login) -> None:
    login.users -= 1
    if login.users == 0:
        del module.logins[slot]
        _end(login.session)


def _end(session: Any) -> None:
    with suppress(pkcs11.PKCS11Error):  # a token that was taken out has no sessions
        session.close()


def _private_key(asked: TokenURI, session: Any) -> Any:
    wanted: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, **_named(asked)}
    found = list(session.get_objects(wanted))
    if len(found) == 1:
        return found[0]
    there = [_described(one) for one in session.get_objects({Attribute.CLASS: ObjectClass.PRIVATE_KEY})]
    names = ", ".join(there[:20]) or "no private keys"
    if found:
        raise CAError(f"{len(found)} private keys are {asked.key_words}", hint=f"add id=…; there are {names}")
    raise CAError(f"no private key is {asked.key_words}", hint=f"the token holds {names}")


def _named(asked: TokenURI) -> dict[Attribute, Any]:
    named: dict[Attribute, Any] = {}
    if "object" in asked.path:
        named[Attribute.LABEL] = asked.path["object"].decode()
    if "id" in asked.path:
        named[Attribute.ID] = asked.path["id"]
    return named


def _described(key: Any) -> str:
    return f'object "{key.label}" (id %{key.id.hex("%") if key.id else ""})'


def _public_key(session: Any, key: Any) -> bytes:
    """Find the public key: that of the same id and label, or for RSA what the private key says itself."""
    if key.key_type not in (KeyType.RSA, KeyType.EC):
        raise CAError(f"expected an RSA or EC key, found {key.key_type.name}")
    wanted = {Attribute.CLASS: ObjectClass.PUBLIC_KEY, Attribute.KEY_TYPE: key.key_type, Attribute.ID: key.id}
    found = list(session.get_objects(wanted))
    labelled = [one for one in found if one.label == key.label]  # keys made without an id all have the same
    public = next(iter(labelled or (found if key.id else ())), None)
    if public is not None and key.key_type is KeyType.EC:
        return bytes(encode_ec_public_key(public))
    if key.key_type is KeyType.RSA:
        return _rsa_public_key(public or key)
    hint = "import it with the same id, or the CA's certificate: pkcs11-tool --write-object --type pubkey"
    raise CAError(f"the token holds no public key with the id of {_described(key)}", hint=hint)


def _rsa_public_key(key: Any) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers

    numbers = [int.from_bytes(key[one]) for one in (Attribute.PUBLIC_EXPONENT, Attribute.MODULUS)]
    return (
        RSAPublicNumbers(*numbers)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


_WORDS: Final[dict[type[Exception], tuple[str, str]]] = {
    pkcs11.PinIncorrect: (
        "the PIN is wrong",
        "correct it before you try again: after some wrong ones a token locks itself",
    ),
    pkcs11.PinLocked: (
        "the PIN is locked after too many wrong ones",
        "unlock it with the security officer's PIN: pkcs11-tool --init-pin --login --login-type so",
    ),
    pkcs11.PinExpired: ("the PIN has expired", "set a new one: pkcs11-tool --change-pin"),
    pkcs11.PinLenRange: ("the PIN is too short or too long for this token", "is it the right one?"),
    pkcs11.PinInvalid: ("the PIN has characters that this token refuses", "is it the right one?"),
    pkcs11.UserPinNotInitialized: (
        "no PIN was ever set for this token",
        "set one: pkcs11-tool --init-pin --login --login-type so",
    ),
    pkcs11.UserAlreadyLoggedIn: (
        "something else in this process is logged in to the token",
        "use its keys through firebuild only, or in another process",
    ),
    pkcs11.TokenNotPresent: ("the token is not there any more", "put it in again"),
    pkcs11.DeviceRemoved: ("the token was taken out", "put it in again"),
    pkcs11.MechanismInvalid: (
        "the token cannot sign like this",
        "it needs CKM_ECDSA for EC keys, CKM_SHA256_RSA_PKCS for RSA keys: pkcs11-tool --list-mechanisms",
    ),
    pkcs11.FunctionRejected: ("the token refused", "may this key sign (CKA_SIGN)?"),
}


@contextmanager
def _in_words(doing: str) -> Iterator[None]:
    try:
        yield
    except pkcs11.PKCS11Error as error:
        message, hint = next(
            (words for kind, words in _WORDS.items() if isinstance(error, kind)), (_name(error), None)
        )
        raise CAError(f"{doing} failed: {message}", hint=hint) from error


def _name(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""Credentials for registries: from our settings, or those of docker and podman.

The first that knows the registry counts: our settings; DOCKER_AUTH_CONFIG; REGISTRY_AUTH_FILE, or else
`containers/auth.json` below XDG_RUNTIME_DIR and XDG_CONFIG_HOME (containers-auth.json(5)); `config.json` in
DOCKER_CONFIG or ~/.docker, with its programs `docker-credential-…`
(https://docs.docker.com/reference/cli/docker/login/#credential-stores). They are looked for when a registry
asks, so that what needs no login starts no program.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import Any, Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.programs import LimitExceeded, NotStarted, run_program
from firebuild_bootstrap.registry.settings import RegistrySettings
from firebuild_pki import SecretError
from firebuild_pki.display import one_line
from firebuild_pki.homes import read_small
from firebuild_pki.values import dataclass

HUB: Final = "docker.io"
OLD_HUB: Final = "index.docker.io"
"""The name under which Docker's own registry answers and is logged in at."""

_HUB_KEY: Final = f"https://{OLD_HUB}/v1/"
_LOG_IN_AGAIN: Final = "log in again: docker login REGISTRY"
_MAX_FILE: Final = 1 << 20
_MAX_ANSWER: Final = 64 << 10
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")
_HELPER_SECONDS: Final = 60.0
# What docker-credential-helpers print for a registry that they do not know (credentials/error.go).
_NOT_FOUND: Final = ("credentials not found", "no credentials server url", "no credentials username")


@dataclass(frozen=True)
class Credentials:
    """What logs in; no secret of it shows in a repr.

    Args:
        source: where it is from, for messages.
        username: with `password`.
        identity_token: an OAuth2 refresh token, instead of a password.
        registry_token: a bearer token, sent as it is.
    """

    source: str
    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617), empty without a password."""
        if not self.password:
            return ""
        pair = f"{self.username}:{self.password}".encode()
        return f"Basic {base64.b64encode(pair).decode('ascii')}"


def find_credentials(
    host: str,
    repository: str,
    settings: RegistrySettings,
    environ: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> Credentials | None:
    """Return who logs in at a registry, or None for nobody.

    Args:
        host: of the registry, as images are named.
        repository: what is pulled or pushed there; podman's files may have a login of its own for it.
        settings: what is special about the registry.
        environ: environment variables, usually `os.environ`.
        check: called again and again while a program for credentials is waited for; may raise.

    Raises:
        InputError: a file is malformed, a program for credentials fails, or a secret that the settings refer
            to is not there.
    """
    where = f"registries.hosts of {host}"
    try:
        if settings.token is not None:
            return Credentials(where, identity_token=settings.token.resolve(environ).strip())
        if settings.username is not None and settings.password is not None:
            return Credentials(where, settings.username, settings.password.resolve(environ))
    except SecretError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from None
    wanted = tuple(_keys(host, repository))
    for source, document in _documents(environ):
        ask = partial(_ask, source=source, environ=environ, check=check)
        found = _of_document(document, wanted, source, ask)
        if found is not None:
            return found
    return None


def _keys(host: str, repository: str) -> Iterator[str]:
    parts = repository.split("/")
    for length in range(len(parts), -1, -1):
        yield "/".join((host, *parts[:length]))
    if host == HUB:
        yield OLD_HUB


def _documents(environ: Mapping[str, str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if text := environ.get("DOCKER_AUTH_CONFIG"):
        yield (
            "DOCKER_AUTH_CONFIG",
            _document(
                "DOCKER_AUTH_CONFIG",
                text,
                "it holds what is in a config.json, not the path of one nor its base64",
            ),
        )
    for path in _paths(environ):
        try:
            text = read_small(path, _MAX_FILE).decode()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputError(
                f"{one_line(path)} can't be read for credentials: {why}",
                hint="let this user read it, or have DOCKER_CONFIG name another directory",
            ) from None
        yield path, _document(path, text)


def _paths(environ: Mapping[str, str]) -> Iterator[str]:
    home = environ.get("HOME") or os.path.expanduser("~")
    if chosen := environ.get("REGISTRY_AUTH_FILE"):
        yield chosen
    else:
        if runtime := environ.get("XDG_RUNTIME_DIR"):
            yield os.path.join(runtime, "containers", "auth.json")
        config = environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
        yield os.path.join(config, "containers", "auth.json")
    yield os.path.join(environ.get("DOCKER_CONFIG") or os.path.join(home, ".docker"), "config.json")


def _document(source: str, text: str, hint: str = "log in again, or repair it") -> Mapping[str, Any]:
    try:
        document = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):  # what is in it is not shown: it holds secrets
        raise InputError(f"{one_line(source)} is not a JSON object", hint=hint)
    return document


def _of_document(
    document: Mapping[str, Any],
    wanted: Sequence[str],
    source: str,
    ask: Callable[[str, str], Credentials | None],
) -> Credentials | None:
    helpers, auths, store = (document.get(key) for key in ("credHelpers", "auths", "credsStore"))
    helpers = _by_host(helpers)
    for key in wanted:
        if isinstance(helper := helpers.get(key), str):
            return ask(helper, key)
    if isinstance(store, str) and store:
        for key in wanted:
            # A store knows hosts; it would be asked in vain for each part of a path.
            if "/" not in key and (found := ask(store, key)) is not None:
                return found
    known = _by_host(auths)
    for key in wanted:
        if isinstance(entry := known.get(key), dict) and (found := _of_entry(entry, source)) is not None:
            return found
    return None


def _by_host(section: object) -> dict[str, object]:
    """Return a section by host: old entries are URLs, with the path of an API."""
    if not isinstance(section, dict):
        return {}
    found: dict[str, object] = {}
    for key, value in section.items():
        name = str(key).removeprefix("https://").removeprefix("http://").rstrip("/")
        for version in ("/v1", "/v2"):
            name = name.removesuffix(version)
        found[name] = value
    return found


def _of_entry(entry: Mapping[str, object], source: str) -> Credentials | None:
    def text(name: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str | None):  # what is in it is not shown: it may be a secret
            raise InputError(
                f"{one_line(source)}: {name} of an entry of auths is not a text", hint=_LOG_IN_AGAIN
            )
        return value or ""

    username, password = text("username"), text("password")
    if text("auth"):
        try:
            # `base64` breaks lines after 76 characters; Docker reads over line breaks, as Go's decoder does.
            joined = re.sub(r"[\r\n]", "", text("auth"))
            decoded = base64.b64decode(joined, validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            raise InputError(
                f"{one_line(source)}: an entry of auths is not in base64",
                hint=_LOG_IN_AGAIN,
            ) from None
        username, colon, password = decoded.rstrip("\0").partition(":")
        if not colon:
            raise InputError(
                f"{one_line(source)}: the auth of an entry of auths is not the base64 of USER:PASSWORD",
                hint=_LOG_IN_AGAIN,
            )
    found = Credentials(source, username, password, text("identitytoken"), text("registrytoken"))
    if not (found.registry_token.isascii() and found.registry_token.isprintable()):
        raise InputError(
            f"{one_line(source)}: a registrytoken in auths can't be a header of HTTP",
            hint=_LOG_IN_AGAIN,
        )
    return found if password or found.identity_token or found.registry_token else None


def _ask(
    helper: str, key: str, *, source: str, environ: Mapping[str, str], check: Callable[[], None]
) -> Credentials | None:
    """Ask a program for credentials: it reads the registry, and writes JSON.

    https://github.com/docker/docker-credential-helpers#development
    """
    program = f"docker-credential-{helper}"
    if _HELPER.fullmatch(helper) is None:
        raise InputError(
            f"{one_line(program)} can't be the name of a program for credentials",
            hint=f"credsStore and credHelpers in {one_line(source)} have what follows docker-credential-",
        )
    server = _HUB_KEY if key in (HUB, OLD_HUB) else key
    status, text, complaints = _run(program, server, source, environ, check)
    if status:
        if any(known in text.lower() for known in _NOT_FOUND):
            return None
        said = one_line(text or complaints or "it said nothing", 200)
        raise InputError(
            f"{program} failed with status {status}: {said}",
            hint=f"`echo {one_line(server, 80)} | {program} get` tries it by hand",
        )
    answer = _document(f"the answer of {program}", text)
    username, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise InputError(f"the answer of {program} has no Username and Secret", hint=_LOG_IN_AGAIN)
    if not secret:
        return None
    if username == "<token>":  # so the protocol marks an identity token
        return Credentials(program, identity_token=secret)
    return Credentials(program, username, secret)


def _run(
    program: str, server: str, source: str, environ: Mapping[str, str], check: Callable[[], None]
) -> tuple[int, str, str]:
    remedy = f"try it by hand, or take it out of credsStore and credHelpers in {one_line(source)}"
    try:
        done = run_program(
            [program, "get"],
            data=server.encode(),
            env=environ,
            seconds=_HELPER_SECONDS,
            most=_MAX_ANSWER,
            check=check,
            install=remedy,
        )
    except LimitExceeded as error:
        raise InputError(f"{program}: {error}", hint=remedy) from None
    except NotStarted as error:
        raise InputError(error.message, hint=error.hint) from None
    output, complaints = (data.decode("utf-8", "replace").strip() for data in (done.stdout, done.stderr))
    return done.returncode, output, complaints

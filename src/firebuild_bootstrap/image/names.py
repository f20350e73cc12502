"""Names of images and bases: references, as container tools write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Final, NoReturn

import platformdirs

from firebuild_bootstrap.errors import InputError
from firebuild_pki import homes
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

# The grammar of references (github.com/distribution/reference, reference.go). Character classes are spelled
# out, because Python's \w and \d also mean letters and digits of other scripts.
_COMPONENT: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_LABEL: Final = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN: Final = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_TAG: Final = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]*"
_DIGEST: Final = r"[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}"
_REFERENCE: Final = re.compile(
    rf"((?:{_DOMAIN}/)?{_COMPONENT}(?:/{_COMPONENT})*)(?::({_TAG}))?(?:@({_DIGEST}))?"
)
_IDENTIFIER: Final = re.compile(r"[a-f0-9]{64}")
# Digits of the registered algorithms (OCI image spec, descriptor.md); they are lower case.
_DIGITS: Final = {"sha256": 64, "sha384": 96, "sha512": 128}
# "Many clients impose a limit of 255 characters on the length of the concatenation of the registry hostname
# (and optional port), /, and <name> value" (OCI distribution spec, "Pulling manifests"). It also is the limit
# of Linux for a file name, which a name becomes in the store.
_MAX_NAME: Final = 255
_MAX_TAG: Final = 128
_MAX_TEXT: Final = 1024  # more than name, tag and any digest take

UNTAGGED: Final = "untagged"
"""What the names of images begin with that were built without one."""

_HUB: Final = "docker.io"
_OLD_HUB: Final = "index.docker.io"
_OFFICIAL: Final = "library"


@dataclass(frozen=True, order=True)
class Reference:
    """The name of an image or base: `[DOMAIN[:PORT]/]PATH[:TAG][@DIGEST]`.

    Two spellings of one name are equal: `debian`, `library/debian` and `docker.io/library/debian` name one
    image, as they do for Docker.

    Args:
        familiar: the shortest spelling of the name, without tag and digest.
        tag: `latest` when it was left out.
        digest: what its content must have, if anything.
        name: the name as it was spelled.
    """

    familiar: str
    tag: str = "latest"
    digest: str = ""
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.name or self.familiar}:{self.tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def registry(self) -> str:
        """The registry that has it, HOST[:PORT]; `docker.io` for names without one."""
        return _split(self.familiar)[0]

    @property
    def repository(self) -> str:
        """Its name at the registry: `library/debian`."""
        return _split(self.familiar)[1]

    @property
    def is_untagged(self) -> bool:
        """Whether it was made up for an image without a name."""
        return self.familiar.startswith(f"{UNTAGGED}/")

    @property
    def is_id(self) -> bool:
        """Whether it is the id of an image, `sha256:…`, which is never a name for Docker either."""
        return self.familiar == "sha256" and _IDENTIFIER.fullmatch(self.tag) is not None

    @classmethod
    def parse(cls, text: str, *, what: str = "a reference") -> Reference:
        """Read a reference.

        Args:
            text: what was written.
            what: what is expected, for the message.

        Raises:
            InputError: `text` does not follow the grammar.
        """
        found = _REFERENCE.fullmatch(text) if len(text) <= _MAX_TEXT else None
        if found is None:
            lower = _REFERENCE.fullmatch(text.lower()) if len(text) <= _MAX_TEXT else None
            _refuse(what, text, "all of the name but its registry has to be lower case" if lower else "")
        name, tag, digest = found[1], found[2] or "latest", found[3] or ""
        domain, path = _split(name)
        algorithm, _, digits = digest.partition(":")
        if len(name) > _MAX_NAME:
            _refuse(
                what, text, f"its name has {counted(len(name), 'character')}, and {_MAX_NAME} are allowed"
            )
        if len(tag) > _MAX_TAG:
            _refuse(what, text, f"its tag has {counted(len(tag), 'character')}, and {_MAX_TAG} are allowed")
        if _IDENTIFIER.fullmatch(name):
            _refuse(what, text, "64 hexadecimal digits are an id, and can't be a name")
        if algorithm in _DIGITS and (len(digits) != _DIGITS[algorithm] or digits != digits.lower()):
            _refuse(
                what, text, f"a {algorithm} digest has {_DIGITS[algorithm]} lower-case hexadecimal digits"
            )
        return cls(_familiar(domain, path), tag, digest, name)

    @classmethod
    def parse_tag(cls, text: str) -> Reference:
        """Read the name of an image or base in the store, which has no digest.

        Raises:
            InputError: `text` does not follow the grammar, or has a digest.
        """
        reference = cls.parse(text, what="a name with an optional tag")
        if reference.digest:
            _refuse("a name with an optional tag", text, "leave the digest out")
        return reference

    @property
    def full(self) -> str:
        """The name with its registry, and the tag: `docker.io/library/debian:12`."""
        return f"{'/'.join(_split(self.familiar))}:{self.tag}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All spellings of the name, the shortest first."""
        domain, path = _split(self.familiar)
        if domain != _HUB:
            return (self.familiar,)
        short = path.removeprefix(f"{_OFFICIAL}/")
        paths = (path, short) if "/" not in short else (path,)
        spelled = (f"{host}{path}" for host in ("", f"{_HUB}/", f"{_OLD_HUB}/") for path in paths)
        return tuple(dict.fromkeys((self.familiar, *(name for name in spelled if _split(name)[0] == _HUB))))


def _split(name: str) -> tuple[str, str]:
    """Split a name into registry and path, as Docker does (distribution/reference, normalize.go).

    What is before the first slash is a registry only if it could not be a part of a path, or is `localhost`.
    """
    first, slash, rest = name.partition("/")
    registry = first == "localhost" or any(char in first for char in ".:") or first != first.lower()
    if not slash or not registry:
        domain, path = _HUB, name
    else:
        domain, path = (_HUB if first == _OLD_HUB else first), rest
    return domain, f"{_OFFICIAL}/{path}" if domain == _HUB and "/" not in path else path


def _familiar(domain: str, path: str) -> str:
    if domain != _HUB:
        return f"{domain}/{path}"
    short = path.removeprefix(f"{_OFFICIAL}/")
    # docker.io/localhost/web must not become localhost/web, which is another image.
    spelled = (name for name in (short, path) if _split(name) == (domain, path))
    return next(spelled, f"{domain}/{path}")


def _refuse(what: str, text: str, why: str = "") -> NoReturn:
    hint = why or "for example debian:12, acme/web:1.0 or registry.example:5000/team/web:1.0"
    raise InputError(f"expected {what}, found {text!r:.300}", hint=hint)


# Environment variables that start like a setting and are none.
RESERVED_ENVIRONMENT: Final = frozenset(
    {"FIREBUILD_HOME", "FIREBUILD_CONFIG", "FIREBUILD_DEBUG", "FIREBUILD_PULL"}
)


def at_home(path: str, what: str) -> Path:
    """Expand ``~`` in the path of what may be made there: in a directory called ``~`` it would not be found.

    Raises:
        InputError: nobody's home directory is known for it.
    """
    found = homes.expanded(path)
    if found is None:
        whose = one_line(path.partition("/")[0], 100)
        raise InputError(f"{what}: no home directory is known for {whose}", hint="write the path out")
    return Path(found)


def default_home(environ: Mapping[str, str]) -> Path:
    """Return where images, bases and builds are kept: FIREBUILD_HOME, or else the user's data directory.

    Raises:
        InputError: the user has none, as a user id in a container that has no entry and no HOME.
    """
    chosen = environ.get("FIREBUILD_HOME")
    if chosen:
        return Path(os.path.abspath(chosen))
    found = homes.own_directory(platformdirs.user_data_dir)
    if found is None:
        hint = "set FIREBUILD_HOME to a directory for the store, or HOME"
        raise InputError("there is no directory for the store: this user has no home directory", hint=hint)
    return found

"""What a user gives a build: the request, and secrets for RUN --mount=type=secret.

The value of a secret is in memory only. It is not part of a command, key, event or message; the guest gets it
over the mutual-TLS channel, as a resource of its own.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.context.entries import ContextPlace, Entry
from firebuild_bootstrap.dockerfile import DockerfileSource
from firebuild_bootstrap.dockerfile.graph import Download, GitTree, ImageRef
from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError, Location
from firebuild_bootstrap.image.attestations import NONE, Attestations
from firebuild_bootstrap.image.config import Healthcheck
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputSpec
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.sizes import split_fields
from firebuild_bootstrap.wire import MAX_SECRET_BYTES
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.image.remotecache import CacheSpec
    from firebuild_bootstrap.sshagent import SshAgent

BuildContextSource = Path | ImageRef | GitTree
"""A directory, an image, or a repository."""


_FORM: Final = "id=ID, id=ID,src=FILE or id=ID,env=NAME"


@dataclass(frozen=True)
class RemoteContext:
    """Where a build context was fetched from, for its provenance.

    Args:
        source: the repository, or the URL of the archive.
        digest: the full name of the commit, or `ALGORITHM:hex` of the archive.
    """

    source: GitTree | Download
    digest: str


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        dockerfile: path of the Dockerfile; beside it `<name>.dockerignore` may lie.
        source: the Dockerfile itself and what to call it in messages, if it is not to be read from that path.
        context: directory that COPY and ADD read from.
        context_place: what messages call it, if not by its path.
        remote: where the context was fetched from, if it was.
        build_contexts: what stands for images and stages of these names.
        tag: what to store the image as.
        also_tagged: more names to store it under.
        build_args: values for ARG; None is a name without a value.
        secrets: of the user by id, for RUN --mount=type=secret.
        agents: SSH agents of the user by id, for RUN --mount=type=ssh; `default` is also that of git.
        labels: added to the image, over those of the Dockerfile.
        target: stage to build, by name or index; None for the last.
        outputs: the forms to write at once; without any the image alone is stored.
        no_cache: execute each step, whatever the cache has; what comes of it replaces that.
        no_cache_stages: the same for these stages, by name or index.
        explain_cache: report why steps are not cached.
        cache_from: remote caches that are asked for what the store does not have.
        cache_to: where the results of this build's steps go as well, for other machines.
        epoch: seconds since 1970: no file of the outputs is younger, nor is the image (SOURCE_DATE_EPOCH);
            None for the real times.
        attestations: what is to be said about the image.
        keep_failed: where a failed build keeps what is left of it, in a directory named by its build id; None
            keeps nothing.
        ready: how the image is asked whether it answers before it is stored; what is empty or 0 there is as
            its HEALTHCHECK has it. None stores it without.

    Raises:
        InputError: a text of them contains a NUL, or what is not Unicode text. Values are not shown: they may
            be secrets.
    """

    dockerfile: Path
    source: DockerfileSource | None = None
    context: Path
    context_place: ContextPlace | None = None
    remote: RemoteContext | None = None
    build_contexts: Mapping[str, BuildContextSource] = field(default_factory=dict)
    tag: Reference
    also_tagged: tuple[Reference, ...] = ()
    build_args: Mapping[str, str | None] = field(default_factory=dict)
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    agents: Mapping[str, SshAgent] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    outputs: tuple[OutputSpec, ...]
    no_cache: bool = False
    no_cache_stages: frozenset[str] = frozenset()
    explain_cache: bool = False
    cache_from: tuple[CacheSpec, ...] = ()
    cache_to: tuple[CacheSpec, ...] = ()
    epoch: int | None = None
    attestations: Attestations = NONE
    keep_failed: Path | None = None
    ready: Healthcheck | None = None

    def __post_init__(self) -> None:
        """Check the texts."""
        for text in (self.target or "", *self.no_cache_stages):
            self._check("the name of a stage", text)
        for what, pairs in (("the build argument", self.build_args), ("the label", self.labels)):
            for name, value in pairs.items():
                self._check(f"the name of {what}", name)
                self._check(f"the value of {what} {one_line(name, 80)}", value or "")

    @property
    def dockerfile_name(self) -> Path:
        """What to call the Dockerfile in messages."""
        return self.dockerfile if self.source is None else Path(self.source.name)

    @staticmethod
    def _check(what: str, text: str) -> None:
        if UNUSABLE_TEXT.search(text):
            raise InputError(f"{what} contains a NUL, or bytes that are not UTF-8")


@dataclass(frozen=True)
class Secret:
    """A secret; what it is shows in no repr.

    Raises:
        InputError: it is longer than 500 KiB, as much as BuildKit takes.
    """

    value: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the size."""
        if len(self.value) > MAX_SECRET_BYTES:
            raise InputError(
                f"a secret has more than {MAX_SECRET_BYTES} bytes, which is the most that can be passed on",
                hint="`RUN --mount=type=bind,from=NAME` with `--build-context NAME=DIR` takes larger files",
            )


@dataclass(frozen=True)
class SecretResource:
    """A secret as what the guest asks for: one file.

    Args:
        identifier: its id, for messages.
        secret: the secret.
    """

    identifier: str
    secret: Secret

    def entries(self) -> Iterator[Entry]:
        """Yield the file; see `Resource.entries`."""
        yield Entry(
            source=f"secret {one_line(self.identifier, 80)}",
            path="secret",
            kind=tar.FILE,
            mode=0o400,
            mtime_ns=0,
            size=len(self.secret.value),
            open=lambda: io.BytesIO(self.secret.value),
        )


def secret_option(identifier: str) -> str:
    """Return how a command line gives a secret, for messages."""
    name = one_line(identifier, 80)
    return f"--secret id={name},src=FILE or --secret id={name},env=NAME"


def agent_option(identifier: str) -> str:
    """Return how a command line gives an SSH agent, for messages."""
    name = one_line(identifier, 80)
    return f"--ssh {name} for that of SSH_AUTH_SOCK, or --ssh {name}=SOCKET or {name}=KEY"


def missing_secret(identifier: str, location: Location | None = None) -> InputError:
    """Return the error for a secret that the RUN at `location` requires and the user has not given."""
    name = one_line(identifier, 80)
    return InputError(
        f"RUN --mount=type=secret: the secret {name} is required, and was not given",
        hint=f"give it: {secret_option(identifier)}",
        location=location,
    )


def missing_agent(identifier: str, location: Location | None = None) -> InputError:
    """Return the error for an agent that the RUN at `location` requires and the user has not given."""
    name = one_line(identifier, 80)
    return InputError(
        f"RUN --mount=type=ssh: the SSH agent {name} is required, and was not given",
        hint=f"give it: {agent_option(identifier)}",
        location=location,
    )


def read_secrets(options: Iterable[str], environment: Mapping[str, str]) -> dict[str, Secret]:
    """Read the secrets that `--secret` options name; of two with one id the later counts, as in BuildKit.

    Args:
        options: `[type=file|env,]id=ID[,src=FILE|,env=NAME]`, comma-separated as in CSV (RFC 4180). Without
            src and env, the variable ID, or else the file ID.
        environment: variables.

    Raises:
        InputError: an option is malformed, or its file or variable can't be read. An option that is not
            understood is not shown, because it may hold a value.
    """
    return dict(_read_secret(text, number, environment) for number, text in enumerate(options, 1))


def _read_secret(text: str, number: int, environment: Mapping[str, str]) -> tuple[str, Secret]:
    members = _secret_members(text, number)
    name, source, variable = (members.get(key, "") for key in ("id", "src", "env"))
    if not name or "=" in name:
        raise _malformed_secret(number, "it has no id, or one with an equals sign")
    if members.get("type") == "env" and not variable:
        source, variable = "", source
    if source and variable:
        raise _malformed_secret(number, "it has both src and env")
    if not source and not variable:
        source, variable = ("", name) if name in environment else (name, "")
    shown = one_line(name, 80)
    if variable:
        if variable not in environment:
            raise InputError(
                f"--secret {shown}: the variable {one_line(variable, 80)} is not set",
                hint="export it, or name a file: --secret id=ID,src=FILE",
            )
        return name, Secret(environment[variable].encode("utf-8", "surrogateescape"))
    try:
        with open(os.path.expanduser(source), "rb") as file:
            return name, Secret(file.read(MAX_SECRET_BYTES + 1))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"--secret {shown}: {one_line(str(Path(source)), 200)}: {why}") from error


def _secret_members(text: str, number: int) -> dict[str, str]:
    try:
        fields = split_fields(text)
    except ValueError as error:
        raise _malformed_secret(number, str(error)) from error
    members = {}
    for each in fields:
        key, equals, value = each.partition("=")
        key = {"source": "src"}.get(key.lower(), key.lower())
        if key not in ("type", "id", "src", "env") or not equals:
            raise _malformed_secret(number, "it has an unknown key, or a key without a value")
        members[key] = value
    if members.get("type", "file") not in ("file", "env"):
        raise _malformed_secret(number, "its type is neither file nor env")
    return members


def _malformed_secret(number: int, why: str) -> InputError:
    return InputError(f"option --secret number {number}: {why}", hint=f"expected {_FORM}")

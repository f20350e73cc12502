"""What RUN has besides its command: `--mount`, `--network`, `--security` and `--device`.

https://docs.docker.com/reference/dockerfile/#run---mount; the rules and defaults are those of BuildKit
(commands_runmount.go, convert_runmount.go, convert_secrets.go, convert_ssh.go).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from typing import Final

from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    ContextRef,
    Mount,
    Network,
    Scratch,
    SecretMount,
    Sharing,
    SshMount,
    TmpfsMount,
    TreeRef,
)
from firebuild_bootstrap.dockerfile.syntax import Flags, Instruction, guess, short
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.sizes import parse_bool, parse_size, split_fields
from firebuild_bootstrap.wire import MAX_ID, absolute
from firebuild_pki.values import dataclass

_TYPES: Final = ("bind", "cache", "tmpfs", "secret", "ssh")
_ALIASES: Final = {
    "src": "source",
    "dst": "target",
    "destination": "target",
    "ro": "readonly",
    "rw": "readwrite",
}
_SWITCHES: Final = ("readonly", "readwrite", "required")
_KEYS: Final = (
    *("type", "from", "source", "target", "readonly", "readwrite", "required", "size", "id", "sharing"),
    *("mode", "uid", "gid", "env"),
)
# Where only some types know a key.
_ONLY: Final = {
    "size": ("tmpfs",),
    "required": ("secret", "ssh"),
    "sharing": ("cache",),
    "mode": ("cache", "secret", "ssh"),
    "uid": ("cache", "secret", "ssh"),
    "gid": ("cache", "secret", "ssh"),
    "env": ("secret",),
    "from": ("bind", "cache", "tmpfs"),
}
_MAX_MODE: Final = 2**32 - 1


@dataclass(frozen=True)
class MountScope:
    """What the mounts of a RUN refer to.

    Args:
        expand: replaces variables in one value.
        tree: finds what `from=` names.
        workdir: what relative targets are below.
    """

    expand: Callable[[str], str]
    tree: Callable[[Instruction, str], TreeRef]
    workdir: str


def check_run(instruction: Instruction, flags: Flags) -> Network:
    """Return the network of a RUN, after a look at all of its flags that needs no variables.

    Raises:
        InputError: a flag is malformed, or asks for what can't be done.
    """
    if "device" in flags.lists:
        raise instruction.error(
            "RUN --device is not supported: a build has no devices", hint="use the device when the image runs"
        )
    security = flags.values.get("security", "sandbox")
    if security == "insecure":
        raise instruction.error(
            "RUN --security=insecure is not supported: every RUN is confined",
            hint="leave it out; what needs all privileges has to run in the image's own machine",
        )
    if security != "sandbox":
        raise instruction.error(f"RUN --security: expected sandbox, found {short(security)!r}")
    for text in flags.lists.get("mount", ()):
        for key, value in _fields(instruction, text):
            if key == "from" and re.search(r"\$.", value or ""):
                raise instruction.error(
                    "RUN --mount: from can't hold variables",
                    hint="name a stage for it: FROM …$VARIABLE… AS name, and from=name",
                )
    network = flags.values.get("network", "default")
    try:
        return Network(network)
    except ValueError as error:
        raise instruction.error(
            f"RUN --network: expected default, none or host, found {short(network)!r}",
            hint=guess(network, list(Network)),
        ) from error


def read_mounts(instruction: Instruction, flags: Flags, scope: MountScope) -> tuple[Mount, ...]:
    """Return the mounts of a RUN, in their order.

    Raises:
        InputError: a mount is malformed, or what it names does not exist.
    """
    mounts: list[Mount] = []
    for text in flags.lists.get("mount", ()):
        agents = sum(isinstance(mount, SshMount) for mount in mounts)
        mounts.append(_Options(instruction, text, scope).mount(agents))
    return tuple(mounts)


def _fields(instruction: Instruction, text: str) -> list[tuple[str, str | None]]:
    """Split the options of a mount into keys and values; None for what has no value."""
    try:
        members = split_fields(text)
    except ValueError as error:
        raise instruction.error(f"RUN --mount={short(text)}: {error}") from error
    if not members:
        raise instruction.error("RUN --mount: expected options such as type=cache,target=/path")
    fields = []
    for field in members:
        key, equals, value = field.partition("=")
        key = key.lower()
        fields.append((_ALIASES.get(key, key), value if equals else None))
    return fields


class _Options:
    """The options of one mount."""

    def __init__(self, instruction: Instruction, text: str, scope: MountScope) -> None:
        self._instruction = instruction
        self._text = text
        self._scope = scope
        self._given: dict[str, str] = {}
        fields = _fields(instruction, text)
        for key, value in fields:
            if key not in _KEYS:
                raise self._error(f"unknown option {short(key)!r}", guess(key, _KEYS))
            if value is None and key not in _SWITCHES:
                raise self._error(f"expected {short(key)}=VALUE, found {short(key)!r}")
            expanded = "true" if value is None else scope.expand(value)
            # The last one wins, and `readwrite` is the opposite of `readonly`.
            self._given.pop({"readonly": "readwrite", "readwrite": "readonly"}.get(key, ""), None)
            self._given[key] = expanded
        self.type = self._choice("type", _TYPES, "bind")
        for key, types in _ONLY.items():
            if self._given.get(key) and self.type not in types:
                raise self._error(f"{key} is not for the type {self.type}")

    def mount(self, agents: int) -> Mount:
        """Return the mount.

        Args:
            agents: how many SSH agents are mounted before it.
        """
        match self.type:
            case "bind":
                return BindMount(self._target(), self._tree(ContextRef()), self._source(), self._writable())
            case "cache":
                target = self._target()
                # Not that of the work directory: a relative target names the same cache everywhere.
                name = self._given.get("id") or posixpath.normpath(self._given.get("target", ""))
                return CacheMount(
                    target,
                    name,
                    Sharing(self._choice("sharing", list(Sharing), Sharing.SHARED)),
                    self._tree(Scratch()),
                    self._source(),
                    not self._writable(),
                    self._number("mode", 8, 0o755),
                    self._number("uid", 10, 0),
                    self._number("gid", 10, 0),
                )
            case "tmpfs":
                return TmpfsMount(self._target(), self._size())
            case "secret":
                return self._secret()
            case _:
                return SshMount(
                    self._given.get("source") or self._given.get("id") or "default",
                    self._below(self._given.get("target") or f"/run/buildkit/ssh_agent.{agents}"),
                    self._switch("required", default=False),
                    self._number("mode", 8, 0o600),
                    self._number("uid", 10, 0),
                    self._number("gid", 10, 0),
                )

    def _secret(self) -> SecretMount:
        source, name, target = (self._given.get(key, "") for key in ("source", "id", "target"))
        if source and name:
            raise self._error("source and id can't both be given: they mean the same")
        if not (source or name or target):
            raise self._error("a secret needs its id", "for example type=secret,id=token")
        name = source or name or posixpath.basename(target)
        variable = self._given.get("env")
        if variable is None:
            target = target or f"/run/secrets/{posixpath.basename(name)}"
        elif not variable:
            variable = posixpath.basename(name)
        if variable and ("=" in variable or not variable.isprintable()):
            raise self._error(f"{short(variable)!r} is not the name of a variable")
        return SecretMount(
            name,
            self._below(target) if target else "",
            variable or "",
            self._switch("required", default=False),
            self._number("mode", 8, 0o400),
            self._number("uid", 10, 0),
            self._number("gid", 10, 0),
        )

    def _target(self) -> str:
        target = self._below(self._given.get("target", ""))
        if target == "/":
            raise self._error("the target can't be the root directory", "name it: target=/path")
        return target

    def _below(self, path: str) -> str:
        return absolute(self._scope.workdir, path)

    def _source(self) -> str:
        return absolute("/", self._given.get("source", ""))

    def _tree(self, default: TreeRef) -> TreeRef:
        name = self._given.get("from", "")
        return self._scope.tree(self._instruction, name) if name else default

    def _writable(self) -> bool:
        if "readwrite" in self._given:
            return self._switch("readwrite", default=False)
        return not self._switch("readonly", default=self.type == "bind")

    def _switch(self, key: str, *, default: bool) -> bool:
        text = self._given.get(key)
        if text is None:
            return default
        value = parse_bool(text)
        if value is None:
            raise self._error(f"{key}: expected true or false, found {short(text)!r}")
        return value

    def _choice(self, key: str, choices: tuple[str, ...] | list[str], default: str) -> str:
        value = self._given.get(key, default).lower()
        if value not in choices:
            raise self._error(
                f"{key}: expected one of {', '.join(choices)}, found {short(value)!r}", guess(value, choices)
            )
        return value

    def _number(self, key: str, base: int, default: int) -> int:
        text = self._given.get(key)
        if text is None:
            return default
        digits, most = ("[0-7]{1,12}", _MAX_MODE) if base == 8 else ("[0-9]{1,12}", MAX_ID)
        if not re.fullmatch(digits, text) or (number := int(text, base)) > most:
            what = "an octal mode" if base == 8 else "a number"
            raise self._error(f"{key}: expected {what}, found {short(text)!r}")
        return number

    def _size(self) -> int:
        try:
            return parse_size(self._given.get("size", "0"))
        except ValueError as error:
            raise self._error(f"size: {error}") from error

    def _error(self, message: str, hint: str | None = None) -> InputError:
        return self._instruction.error(f"RUN --mount={short(self._text)}: {message}", hint=hint)

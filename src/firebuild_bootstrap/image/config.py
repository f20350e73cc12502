"""The configuration that an image carries, as in the OCI image specification (config.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final, TypeGuard

from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError
from firebuild_pki.values import dataclass

_HEALTH_NUMBERS: Final = {
    "Interval": "interval_ns",
    "Timeout": "timeout_ns",
    "StartPeriod": "start_period_ns",
    "StartInterval": "start_interval_ns",
    "Retries": "retries",
}


@dataclass(frozen=True)
class Healthcheck:
    """A HEALTHCHECK; `test` is `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", command]`, times in nanoseconds."""

    test: tuple[str, ...]
    interval_ns: int = 0
    timeout_ns: int = 0
    start_period_ns: int = 0
    start_interval_ns: int = 0
    retries: int = 0


@dataclass(frozen=True)
class ImageConfig:
    """How a program in the image is meant to run; inherited by images built on it.

    `shell` is the SHELL in force at the end, None for the default `/bin/sh -c`. `onbuild` holds the
    instructions (as written) that a child image executes right after its FROM. `others` are members that
    mean nothing to us (`StopTimeout`, `ArgsEscaped`, …); images built on it have them, too.
    """

    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    workdir: str = "/"
    user: str = ""
    shell: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    healthcheck: Healthcheck | None = None
    author: str = ""
    onbuild: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the `config` object with OCI's key names; empty members are left out."""
        health = self.healthcheck
        members: dict[str, Any] = {
            **self.others,
            "User": self.user,
            "ExposedPorts": {port: {} for port in self.exposed_ports},
            "Env": [f"{name}={value}" for name, value in self.env.items()],
            "Entrypoint": list(self.entrypoint or ()),
            "Cmd": list(self.cmd or ()),
            "Volumes": {path: {} for path in self.volumes},
            "WorkingDir": self.workdir,
            "Labels": dict(self.labels),
            "StopSignal": self.stop_signal,
            "Healthcheck": None if health is None else _health_as_json(health),
            "Shell": list(self.shell or ()),
            "OnBuild": list(self.onbuild),
            "author": self.author,
        }
        return {name: value for name, value in members.items() if value}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ImageConfig:
        """Read what `as_json` wrote, or the `config` object of an OCI or Docker image.

        A whole image configuration (with `config` or `Config` inside, as `docker image inspect` prints
        for one image) is accepted too.

        Raises:
            InputError: a member has the wrong type; the message names it.
        """
        outer = _Members(document)
        inner = _Members(outer.mapping("config") or outer.mapping("Config") or document)
        return cls(
            env=_env(inner.strings("Env") or ()),
            entrypoint=inner.strings("Entrypoint"),
            cmd=inner.strings("Cmd"),
            workdir=inner.text("WorkingDir") or "/",
            user=inner.text("User"),
            shell=inner.strings("Shell") or None,
            labels=inner.labels(),
            exposed_ports=tuple(inner.mapping("ExposedPorts")),
            volumes=tuple(inner.mapping("Volumes")),
            stop_signal=inner.text("StopSignal"),
            healthcheck=_health_from_json(inner.mapping("Healthcheck")),
            author=inner.text("author") or outer.text("author") or outer.text("Author"),
            onbuild=inner.strings("OnBuild") or (),
            others=inner.others(),
        )


_KNOWN: Final = frozenset({
    "User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Volumes", "WorkingDir", "Labels", "StopSignal",
    "Healthcheck", "Shell", "OnBuild",
    # What stands around `config` in the configuration of an image.
    "author", "Author", "architecture", "os", "variant", "os.version", "os.features", "created",
    "config", "Config", "rootfs", "history",
})  # fmt: skip


def _env(pairs: tuple[str, ...]) -> dict[str, str]:
    env: dict[str, str] = {}
    for pair in pairs:
        # One without = has an empty value (BuildKit, parseKeyValue); one without a name is nothing.
        name, _, value = pair.partition("=")
        if name:
            env[name] = value
    return env


def _health_as_json(health: Healthcheck) -> dict[str, Any]:
    members: dict[str, Any] = {"Test": list(health.test)}
    members |= {name: getattr(health, field_name) for name, field_name in _HEALTH_NUMBERS.items()}
    return {name: value for name, value in members.items() if value}


def _health_from_json(document: Mapping[str, Any]) -> Healthcheck | None:
    if not document:
        return None
    members = _Members(document, "Healthcheck.")
    numbers = {field_name: members.number(name) for name, field_name in _HEALTH_NUMBERS.items()}
    return Healthcheck(test=members.strings("Test") or (), **numbers)


def _is_text(value: object) -> TypeGuard[str]:
    """Tell whether a value is a string that programs and files can be given.

    NUL ends a string for the kernel; a lone surrogate (from "\\ud800" in JSON) can't be written as UTF-8.
    """
    return isinstance(value, str) and not UNUSABLE_TEXT.search(value)


class _Members:
    """The members of a JSON object with their types checked; null counts as absent."""

    def __init__(self, members: Mapping[str, Any], prefix: str = "") -> None:
        self._members = members
        self._prefix = prefix

    def _wrong(self, name: str, expected: str, value: object) -> InputError:
        return InputError(
            f"{self._prefix}{name} of the image configuration: expected {expected}, found {value!r:.80}",
            hint="the format is the `config` object of the OCI image specification",
        )

    def text(self, name: str) -> str:
        value = self._members.get(name)
        if value is not None and not _is_text(value):
            raise self._wrong(name, "a string", value)
        return value or ""

    def number(self, name: str) -> int:
        value = self._members.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise self._wrong(name, "a whole number", value)
        return value or 0

    def strings(self, name: str) -> tuple[str, ...] | None:
        value = self._members.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise self._wrong(name, "a list of strings", value)
        return tuple(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._members.get(name)
        if value is not None and not (isinstance(value, dict) and all(map(_is_text, value))):
            raise self._wrong(name, "an object", value)
        return value or {}

    def others(self) -> dict[str, Any]:
        return {name: value for name, value in self._members.items() if name not in _KNOWN and value}

    def labels(self) -> dict[str, str]:
        labels = dict(self.mapping("Labels"))
        for name, value in labels.items():
            if not _is_text(value):
                raise self._wrong(f"Labels.{name}", "a string", value)
        return labels

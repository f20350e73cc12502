"""The script that starts what an image's ENTRYPOINT and CMD say, from the metadata's `EntrypointJSON`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .environment import exports
from .errors import InputError


@dataclass(frozen=True)
class Entrypoint:
    """What to start: arguments, environment, directory and user; all of it may be empty."""

    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = ""

    @classmethod
    def from_json(cls, text: str) -> Entrypoint:
        """Read `EntrypointJSON`.

        Members (any case): `EntryPoint` and `Cmd`, lists of strings or objects with `Values`; `Env`, an
        object; `User` and `Workdir`, strings or objects with `Value`.

        Raises:
            InputError: it is no JSON object or a member has another form.
        """
        try:
            document = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"EntrypointJSON of the metadata is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise InputError("EntrypointJSON of the metadata is not a JSON object")
        members = {str(name).lower(): value for name, value in document.items()}
        env = members.get("env") or {}
        if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
            raise InputError("Env in EntrypointJSON: expected an object of strings")
        return cls(
            argv=(*_strings(members, "EntryPoint"), *_strings(members, "Cmd")),
            env=env,
            workdir=_string(members, "Workdir") or "/",
            user=_string(members, "User"),
        )

    def script(self, environment_file: str) -> str:
        """Return a POSIX shell script that becomes the program; its arguments are added to the program's.

        Args:
            environment_file: a file to read variables from first.

        Raises:
            InputError: a value can't be in a script.
        """
        lines = ["#!/bin/sh", "set -e"]
        quoted = _quote(environment_file)
        lines.append(f"if [ -r {quoted} ]; then . {quoted}; fi")
        lines += exports(self.env)
        lines.append(f"cd {_quote(self.workdir)}")
        program = " ".join(_quote(argument) for argument in self.argv)
        lines.append(f'exec {self._become()}{program} "$@"')
        return "\n".join(lines) + "\n"

    def _become(self) -> str:
        user, _, group = self.user.partition(":")
        if user in ("", "0", "root") and group in ("", "0", "root"):
            return ""
        groups = "--clear-groups" if group or user.isdecimal() else "--init-groups"
        return f"setpriv --reuid={_identity(user)} --regid={_identity(group or user)} {groups} -- "


def _identity(text: str) -> str:
    """Write a user or group for setpriv, which takes even a number for a name unless a plus precedes it."""
    return f"+{text}" if text.isdecimal() and text.isascii() else _quote(text)


def _quote(text: str) -> str:
    if "\0" in text:
        raise InputError(f"the metadata has a NUL in {text!r:.60}")
    return shlex.quote(text)


def _strings(members: Mapping[str, Any], name: str) -> Sequence[str]:
    value = members.get(name.lower())
    if isinstance(value, dict):
        value = next((inner for key, inner in value.items() if key.lower() == "values"), None)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name} in EntrypointJSON: expected a list of strings")
    return value


def _string(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name.lower())
    if isinstance(value, dict):
        value = next((inner for key, inner in value.items() if key.lower() == "value"), None)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name} in EntrypointJSON: expected a string")
    return value

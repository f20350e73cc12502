"""What servers without the extensions send, read as their Dockerfiles meant it (docs/wire-protocol.md)."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .errors import ProtocolError

_EXEC_FORM = re.compile(r"RUN\s+(?:--\S+\s+)*(\[.*\])\s*", re.DOTALL | re.IGNORECASE)
_STAGE = re.compile(r"[^/:]+://")
_DOUBLE_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)


def adapted(commands: Sequence[wire.AnyCommand]) -> list[wire.AnyCommand]:
    """Put right what an old server does to RUN: it cuts exec forms up, and leaves quotes around values."""
    result: list[wire.AnyCommand] = []
    position = 0
    while position < len(commands):
        command = commands[position]
        if isinstance(command, wire.RunCommand):
            argv = _exec_form(commands, position)
            position += len(argv) or 1
            result.append(
                replace(
                    command,
                    argv=argv or command.argv,
                    env=_unquoted(command.env),
                    args=_unquoted(command.args),
                )
            )
        else:
            position += 1
            result.append(command)
    return result


def _exec_form(commands: Sequence[wire.AnyCommand], position: int) -> tuple[str, ...]:
    """Return the words of an exec form, each of which came as a command of its own; else nothing."""
    original = commands[position].original
    found = _EXEC_FORM.fullmatch(original)
    try:
        argv = json.loads(found[1]) if found else []
    except (ValueError, RecursionError):
        return ()
    if not all(isinstance(word, str) for word in argv):
        return ()
    together = commands[position : position + len(argv)]
    complete = len(together) == len(argv) and all(each.original == original for each in together)
    return tuple(argv) if complete else ()


def _unquoted(values: Mapping[str, str]) -> dict[str, str]:
    return {name: unquoted(value) for name, value in values.items()}


def unquoted(value: str) -> str:
    """Take the quotes off that enclose a whole value; any other value stays as it is."""
    if found := _DOUBLE_QUOTED.fullmatch(value):
        return re.sub(r'\\(["\\$])', r"\1", found[1])
    if len(value) > 1 and value[0] == value[-1] == "'" and "'" not in value[1:-1]:
        return value[1:-1]
    return value


def place(command: wire.CopyCommand, header: pb.ResourceChunk.ResourceHeader) -> tuple[str, str, str | None]:
    """Return target, directory and owner of an entry.

    The command's own count as long as the entry's source is the command's: a server that has two commands
    with one source sends the target of the last with both.

    Raises:
        ProtocolError: it is another file than the command's.
    """
    if command.stage:
        return _stage_target(command, header), command.workdir, command.chown or command.user
    inner = _below(command.source, header.sourcePath)
    if inner is not None:
        target = posixpath.join(command.target, inner) if inner else command.target
        return target, command.workdir, command.chown or command.user
    return header.targetPath, header.targetWorkdir or command.workdir, header.targetUser or command.chown


def _stage_target(command: wire.CopyCommand, header: pb.ResourceChunk.ResourceHeader) -> str:
    """Return the target of a file from another stage.

    An old server makes one command of each file, its target the file's name below what is written, and serves
    the last file for all that come from one directory.
    """
    if header.targetPath != command.target:
        raise ProtocolError(
            f"{command.original}: the server sent the file for {header.targetPath} in place of the one for "
            f"{command.target}; old servers mix up the files of a stage's directory: copy each by itself"
        )
    name = posixpath.basename(command.target)
    written = command.original.split()[-1]
    itself = name == posixpath.basename(header.sourcePath)
    return written if itself and posixpath.normpath(f"{written}/{name}") == command.target else command.target


def _below(source: str, path: str) -> str | None:
    """Return the rest of a path below a source, None where it is elsewhere.

    Headers have a source as it is written, cleaned by the joining of paths, or without its stage.
    """
    for text in (source, _STAGE.sub("", source)):
        for name in (text, posixpath.normpath(text)):
            if path == name:
                return ""
            if path.startswith(f"{name}/"):
                return path[len(name) + 1 :]
            if name == "." and not path.startswith("/"):
                return path
    return None

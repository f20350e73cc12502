"""Executes one RUN: makes the mount points, starts the helper (enter.py), relays its output."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import Root

from .enter import Request
from .errors import StepError
from .idmap import check_mapped
from .netfiles import network_files
from .provide import Provided, mount_points
from .stop import Stop
from .stream import BATCH_BYTES, Stream
from .users import Identity

Output = Callable[[Stream, bytes], None]

# The package is found by its path, because -I and -S keep everything else of the environment out.
_BOOTSTRAP = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from firebuild_bootstrap.guest.enter import main; main(int(sys.argv[2]))"
)
_PACKAGES = os.path.realpath(f"{__file__}/../../..")


def environment(command: wire.RunCommand, identity: Identity) -> dict[str, str]:
    """Return the whole environment of a RUN: ARG below ENV, and PATH and HOME where neither sets them."""
    return {"PATH": wire.DEFAULT_PATH, "HOME": identity.home, **command.args, **command.env}


def run(
    root: Root,
    command: wire.RunCommand,
    identity: Identity,
    stop: Stop,
    output: Output,
    *,
    provided: Provided = Provided(),  # noqa: B008 - frozen
    borrow: Callable[[str], None] = lambda _: None,
) -> None:
    """Execute a RUN and return when it and everything it started has ended.

    Args:
        root: the image.
        command: what to execute; its workdir exists.
        identity: whom it runs as.
        stop: kills it when set.
        output: takes each piece of output as (`stdout` or `stderr`, bytes); may wait.
        provided: what it has besides the image.
        borrow: see `mount_points`.

    Raises:
        StepError: it could not be started or its exit status is not 0.
        GuestError: the reason of `stop`.
    """
    check_mapped(f"USER {command.user}", identity.uid, identity.gid, identity.groups)
    request = Request(
        root=root.path,
        argv=command.argv,
        env=environment(command, identity),
        workdir=wire.absolute("/", command.workdir),
        uid=identity.uid,
        gid=identity.gid,
        groups=identity.groups,
        script=command.script,
        mounts=provided.mounts,
        hidden=provided.hidden,
        own_network=command.network == "none",
        secrets=tuple(map(len, provided.secrets)),
        secret_env=provided.variables,
        kept=provided.locks,
    )
    _check_text(request)
    with mount_points(root, provided.mounts, borrow), network_files(root):
        exit_code, report = _execute(request, provided.secrets, stop, output)
    stop.check()
    if report:
        failure = json.loads(report)
        raise StepError(failure["message"], reason=failure["reason"], exit_code=failure["exit_code"])
    if exit_code:
        raise StepError(f"the command exited with status {exit_code}", reason="command", exit_code=exit_code)


def _check_text(request: Request) -> None:
    if not request.argv or not request.argv[0]:
        raise StepError("the command is empty", reason="command", exit_code=127)
    for text in (*request.argv, *request.env, *request.env.values(), request.script or ""):
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise StepError("the command or its environment contains a NUL or a broken character")
    bad = [name for name in request.env if not name or "=" in name]
    if bad:
        raise StepError(f"the environment has an impossible name: {bad[0]!r}")


def _execute(request: Request, secrets: Sequence[bytearray], stop: Stop, output: Output) -> tuple[int, bytes]:
    with ExitStack() as stack:
        status_read, status_write = os.pipe()
        stack.callback(os.close, status_read)
        try:
            process = stack.enter_context(_helper(status_write, request.kept))
        finally:
            os.close(status_write)
        # Leaving in whatever way kills first: closing the pipes alone would wait for the process.
        stack.callback(process.kill)
        with stop.calling(process.kill):
            _send(process, request.to_bytes(), *secrets)
            _relay(process, stop, output)
            exit_code = process.wait()
        report = _read_all(status_read)
        return (exit_code if exit_code >= 0 else 128 - exit_code), report


def _helper(status: int, kept: Sequence[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOTSTRAP, _PACKAGES, str(status)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # Some Pythons find their own library only through it; the command itself gets its request's.
        env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
        pass_fds=(status, *kept),
        cwd="/",
    )


def _send(process: subprocess.Popen[bytes], *pieces: bytes | bytearray) -> None:
    if process.stdin is None:
        return
    try:
        for data in pieces:
            with memoryview(data) as view:
                sent = 0
                while sent < len(data):
                    sent += process.stdin.write(view[sent:]) or 0
    except BrokenPipeError:
        pass  # the helper has died; its exit status tells
    finally:
        process.stdin.close()


def _relay(process: subprocess.Popen[bytes], stop: Stop, output: Output) -> None:
    """Read both streams until both end, which is when the last process that could write has gone."""
    with selectors.DefaultSelector() as selector:
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ, name)
        selector.register(stop, selectors.EVENT_READ)
        while len(selector.get_map()) > 1:
            for key, _ in selector.select():
                stop.check()
                data = os.read(key.fd, BATCH_BYTES)
                if data:
                    output(key.data, data)
                else:
                    selector.unregister(key.fileobj)


def _read_all(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, BATCH_BYTES), b""))

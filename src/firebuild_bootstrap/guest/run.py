"""Executes one RUN: makes the mount points, has the helper started (enter.py), relays its output."""

from __future__ import annotations

import json
import os
import selectors
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import write_all

from .attached import Attachment, Control
from .enter import STARTED, Launcher, Request
from .errors import StepError
from .netfiles import network_files
from .provide import Provided, mount_points
from .stop import Stop
from .stream import BATCH_BYTES, Stream
from .users import Identity, check_mapped

Output = Callable[[Stream, bytes], None]


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
    launcher: Launcher | None = None,
    provided: Provided = Provided(),  # noqa: B008 - frozen
    borrow: Callable[[str], None] = lambda _: None,
    control: Control | None = None,
    configure: Callable[[], None] = lambda: None,
) -> int:
    """Execute a RUN and return when it and everything it started has ended.

    Args:
        root: the image.
        command: what to execute; its workdir exists.
        identity: whom it runs as.
        stop: kills it when set.
        output: takes each piece of output as (`stdout` or `stderr`, bytes); may wait.
        launcher: starts its helper; one of its own by default.
        provided: what it has besides the image.
        borrow: see `mount_points`.
        control: what the host says to a command with `attach`.
        configure: called when the image is as the command finds it, but for its mounts.

    Returns:
        its exit status: 0, or any of a command with `attach`.

    Raises:
        StepError: it could not be started, or its exit status is not 0 and it is a step.
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
    )
    if command.attach is not None:
        attach = command.attach
        request = request._replace(
            attached=True,
            input=attach.input,
            terminal=attach.terminal,
            read_only=attach.read_only,
            init=attach.init,
            probed=attach.probed,
        )
    _check_text(request)
    # One of `firebuild run` gets a name of its own.
    name = os.uname().nodename if command.attach is None else ""
    with mount_points(root, provided.mounts, borrow), network_files(root, name):
        configure()
        relay = _relay if control is None or command.attach is None else _attached(control, command.attach)
        exit_code, report = _execute(request, provided, launcher, stop, output, relay=relay)
    stop.check()
    if report:
        failure = json.loads(report)
        raise StepError(failure["message"], reason=failure["reason"], exit_code=failure["exit_code"])
    if exit_code and command.attach is None:
        raise StepError(f"the command exited with status {exit_code}", reason="command", exit_code=exit_code)
    return exit_code


def _check_text(request: Request) -> None:
    if not request.argv or not request.argv[0]:
        raise StepError("the command is empty", reason="command", exit_code=127)
    for text in (*request.argv, *request.env, *request.env.values(), request.script or ""):
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise StepError("the command or its environment contains a NUL or invalid Unicode")
    bad = [name for name in request.env if not name or "=" in name]
    if bad:
        raise StepError(f"the environment has an impossible name: {bad[0]!r}")


class _Ends(NamedTuple):
    """Our ends of what leads to a helper and from it; who relays closes the first."""

    stdin: int
    outputs: Mapping[Stream, int]
    status: socket.socket


_Relay = Callable[[_Ends, Stop, Output], bytes]


def _execute(
    request: Request,
    provided: Provided,
    launcher: Launcher | None,
    stop: Stop,
    output: Output,
    *,
    relay: _Relay,
) -> tuple[int, bytes]:
    with ExitStack() as stack:
        if launcher is None:
            launcher = Launcher()
            stack.callback(launcher.close)
        ends = [os.pipe() for _ in range(3)]
        (request_read, request_write), *others = ends
        for read, _ in others:
            stack.callback(os.close, read)
        out, err = others
        status, helpers = socket.socketpair()
        stack.enter_context(status)
        given = (request_read, out[1], err[1], helpers.detach())
        launcher.start(*given, *provided.locks)
        for descriptor in given:
            os.close(descriptor)
        with stop.calling(launcher.kill), _killing(launcher):
            _send(request_write, request.to_bytes(), *provided.secrets)
            report = relay(_Ends(request_write, {"stdout": out[0], "stderr": err[0]}, status), stop, output)
            exit_code = launcher.wait()
        # Who executes the command may have told of its failure before its parent sent the descriptors.
        return exit_code, (report + _read_all(status.fileno())).removesuffix(STARTED)


@contextmanager
def _killing(launcher: Launcher) -> Iterator[None]:
    """Kill the helper where the block raises: closing the pipes alone would leave it to itself."""
    try:
        yield
    except BaseException:
        launcher.kill()
        raise


def _send(descriptor: int, *pieces: bytes | bytearray) -> None:
    try:
        for data in pieces:
            write_all(descriptor, data)
    except BrokenPipeError:
        pass  # the helper has died; its exit status tells


def _attached(control: Control, attach: wire.Attach) -> _Relay:
    def relay(ends: _Ends, stop: Stop, output: Output) -> bytes:
        return Attachment(
            control,
            attach,
            stdin=ends.stdin,
            status=ends.status,
            outputs=ends.outputs,
            output=output,
            stop=stop,
        ).relay()

    return relay


def _relay(ends: _Ends, stop: Stop, output: Output) -> bytes:
    """Read both streams until both end, which is when the last process that could write has gone."""
    os.close(ends.stdin)
    with selectors.DefaultSelector() as selector:
        for name, pipe in ends.outputs.items():
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
    return b""


def _read_all(descriptor: int) -> bytes:
    return b"".join(iter(lambda: os.read(descriptor, BATCH_BYTES), b""))

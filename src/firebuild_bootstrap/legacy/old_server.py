"""A build of an old server, as the guest sees it: one call for each thing.

Such servers are Go programs in the field. What they send is read as their Dockerfiles meant it
(docs/wire-protocol.md, "Old servers").
"""

from __future__ import annotations

import codecs
import json
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.client import Client, failure
from firebuild_bootstrap.guest.copy import Incoming
from firebuild_bootstrap.guest.errors import GuestError, ProtocolError, ServerLost, StepError
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import BATCH_BYTES, Stream
from firebuild_bootstrap.layers import tar

_FAREWELL_SECONDS: Final = 10.0
_SHORTEST_PING: Final = 0.05
_PING_FAILURES: Final = 3

_EXEC_FORM: Final = re.compile(r"RUN\s+(?:--\S+\s+)*(\[.*\])\s*", re.DOTALL | re.IGNORECASE)
_STAGE: Final = re.compile(r"[^/:]+://")
_DOUBLE_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_DIRECTORIES: Final = ("", ".", "..")  # what a destination ends in that can be nothing else

# Go's os.FileMode keeps these bits elsewhere than stat(2).
_GO_BITS: Final = ((1 << 23, 0o4000), (1 << 22, 0o2000), (1 << 20, 0o1000))
# A Go server sends these without end for what it can't read, a link to a directory for example.
_EMPTY_CHUNKS: Final = 16
_MIXED_UP: Final = (
    "old servers mix up the content of files above 3.6 MB in directories: copy such a file by itself"
)
_Header = pb.ResourceChunk.ResourceHeader
_Message = TypeVar("_Message", bound=Message)


class OldServer:
    """The calls to such a server, as the executor wants them (`guest.executor.Host`).

    Entering it makes the first call, which is `Commands`: a `Ping` before it would end such a build. From
    then on pings are sent until the end.

    Args:
        client: connects.
        stop: its reason ends every call; it is set when the server has gone.
        ping_interval: seconds between pings, also how long one may take (at least five seconds).
    """

    def __init__(self, client: Client, stop: Stop, ping_interval: float) -> None:
        self._client = client
        self._stop = stop
        self._patience = client.call_timeout
        self._interval = max(ping_interval, _SHORTEST_PING)
        self._texts: Sequence[str] = ()
        self._lines: dict[Stream, _Lines] = {"stdout": _Lines(), "stderr": _Lines()}
        self._arrived: dict[str, Incoming] = {}
        self._done = threading.Event()

    def __enter__(self) -> OldServer:
        """Fetch the commands.

        Raises:
            ServerLost: the server stayed out of reach, or refused this guest.
        """
        self._texts = self._client.connect(self._fetch)
        threading.Thread(target=self._ping, name="pings", daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()

    # --- calls ----------------------------------------------------------------------------------

    def _fetch(self, channel: grpc.Channel) -> list[str]:
        self._channel = channel
        answer = self._call("Commands", pb.Empty(), self._client.connect_timeout)
        return list(_parsed(pb.CommandsResponse, answer).command)

    def _method(self, name: str) -> Any:
        # What comes is parsed by who wants it.
        return self._channel.unary_unary(
            wire.method(name), request_serializer=lambda message: message.SerializeToString()
        )

    def _call(self, name: str, request: Any, timeout: float) -> bytes:
        try:
            call = self._method(name).future(request, timeout=timeout)
        except ValueError as error:  # what gRPC says of a channel that this guest has closed, at its end
            self._stop.check()
            raise ServerLost("the connection to the server was closed") from error
        with self._stop.calling(call.cancel):
            try:
                answer: bytes = call.result()
                return answer
            except grpc.FutureCancelledError as error:
                self._stop.check()
                raise ServerLost("the connection to the server was closed") from error

    def _ping(self) -> None:
        failures = number = 0
        timeout = max(self._interval, 5.0)
        while not self._done.wait(self._interval):
            number += 1
            try:
                failures = 0 if self.ping(str(number), timeout) else failures + 1
            except ProtocolError as error:
                self._stop.set(error)
                return
            if failures == _PING_FAILURES and not self._done.is_set():
                self._stop.set(ServerLost(f"the server did not answer {_PING_FAILURES} pings in a row"))
                return

    def ping(self, identifier: str, timeout: float) -> bool:
        """Send a sign of life; False when it was not answered properly within `timeout` seconds.

        The first servers know no pings; that they say so is an answer.
        """
        try:
            answer = self._method("Ping")(pb.PingRequest(id=identifier), timeout=timeout)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNIMPLEMENTED
        except ValueError:  # the channel is closed
            return False
        return _parsed(pb.PingResponse, answer).id == identifier

    def success(self) -> None:
        """Report that every step was executed.

        Raises:
            GuestError: the server did not take it, or the guest was asked to end.
        """
        try:
            self._call("Success", pb.Empty(), _FAREWELL_SECONDS)
        except grpc.RpcError as error:
            raise ServerLost(f"the server did not take the success: {failure(error)}") from error

    def abort(self, error: GuestError) -> bool:
        """Report a failure; False when the server did not take it. Never raises: it is the last call."""
        text = error.message.encode("utf-8", "replace").decode()  # names of files need not be UTF-8
        try:
            self._method("Abort")(pb.AbortRequest(error=text), timeout=_FAREWELL_SECONDS)
        except (grpc.RpcError, ValueError):
            return False
        return True

    # --- output ---------------------------------------------------------------------------------

    def write(self, _step: int, stream: Stream, data: bytes) -> None:
        """Pass on a piece of output as lines of text; returns when the server has taken it.

        Raises:
            GuestError: it did not, or the guest was asked to end.
        """
        self._log(stream, self._lines[stream].feed(data))

    def started(self, step: int) -> None:
        """Say nothing: such servers know no steps."""

    def finished(self, _step: int, _exit_code: int, _seconds: float) -> None:
        """Pass on what has no end of a line."""
        for stream, text in self._lines.items():
            self._log(stream, text.flush())

    def _log(self, stream: Stream, lines: Sequence[str]) -> None:
        if not lines:
            return
        try:
            name = "StdErr" if stream == "stderr" else "StdOut"
            self._call(name, pb.LogMessage(line=lines), self._patience)
        except grpc.RpcError as error:
            self._stop.check()
            lost = ServerLost(f"the server no longer takes output: {failure(error)}")
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                lost = ServerLost(f"the server did not take the output within {self._patience:g} s")
            self._stop.set(lost)
            raise lost from error

    # --- steps and files ------------------------------------------------------------------------

    def steps(self) -> Iterator[wire.AnyCommand]:
        """Yield what to execute, in order; all commands were read before the first one.

        Those of unknown instructions are left out. Files say themselves where they go: each is a step of its
        own.

        Raises:
            ProtocolError: a command is malformed; the message counts from 1.
            GuestError: the files did not come.
        """
        for command in adapted(decoded(self._texts)):
            if isinstance(command, wire.CopyCommand):
                yield from self._placed(command)
            else:
                yield command

    def _placed(self, command: wire.CopyCommand) -> Iterator[wire.AnyCommand]:
        entry = None
        for header, entry in entries(self._messages(command.source)):
            target, workdir, owner = place(command, header)
            path = wire.absolute(workdir, target)
            into = not header.isDir and posixpath.basename(target) in _DIRECTORIES
            if header.isDir or command.chown is None:
                # What is missing above is root's, whosever the file is.
                above = path if into else posixpath.dirname(path)
                yield wire.WorkdirCommand(step=0, original=command.original, workdir=above)
            self._arrived[command.source] = entry
            yield replace(command, target=path, target_is_directory=into, chown=owner or None)
        if entry is None:
            raise StepError(f"the server sent no files for {command.source!r}: there is no such source")

    def files(self, resource: str) -> Iterator[Incoming]:
        """Yield the file of the step that was the last to be yielded."""
        yield self._arrived.pop(resource)

    def ask_agent(self, identifier: str, _request: bytes, _reply: object, /) -> NoReturn:
        """Refuse: an old server knows no ssh mounts."""
        raise ProtocolError(f"an old server has no SSH agent {identifier!r}")

    def instead(self, error: GuestError, seconds: float, /) -> NoReturn:  # noqa: ARG002
        """Refuse: an old server has no RUN with `pauses`."""
        raise ProtocolError("an old server sends nothing in the place of a RUN")

    def control(self) -> NoReturn:
        """Refuse: an old server has no command with `attach`."""
        raise ProtocolError("an old server has nothing to say to a command")

    def identity(self) -> NoReturn:
        """Refuse for the same reason."""
        raise ProtocolError("an old server has nothing to say of an identity")

    def _messages(self, resource: str) -> Iterator[pb.ResourceChunk]:
        """Ask for a resource, by the command's source alone."""
        method: Any = self._channel.unary_stream(
            wire.method("Resource"), request_serializer=pb.ResourceRequest.SerializeToString
        )
        call = method(pb.ResourceRequest(path=resource))
        try:
            with self._stop.calling(call.cancel), _Patience(call.cancel, self._patience) as patience:
                for message in patience.with_each(call):
                    yield _parsed(pb.ResourceChunk, message)
        except grpc.RpcError as error:
            self._stop.check()
            if patience.lost:
                message = f"the server sent nothing of {resource!r} for {self._patience:g} s"
                raise ServerLost(message) from error
            message = f"the server broke off the files of {resource!r}: {failure(error)}"
            raise ServerLost(message, reason="protocol") from error
        finally:
            call.cancel()


def _parsed(kind: type[_Message], data: bytes) -> _Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"the server sent what is not a {kind.DESCRIPTOR.name}: {error}") from error


class _Patience:
    """Calls `give_up` when the next message of a stream takes longer than `seconds` to come.

    A stream has one limit for all of it in gRPC; this one begins anew with each message, and what the guest
    does with a message does not count.
    """

    def __init__(self, give_up: Callable[[], object], seconds: float) -> None:
        self._give_up = give_up
        self._seconds = seconds
        self._since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        self.lost = False

    def __enter__(self) -> _Patience:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def with_each(self, stream: Iterator[Any]) -> Iterator[Any]:
        """Yield what the stream yields."""
        while True:
            self._since = time.monotonic()
            message = next(stream, None)
            self._since = None
            if message is None:
                return
            yield message

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self.lost = True
                self._give_up()
                return


class _Lines:
    """Turns bytes into whole lines of text; what is not UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        if len(self._rest) > BATCH_BYTES:
            lines, self._rest = [*lines, self._rest], ""
        return lines

    def flush(self) -> list[str]:
        rest = self._rest + self._decoder.decode(b"", final=True)
        self._rest = ""
        self._decoder.reset()
        return [rest] if rest else []


# --- commands -------------------------------------------------------------------------------------


def decoded(texts: Sequence[str]) -> list[wire.AnyCommand]:
    """Read commands, each a JSON object; those of unknown instructions are left out.

    Raises:
        ProtocolError: one is malformed; the message counts from 1.
    """
    commands: list[wire.AnyCommand] = []
    for number, text in enumerate(texts, 1):
        try:
            command = _decoded(text)
        except wire.WireError as error:
            raise ProtocolError(f"command {number}: {error}") from error
        commands += [command] if command else []
    return commands


def _decoded(text: str) -> wire.AnyCommand | None:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wire.WireError(f"a command is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise wire.WireError("a command is not a JSON object")
    members = _Members(parsed)
    original = members.get("OriginalCommand", str)
    bare = members.get("Command", str, "") if not original else ""
    common = {
        "step": 0,
        "original": original,
        "workdir": members.attribute("Workdir") or "/",
        "user": members.attribute("User") or "0:0",
    }
    # As it is written; what these servers add by themselves, a pre-build command or the directory of a
    # VOLUME, is a RUN without a text.
    if bare or original[:3].upper() == "RUN":
        shell = _Members(members.get("Shell", dict)).strings("Commands")
        return wire.RunCommand(
            argv=(*shell, members.get("Command", str)),
            env=members.mapping("Env"),
            args=members.mapping("Args"),
            **common,
        )
    if original[:4].upper() == "COPY" or original[:3].upper() == "ADD":
        return wire.CopyCommand(
            source=members.path("Source"),
            target=members.path("Target"),
            chown=members.attribute("UserFromLocalChown"),
            **common,
        )
    return None


class _Members:
    """The members of a JSON object by lower-case name, with their types checked."""

    def __init__(self, members: dict[Any, Any]) -> None:
        self._members = {str(key).lower(): value for key, value in members.items()}

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._members.get(name.lower())
        if value is None:
            if default is None:
                raise wire.WireError(f"a command lacks {name}")
            return default
        if not isinstance(value, kind):
            raise wire.WireError(f"{name} of a command: expected {kind.__name__}, found {value!r:.80}")
        return value

    def attribute(self, name: str) -> str | None:
        value = self._members.get(name.lower())
        if value is None:
            return None
        if not isinstance(value, dict):
            raise wire.WireError(f"{name} of a command: expected an object, found {value!r:.80}")
        return _Members(value).path("Value")

    def path(self, name: str) -> str:
        """Return a member that a system call will take, or that is compared with names of files."""
        value = str(self.get(name, str))
        # JSON can write both; neither can be in a path, nor in a name of a user.
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise wire.WireError(f"{name} of a command: {value!r:.80} contains a NUL or invalid Unicode")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.get(name, list, [])
        if not all(isinstance(item, str) for item in value):
            raise wire.WireError(f"{name} of a command: expected strings, found {value!r:.80}")
        return tuple(value)

    def mapping(self, name: str) -> dict[str, str]:
        value = self.get(name, dict, {})
        if not all(isinstance(item, str) for item in value.values()):
            raise wire.WireError(f"{name} of a command: expected string values")
        return dict(value)


# --- what a Go server means ----------------------------------------------------------------------


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


def place(command: wire.CopyCommand, header: _Header) -> tuple[str, str, str | None]:
    """Return target, directory and owner of an entry.

    The command's own count as long as the entry's source is the command's: a server that has two commands
    with one source sends the target of the last with both.

    Raises:
        ProtocolError: it is another file than the command's.
    """
    if _STAGE.match(command.source) and command.original[:4].upper() == "COPY":
        return _stage_target(command, header), command.workdir, command.chown or command.user
    inner = _below(command.source, header.sourcePath)
    if inner is not None:
        target = posixpath.join(command.target, inner) if inner else command.target
        return target, command.workdir, command.chown or command.user
    return header.targetPath, header.targetWorkdir or command.workdir, header.targetUser or command.chown


def _stage_target(command: wire.CopyCommand, header: _Header) -> str:
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


# --- files ----------------------------------------------------------------------------------------


def entries(stream: Iterator[pb.ResourceChunk]) -> Iterator[tuple[_Header, Incoming]]:
    """Cut a stream into entries that each have a header, chunks and an end.

    Raises:
        ProtocolError: content without a header, a wrong checksum, or an end in the middle of an entry. So
            does the writing of an entry's content.
    """
    for message in stream:
        if not message.HasField("header"):
            kind = message.WhichOneof("payload") or "nothing"
            raise ProtocolError(f"the server sent {kind} where the header of a file was due")
        header = message.header
        if any("\0" in text for text in (header.sourcePath, header.targetPath, header.targetWorkdir)):
            raise ProtocolError(f"{header.sourcePath!r:.200}: the server sent a path with a NUL")
        content = _content(stream, header.sourcePath)
        mode = (header.fileMode & 0o7777) | sum(bit for go, bit in _GO_BITS if header.fileMode & go)
        path, now = "" if header.isDir else header.sourcePath, time.time_ns()  # such a server does not say
        entry = tar.Entry(path, tar.DIRECTORY if header.isDir else tar.FILE, mode, mtime_ns=now)
        yield header, Incoming(entry, _chunk_writer(content), from_directory=header.isDir)
        for _ in content:  # what the receiver had no use for is still checked
            pass


def _chunk_writer(content: Iterator[bytes]) -> Callable[[int], None]:
    def write(descriptor: int) -> None:
        with open(descriptor, "wb", buffering=0, closefd=False) as file:
            for data in content:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]

    return write


def _content(stream: Iterator[pb.ResourceChunk], name: str) -> Iterator[bytes]:
    received = empty = 0
    for message in stream:
        if message.HasField("eof"):
            return
        if not message.HasField("chunk"):
            kind = message.WhichOneof("payload") or "nothing"
            raise ProtocolError(f"{name}: the server sent {kind} before the end of the file")
        data = message.chunk.chunk
        if len(data) > wire.MAX_CHUNK_BYTES:
            raise ProtocolError(f"{name}: a chunk has {len(data)} bytes, more than {wire.MAX_CHUNK_BYTES}")
        if wire.checksum(data) != message.chunk.checksum:
            wrong = f"the checksum of a chunk is wrong after {received} bytes"
            raise ProtocolError(f"{name}: {wrong}; {_MIXED_UP}")
        received += len(data)
        empty = 0 if data else empty + 1
        if empty > _EMPTY_CHUNKS:
            raise ProtocolError(f"{name}: the server sends nothing but empty chunks, it can't read the file")
        yield data
    raise ProtocolError(f"{name}: the server's stream ended in the middle of the file")

"""A guest as they are in the field, with all that they get wrong; written from the facts about them.

A program that runs in a sandbox and makes the image its root, as a microVM does. It speaks only the first
fields of every message, sends neither metadata nor deadlines, and keeps whole files in memory. Arguments:
address of the metadata service (version 1), directory of the image, variations as a JSON object:

    trims             each piece of output loses its white space at both ends
    ignores_failures  a RUN that fails is not noticed
    loses             a file of this name gets a wrong checksum on the way: the rest of the stream is lost
    breaks            the connection breaks in the middle of a file of this name
    spoils            a file of this name gets a byte more than it should
    path              PATH of the program itself
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

import grpc

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest import kernel

_DEFAULT_USER = "0:0"
_SIGNALS = {9: "killed", 13: "broken pipe", 15: "terminated"}
_SPECIAL = "*#$@!?-0123456789"


class Failed(Exception):
    """What ends the build, in the words of Go."""


def expand(text: str, known: dict[str, str]) -> str:
    """Replace `$name` and `${name}` everywhere, as os.Expand does; unknown names stay as they are."""
    result, position = "", 0
    while position < len(text):
        if text[position] != "$" or position + 1 == len(text):
            result += text[position]
            position += 1
            continue
        name, width, braces = _name(text[position + 1 :])
        if name in known:
            result += known[name]
        elif name:
            result += f"${{{name}}}" if braces else f"${name}"
        elif not width:
            result += "$"
        position += 1 + width
    return result


def _name(text: str) -> tuple[str, int, bool]:
    if text[0] == "{":
        end = text.find("}")
        if end == 1:
            return "", 2, True
        return (text[1:end], end + 1, True) if end > 0 else ("", 1, True)
    if text[0] in _SPECIAL:
        return text[0], 1, False
    width = 0
    while width < len(text) and text[width].isascii() and (text[width].isalnum() or text[width] == "_"):
        width += 1
    return text[:width], width, False


class Guest:
    def __init__(self, block: dict[str, str], variations: dict[str, Any]) -> None:
        credentials = grpc.ssl_channel_credentials(
            block["CAChain"].encode(), block["Key"].encode(), block["Cert"].encode()
        )
        options = [
            ("grpc.ssl_target_name_override", block["ServerName"]),
            ("grpc.max_receive_message_length", int(4 * 1024 * 1024 * 0.9)),
        ]
        self.channel = grpc.secure_channel(block["HostPort"], credentials, options)
        self.variations = variations
        self.interval = float(block["PingInterval"].removesuffix("s"))
        self.done = threading.Event()
        self.most_buffered = 0
        self.abandoned: list[Any] = []

    def call(self, name: str, request: Any, response: Any = pb.Empty) -> Any:
        method: Any = self.channel.unary_unary(
            f"/proto.RootfsServer/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        return method(request)

    def execute(self) -> int:
        threading.Thread(target=self.ping, daemon=True).start()
        commands = self.commands()
        try:
            for kind, command in commands:
                if kind == "RUN":
                    self.run(command)
                else:
                    self.deploy(command["source"])
        except (Failed, OSError) as error:
            self.done.set()
            self.call("Abort", pb.AbortRequest(error=str(error)))
            return 2
        self.done.set()
        self.call("Success", pb.Empty())
        return 0

    def ping(self) -> None:
        pause = self.interval
        while not self.done.wait(pause):
            identity = str(uuid.uuid4())
            if self.call("Ping", pb.PingRequest(id=identity), pb.PingResponse).id != identity:
                return
            pause = 5

    def commands(self) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for text in self.call("Commands", pb.Empty(), pb.CommandsResponse).command:
            raw = {key.lower(): value for key, value in json.loads(text).items()}
            original = str(raw.get("originalcommand", ""))
            kind = next((kind for kind in ("ADD", "COPY", "RUN") if original.startswith(kind)), "")
            if kind:
                self.check(kind, raw)
                found.append((kind, raw))
        return found

    def check(self, kind: str, raw: dict[str, Any]) -> None:
        """Types are strict; what is absent or null is empty."""
        strings = ("command",) if kind == "RUN" else ("source", "target", "originalsource")
        for name in strings:
            assert isinstance(raw.get(name) or "", str), name
        for name in ("env", "args"):
            members = raw.get(name) or {}
            assert all(isinstance(value, str) for value in members.values()), name
        for name in ("workdir", "user"):
            assert isinstance((raw.get(name) or {}).get("Value", ""), str), name
        if kind == "RUN":
            assert all(isinstance(word, str) for word in raw["shell"]["Commands"])

    # --- RUN ------------------------------------------------------------------------------------

    def run(self, command: dict[str, Any]) -> None:
        known = {**(command.get("args") or {}), **(command.get("env") or {})}
        argv = [*command["shell"]["Commands"], expand(command["command"], known)]
        try:
            process = subprocess.Popen(
                argv,
                cwd=command["workdir"]["Value"],
                env={**os.environ, **known},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as error:
            raise Failed(f"fork/exec {argv[0]}: {error.strerror}") from error
        errors: list[str] = []
        pipes = (("StdOut", process.stdout), ("StdErr", process.stderr))
        threads = [threading.Thread(target=self.relay, args=(*each, errors)) for each in pipes]
        for thread in threads:
            thread.start()
        status = process.wait()
        for thread in threads:
            thread.join()
        if self.variations.get("ignores_failures"):
            return
        if status:
            words = f"signal: {_SIGNALS.get(-status, -status)}" if status < 0 else f"exit status {status}"
            code = -1 if status < 0 else status
            raise Failed(f'command exited with code: {code}, message "{words}": {words}')
        if errors:
            raise Failed(errors[0])

    def relay(self, name: str, pipe: Any, errors: list[str]) -> None:
        with pipe:
            while data := pipe.read(32 * 1024):
                try:
                    text = data.decode("utf-8")
                except UnicodeDecodeError:
                    errors.append(
                        "rpc error: code = Internal desc = grpc: error while marshaling: "
                        "string field contains invalid UTF-8"
                    )
                    return
                if self.variations.get("trims"):
                    text = text.strip()
                self.call(name, pb.LogMessage(line=[text]))

    # --- COPY and ADD ---------------------------------------------------------------------------

    def deploy(self, source: str) -> None:
        count = 0
        held: list[io.BytesIO] = []  # released at the very end only
        for header, content in self.resources(source):
            count += 1
            held.append(content)
            self.most_buffered = max(self.most_buffered, sum(len(each.getbuffer()) for each in held))
            self.write(header, content)
        if not count:
            raise Failed("file does not exist")

    def resources(self, source: str) -> Any:
        method: Any = self.channel.unary_stream(
            "/proto.RootfsServer/Resource",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=pb.ResourceChunk.FromString,
        )
        stream = method(pb.ResourceRequest(path=source))
        header, content = pb.ResourceChunk.ResourceHeader(), io.BytesIO()
        try:
            for message in stream:
                kind = message.WhichOneof("payload")
                if kind == "header":
                    header, content = message.header, io.BytesIO()
                elif kind == "chunk":
                    wrong = header.sourcePath.endswith(self.variations.get("loses", "\0"))
                    if wrong or hashlib.sha256(message.chunk.chunk).digest() != message.chunk.checksum:
                        self.abandoned.append(stream)
                        return
                    content.write(message.chunk.chunk)
                    if header.sourcePath.endswith(self.variations.get("breaks", "\0")):
                        stream.cancel()
                else:
                    yield header, content
        except grpc.RpcError:
            return  # a broken stream is taken for its end

    def write(self, header: Any, content: io.BytesIO) -> None:
        destination = os.path.normpath("/".join(("", header.targetWorkdir, header.targetPath)))
        destination = "/" + destination.lstrip("/")
        if header.isDir:
            os.makedirs(destination, header.fileMode & 0o777, exist_ok=True)
        else:
            name = os.path.basename(os.path.normpath(header.sourcePath))
            if os.path.basename(destination) != name:
                destination = f"{destination}/{name}"
            os.makedirs(os.path.dirname(destination), 0o755, exist_ok=True)
            descriptor = os.open(destination, os.O_CREAT | os.O_RDWR, header.fileMode & 0o777)
            with open(descriptor, "wb", closefd=True) as file:
                file.write(content.getbuffer())
                if name == self.variations.get("spoils"):
                    file.write(b"!")
        if header.targetUser != _DEFAULT_USER:
            numbers = [*header.targetUser.split(":"), "-1"][:2]
            if not all(number.lstrip("-").isdigit() for number in numbers):
                raise Failed(f'strconv.Atoi: parsing "{header.targetUser}": invalid syntax')
            os.chown(destination, int(numbers[0]), int(numbers[1]))


def metadata(address: str) -> dict[str, Any]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("GET", "/latest/meta-data", headers={"accept": "application/json"})
    document: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return document


def enter(image: str) -> None:
    """Make the image the root, with /dev and /proc as in a machine."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    for name in ("dev", "proc"):
        kernel.mount(f"/{name}", f"{image}/{name}", flags=kernel.MS_BIND | kernel.MS_REC)
    os.chroot(image)
    os.chdir("/")
    os.umask(0o027)


def main(address: str, image: str, variations: dict[str, Any]) -> int:
    block = metadata(address)["Bootstrap"]
    os.environ.clear()
    os.environ["PATH"] = variations.get("path", "/usr/bin:/bin")
    os.environ["LEAKED"] = "from the guest"
    guest = Guest(block, variations)
    enter(image)
    begun = time.monotonic()
    status = guest.execute()
    print(json.dumps({"most_buffered": guest.most_buffered, "seconds": time.monotonic() - begun}))
    guest.channel.close()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))

"""What it costs to bring files to a guest, against gRPC streams of the same bytes that do nothing else.

    .venv/bin/python benchmarks/proxy_throughput.py [--runs 5] [--mib 512] [--files 20000] [--case NAME ...]

Server and client are processes of their own and speak mutual TLS, as host and guest do. `bare` is a Python
gRPC server that sends the same bytes in messages of 1 MiB to a client that drops them; where `written`, it
writes them to one file as they come, which is what `guest` has to be held against. `direct` is a session with
the server behind the proxy, `passed` through the proxy as our guests get it, `relayed` as others would; all
three are dropped. `guest` is vminit's own code, which verifies and writes it. The runs alternate, so that a
busy machine slows all; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.executor import Executor
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import join
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.machine.workspace import spread
from firebuild_bootstrap.service import BootstrapServer, Limits
from firebuild_pki import TLSMaterial, open_authority
from firebuild_pki.grpc_credentials import server_credentials

CASES = ("one", "many", "sparse")
WAYS = ("bare", "written", "direct", "passed", "relayed", "guest")
MIB = 1 << 20


def make_context(directory: Path, mib: int, files: int) -> None:
    """Make the build context: one large file, many small ones, and one that is a hole."""
    with open(directory / "one", "wb") as file:
        file.writelines(os.urandom(MIB) for _ in range(mib))
    with open(directory / "sparse", "wb") as file:
        file.truncate(2 << 30)
        file.seek(1 << 30)
        file.write(b"here")
    for number in range(files):
        path = directory / "many" / f"d{number % 100}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(700))


# --- the process that serves ----------------------------------------------------------------------


def serve(directory: Path) -> None:
    """Serve until standard input ends. Each of its lines is a case, answered with where it is served."""
    os.chdir(directory)
    with open_authority(build_id="bench") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    with BuildContext(directory / "context") as context, bare_server(server) as bare:
        for line in sys.stdin:
            case = line.strip()
            bootstrap = BootstrapServer(
                commands=[wire.CopyCommand(step=1, original="COPY", source=case, target="/copy/")],
                resources={case: context.resource([Files(case)])},
                server_material=server,
                guest_material=guest,
                events=lambda _: None,
                limits=Limits(reconnect_grace=3600, missed_pings=1000, build_timeout=36000),
                runtime_directory=directory,
            )
            with bootstrap:
                block = wire.BootstrapBlock(
                    host_port=bootstrap.start(),
                    ca_chain=guest.trust_pem.decode(),
                    cert=guest.certificate_chain_pem.decode(),
                    key=guest.private_key_pem.decode(),
                    server_name=guest.server_name,
                )
                (inner,) = directory.glob("firebuild-*/grpc")
                told = {"block": block.as_json(), "bare": bare, "direct": f"unix:{inner}"}
                print(json.dumps(told), flush=True)
                sys.stdin.readline()
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)


@contextmanager
def bare_server(material: TLSMaterial) -> Iterator[str]:
    """Serve the bytes of each case, with nothing around them."""
    data = os.urandom(MIB)

    def stream(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        left = int(request)
        yield b"x"
        yield from itertools.repeat(data, left // MIB)
        yield data[: left % MIB]

    server = grpc.server(ThreadPoolExecutor(2))
    handler: Any = grpc.unary_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"stream": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


# --- the process that receives --------------------------------------------------------------------


def receive(way: str, told: dict[str, Any], size: int) -> float:
    """Receive a case one way and return the seconds that it took from when the connection stood."""
    block = wire.BootstrapBlock.from_json(told["block"])
    stop = Stop()
    client = Client(block, stop)
    if way == "guest":
        seconds = as_guest(client, stop)
    elif way == "passed":
        seconds = client.connect(dropped)
    else:
        with channel(told.get(way, told["bare"] if way == "written" else block.host_port), block) as opened:
            if way in ("bare", "written"):
                seconds = bare_bytes(opened, size, written=way == "written")
            else:
                seconds = dropped(opened)
    client.close()
    stop.close()
    return seconds


def channel(target: str, block: wire.BootstrapBlock) -> grpc.Channel:
    """Open a connection with the guest's material."""
    credentials = grpc.ssl_channel_credentials(
        block.ca_chain.encode(), block.key.encode(), block.cert.encode()
    )
    options = [
        ("grpc.ssl_target_name_override", block.server_name),
        ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ]
    return grpc.secure_channel(target, credentials, options=options)


def dropped(opened: grpc.Channel) -> float:
    """Receive a session up to the end of its files, and drop it."""
    method: Any = opened.stream_stream(wire.method("Session"))
    over = threading.Event()

    def says() -> Iterator[bytes]:
        yield pb.FromGuest(hello=pb.Hello(version=messages.VERSION)).SerializeToString()
        over.wait()

    call = method(says())
    next(call)  # the step
    began = time.monotonic()
    end = pb.ToGuest(files_end=pb.FilesEnd()).SerializeToString()
    while next(call) != end:
        pass
    seconds = time.monotonic() - began
    over.set()
    call.cancel()
    return seconds


def bare_bytes(opened: grpc.Channel, size: int, *, written: bool) -> float:
    """Receive the bare stream, and drop it or write it to the disk."""
    method: Any = opened.unary_stream("/bench/stream")
    call = method(str(size).encode(), timeout=600)
    next(call)
    with tempfile.TemporaryFile(dir=".", buffering=0) as file:
        began = time.monotonic()
        for data in call:
            if written:
                file.write(data)
        return time.monotonic() - began


def as_guest(client: Client, stop: Stop) -> float:
    """Copy the case into an empty image as vminit does."""
    with (
        tempfile.TemporaryDirectory(dir=".") as directory,
        Root(directory) as root,
        join(client, stop, 5.0) as host,
    ):
        began = time.monotonic()
        Executor(root, host, stop).execute()
        return time.monotonic() - began


# --- the comparison -------------------------------------------------------------------------------


Measured = tuple[str, str, float, float, int, int]


def processor_seconds(pid: int) -> float:
    """Return what a process has used so far (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(directory: Path, cases: list[str], runs: int) -> Iterator[Measured]:
    """Yield case, way, median seconds and processor seconds, and the most memory (MiB) of both processes."""
    serving = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert serving.stdin is not None
    assert serving.stdout is not None
    for case in cases:
        files = (directory / "context" / case).rglob("*")
        size = sum(path.stat().st_size for path in files) or (directory / "context" / case).stat().st_size
        size = MIB if case == "sparse" else size
        found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
        for run in range(runs + 1):
            for way in WAYS:
                serving.stdin.write(f"{case}\n")
                serving.stdin.flush()
                told = serving.stdout.readline()
                command = [sys.executable, __file__, "--receive", way, case, str(size)]
                before = processor_seconds(serving.pid)
                done = subprocess.run(
                    command, input=told, stdout=subprocess.PIPE, text=True, check=True, cwd=directory
                )
                if run:  # the first one brought the files into memory
                    seconds, used, memory = map(float, done.stdout.split())
                    used += processor_seconds(serving.pid) - before
                    found[way].append((seconds, used, int(memory)))
                serving.stdin.write("\n")
                serving.stdin.flush()
                served = int(serving.stdout.readline())
        for way, values in found.items():
            seconds, used = (statistics.median(value[column] for value in values) for column in (0, 1))
            yield case, way, seconds, used, max(value[2] for value in values), served
    serving.stdin.close()
    serving.wait()


def table(cases: list[str], runs: int, mib: int = 512, files: int = 20_000) -> Iterator[str]:
    """Measure, and yield the lines of a table as they come."""
    directory = Path(tempfile.mkdtemp(prefix="firebuild-bench-"))
    try:
        spread(directory)  # as those of builds: what the last case made is not in the way
        (directory / "context").mkdir()
        make_context(directory / "context", mib, files)
        yield "| what | way | seconds | bare : this | CPU seconds | receiver's memory | server's so far |"
        yield "|---|---|---|---|---|---|---|"
        limit = 0.0
        for case, way, seconds, used, memory, served in measured(directory, cases, runs):
            limit = seconds if way == "bare" else limit
            row = (case, way, f"{seconds:.2f}", f"{limit / seconds:.2f}", f"{used:.2f}", f"{memory} MiB")
            yield f"| {' | '.join(row)} | {served} MiB |"
    finally:
        shutil.rmtree(directory)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--receive", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.receive:
        way, _, size = arguments.receive
        told, began = json.load(sys.stdin), time.process_time()
        seconds = receive(way, told, int(size))
        print(
            seconds, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        )
        return
    for line in table(arguments.case, arguments.runs, arguments.mib, arguments.files):
        print(line, flush=True)


if __name__ == "__main__":
    main()

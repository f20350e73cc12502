"""What it costs to bring files to a guest, against gRPC streams of the same bytes that do nothing else.

Server and client are processes of their own and speak mutual TLS, as host and guest do. The bare stream is
of a Python gRPC server that sends the same bytes in messages of 1 MiB to a client that drops them; the one
that is written goes into one file as it comes, and nothing that writes is faster, but for the messages.
`direct` is a session with the server behind the proxy, `passed` through the proxy as our guests get it,
`relayed` as others would; all three are dropped. The guest is vminit's own code, which verifies and writes.

With one file the guest needs 0.28 s of a processor more than the bare stream: 0.16 to write, and the rest
for the proxy and to read the file. It took 2.0 to 2.3 times as long before pieces travelled in one frame
and one write each, and while the proxy spliced in place of copying. On a busy machine the ratios vary: at
load 6 the guest took 1.14 and 1.32 times as long as the bare stream in two runs (0.89 and 1.45 times the
written one), and at load 12, when the disk was what held both up, 2.1 (0.70). Of the 20,000
files the bare streams make one or none.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import grpc

from benchmarks.shape import Benchmark, Row, Run
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

MIB: Final = 1 << 20
ONE, MANY = "a file of 512 MiB", "20,000 files of 700 bytes"
BARE, WRITTEN = "bare gRPC stream", "bare gRPC stream, written"
# By the case, and the way that is ours.
WAYS: Final = {
    ("one", "direct"): (Row(f"{ONE}, session without the proxy", BARE),),
    ("one", "passed"): (Row(f"{ONE}, session through the proxy", BARE),),
    ("one", "relayed"): (Row(f"{ONE}, session of an old guest, relayed", BARE),),
    ("one", "guest"): (
        Row(f"{ONE}, to the guest's disk", BARE, "s", 1.25),
        Row(f"{ONE}, to the guest's disk", WRITTEN),
    ),
    ("many", "guest"): (
        Row(f"{MANY}, to the guest's disk", BARE),
        Row(f"{MANY}, to the guest's disk", WRITTEN),
    ),
}
CPU: Final = Row(f"{ONE}, to the guest's disk, both processes", BARE, "s CPU")


def make_context(directory: Path) -> None:
    """Make the build context: one large file, many small ones."""
    with open(directory / "one", "wb") as file:
        file.writelines(os.urandom(MIB) for _ in range(512))
    for number in range(20_000):
        path = directory / "many" / f"d{number % 100}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(700))


# --- the process that serves ----------------------------------------------------------------------


def serve(directory: Path) -> None:
    """Serve until standard input ends. Each of its lines is a case, answered with where it is served."""
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


def processor_seconds(pid: int) -> float:
    """Return what a process has used so far (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Transfers:
    """The process that serves, and those that receive, one after the other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._serving = subprocess.Popen(
            [*PROGRAM, "serve", str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.memory: dict[tuple[str, str], int] = {}
        """The most of a receiver, in MiB."""
        self.served = 0
        """The most of the server."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.communicate(timeout=60)

    def cost(self, case: str, way: str) -> tuple[float, float]:
        """Receive a case one way; return the seconds by the clock, and of the processor in both processes."""
        path = self._directory / "context" / case
        size = sum(each.stat().st_size for each in path.rglob("*")) or path.stat().st_size
        told = self._answer(case)
        before = processor_seconds(self._serving.pid)
        words = [*PROGRAM, "receive", str(self._directory), way, str(size)]
        done = subprocess.run(words, input=told, stdout=subprocess.PIPE, text=True, check=True)
        seconds, used, memory = map(float, done.stdout.split())
        used += processor_seconds(self._serving.pid) - before
        self.memory[case, way] = max(self.memory.get((case, way), 0), int(memory))
        self.served = int(self._answer(""))
        return seconds, used

    def _answer(self, line: str) -> str:
        assert self._serving.stdin is not None
        assert self._serving.stdout is not None
        self._serving.stdin.write(f"{line}\n")
        self._serving.stdin.flush()
        if answer := self._serving.stdout.readline():
            return answer
        raise RuntimeError(f"the process that serves ended with {self._serving.wait()}")


def measure(run: Run) -> None:
    """Receive each case in each way."""
    spread(run.directory)  # as those of builds: what the last case made is not in the way
    (run.directory / "context").mkdir()
    make_context(run.directory / "context")
    with Transfers(run.directory) as transfers:
        for case in ("one", "many"):
            ways = ["bare", "written", *(way for of, way in WAYS if of == case)]
            for number in range(run.rounds + 1):
                cost = {way: transfers.cost(case, way) for way in ways}
                if number:  # the first one brought the files into memory
                    add(run, case, cost)
        memory = ", ".join(f"{case} {way} {size}" for (case, way), size in transfers.memory.items())
        run.note(f"most memory in MiB of the receivers: {memory}; of the server: {transfers.served}")


def add(run: Run, case: str, cost: dict[str, tuple[float, float]]) -> None:
    """Add the pairs of a round."""
    peers = {BARE: cost["bare"], WRITTEN: cost["written"]}
    for (of, way), rows in WAYS.items():
        for row in rows if of == case else ():
            run.add(row, cost[way][0], peers[row.against][0])
    if case == "one":
        run.add(CPU, cost["guest"][1], cost["bare"][1])


PROGRAM: Final = (sys.executable, "-m", "benchmarks.session_stream")
ROWS: Final = (*itertools.chain.from_iterable(WAYS.values()), CPU)
BENCHMARK: Final = Benchmark("session-stream", __doc__, ROWS, measure, rounds=3)


def main() -> None:
    """Be the process that serves, or one that receives."""
    role, directory, *arguments = sys.argv[1:]
    os.chdir(directory)
    if role == "serve":
        serve(Path(directory))
        return
    way, size = arguments
    told, began = json.load(sys.stdin), time.process_time()
    seconds = receive(way, told, int(size))
    used = time.process_time() - began
    print(seconds, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    main()

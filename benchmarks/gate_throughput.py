"""What the gate costs: a resource through the public port, against the gRPC server behind it.

    .venv/bin/python benchmarks/gate_throughput.py [--runs 7]

Both ways are mutual TLS and both clients a process of their own, as the guest is. The runs alternate, so
that a busy machine slows both; the ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import grpc

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry, EntryKind, Resource
from firebuild_bootstrap.service import BootstrapServer, Limits
from firebuild_pki import TLSMaterial, open_authority

SIZE = 64 << 20
SOURCE = "big"


class OneFile(Resource):
    """A resource of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> Iterator[Entry]:
        """Yield the file."""
        size = self._path.stat().st_size
        yield Entry(SOURCE, SOURCE, EntryKind.FILE, mode=0o644, mtime_ns=0, size=size, open=self._open)

    def _open(self) -> BinaryIO:
        return self._path.open("rb")


def receive(target: str, material: dict[str, str]) -> float:
    """Receive the resource from `target` and return the seconds that it took after the first message."""
    credentials = grpc.ssl_channel_credentials(
        material["trust"].encode(), material["key"].encode(), material["chain"].encode()
    )
    options = [
        ("grpc.ssl_target_name_override", material["server_name"]),
        ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ]
    with grpc.secure_channel(target, credentials, options=options) as channel:
        resource = channel.unary_stream(
            wire.method("Resource"),
            request_serializer=pb.ResourceRequest.SerializeToString,
            response_deserializer=pb.ResourceChunk.FromString,
        )
        messages = resource(pb.ResourceRequest(path=SOURCE), metadata=(wire.GUEST_HELLO,), timeout=120)
        next(messages)  # the connection stands
        began = time.monotonic()
        received = sum(len(message.chunk.chunk) for message in messages)
        seconds = time.monotonic() - began
    if received != SIZE:
        raise SystemExit(f"expected {SIZE} bytes, received {received}")
    return seconds


def measure(target: str, guest: TLSMaterial) -> float:
    """Let another process receive the resource and return the seconds."""
    material = {
        "trust": guest.trust_pem.decode(),
        "key": guest.private_key_pem.decode(),
        "chain": guest.certificate_chain_pem.decode(),
        "server_name": guest.server_name,
    }
    command = [sys.executable, __file__, "--client", target]
    done = subprocess.run(command, input=json.dumps(material), stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def compare(directory: Path, runs: int) -> dict[str, float]:
    """Return the median seconds of both ways."""
    content = directory / "content"
    content.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    command = wire.CopyCommand(step=1, original="COPY big /", source=SOURCE, target="/")
    with open_authority(build_id="bench") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    bootstrap = BootstrapServer(
        commands=[wire.encode_command(command)],
        resources={SOURCE: OneFile(content)},
        server_material=server,
        guest_material=guest,
        events=lambda _: None,
        limits=Limits(reconnect_grace=3600, missed_pings=1000),  # nobody pings, and not all pass the gate
        runtime_directory=directory,
    )
    with bootstrap:
        gate = bootstrap.start()
        (inner,) = directory.glob("firebuild-*/grpc")
        targets = {"gate": gate, "direct": f"unix:{inner}"}
        times: dict[str, list[float]] = {name: [] for name in targets}
        for run in range(runs + 1):
            for name, target in targets.items():
                seconds = measure(target, guest)
                if run:  # the first one brought the file into memory
                    times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--client", metavar="TARGET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        print(receive(arguments.client, json.load(sys.stdin)))
        return
    with tempfile.TemporaryDirectory() as directory:
        seconds = compare(Path(directory), arguments.runs)
    rates = {name: SIZE / (1 << 20) / value for name, value in seconds.items()}
    print("| what | gate | direct | ratio |\n|---|---|---|---|")
    ratio = seconds["gate"] / seconds["direct"]
    print(f"| 64 MiB | {rates['gate']:.0f} MiB/s | {rates['direct']:.0f} MiB/s | {ratio:.2f} |")


if __name__ == "__main__":
    main()

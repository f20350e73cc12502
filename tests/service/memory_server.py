"""A server in a process of its own, so that its memory is nobody else's:
`python memory_server.py DIRECTORY SECONDS-PER-EVENT`.

Prints its address and its guest's credentials as one line of JSON, and serves until standard input ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from firebuild_bootstrap import wire
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.service import BootstrapServer, Limits, StepInfo
from firebuild_pki import open_authority

_SIZE = 64 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path

    def entries(self) -> Iterator[Entry]:
        yield Entry(
            source="zeros",
            path="zeros",
            kind=tar.FILE,
            mode=0o644,
            mtime_ns=0,
            size=self.path.stat().st_size,
            open=lambda: self.path.open("rb"),
        )


def main() -> None:
    """Serve a COPY, and RUN steps whose scripts take most of a message."""
    directory, seconds_per_event = Path(sys.argv[1]), float(sys.argv[2])
    zeros = directory / "zeros"
    zeros.touch()
    os.truncate(zeros, _SIZE)
    commands: list[wire.AnyCommand] = [
        wire.RunCommand(step=step, original="RUN :", argv=("/bin/sh", "-c", ":" * 120_000))
        for step in range(3, 31)
    ]
    commands.insert(0, wire.CopyCommand(step=2, original="COPY . /to/", source="step-2", target="/to/"))
    with open_authority(build_id="b7") as authority:
        server_material, guest = authority.issue_server(), authority.issue_guest()
        with BootstrapServer(
            commands=commands,
            resources={"step-2": _File(zeros)},
            steps=[StepInfo(step, step, "") for step in range(2, 31)],
            server_material=server_material,
            guest_material=guest,
            events=lambda _: time.sleep(seconds_per_event),
            limits=Limits(max_log_bytes=1 << 40, ping_interval=60),
            runtime_directory=directory,
        ) as server:
            address = server.start()
            material = {
                name: value.decode()
                for name in ("certificate_chain_pem", "private_key_pem", "trust_pem")
                if isinstance(value := getattr(guest, name), bytes)
            }
            print(
                json.dumps({"address": address, "name": guest.server_name, **material}),
                flush=True,
            )
            sys.stdin.read()


if __name__ == "__main__":
    main()

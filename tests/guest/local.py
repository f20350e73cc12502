"""The guest's executor in this process, against a real server: for what needs no sandbox."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.errors import GuestError
from firebuild_bootstrap.guest.executor import Executor
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import join
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.legacy.old_server import OldServer
from guest.build import copy_command, make_block
from guest.pki import Pki
from guest.server import BuildServer, Chunks


class Local:
    """Executes commands in `image`."""

    def __init__(self, pki: Pki, server: BuildServer, image: Path) -> None:
        self.server = server
        self.image = image
        self.stop = Stop()
        self.client = Client(make_block(pki, server), self.stop)
        self.root = Root(str(image))

    def close(self) -> None:
        self.client.close()
        self.root.close()
        self.stop.close()

    def execute(self, *commands: wire.AnyCommand | pb.ToGuest | str) -> None:
        self.server.commands = list(commands)
        self.server.old = self.server.old or any(isinstance(command, str) for command in commands)
        with self.calls() if self.server.old else join(self.client, self.stop, 5.0) as host:
            try:
                Executor(self.root, host, self.stop).execute()
            except GuestError as error:
                if not self.server.old:
                    host.abort(error)
                raise

    def calls(self) -> OldServer:
        return OldServer(self.client, self.stop, 5.0)

    def refusal(self, *commands: wire.AnyCommand | pb.ToGuest | str) -> GuestError:
        with pytest.raises(GuestError) as caught:
            self.execute(*commands)
        return caught.value

    def copy(self, chunks: Chunks, target: str, **fields: Any) -> None:
        self.server.resources["files"] = chunks
        self.execute(copy_command(target, **fields))

    def refused(self, chunks: Chunks, target: str = "/target", **fields: Any) -> GuestError:
        self.server.resources["files"] = chunks
        return self.refusal(copy_command(target, **fields))

    def tree(self) -> dict[str, str]:
        """What is in the image except /etc: file contents, `dir`, or `-> text` of a link."""
        found = {}
        for path in sorted(self.image.rglob("*")):
            name = str(path.relative_to(self.image))
            if name.split("/", maxsplit=1)[0] == "etc":
                continue
            if path.is_symlink():
                found[name] = f"-> {path.readlink()}"
            else:
                found[name] = "dir" if path.is_dir() else path.read_bytes().decode()
        return found

    def mode(self, path: str) -> int:
        return stat.S_IMODE((self.image / path).lstat().st_mode)

    def owner(self, path: str) -> tuple[int, int]:
        found = os.lstat(self.image / path)
        return found.st_uid, found.st_gid

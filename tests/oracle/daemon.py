"""BuildKit: its daemon in a directory of its own, and builds by it. `buildkit/build` makes the programs."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from support import BUILDKIT

_CONFIG = """\
root = "{state}/buildkit"
[grpc]
address = ["unix://{state}/socket"]
[worker.oci]
binary = "{runc}"
snapshotter = "overlayfs"
networkMode = "host"
gc = false
[worker.containerd]
enabled = false
"""


def version() -> str:
    """Return the version that `buildkit/build` builds, such as `v0.34.2`."""
    found = re.search(
        r"github.com/moby/buildkit (\S+)", (Path(__file__).parent / "buildkit/go.mod").read_text()
    )
    assert found
    return found[1]


class RefusedError(Exception):
    """BuildKit did not build it; the message is its own, on one line."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to build.

    Args:
        context: the directory with the files, and the Dockerfile unless `dockerfile` names its directory.
        args: build arguments.
        secrets: their files, by id.
        contexts: directories that FROM and --from may name.
        images: OCI layouts that FROM and --from may name, each with the digest of its manifest.
        output: the value of buildctl's --output; empty to throw the result away.
        cached: whether results of earlier builds may be used.
    """

    context: Path
    dockerfile: Path | None = None
    args: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    platform: str = ""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    contexts: Mapping[str, Path] = field(default_factory=dict)
    images: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    output: str = ""
    cached: bool = False

    def options(self) -> list[str]:
        """Return the arguments of `buildctl build`."""
        words = ["--frontend=dockerfile.v0", f"--local=context={self.context}"]
        words.append(f"--local=dockerfile={self.dockerfile or self.context}")
        for name, directory in self.contexts.items():
            words += [f"--local={name}={directory}", f"--opt=context:{name}=local:{name}"]
        for name, (directory, digest) in self.images.items():
            words += [
                f"--oci-layout={name}={directory}",
                f"--opt=context:{name}=oci-layout://{name}@{digest}",
            ]
        words += (f"--opt=build-arg:{name}={value}" for name, value in self.args.items())
        words += [f"--opt=target={self.target}"] if self.target else []
        words += [f"--opt=platform={self.platform}"] if self.platform else []
        words += (f"--secret=id={name},src={path}" for name, path in self.secrets.items())
        words += [f"--output={self.output}"] if self.output else []
        return words if self.cached else [*words, "--no-cache"]


class BuildKit:
    """A daemon that listens on a Unix socket below `state`, and ends with the `with` block. Needs root."""

    def __init__(self, state: Path, programs: Path = BUILDKIT) -> None:
        self._state = state
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        runc = shutil.which("runc")
        if runc is None or not (self._programs / "buildkitd").exists():
            raise FileNotFoundError("BuildKit or runc is not there; run tests/oracle/buildkit/build")
        config = self._state / "buildkitd.toml"
        config.write_text(_CONFIG.format(state=self._state, runc=runc))
        with (self._state / "log").open("wb") as log:
            # Whatever becomes of this process, the daemon ends with it.
            command = [
                "setpriv",
                "--pdeathsig",
                "TERM",
                str(self._programs / "buildkitd"),
                "--config",
                str(config),
            ]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 30
        while subprocess.run(
            [*self._buildctl(), "debug", "workers"], check=False, capture_output=True
        ).returncode:
            if self._process.poll() is not None or time.monotonic() > end:
                self._stop()
                raise RuntimeError((self._state / "log").read_text()[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self._process is not None
        return self._process.pid

    def _buildctl(self) -> list[str]:
        return [str(self._programs / "buildctl"), "--addr", f"unix://{self._state / 'socket'}"]

    def prune(self) -> None:
        """Forget all results and files of earlier builds."""
        subprocess.run([*self._buildctl(), "prune", "--all"], capture_output=True, check=True)

    def build(self, order: Order) -> None:
        """Build.

        Raises:
            RefusedError: it did not.
        """
        command = [*self._buildctl(), "build", "--progress=plain", *order.options()]
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
        if done.returncode:
            message = done.stderr.rpartition("error: failed to solve: ")[2]
            raise RefusedError(" ".join(message.split()))

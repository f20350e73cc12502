"""The layer of a step goes back over the session, whole and in pieces that the protocol allows."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.errors import StepError
from firebuild_bootstrap.guest.executor import Executor
from firebuild_bootstrap.guest.stream import join
from firebuild_bootstrap.layers.reader import LayerReader
from firebuild_bootstrap.layers.tar import Sink, write_layer
from firebuild_bootstrap.layers.tree import upper_entries
from guest.build import workdir_command
from guest.local import Local

pytestmark = pytest.mark.root


class Kept:
    """Layers of steps that are done, each in a directory as an overlay leaves it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, step: int, out: Sink) -> None:
        write_layer(out, upper_entries(str(self._directory / str(step))))


def test_a_layer_arrives_as_the_archive_that_was_written(local: Local, tmp_path: Path) -> None:
    content = os.urandom(3_500_000) + b"end"  # zeros there would be a hole
    (tmp_path / "layers/2/d").mkdir(parents=True)
    (tmp_path / "layers/2/d/f").write_bytes(content)
    local.server.commands = [workdir_command("/w"), pb.ToGuest(checkpoint=pb.Checkpoint(step=2))]
    with join(local.client, local.stop, 5.0) as host:
        executor = Executor(local.root, host, local.stop)
        steps = host.steps()
        next(steps)
        host.finished(2, 0, 0.1)
        executor._layers = Kept(tmp_path / "layers")  # type: ignore[assignment]
        executor._give_layer(next(steps))  # type: ignore[arg-type]
        assert list(steps) == []
        host.success()
    (layer,) = local.server.layers
    reader = LayerReader(io.BytesIO(layer))
    found = {entry.path: b"".join(bytes(data) for _, data in reader.pieces()) for entry in reader}
    assert found == {"": b"", "d": b"", "d/f": content}
    assert local.server.successes == 1


def test_a_layer_that_can_not_be_read_fails_its_step(local: Local, tmp_path: Path) -> None:
    local.server.commands = [workdir_command("/w"), pb.ToGuest(checkpoint=pb.Checkpoint(step=2))]
    with join(local.client, local.stop, 5.0) as host:
        executor = Executor(local.root, host, local.stop)
        executor._layers = Kept(tmp_path / "none")  # type: ignore[assignment]
        steps = host.steps()
        next(steps)
        host.finished(2, 0, 0.1)
        with pytest.raises(StepError, match="the layer of step 2 can't be sent") as caught:
            executor._give_layer(next(steps))  # type: ignore[arg-type]
        assert host.abort(caught.value)
    assert [abort.reason for abort in local.server.aborts] == ["file"]

"""The last step of a build: the machine's root file system becomes an image, and is delivered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.outputs import Artifact, OutputSpec, deliver
from firebuild_bootstrap.image.store import ImageRecord, StoredImage
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.resolving import Resolved


@dataclass(frozen=True)
class Origin:
    """Which build an image is from, and whose certificates that build had; see `ImageRecord`."""

    build_id: str
    ca_provider: str
    issuer_fingerprint: str


Export = Callable[[Sequence[OutputSpec], Path], tuple[Artifact, ...]]
"""Writes the outputs of a build into a directory; nothing where its root file system is out of reach."""


def store(
    export: Export,
    request: BuildRequest,
    resolved: Resolved,
    origin: Origin,
    home: Home,
    *,
    made_of: str = "",
) -> StoredImage | None:
    """Write the outputs of a machine that has ended, and store them as one image.

    Args:
        export: writes them.
        request: which, and where to.
        resolved: what was built.
        origin: by which build.
        home: where.
        made_of: names what the outputs are written from, and how. An image under the same names that was
            made of the same is left as it is.

    Returns:
        the image; None where the machine's drive is out of reach.

    Raises:
        MachineError: the drive can't be read, or the disk is full. Nothing is stored then.
        Interrupted: `home.check` raised it.
    """
    same = _stored_already(request, resolved, made_of, home)
    if same is not None:
        for spec, artifact in zip(request.outputs, same.record.outputs, strict=True):
            deliver(same.directory / artifact.path, spec, home.trees)
        return same
    with home.images.stage() as staging:
        artifacts = export(request.outputs, staging.path)
        if not artifacts:
            return None
        record = ImageRecord(
            tag=str(request.tag),
            also_tagged=tuple(map(str, request.also_tagged)),
            build_id=origin.build_id,
            created=_created(request.epoch),
            firebuild_version=version("firebuild"),
            base=resolved.reference,
            base_digest=resolved.base.digest if resolved.base else "",
            ca_provider=origin.ca_provider,
            issuer_fingerprint=origin.issuer_fingerprint,
            config=resolved.graph.target.config,
            outputs=tuple(artifacts),
            made_of=made_of,
        )
        home.check()
        for spec, artifact in zip(request.outputs, artifacts, strict=True):
            deliver(staging.path / artifact.path, spec, home.trees)
        with home.tasks.task("storing the image"):
            return home.images.commit(staging, record)


def _stored_already(
    request: BuildRequest, resolved: Resolved, made_of: str, home: Home
) -> StoredImage | None:
    if not made_of:
        return None
    try:
        image, *others = [home.images.find(tag, hold=True) for tag in (request.tag, *request.also_tagged)]
    except MachineError:  # a damaged one is replaced
        return None
    if image is None or image.record.made_of != made_of:
        return None
    if any(other is None or other.directory != image.directory for other in others):
        return None
    same = image.record.config == resolved.graph.target.config and image.is_untouched()
    return image if same else None


def _created(epoch: int | None) -> str:
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(epoch, UTC)
    return moment.isoformat(timespec="seconds")

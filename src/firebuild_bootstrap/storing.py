"""The last step of a build: its layers become an image, and the forms that were asked for are delivered."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap import __version__
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.attestations import has_provenance, keep_provenance, reuse_documents
from firebuild_bootstrap.image.forms import held_form, keep_form, reuse_forms
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, StoredLayer
from firebuild_bootstrap.image.oci import is_layer_of
from firebuild_bootstrap.image.outputs import Artifact, Deliveries, OutputType
from firebuild_bootstrap.image.store import ImageLayer, ImageRecord, StoredImage
from firebuild_bootstrap.layers.tree import copy_file
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.resolving import Resolved
from firebuild_pki.values import dataclass

_BASE: Final = "base.tar"


@dataclass(frozen=True)
class Origin:
    """Which build an image is from, and whose certificates that build had; see `ImageRecord`."""

    build_id: str
    ca_provider: str
    issuer_fingerprint: str


def store(
    layers: Sequence[Layer],
    request: BuildRequest,
    resolved: Resolved,
    origin: Origin,
    home: Home,
    *,
    provenance: Callable[[], Mapping[str, Any]] | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> StoredImage:
    """Store layers as one image, after the forms of it that are wanted are written.

    Args:
        layers: what the target is made of, the lowest first; held by the caller.
        request: which forms, and where to.
        resolved: what was built.
        origin: by which build.
        home: where.
        provenance: returns what is kept beside the image about its build; None for none.
        notice: told what a form could not keep.

    Returns:
        the image. One under the same names that is the same is left as it is, with its forms, and with the
        provenance of the build that made it. One under some of them gives the others what is known of it.

    Raises:
        InputError: the files need more than the size that is asked for.
        MachineError: the disk is full. Nothing is stored then.
        Interrupted: `home.check` raised it.
    """
    layers = [_in_one_piece(layer, request, resolved, home, notice) for layer in layers]
    history = _history(layers, request.epoch, resolved, home)
    record = ImageRecord(
        tag=str(request.tag),
        also_tagged=tuple(map(str, request.also_tagged)),
        build_id=origin.build_id,
        created=_newest(history, request, resolved),
        firebuild_version=__version__,
        base=resolved.reference,
        base_digest=resolved.base.digest if resolved.base else "",
        ca_provider=origin.ca_provider,
        issuer_fingerprint=origin.issuer_fingerprint,
        config=resolved.graph.target.config,
        layers=tuple(_described(layer, resolved, home) for layer in layers),
        layer_store=home.layers.root.name if any(isinstance(each, StoredLayer) for each in layers) else "",
        platform=resolved.graph.target.platform,
        epoch=request.epoch,
        history=history,
    )

    found = _found(request, home)
    same = next((each for each in found if each and _is_same(each, record, layers, home)), None)
    if same is not None:
        record = record.joined(same.record)
        everywhere = all(each is not None and each.directory == same.directory for each in found)
        if everywhere and record.build_id == same.record.build_id:
            _write_forms(same.directory, layers, same.record, request, home)
            _keep_provenance(same.directory, provenance)
            return same.refreshed()
    older = same or next((each for each in found if each and _is_made_of(each, record)), None)
    with home.images.stage() as staging:
        _link_archives(layers, record, staging.path)
        if older is not None and older.record.epoch == record.epoch:
            reuse_forms(older.directory, staging.path)
        if same is not None:
            reuse_documents(same.directory, staging.path)
        _write_forms(staging.path, layers, record, request, home)
        _keep_provenance(staging.path, provenance)
        keys = [each.key for each in record.layers or () if each.key]
        with home.tasks.task("storing the image"), home.cache.naming(keys) if keys else nullcontext():
            return home.images.commit(staging, record)


def _link_archives(layers: Sequence[Layer], record: ImageRecord, directory: Path) -> None:
    for layer, described in zip(layers, record.layers or (), strict=True):
        if isinstance(layer, ArchiveLayer) and described.archive:
            _link(layer.path, directory / described.archive)
            if described.archive == OutputType.TAR.file_name:
                keep_form(directory, _as_form(described))


def _keep_provenance(directory: Path, provenance: Callable[[], Mapping[str, Any]] | None) -> None:
    if provenance is not None and not has_provenance(directory):
        keep_provenance(directory, provenance())


def _write_forms(
    directory: Path, layers: Sequence[Layer], record: ImageRecord, request: BuildRequest, home: Home
) -> None:
    """Write the forms that are asked for into the directory of an image, and to their destinations."""
    with Deliveries(home.trees) as deliveries:
        for spec in request.outputs:
            if spec.type.has_layers:
                if spec.dest is not None:  # or it goes to standard output, once it is stored
                    image = StoredImage(request.tag, directory, directory, record)
                    home.outgoing.deliver([((request.tag, *request.also_tagged), image)], spec, deliveries)
                continue
            with held_form(
                directory, lambda: home.layers.merged(layers), spec, home.trees, epoch=request.epoch
            ) as made:
                home.check()
                deliveries.copy(made, spec)


def _is_of_base(layer: Layer, resolved: Resolved) -> bool:
    return any(layer in base.layers for base in resolved.bases.values())


def _in_one_piece(
    layer: Layer, request: BuildRequest, resolved: Resolved, home: Home, notice: Callable[[str], None]
) -> Layer:
    """Return other layers as they are, and a machine's archive without times after SOURCE_DATE_EPOCH.

    What a form of it can't keep is told.
    """
    if isinstance(layer, StoredLayer) or _is_of_base(layer, resolved):
        return layer
    if request.epoch is not None or any(spec.type is not OutputType.TAR for spec in request.outputs):
        _, report = home.layers.unpacked(layer.path, layer.digest)
        for note in report.notes("the machine's drive"):
            notice(note)
    if request.epoch is None:
        return layer
    path = layer.path.with_name("dated.tar")
    return ArchiveLayer(path, home.trees.pack(home.layers.merged([layer]), path, newest=request.epoch).digest)


def _described(layer: Layer, resolved: Resolved, home: Home) -> ImageLayer:
    if isinstance(layer, StoredLayer):
        size = home.layers.size(layer.key) if layer.outside else home.cache.size(layer.key)
        return ImageLayer(size, key=layer.key, outside=layer.outside)
    # What a machine leaves as one archive is the image's tar form as well.
    name = _BASE if _is_of_base(layer, resolved) else OutputType.TAR.file_name
    return ImageLayer(layer.path.stat().st_size, archive=name, digest=layer.digest)


def _history(
    layers: Sequence[Layer], epoch: int | None, resolved: Resolved, home: Home
) -> tuple[Mapping[str, Any], ...]:
    """Say how the image was made (config.md, "history"), after what the base says about itself.

    A layer is from when it was made, and what adds none from when that below it was: so what comes from the
    cache again is the same image again, as with BuildKit. With SOURCE_DATE_EPOCH nothing is younger.
    """
    base = resolved.base
    below = len(base.layers) if base is not None else 0
    said = base.history if base is not None else ()
    if base is not None and sum(map(is_layer_of, said)) != below:  # nobody verifies what comes from outside
        # When it was imported is no property of it: another machine makes the same image of the same base.
        dated = {} if epoch is None else {"created": _time(epoch)}
        said = ({**dated, "created_by": f"FROM {base.name}"},) * below
    chain = resolved.graph.chain(resolved.graph.target)
    instructions = [each for stage in chain for each in stage.instructions]
    own = layers[below:]
    if below + sum(is_step for _, is_step in instructions) != len(layers):
        # A machine has left its root in one piece, base and all.
        said = tuple({**each, "empty_layer": True} for each in said)
        instructions = [(text, False) for text, _ in instructions] + [("firebuild", True)] * len(layers)
        own = layers
    found = [dict(each) if epoch is None else _no_younger(each, epoch) for each in said]
    made, when = iter(own), found[-1].get("created", "") if found else ""
    for text, is_step in instructions:
        if is_step:
            when = _time(_made(next(made), home) if epoch is None else epoch)
        elif epoch is not None:
            when = _time(epoch)
        entry: dict[str, Any] = {"created": when} if when else {}
        found.append({**entry, "created_by": text, **({} if is_step else {"empty_layer": True})})
    return tuple(found)


def _newest(history: Sequence[Mapping[str, Any]], request: BuildRequest, resolved: Resolved) -> str:
    """Return when an image was made: with its newest layer; where none has a time, when its base came."""
    dated = next((each["created"] for each in reversed(history) if "created" in each), None)
    if dated is not None or request.epoch is not None:
        return dated or _time(request.epoch or 0)
    return resolved.base.imported if resolved.base is not None else _time(time.time())


def _made(layer: Layer, home: Home) -> float:
    """Return when a layer was made; one that is not in the cache comes from the machine just now."""
    return (home.cache.created(layer.key) if isinstance(layer, StoredLayer) else 0) or time.time()


def _no_younger(step: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """Return an entry of a history with a time that is no later; one that can't be read is later."""
    try:
        moment = datetime.fromisoformat(step["created"])
        late = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() > epoch
    except KeyError:
        return dict(step)
    except (ValueError, OverflowError):
        late = True
    return {**step, "created": _time(epoch)} if late else dict(step)


def _as_form(layer: ImageLayer) -> Artifact:
    return Artifact(OutputType.TAR, layer.archive, layer.size, layer.digest)


def _link(archive: Path, target: Path) -> None:
    """Keep an archive under one more name, so that it stays when the base is removed; it takes no room."""
    try:
        os.link(archive, target)
    except OSError:  # the store is spread over several file systems
        try:
            with open(archive, "rb") as reader, open(target, "wb") as writer:
                copy_file(reader.fileno(), writer.fileno())
        except OSError as error:
            raise MachineError(f"{target} could not be written: {error.strerror}") from error


def _found(request: BuildRequest, home: Home) -> list[StoredImage | None]:
    """Return the images that have the names of the request, held until their store is closed."""
    found = list[StoredImage | None]()
    for tag in (request.tag, *request.also_tagged):
        image = None
        with suppress(MachineError):  # a damaged one is replaced
            image = home.images.find(tag, hold=True)
        found.append(image)
    return found


def _is_made_of(image: StoredImage, record: ImageRecord) -> bool:
    """Whether an image has the same files with the same times in all forms."""
    old, new = image.record, record
    if old.layers is None or new.layers is None or old.epoch != new.epoch:
        return False
    return [layer.identity for layer in old.layers] == [layer.identity for layer in new.layers]


def _is_same(image: StoredImage, record: ImageRecord, layers: Sequence[Layer], home: Home) -> bool:
    old = image.record
    if (old.config, old.platform, old.history) != (record.config, record.platform, record.history):
        return False
    if old.source is None or _is_made_of(image, record):
        return _is_made_of(image, record)
    # What came from outside has layers of its own, whatever is in them.
    outside = [layer.outside.diff_id for layer in old.layers or () if layer.outside]
    try:
        if len(outside) != len(layers) or outside != home.layers.diff_ids(layers, record.epoch):
            return False
        home.intake.unpack(image)
    except (InputError, MachineError):  # something of it is lost
        return False
    return home.intake.has_all_blobs(image)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).isoformat()

"""The directory where everything is kept, and the tools that work in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.bases import BaseStore, PullPolicy
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.content_store import may_enter
from firebuild_bootstrap.image.forms import held_form
from firebuild_bootstrap.image.intake import Intake
from firebuild_bootstrap.image.layertrees import LayerTrees
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputSpec
from firebuild_bootstrap.image.store import ImageStore, StoredImage, diff_ids_of, image_id
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine import workspace
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import Host, IdMap, Sandbox, expected
from firebuild_bootstrap.sandbox.idmap import single
from firebuild_bootstrap.solve.cache import Cache

if TYPE_CHECKING:
    from firebuild_bootstrap.image.outgoing import Outgoing

IdChoice = Literal["auto", "full", "subids", "single"]
# Where users have directories of their own; images and bases have records, which tell of them.
_PRIVATE = (
    *("*", "blobs/*", "builds/*", "failed/*", "layers/*", "runs/*", "drives/*", "drives/*/content/*"),
    *("cache-mounts/*", "cache-mounts/*/*", "cache-mounts/*/*/*"),
)


class Home:
    """Bases, images and running builds below one directory; parts are made when they are first used.

    Args:
        root: the directory; it need not exist yet.
        ids: the id mapping to use, or `auto` for the best that works here.
        check: called again and again while something long goes on; what it raises ends that.
        tasks: receives the progress of long work.
        pull: fetches an image from its registry into this directory, as `image.bases.Pull`; None where no
            registry can be asked.
        policy: when it does.
    """

    def __init__(
        self,
        root: Path,
        *,
        ids: IdChoice = "auto",
        check: Callable[[], None] = lambda: None,
        tasks: Tasks | None = None,
        pull: Callable[[Home, Reference], StoredImage | None] | None = None,
        policy: PullPolicy = PullPolicy.MISSING,
    ) -> None:
        self.root = root.absolute()  # the process may change its directory meanwhile
        self.check = check
        self.tasks = tasks or Tasks()
        self.policy = policy
        self._ids = ids
        self._pull = pull

    def limited(self, check: Callable[[], None], tasks: Tasks | None = None) -> Home:
        """Return the same directory for one build, which has to be closed.

        Args:
            check: asked, too, by all long work.
            tasks: receives the progress of long work; by default that of this directory.
        """

        def both() -> None:
            self.check()
            check()

        return Home(
            self.root,
            ids=self._ids,
            check=both,
            tasks=tasks or self.tasks,
            pull=self._pull,
            policy=self.policy,
        )

    @cached_property
    def idmap(self) -> IdMap:
        """The owners that sandboxes know.

        Raises:
            MachineError: no sandbox can be made here, or not with the wanted mapping.
        """
        if self._ids == "single":
            return single(Host.current(), "machine.ids is set to single")
        idmap = expected()
        if self._ids not in ("auto", idmap.mode.value):
            raise MachineError(
                f"machine.ids is {self._ids}, but for this user only {idmap.mode.value} works here",
                hint=idmap.note or "use machine.ids: auto",
            )
        return idmap

    @cached_property
    def trees(self) -> Trees:
        """The tools for file trees, in the id mapping."""
        return Trees(Sandbox(self.idmap, check=self.check), tasks=self.tasks)

    @cached_property
    def images(self) -> ImageStore:
        """The finished images."""
        return ImageStore(self.root, lambda: self.trees, self._names_of_bases)

    def _names_of_bases(self) -> tuple[Reference, ...]:
        return self.bases.names()

    @cached_property
    def bases(self) -> BaseStore:
        """What builds start from."""
        pull = self._pull
        return BaseStore(
            self.root,
            lambda: self.trees,
            images=self.images,
            identify=self.image_id,
            diff_ids=lambda image: diff_ids_of(image, self.layers),
            pull=None if pull is None else lambda wanted: pull(self, wanted),
            policy=self.policy,
            unpack=lambda image: self.intake.unpack(image) if image.record.layers else None,
            tasks=self.tasks,
        )

    @cached_property
    def blobs(self) -> BlobStore:
        """The blobs of images from outside, and of those that went out."""
        return BlobStore(self.root, named=self.images.blob_digests, check=self.check)

    @cached_property
    def layers(self) -> LayerTrees:
        """The unpacked layers in the id mapping of this user's builds."""
        return LayerTrees(self.root, self.trees, check=self.check)

    @cached_property
    def cache(self) -> Cache:
        """The results of steps that builds share."""
        return Cache(self.layers, named=lambda: self.images.layer_keys(self.layers.root.name))

    @cached_property
    def intake(self) -> Intake:
        """Takes images in that come from outside."""
        return Intake(self.images, self.layers, self.blobs, naming=self.cache.naming, tasks=self.tasks)

    @cached_property
    def outgoing(self) -> Outgoing:
        """Makes blobs and archives of images."""
        from firebuild_bootstrap.image.outgoing import Outgoing

        return Outgoing(self.layers, self.blobs, self.trees)

    def image_id(self, image: StoredImage) -> str:
        """Return the id of an image; see `image_id`."""
        return image_id(image, self.layers)

    def form(
        self, image: StoredImage, spec: OutputSpec, *, any_size: bool = False, changed: bool = False
    ) -> Path:
        """Return the path of a form of an image; it is the same after the image was built again.

        Args and errors are those of `held_form`.
        """
        with self.held_form(image, spec, any_size=any_size, changed=changed) as path:
            return image.location / path.name

    @contextmanager
    def held_form(
        self, image: StoredImage, spec: OutputSpec, *, any_size: bool = False, changed: bool = False
    ) -> Iterator[Path]:
        """Give the path of a form of an image, which nobody else writes again meanwhile.

        Args:
            image: held by the caller.
            spec: which form; it is written if it is not there.
            any_size: as in `forms.held_form`.
            changed: as in `forms.held_form`.

        Raises:
            InputError, MachineError: as `StoredImage.layers` and `forms.held_form`.
        """
        if image.record.layers is None and (path := image.output(spec.type)) is not None:
            yield image.directory / path.name  # what its name leads to may be removed meanwhile
            return
        layers = image.layers(self.layers.root.name)
        with held_form(
            image.directory,
            lambda: self.layers.merged(layers),
            spec,
            self.trees,
            epoch=image.record.epoch,
            any_size=any_size,
            changed=changed,
        ) as path:
            yield path

    def workspace(self, build_id: str) -> Workspace:
        """Make the private directory of one build; see `Workspace`."""
        return Workspace(self.root, build_id, self.idmap, check=self.check, tasks=self.tasks)

    def closed(self) -> list[Path]:
        """Return the directories of this one that only another user may enter: builds, runs and the like.

        What lies deeper may belong to subordinate ids of this user.
        """
        there = (path for pattern in _PRIVATE for path in self.root.glob(pattern))
        return sorted(path for path in there if path.is_dir() and not may_enter(path))

    def retire_dead(self) -> None:
        """Have the cache hold what dead builds had finished; costs next to nothing without any."""
        with suppress(OSError):  # whoever needs the store says what is wrong with it
            workspace.retire_dead(self.root)

    def sweep(self) -> None:
        """Have what dead builds left behind removed in the background; costs next to nothing without any."""
        workspace.sweep(self.root)

    def close(self) -> None:
        """Let go of the bases, images, blobs and layers that builds hold."""
        self.bases.close()
        if "blobs" in vars(self):
            self.blobs.close()
        if "layers" in vars(self):
            self.layers.close()

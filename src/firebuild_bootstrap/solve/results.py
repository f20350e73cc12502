"""What the stages of one build start from and leave behind: layers, found in the cache or made.

A stage need not run at all if the cache has the result of each of its steps; otherwise it starts from those
that are there. So the stages that have to run are found from the target backwards: one is needed where a step
that is not cached takes from it or lies on it.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    CacheMount,
    Copy,
    Files,
    Graph,
    ImageRef,
    Operation,
    Run,
    Stage,
    StageRef,
    Step,
    TreeRef,
    trees_of,
)
from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer, LayerTrees, StoredLayer
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.lowering import literal
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.solve.cache import LINKED, Cache, Entry, above, new_id
from firebuild_bootstrap.solve.inputs import takes_files
from firebuild_bootstrap.solve.keys import Parts, StageKeys, inputs_of
from firebuild_bootstrap.solve.rescue import Plan, PlannedStep
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.solve.remote import RemoteCaches


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The cache as one build sees it.

    Args:
        cache: of the store.
        keys: of all stages, by their indexes.
        fresh: whether all steps of a stage are executed, whatever the cache has.
        unchanged: whether the files that an operation took are still those that its key was made of.
        notice: told what could not be kept.
        puts_between: whether a machine can put a layer that is there between those that it makes.
    """

    cache: Cache
    keys: Mapping[int, StageKeys]
    fresh: Callable[[Stage], bool]
    unchanged: Callable[[Operation, Parts], bool]
    notice: Callable[[str], None]
    puts_between: bool = False


@dataclass(frozen=True)
class Start:
    """Where a stage begins.

    Args:
        layers: what it begins on, the lowest first.
        done: how many of its steps they hold.
        tip: those of them in the cache that tell what there is: the uppermost that was made on what lies
            below it, and all that were made apart and lie on that.
        on: the name of what they are together (`solve.cache.above`).
        linked: layers of later steps that are there, because they are made apart, by their place.
    """

    layers: tuple[Layer, ...]
    done: int = 0
    tip: tuple[Entry, ...] = ()
    on: str = ""
    linked: Mapping[int, Entry] = field(default_factory=dict)

    def all_layers(self, first: int) -> tuple[Layer, ...]:
        """Return what a machine begins on, and what it finds later; `first` numbers the first step."""
        later = (StoredLayer(entry.id, first + place) for place, entry in self.linked.items())
        return (*self.layers, *later)

    def with_entries(self, entries: Sequence[Entry], done: int) -> Start:
        """Return the start `entries` higher."""
        layers, tip, on = self.layers, self.tip, self.on
        for entry in entries:
            layers = (*layers, StoredLayer(entry.id))
            tip = (*tip, entry) if entry.linked else (entry,)
            on = above(on, entry.id, linked=entry.linked)
        return Start(layers, done, tip, on)


class Making:
    """A stage at work: its steps become entries of the cache. One thread at a time may use it.

    Args:
        shared: the cache.
        steps: those that are executed, in their order, with what their keys are made of.
        replace: whether nothing that others have made is as good.
    """

    def __init__(
        self, shared: Shared, steps: Sequence[tuple[PlannedStep, Step, Parts]], *, replace: bool
    ) -> None:
        self._shared = shared
        self._steps = steps
        self._replace = replace
        self._usual: dict[int, bool] = {}
        self._plan: Plan | None = None
        self.entries: list[Entry] = []
        """Those that are there by now."""

    def survive(self, workspace: BuildDirectory, stored: LayerTrees) -> None:
        """See to it that a kill of this process loses no finished step.

        Raises:
            MachineError: the plan can't be written.
        """
        planned = [step for step, _, _ in self._steps]
        self._plan = Plan(workspace, stored.home, planned, replace=self._replace)

    def finished(self, number: int) -> None:
        """Take note of a step that has ended well: later its files may not be those any more that it took."""
        for planned, step, parts in self._steps:
            if planned.number == number:
                self._is_usual(planned, step, parts)

    def commit(self, number: int, directory: Path) -> Path | None:
        """Put the layer of a finished step into the cache, unless one before it is missing.

        Returns:
            where its tree is now; None where it was not put there.

        Raises:
            FirebuildError: the store can't be written.
        """
        if len(self.entries) == len(self._steps):
            return None
        planned, step, parts = self._steps[len(self.entries)]
        if planned.number != number:
            return None
        usual = self._is_usual(planned, step, parts) and (parts.linked or all(self._usual.values()))
        # What nobody can ask for is of use to this build all the same.
        key = planned.key if usual else secrets.token_hex(32)
        self.entries.append(
            planned.commit(self._shared.cache, directory, key=key, replace=self._replace or not usual)
        )
        return self.entries[-1].path

    def commit_all(self, machine: Machine) -> None:
        """Put all that is left in a machine that has stopped into the cache.

        Raises:
            FirebuildError: the store can't be written.
        """
        for layer in machine.layers():
            self.commit(layer.step, layer.directory)
        if self._plan is not None:
            self._plan.close()

    def _is_usual(self, planned: PlannedStep, step: Step, parts: Parts) -> bool:
        """Whether the files that a step took are still those of its key; they are looked at once."""
        if planned.sure:
            return True
        if planned.number not in self._usual:
            same = self._usual[planned.number] = self._shared.unchanged(step.operation, parts)
            if not same:
                text = f"{step.origin.location}: its files changed while they were sent: not cached"
                self._shared.notice(text)
            elif self._plan is not None:
                self._plan.sure(planned.number)
        return self._usual[planned.number]


class Results:
    """The results of the stages of one build. Several threads may use it.

    Args:
        graph: what there is to do.
        bases: the images that it names, by their references.
        shared: the cache.
        stored: the store of unpacked layers.
        trees: the tools for trees.
        directory: returns an existing directory for archives of whole stages.
    """

    def __init__(
        self,
        graph: Graph,
        bases: Mapping[str, Base],
        *,
        shared: Shared,
        stored: LayerTrees,
        trees: Trees,
        directory: Callable[[], Path],
    ) -> None:
        self._graph = graph
        self._bases = bases
        self._shared = shared
        self._stored = stored
        self._trees = trees
        self._directory = directory
        self._made: dict[int, tuple[Layer, ...]] = {}
        self._tips: dict[int, Start] = {}
        self._renewed: dict[int, bool] = {}
        self._packing = threading.Lock()
        self._committed = False
        self._remote: RemoteCaches | None = None
        for base in bases.values():  # what images are made of must stay, whoever removes and prunes them
            for layer in base.layers:
                if isinstance(layer, StoredLayer):
                    stored.required(layer.key)

    # --- before anything runs -------------------------------------------------------------------

    def pending(self) -> tuple[Stage, ...]:
        """Return the stages that have something to execute, in the order of the graph."""
        found: set[int] = set()
        self._visit(self.target, found)
        return tuple(stage for stage in self._graph.stages if stage.index in found)

    def ask(self, remote: RemoteCaches) -> tuple[Stage, ...]:
        """Look at remote caches as well, and bring the layers here that are of use; see `pending`.

        What is executed afterwards begins on what is here: `settled`.

        Raises:
            MachineError: the store can't be written.
        """
        self._remote, self._committed = remote, True
        while True:
            for known in (self._made, self._tips, self._renewed):
                known.clear()
            pending = self.pending()
            if remote.fetch(self._needed(pending).items()):
                return pending

    def settled(self) -> None:
        """Look at no remote cache from now on: what is of use is here."""
        self._remote = None

    def _needed(self, pending: Sequence[Stage]) -> dict[str, str]:
        """Return the ids of the layers that have to be here, each with what the first below it lies on."""
        needed: dict[str, str] = {}

        def need(stage: Stage, layers: Sequence[Layer]) -> None:
            on = self._on(stage)
            needed.update((layer.key, on) for layer in layers if isinstance(layer, StoredLayer))

        if not pending:
            need(self.target, self._made[self.target.index])
        for stage in pending:
            if (start := self._start(stage)) is not None:
                need(stage, start.layers)
            done = self.cached(stage)
            linked = self._linked(stage, done)
            needed.update((entry.id, "") for entry in linked.values())
            for place, step in enumerate(stage.steps[done:], done):
                for tree in trees_of(step.operation) if place not in linked else ():
                    if isinstance(tree, StageRef) and (maker := self.maker(tree.index)).index in self._made:
                        need(maker, self._made[maker.index])
        return needed

    def origins(self, stage: Stage) -> dict[int, str]:
        """Return the remote caches that cached steps of a stage come from, by the places of the steps."""
        if self._remote is None or (start := self._start(stage)) is None:
            return {}
        done = min(start.done, self._unrenewed(stage))
        own = start.layers[len(start.layers) - start.done :][:done]
        ids = {place: layer.key for place, layer in enumerate(own) if isinstance(layer, StoredLayer)}
        ids |= {place: entry.id for place, entry in self._between(stage, done).items()}
        found = {place: self._remote.origin(identity) for place, identity in ids.items()}
        return {place: origin for place, origin in found.items() if origin}

    @property
    def target(self) -> Stage:
        """The stage that makes the target's root file system."""
        return self.maker(self._graph.target.index)

    def maker(self, index: int) -> Stage:
        """Return the stage that makes what a stage is: another one, where it has no step but its FROM."""
        stage = self._graph.stage(index)
        while not stage.steps and isinstance(stage.base, StageRef):
            stage = self._graph.stage(stage.base.index)
        return stage

    def _visit(self, stage: Stage, pending: set[int]) -> None:
        if stage.index in pending or stage.index in self._made:
            return
        start = self._start(stage)
        if isinstance(stage.base, StageRef) and (start is None or self._is_renewed(stage.base.index)):
            self._visit(self.maker(stage.base.index), pending)
            start = self._start(stage)
        done = min(start.done, self._unrenewed(stage)) if start is not None else 0
        # With --no-cache the target runs, even if there is nothing to execute in it.
        runs = stage == self.target and self._shared.fresh(stage)
        if start is not None and done == len(stage.steps) and not runs:
            self._made[stage.index] = start.layers
            self._tips[stage.index] = start
            return
        pending.add(stage.index)
        if isinstance(stage.base, StageRef):
            self._visit(self.maker(stage.base.index), pending)  # it counts as it is now
        linked = self._between(stage, done)
        for place, step in enumerate(stage.steps[done:], done):
            for tree in trees_of(step.operation) if place not in linked else ():
                if isinstance(tree, StageRef):
                    self._visit(self.maker(tree.index), pending)

    def _unrenewed(self, stage: Stage) -> int:
        """Return how many steps of a stage, from the first, need nothing that is to be executed anew."""
        if isinstance(stage.base, StageRef) and self._is_renewed(stage.base.index):
            return 0
        for place, step in enumerate(stage.steps):
            trees = trees_of(step.operation)
            if any(isinstance(tree, StageRef) and self._is_renewed(tree.index) for tree in trees):
                return place
        return 0 if self._shared.fresh(stage) else len(stage.steps)

    def _is_renewed(self, index: int) -> bool:
        """Whether a stage is to be executed anew, at least in part, whatever the cache has."""
        stage = self.maker(index)
        index = stage.index
        if index not in self._renewed:
            self._renewed[index] = self._shared.fresh(stage) or self._unrenewed(stage) < len(stage.steps)
        return self._renewed[index]

    def parts(self, stage: Stage) -> tuple[Parts, ...]:
        """Return what the keys of a stage's steps are made of."""
        return self._shared.keys[stage.index].steps

    def beginning(self, mount: CacheMount) -> str:
        """Return what names the files that a cache mount with `from` begins with, in all builds."""
        return self._beginnings[mount.tree, mount.source]

    @cached_property
    def _beginnings(self) -> Mapping[tuple[TreeRef, str], str]:
        return {
            (found.tree, found.source): known.digest
            for stage in self._graph.stages
            for step, parts in zip(stage.steps, self.parts(stage), strict=True)
            for found, known in zip(inputs_of(step.operation), parts.inputs, strict=True)
            if isinstance(found, BindMount)
        }

    def cached(self, stage: Stage) -> int:
        """Return how many steps of a stage need not be executed, because the cache has their results."""
        start = self._start(stage)
        return min(start.done, self._unrenewed(stage)) if start is not None else 0

    def linked(self, stage: Stage) -> frozenset[int]:
        """Return the places of the steps after those that are cached, too: their layers are made apart."""
        return frozenset(self._between(stage, self.cached(stage)))

    def start(self, stage: Stage) -> Start:
        """Return where a stage begins; all that it needs of others is done."""
        start = self._start(stage)
        if start is None:
            raise FirebuildError(f"the stage {stage.title} began before what it is based on was done")
        return replace(start, linked=self._between(stage, start.done))

    def _start(self, stage: Stage) -> Start | None:
        """Return where a stage would begin now; None while its base is not there."""
        below = self._below(stage.base)
        keys = self._shared.keys[stage.index]
        made = self.maker(stage.base.index).index if isinstance(stage.base, StageRef) else -1
        if below is not None and made in self._tips:
            # Whatever another build has made of it since: all stages of this one begin on the same.
            start = self._tips[made]
            chain = keys.steps
        else:
            start = Start(self._bottom(stage), on=self._on(stage))
            chain = keys.chain
        before = len(chain) - len(stage.steps)
        entries = self._find(chain[:before] if self._shared.fresh(stage) else chain, start.on)
        if len(entries) < before:
            return None if below is None else Start(below, on=start.on)
        return start.with_entries(entries, len(entries) - before)

    def _find(self, chain: Sequence[Parts], on: str) -> list[Entry]:
        linked = frozenset(parts.key for parts in chain if parts.linked)
        found = self._shared.cache.find([parts.key for parts in chain], on, linked)
        return found if self._remote is None else self._remote.longer(found, chain, on)

    def _between(self, stage: Stage, done: int) -> dict[int, Entry]:
        """Return those of `_linked` that the machine puts between the layers that it makes."""
        return self._linked(stage, done) if self._shared.puts_between else {}

    def _linked(self, stage: Stage, done: int) -> dict[int, Entry]:
        """Return the layers of those steps after the first `done` that are the same whatever comes before."""
        if self._shared.fresh(stage):
            return {}
        found: dict[int, Entry] = {}
        for place, parts in enumerate(self._shared.keys[stage.index].steps[done:], done):
            trees = trees_of(stage.steps[place].operation)
            renewed = any(isinstance(tree, StageRef) and self._is_renewed(tree.index) for tree in trees)
            if parts.linked and not renewed:
                found.update((place, entry) for entry in self._find((parts,), ""))
        return found

    def _below(self, base: TreeRef) -> tuple[Layer, ...] | None:
        match base:
            case StageRef(index):
                return self._made.get(self.maker(index).index)
            case ImageRef(reference):
                return self._bases[reference].layers
            case _:
                return ()

    def _bottom(self, stage: Stage) -> tuple[Layer, ...]:
        """Return the layers of the image at the very bottom of a stage."""
        base = self._graph.bottom(stage)
        return self._bases[base.reference].layers if isinstance(base, ImageRef) else ()

    @cached_property
    def _all_keys(self) -> frozenset[str]:
        return frozenset(parts.key for keys in self._shared.keys.values() for parts in keys.steps)

    def _on(self, stage: Stage) -> str:
        """Return what a layer names as its parent that lies on the image at the very bottom of a stage.

        It is the same wherever the image came from.
        """
        base = self._graph.bottom(stage)
        return self._bases[base.reference].digest if isinstance(base, ImageRef) else ""

    # --- afterwards -----------------------------------------------------------------------------

    def begin(self, stage: Stage, start: Start, first: int, workspace: BuildDirectory) -> Making:
        """Prepare what is to become of the steps of a stage whose machine is about to start.

        Args:
            stage: the stage.
            start: where it begins.
            first: number of the stage's first step.
            workspace: of the machine, from where finished steps are saved after a kill (`FINISHED`).

        Raises:
            MachineError: the plan for that can't be written.
        """
        base = self._on(stage)
        steps, on = [], start.on
        # What is there is as good as what a machine makes that can't put it between.
        there = self._linked(stage, start.done)
        for place, step in list(enumerate(stage.steps))[start.done :]:
            parts = self._shared.keys[stage.index].steps[place]
            identity = there[place].id if place in there else new_id(parts.key)
            below, on = on, above(on, identity, linked=parts.linked)
            if place in start.linked:
                continue
            sources = self._sources(step)
            # What a stage has without a key, because its files changed meanwhile, has none elsewhere, either.
            usual = self._all_keys.issuperset(dict(sources))
            planned = PlannedStep(
                number=first + place,
                key=parts.key if usual else secrets.token_hex(32),
                identity=identity,
                parent=LINKED if parts.linked else below,
                base=base,
                text=step.origin.text,
                sources=sources,
                sure=not takes_files(step.operation),
            )
            steps.append((planned, step, parts))
        making = Making(self._shared, steps, replace=self._is_renewed(stage.index))
        making.survive(workspace, self._stored)
        return making

    def keep(self, stage: Stage, start: Start, making: Making, machine: Machine) -> None:
        """Keep what the machine of a stage has made, which has stopped, in the cache if it can be there.

        Raises:
            FirebuildError: the store can't be written.
        """
        making.commit_all(machine)
        entries = list(making.entries)
        self._committed = self._committed or bool(entries)
        if len(entries) + len(start.linked) == len(stage.steps) - start.done:
            for place, entry in sorted(start.linked.items()):
                entries.insert(place - start.done, entry)
            end = start.with_entries(entries, len(stage.steps))
            self._made[stage.index], self._tips[stage.index] = end.layers, end
            return
        if entries:  # its tree is without the layers that are in the cache by now
            missing = len(stage.steps) - start.done - len(start.linked) - len(entries)
            raise MachineError(
                f"{missing} layers of the stage {stage.title} did not come back from its machine"
            )
        if (tree := machine.tree()) is not None:
            self._made[stage.index] = (tree,)

    def _sources(self, step: Step) -> tuple[tuple[str, str], ...]:
        trees = trees_of(step.operation)
        indexes = {self.maker(tree.index).index for tree in trees if isinstance(tree, StageRef)}
        known = (self._tips[index].tip for index in sorted(indexes) if index in self._tips)
        return tuple(entry.source for tip in known for entry in tip)

    def archive(self, tree: TreeRef) -> Path | None:
        """Return an archive of what this build takes from an image or a stage that is done.

        Returns:
            it, with more in it where that is there already; None where the tree is empty.

        Raises:
            MachineError: it can't be written.
        """
        match tree:
            case ImageRef(reference):
                layers = self._bases[reference].layers
                name = f"image-{list(self._bases).index(reference)}.tar"
            case StageRef(index):
                layers, name = self._made[self.maker(index).index], f"stage-{index}.tar"
            case _:
                return None
        match layers:
            case ():
                return None
            case (ArchiveLayer(path),):
                return path
        with self._packing:
            if not (path := self._directory() / name).exists():
                steps = [step for stage in self._graph.stages for step in stage.steps]
                only = sorted({pattern for step in steps for pattern in taken_of(step.operation, tree)})
                self._trees.pack(self._stored.merged(layers), path, only=only)
        return path

    def layers(self) -> tuple[Layer, ...] | None:
        """Return what the target is made of; None where its root file system is out of reach."""
        return self._made.get(self.target.index)

    def exported(self, remote: RemoteCaches, *, every: bool) -> list[Entry]:
        """Return what goes to a remote cache: parents before what lies on them, and each once.

        Args:
            remote: knows what is not here.
            every: of every stage; otherwise of that which makes the target's root file system.
        """
        self._remote = remote
        keys = self._shared.keys
        exported: dict[str, Entry] = {}
        for stage in self._graph.stages if every else (self.target,):
            for parts, entry in zip(keys[stage.index].chain, self._results_of(stage), strict=False):
                if entry is None or entry.key != parts.key:  # nobody could ask for it
                    break
                exported[entry.id] = entry
        self._remote = None
        return list(exported.values())

    def _results_of(self, stage: Stage) -> Iterable[Entry | None]:
        """Return what this build has of a stage, from the base up."""
        made = self._made.get(self.maker(stage.index).index)
        if made is None:
            return self._find(self._shared.keys[stage.index].chain, self._on(stage))
        own = made[len(self._bottom(stage)) :]
        remote = self._remote
        return (
            remote.entry(layer.key) if remote and isinstance(layer, StoredLayer) else None for layer in own
        )

    def trim(self, limit: Callable[[], int]) -> None:
        """Let the cache have at most `limit()` bytes, if this build has put anything into it."""
        if self._committed:
            with suppress(FirebuildError):
                self._shared.cache.prune(max_size=limit(), sweep=False)


def taken_of(operation: Operation, tree: TreeRef) -> Iterator[str]:
    """Yield the patterns of what an operation takes from a tree."""
    match operation:
        case Copy(sources=sources):
            yield from (each.pattern for each in sources if isinstance(each, Files) and each.tree == tree)
        case Run(mounts=mounts):
            for mount in mounts:
                if isinstance(mount, BindMount | CacheMount) and mount.tree == tree:
                    yield literal(mount.source)

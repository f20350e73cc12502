"""The conductor: one build from Dockerfile to stored image, in the seven steps of ARCHITECTURE.md."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from firebuild_bootstrap.context import BuildContext, open_named
from firebuild_bootstrap.dockerfile.graph import ImageRef, Stage, StageRef, TreeRef
from firebuild_bootstrap.errors import BuildTimeout, Interrupted
from firebuild_bootstrap.events import BuildStarted, EventSink, ImageStored, Notice, PhaseStarted, Tasks
from firebuild_bootstrap.explain import failure_event
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.outputs import OutputSpec, OutputType, check_destinations, check_programs
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.machine.base import ArchiveLayer, Layer, Machine
from firebuild_bootstrap.machine.drivers import (
    check_several,
    check_stores_images,
    make_machine,
    most_at_once,
    stores_images,
)
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.resolving import Resolved, resolve
from firebuild_bootstrap.session import Sessions
from firebuild_bootstrap.settings import BuildSettings
from firebuild_bootstrap.solve.schedule import Schedule
from firebuild_bootstrap.storing import Origin, store
from firebuild_bootstrap.tail import OutputTail
from firebuild_pki import Authority, NoteLevel, TLSMaterial, open_authority

_PHASES: Final = {
    1: "read the Dockerfile, the build context and the base",
    2: "issue certificates",
    3: "start the bootstrap server",
    4: "write the metadata",
    5: "start the machine",
    6: "run the steps",
    7: "store the image",
}


def build_image(
    request: BuildRequest,
    settings: BuildSettings,
    home: Home,
    *,
    events: EventSink = lambda _: None,
) -> StoredImage | None:
    """Build an image and store it under its tag.

    Args:
        request: what to build.
        settings: how.
        home: where bases, images and the build's own files are.
        events: receives everything that happens, from several threads, one event at a time. `BuildFailed`
            comes before the clean-up, which may still tell what it kept.

    Returns:
        the image; None after a success on a machine whose drive firebuild does not know (docs/external.md).

    Raises:
        FirebuildError: its `exit_status` says what kind of end it was; nothing is left behind but what the
            request asks to keep.
        Interrupted: `home.check` raised it.
        firebuild_pki.CAError: no usable certificates could be had.
    """
    build = _Build(request, settings, home, OutputTail(events))
    try:
        return build.run()
    except (Exception, Interrupted) as error:
        build.failed(error)  # where the clean-up was what failed
        raise


class _Build:
    def __init__(
        self,
        request: BuildRequest,
        settings: BuildSettings,
        home: Home,
        events: OutputTail,
    ) -> None:
        self._request = request
        self._settings = settings
        self._schedule = Schedule(most_at_once(settings.machine))
        self._home = home.limited(self._check, Tasks(events))
        self._deadline = math.inf
        self.events = events
        self._build_id = f"b{secrets.token_hex(6)}"
        self._began = time.monotonic()
        self._telling = threading.RLock()
        self._told_phase = 0
        self._warnings_told = 0
        self._failure_told = False

    def run(self) -> StoredImage | None:
        with ExitStack() as cleanup:
            cleanup.callback(self._home.close)
            try:
                try:
                    return self._steps(cleanup)
                except Exception:
                    # A Ctrl-C also reaches what was just being started; its failure is not the story.
                    self._home.check()
                    raise
            except (Exception, Interrupted) as error:
                self.failed(error)
                raise

    def failed(self, error: BaseException) -> None:
        """Tell why the build failed, once: before the clean-up, which may take a while."""
        told, self._failure_told = self._failure_told, True
        # A receiver that fails too must not hide why the build did.
        with suppress(Exception):
            if not told:
                self.events(failure_event(error))

    def _steps(self, cleanup: ExitStack) -> StoredImage | None:
        self._phase(1)
        workspace = cleanup.enter_context(self._home.workspace(self._build_id))
        resolved = self._resolve(cleanup, workspace)
        # Nothing of it is started yet, but what it lacks shows now.
        machine = self._machine(workspace, resolved.graph.target)

        self._phase(2)
        authority = open_authority(
            self._settings.ca, build_id=self._build_id, check=self._home.check, report=self._info
        )
        cleanup.callback(self._pass_warnings_on, authority)
        cleanup.enter_context(authority)
        sessions = self._sessions(authority, workspace)
        self._announce(resolved, authority)

        # Steps 3 to 6, once for each stage that has something to execute.
        self._deadline = time.monotonic() + self._settings.bootstrap.build_time.total_seconds()
        results = _Results(resolved, workspace, machine, cleanup)
        self._schedule.run(
            resolved.graph.stages, lambda stage: self._stage(stage, results, authority, sessions)
        )

        self._phase(7)
        authority.close()  # nobody needs its certificates any more
        self._pass_warnings_on(authority)
        return self._store(machine, resolved, authority)

    def _phase(self, number: int) -> None:
        """Tell once that the build has come so far; stages come there one by one."""
        self._home.check()
        with self._telling:
            if number > self._told_phase:
                self._told_phase = number
                self.events(PhaseStarted(phase=number, name=_PHASES[number]))

    def _check(self) -> None:
        """End what runs on although the steps are done, such as an export; the server watches the steps."""
        self._schedule.check()
        if time.monotonic() > self._deadline:
            limit = self._settings.bootstrap.build_time.total_seconds()
            raise BuildTimeout(
                f"the build and its outputs took longer than {limit:g} seconds",
                hint="raise bootstrap.build_timeout if they really need longer",
            )

    def _notice(self, message: str) -> None:
        self.events(Notice(level="warning", message=message))

    def _info(self, message: str) -> None:
        self.events(Notice(level="info", message=message))

    # --- 1 --------------------------------------------------------------------------------------

    def _resolve(self, cleanup: ExitStack, workspace: Workspace) -> Resolved:
        request = self._request
        check_destinations(request.outputs)
        if any(spec.dest for spec in request.outputs):
            check_stores_images(self._settings.machine, "--output with dest=")
        context = BuildContext(
            request.context, request.dockerfile, downloads=workspace.path, tasks=self._home.tasks
        )
        contexts = {"": cleanup.enter_context(context)}
        for name, source in request.build_contexts.items():
            if not isinstance(source, ImageRef):
                named = open_named(name, source, workspace.path, self._home.tasks)
                contexts[name] = cleanup.enter_context(named)
        resolved = resolve(request, contexts, self._home.bases)
        for warning in resolved.warnings:
            self._notice(str(warning))
        if stores_images(self._settings.machine):
            check_programs(request.outputs)
        if len(resolved.graph.stages) > 1:
            check_several(self._settings.machine)
        return resolved

    def _machine(self, workspace: Workspace, stage: Stage) -> Machine:
        return make_machine(
            self._settings.machine,
            workspace.part(str(stage.index)),
            bind=self._settings.bootstrap.bind,
            store=self._home.root,
            notice=self._notice,
            info=self._info,
            epoch=self._request.epoch,
        )

    # --- 2 --------------------------------------------------------------------------------------

    def _sessions(self, authority: Authority, workspace: Workspace) -> Sessions:
        for note in authority.check():
            if note.level is not NoteLevel.OK:
                self._notice(str(note))
        server = self._issued(authority, authority.issue_server)
        return Sessions(
            build_id=self._build_id,
            tag=str(self._request.tag),
            dockerfile=self._request.dockerfile_name,
            settings=self._settings,
            home=self._home,
            directory=workspace.path,
            server=server,
            events=self.events,
            phase=self._phase,
            keep_failed=self._request.keep_failed,
        )

    def _issued(self, authority: Authority, issue: Callable[..., TLSMaterial]) -> TLSMaterial:
        limits = self._settings.bootstrap
        deadline = datetime.now(UTC) + limits.build_time
        material = issue(ttl=limits.certificate_lifetime, build_deadline=deadline)
        self._pass_warnings_on(authority)
        return material

    def _pass_warnings_on(self, authority: Authority) -> None:
        with self._telling:
            for warning in authority.warnings[self._warnings_told :]:
                self._warnings_told += 1
                self._notice(warning)

    def _announce(self, resolved: Resolved, authority: Authority) -> None:
        self.events(
            BuildStarted(
                build_id=self._build_id,
                tag=str(self._request.tag),
                steps=resolved.total,
                base=resolved.base_name,
                ca_provider=authority.provider_name,
            )
        )

    # --- 3 to 6 ---------------------------------------------------------------------------------

    def _stage(self, stage: Stage, results: _Results, authority: Authority, sessions: Sessions) -> None:
        """Build one stage, and put its result where the others find it."""
        target = stage is results.resolved.graph.target
        if not stage.steps and not target:
            results.layers[stage.index] = results.base(stage)
            return
        with ExitStack() as own:
            cleanup = results.cleanup if target else own
            work = results.resolved.work(stage, results.base(stage), results.archive, cleanup)
            machine = results.machine if target else self._machine(results.workspace, stage)
            sessions.run(work, machine, self._issued(authority, authority.issue_guest), cleanup)
            if not target:
                results.keep(stage, machine)

    # --- 7 --------------------------------------------------------------------------------------

    def _store(self, machine: Machine, resolved: Resolved, authority: Authority) -> StoredImage | None:
        origin = Origin(self._build_id, authority.provider_name, authority.issuer_fingerprint)
        image = store(machine, self._request, resolved, origin, self._home)
        if image is None:
            self._info("all steps succeeded; nothing is stored: the drive of the machine is not known")
            return None
        first = image.record.outputs[0]
        self.events(
            ImageStored(
                tag=image.record.tag,
                path=str(image.location / first.path),
                size=first.size,
                digest=first.digest,
                seconds=time.monotonic() - self._began,
            )
        )
        return image


class _Results:
    """What the stages of one build have of each other.

    Args:
        resolved: the graph, and what it starts from.
        workspace: the directory of the build.
        machine: that of the target.
        cleanup: of the build.
    """

    def __init__(
        self, resolved: Resolved, workspace: Workspace, machine: Machine, cleanup: ExitStack
    ) -> None:
        self.resolved = resolved
        self.workspace = workspace
        self.machine = machine
        self.cleanup = cleanup
        self.layers: dict[int, tuple[Layer, ...]] = {}

    def base(self, stage: Stage) -> tuple[Layer, ...]:
        """Return the layers that a stage starts from, the lowest first."""
        return self._layers(stage.base)

    def archive(self, tree: TreeRef) -> Path | None:
        """Return the archive of an image or of a stage that is done; None where it is empty."""
        (found,) = self._layers(tree) or (None,)
        return found.path if isinstance(found, ArchiveLayer) else None

    def keep(self, stage: Stage, machine: Machine) -> None:
        """Keep the result of a stage, whose machine has stopped, for those that need it."""
        directory = self.workspace.path / f"stage-{stage.index}"
        directory.mkdir(mode=0o700)
        (made,) = machine.export((OutputSpec(OutputType.TAR),), directory)
        self.layers[stage.index] = (ArchiveLayer(directory / made.path, made.digest),)

    def _layers(self, tree: TreeRef) -> tuple[Layer, ...]:
        match tree:
            case StageRef(index):
                return self.layers[index]
            case ImageRef(reference):
                base = self.resolved.bases[reference]
                return (ArchiveLayer(base.archive, base.digest),)
            case _:
                return ()

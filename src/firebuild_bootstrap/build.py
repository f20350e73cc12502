"""The conductor: one build from Dockerfile to stored image, in the seven steps of ARCHITECTURE.md."""

from __future__ import annotations

import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.context import BuildContext, open_named
from firebuild_bootstrap.dockerfile.graph import ImageRef, Stage
from firebuild_bootstrap.dockerfile.lint import shown
from firebuild_bootstrap.errors import BuildTimeout, FirebuildError, InputError, Interrupted, MachineError
from firebuild_bootstrap.events import (
    BuildStarted,
    EventBus,
    EventSink,
    ImageStored,
    Notice,
    PhaseStarted,
    StepCached,
    Tasks,
)
from firebuild_bootstrap.failures import failure_event
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.content_store import allow_open_files
from firebuild_bootstrap.image.outputs import check_destinations, check_programs
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.lowering import has_caches, prepare
from firebuild_bootstrap.machine.base import Machine
from firebuild_bootstrap.machine.drivers import (
    check_several,
    keeps_caches,
    make_machine,
    most_at_once,
    pointing_to_doctor,
    puts_layers_between,
    start_ahead,
)
from firebuild_bootstrap.machine.workspace import BuildDirectory, Workspace
from firebuild_bootstrap.programs import check_address_space
from firebuild_bootstrap.provenance import Course, predicate
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.resolving import Resolved, resolve
from firebuild_bootstrap.sandbox import SandboxError
from firebuild_bootstrap.solve.inputs import Inputs
from firebuild_bootstrap.solve.keys import StageKeys, keys_of
from firebuild_bootstrap.solve.reasons import LastBuild
from firebuild_bootstrap.solve.results import Results, Shared, Start
from firebuild_bootstrap.solve.schedule import Schedule
from firebuild_bootstrap.storing import Origin, store
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.service.console import FailureShell
    from firebuild_bootstrap.session import Sessions
    from firebuild_bootstrap.settings import BuildSettings
    from firebuild_bootstrap.solve.remote import RemoteCaches
    from firebuild_pki import Authority, TLSMaterial

_FILES_OF_STAGE: Final = 32
"""Open files of a stage that executes: its server, its guest's connections, its machine."""
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
    shell: FailureShell | None = None,
) -> StoredImage | None:
    """Build an image and store it under its tag.

    Args:
        request: what to build.
        settings: how.
        home: where bases, images and the build's own files are.
        events: receives everything that happens, from several threads, one event at a time. `BuildFailed`
            comes before the clean-up, which may still tell what it kept.
        shell: where the user gets a shell when a RUN has failed, before its machine is stopped.

    Returns:
        the image; None after a success on a machine that gives neither layers nor a drive (docs/external.md).

    Raises:
        FirebuildError: its `exit_status` says what kind of end it was; nothing is left behind but what the
            request asks to keep.
        Interrupted: `home.check` raised it.
        firebuild_pki.CAError: the provider issued no usable certificates.
    """
    build = _Build(request, settings, home, EventBus(events), shell)
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
        events: EventBus,
        shell: FailureShell | None,
    ) -> None:
        self._request = request
        self._shell = shell
        self._settings = settings
        self._schedule = Schedule(most_at_once(settings.machine))
        self._home = home.limited(self._check, Tasks(events))
        self._deadline = math.inf
        self.events = events
        self._build_id = f"b{secrets.token_hex(6)}"
        self._began = time.monotonic()
        self._started = datetime.now(UTC)
        self._telling = threading.RLock()
        self._parts: dict[int, BuildDirectory] = {}
        self._announced_phase = 0
        self._warnings_shown = 0
        self._failure_reported = False
        self._working = ExitStack()
        self._remote_caches: RemoteCaches | None = None
        self._asked = ""

    @cached_property
    def _workspace(self) -> Workspace:
        """The build's own directory; made with its cleanup process when something needs it."""
        # A build that is cached whole does not: the two are a third of its time.
        return self._working.enter_context(self._home.workspace(self._build_id))

    def run(self) -> StoredImage | None:
        with ExitStack() as cleanup:
            cleanup.callback(self._home.close)
            cleanup.enter_context(self._working)
            try:
                try:
                    with pointing_to_doctor(self._settings.machine, (SandboxError,)):
                        return self._steps(cleanup)
                except Exception:
                    # A Ctrl-C also reaches child processes; the interruption is the cause, not their failure.
                    self._home.check()
                    raise
            except (Exception, Interrupted) as error:
                self.failed(error)
                raise

    def failed(self, error: BaseException) -> None:
        """Report why the build failed, once: before the clean-up, which may take a while."""
        told, self._failure_reported = self._failure_reported, True
        # A failing consumer must not hide why the build failed.
        with suppress(Exception):
            if not told:
                self.events(failure_event(error))

    def _steps(self, cleanup: ExitStack) -> StoredImage | None:
        self._phase(1)
        self._home.retire_dead()
        resolved = self._resolve(cleanup)
        results = self._results(resolved)
        pending = self._pending(results, cleanup)
        cached = {stage.index: results.cached(stage) for stage in resolved.graph.stages}
        executed = frozenset(
            (stage.index, place)
            for stage in pending
            for linked in (results.linked(stage),)
            for place in range(cached[stage.index], len(stage.steps))
            if place not in linked
        )
        self._announce(resolved, results, cached)
        self._explain(resolved, results, pending, cached)
        if not pending:  # all that there is to do was done by earlier builds
            self._await_answer(resolved, results)
            self._phase(7)
            image = self._store(resolved, results, executed)
            self._share(results, cleanup)
            return image
        results.settled()
        # Nothing of it is started yet, but what it lacks shows now.
        prepare(
            (
                (step, resolved.sent.get((stage.index, place)))
                for stage in pending
                for place, step in enumerate(stage.steps)
                if (stage.index, place) in executed
            ),
            resolved.secrets,
            resolved.agents,
        )
        # gRPC's core does not end well without them.
        check_address_space()
        allow_open_files(_FILES_OF_STAGE * min(len(pending), most_at_once(self._settings.machine)))
        machine = self._machine(results.target)
        ahead = self._start_ahead(resolved, pending, results, machine, cleanup)

        self._phase(2)
        authority = self._open_authority(cleanup)
        sessions = self._sessions(authority)

        # Steps 3 to 6, once for each stage that has something to execute.
        self._deadline = time.monotonic() + self._settings.bootstrap.build_time.total_seconds()
        build = _Stages(resolved, results, machine, ahead, authority, sessions, cleanup)
        self._schedule.run(pending, lambda stage: self._stage(stage, build), results.maker)

        self._await_answer(resolved, results)
        self._phase(7)
        authority.close()  # its certificates are of no use any more
        self._pass_warnings_on(authority)
        image = self._store(resolved, results, executed, authority)
        self._share(results, cleanup)
        return image

    def _open_authority(self, cleanup: ExitStack) -> Authority:
        # Imported here, because a build that is cached whole takes as long as its imports.
        from firebuild_pki import audit_labels, open_authority

        authority = open_authority(
            self._settings.ca,
            build_id=self._build_id,
            check=self._home.check,
            report=self._info,
            labels=audit_labels(tag=str(self._request.tag)),
        )
        cleanup.callback(self._pass_warnings_on, authority)
        return cleanup.enter_context(authority)

    def _phase(self, number: int) -> None:
        """Announce a phase of the build once; stages reach it one by one."""
        self._home.check()
        with self._telling:
            if number > self._announced_phase:
                self._announced_phase = number
                self.events(PhaseStarted(phase=number, name=_PHASES[number]))

    def _check(self) -> None:
        """End what runs on although the steps are done, such as an export; the server watches the steps."""
        self._schedule.check()
        if time.monotonic() - (self._shell.seconds if self._shell else 0) > self._deadline:
            limit = self._settings.bootstrap.build_time.total_seconds()
            raise BuildTimeout(
                f"the build and its outputs took longer than {counted(limit, 'second')}",
                hint="raise bootstrap.build_timeout if they really need longer",
            )

    def _notice(self, message: str) -> None:
        self.events(Notice(level="warning", message=message))

    def _info(self, message: str) -> None:
        self.events(Notice(level="info", message=message))

    # --- 1 --------------------------------------------------------------------------------------

    def _resolve(self, cleanup: ExitStack) -> Resolved:
        request = self._request
        check_destinations(request.outputs)
        agent = request.agents.get("default")  # as in BuildKit
        context = BuildContext(
            request.context,
            request.dockerfile,
            downloads=self._directory,
            tasks=self._home.tasks,
            agent=agent,
            place=request.context_place,
            check=self._home.check,
        )
        contexts = {"": cleanup.enter_context(context)}
        if store := context.path_of(self._home.root):
            self._notice(
                f"the store {self._home.root} is in the build context, and COPY takes it for a part of that: "
                f"add {store} to .dockerignore, or set FIREBUILD_HOME to another directory"
            )
        for name, source in request.build_contexts.items():
            if not isinstance(source, ImageRef):
                named = open_named(
                    name, source, self._directory, self._home.tasks, agent=agent, check=self._home.check
                )
                contexts[name] = cleanup.enter_context(named)
        # Whoever makes keys of files looks at all of them: once more would take as long as all the rest.
        resolved = resolve(request, contexts, self._home.bases, check=False)
        for warning in shown(resolved.warnings):
            self._notice(warning)
        for name in resolved.graph.unused_contexts:
            self._info(f"--build-context {name}: nothing that is built uses it")
        if has_caches(resolved.graph) and not keeps_caches(self._settings.machine):
            self._notice("cache mounts last as long as their stage: the machine external keeps none")
        check_programs(request.outputs)
        if request.ready is not None:
            from firebuild_bootstrap.readiness import check_request

            check_request(str(request.tag), request.ready, resolved.graph.target.config, self._settings)
        if sum(bool(stage.steps) for stage in resolved.graph.stages) > 1:
            check_several(self._settings.machine)
        return resolved

    def _pending(self, results: Results, cleanup: ExitStack) -> tuple[Stage, ...]:
        """Return the stages that have something to execute, after the remote caches were asked if need be."""
        request, pending = self._request, results.pending()
        every = any(spec.mode == "max" for spec in request.cache_to)
        if not request.cache_from or request.no_cache or not (pending or every):
            return pending
        remote = self._remote(cleanup)
        remote.load(request.cache_from)
        self._asked = ", ".join(map(str, request.cache_from))
        return results.ask(remote)

    def _remote(self, cleanup: ExitStack) -> RemoteCaches:
        """Return the remote caches of this build, which are opened once."""
        if self._remote_caches is None:
            from firebuild_bootstrap.registry.pull import connected
            from firebuild_bootstrap.solve.remote import RemoteCaches

            home = self._home
            registries = connected(self._settings, home.check, home.tasks)
            cleanup.callback(registries.close)
            self._remote_caches = RemoteCaches(
                home.cache,
                home.blobs,
                home.intake,
                home.outgoing,
                registries=registries,
                tasks=home.tasks,
                check=home.check,
            )
        return self._remote_caches

    def _share(self, results: Results, cleanup: ExitStack) -> None:
        """Write the results of the steps to the remote caches that the request names.

        Raises:
            FirebuildError: one can't be written, and its errors are not to be ignored.
        """
        request = self._request
        if not request.cache_to:
            return
        remote = self._remote(cleanup)
        named = [request.tag, *request.also_tagged]
        named += [spec.reference for spec in request.cache_from if spec.reference is not None]
        for spec in request.cache_to:
            if steps := results.exported(remote, every=spec.mode == "max"):
                remote.export(steps, spec, named)
            else:  # as in BuildKit, what is there stays
                self._info(f"no step is written to the cache {spec}: there is none that others could use")

    def _start_ahead(
        self,
        resolved: Resolved,
        pending: Sequence[Stage],
        results: Results,
        machine: Machine,
        cleanup: ExitStack,
    ) -> Start | None:
        """Start the target's machine beside the second step, if nothing else has to be done for it before."""
        target = results.target
        if tuple(pending) != (target,):
            return None
        start = results.start(target)
        cleanup.callback(machine.close)
        layers = start.all_layers(resolved.number(target) + 1)
        start_ahead(machine, layers, self._settings.machine)
        return start

    def _directory(self) -> Path:
        return self._workspace.path

    def _machine(self, stage: Stage) -> Machine:
        part = self._parts[stage.index] = self._workspace.part(str(stage.index))
        settings = self._settings
        with pointing_to_doctor(settings.machine, (InputError, MachineError)):
            return make_machine(
                settings.machine,
                part,
                bind=settings.bootstrap.bind,
                store=self._home.root,
                notice=self._notice,
                info=self._info,
            )

    def _results(self, resolved: Resolved) -> Results:
        return Results(
            resolved.graph,
            resolved.bases,
            shared=self._shared(resolved),
            stored=self._home.layers,
            trees=self._home.trees,
            directory=self._directory,
        )

    def _shared(self, resolved: Resolved) -> Shared:
        request = self._request
        inputs = Inputs(
            resolved.bases,
            resolved.contexts,
            resolved.sent,
            self._home.root / "cache" / "stat",
            check=self._home.check,
        )
        try:
            keys = keys_of(resolved.graph, inputs)
        except InputError:
            resolve(request, resolved.contexts, self._home.bases)  # which names all of them, and their lines
            raise
        inputs.save()
        return Shared(
            cache=self._home.cache,
            keys=keys,
            fresh=lambda stage: (
                request.no_cache
                or not request.no_cache_stages.isdisjoint((stage.name.lower(), str(stage.index)))
            ),
            unchanged=inputs.unchanged,
            notice=self._notice,
            puts_between=self._puts_between(keys),
        )

    def _puts_between(self, keys: Mapping[int, StageKeys]) -> bool:
        linked = any(parts.linked for stage in keys.values() for parts in stage.steps)
        return linked and puts_layers_between(
            self._settings.machine, lambda: self._home.layers.overlay_problem(self._directory())
        )

    def _announce(self, resolved: Resolved, results: Results, cached: Mapping[int, int]) -> None:
        """Announce the build, and the steps that are cached."""
        self.events(
            BuildStarted(
                build_id=self._build_id,
                tag=str(self._request.tag),
                steps=resolved.total,
                base=resolved.base_name,
                ca_provider=self._settings.ca_provider,
            )
        )
        for stage in resolved.graph.stages:
            number, origins = resolved.number(stage), results.origins(stage)
            for place in (*range(cached[stage.index]), *sorted(results.linked(stage))):
                step = stage.steps[place]
                self.events(
                    StepCached(
                        step=number + 1 + place,
                        total=resolved.total,
                        instruction=step.origin.text,
                        line=step.origin.location.line,
                        stage=resolved.title(stage),
                        origin=origins.get(place, ""),
                    )
                )

    def _explain(
        self, resolved: Resolved, results: Results, pending: Sequence[Stage], cached: Mapping[int, int]
    ) -> None:
        """Remember the parts of all keys; on request, explain why steps are not cached."""
        name = str(self._request.dockerfile_name.absolute())
        last = LastBuild(self._home.root, name)
        for stage in resolved.graph.stages:
            parts = results.parts(stage)
            place = cached[stage.index]
            if self._request.explain_cache and stage in pending and place < len(parts):
                base = stage.origin.text.partition(" ")[2]
                why = last.why(stage.title, place, parts[place], base)
                others = f", nor in {self._asked}" if self._asked else ""
                self._info(f"not cached{others}: {stage.steps[place].origin.text}: {why}")
            for number, each in enumerate(parts):
                last.note(stage.title, number, each)
        last.save()

    # --- 2 --------------------------------------------------------------------------------------

    def _sessions(self, authority: Authority) -> Sessions:
        from firebuild_bootstrap.session import Sessions
        from firebuild_pki import NoteLevel

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
            directory=self._workspace.path,
            server=server,
            events=self.events,
            phase=self._phase,
            keep_failed=self._request.keep_failed,
            shell=self._shell,
        )

    def _issued(self, authority: Authority, issue: Callable[..., TLSMaterial]) -> TLSMaterial:
        limits = self._settings.bootstrap
        deadline = datetime.now(UTC) + limits.build_time
        material = issue(ttl=limits.certificate_lifetime, build_deadline=deadline)
        self._pass_warnings_on(authority)
        return material

    def _pass_warnings_on(self, authority: Authority) -> None:
        with self._telling:
            for warning in authority.warnings[self._warnings_shown :]:
                self._warnings_shown += 1
                self._notice(warning)

    # --- 3 to 6 ---------------------------------------------------------------------------------

    def _stage(self, stage: Stage, build: _Stages) -> None:
        """Build one stage, and put its result where the others find it."""
        results, resolved = build.results, build.resolved
        target = stage == results.target
        with ExitStack() as own:
            cleanup = build.cleanup if target else own
            start = (build.ahead if target else None) or results.start(stage)
            first = resolved.number(stage) + 1
            work = resolved.work(
                stage,
                start.all_layers(first),
                results.archive,
                cleanup,
                beginning=results.beginning,
                done={*range(start.done), *start.linked},
            )
            machine = build.machine if target else self._machine(stage)
            making = results.begin(stage, start, first, self._parts[stage.index])

            def rescue(kind: type[BaseException] | None, *_: object) -> None:
                with suppress(FirebuildError):
                    if kind is not None:
                        making.commit_all(machine)

            cleanup.push(rescue)
            guest = self._issued(build.authority, build.authority.issue_guest)
            with self._shell_first():
                build.sessions.run(
                    work, machine, guest, cleanup, finished=making.finished, taken=making.commit
                )
            results.keep(stage, start, making, machine)

    @contextmanager
    def _shell_first(self) -> Iterator[None]:
        """Hold a failure back while there is a shell: it ends other stages, and the shell may be in one."""
        try:
            yield
        except FirebuildError:
            if self._shell is not None:
                self._shell.await_end(self._home.check)
            raise

    def _await_answer(self, resolved: Resolved, results: Results) -> None:
        """Boot what the steps have made, if that is asked for.

        Raises:
            NotReady: it does not answer.
        """
        if self._request.ready is None or (layers := results.layers()) is None:
            return
        from firebuild_bootstrap.readiness import await_answer

        if self._deadline == math.inf:  # no step was to be executed
            self._deadline = time.monotonic() + self._settings.bootstrap.build_time.total_seconds()
        seconds = await_answer(
            layers,
            resolved.graph.target.config,
            self._request.ready,
            name=str(self._request.tag),
            settings=self._settings,
            home=self._home,
            events=self.events,
        )
        self._info(f"the image answers, {seconds:.1f}s after its machine was asked for")

    # --- 7 --------------------------------------------------------------------------------------

    def _store(
        self,
        resolved: Resolved,
        results: Results,
        executed: frozenset[tuple[int, int]],
        authority: Authority | None = None,
    ) -> StoredImage | None:
        provider = authority.provider_name if authority is not None else self._settings.ca_provider
        origin = Origin(self._build_id, provider, authority.issuer_fingerprint if authority else "")
        request = self._request
        course = Course(
            build_id=self._build_id,
            started=self._started,
            machine=self._settings.machine.driver,
            ca_provider=provider,
            issuer_fingerprint=origin.issuer_fingerprint,
            executed=executed,
            parts=results.parts,
        )

        layers = results.layers()
        if layers is None:
            why = "the guest works on one plain tree, and the machine has no drive that firebuild could read"
            if any(spec.dest for spec in request.outputs):
                raise MachineError(
                    f"nothing can be written: {why}",
                    hint="give the guest a scratch drive (docs/external.md), or set machine.external.disk",
                )
            self._info(f"all steps succeeded; nothing is stored: {why}")
            return None
        image = store(
            layers,
            request,
            resolved,
            origin,
            self._home,
            provenance=(lambda: predicate(request, resolved, course)) if request.attestations.kept else None,
            notice=self._notice,
        )
        results.trim(lambda: _cache_limit(self._settings.cache.max_size, self._home.root))
        wanted = {spec.type for spec in request.outputs[:1]}
        first = next((output for output in image.record.outputs if output.type in wanted), None)
        self.events(
            ImageStored(
                tag=image.record.tag,
                path=str(image.location / first.path if first is not None else image.location),
                size=first.size if first is not None else image.record.size,
                digest=first.digest if first is not None else "",
                seconds=time.monotonic() - self._began,
            )
        )
        return image


def _cache_limit(written: int | None, home: Path) -> int:
    """Return how many bytes the cache below `home` may have: by default 20 GiB, or a quarter of the disk."""
    if written is not None:
        return written
    disk = os.statvfs(home)
    return min(20 << 30, disk.f_blocks * disk.f_frsize // 4)


@dataclass(frozen=True)
class _Stages:
    """What the stages of one build share.

    `machine` is that of the target, `ahead` where it has been started already, `cleanup` that of the build.
    """

    resolved: Resolved
    results: Results
    machine: Machine
    ahead: Start | None
    authority: Authority
    sessions: Sessions
    cleanup: ExitStack

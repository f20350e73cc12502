"""The conductor: one build from Dockerfile to stored image, in the seven steps of ARCHITECTURE.md."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.errors import BuildTimeout, GuestLost, Interrupted, StepFailed
from firebuild_bootstrap.events import (
    BuildStarted,
    EventSink,
    ImageStored,
    Notice,
    PhaseStarted,
    StepFinished,
    StepStarted,
    Tasks,
)
from firebuild_bootstrap.explain import explained, failure_event
from firebuild_bootstrap.following import await_end, follow
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.outputs import check_destinations, check_programs
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.keeping import Keeper
from firebuild_bootstrap.lowering import LoweredStage
from firebuild_bootstrap.machine.base import ArchiveLayer, Machine
from firebuild_bootstrap.machine.drivers import check_stores_images, make_machine, stores_images
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE, MetadataDocument, bootstrap_block
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.resolving import Resolved, resolve
from firebuild_bootstrap.service import BootstrapServer, Limits, StepInfo
from firebuild_bootstrap.settings import BuildSettings
from firebuild_bootstrap.storing import Origin, store
from firebuild_bootstrap.tail import OutputTail
from firebuild_bootstrap.wire import encode_command
from firebuild_pki import Authority, NoteLevel, TLSMaterial, open_authority


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
        self._home = home.limited(self._check_time, Tasks(events))
        self._deadline = math.inf
        self.events = events
        self._build_id = f"b{secrets.token_hex(6)}"
        self._began = time.monotonic()
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
        self._phase(1, "read the Dockerfile, the build context and the base")
        workspace = cleanup.enter_context(self._home.workspace(self._build_id))
        resolved = self._resolve(cleanup, workspace)
        # Nothing of it is started yet, but what it lacks shows now.
        machine = make_machine(
            self._settings.machine,
            workspace,
            bind=self._settings.bootstrap.bind,
            store=self._home.root,
            notice=self._notice,
            info=self._info,
        )

        self._phase(2, "issue certificates")
        authority = open_authority(
            self._settings.ca, build_id=self._build_id, check=self._home.check, report=self._info
        )
        cleanup.callback(self._pass_warnings_on, authority)
        cleanup.enter_context(authority)
        materials = self._issue(authority)
        self._announce(resolved, authority)

        self._phase(3, "start the bootstrap server")
        cleanup.callback(machine.close)
        if self._request.keep_failed is not None:
            directory = self._request.keep_failed / self._build_id
            cleanup.enter_context(Keeper(directory, machine, notice=self._notice, info=self._info))
        server = self._server(resolved.plan, materials, machine, workspace.path)
        listening = machine.listen()
        cleanup.callback(listening.listener.close)
        server.start(listening.listener)
        cleanup.callback(server.stop)

        self._phase(4, "write the metadata")
        machine.metadata.put(self._metadata(materials[1], listening.host_port))

        self._phase(5, "start the machine")
        self._deadline = time.monotonic() + self._settings.bootstrap.build_time.total_seconds()
        self._start(machine, resolved)

        self._phase(6, "run the steps")
        server.await_guest()
        self._follow(server, machine, resolved.plan)

        self._phase(7, "store the image")
        with self._home.tasks.task("stopping the machine"):
            await_end(machine, self._home.check)
            machine.stop()
        authority.close()  # nobody needs its certificates any more
        self._pass_warnings_on(authority)
        return self._store(machine, resolved, authority)

    def _phase(self, number: int, name: str) -> None:
        self._home.check()
        self.events(PhaseStarted(phase=number, name=name))

    def _check_time(self) -> None:
        """End what runs on although the steps are done, such as an export; the server watches the steps."""
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
        resolved = resolve(request, cleanup.enter_context(context), self._home.bases)
        for warning in resolved.warnings:
            self._notice(f"{warning.location}: {warning.message}")
        if stores_images(self._settings.machine):
            check_programs(request.outputs)
        return resolved

    # --- 2 --------------------------------------------------------------------------------------

    def _issue(self, authority: Authority) -> tuple[TLSMaterial, TLSMaterial]:
        for note in authority.check():
            if note.level is not NoteLevel.OK:
                self._notice(str(note))
        limits = self._settings.bootstrap
        deadline = datetime.now(UTC) + limits.build_time
        ttl = limits.certificate_lifetime
        server = authority.issue_server(ttl=ttl, build_deadline=deadline)
        guest = authority.issue_guest(ttl=ttl, build_deadline=deadline)
        self._pass_warnings_on(authority)
        return server, guest

    def _pass_warnings_on(self, authority: Authority) -> None:
        for warning in authority.warnings[self._warnings_told :]:
            self._warnings_told += 1
            self._notice(warning)

    def _announce(self, resolved: Resolved, authority: Authority) -> None:
        self.events(
            BuildStarted(
                build_id=self._build_id,
                tag=str(self._request.tag),
                steps=resolved.plan.total,
                base=resolved.base_name,
                ca_provider=authority.provider_name,
            )
        )

    # --- 3 --------------------------------------------------------------------------------------

    def _server(
        self,
        plan: LoweredStage,
        materials: tuple[TLSMaterial, TLSMaterial],
        machine: Machine,
        runtime_directory: Path,
    ) -> BootstrapServer:
        server, guest = materials
        return BootstrapServer(
            commands=[encode_command(step.command) for step in plan.steps],
            resources={
                f"step-{step.number}": step.resource for step in plan.steps if step.resource is not None
            },
            steps=[StepInfo(step.number, step.line, step.instruction) for step in plan.steps],
            total_steps=plan.total,
            server_material=server,
            guest_material=guest,
            events=self.events,
            limits=Limits.of(self._settings.bootstrap),
            runtime_directory=runtime_directory,
            on_guest_connected=lambda: machine.metadata.patch(BOOTSTRAP_WIPE),
        )

    # --- 4 --------------------------------------------------------------------------------------

    def _metadata(self, guest: TLSMaterial, host_port: str) -> Mapping[str, object]:
        document = MetadataDocument(
            bootstrap=bootstrap_block(
                guest,
                host_port=host_port,
                ping_interval=self._settings.bootstrap.ping_interval.total_seconds(),
                host_time=time.time(),
            ),
            vmm_id=self._build_id,
            image_tag=str(self._request.tag),
        )
        document.check_size()
        return document.to_json()

    # --- 5 --------------------------------------------------------------------------------------

    def _start(self, machine: Machine, resolved: Resolved) -> None:
        began = time.monotonic()
        self.events(
            StepStarted(
                step=1,
                total=resolved.plan.total,
                instruction=f"FROM {resolved.reference}",
                line=resolved.plan.stage.origin.location.line,
            )
        )
        base = resolved.base
        for note in machine.prepare([ArchiveLayer(base.archive, base.digest)] if base else []):
            self._notice(note)
        machine.start()
        self.events(StepFinished(step=1, exit_code=0, seconds=time.monotonic() - began))

    # --- 6 --------------------------------------------------------------------------------------

    def _follow(self, server: BootstrapServer, machine: Machine, plan: LoweredStage) -> None:
        outcome = follow(server, machine, self._home.check)
        if isinstance(outcome.error, StepFailed):
            output = self.events.last_lines(outcome.step)
            source = self._request.source
            name = Path(source.name) if source is not None else self._request.dockerfile
            raise explained(outcome.error, plan, name, output)
        if isinstance(outcome.error, GuestLost) and (silence := machine.silence()):
            raise GuestLost(outcome.error.message, hint=silence)
        outcome.raise_for_failure()

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

"""One stage on one machine: from a prepared root file system to the guest's report of success."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from firebuild_bootstrap.errors import GuestLost, StepFailed
from firebuild_bootstrap.events import (
    Event,
    EventBus,
    Notice,
    StageFinished,
    StageStarted,
    StepFinished,
    StepStarted,
)
from firebuild_bootstrap.failures import FailureArtifacts, explained, located, with_remedy
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.layertrees import LayerSink
from firebuild_bootstrap.machine.base import Machine, Taken
from firebuild_bootstrap.machine.drivers import DOCTOR, pointing_to_doctor
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE, MetadataDocument, bootstrap_block
from firebuild_bootstrap.resolving import Work
from firebuild_bootstrap.service import BootstrapServer, Limits, Outcome
from firebuild_bootstrap.wire import RunCommand
from firebuild_pki import TLSMaterial
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.service.console import FailureShell
    from firebuild_bootstrap.settings import BuildSettings

# Between the guest's last call and the end of its machine, which may still have to write its drive.
_STOP_SECONDS: Final = 60.0
# How long the guest's report may take to arrive once its process is seen to have ended.
_LAST_WORDS_SECONDS: Final = 2.0
# Characters of them.
_LAST_WORDS: Final = 2000
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """Runs sessions of one build; what they have in common.

    Args:
        build_id: of the build.
        tag: what the image will be called.
        dockerfile: path that the user named, for errors.
        settings: of the build.
        home: its check and its tasks are used for long work.
        directory: the build's own, for sockets.
        server: the material of all its servers.
        events: takes the events of all sessions.
        phase: called with the number of each of the seven steps that begins.
        keep_failed: where to put what is left of a machine that has failed, in a directory with the name of
            the build (and the stage, if there are several); None for nowhere.
        shell: where the user gets a shell when a RUN has failed.
    """

    build_id: str
    tag: str
    dockerfile: Path
    settings: BuildSettings
    home: Home
    directory: Path
    server: TLSMaterial
    events: EventBus
    phase: Callable[[int], None]
    keep_failed: Path | None = None
    shell: FailureShell | None = None

    def run(
        self,
        work: Work,
        machine: Machine,
        guest: TLSMaterial,
        cleanup: ExitStack,
        *,
        finished: Callable[[int], None] = lambda _: None,
        taken: Taken = lambda _step, _directory: None,
    ) -> None:
        """Run the steps of a stage on a machine, which has stopped when this returns.

        Args:
            work: what to do.
            machine: new; it is closed with `cleanup`.
            guest: the material of its guest.
            cleanup: ends what is left, the last first.
            finished: told the number of each step that has ended well, before anybody else is.
            taken: takes the layers of finished steps, where the guest sends them.

        Raises:
            FirebuildError: a step failed, the guest was lost, or the machine could not be started.
            Interrupted: `home.check` raised it.
        """
        self.events(StageStarted(stage=work.title, step=work.start.number))
        self.phase(3)
        cleanup.callback(machine.close)
        if self.keep_failed is not None:
            name = f"{self.build_id}-{work.title}" if work.title else self.build_id
            notice, info = self._notice("warning"), self._notice("info")
            cleanup.enter_context(
                FailureArtifacts(self.keep_failed / name, machine, notice=notice, info=info)
            )
        server = self._server(work, machine, guest, finished, machine.receiver(taken))
        host_port = serve(server, machine, self.settings, cleanup)

        self.phase(4)
        document = MetadataDocument(vmm_id=self.build_id, image_tag=self.tag)
        put_metadata(machine, document, guest, host_port, self.settings)

        self.phase(5)
        self._start(machine, work)

        self.phase(6)
        server.await_guest()
        self._follow(server, machine, work)
        with self.home.tasks.task("stopping the machine"):
            _await_end(machine, self.home.check)
            machine.stop()
        server.stop()
        self.events(StageFinished(stage=work.title, step=work.start.number))

    def _notice(self, level: Literal["info", "warning"]) -> Callable[[str], None]:
        return lambda message: self.events(Notice(level=level, message=message))

    def _server(
        self,
        work: Work,
        machine: Machine,
        guest: TLSMaterial,
        finished: Callable[[int], None],
        layers: LayerSink | None,
    ) -> BootstrapServer:
        def events(event: Event) -> None:
            if isinstance(event, StepFinished) and event.exit_code == 0:
                finished(event.step)
            self.events(event)

        commands = work.commands
        if self.shell is not None:
            commands = tuple(
                replace(each, pauses=True) if isinstance(each, RunCommand) else each for each in commands
            )
        return BootstrapServer(
            commands=commands,
            resources=work.resources,
            agents=work.agents,
            steps=work.steps,
            total_steps=work.total,
            stage=work.title,
            server_material=self.server,
            guest_material=guest,
            events=events,
            limits=Limits.of(self.settings.bootstrap),
            layers=layers,
            shell=self.shell,
            runtime_directory=self.directory,
            on_guest_connected=lambda: machine.metadata.patch(BOOTSTRAP_WIPE),
        )

    def _start(self, machine: Machine, work: Work) -> None:
        began = time.monotonic()
        start = work.start
        self.events(
            StepStarted(
                step=start.number,
                total=work.total,
                instruction=start.instruction,
                line=start.line,
                stage=work.title,
            )
        )
        for note in machine.prepare(work.base, work.caches):
            self._notice("warning")(note)
        with pointing_to_doctor(self.settings.machine):
            machine.start()
        self.events(StepFinished(step=start.number, exit_code=0, seconds=time.monotonic() - began))

    def _follow(self, server: BootstrapServer, machine: Machine, work: Work) -> None:
        outcome = await_outcome(server, machine, self.home.check)
        if isinstance(outcome.error, StepFailed):
            output = self.events.last_lines(outcome.step)
            alone = any(
                isinstance(each, RunCommand) and each.network == "none" and each.step == outcome.step
                for each in work.commands
            )
            absent = work.absent.get(outcome.step, ())
            error = with_remedy(outcome.error, machine, output, networked=not alone, absent=absent)
            raise explained(error, work.steps, work.total, self.dockerfile, output)
        if isinstance(outcome.error, GuestLost) and (silence := machine.silence()):
            raise GuestLost(outcome.error.message, hint=silence)
        if outcome.error is not None:
            raise located(outcome.error, outcome.step, work.steps, self.dockerfile)


def serve(server: BootstrapServer, machine: Machine, settings: BuildSettings, cleanup: ExitStack) -> str:
    """Start a server on the network of a machine, and return its address as the guest knows it.

    Args:
        cleanup: stops the server, then closes the port.
    """
    with pointing_to_doctor(settings.machine):
        listening = machine.listen()
    cleanup.callback(listening.listener.close)
    server.start(listening.listener)
    cleanup.callback(server.stop)
    return listening.host_port


def put_metadata(
    machine: Machine, document: MetadataDocument, guest: TLSMaterial, host_port: str, settings: BuildSettings
) -> None:
    """Put a document into the metadata service of a machine, with what its guest connects with.

    Raises:
        InputError: it is too large for a metadata service.
    """
    block = bootstrap_block(
        guest,
        host_port=host_port,
        ping_interval=settings.bootstrap.ping_interval.total_seconds(),
        host_time=time.time(),
    )
    document = replace(document, bootstrap=block)
    document.check_size()
    machine.metadata.put(document.to_json())


def await_outcome(server: BootstrapServer, machine: Machine, check: Callable[[], None]) -> Outcome:
    """Wait until it is known how the steps ended.

    Args:
        check: called again and again; may raise.

    Raises:
        GuestLost: the machine ended, and its guest has reported nothing.
    """
    ended = None
    while (outcome := server.wait(_LAST_WORDS_SECONDS if ended else _POLL_SECONDS)) is None:
        if ended is not None:
            said = "" if ended.explained else one_line(ended.log[-_LAST_WORDS:], _LAST_WORDS)
            hint = [f"its last output: {said}"] if said else []
            hint += [] if server.has_guest else [DOCTOR]
            raise GuestLost(
                f"the guest ended before it reported success or failure: {ended.description}",
                hint="; ".join(hint) or None,
            )
        check()
        ended = machine.poll()
    return outcome


def _await_end(machine: Machine, check: Callable[[], None]) -> None:
    """Wait until the machine of a guest that has reported its success has ended, or for a minute.

    Args:
        check: called again and again; may raise.
    """
    end = time.monotonic() + _STOP_SECONDS
    while machine.wait(_POLL_SECONDS) is None and time.monotonic() < end:
        check()

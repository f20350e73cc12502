"""Runs a command in a machine whose root file system is an image: the steps of a build without a build.

    1. find the image, and what it is to execute      4. write the metadata
    2. open the authority, issue certificates         5. start the machine on the layers of the image
    3. start the bootstrap server                     6. one session: the command, until it has ended

The machine works on layers as one that builds does; what the command writes goes with it.
"""

from __future__ import annotations

import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import FirebuildError, GuestLost, InputError, MachineError, StepFailed
from firebuild_bootstrap.events import EventSink, Notice
from firebuild_bootstrap.failures import with_remedy
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.identities import IdentityRequest, MachineIdentity
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.layertrees import Layer
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.machine.base import Machine, PublishedPort
from firebuild_bootstrap.machine.drivers import make_machine, pointing_to_doctor
from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE, IDENTITY_WIPE, MetadataDocument
from firebuild_bootstrap.mmds.document import UserInfo
from firebuild_bootstrap.programs import check_address_space
from firebuild_bootstrap.sandbox import SandboxError
from firebuild_bootstrap.wire import Attach, RunCommand
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from firebuild_bootstrap.service import BootstrapServer
    from firebuild_bootstrap.service.console import Console
    from firebuild_bootstrap.settings import BuildSettings
    from firebuild_pki import Authority, TLSMaterial

_FOREVER: Final = 100 * 366 * 86400.0


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What to run; None stands for what the image says.

    Args:
        image: its name, as FROM has it.
        command: instead of CMD; empty for what the image says. With `attach.init` the arguments of the init.
        entrypoint: instead of ENTRYPOINT, and then CMD does not count; an empty one removes it.
        env: added to that of the image.
        user: instead of USER.
        workdir: instead of WORKDIR.
        hostname: of the machine; by default the id of the run.
        keys: public SSH keys by user, one a line.
        attach: how the command is attached.
        network: as `RunCommand` has it.
        id: of the run; by default one of its own.
        publish: ports of this host that lead to the machine.
        identity: who the machine is, for others; None for nobody.
    """

    image: str
    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str | None = None
    workdir: str | None = None
    hostname: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    attach: Attach = Attach()
    network: str = "default"
    id: str = ""
    publish: tuple[PublishedPort, ...] = ()
    identity: IdentityRequest | None = None


def new_id() -> str:
    """Return an id for a run that no other has."""
    return f"r{secrets.token_hex(6)}"


def stop_signal(config: ImageConfig, *, init: bool = False) -> int:
    """Return the number of STOPSIGNAL, which is one already, or a name such as SIGRTMIN+3.

    SIGTERM where there is none, or one that this host does not have: images may say anything. For an init
    SIGRTMIN+3, on which systemd halts (systemd(1)): SIGTERM would restart it.
    """
    text = (config.stop_signal or ("SIGRTMIN+3" if init else "")).upper().removeprefix("SIG")
    name, plus, offset = text.partition("+")
    number = 0
    if text.isdecimal():
        number = int(text[:4])
    elif isinstance(found := getattr(signal, f"SIG{name}", None), int) and (offset.isdecimal() or not plus):
        number = int(found) + int(offset[:4] or 0)
    return number if 0 < number < signal.NSIG else signal.SIGTERM


def command_of(request: RunRequest, config: ImageConfig) -> tuple[str, ...]:
    """Return what is executed, as Docker combines it: ENTRYPOINT, and behind it the command or CMD.

    https://docs.docker.com/reference/cli/docker/container/run/#entrypoint: a new entrypoint clears CMD.

    Raises:
        InputError: neither the image nor the user names a command.
    """
    if request.attach.init:
        return (*(request.entrypoint or ("/sbin/init",)), *request.command)
    entrypoint = (config.entrypoint or ()) if request.entrypoint is None else request.entrypoint
    cmd = (config.cmd or ()) if request.entrypoint is None else ()
    argv = (*entrypoint, *(request.command or cmd))
    if not argv:
        raise InputError(
            f"the image {request.image} has neither ENTRYPOINT nor CMD",
            hint=f"name a command: firebuild run {request.image} /bin/sh",
        )
    return argv


def run_image(
    request: RunRequest,
    settings: BuildSettings,
    home: Home,
    console: Console,
    *,
    events: EventSink = lambda _: None,
) -> int:
    """Run a command in a machine of its own, and return its exit status, 128 + N for signal N.

    Args:
        request: what to run.
        settings: how.
        home: where the image and the machine's own files are; its `check` is called while the command runs.
        console: what the user says to the command.
        events: receives its output and warnings, from several threads, one event at a time.

    Raises:
        FirebuildError: the command did not run to its end; nothing is left behind. That of `StepFailed` is
            126 or 127 where it could not be executed.
        Interrupted: `home.check` raised it.
        firebuild_pki.CAError: the provider issued no usable certificates.
    """
    with ExitStack() as cleanup:
        run = _Run(request, settings, home, console, events=events, cleanup=cleanup)
        cleanup.callback(console.close)
        try:
            with pointing_to_doctor(settings.machine, (SandboxError,)):
                return run.run()
        except FirebuildError:
            home.check()  # a Ctrl-C also reaches child processes: it is the cause, not their failure
            raise


def run_layers(
    layers: Sequence[Layer],
    config: ImageConfig,
    *,
    request: RunRequest,
    settings: BuildSettings,
    home: Home,
    console: Console,
    events: EventSink,
) -> int:
    """Run the command of an image that is not stored, as `run_image` does.

    Args:
        layers: what it is made of, the lowest first; held by the caller.
        config: its configuration.
        request: whose image is what it is called in the metadata.
    """
    with ExitStack() as cleanup:
        run = _Run(request, settings, home, console, events=events, cleanup=cleanup)
        cleanup.callback(console.close)
        return run.boot(request.image, config, layers)


class _Run:
    def __init__(
        self,
        request: RunRequest,
        settings: BuildSettings,
        home: Home,
        console: Console,
        *,
        events: EventSink,
        cleanup: ExitStack,
    ) -> None:
        self._request = request
        self._settings = settings
        self._home = home
        self._console = console
        self._events = events
        self._cleanup = cleanup
        self._id = request.id or new_id()
        self._hostname = request.hostname or self._id
        self._over = False

    def run(self) -> int:
        home = self._home
        _check_platform(self._request.image, home)
        base = home.bases.resolve(self._request.image)
        self._cleanup.callback(home.close)
        return self.boot(base.name, base.config, base.layers)

    def boot(self, name: str, config: ImageConfig, layers: Sequence[Layer]) -> int:
        home, settings = self._home, self._settings
        check_address_space()
        command = self._command(config)
        self._console.command, self._console.stop_signal = (
            command.argv,
            stop_signal(config, init=self._request.attach.init),
        )
        document = self._document(name, config)
        workspace = self._cleanup.enter_context(home.workspace(self._id))
        with pointing_to_doctor(settings.machine, (InputError, MachineError)):
            machine = make_machine(
                settings.machine,
                workspace.part("0"),
                bind=settings.bootstrap.bind,
                store=home.root,
                notice=self._notice,
            )
        self._cleanup.callback(machine.close)
        machine.publish(self._request.publish)

        from firebuild_bootstrap.session import put_metadata, serve

        authority = self._authority()
        server_material, guest = self._issued(authority)
        identity = self._identity(authority, machine)
        if identity is not None:
            document = replace(document, identity=identity.begin())
        server = self._server(command, server_material, guest, workspace.path, machine)
        host_port = serve(server, machine, settings, self._cleanup)
        put_metadata(machine, document, guest, host_port, settings)
        for note in machine.prepare(layers):
            self._notice(note)
        with pointing_to_doctor(settings.machine):
            machine.start()
        server.await_guest()
        return self._follow(server, machine, identity)

    def _authority(self) -> Authority:
        """Open the CA; it stays open as long as the machine runs, which may get certificates of its own."""
        from firebuild_pki import audit_labels, open_authority

        request = self._request
        return self._cleanup.enter_context(
            open_authority(
                self._settings.ca,
                build_id=self._id,
                check=self._check,
                report=self._info,
                names=request.identity.files.names if request.identity else (),
                labels=audit_labels(image=request.image),
            )
        )

    def _server(
        self, command: RunCommand, own: TLSMaterial, guest: TLSMaterial, directory: Path, machine: Machine
    ) -> BootstrapServer:
        from firebuild_bootstrap.service import BootstrapServer, Limits, StepInfo

        # Neither the time nor the output of a command that is there for its own sake has a limit.
        limits = Limits.of(self._settings.bootstrap)
        return BootstrapServer(
            commands=[command],
            resources={},
            steps=[StepInfo(command.step, 0, command.original)],
            server_material=own,
            guest_material=guest,
            events=self._events,
            limits=replace(limits, build_timeout=_FOREVER, max_log_bytes=sys.maxsize),
            console=self._console,
            runtime_directory=directory,
            on_guest_connected=lambda: self._wipe(machine),
        )

    def _wipe(self, machine: Machine) -> None:
        """Take all keys out of the metadata: the guest has read them before its first call."""
        machine.metadata.patch(BOOTSTRAP_WIPE)
        if self._request.identity is not None:
            machine.metadata.patch(IDENTITY_WIPE)

    def _check(self) -> None:
        if not self._over:  # what is to be taken back is, whoever is in a hurry
            self._home.check()

    def _identity(self, authority: Authority, machine: Machine) -> MachineIdentity | None:
        wanted = self._request.identity
        if wanted is None:
            return None
        identity = MachineIdentity(wanted, authority, machine.metadata, self._console, warn=self._notice)

        def close() -> None:
            self._over = True
            identity.close()

        self._cleanup.callback(close)
        return identity

    def _command(self, config: ImageConfig) -> RunCommand:
        request = self._request
        argv = command_of(request, config)
        attach = replace(request.attach, volumes=config.volumes)
        if request.identity is not None:
            probed = bool(request.identity.command)
            attach = replace(attach, identity=request.identity.files, probed=probed or attach.probed)
        if attach.init and attach.probed:
            raise InputError("an init is alone in its machine: no command can be executed beside it")
        given = {"HOSTNAME": self._hostname, **({"TERM": "xterm"} if attach.terminal else {})}
        if attach.init:
            # systemd.io, CONTAINER_INTERFACE: what tells an init that its machine is prepared already.
            given["container"] = "firebuild"
        workdir = "/" if attach.init else config.workdir
        return RunCommand(
            step=1,
            original=shlex.join(argv),
            argv=argv,
            env={**given, **config.env, **request.env},
            workdir=workdir if request.workdir is None else request.workdir,
            user="0:0" if attach.init else (config.user if request.user is None else request.user) or "0:0",
            network=request.network,
            attach=attach,
        )

    def _document(self, tag: str, config: ImageConfig) -> MetadataDocument:
        request = self._request
        # Who logs in gets the environment of the command; nobody else needs it in a file that all can read.
        env = {**config.env, **request.env} if request.keys else {}
        return MetadataDocument(
            vmm_id=self._id,
            image_tag=tag,
            local_hostname=self._hostname,
            env=env,
            users={name: UserInfo(ssh_keys=keys) for name, keys in request.keys.items()},
        )

    def _issued(self, authority: Authority) -> tuple[TLSMaterial, TLSMaterial]:
        limits = self._settings.bootstrap
        deadline = datetime.now(UTC) + limits.build_time
        ttl = limits.certificate_lifetime
        server = authority.issue_server(ttl=ttl, build_deadline=deadline)
        guest = authority.issue_guest(ttl=ttl, build_deadline=deadline)
        for warning in authority.warnings:
            self._notice(warning)
        return server, guest

    def _follow(self, server: BootstrapServer, machine: Machine, identity: MachineIdentity | None) -> int:
        from firebuild_bootstrap.session import await_outcome

        def check() -> None:
            self._home.check()
            if identity is not None:
                identity.advance()

        try:
            outcome = await_outcome(server, machine, check)
        except GuestLost as error:
            raise GuestLost(
                f"the machine ended while the command ran: {error.message}", hint=error.hint
            ) from error
        machine.stop()
        server.stop()
        if isinstance(outcome.error, GuestLost):
            raise GuestLost(outcome.error.message, hint=outcome.error.hint or machine.silence() or None)
        if isinstance(outcome.error, StepFailed):
            raise with_remedy(outcome.error, machine)
        outcome.raise_for_failure()
        if self._console.exit_code is None:
            raise GuestLost("the guest reported success, and no exit status")
        return self._console.exit_code

    def _notice(self, message: str) -> None:
        self._events(Notice(level="warning", message=message))

    def _info(self, message: str) -> None:
        self._events(Notice(level="info", message=message))


def _check_platform(name: str, home: Home) -> None:
    """Make sure that this host can execute what is in an image of the store.

    Raises:
        InputError: it can't.
    """
    image = home.images.find(Reference.parse(name, what="an image such as app or app:1.2"))
    host = Platform.host()
    if image is not None and image.record.platform and Platform.parse(image.record.platform) != host:
        raise InputError(
            f"the image {image.tag} is for {image.record.platform}, and this host executes {host}",
            hint="build it for this platform, or run it on a host of its own",
        )

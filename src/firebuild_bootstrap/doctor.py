"""What this machine can do, and what is missing for the rest: `firebuild doctor`."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from firebuild_bootstrap import __version__
from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.outputs import PROGRAMS_PATH
from firebuild_bootstrap.machine.drivers import make_machine
from firebuild_bootstrap.machine.kvm import check_kvm, guest_problem
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.sandbox import IdMode, Sandbox
from firebuild_bootstrap.sandbox.bwrap import probe
from firebuild_bootstrap.sizes import human_size
from firebuild_pki import CAError
from firebuild_pki.display import counted
from firebuild_pki.preflighting import RowLevel, preflight
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.machine.workspace import BuildDirectory
    from firebuild_bootstrap.settings import BuildSettings

_LITTLE: Final = 2 << 30
_PATIENCE: Final = timedelta(seconds=5)
# program, package of Debian, what it is for
_PROGRAMS: Final = (
    ("mkfs.erofs", "erofs-utils", "EROFS outputs"),
    ("sqfstar", "squashfs-tools", "SquashFS outputs"),
    ("e2fsck", "e2fsprogs", "the driver external with a drive of its own"),
    ("git", "git", "ADD of repositories, and contexts from them"),
    ("mmdebstrap", "mmdebstrap", "making Debian bases without a registry"),
    ("slirp4netns", "slirp4netns", "a network of their own for RUN steps on this host"),
)


class Level(StrEnum):
    """How something turned out."""

    OK = "ok"
    LIMITED = "limited"
    """Builds work, some more slowly, or with less."""
    MISSING = "missing"
    """Something that the configuration does not need cannot be used."""
    WRONG = "wrong"
    """Builds with this configuration fail."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        about: its subject.
        level: how it turned out.
        message: what was found.
        hint: what to do about it.
    """

    about: str
    level: Level
    message: str
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {"about": self.about, "level": self.level.value, "message": self.message, "hint": self.hint}


def examine(
    settings: BuildSettings, home: Home, *, network: bool, check: Callable[[], None]
) -> Iterator[Finding]:
    """Look at this machine, one thing after the other.

    Args:
        settings: the configuration, which says what builds need.
        home: the store.
        network: whether registries are asked for an answer.
        check: called again and again; what it raises ends everything.

    Yields:
        what was found, each as soon as it is known.
    """
    yield Finding("system", Level.OK, _system())
    yield _clock()
    yield _store(home)
    yield from _tried("sandbox", Level.WRONG, lambda: _sandbox(home))
    yield _kvm()
    with ExitStack() as stack:
        try:
            workspace = stack.enter_context(home.workspace(f"doctor-{secrets.token_hex(4)}"))
        except FirebuildError as error:
            yield Finding("machine", Level.WRONG, error.message, error.hint)
        else:
            yield _overlay(home, workspace.path)
            for driver in get_args(MachineSettings.model_fields["driver"].annotation):
                check()
                yield from _driver(driver, settings, home, workspace.part(driver))
    for program, package, purpose in _PROGRAMS:
        yield _program(program, package, purpose)
    if network:
        for host in dict.fromkeys((settings.registries.default, *settings.registries.hosts)):
            check()
            yield _registry(host, settings, check)
    yield from _authority(settings, check)


def _tried(about: str, level: Level, look: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield look()
    except FirebuildError as error:
        yield Finding(about, level, error.message, error.hint)


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processors = len(os.sched_getaffinity(0))
    return (
        f"{name}, Linux {platform.release()} on {platform.machine()}, Python {platform.python_version()}, "
        f"firebuild {__version__}; "
        f"{counted(processors, 'processor')}, {human_size(memory)} of memory"
    )


def _clock() -> Finding:
    """Compare the clock with the files of this program: certificates begin a few minutes in the past."""
    installed = Path(__file__).stat().st_mtime
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(now))
    if now < installed:
        hint = "set it, by NTP if you can: certificates are valid from now on"
        return Finding("clock", Level.WRONG, f"{shown}: this program was installed after that", hint)
    return Finding("clock", Level.OK, shown)


def _store(home: Home) -> Finding:
    usage = shutil.disk_usage(home.root)
    text = f"{home.root}: {human_size(usage.free)} free of {human_size(usage.total)}"
    if usage.free < _LITTLE:
        hint = "`firebuild images prune` and `firebuild cache prune` make room; store.path names another disk"
        return Finding("store", Level.LIMITED, text, hint)
    return Finding("store", Level.OK, text)


def _sandbox(home: Home) -> Finding:
    found = home.idmap
    # A build finds out as it goes; where there is only one id mapping, nothing has been tried yet.
    sandbox = Sandbox(found)
    if words := probe(sandbox):
        return Finding("sandbox", Level.WRONG, words, sandbox.remedy())
    owners = {
        IdMode.FULL: "files may belong to any user",
        IdMode.SUBIDS: "files may belong to any user, by the subordinate ids of this one",
        IdMode.SINGLE: "all files belong to one user",
    }[found.mode]
    if found.note:
        return Finding("sandbox", Level.LIMITED, f"user namespaces work; {owners}", found.note)
    return Finding("sandbox", Level.OK, f"user namespaces work; {owners}")


def _overlay(home: Home, directory: Path) -> Finding:
    try:
        problem = home.trees.overlay_problem(directory)
        uncached = home.trees.copies_problem(directory) if problem else ""
    except FirebuildError as error:
        return Finding("overlay", Level.LIMITED, error.message, error.hint)
    if problem:
        hint = "builds copy their base instead"
        if uncached:
            problem += f"; and nothing there could mean in a layer that a file was removed: {uncached}"
            hint += ", and no step is kept in the cache"
        hint += "; a newer kernel, or a store on ext4, XFS or Btrfs (store.path), mounts overlays"
        return Finding("overlay", Level.LIMITED, problem, hint)
    return Finding("overlay", Level.OK, "the store can be the upper directory of an overlay")


def _kvm() -> Finding:
    try:
        check_kvm()
    except FirebuildError as error:
        return Finding("kvm", Level.LIMITED, error.message, error.hint)
    if platform.machine() != "x86_64":
        return Finding("kvm", Level.OK, "makes virtual machines")
    problem = guest_problem()
    if problem:
        hint = (
            "a virtual machine may not pass virtualisation on, and a busy one take longer; "
            "qemu tries it with its own kernel, and emulates; local does without"
        )
        return Finding("kvm", Level.LIMITED, f"makes virtual machines, but {problem}", hint)
    return Finding("kvm", Level.OK, "runs a guest of a few bytes")


def _driver(driver: str, settings: BuildSettings, home: Home, workspace: BuildDirectory) -> Iterator[Finding]:
    chosen = settings.machine.driver == driver
    about = f"driver {driver}"
    machine_settings = settings.machine.model_copy(update={"driver": driver})
    notices: list[str] = []
    try:
        machine = make_machine(
            machine_settings,
            workspace,
            bind=settings.bootstrap.bind,
            store=home.root,
            notice=notices.append,
        )
        accelerator = getattr(machine, "choose_accelerator", None)
        how = "" if accelerator is None else _accelerated(*accelerator())
        machine.close()
    except FirebuildError as error:
        yield Finding(about, Level.WRONG if chosen else Level.MISSING, error.message, error.hint)
        return
    mark = " (the configured one)" if chosen else ""
    yield Finding(about, Level.OK, f"can be used{mark}{how}")
    for text in notices:
        yield Finding(about, Level.LIMITED, text)


def _accelerated(accelerator: str, why: str) -> str:
    return f", with {accelerator.upper()}{f': {why}' if why else ''}"


def _program(program: str, package: str, purpose: str) -> Finding:
    found = shutil.which(program, path=PROGRAMS_PATH)
    if found is not None:
        return Finding(program, Level.OK, f"{found}, for {purpose}")
    hint = f"install the package {package}: apt install {package}"
    return Finding(program, Level.MISSING, f"was not found; it is for {purpose}", hint)


def _registry(host: str, settings: BuildSettings, check: Callable[[], None]) -> Finding:
    from firebuild_bootstrap.events import Tasks
    from firebuild_bootstrap.registry.pull import connected

    brief = settings.registries.model_copy(update={"timeout": _PATIENCE, "attempts": 1})
    registries = connected(settings.model_copy(update={"registries": brief}), check, Tasks())
    about = f"registry {host}"
    with ExitStack() as stack:
        stack.callback(registries.close)
        try:
            answers = stack.enter_context(
                registries.registry(host).send(
                    "GET", "/v2/", scopes=(), expected=(200, 401, 403, 404), what="its API"
                )
            )
        except (FirebuildError, CAError) as error:
            return Finding(about, Level.LIMITED, error.message, error.hint)
        words = "answers" if answers.status == 200 else f"answers with status {answers.status}"
    return Finding(about, Level.OK, words)


def _authority(settings: BuildSettings, check: Callable[[], None]) -> Iterator[Finding]:
    about = f"CA {settings.ca.provider}"
    report = preflight(
        settings.ca,
        build_time=settings.bootstrap.build_time,
        ttl=settings.bootstrap.certificate_lifetime,
        check=check,
    )
    for row in report.rows:
        if row.level is RowLevel.FATAL:
            yield Finding(about, Level.WRONG, f"{row.about}: {row.message}", row.hint)
        elif row.level is RowLevel.WARNING:
            yield Finding(about, Level.LIMITED, f"{row.about}: {row.message}", row.hint)
    if report.ready:
        yield Finding(about, Level.OK, "issues the certificates that a build needs")


def worst(findings: list[Finding]) -> Level:
    """Return the worst level; the order of `Level` is that of their weight."""
    order = list(Level)
    return order[max((order.index(one.level) for one in findings), default=0)]

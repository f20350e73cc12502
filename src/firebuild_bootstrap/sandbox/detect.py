"""Which id mapping works here, and what to do where none does."""

from __future__ import annotations

from pathlib import Path

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.sandbox.bwrap import Sandbox, find_bwrap
from firebuild_bootstrap.sandbox.idmap import Host, IdMap, candidates
from firebuild_bootstrap.sandbox.runtime import Bind, Link


def detect(host: Host | None = None, *, bwrap: Path | None = None) -> IdMap:
    """Return the best id mapping that really works here, after trying it.

    Raises:
        MachineError: no sandbox can be made at all; the hint is the remedy for the cause found.
    """
    host = host or Host.current()
    bwrap = bwrap or find_bwrap(host.path)
    words = ""
    for idmap in candidates(host):
        words = probe(Sandbox(idmap, bwrap=bwrap))
        if not words:
            return idmap
    raise MachineError(f"no sandbox could be made here: {words}", hint=remedy(host, bwrap))


def expected(host: Host | None = None) -> IdMap:
    """Return what `detect` would, without trying it where it has no choice.

    A sandbox that can't be made says so itself then; to make one only to see that costs a cached build a
    tenth of its time.

    Raises:
        MachineError: as `detect`.
    """
    host = host or Host.current()
    best, *others = candidates(host)
    return detect(host) if others else best


def probe(sandbox: Sandbox) -> str:
    """Make a sandbox and run `true` in it; return what went wrong, empty when it works."""
    binds: list[Bind | Link] = [Bind(Path("/usr"))]
    for name in ("bin", "lib", "lib64", "nix"):
        path = Path("/", name)
        if path.is_symlink():
            binds.append(Link(str(path.readlink()), str(path)))
        elif path.exists():
            binds.append(Bind(path))
    try:
        done = sandbox.run(["true"], binds=binds, timeout=30)
    except MachineError as error:
        return error.message
    return (
        "" if done.returncode == 0 else done.stderr.decode("utf-8", "replace").strip() or "it failed silently"
    )


def remedy(host: Host, bwrap: Path) -> str:
    """Say what keeps user namespaces from working on this host and how the administrator allows them."""
    if _sysctl(host, "kernel/unprivileged_userns_clone") == "0" and host.uid != 0:
        return (
            "user namespaces are switched off for users: run `sysctl -w kernel.unprivileged_userns_clone=1`"
        )
    if _sysctl(host, "user/max_user_namespaces") == "0":
        return "user namespaces are switched off: run `sysctl -w user.max_user_namespaces=15000`"
    if _sysctl(host, "kernel/apparmor_restrict_unprivileged_userns") == "1" and host.uid != 0:
        return (
            f"AppArmor forbids user namespaces to programs without a profile: give {bwrap} a profile with "
            "the rule `userns,`, or run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`"
        )
    if any(mark.exists() for mark in host.container_marks):
        return (
            "this is a container that forbids namespaces: start it with `--security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined --security-opt systempaths=unconfined`, or `--privileged`"
        )
    if not host.uid_map.exists():
        return "this kernel has no user namespaces (CONFIG_USER_NS)"
    return "user namespaces have to be allowed for this user; run as root, or ask the administrator"


def _sysctl(host: Host, name: str) -> str:
    try:
        return (host.sysctl / name).read_text("ascii").strip()
    except OSError:
        return ""

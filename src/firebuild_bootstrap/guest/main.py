"""The command line of `vminit` (docs/vminit.md)."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from firebuild_bootstrap import __version__
from firebuild_bootstrap.locales import ensure_utf8

from .errors import GuestError, complain
from .kernel import address_space_problem
from .metadata import DEFAULT_ADDRESS, MetadataClient
from .units import UNITS, print_flags, print_unit

if TYPE_CHECKING:
    from .enter import Launcher

_ADDRESS_SPACE = 512 << 20


def main(arguments: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Run `vminit` and return its exit status.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
        alone: nothing else is in this process, which may fork.
    """
    if arguments is None:
        ensure_utf8()
    parsed = _parser().parse_args(arguments)
    # A process inherits what its parent ignores or blocks, and then no end of a child would be noticed.
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    try:
        if parsed.mode != "bootstrap" or parsed.print_flags or parsed.print_unit:
            return _run(parsed)
        if problem := address_space_problem(_ADDRESS_SPACE):
            raise GuestError(problem)
        # All that can be done before there are metadata: a host starts its machine while it makes them.
        from .enter import Launcher

        with closing(Launcher(fork=alone, uplink=parsed.uplink)) as launcher:
            from . import bootstrap, executor  # noqa: F401

            return _run(parsed, launcher)
    except GuestError as error:
        if not error.told:
            complain(error.message)
        return error.exit_status
    except KeyboardInterrupt:  # before the build took over the signals
        return 128 + signal.SIGINT


def _run(parsed: argparse.Namespace, launcher: Launcher | None = None) -> int:
    if parsed.print_flags or parsed.print_unit:
        unit = print_unit(parsed.print_unit, parsed.runner_file) if parsed.print_unit else ""
        print(unit or print_flags(_flags(parsed)), end="")
        return 0
    client = MetadataClient(parsed.mmds, timeout=parsed.mmds_timeout)
    document = client.read()
    if parsed.mode == "bootstrap" or (parsed.mode is None and "Bootstrap" in document):
        from .bootstrap import bootstrap, read_block

        # A UNIX socket means a sandbox, whose drives are the host's own.
        sync = not parsed.mmds.startswith("unix:")
        timeouts = {"connect_timeout": parsed.connect_timeout, "call_timeout": parsed.call_timeout}
        folders = {name: getattr(parsed, name) for name in ("layers", "scratch", "caches")}
        bootstrap(
            read_block(document),
            parsed.root,
            **timeouts,
            sync=sync,
            launcher=launcher,
            document=document,
            metadata=client.read,
            **folders,
        )
        return 0
    from .configure import Paths, configure

    paths = Paths(**{name: getattr(parsed, name) for name in Paths.__dataclass_fields__})
    for note in configure(document, parsed.root, paths):
        complain(note)
    return 0


def _flags(parsed: argparse.Namespace) -> dict[str, str]:
    """Return what a service passes on to vminit, defaults included."""
    files = ("environment_file", "hostname_file", "hosts_file", "runner_file")
    values = {
        name: getattr(parsed, name) for name in ("root", "mmds", "mmds_timeout", "connect_timeout", *files)
    }
    return {
        f"--{name.replace('_', '-')}": f"{value:g}" if isinstance(value, float) else value
        for name, value in values.items()
    }


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, found {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vminit",
        description="Prepares the machine it runs in from the metadata service: executes a build "
        "(bootstrap) or applies names, keys and variables (configure). Without a mode the metadata decide.",
    )
    parser.add_argument(
        "--version", action="version", version=f"vminit {__version__}", help="show the version and exit"
    )
    parser.add_argument(
        "mode",
        nargs="?",
        choices=("bootstrap", "configure"),
        help="what to do instead of what the metadata say",
    )
    parser.add_argument("--root", default="/", help="directory of the image (default: /)")
    parser.add_argument(
        "--mmds",
        default=DEFAULT_ADDRESS,
        metavar="ADDRESS",
        help="metadata service, http://host[:port] or unix:/path (default: %(default)s)",
    )
    parser.add_argument(
        "--mmds-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for the metadata service (default: 30)",
    )
    parser.add_argument(
        "--connect-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="bootstrap: how long to wait for the server (default: 30)",
    )
    parser.add_argument(
        "--call-timeout",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="bootstrap: how long the server may take to answer a call, or between two pieces of a file "
        "(default: 300); steps may take as long as they want",
    )
    parser.add_argument(
        "--layers",
        default="",
        metavar="DIR",
        help="bootstrap: mount the image at --root for each step, as an overlay of the directories "
        "DIR/lower/0 (the lowest), DIR/lower/1 and so on, and keep what it changes in DIR/upper/STEP/fs; "
        "without DIR/lower the image is at --root, and what a step changes is found by comparing",
    )
    parser.add_argument(
        "--scratch",
        default="",
        metavar="DIR",
        help="bootstrap: directory outside of the image for the files of RUN --mount "
        "(default: a hidden one in the image, removed at the end)",
    )
    parser.add_argument(
        "--caches",
        default="",
        metavar="DIR",
        help="bootstrap: directory of cache mounts that outlive the build "
        "(default: they last as long as the build)",
    )
    parser.add_argument(
        "--uplink",
        type=int,
        default=-1,
        metavar="FD",
        help="bootstrap: a socket of the host's, which connects a network of their own for RUN steps "
        "(default: they have the network of the machine)",
    )
    service = parser.add_argument_group("as a service of the image").add_mutually_exclusive_group()
    service.add_argument(
        "--print-flags",
        action="store_true",
        help="print all flags as a service reads them, and exit",
    )
    service.add_argument(
        "--print-unit",
        choices=UNITS,
        metavar="FILE",
        help=f"print a service file for systemd or OpenRC, and exit: {', '.join(UNITS)}",
    )
    files = parser.add_argument_group("configure: files to write, below --root")
    files.add_argument("--environment-file", default="/etc/profile.d/firebuild.sh", metavar="PATH")
    files.add_argument("--hostname-file", default="/etc/hostname", metavar="PATH")
    files.add_argument("--hosts-file", default="/etc/hosts", metavar="PATH")
    files.add_argument("--runner-file", default="/usr/bin/firebuild-entrypoint", metavar="PATH")
    return parser


if __name__ == "__main__":
    # What is imported stays: looking for garbage among it would slow the start, and the end that a build
    # waits for.
    gc.set_threshold(50_000)
    status = main(alone=True)
    gc.freeze()
    sys.exit(status)

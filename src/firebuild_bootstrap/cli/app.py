"""The command's root: its groups, and how every error leaves it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

import click

from firebuild_bootstrap.cli.base import base
from firebuild_bootstrap.cli.config import config
from firebuild_bootstrap.cli.failure import report
from firebuild_bootstrap.cli.images import images
from firebuild_bootstrap.cli.rootfs import rootfs
from firebuild_bootstrap.errors import ExitStatus, Interrupted


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 success, 1 a step failed, 2 bad input, 3 certificate authority, 4 guest lost,"
    " 5 timeout, 6 machine, 70 internal error, 130 interrupted.",
)
@click.version_option(version("firebuild"), message="%(prog)s %(version)s")
def app() -> None:
    """Build root file systems for Firecracker microVMs from Dockerfiles, over mutual TLS."""


for command in (rootfs, base, images, config):
    app.add_command(command)


def main() -> None:
    """Run the command line and exit; a mistake of the user never ends in a traceback."""
    # gRPC's core writes refused handshakes to stderr by itself; the service reports them in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        status = app(prog_name="firebuild", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(ExitStatus.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitStatus.BAD_INPUT)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitStatus.INTERNAL)
    except (Exception, Interrupted) as error:
        sys.exit(report(error))
    sys.exit(status if isinstance(status, int) else 0)

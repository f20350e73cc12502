"""Files with holes, such as drives: copied so that holes stay holes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.layers.tree import copy_file


def copy_sparse(source: Path, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy a file to the new file `target`, mode 0600; holes stay holes.

    Args:
        check: called between pieces; what it raises ends the copy and removes the target.

    Raises:
        MachineError: the disk is full, or a file can't be read or written.
    """
    try:
        with open(source, "rb") as reading:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(descriptor, "wb") as writing:
                    copy_file(reading.fileno(), writing.fileno(), check)
            except BaseException:
                target.unlink()
                raise
    except OSError as error:
        raise MachineError(f"{source} can't be copied to {target}: {error.strerror}") from error

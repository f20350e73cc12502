"""Paths that the user names, tried before anything starts: what can't work at the end is an error now."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from firebuild_bootstrap.errors import InputError


def check_writable(path: Path, what: str = "") -> None:
    """Refuse a file, or a new directory, that could not be written at the end.

    Args:
        path: what will be written, by renaming it into its place.
        what: goes before the path in the message, for example `--iidfile `.

    Raises:
        InputError: nothing can be written there, or something is in its place that a file must not replace.
    """
    if not path.name:  # an empty value, or the root
        raise _unwritable(
            what, path, "it is not the name of a file", "put the name of the file after the directory"
        )
    parent = path.parent
    try:
        if not stat.S_ISDIR(os.stat(parent).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unwritable(what, path, f"{parent} is not a directory", "make it first") from error
    except OSError as error:
        raise _unwritable(what, path, error.strerror) from error
    _check_replaced(path, what)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(what, path, f"no right to write in {parent}", "name a file in a directory of yours")
    try:
        descriptor, trial = tempfile.mkstemp(prefix=".firebuild-", dir=parent)
        os.close(descriptor)
        os.unlink(trial)
    except OSError as error:
        raise _unwritable(what, path, error.strerror) from error


def _check_replaced(path: Path, what: str) -> None:
    """Refuse to put a file in the place of something else: as root, in that of /dev/null or /dev/stdout."""
    try:
        in_the_way = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(what, path, error.strerror) from error
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):
        hint = "name the file itself; an image goes to standard output by dest=-"
        raise _unwritable(what, path, "it is a link to an open file", hint)
    if not stat.S_ISREG(in_the_way) and not stat.S_ISDIR(in_the_way):
        raise _unwritable(what, path, "it is not a regular file", "name a file that may be replaced")


def check_can_be_made(directory: Path, what: str = "") -> None:
    """Refuse a directory that does not exist and could not be made, or in which nothing could be written.

    Args:
        directory: what will be made, with all above it.
        what: goes before the message, for example `--out: `.

    Raises:
        InputError: something else is in its way, or there is no right to write there.
    """
    for nearest in (directory, *directory.parents):
        try:
            mode = os.stat(nearest).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(nearest):
                raise InputError(
                    f"{what}{nearest} is a dangling symbolic link",
                    hint="make what it leads to, or remove the link",
                ) from None
            continue
        except OSError as error:
            raise InputError(
                f"{what}{nearest} can't be used: {error.strerror}", hint="name a directory of yours"
            ) from error
        if not stat.S_ISDIR(mode):
            raise InputError(
                f"{what}expected a directory, but {nearest} is not one",
                hint="name a directory, or move the file away",
            )
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".firebuild-", dir=nearest))
        except OSError as error:
            raise InputError(
                f"{what}{nearest} can't be written: {error.strerror}", hint="name a directory of yours"
            ) from error
        return


def check_store(root: Path, *, writable: bool, setting: str) -> None:
    """Refuse a store that can't be used.

    Args:
        root: its directory, which is made if it is to be written.
        writable: whether it will be.
        setting: what says where it is.

    Raises:
        InputError: it is not a directory, or there is no right to read or write it; or root would write in
            that of another user.
    """
    if writable and os.geteuid() == 0:
        _check_owner(root, setting)
    hint = f"set {setting} to another directory, or get the right to use this one"
    task = "written" if writable else "read"
    try:
        if writable:
            root.mkdir(parents=True, exist_ok=True)
        elif not stat.S_ISDIR(os.stat(root).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except FileNotFoundError as error:
        if not writable and not os.path.islink(root):
            return
        raise InputError(f"{root}: the store can't be {task}: {error.strerror}", hint=hint) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE):
            raise  # not a matter of the path
        reason = "Not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"{root}: the store can't be {task}: {reason}", hint=hint) from error
    # Root may have written here, by an earlier version or by hand.
    parts = [
        root / name / part for name in ("images", "bases") for part in ("", "names", "content", "staging")
    ]
    for directory in (root, root / "builds", *parts):
        if directory.exists() and not os.access(directory, (os.W_OK if writable else os.R_OK) | os.X_OK):
            read_only = writable and os.statvfs(directory).f_flag & os.ST_RDONLY
            reason = "the file system is read-only" if read_only else "no right to do that"
            raise InputError(f"{directory}: the store can't be {task}: {reason}", hint=hint)


def _check_owner(root: Path, setting: str) -> None:
    """Refuse root the store of a user, who could neither use nor remove what root writes there.

    `sudo` may keep HOME or FIREBUILD_HOME. An empty directory of anybody is root's from now on, as is a
    volume of a container.
    """
    nearest = next(directory for directory in (root, *root.parents) if os.path.exists(directory))
    owner = nearest.stat().st_uid
    if owner == 0:
        return
    if nearest == root:
        with suppress(OSError):
            if all(os.lstat(root / name).st_uid != owner for name in os.listdir(root)):
                return
        with suppress(OSError), tempfile.TemporaryFile(dir=root) as trial:
            if os.fstat(trial.fileno()).st_uid == owner:  # all that is written there belongs to the same user
                return
    elif setting != "FIREBUILD_HOME" or setting in os.environ or os.environ.get("SUDO_UID") != str(owner):
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    raise InputError(
        f"{root}: the store belongs to the user {name}, "
        "who could neither use nor remove what root writes there",
        hint=f"run it as that user: `sudo -u {name} firebuild …`; for a store of root's set {setting} to "
        "another directory, or use `sudo -H`",
    )


def _unwritable(what: str, path: Path, why: str | None, hint: str | None = None) -> InputError:
    return InputError(f"{what}{path} can't be written: {why}", hint=hint)

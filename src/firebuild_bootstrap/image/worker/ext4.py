"""Tree -> ext4 file system image, without mounting anything (mke2fs -d)."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from firebuild_bootstrap.image.worker.extfs import ROOT_INODE, Ext4Image
from firebuild_bootstrap.image.worker.imagewalk import walk_image
from firebuild_bootstrap.layers.tar import DIRECTORY, FILE, HARDLINK, SYMLINK, Entry, LayerError
from firebuild_bootstrap.layers.tree import tree_entries

_MIB: Final = 1024 * 1024
_BLOCK: Final = 4096
_ATTEMPTS: Final = 6
_ERA: Final = 1 << 32
# Any fixed value makes images comparable; version 8 UUIDs (RFC 9562) are free for such uses.
_FIXED_UUID: Final = "f12eb111-d000-8000-8000-000000000001"


class Ext4Options(NamedTuple):
    """How the file system is made.

    Args:
        free: bytes of free space that the guest finds, at least, when no size is asked for.
        size: bytes of the whole image; 0 means as `free` wants it.
        epoch: seconds since 1970; with it, the same tree gives the same image, byte for byte.
        label: name of the file system, up to 16 bytes.
        inodes: number of files that can be made on it besides, at least.
        internal: it is a drive of a machine, and nobody's image: without a journal, which no reader needs,
            and without lost+found, which is in no layer; neither checked nor given a digest.
    """

    free: int = 64 * _MIB
    size: int = 0
    epoch: int | None = None
    label: str = "rootfs"
    inodes: int = 4096
    internal: bool = False


def make_ext4(root: str, image: str, options: Ext4Options) -> None:
    """Write the tree `root` into the new file `image` and check the result with e2fsck.

    Raises:
        LayerError: the tree does not fit into the disk or the size, or mke2fs or e2fsck is not content.
    """
    needs = measure(root)
    if not options.size:
        _make_large_enough(root, image, needs, options)
    elif _make(root, image, -(-options.size // _MIB) * _MIB, needs.inodes, options):
        least = _make_large_enough(root, image, needs, options) // _MIB
        os.unlink(image)
        raise LayerError(
            f"--output ext4: the files need size={least}MiB, found size={options.size // 1024}KiB",
            f"ask for size={least}MiB or more, or leave size= out",
            asked=True,
        )
    lines = _modification_times(image, needs, options.epoch)
    if options.epoch is not None:
        lines += _other_times(image, options.epoch)
    if options.internal and not os.path.lexists(os.path.join(root, "lost+found")):
        lines.append("rmdir lost+found")
    _debugfs(image, _environment(options.epoch), lines)
    if not options.internal:
        _check(image)


def make_empty_ext4(image: str, size: int, *, journal: bool) -> None:
    """Make the new sparse file `image` of `size` bytes, with an empty file system that one machine uses.

    Args:
        journal: it has to outlive a machine that dies.

    Raises:
        LayerError: mke2fs failed.
    """
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-m", "0"]
    # A new file is all zeros: neither mke2fs nor the guest's kernel (noinit_itable) has to write them.
    command += ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]
    command += ["-O", "^resize_inode" if journal else "^has_journal,^resize_inode"]
    done = _run([*command, image, f"{size // 1024}k"], _environment(None))
    if done.returncode != 0:
        raise LayerError(f"mke2fs failed: {(done.stderr + done.stdout).strip()}")


def _make_large_enough(root: str, image: str, needs: Measure, options: Ext4Options) -> int:
    """Make the image with `options.free` bytes of free space and return its size, in whole MiB."""
    size = _initial_size(needs.content, needs.inodes, 0 if options.size else options.free, options)
    for _attempt in range(_ATTEMPTS):
        size = -(-size // _MIB) * _MIB
        complaint = _make(root, image, size, needs.inodes, options)
        if not complaint:
            return size
        size += size // 3
    raise LayerError(f"mke2fs found no room for the tree in {size // _MIB} MiB: {complaint}")


def _make(root: str, image: str, size: int, inodes: int, options: Ext4Options) -> str:
    """Make the image and return "", or what mke2fs says where the size is too small."""
    complaint = _mke2fs(root, image, size, inodes, options)
    if not complaint:
        return ""
    with suppress(FileNotFoundError):
        os.unlink(image)
    if not _is_too_small(complaint):
        raise LayerError(f"mke2fs failed: {complaint}")
    return complaint


class Measure(NamedTuple):
    """What a tree takes in an ext4 file system.

    Args:
        content: bytes in blocks; holes take none.
        inodes: number of them.
        root: the tree's own directory.
        far_times: path and seconds since 1970 of modification times that need more than 32 bits.
    """

    content: int
    inodes: int
    root: Entry
    far_times: Mapping[str, int]


def measure(root: str) -> Measure:
    """Read the whole tree `root`, but for the content of its files."""
    content = inodes = 0
    far: dict[str, int] = {}
    top = Entry("", DIRECTORY)
    for entry, _ in tree_entries(root):
        top = top if entry.path else entry
        seconds = entry.mtime_ns // 10**9
        content += len(os.fsencode(entry.path.rpartition("/")[2])) + 12  # in its directory
        if not -_ERA // 2 <= seconds < _ERA // 2 and entry.path:
            far[entry.path] = seconds
        if entry.kind == HARDLINK:
            continue
        inodes += 1
        if entry.kind == FILE:
            content += -(-entry.stored // _BLOCK) * _BLOCK + 12 * len(entry.regions or ())
        elif entry.kind == DIRECTORY:
            content += _BLOCK
        elif entry.kind == SYMLINK and len(os.fsencode(entry.linkname)) >= 60:
            content += _BLOCK  # a shorter one lives in its inode
    return Measure(content, inodes, top, far)


def _initial_size(content: int, inodes: int, free: int, options: Ext4Options) -> int:
    journal = (
        4 * _MIB if content + free < 128 * _MIB else 16 * _MIB if content + free < 1024 * _MIB else 64 * _MIB
    )
    # 2 % for extents, bitmaps and group descriptors.
    return content + content // 50 + free + journal + _inode_count(inodes, options) * 256 + 2 * _MIB


def _inode_count(inodes: int, options: Ext4Options) -> int:
    return inodes + inodes // 4 + options.inodes


def _environment(epoch: int | None) -> dict[str, str]:
    # The host's defaults must not show in the image; without a file, mke2fs takes those it was built with.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    env = {"PATH": path, "LC_ALL": "C", "MKE2FS_CONFIG": "/nonexistent", "MKE2FS_SKIP_CHECK_MSG": "1"}
    if epoch is not None:
        env |= {"SOURCE_DATE_EPOCH": str(epoch), "E2FSPROGS_FAKE_TIME": str(max(epoch, 1)), "TZ": "UTC"}
    return env


def _mke2fs(root: str, image: str, size: int, inodes: int, options: Ext4Options) -> str:
    extended = ["lazy_itable_init=0", "lazy_journal_init=0", "nodiscard"]
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK), "-I", "256", "-m", "0"]
    command += ["-N", str(_inode_count(inodes, options)), "-L", options.label]
    if options.internal:
        command += ["-O", "^has_journal"]
    if options.epoch is not None:
        extended.append(f"hash_seed={_FIXED_UUID}")
        command += ["-U", _FIXED_UUID]
    command += ["-E", ",".join(extended), "-d", root, image, f"{size // 1024}k"]
    done = _run(command, _environment(options.epoch))
    return "" if done.returncode == 0 else (done.stderr + done.stdout).strip() or "it failed silently"


def _is_too_small(complaint: str) -> bool:
    words = ("No space left", "Could not allocate", "too small", "allocate block", "inode")
    return any(word in complaint for word in words)


def _other_times(image: str, epoch: int) -> list[str]:
    """Return what sets the times that come from the tree's own change times, which nobody can set there."""
    low, era = _split(epoch)
    return [
        f"set_inode_field <{number}> {name} @{low}\nset_inode_field <{number}> {name}_extra {era}"
        for number in _used_inodes(image, _environment(epoch))
        for name in ("ctime", "atime", "crtime")
    ]


def _modification_times(image: str, needs: Measure, epoch: int | None) -> list[str]:
    """Return what sets the root's metadata, which mke2fs leaves out, and the times that it does not keep.

    Those are the times that need more than 32 bits, lost by mke2fs before 1.47.1, and those after `epoch`.
    """
    root = needs.root
    lines = [f"set_inode_field <2> mode 0{stat.S_IFDIR | root.mode:o}"]
    lines += [f"set_inode_field <2> uid {root.uid}", f"set_inode_field <2> gid {root.gid}"]
    times = {"": root.mtime_ns // 10**9, **needs.far_times}
    reader = Ext4Image(image)
    # Without an epoch nearly all are right, and the root is the first.
    found = walk_image(reader) if needs.far_times or epoch is not None else [("", reader.inode(ROOT_INODE))]
    for path, inode in found:
        seconds = times.get(path, inode.mtime_ns // 10**9)
        if epoch is not None and seconds >= epoch:
            seconds = epoch
        elif path not in times:
            continue
        low, era = _split(seconds)
        field = f"set_inode_field <{inode.number}>"
        lines.append(f"{field} mtime @{low}\n{field} mtime_extra {era}")
    reader.close()
    return lines


def _split(seconds: int) -> tuple[int, int]:
    """Return the lower 32 bits and the two bits above them, as "Inode Timestamps" of ext4 has it."""
    seconds = min(max(seconds, -_ERA // 2), 4 * _ERA - _ERA // 2 - 1)
    return seconds % _ERA, (seconds + _ERA // 2) // _ERA


def _debugfs(image: str, env: Mapping[str, str], lines: Sequence[str]) -> None:
    done = _run(["debugfs", "-w", "-f", "/dev/stdin", image], env, "\n".join(lines))
    complaints = [line for line in done.stderr.splitlines() if line and not line.startswith("debugfs 1.")]
    if done.returncode != 0 or complaints:  # it ends with 0 whatever goes wrong
        raise LayerError(f"debugfs could not finish {image}: {' '.join(complaints[:3])}")


def _used_inodes(image: str, env: Mapping[str, str]) -> list[int]:
    text = _run(["dumpe2fs", image], env).stdout
    found = re.search(r"^Inode count:\s+(\d+)", text, re.MULTILINE)
    total = int(found[1]) if found else 0
    free: set[int] = set()
    for ranges in re.findall(r"^  Free inodes: (.*)$", text, re.MULTILINE):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges):
            free.update(range(int(first), int(last or first) + 1))
    return [number for number in (2, *range(11, total + 1)) if number not in free]


def _check(image: str) -> None:
    done = _run(["e2fsck", "-f", "-n", image], _environment(None))
    if done.returncode != 0:
        raise LayerError(f"e2fsck is not content with {image}: {(done.stdout + done.stderr).strip()[-500:]}")


def _run(command: list[str], env: Mapping[str, str], text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=dict(env), input=text, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError as error:
        raise LayerError(
            f"the program {command[0]} was not found", "install the package e2fsprogs"
        ) from error

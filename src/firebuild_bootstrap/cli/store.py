"""`firebuild base`, `cache` and `rm-tree`: what is kept between builds, and how it is removed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.docker import Commands
from firebuild_bootstrap.cli.options import (
    FilePath,
    complete_bases,
    config_option,
    home_from,
    json_option,
    leave_out_closed,
    listing,
    read_size,
    settings_from,
    watched,
)
from firebuild_bootstrap.cli.output import print_json
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_pki.display import counted, one_line
from firebuild_pki.homes import read_small
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.bases import Base
    from firebuild_bootstrap.image.config import ImageConfig
    from firebuild_bootstrap.image.drives import DriveUsage
    from firebuild_bootstrap.solve.cache import Entry, Usage
    from firebuild_bootstrap.solve.cache_mounts import CacheMountUsage

_SHORT = 12
_WIDTH = 60


@click.group(cls=Commands)
def base() -> None:
    """Import, list and remove the bases that FROM names."""


@base.command("import")
@click.argument("name")
@click.argument("path", type=FilePath(path_type=Path, exists=True))
@click.option(
    "--image-config",
    type=FilePath(path_type=Path, dir_okay=False),
    help="JSON with the base's OCI config (Env, Entrypoint, User, …).",
)
@config_option
def import_(name: str, path: Path, image_config: Path | None, config_file: Path | None) -> None:
    """Import a directory or tar archive as the base NAME[:TAG], and replace an older one."""
    config = _read_config(image_config)
    with watched(config_file) as home:
        kept = home.bases.import_base(name, path, config)
    _print_base(kept)


@base.command("from-host")
@click.argument("name", default="host")
@config_option
def from_host(name: str, config_file: Path | None) -> None:
    """Make a base from this machine's own shell and core tools, without a download and without root."""
    with watched(config_file) as home:
        kept = home.bases.create_from_host(name)
    _print_base(kept)


@base.command("list")
@json_option
@config_option
def list_(as_json: bool, config_file: Path | None) -> None:
    """List the bases with the time of their import, size and digest."""
    from firebuild_bootstrap.cli.screen import moment, print_table
    from firebuild_bootstrap.sizes import human_size

    with listing() as leave_out:
        bases = home_from(settings_from(config_file)).bases.list(leave_out)
        if as_json:
            print_json([_document(found) for found in bases])
            return
        rows = [(found.name, moment(found.imported), human_size(found.size), found.digest) for found in bases]
        print_table(("NAME", "IMPORTED", "SIZE", "DIGEST"), rows)


@base.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_bases)
@config_option
def rm(names: tuple[str, ...], config_file: Path | None) -> None:
    """Remove bases; if one does not exist, none is removed. Images built from them are kept."""
    from firebuild_bootstrap.image.names import Reference

    store = home_from(settings_from(config_file), writable=True).bases
    wanted = {Reference.parse_tag(name): name for name in names}
    known = set(store.names())
    for name in (name for tag, name in wanted.items() if tag not in known):
        store.remove(name)  # says what there is
    for name in wanted.values():
        store.remove(name)
        click.echo(f"removed {name}")


def _document(found: Base) -> dict[str, Any]:
    return {
        "name": found.name,
        "imported": found.imported,
        "size": found.size,
        "digest": found.digest,
        "path": str(found.archive),
        "config": found.config.as_json(),
    }


def _print_base(kept: Base) -> None:
    from firebuild_bootstrap.sizes import human_size

    click.echo(f"{kept.name}  {human_size(kept.size)}  {kept.digest}")


def _read_config(path: Path | None) -> ImageConfig | None:
    import json

    from firebuild_bootstrap.errors import Location
    from firebuild_bootstrap.image.config import ImageConfig
    from firebuild_bootstrap.image.oci import MAX_DOCUMENT

    if path is None:
        return None
    where = Location(str(path))
    try:
        document = json.loads(read_small(path, MAX_DOCUMENT, patience=None).decode())
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError("expected JSON: it is nested too deeply", location=where) from error
    except ValueError as error:
        raise InputError(f"expected JSON: {error}", location=where) from error
    if not isinstance(document, dict):
        raise InputError(f"expected a JSON object, found {document!r:.40}", location=where)
    try:
        return ImageConfig.from_json(document)
    except InputError as error:
        raise InputError(error.message, hint=error.hint, location=where) from error


@click.group(cls=Commands)
def cache() -> None:
    """Show and prune the cache of builds."""


@dataclass(frozen=True)
class _Row:
    """One thing in the cache, as both forms of the table show it."""

    kind: str
    key: str
    text: str
    size: int
    created: float
    last_used: float
    in_use: bool
    named: bool = False
    origin: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "key": self.key,
            "step": self.text,
            "bytes": self.size,
            "created": _time(self.created),
            "last_used": _time(self.last_used),
            "in_use": self.in_use,
            "image": self.named,
            "origin": self.origin,
        }


@cache.command()
@json_option
@config_option
def du(as_json: bool, config_file: Path | None) -> None:
    """Show what is in the cache: results of steps, unpacked bases, drives of machines, cache mounts.

    The least recently used entries come first. The origin is the cache of another machine from which a result
    came.
    """
    from firebuild_bootstrap.cli.screen import print_table
    from firebuild_bootstrap.image.drives import snapshot_drives
    from firebuild_bootstrap.sizes import human_size
    from firebuild_bootstrap.solve.cache_mounts import cache_mounts

    home = home_from(settings_from(config_file))
    with listing() as leave_out:
        leave_out_closed(home, leave_out)
        for path in home.cache.damaged_records():
            leave_out(MachineError(f"{path} is damaged", hint="`firebuild cache prune` removes it"))
        bases = {base.digest: base.name for base in home.bases.list(leave_out)}
        rows = [_of_layer(use, bases) for use in home.cache.usage()]
        rows += [_of_drive(drive) for drive in snapshot_drives(home.root)]
        rows += [_of_mount(mount) for mount in cache_mounts(home.root)]
        total = sum(row.size for row in rows)
        if as_json:
            print_json({"bytes": total, "entries": [row.as_json() for row in rows]})
            return
        cells = [
            (
                row.key[:_SHORT],
                one_line(row.text, _WIDTH),
                human_size(row.size),
                _time(row.created) or "-",
                _time(row.last_used) or "-",
                "yes" if row.in_use else "image" if row.named else "no",
                one_line(row.origin, _WIDTH) or "-",
            )
            for row in rows
        ]
        header = ("KEY", "STEP", "SIZE", "CREATED", "LAST USED", "IN USE", "ORIGIN")
        print_table(header, [*cells, ("total", f"{len(rows)} entries", human_size(total), "", "", "", "")])


@cache.command()
@click.option(
    "--all", "-a", "everything", is_flag=True, help="Remove all entries that no running build uses."
)
@click.option(
    "--max-size",
    "--keep-storage",
    "--max-used-space",
    metavar="SIZE",
    help="Remove entries until the cache has at most this size, for example 5GiB.",
)
@click.option(
    "--older-than",
    metavar="DURATION",
    help="Remove entries that were not used for this time, for example 72h or 2w.",
)
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="until=DURATION",
    help="The same as --older-than, in Docker's syntax.",
)
@click.option(
    "--imported",
    is_flag=True,
    help="Remove entries that came from caches of other machines, which still have them.",
)
@click.option("--dry-run", "-n", is_flag=True, help="Only print what would be removed.")
@click.option("--force", "-f", is_flag=True, hidden=True, expose_value=False)
@config_option
def prune(
    *,
    everything: bool,
    max_size: str | None,
    older_than: str | None,
    filters: tuple[str, ...],
    imported: bool,
    dry_run: bool,
    config_file: Path | None,
) -> None:
    """Remove entries from the cache, the least recently used first, but none that a running build uses.

    Without options it removes results that no build can find any more, unpacked bases without results, and
    drives of virtual machines, which are rewritten on demand. Cache mounts are removed by --all and
    --older-than, and by --max-size if they alone exceed it.
    """
    from firebuild_bootstrap.sizes import human_size

    ages = [age for age in (_seconds(older_than), age_of(read_filters(filters, "until"))) if age is not None]
    most = None if max_size is None else read_size(max_size, "--max-size")
    limits = _Limits(everything, most, max(ages, default=None), imported)
    home = home_from(settings_from(config_file), writable=not dry_run)
    verb = "would remove" if dry_run else "removed"
    freed = 0
    with listing("which layers images need is not known in full") as leave_out:
        home.images.list(leave_out)
        for path in home.cache.damaged_records():
            click.echo(f"{verb} record {path.name}, which is damaged")
        for kind, text, size in _prune(home, limits, dry_run=dry_run):
            click.echo(f"{verb} {kind} {one_line(text, _WIDTH)} ({human_size(size)})")
            freed += size
        if not dry_run:
            click.echo(f"freed {human_size(freed)}")


@dataclass(frozen=True)
class _Limits:
    everything: bool
    max_size: int | None
    older_than: float | None
    imported: bool


def _prune(home: Home, limits: _Limits, *, dry_run: bool) -> list[tuple[str, str, int]]:
    from firebuild_bootstrap.image.drives import prune_snapshot_drives, snapshot_drives
    from firebuild_bootstrap.solve.cache_mounts import cache_mounts, prune_cache_mounts

    mounted = cache_mounts(home.root)
    left = sum(mount.size for mount in mounted)
    layers = home.cache.prune(
        everything=limits.everything,
        max_size=None if limits.max_size is None else max(limits.max_size - left, 0),
        older_than=limits.older_than,
        imported=limits.imported,
        dry_run=dry_run,
    )
    removed = [("base" if entry.is_base else "step", _text(entry), entry.size) for entry in layers]
    if dry_run:
        drives = [drive for drive in snapshot_drives(home.root) if not drive.in_use]
    else:
        drives = prune_snapshot_drives(home.root)
    removed += [("drive", f"of {counted(drive.layers, 'layer')}", drive.size) for drive in drives]
    wanted = _mounts_to_remove(limits, left)
    if dry_run:
        mounts = [mount for mount in mounted if not mount.in_use and wanted(mount)]
    else:
        mounts = prune_cache_mounts(home.root, home.trees.remove, wanted) if mounted else []
    return removed + [("cache mount", mount.id, mount.size) for mount in mounts]


def _mounts_to_remove(limits: _Limits, left: int) -> Callable[[CacheMountUsage], bool]:
    import time

    now = time.time()

    def wanted(mount: CacheMountUsage) -> bool:
        nonlocal left
        old = limits.older_than is not None and mount.last_used < now - limits.older_than
        too_much = limits.max_size is not None and left > limits.max_size
        if not (limits.everything or old or too_much):
            return False
        left -= mount.size
        return True

    return wanted


def _of_layer(use: Usage, bases: dict[str, str]) -> _Row:
    entry = use.entry
    text = f"FROM {bases[entry.id]}" if entry.id in bases else _text(entry)
    kind = "base" if entry.is_base else "step"
    key = entry.key or entry.id.removeprefix("sha256:")
    return _Row(
        kind, key, text, entry.size, entry.created, use.last_used, use.in_use, use.named, entry.origin
    )


def _text(entry: Entry) -> str:
    return entry.text or entry.key


def _of_mount(mount: CacheMountUsage) -> _Row:
    return _Row("mount", "mount", mount.id, mount.size, 0.0, mount.last_used, mount.in_use)


def _of_drive(drive: DriveUsage) -> _Row:
    text = f"drive of {counted(drive.layers, 'layer')}"
    return _Row("drive", drive.path.name, text, drive.size, 0.0, drive.last_used, drive.in_use)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else ""


def _seconds(text: str | None, what: str = "--older-than") -> float | None:
    import durationpy

    if text is None:
        return None
    try:
        seconds = float(durationpy.from_str(text).total_seconds())
    except durationpy.DurationError as error:
        raise InputError(
            f"{what}: expected a duration such as 72h or 2w, found {one_line(text, 100)}"
        ) from error
    if seconds < 0:
        raise InputError(f"{what}: expected a duration of zero or more, found {one_line(text, 100)}")
    return seconds


def read_filters(texts: Sequence[str], *known: str) -> list[tuple[str, str]]:
    """Read `--filter NAME=VALUE`, each name one of the `known`; `label!` is a name of its own.

    Raises:
        InputError: it is another name, or has no value.
    """
    found = []
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known or not value:
            forms = " or ".join(f"{name}=…" for name in known)
            raise InputError(f"--filter: expected {forms}, found {one_line(text, 100)}")
        found.append((name, value))
    return found


def age_of(filters: Sequence[tuple[str, str]]) -> float | None:
    """Return the seconds that something has to be old for the filters `until`; None without any.

    As for Docker, the value is a duration, a time (RFC 3339, or a date), or seconds since 1970.

    Raises:
        InputError: it is none of these.
    """
    import time

    ages = []
    for _, text in (one for one in filters if one[0] == "until"):
        try:
            moment = (
                float(text) if text.isdecimal() else datetime.fromisoformat(text).astimezone().timestamp()
            )
            ages.append(max(time.time() - moment, 0.0))
        except (ValueError, OverflowError):
            ages.append(_seconds(text, "--filter until=") or 0.0)
    return max(ages, default=None)


@click.command("rm-tree")
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=FilePath(path_type=Path))
@config_option
def rm_tree(directories: tuple[Path, ...], config_file: Path | None) -> None:
    """Remove directories that `--output dir,dest=DIR` or `--keep-on-failure` wrote.

    Their files may belong to your subordinate ids, so that `rm -r` can't remove them without root. This
    command removes them in the id mapping of builds. It does not touch other file systems mounted below
    DIR.
    """
    home = home_from(settings_from(config_file))
    wanted = [_checked(directory, home) for directory in directories]
    for directory in wanted:
        home.trees.remove(directory)
        click.echo(f"removed {one_line(str(directory))}")


def _checked(given: Path, home: Home) -> Path:
    """Return the directory by its real path.

    Raises:
        InputError: it is not a directory, or one that must not be removed.
    """
    try:
        if given.is_symlink():
            raise InputError(f"{given} is a symbolic link", hint="name the directory that it leads to")
        real = given.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{given} can't be removed: {reason}", hint="name a directory that is there"
        ) from error
    if not real.is_dir():
        raise InputError(f"{given} is not a directory", hint=f"`rm {given}` removes it")
    own = Path(os.path.expanduser("~"))
    kept = {"the current directory": Path.cwd(), "your home": own, "the store": home.root.resolve()}
    for what, path in kept.items():
        if path.is_relative_to(real):
            raise InputError(
                f"{given} can't be removed: it is {what}, or holds it",
                hint=f"to remove it whole, name what is in it: {given}/*"
                if real == path == kept["the store"]
                else "name a directory below it",
            )
    if real.is_mount():
        raise InputError(
            f"{given} can't be removed: it is the root of a file system", hint="unmount it first"
        )
    return real

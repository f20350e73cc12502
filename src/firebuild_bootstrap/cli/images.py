"""`firebuild images`: lists, shows, copies and removes the images of the store."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli import accounting
from firebuild_bootstrap.cli.docker import Commands
from firebuild_bootstrap.cli.options import (
    FilePath,
    complete_tags,
    config_option,
    home_from,
    json_option,
    leave_out_closed,
    listing,
    read_size,
    settings_from,
    watched,
)
from firebuild_bootstrap.cli.output import check_paths, check_stdout, print_json, read_outputs, send
from firebuild_bootstrap.cli.store import age_of, read_filters
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.errors import FirebuildError
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.store import StoredImage


_FILTERS = ("until", "label", "label!")


@click.group(cls=Commands, commands=[accounting.provenance, accounting.sbom])
def images() -> None:
    """List, inspect, tag and remove images."""


@images.command("list")
@json_option
@config_option
def list_(as_json: bool, config_file: Path | None) -> None:
    """List the images with the time of their build, the size of their layers, and their written forms."""
    from firebuild_bootstrap.cli.screen import moment, print_table
    from firebuild_bootstrap.sizes import human_size

    home = home_from(settings_from(config_file))
    with listing() as leave_out:
        found = home.images.list(leave_out)
        if as_json:
            print_json([_document(home, image) for image in found])
            return
        rows = []
        for image in found:
            forms = ", ".join(output.type.value for output in image.record.outputs) or "-"
            rows.append((str(image.tag), moment(image.record.created), human_size(image.record.size), forms))
        print_table(("TAG", "CREATED", "SIZE", "OUTPUTS"), rows)


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@config_option
def inspect(tag: str, config_file: Path | None) -> None:
    """Print all metadata of an image as JSON."""
    home = home_from(settings_from(config_file))
    print_json(_document(home, home.images.inspect(_tag(tag))))


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@click.option(
    "--output",
    "-o",
    "kind",
    type=click.Choice(["ext4", "tar", "dir", "erofs", "squashfs"]),
    help="Only this one.",
)
@config_option
def path(tag: str, kind: str | None, config_file: Path | None) -> None:
    """Print the paths of an image's forms, one a line; they stay the same when it is built again.

    A form given with --output is written if it does not exist yet; so is an ext4 image if the image has no
    form.
    """
    from firebuild_bootstrap.image.outputs import OutputSpec, OutputType

    image = home_from(settings_from(config_file)).images.inspect(_tag(tag))
    there = [output for output in image.record.outputs if kind in (None, output.type.value)]
    paths = [image.location / output.path for output in there]
    if not there:
        spec = OutputSpec(OutputType(kind or "ext4"))
        with watched(config_file) as home:
            paths = [home.form(home.images.inspect(_tag(tag), hold=True), spec, any_size=True, changed=True)]
    for found in paths:
        click.echo(os.fsencode(found))  # for programs: exactly as it is


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@click.option(
    "--output",
    "-o",
    "outputs",
    multiple=True,
    metavar="TYPE[,dest=PATH][,size=SIZE]",
    help="ext4, erofs, squashfs, tar, dir, oci or docker, as of `firebuild build`; - is a tar archive on "
    "standard output. Repeatable.",
)
@click.option(
    "--firecracker",
    metavar="DIR",
    type=FilePath(path_type=Path, file_okay=False),
    help="Write kernel, initramfs, drive and vm.json into DIR, to boot the image without firebuild.",
)
@click.option(
    "--kernel",
    metavar="FILE",
    type=FilePath(path_type=Path, dir_okay=False),
    help="With --firecracker: the kernel, instead of machine.firecracker.kernel; a bzImage is unpacked.",
)
@click.option("--size", metavar="SIZE", help="With --firecracker: the size of the drive, for example 2GiB.")
@config_option
def export(tag: str, outputs: tuple[str, ...], config_file: Path | None, **microvm: Any) -> None:
    """Write an image in other forms, keep these in the store, and copy them to dest=.

    Without dest= it prints the path of the form in the store.
    """
    from firebuild_bootstrap.errors import InputError

    if microvm["firecracker"] is None and any(microvm.values()):
        raise InputError("--kernel and --size are for --firecracker")
    if bool(outputs) == (microvm["firecracker"] is not None):
        raise InputError(
            "expected either --output or --firecracker", hint="`firebuild images export --help` says more"
        )
    if outputs:
        _export_forms(tag, outputs, config_file)
    else:
        _export_microvm(tag, config_file, **microvm)


def _export_forms(tag: str, outputs: tuple[str, ...], config_file: Path | None) -> None:
    from firebuild_bootstrap.errors import InputError
    from firebuild_bootstrap.image.outputs import Deliveries, OutputType, check_programs

    specs, to_stdout = read_outputs(outputs, paths=True)
    if any(spec.type is OutputType.REGISTRY for spec in specs):
        raise InputError("--output registry: an export goes to files", hint="`firebuild images push`")
    check_paths(specs)
    check_programs(specs)
    with watched(config_file, writable=False) as home:
        image = home.images.inspect(_tag(tag), hold=True)
        names = [((_tag(tag),), image)]
        paths = []
        with Deliveries(home.trees) as deliveries:
            for spec in specs:
                if not spec.type.has_layers:
                    with home.held_form(image, spec) as made:
                        deliveries.copy(made, spec)
                    paths.append(spec.dest or image.location / made.name)
                elif spec.dest is not None:
                    home.outgoing.deliver(names, spec, deliveries)
                    paths.append(spec.dest)
        if to_stdout is None:
            for path in paths:
                click.echo(os.fsencode(path))
        else:
            send(names, to_stdout, home)


def _export_microvm(
    tag: str, config_file: Path | None, *, firecracker: Path, kernel: Path | None, size: str | None
) -> None:
    from firebuild_bootstrap.microvm import write_microvm

    wanted = 0 if size is None else read_size(size, "--size")
    settings = settings_from(config_file).machine.firecracker
    with watched(config_file, writable=False) as home:
        image = home.images.inspect(_tag(tag), hold=True)
        written = write_microvm(
            home, image, firecracker, settings, kernel=kernel, size=wanted, machine=os.uname().machine
        )
        for path in written:
            click.echo(os.fsencode(path))


@images.command()
@click.argument("references", nargs=-1, required=True, metavar="NAME[:TAG|@DIGEST]...")
@config_option
def pull(references: tuple[str, ...], config_file: Path | None) -> None:
    """Pull images, or newer versions of them, from their registries, for FROM and `firebuild run`.

    It prints the digest of each image, which pins its content: FROM NAME@sha256:….
    """
    from firebuild_bootstrap.cli.registries import prefetch, puller
    from firebuild_bootstrap.image.names import Reference

    wanted = [Reference.parse(text, what="an image such as debian:12") for text in references]
    settings = settings_from(config_file)
    fetch = puller(settings)
    with watched(config_file) as home:
        if len(wanted) > 1:
            prefetch(settings, home, wanted)
        for reference in wanted:
            image = fetch(home, reference)
            # The id is the digest of the configuration, by which a registry knows no image.
            source = image.record.source
            digest = source.digests[0] if source and source.digests else home.image_id(image)
            click.echo(f"pulled {reference}  {digest}")


@images.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", shell_complete=complete_tags)
@accounting.attest_options
@config_option
def push(
    tags: tuple[str, ...],
    attest: tuple[str, ...],
    provenance: str | None,
    sbom: str | None,
    config_file: Path | None,
) -> None:
    """Push images to the registries in their names.

    `firebuild images tag` gives an image another name.
    """
    from firebuild_bootstrap.cli.registries import push_image
    from firebuild_bootstrap.image.attestations import read_attestations

    attestations = read_attestations(attest, provenance, sbom)
    settings = settings_from(config_file)
    with watched(config_file) as home:
        found = {tag: home.images.inspect(tag, hold=True) for tag in dict.fromkeys(map(_tag, tags))}
        for each, image in found.items():
            for tag, digest in push_image(
                settings, home, image, (each,), home.tasks, attestations=attestations
            ):
                click.echo(f"pushed {tag}  {digest}")


@images.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", shell_complete=complete_tags)
@click.option(
    "--output",
    "-o",
    "dest",
    type=FilePath(path_type=Path),
    help="File to write, by default standard output.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["docker", "oci"]),
    default="docker",
    show_default=True,
    help="docker: for `docker load` and tools that read OCI archives; oci: without Docker's manifest.json.",
)
@config_option
def save(tags: tuple[str, ...], dest: Path | None, kind: str, config_file: Path | None) -> None:
    """Write images with their layers as one archive, as `docker save` does."""
    from firebuild_bootstrap.errors import InputError
    from firebuild_bootstrap.image.outputs import Deliveries, OutputSpec, OutputType

    to_stdout = dest is None or str(dest) == "-"
    if to_stdout:
        check_stdout(
            InputError("an archive would go to the terminal", hint="redirect standard output, or use -o FILE")
        )
    spec = OutputSpec(OutputType(kind), None if to_stdout or dest is None else dest.absolute())
    check_paths([spec])
    with watched(config_file, writable=False) as home:
        found = {tag: home.images.inspect(tag, hold=True) for tag in dict.fromkeys(map(_tag, tags))}
        images = [((tag,), image) for tag, image in found.items()]
        if to_stdout:
            send(images, spec, home)
        else:
            with Deliveries(home.trees) as deliveries:
                home.outgoing.deliver(images, spec, deliveries)


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@json_option
@config_option
def history(tag: str, as_json: bool, config_file: Path | None) -> None:
    """Show the history of an image, newest first: the time, the instruction, and the size of its layer.

    The history of an image that was not built here is not verified.
    """
    from firebuild_bootstrap.cli.screen import moment, print_table
    from firebuild_bootstrap.sizes import human_size

    image = home_from(settings_from(config_file)).images.inspect(_tag(tag))
    steps = image.history()
    if as_json:
        print_json([{**step, "size": size} for step, size in steps])
        return
    rows = [
        (
            moment(str(step.get("created", ""))),
            one_line(str(step.get("created_by", "")), 80),
            human_size(size) if size is not None else "-",
        )
        for step, size in reversed(steps)
    ]
    print_table(("CREATED", "CREATED BY", "SIZE"), rows)


@images.command()
@click.argument("source", type=FilePath(path_type=Path, exists=True, allow_dash=True), required=False)
@click.option(
    "--input",
    "-i",
    "given",
    type=FilePath(path_type=Path, exists=True),
    help="The same as SOURCE, as in `docker load`.",
)
@click.option("--name", "-t", "--tag", help="NAME[:TAG] of the image, by default its name in the archive.")
@config_option
def load(source: Path | None, given: Path | None, name: str | None, config_file: Path | None) -> None:
    """Load the images of an OCI layout, a docker archive, or a root file system.

    SOURCE is a directory, or an archive (plain or compressed); - or none is standard input. A
    root file system needs a --name and becomes a base.
    """
    from firebuild_bootstrap.errors import InputError
    from firebuild_bootstrap.image.layouts import STDIN

    if source is not None and given is not None:
        raise InputError("SOURCE and --input can't be used together")
    source = source or given or Path("-")
    if str(source) == "-" and os.isatty(0):
        raise InputError("standard input is a terminal", hint="name a directory or an archive")
    wanted = _tag(name) if name is not None else None
    notes: dict[str, None] = {}
    with watched(config_file) as home:

        def root(path: Path, what: str) -> None:
            if wanted is None:
                raise InputError(
                    f"{one_line(what)} is a root file system, which has no name",
                    hint="add --name NAME[:TAG]",
                )
            kept = home.bases.import_base(str(wanted), path, called=what)
            click.echo(f"loaded {kept.name} (root file system)  {kept.digest}")

        home.root.mkdir(parents=True, exist_ok=True)
        loaded = home.intake.load(
            STDIN if str(source) == "-" else source,
            home.root,
            name=wanted,
            report=lambda lost: notes.update(dict.fromkeys(lost.notes("the image"))),
            root=root,
        )
        for note in notes:
            click.echo(f"warning: {one_line(note)}", err=True)
        for image in loaded.images:
            click.echo(f"loaded {image.tag} ({loaded.kind})  {home.image_id(image)}")


@images.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", shell_complete=complete_tags)
@click.option("--force", "-f", is_flag=True, hidden=True, expose_value=False)
@config_option
def rm(tags: tuple[str, ...], config_file: Path | None) -> None:
    """Remove images; if one does not exist, none is removed."""
    store = home_from(settings_from(config_file), writable=True).images
    wanted = dict.fromkeys(store.name_of(_tag(tag)) for tag in tags)
    for tag in wanted:
        store.remove(tag)
        click.echo(f"removed {tag}")


@images.command("tag")
@click.argument("tag", shell_complete=complete_tags)
@click.argument("new")
@config_option
def tag_(tag: str, new: str, config_file: Path | None) -> None:
    """Give an image another name; an image that has this name loses it."""
    home_from(settings_from(config_file), writable=True).images.tag(_tag(tag), _tag(new))
    click.echo(f"{_tag(tag)} is {_tag(new)} too")


@images.command()
@click.option("--all", "-a", "everything", is_flag=True, help="Remove tagged images as well.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="until=…|label=…|label!=…",
    help="Remove only images that were made before (until=72h, or a time), or that have or do not have a "
    "label (label=NAME[=VALUE], label!=NAME[=VALUE]). Repeatable: all must match.",
)
@click.option(
    "--keep", type=click.IntRange(min=0), metavar="N", help="Keep the N newest images of each name."
)
@click.option("--failed", is_flag=True, help="Remove what --keep-on-failure kept in the store as well.")
@click.option("--dry-run", "-n", is_flag=True, help="Only print what would be removed.")
@click.option("--force", "-f", is_flag=True, help="Required if --all would leave no tagged image.")
@config_option
def prune(
    *,
    everything: bool,
    filters: tuple[str, ...],
    keep: int | None,
    failed: bool,
    dry_run: bool,
    force: bool,
    config_file: Path | None,
) -> None:
    """Remove images without a tag, and leftovers of crashed builds.

    Tagged images are removed only with --all. Bases are kept; `firebuild base rm` removes them. Nothing that
    a running build uses is removed.
    """
    from firebuild_bootstrap.errors import InputError
    from firebuild_bootstrap.image.trees import allocated
    from firebuild_bootstrap.sizes import human_size

    settings = settings_from(config_file)
    read_filters(filters, *_FILTERS)
    # Before it may be written: then the removal of what dead builds left begins in the background.
    before = 0 if dry_run else allocated(home_from(settings, writable=False).root)
    home = home_from(settings, writable=not dry_run)
    verb = "would remove" if dry_run else "removed"
    if everything and not (filters or keep or force or dry_run):
        raise InputError(
            "--all would remove every image of the store",
            hint="say which with --filter until=72h or --keep 3, try it with --dry-run, or insist: --force",
        )
    plain = not (everything or filters or keep)
    with listing("not all could be looked at") as leave_out:
        if plain:
            unwanted = [tag for tag in home.images.names() if tag.is_untagged]  # also damaged ones
        else:
            unwanted = _unwanted(home, everything, filters, keep or 0, leave_out)
        for tag in unwanted:
            if not dry_run:
                with suppress(InputError):  # somebody was faster
                    home.images.remove(tag)
            click.echo(f"{verb} {tag}")
        if plain:
            home.images.list(leave_out)
        for directory in _entries(home.root / "failed") if failed else ():
            if not dry_run:
                home.trees.remove(directory)
            click.echo(f"{verb} {one_line(str(directory))}")
        if not dry_run:
            _sweep(home)
            click.echo(f"freed {human_size(max(before - allocated(home.root), 0))}")


def _unwanted(
    home: Home,
    everything: bool,
    filters: tuple[str, ...],
    keep: int,
    leave_out: Callable[[FirebuildError], None],
) -> list[Reference]:
    """Return the images to remove: those without a name, or all, but for what the filters and `keep` keep."""
    given = read_filters(filters, *_FILTERS)
    age = age_of(given)
    newest = datetime.now(UTC).timestamp() - (age or 0.0)
    kept = Counter[str]()
    unwanted = []
    for image in sorted(home.images.list(leave_out), key=_created, reverse=True):
        if not (everything or image.tag.is_untagged):
            continue
        kept[image.tag.name] += 1
        labels = image.record.config.labels
        if (
            (kept[image.tag.name] > keep or image.tag.is_untagged)
            and (age is None or _created(image) <= newest)
            and all(_has(labels, text) for name, text in given if name == "label")
            and not any(_has(labels, text) for name, text in given if name == "label!")
        ):
            unwanted.append(image.tag)
    return sorted(unwanted)


def _created(image: StoredImage) -> float:
    """Return when an image was made, in seconds; 0.0 where an image from outside says nothing readable."""
    with suppress(ValueError):
        return datetime.fromisoformat(image.record.created).astimezone().timestamp()
    return 0.0


def _has(labels: Mapping[str, str], text: str) -> bool:
    name, equals, value = text.partition("=")
    return name in labels and (not equals or labels[name] == value)


@click.command()
@json_option
@config_option
def du(as_json: bool, config_file: Path | None) -> None:
    """Show the disk usage of the store.

    Holes in files do not count, and the total counts what images share once.
    """
    from firebuild_bootstrap.cli.screen import print_table
    from firebuild_bootstrap.image.trees import allocated
    from firebuild_bootstrap.sizes import human_size

    home = home_from(settings_from(config_file))
    with listing() as leave_out:
        leave_out_closed(home, leave_out)
        used = list(_usage(home, leave_out))
        total = allocated(home.root)
        if as_json:
            entries = [{"kind": one.kind, "name": one.name, "bytes": one.size} for one in used]
            print_json({"path": str(home.root), "bytes": total, "entries": entries})
            return
        rows = [(one.kind, one.name, human_size(one.size)) for one in used]
        print_table(("KIND", "NAME", "SIZE"), [*rows, ("total", str(home.root), human_size(total))])


images.add_command(du)


@click.group(cls=Commands)
def store() -> None:
    """Check the store."""


@store.command()
@click.option("--repair", is_flag=True, help="Remove damaged and unusable entries.")
@config_option
def check(repair: bool, config_file: Path | None) -> None:
    """Read everything in the store, and compare it with its digests.

    Without --repair nothing is changed, except that missing digests of layers are recorded for the next
    check. A read-only store can be checked, too.

    Exit status: 0 all is right, 6 something is wrong; a line for each problem says what to do.
    """
    from firebuild_bootstrap.checking import StoreCheck
    from firebuild_bootstrap.errors import MachineError

    with watched(config_file, writable=repair) as home:
        checking = StoreCheck(home)
        # Nothing is removed while any of it is being read.
        found = list(dict.fromkeys(checking.findings()))
        left = 0
        for problem in found:
            mended = repair and problem.repair is not None and problem.repair() is not False
            click.echo(one_line(f"{'repaired: ' if mended else ''}{problem}", 1000))
            left += problem.lost or not mended
        for what in checking.unread:
            click.echo(one_line(f"not checked: {what}", 1000))
        if left:
            raise MachineError(
                f"the store {home.root} has {counted(left, 'problem')}", hint="each line says what to do"
            )
        counts = [(checking.read[kind], kind) for kind in ("images", "bases", "blobs", "layers")]
        read = ", ".join(f"{count} {kind if count != 1 else kind[:-1]}" for count, kind in counts)
        click.echo(f"{'repaired' if found else 'sound'}: {read}")


@dataclass(frozen=True)
class _Used:
    """What one thing in the store takes, in bytes."""

    kind: str
    name: str
    size: int


def _document(home: Home, image: StoredImage) -> dict[str, Any]:
    """Describe an image; without an id where that can't be found out any more."""
    from firebuild_bootstrap.cli.output import image_document
    from firebuild_bootstrap.errors import FirebuildError

    identity = ""
    with suppress(FirebuildError):
        identity = home.image_id(image)
    return image_document(image, identity)


def _usage(home: Home, leave_out: Callable[[FirebuildError], None]) -> Iterator[_Used]:
    from firebuild_bootstrap.image.trees import allocated

    listed = home.images.list(leave_out)
    names = Counter(image.directory for image in listed)
    for image in listed:  # what several share is divided among them
        yield _Used("image", str(image.tag), allocated(image.directory) // names[image.directory])
    for base in home.bases.list(leave_out):
        yield _Used("base", base.name, allocated(base.archive.parent))
    kinds = {"builds": "build", "runs": "run", "failed": "failed", "removing": "removing"}
    for folder, kind in kinds.items():
        for directory in _entries(home.root / folder):
            yield _Used(kind, directory.name, allocated(directory))
    named = _named(home)
    if named:
        yield _Used("layers", "of images", named)
    for other in _entries(home.root, files=True):
        if other.name not in ("images", "bases", *kinds):
            kind = "cache" if other.name in ("cache", "cache-mounts", "layers") else "other"
            kind = "blobs" if other.name == "blobs" else kind
            yield _Used(kind, other.name, allocated(other) - (named if other.name == "layers" else 0))


def _named(home: Home) -> int:
    """Return the bytes of the layers that images need."""
    from firebuild_bootstrap.errors import FirebuildError

    with suppress(FirebuildError):  # no sandbox can be made here, and so there are none
        if (home.root / "layers").is_dir():
            return sum(use.entry.size for use in home.cache.usage() if use.named)
    return 0


def _entries(directory: Path, *, files: bool = False) -> list[Path]:
    from firebuild_bootstrap.image.content_store import files_in

    return [path for path in files_in(directory) if files or path.is_dir()]


def _sweep(home: Home) -> None:
    import secrets

    from firebuild_bootstrap.machine.workspace import wait_for_removal

    home.images.sweep()
    home.blobs.sweep()
    home.bases.sweep()
    home.workspace(f"prune-{secrets.token_hex(4)}").close()  # each new build removes what dead ones left
    wait_for_removal()


def _tag(text: str) -> Reference:
    from firebuild_bootstrap.image.names import Reference

    return Reference.parse_tag(text)

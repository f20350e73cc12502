"""`firebuild build` and `firebuild rootfs`: the main job, as Docker's users write it and as options alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from firebuild_bootstrap.cli.accounting import attest_options, attested_digests, packages_of
from firebuild_bootstrap.cli.display import PROGRESS, Progress, make_renderer, read_progress
from firebuild_bootstrap.cli.docker import (
    DockerCommand,
    docker_options,
)
from firebuild_bootstrap.cli.options import (
    MACHINES,
    FilePath,
    FunctionT,
    chosen,
    complete_machines,
    complete_providers,
    complete_tags,
    config_option,
    home_from,
    settings_from,
    stacked,
)
from firebuild_bootstrap.cli.output import check_paths, guarded_stderr, read_outputs, send, stdout_to_show
from firebuild_bootstrap.cli.registries import read_policy
from firebuild_bootstrap.errors import InputError
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.cli.failure import Interrupts
    from firebuild_bootstrap.cli.given import Given
    from firebuild_bootstrap.cli.shell import TerminalShell
    from firebuild_bootstrap.dockerfile.graph import ImageRef
    from firebuild_bootstrap.events import EventSink
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.attestations import Attestations
    from firebuild_bootstrap.image.config import Healthcheck
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.outputs import Compression, OutputSpec
    from firebuild_bootstrap.image.remotecache import CacheSpec
    from firebuild_bootstrap.image.store import StoredImage
    from firebuild_bootstrap.progress import Renderer
    from firebuild_bootstrap.request import BuildContextSource, BuildRequest
    from firebuild_bootstrap.settings import BuildSettings
    from firebuild_bootstrap.sshagent import SshAgent

_EPOCH: Final = "SOURCE_DATE_EPOCH"


_READY: Final = (
    ("interval", "DURATION", "Time between two attempts of --ready"),
    ("timeout", "DURATION", "Time limit of an attempt"),
    ("retries", "N", "Failures in a row after which the image is not ready"),
    ("start-period", "DURATION", "Time after the start in which failures do not count"),
    ("start-interval", "DURATION", "Time between two attempts in the start period"),
)


def _options(default_output: str) -> Callable[[FunctionT], FunctionT]:
    """Add what both commands take."""
    return stacked(
        click.option(
            "--dockerfile",
            "--file",
            "-f",
            metavar="FILE",
            show_default="Dockerfile in the context",
            help="Dockerfile to build; - reads it from standard input.",
        ),
        click.option(
            "--context",
            metavar="DIR",
            show_default="the current directory",
            help="Directory that COPY and ADD read from; - reads an archive of it from standard input.",
        ),
        click.option(
            "--build-context",
            "build_contexts",
            multiple=True,
            metavar="NAME=DIR|docker-image://IMAGE|oci-layout://PATH|GIT-URL",
            help="Context that FROM and --from use for this name; repeatable.",
        ),
        click.option(
            "--tag",
            "-t",
            "tags",
            multiple=True,
            metavar="NAME[:TAG]",
            shell_complete=complete_tags,
            help="Name of the image in the store; repeatable.",
        ),
        click.option(
            "--build-arg", "build_args", multiple=True, metavar="NAME[=VALUE]", help="Value for an ARG."
        ),
        click.option(
            "--secret",
            "secrets",
            multiple=True,
            metavar="id=ID[,src=FILE|,env=NAME]",
            help="A secret for RUN --mount=type=secret, from a file or a variable; repeatable.",
        ),
        click.option(
            "--ssh",
            "agents",
            multiple=True,
            metavar="default|ID[=SOCKET|KEY[,KEY...]]",
            help="An SSH agent for RUN --mount=type=ssh, by its socket (without one, that of SSH_AUTH_SOCK) "
            "or made of private keys; repeatable.",
        ),
        click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Label for the image."),
        click.option(
            "--check",
            is_flag=True,
            help="Build nothing; report errors in the Dockerfile, and probable mistakes.",
        ),
        click.option("--call", type=click.Choice(["build", "check"]), default="build", hidden=True),
        click.option(
            "--pull",
            is_flag=False,
            flag_value="",
            envvar="FIREBUILD_PULL",
            show_envvar=True,
            metavar="[=missing|always|never]",
            help="When to ask a registry for the images of FROM and --from; by default the setting "
            "registries.pull: missing. Without a value: always.",
        ),
        click.option("--target", metavar="STAGE", help="Stage to build; the last one by default."),
        click.option(
            "--no-cache", is_flag=True, help="Execute every step, and cache the results for later builds."
        ),
        click.option(
            "--no-cache-filter",
            "no_cache_filter",
            multiple=True,
            metavar="STAGE[,STAGE]",
            help="The same for these stages only, by name or index.",
        ),
        click.option(
            "--cache-from",
            multiple=True,
            metavar="type=registry,ref=REF|type=local,src=DIR",
            help="Cache of other machines, for results that the store does not have; repeatable.",
        ),
        click.option(
            "--cache-to",
            multiple=True,
            metavar="type=registry,ref=REF|type=local,dest=DIR[,mode=min|max]",
            help="Cache to write for other machines: the results of the last stage, or with mode=max of "
            "every stage; repeatable.",
        ),
        click.option("--explain-cache", is_flag=True, help="Explain for each stage why it is not cached."),
        click.option(
            "--platform",
            "platforms",
            multiple=True,
            metavar="OS/ARCH",
            help="Platform of the image; must be that of this host.",
        ),
        click.option(
            "--output",
            "-o",
            "outputs",
            multiple=True,
            metavar="TYPE[,dest=PATH][,KEY=VALUE...]",
            show_default=default_output,
            help="ext4, erofs, squashfs, tar or dir, kept with the image; oci, docker or registry, with "
            "its layers; repeatable. dest: also write it there, - is standard output. size: of an ext4 "
            "image, for example 2GiB. compression: of layers, gzip, zstd or uncompressed.",
        ),
        click.option(
            "--push",
            is_flag=True,
            help="Push the image under its tags, as --output type=registry does.",
        ),
        click.option(
            "--ready",
            is_flag=False,
            flag_value="",
            metavar="[=COMMAND]",
            help="Boot the image, and store it only if COMMAND, by default its HEALTHCHECK, succeeds in it.",
        ),
        *(
            click.option(f"--ready-{name}", metavar=metavar, help=f"{what}, instead of that of HEALTHCHECK.")
            for name, metavar, what in _READY
        ),
        click.option(
            "--progress",
            type=click.Choice(PROGRESS),
            show_default="auto, or $BUILDKIT_PROGRESS",
            help="auto: live on a terminal, plain in a pipe; plain: lines; tty: live; quiet: only the id of "
            "the image; rawjson: one JSON event a line.",
        ),
        click.option("--quiet", "-q", is_flag=True, help="The same as --progress quiet."),
        click.option(
            "--metadata-file",
            type=FilePath(path_type=Path, dir_okay=False),
            help="File to write the output of `firebuild images inspect` to.",
        ),
        click.option(
            "--iidfile",
            type=FilePath(path_type=Path, dir_okay=False),
            help="File to write the id of the image to.",
        ),
        click.option(
            "--keep-on-failure",
            "keep_failed",
            is_flag=False,
            flag_value="",
            metavar="[=DIR]",
            help="Keep the artifacts of a failed build in DIR/BUILD-ID, by default in `failed` in the store.",
        ),
        click.option(
            "--debug-shell",
            is_flag=True,
            help="If a RUN fails, open a shell in its place on this terminal, before its machine stops.",
        ),
        click.option(
            "--ca",
            metavar="PROVIDER",
            shell_complete=complete_providers,
            help="CA provider to use instead of the configured one: embedded, file, vault, or a plugin's.",
        ),
        click.option(
            "--machine",
            metavar="|".join(MACHINES),
            shell_complete=complete_machines,
            help="Machine to use instead of the configured one.",
        ),
        attest_options,
        config_option,
        docker_options,
    )


@click.command(cls=DockerCommand)
@_options("ext4")
def rootfs(context: str | None, **options: Any) -> None:
    """Build an image from a Dockerfile, and write its root file system as ext4, or as --output says."""
    if not (options["tags"] or options["check"] or options["call"] == "check"):
        raise click.UsageError("Missing option '--tag' / '-t'.")
    options["outputs"] = options["outputs"] or ("ext4",)
    _build(_Options(context=context or ".", paths_as_outputs=False, **options))


@click.command(cls=DockerCommand)
@click.argument("path", required=False, metavar="[CONTEXT | -]", type=FilePath())
@_options("none: `firebuild images path` writes them later")
def build(path: str | None, context: str | None, **options: Any) -> None:
    """Build an image, with the options of `docker build`.

    CONTEXT is a directory (by default the current one), a git repository (https://HOST/PATH.git#REF:DIR,
    ssh://…, git@HOST:PATH), the URL of an archive or Dockerfile, or - for one from standard input.
    `firebuild rootfs` does the same and writes an ext4 image. docs/from-docker.md has every option of docker,
    buildah and kaniko, and what to use instead of those that are refused.
    """
    if path is not None and context is not None:
        raise InputError(
            f"the build context is given twice: {path} and --context {context}",
            hint="leave one of the two out",
        )
    _build(_Options(context=path or context or ".", paths_as_outputs=True, **options))


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the command line says, as it says it."""

    context: str
    build_contexts: tuple[str, ...]
    dockerfile: str | None
    check: bool
    call: str
    tags: tuple[str, ...]
    build_args: tuple[str, ...]
    secrets: tuple[str, ...] = field(repr=False)
    agents: tuple[str, ...]
    labels: tuple[str, ...]
    target: str | None
    pull: str | None
    no_cache: bool
    no_cache_filter: tuple[str, ...]
    cache_from: tuple[str, ...]
    cache_to: tuple[str, ...]
    explain_cache: bool
    platforms: tuple[str, ...]
    outputs: tuple[str, ...]
    paths_as_outputs: bool
    push: bool
    attest: tuple[str, ...]
    provenance: str | None
    sbom: str | None
    progress: Progress | None
    quiet: bool
    metadata_file: Path | None
    iidfile: Path | None
    keep_failed: str | None
    ready: str | None
    ready_interval: str | None
    ready_timeout: str | None
    ready_retries: str | None
    ready_start_period: str | None
    ready_start_interval: str | None
    debug_shell: bool
    ca: str | None
    machine: str | None
    config_file: Path | None


@dataclass(frozen=True)
class _Wanted:
    """The options that need neither a Dockerfile nor a context to be understood.

    Args:
        tags: the names of the image; one made up where none was given.
        to_stdout: the output that goes to standard output.
        push: how its layers are compressed if the image goes to the registries of its tags.
        attestations: what is to be said about it.
        progress: how events are shown.
    """

    tags: tuple[Reference, ...]
    outputs: tuple[OutputSpec, ...]
    to_stdout: OutputSpec | None
    push: Compression | None
    attestations: Attestations
    keep_failed: Path | None
    progress: Progress


def _build(options: _Options) -> None:
    from firebuild_bootstrap.cli.failure import Interrupts

    interrupts = Interrupts()
    with interrupts.installed(), ExitStack() as cleanup:
        from firebuild_bootstrap.build import build_image
        from firebuild_bootstrap.cli.failure import error_first
        from firebuild_bootstrap.cli.given import given
        from firebuild_bootstrap.cli.output import as_text, image_document, write_atomically

        settings = settings_from(options.config_file, chosen(options.ca, options.machine))
        home = home_from(settings, check=interrupts.check, writable=True, pull=read_policy(options.pull))
        cleanup.enter_context(closing(home))
        wanted = _wanted(options, home, settings)
        agents = _agents(options.agents)
        source = cleanup.enter_context(
            given(
                options.context,
                options.dockerfile,
                home,
                agent=agents.get("default"),  # as in BuildKit
                say=lambda text: None if options.quiet else click.echo(f"{text} …", err=True),
            )
        )
        request = _request(options, wanted, source, home, settings, agents=agents)
        if options.check or options.call == "check":
            _check(request, home)
            return
        renderer = _renderer(wanted, settings, home)
        shell = _shell(options, renderer, interrupts)
        with (
            closing(renderer),
            error_first(shell or renderer, output_shown=renderer.shows_failed_output) as events,
        ):
            image = build_image(request, settings, home, events=events, shell=shell)
            if image is not None:
                home.images.hold(image)
            if image is not None and wanted.attestations.sbom:
                packages_of(home, image)
            if image is not None and wanted.push is not None:
                _push(image, request, settings, home, events, compression=wanted.push)
        if image is None:
            return
        if options.metadata_file is not None:
            attested = attested_digests(home, image, wanted.attestations)
            document = {**image_document(image, home.image_id(image)), **attested}
            write_atomically(options.metadata_file, as_text(document))
        if options.iidfile is not None:
            write_atomically(options.iidfile, home.image_id(image))
        _print(image, wanted, home)


def _shell(options: _Options, renderer: Renderer, interrupts: Interrupts) -> TerminalShell | None:
    interrupts.at_sudden_end = renderer.abandon
    if not options.debug_shell:
        return None
    from firebuild_bootstrap.cli.shell import TerminalShell

    shell = TerminalShell(renderer)

    def abandon() -> None:
        shell.abandon()
        renderer.abandon()

    interrupts.at_sudden_end = abandon
    return shell


def _push(
    image: StoredImage,
    request: BuildRequest,
    settings: BuildSettings,
    home: Home,
    events: EventSink,
    *,
    compression: Compression,
) -> None:
    from firebuild_bootstrap.cli.registries import push_image
    from firebuild_bootstrap.events import Notice, Tasks

    tags = (request.tag, *request.also_tagged)
    caches = [spec.reference for spec in request.cache_to if spec.reference is not None]
    pushed = push_image(
        settings,
        home,
        image,
        tags,
        Tasks(events),
        attestations=request.attestations,
        compression=compression,
        related=caches,
    )
    for tag, digest in pushed:
        events(Notice(level="info", message=f"pushed {tag} as {digest}"))


def _wanted(options: _Options, home: Home, settings: BuildSettings) -> _Wanted:
    """Read what can be read without the Dockerfile, and try all paths that are written in the end."""
    from firebuild_bootstrap.cli.paths import check_can_be_made
    from firebuild_bootstrap.image.attestations import read_attestations
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.outputs import Compression, OutputType

    _check_platforms(options.platforms)
    tags = tuple(map(Reference.parse_tag, options.tags)) or (_untagged(),)
    outputs, to_stdout = read_outputs(options.outputs, paths=options.paths_as_outputs)
    pushed = [spec.compression for spec in outputs if spec.type is OutputType.REGISTRY]
    push = pushed[0] if pushed else (Compression() if options.push else None)
    if push is not None and not options.tags:
        raise InputError("an image without a tag can't be pushed", hint="add --tag REGISTRY/NAME:TAG")
    progress = read_progress(options.progress, os.environ, quiet=options.quiet)
    if options.debug_shell:
        from firebuild_bootstrap.cli.shell import check_terminal

        check_terminal(progress)
    _check_destinations(options, outputs, to_stdout, settings)
    keep_failed = _keep_failed(options.keep_failed, home)
    if keep_failed is not None:
        check_can_be_made(keep_failed, "--keep-on-failure: ")
    attestations = read_attestations(options.attest, options.provenance, options.sbom)
    return _Wanted(tags, outputs, to_stdout, push, attestations, keep_failed, progress)


def _check_platforms(given: tuple[str, ...]) -> None:
    from firebuild_bootstrap.image.platforms import host_platform, normal_platform

    host = host_platform()
    for platform in (one for text in given for one in text.split(",")):
        try:
            wanted = normal_platform(platform, host)
        except ValueError as error:
            raise InputError(f"--platform {one_line(platform)}: {error}") from error
        if wanted != host:
            raise InputError(
                f"--platform {one_line(platform)} is not supported yet: this host builds {host} only",
                hint="build on such a host",
            )


def _untagged() -> Reference:
    """Return the name of an image without one; `firebuild images prune` removes those."""
    import secrets

    from firebuild_bootstrap.image.names import UNTAGGED, Reference

    return Reference.parse(f"{UNTAGGED}/{secrets.token_hex(6)}")


def _check_destinations(
    options: _Options, outputs: tuple[OutputSpec, ...], to_stdout: OutputSpec | None, settings: BuildSettings
) -> None:
    from firebuild_bootstrap.cli.paths import check_writable
    from firebuild_bootstrap.machine.drivers import metadata_on_stdout

    if to_stdout is not None and metadata_on_stdout(settings.machine):
        raise InputError(
            "standard output already carries the metadata of the machine external",
            hint="add dest=FILE to --output, or set machine.external.metadata to {file: PATH}",
        )
    for file in (options.metadata_file, options.iidfile):
        if file is not None:
            check_writable(file)
    check_paths(outputs)


def _request(
    options: _Options,
    wanted: _Wanted,
    source: Given,
    home: Home,
    settings: BuildSettings,
    *,
    agents: dict[str, SshAgent],
) -> BuildRequest:
    from firebuild_bootstrap.dockerfile import parse_assignments
    from firebuild_bootstrap.request import BuildRequest, read_secrets

    labels = parse_assignments(options.labels, "--label")
    build_args = _from_environment(parse_assignments(options.build_args, "--build-arg"))
    return BuildRequest(
        dockerfile=source.dockerfile,
        source=source.source,
        context=source.context,
        context_place=source.context_place,
        remote=source.remote,
        build_contexts=_build_contexts(options.build_contexts, home),
        tag=wanted.tags[0],
        also_tagged=wanted.tags[1:],
        build_args=build_args,
        secrets=read_secrets(options.secrets, os.environ),
        agents=agents,
        labels={name: value or "" for name, value in labels.items()},
        target=options.target,
        no_cache=options.no_cache,
        no_cache_stages=_names(options.no_cache_filter),
        explain_cache=options.explain_cache,
        cache_from=_caches("--cache-from", options.cache_from, settings.cache.import_from),
        cache_to=_caches("--cache-to", options.cache_to, settings.cache.export_to),
        outputs=wanted.outputs,
        epoch=_epoch(build_args),
        attestations=wanted.attestations,
        keep_failed=wanted.keep_failed,
        ready=_ready(options),
    )


def _ready(options: _Options) -> Healthcheck | None:
    """Read `--ready` and what belongs to it, with the flags that HEALTHCHECK has."""
    given = {
        name: text for name, _, _ in _READY if (text := getattr(options, f"ready_{name.replace('-', '_')}"))
    }
    if options.ready is None:
        if given:
            raise InputError(
                f"--ready-{next(iter(given))} needs --ready",
                hint="add --ready, which asks with HEALTHCHECK, or --ready=COMMAND",
            )
        return None
    from firebuild_bootstrap.dockerfile.metadata import read_health_flags
    from firebuild_bootstrap.image.config import Healthcheck

    test = ("CMD-SHELL", options.ready) if options.ready else ()
    return Healthcheck(test, **read_health_flags(given, lambda text: InputError(f"--ready-{text}")))


def _caches(option: str, given: tuple[str, ...], settings: tuple[str, ...]) -> tuple[CacheSpec, ...]:
    """Read the remote caches that options name, or else the settings; directories to write are tried."""
    if not given and not settings:
        return ()
    from firebuild_bootstrap.cli.paths import check_can_be_made
    from firebuild_bootstrap.image.remotecache import parse_cache

    export = option == "--cache-to"
    try:
        found = tuple(parse_cache(text, export=export) for text in given or settings)
        for spec in found:
            if export and spec.type == "local" and not spec.ignore_error:
                check_can_be_made(spec.directory)
    except InputError as error:
        raise InputError(f"{option}: {error.message}", hint=error.hint) from error
    return found


def _agents(given: tuple[str, ...]) -> dict[str, SshAgent]:
    if not given:
        return {}
    from firebuild_bootstrap.sshagent import read_agents

    return read_agents(given, os.environ)


def _names(given: tuple[str, ...]) -> frozenset[str]:
    """Read lists of stages, each with commas in between; names of stages have no case."""
    names = (name.strip().lower() for text in given for name in text.split(","))
    return frozenset(name for name in names if name)


def _build_contexts(texts: tuple[str, ...], home: Home) -> dict[str, BuildContextSource]:
    from firebuild_bootstrap.dockerfile import parse_assignments
    from firebuild_bootstrap.dockerfile.graph import ImageRef
    from firebuild_bootstrap.dockerfile.operations import read_git, redacted, scheme
    from firebuild_bootstrap.image.names import Reference

    sources: dict[str, BuildContextSource] = {}
    for name, text in parse_assignments(texts, "--build-context").items():
        what = f"--build-context {one_line(name, 80)}"
        if not text:
            forms = "NAME=DIR, NAME=docker-image://IMAGE, NAME=oci-layout://PATH or NAME=GIT-URL"
            raise InputError(f"{what}: expected {forms}")
        image = text.removeprefix("docker-image://")
        if image != text:
            Reference.parse(image, what=f"{what}: an image")
            sources[name] = ImageRef(image)
            continue
        if text.startswith("oci-layout://"):
            sources[name] = _image_of_layout(text.removeprefix("oci-layout://"), home)
            continue
        try:
            repository = read_git(text)
        except ValueError as error:
            raise InputError(f"{what}: {one_line(redacted(text))}: {error}") from error
        if repository is None and scheme(text):
            raise InputError(
                f"{what}: {one_line(redacted(text))} is neither a directory nor a git repository",
                hint="download and unpack it, and name the directory",
            )
        sources[name] = repository or Path(text)
    return sources


def _image_of_layout(text: str, home: Home) -> ImageRef:
    """Take in an image of `PATH[:TAG][@DIGEST]`; its name is its digest, and `images prune` removes it."""
    from firebuild_bootstrap.dockerfile.graph import ImageRef

    path, _, digest = text.partition("@")
    before, colon, tag = path.rpartition(":")
    if colon and "/" not in tag:
        path = before
    else:
        tag = ""
    home.root.mkdir(parents=True, exist_ok=True)
    loaded = home.intake.load(Path(path), home.root, only=digest or tag)
    if not loaded.images:
        raise InputError(f"{path} is not an OCI image layout", hint="without oci-layout:// it is a directory")
    return ImageRef(str(loaded.images[0].tag))


def _check(request: BuildRequest, home: Home) -> None:
    """Write what a look at the Dockerfile finds.

    Raises:
        InputError: a mistake.
    """
    from firebuild_bootstrap.dockerfile.lint import shown
    from firebuild_bootstrap.resolving import check

    warnings, error = check(request, home.bases)
    for warning in shown(warnings):
        click.echo(one_line(warning))
    if error is not None:
        raise error
    count = counted(len(warnings), "warning") if warnings else "no warnings"
    click.echo(f"check complete, {count} found")


def _renderer(wanted: _Wanted, settings: BuildSettings, home: Home) -> Renderer:
    """Show events on standard output, or beside it where that carries something else."""
    from firebuild_bootstrap.machine.drivers import metadata_on_stdout

    beside = wanted.to_stdout is not None or metadata_on_stdout(settings.machine)
    return make_renderer(
        wanted.progress, guarded_stderr() if beside else stdout_to_show(), directory=home.root
    )


def _print(image: StoredImage, wanted: _Wanted, home: Home) -> None:
    """Write to standard output what is wanted there."""
    if wanted.to_stdout is not None:
        send([(wanted.tags, image)], wanted.to_stdout, home)
    elif wanted.progress == "quiet":
        click.echo(home.image_id(image))


def _keep_failed(given: str | None, home: Home) -> Path | None:
    """Return the directory that `--keep-on-failure` means; the option alone means one in the store."""
    if given is None:
        return None
    return Path(given).absolute() if given else home.root / "failed"


def _epoch(build_args: Mapping[str, str | None]) -> int | None:
    """Read SOURCE_DATE_EPOCH, from the build arguments as BuildKit does, or else from the environment.

    Its form is that of reproducible-builds.org/specs/source-date-epoch.
    """
    text = build_args.get(_EPOCH) or os.environ.get(_EPOCH)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 11):
        raise InputError(
            f"{_EPOCH}: expected seconds since 1970, found {one_line(text, 80)!r}",
            hint="such as the time of the last commit: `git log -1 --format=%ct`",
        )
    return int(text)


def _from_environment(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Let `--build-arg NAME` take its value from the environment, as `docker build` does."""
    return {name: os.environ.get(name) if value is None else value for name, value in given.items()}

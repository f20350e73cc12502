"""The options and commands of docker, buildah and kaniko: each works, or its error names ours.

An option of `docker buildx build`, `docker build`, `buildah build` or kaniko's executor is never taken for a
similar one of ours: it is implemented (in `cli.rootfs`), accepted because it changes nothing here, or refused
with what to do instead. The page docs/from-docker.md has the same lists, which a test holds against these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import click

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.sizes import join_fields, parse_bool, split_fields

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


_LIMITS: Final = "limits are settings of the machine: machine.qemu.memory, machine.firecracker.vcpus, …"

_ANNOTATIONS: Final = "annotations are not written: use --label"
_POINTLESS_FLAGS: Final = ("--rm", "--force-rm", "--compress", "--load", "--squash")
_POINTLESS_FLAGS_OF_KANIKO: Final = ("--cleanup", "--force", "--no-push-cache")
_REFUSED_FLAGS: Final = {
    "--detach": "a build is a process of its own: let your shell run it in the background",
    "--debug": "FIREBUILD_DEBUG=1 in the environment shows where an internal error happened; "
    "--debug-shell opens a shell where a RUN failed",
    "--stream": "the context is read in place: leave it out",
    "--disable-content-trust": "images are not signed here, so there is no signature to check: leave it out",
}
_REFUSED_OPTIONS: Final = {
    "--builder": "there are no builders: --machine selects where a build runs",
    "--allow": "there are no entitlements: --machine decides what a RUN step can reach",
    "--annotation": _ANNOTATIONS,
    "--print": "not supported yet; `firebuild images inspect` shows the result of a build",
    "--policy": "policies are not supported yet",
    "--root": "there are no builders: --machine selects where a build runs",
    "--server-config": "there are no builders: --machine selects where a build runs",
    "--add-host": "the /etc/hosts of the machine can't be set from here; write names into it in the same RUN",
    "--network": "the machine decides what RUN steps can reach: see the table in docs/machines.md",
    "--isolation": "--machine decides what isolates a RUN step: see the table in docs/machines.md",
    "--security-opt": "--machine decides what isolates a RUN step: see the table in docs/machines.md",
    "--cgroup-parent": _LIMITS,
    "--cpu-period": _LIMITS,
    "--cpu-quota": _LIMITS,
    "--cpu-shares": _LIMITS,
    "--cpuset-cpus": _LIMITS,
    "--cpuset-mems": _LIMITS,
    "--memory": _LIMITS,
    "--memory-swap": _LIMITS,
    "--shm-size": _LIMITS,
    "--ulimit": _LIMITS,
}
_PLATFORM: Final = "use --platform; only the platform of this host is supported"
_VERIFIED: Final = (
    "certificates are always verified: set registries.hosts.HOST.ca_file to the CA; http is for loopback"
)
_LOGINS: Final = "use a login of docker or podman, or registries.hosts.HOST in the configuration"
_ATTEMPTS: Final = "registries.attempts in the configuration sets the number of attempts"
_MOUNTS: Final = "`RUN --mount=type=bind` and --build-context NAME=DIR give a RUN step files of this host"
_ISOLATED: Final = "--machine decides what isolates a RUN step: see the table in docs/machines.md"
_OWNERS: Final = "machine.ids in the configuration selects the user ids of a build"
_CONFIGURED: Final = "set the configuration with instructions of the Dockerfile: ENV, LABEL, ARG"
_EPOCH: Final = "SOURCE_DATE_EPOCH=SECONDS in the environment does that"
_FOUND: Final = "the changes of a step are found without it: leave it out"
_SBOM: Final = "`firebuild images sbom` writes the list of packages; it needs no scanner"
_SHOWN: Final = "--progress selects how a build is shown: plain, rawjson, quiet"
_PUSHED: Final = (
    "--iidfile gets the id of the image, --metadata-file everything else; a push prints the digest"
)

# Of buildah and kaniko what `docker build` does not have. Flags may have a value: =true, =false.
_OTHER_FLAGS: Final[dict[str, dict[str, str]]] = {
    "buildah": {
        "--all-platforms": _PLATFORM,
        "--compat-volumes": "RUN steps write into volumes as into any directory, and the files are kept",
        "--created-annotation": _ANNOTATIONS,
        "--disable-compression": "use --output type=oci,compression=uncompressed",
        "--http-proxy": "pass the variable on with --build-arg HTTP_PROXY, HTTPS_PROXY and so on",
        "--identity-label": "labels are those of the Dockerfile and of --label",
        "--inherit-annotations": _ANNOTATIONS,
        "--inherit-labels": "the labels of the base stay: `LABEL NAME=` empties one",
        "--layers": "each step always has a layer; --no-cache executes all steps",
        "--logsplit": _PLATFORM,
        "--no-hostname": "/etc/hostname stays as the image has it: leave it out",
        "--no-hosts": "a RUN sees the /etc/hosts of the machine, which is not in the image",
        "--omit-history": "the history is always written",
        "--rewrite-timestamp": _EPOCH,
        "--skip-unused-stages": "stages that the target does not need are never executed: see --target",
        "--stdin": "RUN steps have no standard input: use a heredoc or a file",
        "--tls-verify": _VERIFIED,
    },
    "kaniko": {
        "--cache": "--no-cache executes every step",
        "--cache-copy-layers": "layers of COPY and ADD are kept like all others",
        "--cache-run-layers": "layers of RUN are kept like all others: see --no-cache",
        "--compressed-caching": "the cache of the store is not compressed: leave it out",
        "--force-build-metadata": "the configuration is always written: leave it out",
        "--ignore-var-run": "/var/run of the image is kept as the steps leave it: leave it out",
        "--initial-fs-unpacked": "a build never starts from the root of this machine: name a base in FROM",
        "--insecure": _VERIFIED,
        "--insecure-pull": _VERIFIED,
        "--log-timestamp": _SHOWN,
        "--no-push": "only --push pushes an image",
        "--push-ignore-immutable-tag-errors": "a push that fails is an error of the build",
        "--reproducible": "set SOURCE_DATE_EPOCH=0 in the environment: no time of a file is later than that",
        "--single-snapshot": "each step is a layer of its own: leave it out",
        "--skip-default-registry-fallback": "only registries.default and mirrors are used: leave it out",
        "--skip-push-permission-check": "a push checks the permission when it begins: leave it out",
        "--skip-tls-verify": _VERIFIED,
        "--skip-tls-verify-pull": _VERIFIED,
        "--use-new-run": _FOUND,
        "--whitelist-var-run": "/var/run of the image is kept as the steps leave it: leave it out",
    },
}
_OTHER_OPTIONS: Final[dict[str, dict[str, str]]] = {
    "buildah": {
        "--arch": _PLATFORM,
        "--authfile": "set REGISTRY_AUTH_FILE in the environment to the file",
        "--build-arg-file": "--build-arg NAME takes the value of the environment: load the file into it",
        "--cache-ttl": "`firebuild cache prune --older-than` removes layers that were not used for that time",
        "--cap-add": "every RUN has the capabilities that containers usually get, and no others",
        "--cap-drop": "every RUN has the capabilities that containers usually get, and no others",
        "--cert-dir": "registries.hosts.HOST has ca_file, cert_file and key_file",
        "--cgroupns": _ISOLATED,
        "--cpp-flag": "there is no C preprocessor: run it first, and pass the Dockerfile with --file -",
        "--creds": _LOGINS,
        "--cw": "disk images for confidential workloads are not made",
        "--decryption-key": "encrypted images can't be read: decrypt them with skopeo first",
        "--device": "a RUN has no devices: use them when the image runs",
        "--dns": "the machine decides what RUN steps can reach: see the table in docs/machines.md",
        "--dns-option": "the machine decides what RUN steps can reach: see the table in docs/machines.md",
        "--dns-search": "the machine decides what RUN steps can reach: see the table in docs/machines.md",
        "--env": _CONFIGURED,
        "--format": "images are exported in OCI's format; use --output type=docker for `docker load`",
        "--from": "--build-context NAME=docker-image://IMAGE replaces the image NAME of FROM with IMAGE",
        "--group-add": "RUN steps have the groups that /etc/group of the image gives their user",
        "--hooks-dir": _ISOLATED,
        "--ignorefile": "put the ignore rules of a Dockerfile into DOCKERFILE.dockerignore beside it",
        "--ipc": _ISOLATED,
        "--jobs": "machine.at_once in the configuration sets how many stages run in parallel",
        "--layer-label": "only images have labels: use --label",
        "--logfile": "redirect standard output; --progress plain or rawjson selects the format",
        "--manifest": "an image is for one platform, and there are no manifest lists",
        "--os": _PLATFORM,
        "--os-feature": _PLATFORM,
        "--os-version": _PLATFORM,
        "--pid": _ISOLATED,
        "--retry": _ATTEMPTS,
        "--retry-delay": _ATTEMPTS,
        "--runtime": _ISOLATED,
        "--runtime-flag": _ISOLATED,
        "--sbom-image-output": _SBOM,
        "--sbom-image-purl-output": _SBOM,
        "--sbom-merge-strategy": _SBOM,
        "--sbom-output": _SBOM,
        "--sbom-purl-output": _SBOM,
        "--sbom-scanner-command": _SBOM,
        "--sbom-scanner-image": _SBOM,
        "--sign-by": "images are not signed here: sign them in the registry",
        "--source-date-epoch": _EPOCH,
        "--timestamp": _EPOCH,
        "--unsetannotation": _ANNOTATIONS,
        "--unsetenv": _CONFIGURED,
        "--unsetlabel": _CONFIGURED,
        "--userns": _OWNERS,
        "--userns-gid-map": _OWNERS,
        "--userns-gid-map-group": _OWNERS,
        "--userns-uid-map": _OWNERS,
        "--userns-uid-map-user": _OWNERS,
        "--uts": _ISOLATED,
        "--variant": _PLATFORM,
        "--volume": _MOUNTS,
    },
    "kaniko": {
        "--azure-container-registry-config": _LOGINS,
        "--bucket": "download the context and pass it on standard input: `firebuild build - < FILE`",
        "--cache-dir": "FIREBUILD_HOME, or store.path in the configuration, sets the directory of the store",
        "--cache-repo": "use --cache-to type=registry,ref=NAME, and --cache-from with the same value",
        "--context-sub-path": "pass that directory as the context",
        "--credential-helpers": _LOGINS,
        "--custom-platform": _PLATFORM,
        "--customPlatform": _PLATFORM,
        "--destination": "use --tag NAME and --push",
        "--digest-file": _PUSHED,
        "--git": "run `git clone` with the options that you need, and build in the clone",
        "--ignore-path": "remove the path in the step that makes it, or use `RUN --mount=type=tmpfs`",
        "--image-download-retry": _ATTEMPTS,
        "--image-fs-extract-retry": _ATTEMPTS,
        "--image-name-tag-with-digest-file": _PUSHED,
        "--image-name-with-digest-file": _PUSHED,
        "--insecure-registry": _VERIFIED,
        "--kaniko-dir": "FIREBUILD_HOME, or store.path in the configuration, sets the directory of the store",
        "--log-format": _SHOWN,
        "--oci-layout-path": "--output type=oci,dest=FILE writes the layout as an archive",
        "--push-retry": _ATTEMPTS,
        "--registry-certificate": "set registries.hosts.HOST.ca_file in the configuration",
        "--registry-client-cert": "set registries.hosts.HOST.cert_file and key_file in the configuration",
        "--registry-map": "set registries.hosts.HOST.mirrors in the configuration",
        "--registry-mirror": "set registries.hosts.HOST.mirrors in the configuration",
        "--skip-tls-verify-registry": _VERIFIED,
        "--snapshot-mode": _FOUND,
        "--snapshotMode": _FOUND,
        "--tar-path": "--output type=docker,dest=FILE",
        "--tarPath": "--output type=docker,dest=FILE",
        "--verbosity": _SHOWN,
    },
}
_SHORT: Final = {
    "--memory": "-m",
    "--cpu-shares": "-c",
    "--debug": "-D",
    "--volume": "-v",
    "--destination": "-d",
    "--bucket": "-b",
}
# Values that ask for what happens anyway; of other flags that is false.
_DEFAULTS: Final[dict[str, tuple[str, ...]]] = {
    "--network": ("default", ""),
    "--isolation": ("default", ""),
    "--format": ("oci",),
    **dict.fromkeys(("--inherit-labels", "--layers", "--skip-unused-stages", "--tls-verify"), ("true",)),
    **dict.fromkeys(("--cache", "--cache-copy-layers", "--cache-run-layers", "--no-push"), ("true",)),
    "--compressed-caching": ("false",),
}

_OUR_TYPES: Final = ("ext4", "erofs", "squashfs", "tar", "dir", "oci", "docker", "registry", "local")
_THEIR_TYPES: Final = {
    "image": "the image is always kept in firebuild's store: leave it out, or use type=registry to push it",
    "cacheonly": "a build without --output writes no form: leave it out",
}

_FILES: Final = "files of this host can't be mounted: COPY them into the image, or pass them as input with -i"
_WALLS: Final = (
    "the machine decides what a command can do: see docs/run.md; --init boots a system with all rights"
)
_OF_MACHINE: Final = "limit the virtual machine instead: --memory, --cpus, --disk"
_ADDRESSES: Final = "machines share no network: use --network and --publish"
_NAMES: Final = "set machine.qemu.name_servers in the configuration"
_LOGS: Final = "`firebuild logs` shows the output of a run with --detach"
_HEALTH: Final = "a run is not probed; `firebuild build --ready=COMMAND` probes an image before it is stored"
_LABELS: Final = "a run has a --name; LABEL and `build --label` are for images"
# Of `docker run` what `firebuild run` does not have.
_RUN_FLAGS: Final = {
    "--oom-kill-disable": _OF_MACHINE,
    "--privileged": _WALLS,
    "--publish-all": "name each port with --publish PORT:PORT",
    "--use-api-socket": "there is no daemon that a command could call",
}
_POINTLESS_RUN_FLAGS: Final = ("--disable-content-trust", "--no-healthcheck", "--quiet")
_RUN_OPTIONS: Final = {
    "--add-host": "the command can write names into the /etc/hosts of its machine",
    "--annotation": _LABELS,
    "--attach": "output is always shown; --interactive passes on standard input",
    "--cidfile": "--detach prints the id on standard output",
    "--detach-keys": "no terminal can detach from a run; `firebuild logs --follow` shows one with --detach",
    "--domainname": "--hostname takes a name with its domain",
    "--expose": "--publish PORT:PORT publishes a port",
    "--isolation": "--machine says where the command runs",
    "--platform": "a machine runs images of this host's platform",
    "--restart": "let a service manager restart it, such as systemd with `firebuild run`",
    "--runtime": "--machine says where the command runs",
    "--sig-proxy": "signals always go to the command: leave it out",
    "--stop-signal": "set STOPSIGNAL in the image",
    "--stop-timeout": "use `firebuild stop --time SECONDS`",
    "--sysctl": "set the arguments of the kernel with machine.qemu.kernel_args in the configuration",
    "--tmpfs": "files that a command writes are removed with the machine; with --read-only it has /dev/shm",
    **dict.fromkeys(("--device", "--mount", "--volume", "--volume-driver", "--volumes-from"), _FILES),
    **dict.fromkeys(("--dns", "--dns-opt", "--dns-option", "--dns-search"), _NAMES),
    **dict.fromkeys(("--label", "--label-file"), _LABELS),
    **dict.fromkeys(("--log-driver", "--log-opt"), _LOGS),
    **dict.fromkeys(
        (
            *("--health-cmd", "--health-interval", "--health-retries", "--health-start-interval"),
            *("--health-start-period", "--health-timeout"),
        ),
        _HEALTH,
    ),
    **dict.fromkeys(
        (
            *("--ip", "--ip6", "--link", "--link-local-ip", "--mac-address", "--net"),
            *("--net-alias", "--network-alias"),
        ),
        _ADDRESSES,
    ),
    **dict.fromkeys(
        (
            *("--cap-add", "--cap-drop", "--cgroup-parent", "--cgroupns", "--device-cgroup-rule", "--gpus"),
            *("--group-add", "--ipc", "--pid", "--security-opt", "--storage-opt", "--userns", "--uts"),
        ),
        _WALLS,
    ),
    **dict.fromkeys(
        (
            *("--blkio-weight", "--blkio-weight-device", "--cpu-count", "--cpu-percent", "--cpu-period"),
            *("--cpu-quota", "--cpu-rt-period", "--cpu-rt-runtime", "--cpu-shares", "--cpuset-cpus"),
            *("--cpuset-mems", "--device-read-bps", "--device-read-iops", "--device-write-bps"),
            *("--device-write-iops", "--io-maxbandwidth", "--io-maxiops", "--kernel-memory"),
            *("--memory-reservation", "--memory-swap", "--memory-swappiness", "--oom-score-adj"),
            *("--pids-limit", "--shm-size", "--ulimit"),
        ),
        _OF_MACHINE,
    ),
}
_SHORT_OF_RUN: Final = {
    "--attach": "-a",
    "--cpu-shares": "-c",
    "--label": "-l",
    "--publish-all": "-P",
    "--quiet": "-q",
    "--volume": "-v",
}

_RUN: Final = "`firebuild run` runs a command in a machine that is gone when it ends"
_CONTAINERS: Final = (
    "there are no containers: `firebuild run` starts a machine that is gone when its command ends, and of "
    "those with --detach there are ps, logs, stop, wait and rm"
)
_ALIASES: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("image", "build"): ("build",),
    ("images", "build"): ("build",),
    ("buildx", "build"): ("build",),
    ("buildx", "b"): ("build",),
    ("bud",): ("build",),
    ("build-using-dockerfile",): ("build",),
    ("builder", "build"): ("build",),
    ("buildx", "prune"): ("cache", "prune"),
    ("builder", "prune"): ("cache", "prune"),
    ("system", "prune"): ("images", "prune"),
    ("buildx", "du"): ("cache", "du"),
    ("builder", "du"): ("cache", "du"),
    ("system", "df"): ("du",),
    ("image",): ("images",),
    ("rmi",): ("images", "rm"),
    ("tag",): ("images", "tag"),
    ("pull",): ("images", "pull"),
    ("push",): ("images", "push"),
    ("save",): ("images", "save"),
    ("load",): ("images", "load"),
    ("history",): ("images", "history"),
    ("inspect",): ("images", "inspect"),
    ("bases",): ("base",),
    **{("container", name): (name,) for name in ("run", "ps", "logs", "stop", "wait", "rm")},
    ("container", "ls"): ("ps",),
    ("container", "list"): ("ps",),
}
_ALIASES_BELOW: Final = {"ls": "list", "remove": "rm", "delete": "rm", "df": "du"}
_NOT_THERE: Final[dict[str, str]] = {
    name: why
    for names, why in {
        "exec": "no command can be added to a machine that runs; `firebuild run --ssh-key` lets you log in,"
        " where the image has an SSH server",
        "start create": _RUN,
        "kill": "`firebuild stop --time 0 RUN` ends a run at once",
        "attach": "`firebuild logs --follow RUN` shows what a run with --detach writes",
        "port": "`firebuild ps` lists published ports",
        "container restart pause unpause top": _CONTAINERS,
        "stats rename update diff cp commit": _CONTAINERS,
        "network volume compose swarm stack service node checkpoint": _CONTAINERS,
        "bake": "`firebuild build --target STAGE` builds one image; several commands share the cache",
        "secret": "`firebuild build --secret` gives one to a RUN, `firebuild run --env NAME` to a command",
        "scout": "`firebuild images sbom` lists the packages, for tools that know what is vulnerable",
        "init": "a Dockerfile is yours to write: docs/dockerfile.md says what is in one",
        "login logout": "logins of docker and podman count; settings have others in `registries`",
        "search manifest trust": "of what is in a registry there are pull and push",
        "export": "`firebuild images export TAG --output tar,dest=FILE` writes the root file system",
        "import": "`firebuild base import NAME PATH` keeps a directory or archive as a base",
        "events": "`firebuild build --progress rawjson` prints the events of a build",
        "info": "`firebuild config show` prints what is in force, `firebuild du` what is stored",
        "version": "`firebuild --version` prints it",
        "context": "there is no daemon to choose",
        "buildx": "of docker buildx there are build, du and prune: `firebuild build`",
        "builder": "of docker builder there are build and prune: `firebuild build`",
        "system": "of docker system there are df and prune: `firebuild du`, `firebuild images prune`,"
        " `firebuild cache prune`",
    }.items()
    for name in names.split()
}


def docker_options(function: FunctionT) -> FunctionT:
    """Add the options of other tools that are accepted for nothing or answered by their names."""
    add = partial(_add_hidden, _SHORT)
    for name in (*_POINTLESS_FLAGS, *_POINTLESS_FLAGS_OF_KANIKO):
        add(function, name, is_flag=True)
    for name in _REFUSED_FLAGS:
        add(function, name, is_flag=True, callback=_refuse)
    for name in _REFUSED_OPTIONS:
        add(function, name, multiple=True, callback=_refuse)
    for name in (name for table in _OTHER_FLAGS.values() for name in table):
        add(function, name, is_flag=False, flag_value="", multiple=True, callback=_refuse)
    for name in (name for table in _OTHER_OPTIONS.values() for name in table):
        add(function, name, multiple=True, callback=_refuse)
    return function


def docker_run_options(function: FunctionT) -> FunctionT:
    """Add the options of `docker run` that are accepted for nothing or answered by their names."""
    add = partial(_add_hidden, _SHORT_OF_RUN)
    for name in _POINTLESS_RUN_FLAGS:
        add(function, name, is_flag=True)
    for name in _RUN_FLAGS:
        add(function, name, is_flag=True, callback=_refuse_of_run)
    for name in _RUN_OPTIONS:
        add(function, name, multiple=True, callback=_refuse_of_run)
    return function


def _add_hidden(short: Mapping[str, str], function: Callable[..., Any], name: str, **kind: Any) -> None:
    """Add an option that no help shows and no command gets; click notes it in the function itself."""
    names = [name, short[name]] if name in short else [name]
    click.option(*names, **kind, hidden=True, expose_value=False)(function)


def _refuse_of_run(_context: click.Context, parameter: click.Parameter, value: Any) -> None:
    name = parameter.opts[0]
    if value:
        why = _RUN_FLAGS.get(name) or _RUN_OPTIONS[name]
        raise InputError(f"{name} is an option of docker run that firebuild does not have", hint=why)


def _refuse(_context: click.Context, parameter: click.Parameter, value: Any) -> None:
    name = parameter.opts[0]
    given = value if isinstance(value, tuple) else (value,) if value else ()
    if not given:
        return
    tool, why = _origin(name)
    accepted: tuple[str, ...] = ()
    if name in _OTHER_FLAGS.get(tool, ()):
        given = tuple("true" if not one or _is_true(name, one) else "false" for one in given)
        accepted = ("false",)
    if all(one in _DEFAULTS.get(name, accepted) for one in given):
        return
    raise InputError(f"{name} is an option of {tool} that firebuild does not have", hint=why)


def _origin(name: str) -> tuple[str, str]:
    """Return whose option it is, and what to do instead."""
    for others in (_OTHER_FLAGS, _OTHER_OPTIONS):
        for tool, table in others.items():
            if name in table:
                return tool, table[name]
    return "docker build", _REFUSED_FLAGS.get(name) or _REFUSED_OPTIONS[name]


class DockerCommand(click.Command):
    """A command that reads options as Docker's do (https://pkg.go.dev/github.com/spf13/pflag).

    Flags also take `=true` and `=false`, and never the next word; what is after a `=` is the value of short
    options, too.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write options as click reads them."""
        interspersed = self.context_settings.get("allow_interspersed_args", True)
        options = {name: one for one in self.params if isinstance(one, click.Option) for name in one.opts}
        words: list[str] = []
        rest = list(args)
        while rest and rest[0] != "--":
            is_option = len(rest[0]) > 1 and rest[0].startswith("-")
            if not (is_option or interspersed):
                break
            word = rest.pop(0)
            written, has_next = _as_click_reads(word, options) if is_option else ([word], False)
            words += written
            if rest and has_next:
                words.append(rest.pop(0))
        try:
            return super().parse_args(ctx, words + rest)
        except click.NoSuchOption as error:  # what is refused is not a suggestion
            shown = {name for one in self.params if not getattr(one, "hidden", False) for name in one.opts}
            near = [name for name in error.possibilities or () if name in shown]
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=ctx) from error


def _as_click_reads(word: str, options: Mapping[str, click.Option]) -> tuple[list[str], bool]:
    """Write an option, or several of one letter, as click reads them.

    Returns:
        The words, and whether the next one is their value.
    """
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        option = options.get(name)
        if option is None or (equals and not option.is_flag):
            return [word], False
        if option.is_flag:
            return ([name] if not equals or _is_true(name, value) else []), False
        return ([f"{name}="], False) if option._flag_needs_value else ([name], True)
    for at, letter in enumerate(word[1:], 1):  # as -it, -eNAME=VALUE, -f=FILE, -itd=false
        option, value = options.get(f"-{letter}"), word[at + 1 :]
        if option is None:
            break
        if option.is_flag and value.startswith("="):
            flags = word[1:at] + (letter if _is_true(f"-{letter}", value[1:]) else "")
            return ([f"-{flags}"] if flags else []), False
        if not option.is_flag:
            return ([word[: at + 1], value[1:]], False) if value.startswith("=") else ([word], not value)
    return [word], False


def _is_true(flag: str, value: str) -> bool:
    if (found := parse_bool(value)) is None:
        raise InputError(f"{flag}: expected true or false, found {value!r:.100}")
    return found


class Commands(click.Group):
    """A group that knows Docker's names of its commands, and says by its name what is not there."""

    command_class = DockerCommand

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; see `click.Group.resolve_command`."""
        if not ctx.resilient_parsing:
            args = self._translated(args, top=ctx.parent is None)
        return super().resolve_command(ctx, args)

    def _translated(self, args: list[str], *, top: bool) -> list[str]:
        if args[0] in _ALIASES_BELOW and not top:
            return [_ALIASES_BELOW[args[0]], *args[1:]]
        if top and args == ["images"]:
            return ["images", "list"]
        for length in (2, 1) if top else ():
            if (found := _ALIASES.get(tuple(args[:length]))) is not None:
                return [*found, *args[length:]]
        if args[0] in _NOT_THERE and args[0] not in self.commands:
            what = "docker image" if not top else "docker"
            raise InputError(
                f"there is no `firebuild {args[0]}`, as in `{what} {args[0]}`", hint=_NOT_THERE[args[0]]
            )
        return args


def translated_output(text: str, *, paths: bool) -> tuple[str, bool]:
    """Turn Docker's form of `--output` into ours.

    Args:
        text: `type=TYPE,dest=PATH`, a path alone, `-`, or our own form, which stays as it is.
        paths: whether a word that is not a type is a path.

    Returns:
        our form without a destination of `-`, and whether there was one: the output goes to standard output.

    Raises:
        InputError: a type that firebuild does not write, or a double quote where none can be.
    """
    if text == "-":
        return "tar", True
    try:
        first, *others = split_fields(text) or [""]
    except ValueError as error:
        raise InputError(f"--output {text}: {error}") from error
    if (
        paths
        and first == text
        and not first.startswith("type=")
        and first not in (*_OUR_TYPES, *_THEIR_TYPES)
    ):
        return join_fields(("dir", f"dest={text}")), False
    members = [first, *others]
    types = [member.removeprefix("type=") for member in members if member.startswith("type=")]
    kind, rest = (
        (types[0], [each for each in members if each != f"type={types[0]}"]) if types else (first, others)
    )
    if kind in _THEIR_TYPES:
        raise InputError(f"--output {text}: there is no output of the type {kind}", hint=_THEIR_TYPES[kind])
    stdout = "dest=-" in rest
    kept = [member for member in rest if member != "dest=-"]
    return join_fields(("dir" if kind == "local" else kind, *kept)), stdout

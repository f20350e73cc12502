"""An example of each command, which its `--help`, the man page and the reference end with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import click

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "build": (
        "firebuild build --tag app:1 .",
        "firebuild build -t app:1 --target test --build-arg VERSION=2 --progress plain .",
        "firebuild build -t registry.example/app:1 --push --sbom=true .",
        "firebuild build -t app:1 --ready --ready-start-period 1m .",
        "firebuild build -t app:1 --debug-shell .",
    ),
    "rootfs": ("firebuild rootfs --tag app:1 --output ext4,dest=app.ext4,size=2GiB",),
    "run": (
        "firebuild run --machine qemu -e LEVEL=debug app:1 /bin/server --port 80",
        "firebuild run --identity spiffe://example.org/web --identity-signal HUP app:1",
        "firebuild run --detach --name web app:1",
    ),
    "ps": ("firebuild ps --all",),
    "logs": ("firebuild logs --follow web",),
    "stop": ("firebuild stop --time 30 web",),
    "wait": ("firebuild wait web",),
    "rm": ("firebuild rm web",),
    "base import": ("firebuild base import debian:12 rootfs.tar.gz",),
    "base from-host": ("firebuild base from-host host",),
    "base list": ("firebuild base list --json",),
    "base rm": ("firebuild base rm debian:12",),
    "images list": ("firebuild images list",),
    "images inspect": ("firebuild images inspect app:1",),
    "images path": ("firebuild images path app:1 --output erofs",),
    "images export": (
        "firebuild images export app:1 -o ext4,dest=app.ext4 -o tar,dest=app.tar",
        "firebuild images export app:1 --firecracker microvm --size 2GiB",
    ),
    "images pull": ("firebuild images pull debian:12 registry.example/team/app:1",),
    "images push": ("firebuild images push registry.example/team/app:1 --provenance=mode=min",),
    "images save": ("firebuild images save app:1 app:2 --output apps.tar",),
    "images load": ("firebuild images load apps.tar",),
    "images history": ("firebuild images history app:1",),
    "images tag": ("firebuild images tag app:1 registry.example/team/app:1",),
    "images rm": ("firebuild images rm app:1 app:2",),
    "images prune": ("firebuild images prune --all --filter until=72h --keep 3 --dry-run",),
    "images provenance": ("firebuild images provenance app:1 --mode min",),
    "images sbom": ("firebuild images sbom app:1 > app.cdx.json",),
    "cache du": ("firebuild cache du",),
    "cache prune": ("firebuild cache prune --older-than 2w --max-size 10GiB",),
    "du": ("firebuild du --json",),
    "store check": ("firebuild store check --repair",),
    "rm-tree": ("firebuild rm-tree out/rootfs",),
    "config check": ("firebuild config check --config firebuild.yaml",),
    "config show": ("firebuild config show",),
    "config schema": ("firebuild config schema > firebuild.schema.json",),
    "ca check": ("firebuild ca check --ca vault",),
    "ca show": ("firebuild ca show --json",),
    "ca providers": ("firebuild ca providers",),
    "ca issue": ("firebuild ca issue --server b1.example.internal --guest b1 --out tls",),
    "ca revoke": ("firebuild ca revoke tls/guest.pem",),
    "ca inspect": ("firebuild ca inspect tls/server.pem --trust tls/ca.pem",),
    "ca bench": ("firebuild ca bench --profile build --count 50 --concurrency 4",),
    "ca vault-setup": ("firebuild ca vault-setup --print --auth jwt > vault-setup.sh",),
    "plugin new": ("firebuild plugin new acme --dir plugins",),
    "initramfs build": ("firebuild initramfs build --output initramfs.zst --compress zstd",),
    "doctor": ("firebuild doctor --machine qemu",),
    "completion": ('eval "$(firebuild completion bash)"',),
}
"""What is typed, by the words of the command; each is parsed by a test."""

SUMMARIES: Final[Mapping[str, str]] = {
    "base from-host": "Make a base from this machine's own shell and core tools.",
    "base import": "Import a directory or tar archive as a base for FROM.",
    "base rm": "Remove bases.",
    "cache du": "Show what is in the cache, and its size.",
    "cache prune": "Remove the least recently used entries of the cache.",
    "completion": "Print the script that completes commands in a shell.",
    "config check": "Check the configuration.",
    "images export": "Write an image as files: ext4, tar, OCI and others.",
    "images history": "Show the history of an image, the newest step first.",
    "images list": "List the images.",
    "images load": "Load the images of an archive or OCI layout.",
    "images path": "Print the paths of an image's forms.",
    "images provenance": "Print how an image was built: in-toto, SLSA.",
    "images prune": "Remove untagged images, or with --all every image.",
    "images pull": "Pull images from their registries.",
    "images rm": "Remove images.",
    "images save": "Write images with their layers as one archive.",
    "images sbom": "Print the packages in an image.",
    "images tag": "Give an image another name.",
    "initramfs build": "Make the initramfs, and print its path.",
    "logs": "Print the output of a detached run.",
    "ps": "List the detached runs.",
    "rm-tree": "Remove directories that builds wrote.",
    "rootfs": "Build an image, and write its root file system.",
    "run": "Run an image in a machine.",
    "stop": "Stop detached runs.",
    "wait": "Wait until detached runs have ended.",
}
"""Summaries for the list of commands, where the first sentence of the help is too long for a line."""


def commands_of(
    command: click.Command, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Walk a command and all below it that are not hidden, by their names; one with two names comes once.

    Args:
        command: the program, or one of its commands.
        words: those after the program's name that lead to `command`.

    Yields:
        the words of a command, and the command; groups before what is in them.
    """
    seen = set[click.Command]()

    def walk(
        command: click.Command, words: tuple[str, ...]
    ) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        if command.hidden or command in seen:
            return
        seen.add(command)
        yield words, command
        for name, below in sorted(command.commands.items()) if isinstance(command, click.Group) else ():
            yield from walk(below, (*words, name))

    return walk(command, words)


def add_examples(command: click.Command, name: str) -> None:
    """Have the help of a command, or of each in a group, end with its examples; give it a summary for lists.

    Args:
        command: one of the program's.
        name: of the command.
    """
    for words, each in commands_of(command, (name,)):
        each.short_help = SUMMARIES.get(" ".join(words), each.short_help)
        if examples := EXAMPLES.get(" ".join(words)):
            title = "Example" if len(examples) == 1 else "Examples"
            each.epilog = "\n".join(("\b", f"{title}:", *(f"  {line}" for line in examples)))

"""Overlays and copies: where a file system takes no overlay, a build takes longer and gives the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.guest.overlay import mount_layers
from support import Firebuild, privately

DOCKERFILE = """
FROM rich
RUN rm /rich/gone && rm -r /rich/dir && mkdir /rich/dir && echo new > /rich/dir/new
RUN chmod g+w /rich/suid && chmod g+w /rich/able && mkdir -m 2770 /rich/group && ln /rich/dir/new /rich/linked
RUN mv /rich/tree /rich/moved && ln -s moved /rich/tree && rm -r /rich/moved/sub && chown 7:8 /rich/sticky
COPY Dockerfile /rich/tree/
WORKDIR /rich/work
RUN rm /rich/linked && echo 10.0.0.1 extra >> /etc/hosts && ln -sf /x /etc/resolv.conf && mkfifo -m 622 pipe
RUN rm -r /rich/moved && echo a file > /rich/moved
COPY --link --chown=5:6 Dockerfile /rich/tree/over
COPY . /rich/context
RUN test -f /rich/tree/over && rm /rich/tree/over && touch /rich/tree/last
"""
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000").decode("latin-1")


def rich_base(source: Path, target: Path) -> Path:
    """Add to a base what is easy to lose on the way through layers."""
    shutil.copy(source, target)
    members = [
        *(("rich", 0o2751), ("rich/dir", 0o755), ("rich/dir/sub", 0o700), ("rich/sticky", 0o1777)),
        *(("rich/tree", 0o755), ("rich/tree/sub", 0o755)),
        *(("rich/gone", 0o644), ("rich/dir/old", 0o600), ("rich/suid", 0o4711), ("rich/able", 0o755)),
        *(("rich/tree/one", 0o644), ("rich/tree/sub/two", 0o640), ("rich/pair", 0o4755)),
    ]
    with tarfile.open(target, "a", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, mode) in enumerate(members):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if number < 6 else tarfile.REGTYPE
            member.mode, member.uid, member.gid, member.mtime = (
                mode,
                number,
                number + 1,
                1_200_000_000 + number,
            )
            member.pax_headers = {"SCHILY.xattr.user.note": f"on {name}"}
            if name == "rich/able":
                member.pax_headers["SCHILY.xattr.security.capability"] = CAPABILITY
            if name == "rich/tree/one":  # the kernel's own mark, which must mean nothing
                member.pax_headers["SCHILY.xattr.user.overlay.opaque"] = "y"
            tar.addfile(member)
        for name, kind, to in (
            ("rich/twin", tarfile.LNKTYPE, "rich/pair"),
            ("rich/link", tarfile.SYMTYPE, "tree/one"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, to
            tar.addfile(member)
    return target


def members(archive: Path, before: float) -> dict[str, tuple[Any, ...]]:
    """Everything in a tar, times only of what the build has not touched."""
    found = {}
    with tarfile.open(archive) as tar:
        for one in tar:
            time_before = one.mtime if one.mtime < before else 0
            attributes = {key: text for key, text in one.pax_headers.items() if key.startswith("SCHILY")}
            owner = (one.uid, one.gid)
            found[one.name] = (one.type, one.linkname, one.mode, owner, one.size, time_before, attributes)
    return found


@pytest.mark.root
@pytest.mark.needs("root", "userns")
def test_with_and_without_overlays_the_same_comes_out(tmp_path: Path, shared_home: Path) -> None:
    [host] = shared_home.glob("bases/names/host/latest/rootfs.tar")
    rich = rich_base(host, tmp_path / "rich.tar")
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Dockerfile").write_text(DOCKERFILE)
    for name in ("lower/0", "lower/1", "upper", "work", "overlays", "copies"):
        (tmp_path / name).mkdir(parents=True)
    began = time.time()

    def build(home: Path) -> tuple[str, str, dict[str, tuple[Any, ...]]]:
        firebuild = Firebuild(home)
        firebuild("base", "import", "rich", rich)
        context: list[str | Path] = [
            "--dockerfile",
            tmp_path / "context/Dockerfile",
            "--context",
            tmp_path / "context",
        ]
        done = firebuild("rootfs", *context, "--tag", "rich:1", "--output", "tar", "--output", "dir")
        image = json.loads(firebuild("images", "inspect", "rich:1").stdout)
        found = {output["type"]: output for output in image["outputs"]}
        # Times of files that a RUN makes are never the same twice; a directory's digest leaves times out.
        return done.stdout + done.stderr, found["dir"]["digest"], members(Path(found["tar"]["path"]), began)

    results = []

    def both() -> None:
        # An overlay can't have its upper directory on another one.
        mount_layers(str(tmp_path), ["lower/0", "lower/1"], str(tmp_path / "copies"), "upper", "work")
        results.extend([build(tmp_path / "overlays"), build(tmp_path / "copies")])
        results.append(build(tmp_path / "copies"))

    privately(both)
    (told, digest, listing), (told_otherwise, *others), (told_again, *again) = results
    assert others == again == [digest, listing]
    assert told_again.count("CACHED") == 10
    assert "allows no overlay" not in told
    assert told_otherwise.count("the base is copied for this build, because ") == 1
    assert {"rich/work/pipe", "rich/suid", "rich/twin", "rich/tree"} <= listing.keys()
    assert set(listing["rich/able"][-1]) == {"SCHILY.xattr.user.note", "SCHILY.xattr.security.capability"}
    assert len(list((tmp_path / "overlays/layers").glob("*/names/sha256:*"))) == 1, (
        "the base is kept unpacked"
    )
    assert len(list(tmp_path.glob("upper/layers/*/cache/keys/*"))) == 10


FEW_STEPS = """
FROM host
RUN mkdir /made && touch /made/kept /made/gone && rm -r /usr/share
RUN rm /made/gone && ls /made
"""


@contextmanager
def fuse_overlay(directory: Path, *options: str) -> Iterator[Path]:
    """An overlay outside the kernel, as rootless containers have it; no overlay lies on it."""
    for name in ("lower", "upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    layers = [f"{kind}dir={directory / kind}" for kind in ("lower", "upper", "work")]
    command: list[str | Path] = ["fuse-overlayfs", "-o", ",".join((*layers, *options)), directory / "merged"]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield directory / "merged"
    finally:
        # Whoever removes what a build has left may be at work still.
        subprocess.run(["umount", "--lazy", directory / "merged"], check=True)


@pytest.mark.root
@pytest.mark.needs("root", "userns", "fuse-overlayfs")
def test_steps_are_cached_where_overlays_are_made_outside_the_kernel(
    tmp_path: Path, shared_home: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(FEW_STEPS)
    with fuse_overlay(tmp_path / "fuse") as mounted:
        firebuild = Firebuild(mounted / "store")
        base_of_host(firebuild, shared_home)
        first, second = (firebuild("build", "-t", "a", tmp_path) for _ in range(2))
        told = first.stdout + first.stderr
        assert told.count("the base is copied for this build, because ") == 1
        assert "kept in the cache" not in told
        assert (second.stdout + second.stderr).count("CACHED") == 2
        # What dead builds left, which is all of these, can be removed.
        assert os.listdir(firebuild.home / "builds") == ["lock"]


@pytest.mark.root
@pytest.mark.needs("root", "userns", "fuse-overlayfs")
def test_a_store_that_can_hold_no_layers_is_said_with_the_remedy(tmp_path: Path, shared_home: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM host\nRUN echo made > /made\n")
    with fuse_overlay(tmp_path / "fuse", "noxattrs=1") as mounted:
        firebuild = Firebuild(mounted / "store")
        base_of_host(firebuild, shared_home)
        done = firebuild("build", "-t", "a", tmp_path)
        told = done.stdout + done.stderr
        assert told.count("no step of this build is kept in the cache, because ") == 1
        assert "a store on ext4, XFS or Btrfs does (the setting store.path, or FIREBUILD_HOME)" in told
        found = json.loads(firebuild("doctor", "--offline", "--json").stdout)["findings"]
    [overlay] = [finding for finding in found if finding["about"] == "overlay"]
    assert overlay["level"] == "limited"
    assert "nothing there could mean in a layer that a file was removed" in overlay["message"]
    assert "no step is kept in the cache" in overlay["hint"]


def base_of_host(firebuild: Firebuild, shared_home: Path) -> None:
    """Import the base `host` that other tests have made."""
    [host] = shared_home.glob("bases/names/host/latest/rootfs.tar")
    firebuild("base", "import", "host", host)

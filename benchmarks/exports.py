"""What it costs to write an image of a Debian system as ext4, as EROFS and as an OCI archive.

Beside each is what people use for it: `mke2fs -d` and `mkfs.erofs` of the unpacked tree, and `buildah
push`. The system is one of mmdebstrap, in one layer, and the stores forget before each export what they
would find of the last.

Of ours 0.35 s is the start of the command and of its sandbox. A form is also hashed, kept in the store and
copied from there, each synced to the disk, which the others do not do. Before layers were compressed by
libdeflate, gzip took 39 MB/s of a processor; it is 160 since (zstd 245), at 0.408 of the size instead of
0.405 (zstd 0.349).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.shape import FIREBUILD, Benchmark, Row, Run, command, firebuild_environ, timed

# What is compared, with the option of ours.
FORMS: Final = {
    Row("a Debian system as ext4", "mke2fs -d", needs=("mke2fs",)): "ext4",
    Row("a Debian system as EROFS", "mkfs.erofs", needs=("mkfs.erofs",)): "erofs",
    Row("a Debian system as OCI archive, gzip", "buildah push", needs=("buildah",)): "oci",
    Row("a Debian system as OCI archive, zstd", "buildah push", needs=("buildah",)): "oci,compression=zstd",
}


class Exporters:
    """firebuild and its peers, with the system in their stores."""

    def __init__(self, work: Path, *, buildah: bool) -> None:
        self._home, self._tree = work / "home", work / "root"
        self._out = work / "out"
        # mke2fs reads no settings of this machine's.
        self._environ = {**firebuild_environ(self._home), "MKE2FS_CONFIG": "/nonexistent"}
        self._buildah = ["buildah", "--root", f"{work}/buildah", "--runroot", f"{work}/run"]
        self._buildah += ["--storage-driver", "vfs"]
        options = ["--quiet", "--variant=standard", "--mode=root"]
        command(["mmdebstrap", *options, "bookworm", self._tree])
        (context := work / "context").mkdir()
        (context / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        tar = ["tar", "--exclude=./dev/*", "--one-file-system", "-C", str(self._tree)]
        command([*tar, "-cf", context / "root.tar", "."])
        command([FIREBUILD, "build", "-q", "-t", "bench:1", context], self._environ)
        if buildah:
            options = ["--quiet", "--isolation", "chroot", "-t", "bench:1"]
            command([*self._buildah, "build", *options, str(context)])
        self.files = sum(1 for _ in self._tree.rglob("*"))
        self.mib = sum(each.lstat().st_blocks for each in self._tree.rglob("*")) >> 11

    @property
    def others(self) -> Mapping[str, list[str]]:
        """The commands of the peers."""
        out, tree = str(self._out), str(self._tree)
        return {
            "mke2fs -d": ["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, out, f"{self.mib * 2 + 200}M"],
            "mkfs.erofs": ["mkfs.erofs", "--quiet", out, tree],
            "buildah push": [*self._buildah, "push", "--quiet", "bench:1", f"oci-archive:{out}"],
        }

    def ours(self, form: str) -> list[str]:
        """Return the command of firebuild."""
        return [FIREBUILD, "images", "export", "bench:1", "--output", f"{form},dest={self._out}"]

    def export(self, words: list[str]) -> tuple[float, float]:
        """Write a form with nothing kept from the last time; return seconds and MiB."""
        for form in self._home.glob("images/content/*/rootfs.*"):
            form.unlink()
        shutil.rmtree(self._home / "blobs", ignore_errors=True)
        seconds = timed(lambda: command(words, self._environ))
        written = self._out.stat().st_blocks / 2048
        self._out.unlink()
        return seconds, written


def measure(run: Run) -> None:
    """Write the system in each form with each."""
    rows = {row: form for row, form in FORMS.items() if run.wants([row])}
    exporters = Exporters(run.directory, buildah=any(row.against == "buildah push" for row in rows))
    written: dict[Row, tuple[float, float]] = {}
    for _ in range(run.rounds):
        for row, form in rows.items():
            ours, own_size = exporters.export(exporters.ours(form))
            theirs, size = exporters.export(exporters.others[row.against])
            run.add(row, ours, theirs)
            written[row] = own_size, size
    run.note(f"the system has {exporters.files:,} files and {exporters.mib:,} MiB")
    sizes = (
        f"{form} {written[row][0]:.0f} ({row.against}: {written[row][1]:.0f})" for row, form in rows.items()
    )
    run.note(f"MiB written: {', '.join(sizes)}")


BENCHMARK: Final = Benchmark(
    "exports", __doc__, tuple(FORMS), measure, rounds=3, needs=("root", "mmdebstrap")
)

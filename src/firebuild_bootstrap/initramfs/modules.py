"""Kernel modules: which ones a machine needs, in which order, out of a directory of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.initramfs.libraries import ElfError, read_modinfo
from firebuild_bootstrap.layers.compression import decompress
from firebuild_bootstrap.layers.reader import DamagedArchive
from firebuild_pki.homes import absolute, open_file
from firebuild_pki.values import dataclass

# One of the two buses is enough; the file systems may be compiled in; the last feeds the random numbers.
_NEEDED: Final = ("virtio_blk", "virtio_net")
_BUSES: Final = ("virtio_mmio", "virtio_pci")
_WELCOME: Final = ("ext4", "overlay", "virtio_rng")
_SUFFIXES: Final = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")


@dataclass(frozen=True)
class ModuleSet:
    """The modules for one kernel: its release, and their files in the order in which to load them."""

    release: str
    files: Mapping[str, bytes]


def module_directories(named: Iterable[str | Path], setting: str) -> tuple[Path, ...]:
    """Return the directories that a setting names; a ~ at the beginning is the user's home.

    Raises:
        InputError: one is not a directory.
    """
    found = tuple(map(absolute, named))
    for directory in found:
        if not directory.is_dir():
            raise InputError(
                f"{setting}: {directory} is not a directory",
                hint="name the directory of one kernel, such as /lib/modules/6.1.0",
            )
    return found


def read_modules(directory: Path) -> ModuleSet:
    """Collect what a machine with virtio devices needs.

    Args:
        directory: the modules of one kernel, as in `/lib/modules/RELEASE`.

    Raises:
        InputError: one is missing or can't be read.
    """
    return _Collection(directory).collect()


class _Collection:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Of several with one name the last: `updates` comes after `kernel`.
        self._paths = {_name(path): path for path in _files(directory)}
        self._built_in = set(_built_in(directory))
        self._begun: set[str] = set()  # not `_loaded`: wishes may go in a circle
        self._loaded: dict[str, bytes] = {}
        self._releases: set[str] = set()

    def collect(self) -> ModuleSet:
        if not self._paths:
            raise InputError(
                f"{self._directory} holds no kernel modules",
                hint="name the directory of one kernel, such as /lib/modules/$(uname -r)",
            )
        buses = [name for name in _BUSES if self._has(name)]
        if not buses:
            raise self._missing(" and ".join(_BUSES))
        for name in (*buses, *_NEEDED):
            self._add(name)
        for name in _WELCOME:
            if self._has(name):
                self._add(name)
        if len(self._releases) > 1:
            raise InputError(
                f"{self._directory} holds modules of several kernels: {', '.join(sorted(self._releases))}",
                hint="name the directory of one of them",
            )
        # All of them built in: the directory's own name has to do, and nothing depends on it.
        release = next(iter(self._releases), self._directory.resolve().name)
        return ModuleSet(release, self._loaded)

    def _has(self, name: str) -> bool:
        return name in self._paths or name in self._built_in

    def _add(self, name: str) -> None:
        if name in self._begun or (name in self._built_in and name not in self._paths):
            return
        if name not in self._paths:
            raise self._missing(name)
        self._begun.add(name)
        path = self._paths[name]
        data = _read(path)
        try:
            facts = read_modinfo(data)
        except ElfError as error:
            raise InputError(f"{path}: {error}") from error
        self._releases.add((facts.get("vermagic") or [""])[0].partition(" ")[0])
        for other in _dependencies(facts):
            self._add(other)
        for other in _wishes(facts):
            if self._has(other):
                self._add(other)
        self._loaded[f"{name}.ko"] = data

    def _missing(self, name: str) -> InputError:
        return InputError(
            f"{self._directory} has no kernel module {name}",
            hint="name the directory of modules of the kernel that the machine boots",
        )


def _files(directory: Path) -> Iterator[Path]:
    """Yield the modules of one kernel: in `kernel` and its siblings, or all in one directory."""
    found = [path for path in sorted(directory.glob("*.ko*")) if path.name.endswith(_SUFFIXES)]
    if not found and (directory / "kernel").is_dir():
        found = [path for path in sorted(directory.rglob("*.ko*")) if path.name.endswith(_SUFFIXES)]
    return iter(found)


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _built_in(directory: Path) -> Iterator[str]:
    try:
        lines = (directory / "modules.builtin").read_text("ascii", "replace").splitlines()
    except OSError:
        return
    yield from (_name(Path(line)) for line in lines)


def _dependencies(facts: Mapping[str, list[str]]) -> list[str]:
    return [name.replace("-", "_") for value in facts.get("depends", []) for name in value.split(",") if name]


def _wishes(facts: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield what `softdep` asks for beforehand (modprobe.d(5)), such as the checksums of ext4."""
    for value in facts.get("softdep", []):
        before = value.partition("pre:")[2].partition("post:")[0]
        yield from (name.replace("-", "_") for name in before.split())


def _read(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            data = file.read()
        return data if path.suffix == ".ko" else decompress(data)
    except OSError as error:
        raise InputError(
            f"{path} can't be read: {error.strerror or error}",
            hint="let this user read the modules, or name a copy of them",
        ) from error
    except DamagedArchive as error:
        raise InputError(
            f"{path} can't be decompressed: {error}",
            hint="install the package of the kernel again: the module is damaged",
        ) from error

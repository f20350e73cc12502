"""Compresses an initramfs in a form that Linux unpacks (Kconfig, CONFIG_RD_*), the same every time."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import zlib
from enum import StrEnum
from typing import Final

import zstandard

from firebuild_bootstrap.errors import InputError, MachineError

_ZSTD_LEVEL: Final = 12
_LZ4: Final = ("-l", "-12", "-z", "-c")  # Linux knows the legacy format only


class Compression(StrEnum):
    """How an initramfs is compressed; gzip is what every kernel can read."""

    ZSTD = "zstd"
    LZ4 = "lz4"
    GZIP = "gzip"

    @property
    def suffix(self) -> str:
        """What such files are usually called."""
        return {"zstd": "zst", "lz4": "lz4", "gzip": "gz"}[self.value]

    @property
    def recipe(self) -> str:
        """What decides the bytes besides the content: the program that compresses, and how."""
        match self:
            case Compression.ZSTD:
                return f"zstd {zstandard.backend} {zstandard.ZSTD_VERSION} {_ZSTD_LEVEL}"
            case Compression.LZ4:
                return f"lz4 {_lz4_version()} {_LZ4}"
            case Compression.GZIP:
                return f"gzip {zlib.ZLIB_RUNTIME_VERSION} 9"


def compress(data: bytes, how: Compression) -> bytes:
    """Compress `data`.

    Raises:
        MachineError: the program for it failed.
        InputError: the program for it is not installed.
    """
    match how:
        case Compression.ZSTD:
            return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
        case Compression.LZ4:
            return _run_lz4(*_LZ4, data=data)
        case Compression.GZIP:
            return gzip.compress(data, 9, mtime=0)


def _lz4_version() -> str:
    return _run_lz4("--version").decode("utf-8", "replace").strip()


def _run_lz4(*arguments: str, data: bytes = b"") -> bytes:
    program = shutil.which("lz4")
    if program is None:
        raise InputError(
            "the program lz4 was not found", hint="install the package lz4, or choose --compress zstd"
        )
    done = subprocess.run([program, *arguments], input=data, capture_output=True, check=False)
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip() or f"status {done.returncode}"
        raise MachineError(f"lz4 failed: {words}")
    return done.stdout

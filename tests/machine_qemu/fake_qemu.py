"""Stands in for QEMU where a fault is wanted that a real one can't be made to show."""

from __future__ import annotations

from pathlib import Path

from firebuild_bootstrap.machine.qemu.command import Program


def fake_qemu(directory: Path, script: str) -> Program:
    """A shell script in the place of QEMU; its arguments are QEMU's."""
    program = directory / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Program(program)

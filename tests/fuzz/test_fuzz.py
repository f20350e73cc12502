"""What was found once stays mended, and a second of mutations for each reader of untrusted bytes."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from fuzz.targets import TARGETS, check

CORPUS = Path(__file__).parent / "corpus"
BYTES = (b"\0", b"\xff", b"\n", b"$", b"{", b"}", b"\\", b'"', b"\x7f", b"\x80", b"9" * 20, b"-1", b"/../")


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes, leave some out, repeat some."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(changed))
        match chance.randint(0, 3):
            case 0:
                changed[at : at + chance.randint(1, 16)] = chance.choice(BYTES)
            case 1:
                del changed[at : at + chance.randint(1, 32)]
            case 2:
                changed[at:at] = changed[at : at + chance.randint(1, 64)]
            case _:
                changed[at : at + 1] = chance.randbytes(1)
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_more_than_be_refused(name: str) -> None:
    known = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    for data in (*known, *TARGETS[name].seeds, b""):
        check(name, data)
    chance = random.Random(name)  # the same each time: what is found elsewhere goes into the corpus
    begins = (*known, *TARGETS[name].seeds) or (b"",)
    end = time.monotonic() + 1
    for _ in range(1000):
        check(name, mutated(chance.choice(begins), chance))
        if time.monotonic() > end:
            break


def test_a_guest_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    for path in sorted((CORPUS / "hostile-server").iterdir()):
        check("hostile-server", path.read_bytes())
    assert len(os.listdir("/proc/self/fd")) == len(before)

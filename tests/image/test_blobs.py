"""Blobs by digest: verified while they are written, resumed after a cut, swept when nobody needs them."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.blobs import BlobError, BlobStore, digest_of
from firebuild_bootstrap.image.content_store import allow_open_files
from firebuild_bootstrap.image.oci import LAYER, Descriptor

DATA = b"a layer" * 1000


def described(data: bytes, algorithm: str = "sha256") -> Descriptor:
    return Descriptor(LAYER, digest_of(data, algorithm), len(data))


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobStore]:
    store = BlobStore(tmp_path)
    yield store
    store.close()


def parts(store: BlobStore) -> list[str]:
    return os.listdir(store.root / "partial")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_is_there_once_it_is_whole(blobs: BlobStore, algorithm: str) -> None:
    blob = described(DATA, algorithm)
    assert blobs.hold(blob.digest) is None
    with blobs.writer(blob) as writer:
        writer.write(DATA[:10])
        assert blobs.hold(blob.digest) is None
        writer.write(DATA[10:])
        path = writer.commit()
    assert path.read_bytes() == DATA
    assert blobs.hold(blob.digest) == path
    assert blobs.digests() == [blob.digest]
    assert parts(blobs) == []


def test_what_was_cut_off_is_resumed(blobs: BlobStore) -> None:
    blob = described(DATA)
    with pytest.raises(ConnectionResetError), blobs.writer(blob) as writer:
        writer.write(DATA[:1234])
        raise ConnectionResetError
    with pytest.raises(BlobError, match="and 7000 were announced"), blobs.writer(blob) as writer:
        assert writer.offset == 1234
        writer.write(DATA[1234:2000])
        writer.commit()
    with blobs.writer(blob) as writer:
        assert writer.offset == 2000
        writer.write(DATA[2000:])
        writer.commit()
    assert blobs.required(blob.digest).read_bytes() == DATA


def test_a_source_that_begins_anew_is_taken_from_the_beginning(blobs: BlobStore) -> None:
    blob = described(DATA)
    with blobs.writer(blob) as writer:
        writer.write(b"of another ")
    with blobs.writer(blob) as writer:
        assert writer.offset == 11
        writer.restart()
        writer.write(DATA)
        writer.commit()
    assert blobs.required(blob.digest).read_bytes() == DATA


def test_wrong_bytes_are_refused_and_not_kept(blobs: BlobStore) -> None:
    blob = described(DATA)
    with pytest.raises(BlobError, match="expected a blob with the digest"), blobs.writer(blob) as writer:
        writer.write(b"x" * len(DATA))
        writer.commit()
    assert parts(blobs) == []
    with (
        pytest.raises(BlobError, match="is longer than 7000 bytes, as was announced"),
        blobs.writer(blob) as writer,
    ):
        writer.write(DATA)
        writer.write(b"x")
    assert parts(blobs) == []
    assert blobs.hold(blob.digest) is None


def test_a_part_that_can_not_be_the_beginning_is_thrown_away(blobs: BlobStore) -> None:
    blob = described(DATA)
    part = blobs.root / "partial" / blob.digest.replace(":", "-")
    part.parent.mkdir(parents=True)
    for wrong in (DATA + b"more", b"x" * len(DATA)):
        part.write_bytes(wrong)
        with blobs.writer(blob) as writer:
            assert writer.offset == 0
    part.write_bytes(DATA)  # whoever wrote it was killed before it became a blob
    with blobs.writer(blob) as writer:
        assert writer.complete
        writer.commit()
    assert blobs.hold(blob.digest)


def test_what_is_there_is_not_written_again(blobs: BlobStore) -> None:
    digest = blobs.add(DATA)
    assert blobs.add(DATA) == digest
    with blobs.writer(described(DATA)) as writer:
        assert writer.complete
        assert writer.commit() == blobs.path(digest)
        with pytest.raises(BlobError, match="longer"):
            writer.write(b"x")
    assert blobs.add(b"") == digest_of(b"")


def test_a_second_writer_waits_for_the_first_and_finds_what_it_made(tmp_path: Path, blobs: BlobStore) -> None:
    blob = described(DATA)
    waiting = threading.Event()
    other = BlobStore(tmp_path, check=waiting.set)
    found: list[int] = []

    def second() -> None:
        with other.writer(blob) as writer:
            found.append(writer.offset)
            writer.commit()

    with blobs.writer(blob) as writer:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        writer.write(DATA)
        writer.commit()
    thread.join(30)
    assert found == [len(DATA)]
    other.close()


def test_whoever_waits_can_be_interrupted(tmp_path: Path, blobs: BlobStore) -> None:
    def check() -> None:
        raise InterruptedError

    other = BlobStore(tmp_path, check=check)
    with (
        blobs.writer(described(DATA)),
        pytest.raises(InterruptedError),
        other.writer(described(DATA)),
    ):
        pass


def test_a_sweep_leaves_what_is_held_or_named(tmp_path: Path) -> None:
    named = digest_of(b"named")
    holder, sweeper = BlobStore(tmp_path), BlobStore(tmp_path, named=lambda: frozenset([named]))
    assert sweeper.sweep() == 0
    held = holder.add(b"held")
    maker = BlobStore(tmp_path)
    maker.add(b"named")
    maker.add(b"of no use")
    maker.close()
    with holder.writer(described(DATA)) as writer:
        writer.write(DATA[:100])
    assert sweeper.sweep() == len(b"of no use")
    assert sweeper.digests() == sorted([held, named])
    assert parts(sweeper) != []
    part = next((sweeper.root / "partial").iterdir())
    os.utime(part, (0, 0))
    assert sweeper.sweep() == 100
    holder.close()
    assert sweeper.sweep() == len(b"held")


def test_a_blob_that_somebody_changed_is_not_believed(blobs: BlobStore) -> None:
    digest = blobs.add(b"right")
    assert blobs.read(digest, 5) == b"right"
    with pytest.raises(InputError, match="more than the 4 bytes"):
        blobs.read(digest, 4)
    blobs.path(digest).write_bytes(b"wrong")
    with pytest.raises(MachineError, match="was modified after it was stored"):
        blobs.read(digest, 5)
    with pytest.raises(MachineError, match="the blob is not there"):
        blobs.required(digest_of(b"missing"))


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, ""])
def test_only_digests_that_can_be_verified_name_a_blob(blobs: BlobStore, digest: str) -> None:
    with pytest.raises(InputError, match="expected a digest such as sha256:…"):
        blobs.hold(digest)


def test_a_store_that_can_not_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file")
    with pytest.raises(InputError, match="the store can't be used"):
        BlobStore(tmp_path).add(DATA)


def test_many_layers_raise_the_limit_of_open_files_as_far_as_that_may_be(blobs: BlobStore) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
        blobs.make_room([described(DATA)])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (612, before[1])
        with pytest.raises(
            MachineError, match=f"needs {before[1] + 65} open files, and this process may have"
        ):
            allow_open_files(before[1] + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

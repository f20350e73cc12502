"""Records of steps that travel between stores, and their layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.events import Event, Notice, Tasks
from firebuild_bootstrap.image.blobs import BlobStore, digest_of
from firebuild_bootstrap.image.intake import Intake
from firebuild_bootstrap.image.layertrees import ALTERED
from firebuild_bootstrap.image.oci import Descriptor, Manifest, canonical
from firebuild_bootstrap.image.outgoing import Outgoing
from firebuild_bootstrap.image.remotecache import (
    RECORDS,
    CacheSpec,
    DirectoryBackend,
    cache_manifest,
    parse_cache,
)
from firebuild_bootstrap.image.store import ImageStore
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.registry.transport import Surroundings
from firebuild_bootstrap.solve.cache import LINKED, Cache, Entry
from firebuild_bootstrap.solve.keys import SCRATCH_KEY, Parts
from firebuild_bootstrap.solve.remote import Record, RemoteCaches, read_records, write_records
from solve.stores import PlainTrees, layer, layer_trees

A = Parts("", "a", (), "linux/amd64")
B = Parts(A.key, "b", (), "linux/amd64")
C = Parts(B.key, "c", (), "linux/amd64")
LINK = Parts(SCRATCH_KEY, "link", (), "linux/amd64", linked=True)
BASE = f"sha256:{'1' * 64}"


class Machine:
    """A store, and the remote caches of one build on it."""

    def __init__(self, home: Path, cleanup: ExitStack) -> None:
        home.mkdir()
        self.home = home
        self.trees = cleanup.enter_context(closing(layer_trees(home)))
        self.cache = Cache(self.trees)
        self.blobs = cleanup.enter_context(closing(BlobStore(home)))
        self.events: list[Event] = []
        tasks = Tasks(self.events.append)
        around = Surroundings(
            settings=RegistriesSettings(), environ={}, anchors=str, check=lambda: None, pause=lambda _: None
        )
        images = cleanup.enter_context(closing(ImageStore(home, PlainTrees)))
        self.remote = RemoteCaches(
            self.cache,
            self.blobs,
            Intake(images, self.trees, self.blobs, naming=self.cache.naming, tasks=tasks),
            Outgoing(self.trees, self.blobs, PlainTrees()),
            registries=cleanup.enter_context(closing(Registries(around, tasks))),
            tasks=tasks,
        )

    def make(self, *chain: Parts, content: str = "", base: str = BASE) -> list[Entry]:
        made: list[Entry] = []
        for number, parts in enumerate(chain):
            parent = LINKED if parts.linked else made[-1] if made else base
            directory = layer(self.home, f"{content}{number}", content + parts.operation)
            made.append(self.cache.commit(parts.key, directory, parent=parent, text="RUN x", base=base))
        return made

    def export(self, entries: list[Entry], directory: Path) -> None:
        self.remote.export(entries, CacheSpec("local", directory=directory), ())

    def find(self, *chain: Parts, on: str = BASE) -> list[Entry]:
        linked = frozenset(parts.key for parts in chain if parts.linked)
        found = self.cache.find([parts.key for parts in chain], on, linked)
        return self.remote.longer(found, chain, on)

    def fetch(self, entries: list[Entry]) -> bool:
        return self.remote.fetch([(entry.id, BASE) for entry in entries])

    @property
    def said(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    with ExitStack() as cleanup:
        yield lambda name: Machine(tmp_path / name, cleanup)


@pytest.mark.needs("userns")
def test_layers_lie_on_each_other_as_where_they_were_made(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    shared, first = tmp_path / "shared", machine("first")
    made = first.make(A, B, LINK)
    first.export(made, shared)
    second = machine("second")
    second.remote.load([CacheSpec("local", directory=shared)])
    found = second.find(A, B, LINK)
    assert [each.id for each in found] == [each.id for each in made]
    assert not second.find(A, on="sha256:" + "2" * 64)
    assert [second.remote.origin(each.id) for each in found] == [str(shared)] * 3
    assert second.cache.usage() == []  # nothing but records came
    assert second.fetch(found)
    for mine, theirs in zip(second.cache.find([A.key, B.key], BASE), made, strict=False):
        assert (mine.path / "file").read_text() == (theirs.path / "file").read_text()
        assert (mine.text, mine.created, mine.origin) == (theirs.text, theirs.created, str(shared))
    assert second.trees.digests([made[0].id]) == first.trees.digests([made[0].id])
    assert second.trees.changed([made[0].id]) == []

    assert second.cache.prune(max_size=1 << 40) == []
    second.trees.close()
    own = second.make(A, content="own", base="")
    second.trees.close()
    assert {each.id for each in second.cache.prune(imported=True)} == {each.id for each in made}
    assert second.cache.entry(own[0].id)


@pytest.mark.needs("userns")
def test_a_layer_that_could_not_be_kept_as_it_was_goes_to_no_other_machine(
    machine: Callable[[str], Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its id another tree would come, with the owners of an id mapping that lacks some."""
    shared, first = tmp_path / "shared", machine("first")
    made = first.make(A, LINK)
    first.export(made, shared)
    second = machine("second")
    second.remote.load([CacheSpec("local", directory=shared)])
    with monkeypatch.context() as patch:
        patch.setattr(UnpackReport, "notes", lambda _, source: (f"files of {source} belong to root now",))
        assert second.fetch(second.find(A))
    [here] = second.cache.find([A.key], BASE)
    above = second.cache.commit(B.key, layer(second.home, "b", "b"), parent=here, text="RUN b")
    source = second.cache.commit(C.key, layer(second.home, "c", "c"), sources=[here.source], text="COPY c")
    marked = layer(second.home, "m", "m")
    (marked / ALTERED).touch()
    sent = second.cache.commit(C.key, marked)
    assert all(second.cache.entry(each.id).altered for each in (here, above, source, sent))  # type: ignore[union-attr]
    second.export([here, above, source, sent], tmp_path / "again")
    assert "has 1 of 4 steps" in second.said[-1]

    third = machine("third")
    third.remote.load([CacheSpec("local", directory=tmp_path / "again")])
    assert third.find(A, B) == third.find(A)
    assert third.fetch(third.find(A))
    assert third.trees.digests([here.id]) == first.trees.digests([here.id])
    [mine] = third.cache.find([A.key], BASE)
    assert not mine.altered

    fourth = machine("fourth")  # which knows nothing of where it came from
    fourth.remote.load([])
    fourth.cache.commit(
        here.key, layer(fourth.home, "x", "x"), identity=here.id, origin="there", altered=True, base=BASE
    )
    fourth.export([fourth.cache.entry(here.id)], tmp_path / "nothing")  # type: ignore[list-item]
    assert "has 0 of 1 step" in fourth.said[-1]


@pytest.mark.needs("userns")
def test_the_longer_chain_is_found_and_what_contradicts_the_store_is_not(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    shared, first = tmp_path / "shared", machine("first")
    made = first.make(A, B, C)
    directory = layer(first.home, "other", "other")
    other = Parts("", "other", (), "linux/amd64")
    taken = first.cache.commit(other.key, directory, sources=[made[1].source], text="COPY --from")
    first.export([*made, taken], shared)

    second = machine("second")
    [own] = second.make(A, content="own")
    second.remote.load([CacheSpec("local", directory=shared)])
    assert [each.id for each in second.find(A, B)] == [each.id for each in made[:2]]
    assert [each.id for each in second.find(A)] == [own.id]
    assert second.find(other, on="")
    assert second.fetch(second.find(A, B))
    assert [each.id for each in second.cache.find([A.key, B.key], BASE)] == [each.id for each in made[:2]]
    renewed = second.cache.commit(
        B.key, layer(second.home, "renewed", "renewed"), parent=made[0], replace=True, base=BASE
    )
    assert [each.id for each in second.find(A, B, C)] == [made[0].id, renewed.id]
    assert second.find(other, on="") == []
    # From a cache that has more than the store, no result of it is lost.
    third = tmp_path / "third"
    second.export([*second.find(A), *made[1:]], third)
    assert len(json.loads(records_in(third))["records"]) == 3


def records_in(directory: Path) -> bytes:
    [entry] = json.loads((directory / "index.json").read_text())["manifests"]
    manifest = json.loads((directory / "blobs" / str(entry["digest"]).replace(":", "/")).read_text())
    return (directory / "blobs" / str(manifest["config"]["digest"]).replace(":", "/")).read_bytes()


@pytest.mark.needs("userns")
def test_a_record_that_lies_about_its_layer_is_not_used(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    first = machine("first")
    a, b = first.make(A, B)
    blobs, backend = first.blobs, DirectoryBackend(CacheSpec("local", directory=tmp_path / "shared"))
    outgoing = Outgoing(first.trees, blobs, PlainTrees())
    (diff_id, blob), (other, _) = outgoing.of_step(a.id), outgoing.of_step(b.id)
    second = machine("second")
    specs = [CacheSpec("local", directory=tmp_path / "shared")]
    for record, said in (
        (Record(a, diff_id, Descriptor(blob.media_type, blob.digest, blob.size + 1)), "were announced"),
        (Record(a, diff_id, Descriptor(blob.media_type, blob.digest, blob.size - 1)), "is longer than"),
        (Record(a, other, blob), other),
    ):
        backend.write(write_records([record], blobs), blobs, lambda _: blobs.required(blob.digest))
        target = tmp_path / "shared/blobs" / blob.digest.replace(":", "/")
        target.write_bytes(blobs.required(blob.digest).read_bytes())
        second.remote.load(specs)
        assert len(second.find(A)) == 1
        assert not second.fetch(second.find(A))
        assert second.find(A) == []
        assert said in second.said[-1], second.said
        assert second.cache.usage() == []
    # One with the id of another layer that is here is of no use.
    third = machine("third")
    directory = layer(third.home, "same", "same")
    third.cache.commit(C.key, directory, identity=a.id)
    backend.write(write_records([Record(a, diff_id, blob)], blobs), blobs, lambda _: Path())
    third.remote.load(specs)
    assert third.find(A) == []
    with pytest.raises(InputError, match="the store has another layer with the id"):
        third.cache.import_(a, layer(third.home, "again", "again"))


def damage(shared: Path, how: str) -> str:
    """Damage a cache; returns what is said of it."""
    [entry] = json.loads((shared / "index.json").read_text())["manifests"]
    manifest = shared / "blobs" / entry["digest"].replace(":", "/")
    layers = json.loads(manifest.read_text())["layers"]
    layer = shared / "blobs" / layers[-1]["digest"].replace(":", "/")
    match how:
        case "index":
            (shared / "index.json").write_text("{")
            return "the manifest is damaged"
        case "manifest":
            manifest.write_bytes(manifest.read_bytes() + b" ")
            return "expected"
        case "longer":
            layer.write_bytes(layer.read_bytes() + b"x")
            return "is longer than"
        case "shorter":
            layer.write_bytes(layer.read_bytes()[:-1])
            return "were announced"
        case "changed":
            layer.write_bytes(bytes(layer.stat().st_size))
            return "received one with"
        case _:
            layer.unlink()
            return "can't be read"


@pytest.mark.needs("userns")
def test_what_is_damaged_or_gone_is_told_and_what_it_lies_on_is_used(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    first, whole = machine("first"), tmp_path / "whole"
    made = first.make(A, B)
    first.export(made, whole)
    for how in ("index", "manifest", "longer", "shorter", "changed", "gone"):
        shared, second = tmp_path / how, machine(f"with-{how}")
        shutil.copytree(whole, shared)
        words = damage(shared, how)
        second.remote.load([CacheSpec("local", directory=shared)])
        while not second.fetch(second.find(A, B)):
            pass
        assert len(second.find(A, B)) == (0 if how in ("index", "manifest") else 1), how
        [said] = second.said
        assert said.startswith(f"the cache {shared}"), how
        assert words in said, how


def test_of_several_that_write_to_one_tag_one_stays_whole(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    shared, reader = tmp_path / "shared", machine("reader")
    writers = [machine(str(number)) for number in range(3)]
    caches = [(each, each.make(*[A, B, C][: number + 1])) for number, each in enumerate(writers)]
    threads = [
        Thread(target=lambda each=each, made=made: [each.export(made, shared) for _ in range(3)])
        for each, made in caches
    ]
    caches[0][0].export(caches[0][1], shared)
    for thread in threads:
        thread.start()
    backend, writing = DirectoryBackend(CacheSpec("local", directory=shared)), True
    while writing:
        writing = any(thread.is_alive() for thread in threads)
        manifest = backend.read(reader.blobs)
        records = read_records(manifest, reader.blobs.read(manifest.config.digest, 1 << 20), "")
        assert len(records) == len(manifest.layers)
        for record in records:
            backend.fetch(record.blob, reader.blobs)


def test_a_cache_that_can_t_be_written_is_an_error_or_a_warning(
    machine: Callable[[str], Machine], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    first = machine("first")
    spec = CacheSpec("local", directory=tmp_path / "file" / "shared")
    with pytest.raises((InputError, MachineError), match=r"the cache .*file/shared could not be written"):
        first.remote.export([], spec, ())
    first.remote.export([], CacheSpec("local", directory=spec.directory, ignore_error=True), ())
    assert "could not be written" in first.said[-1]
    unknown = Entry("0" * 16 + "-" + "0" * 16, A.key, "", 1, "", 0)
    with pytest.raises(MachineError, match="is not in the store"):
        first.export([unknown], tmp_path / "shared")


LAYER = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", f"sha256:{'2' * 64}", 5)
ENTRY = Entry(
    "0123456789abcdef-0123456789abcdef",
    "a" * 64,
    BASE,
    5,
    "RUN x",
    1.5,
    (("b" * 64, "c" * 16 + "-" + "d" * 16),),
)


def kept(document: object, layers: tuple[Descriptor, ...] = (LAYER,)) -> tuple[Manifest, bytes]:
    data = document if isinstance(document, bytes) else canonical(document)
    return Manifest.made_of(Descriptor(RECORDS, f"sha256:{'3' * 64}", len(data)), layers), data


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path)) as blobs:
        manifest = write_records([Record(ENTRY, f"sha256:{'4' * 64}", LAYER)], blobs)
        assert write_records([Record(ENTRY, f"sha256:{'4' * 64}", LAYER)], blobs) == manifest
        found = cache_manifest(manifest.data, manifest.media_type)
        [record] = read_records(found, blobs.read(found.config.digest, 1 << 20), "there")
        assert record.entry == Entry(**{**vars(ENTRY), "origin": "there"})
        assert (record.diff_id, record.blob) == (f"sha256:{'4' * 64}", LAYER)
        with pytest.raises(InputError, match="1025 steps"):
            write_records([record] * 1025, blobs)
        document = json.loads(blobs.read(found.config.digest, 1 << 20))
        assert len(read_records(*kept({"records": document["records"] * 1024}), "there")) == 1024
        with pytest.raises(InputError, match="a list of at most 1024"):
            read_records(*kept({"records": document["records"] * 1025}), "there")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../x"},
        {"id": 1},
        {"key": "A" * 64},
        {"parent": "a/b"},
        {"parent": "a" * 9000},
        {"text": "a\0"},
        {"text": "x" * 301},
        {"text": None},
        {"created": "soon"},
        {"created": -1},
        {"created": 1e300},
        {"created": 10**400},
        {"diff_id": "sha512:1"},
        {"blob": f"sha256:{'5' * 64}"},
        {"blob": []},
        {"sources": [["a", "b"]]},
        {"sources": [["b" * 64, "c" * 16 + "-" + "d" * 16]] * 257},
        {"sources": None},
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    good = {
        "id": ENTRY.id,
        "key": ENTRY.key,
        "parent": "",
        "sources": [],
        "text": "RUN x",
        "created": 1,
        "diff_id": f"sha256:{'4' * 64}",
        "blob": LAYER.digest,
    }
    assert read_records(*kept({"records": [good]}), "there")
    with pytest.raises(InputError, match="a record of it is damaged"):
        read_records(*kept({"records": [{**good, **change}]}), "there")


@pytest.mark.parametrize(
    "document", [b"{", b"[" * 100_000, [], {}, {"records": {}}, {"records": [0] * 1025}, {"records": [1]}]
)
def test_what_is_not_a_list_of_records_is_refused(document: object) -> None:
    with pytest.raises(InputError, match="damaged"):
        read_records(*kept(document), "there")


def test_an_image_is_not_a_cache_nor_what_is_too_long() -> None:
    image = Manifest.made_of(Descriptor("application/vnd.oci.image.config.v1+json", BASE, 1), ())
    with pytest.raises(InputError, match="is not a cache but an artifact of the type"):
        cache_manifest(image.data, image.media_type)
    long = Manifest.made_of(Descriptor(RECORDS, BASE, 1 << 30), ())
    with pytest.raises(InputError, match="its records have"):
        cache_manifest(long.data, long.media_type)
    index = canonical({"schemaVersion": 2, "manifests": []})
    with pytest.raises(InputError, match="an index of images"):
        cache_manifest(index, "")


@pytest.mark.parametrize(
    ("text", "export", "expected"),
    [
        ("registry.example/app:cache", False, "registry registry.example/app:cache min False"),
        ("type=registry,ref=r.example/a", False, "registry r.example/a:latest min False"),
        ("type=registry,ref=r.example/a:1,mode=max", True, "registry r.example/a:1 max False"),
        ('type=local,"dest=/a,b",ignore-error=true', True, "local /a,b min True"),
        ("type=local,dest=/a,compression=gzip,image-manifest=true", True, "local /a min False"),
    ],
)
def test_caches_are_named_as_buildx_names_them(text: str, export: bool, expected: str) -> None:
    spec = parse_cache(text, export=export)
    assert f"{spec.type} {spec} {spec.mode} {spec.ignore_error}" == expected


@pytest.mark.parametrize(
    ("text", "export", "said"),
    [
        ("", False, "expected type=registry or type=local"),
        ("type=s3,bucket=x", True, "found type=s3"),
        ("type=local,src=/a,digest=1", False, "expected a digest such as sha256:…"),
        ("type=registry", True, "expected ref="),
        ("type=registry,ref=A B", True, "expected the name of a cache"),
        (f"type=registry,ref=a@{BASE}", True, "can't be written to a digest"),
        ("type=registry,ref=a,mode=max", False, "there is no 'mode'"),
        ("type=local,dest=/a,compression=zstd", True, "expected compression=gzip"),
        ("type=local,dest", True, "expected NAME=VALUE"),
        ('"type=local', True, "can't be read"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(text: str, export: bool, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cache(text, export=export)
    assert said in caught.value.message


def test_caches_in_one_directory_have_tags(tmp_path: Path) -> None:
    with closing(BlobStore(tmp_path / "store")) as blobs:
        (tmp_path / "store").mkdir()
        for tag in ("one", "two", "one"):
            backend = DirectoryBackend(
                parse_cache(f"type=local,dest={tmp_path / 'd'},tag={tag}", export=True)
            )
            backend.write(write_records([], blobs), blobs, lambda _: Path())
        index = tmp_path / "d/index.json"
        assert len(json.loads(index.read_text())["manifests"]) == 2
        assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
            "blobs",
            "index.json",
            "oci-layout",
        ]
        with pytest.raises(InputError, match="there is no cache latest") as caught:
            DirectoryBackend(CacheSpec("local", directory=tmp_path / "d")).read(blobs)
        assert caught.value.hint == "tags there are one, two"
        index.write_bytes(b" " * (5 << 20))
        with pytest.raises(InputError, match="is larger than"):
            DirectoryBackend(CacheSpec("local", directory=tmp_path / "d")).read(blobs)


@pytest.mark.parametrize("data", [b"{", b"[" * 100_000], ids=["cut off", "deep"])
def test_records_that_can_not_be_read_are_damaged(data: bytes) -> None:
    manifest = Manifest.made_of(Descriptor(RECORDS, digest_of(data), len(data)), [])
    with pytest.raises(InputError, match="its list of records is damaged: it is not JSON, or nested"):
        read_records(manifest, data, "there")

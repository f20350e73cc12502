"""Caches of several machines: what one store has built, another one finds in a registry or directory."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli, Done
from firebuild_bootstrap.home import Home
from registry.servers import CA, PASSWORD, USER, Handler, always, debian_registry, small_registry

pytestmark = [pytest.mark.long, pytest.mark.needs("userns"), pytest.mark.xdist_group("remote-cache")]

STAGES = """\
FROM base AS tools
RUN echo tools > /tools

FROM base AS build
COPY --chown=3:4 src /src
RUN --mount=type=cache,target=/kept --mount=type=secret,id=s cat /run/secrets/s > /kept/s; cp -a /src/a /made

FROM base
COPY --from=build --chown=5:6 /made /made
COPY --link --from=tools /tools /tools
RUN cat /made /tools > /all
CMD ["/bin/sh"]
"""
PLAIN = """\
FROM scratch AS build
COPY one /
COPY two /

FROM scratch
COPY --from=build / /
COPY three /
"""
SECRET = "not-for-others"


@dataclass(frozen=True)
class Machines:
    """Several machines: each has a store of its own, and a directory of its own with the same files."""

    cli: Cli
    root: Path

    def use(self, name: str, dockerfile: str = PLAIN, **files: str) -> Path:
        """Go on as another machine, which has the base."""
        home = self.root / name
        self.cli.setenv("FIREBUILD_HOME", home / "store")
        context = home / f"work-of-{name}"
        (context / "src").mkdir(parents=True, exist_ok=True)
        sources = {"one": "1", "two": "2", "three": "3", "src/a": "a", "Dockerfile": dockerfile, **files}
        for path, text in sources.items():
            (context / path).write_text(text)
        return context

    def build(self, context: Path, *options: str, tag: str = "t/app:1", status: int = 0) -> Built:
        return Built(
            self.cli("build", "--progress", "rawjson", "-t", tag, *options, context, status=status),
            self.cli("images", "inspect", tag).out if not status else "",
        )

    def local(self, name: str = "shared") -> Path:
        return self.root / name


@dataclass(frozen=True)
class Built:
    done: Done
    inspected: str

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.done.out.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def executed(self) -> list[str]:
        """The instructions that were executed, but for FROM."""
        found = [event["instruction"] for event in self.of("step-started")]
        return [text for text in found if not text.startswith("FROM")]

    @property
    def cached(self) -> dict[str, str]:
        """The instructions that were not, and the remote caches that they came from."""
        return {event["instruction"]: event["origin"] for event in self.of("step-cached")}

    @property
    def fetched(self) -> int:
        return sum(event["name"].startswith("fetching a layer") for event in self.of("task-started"))

    @property
    def said(self) -> list[str]:
        return [event["message"] for event in self.of("notice") if event["level"] == "warning"]

    @property
    def id(self) -> str:
        return str(json.loads(self.inspected)["id"])


@pytest.fixture
def machines(cli: Cli, tmp_path: Path) -> Machines:
    return Machines(cli, tmp_path)


def with_base(machines: Machines, host_home: Path) -> None:
    base = Home(host_home).bases.resolve("host")
    machines.cli("base", "import", "base", base.archive)


def contents(directory: Path) -> Iterator[bytes]:
    """Everything that is written below a directory, decompressed where it is compressed."""
    for path in directory.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


# --- a registry -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CA:
    return CA.made(tmp_path_factory.mktemp("ca"))


def configured(cli: Cli, path: Path, host: str, ca: CA, **more: Any) -> None:
    login = {"username": USER, "password": {"env": "REGISTRY_PASSWORD"}, "ca_file": str(ca.certificate)}
    settings = {"registries": {"hosts": {host: login}, "attempts": 1}, **more}
    path.write_text(json.dumps(settings))
    cli.setenv("FIREBUILD_CONFIG", path)
    cli.setenv("REGISTRY_PASSWORD", PASSWORD)


@pytest.mark.needs("docker-registry")
@pytest.mark.needs("ids")
def test_a_second_machine_builds_nothing_that_the_first_one_built(
    machines: Machines, host_home: Path, ca: CA, tmp_path: Path
) -> None:
    cli, data = machines.cli, tmp_path / "registry"
    data.mkdir()
    (tmp_path / "secret").write_text(SECRET)
    with debian_registry(data, ca) as host:
        tag, ref = f"{host}/team/app:1", f"{host}/team/cache:main"
        configured(cli, tmp_path / "first.yml", host, ca)
        first = machines.use("first", STAGES)
        with_base(machines, host_home)
        secret = ("--secret", f"id=s,src={tmp_path / 'secret'}")
        to = f"type=registry,ref={ref},mode=max"
        built = machines.build(first, *secret, "--cache-to", to, "--push", tag=tag)
        assert len(built.executed) == 6
        assert not [each for each in contents(data) if SECRET.encode() in each]
        # The layers of the image are taken from the cache, which has all but that of the base.
        pushed = [event for event in built.of("task-started") if f"pushing {tag}, blob" in event["name"]]
        assert len(pushed) == len(("the configuration", "the base"))

        # No authority can be opened here, and only one id exists.
        settings = {"import_from": [f"type=registry,ref={ref}"], "export_to": [to]}
        configured(cli, tmp_path / "second.yml", host, ca, cache=settings)
        cli.setenv("FIREBUILD_CA__PROVIDER", "file")
        cli.setenv("FIREBUILD_MACHINE__IDS", "single")
        second = machines.use("second", STAGES)
        with_base(machines, host_home)
        again = machines.build(second, "--push", tag=tag)
        assert (again.executed, set(again.cached.values()), len(again.cached)) == ([], {ref}, 6)
        assert again.fetched == 3  # nothing needs the layers of the other stages
        assert again.id == built.id
        pushed = [event["name"] for event in again.of("task-started") if "blob" in event["name"]]
        assert len(pushed) <= 1  # the configuration, if the time of the image is in it
        assert not [name for name in pushed if ref in name]
        usage = json.loads(cli("cache", "du", "--json").out)["entries"]
        assert [entry["origin"] for entry in usage if entry["kind"] == "step"] == [ref] * 3
        assert cli("cache", "du").out.count(f"  {ref}\n") == len(usage)
        assert cli("cache", "prune", "--imported", "--dry-run").out == ""  # an image needs them

        for name in ("FIREBUILD_MACHINE__IDS", "FIREBUILD_CA__PROVIDER"):
            cli.monkeypatch.delenv(name)
        configured(cli, tmp_path / "third.yml", host, ca, cache={"import_from": [ref]})
        (second / "src/a").write_text("b")
        changed = machines.build(second, *secret)
        steps = ["COPY --chown", "RUN --mount", "COPY --from=build", "RUN cat"]
        assert [text[: len(step)] for text, step in zip(changed.executed, steps, strict=True)] == steps
        assert changed.fetched == 0  # the blob of the link's layer is here


@pytest.mark.needs("ids")
def test_what_fails_is_told_and_the_build_goes_on_or_has_its_image_at_least(
    machines: Machines, ca: CA, tmp_path: Path
) -> None:
    cli = machines.cli
    with small_registry(ca.server_context()) as small:
        ref = f"{small.host}/cache:1"
        configured(cli, tmp_path / "first.yml", small.host, ca)
        context = machines.use("first")
        none = machines.build(context, "--cache-from", ref)
        [said] = none.said
        assert said.startswith(f"the cache {ref} is not used: {small.host}: the manifest of cache:1")
        small.behaviours.append(always("/uploads/", lambda handler: handler.answer(403)))
        failed = machines.build(context, "--cache-to", ref, status=2)
        assert f"error: the cache {ref} could not be written" in failed.done.first
        assert failed.of("image-stored")
        small.behaviours.append(always("/manifests/", lambda handler: handler.answer(500)))
        ignored = machines.build(context, "--cache-to", f"type=registry,ref={ref},ignore-error=true")
        assert ignored.said[0].startswith(f"the cache {ref} could not be written")
        small.behaviours.clear()
        machines.build(context, "--cache-to", f"type=registry,ref={ref},mode=max")

        (tmp_path / "odd").mkdir()
        (tmp_path / "odd/blobs").touch()
        odd = machines.build(context, "--cache-to", f"type=local,dest={tmp_path}/odd", status=2)
        assert f"{tmp_path}/odd/blobs/sha256 can't be written: Not a directory" in odd.done.first
        assert "or name another directory: dest=DIR" in odd.done.err
        assert odd.of("image-stored")
        nowhere = machines.build(context, "--cache-to", "type=local,dest=/proc/none", status=2)
        assert nowhere.done.first.startswith("error: --cache-to: /proc can't be written")
        assert not nowhere.of("image-stored")
        machines.build(context, "--cache-to", "type=local,dest=/proc/none,ignore-error=true")

        # It answers until the layers are wanted: one failure is enough to do without it.
        small.behaviours.append(always("/blobs/", unavailable))
        machines.use("second")
        built = machines.build(context, "--cache-from", ref)
        assert len(built.executed) == 4
        assert [said for said in built.said if "503" in said] == built.said
        assert len(built.said) == 1


def unavailable(handler: Handler) -> None:
    if b"records" in handler.server.blobs.get(handler.path.rpartition("/")[2], b"")[:20]:
        handler.serve()
    else:
        handler.answer(503)


# --- directories ----------------------------------------------------------------------------------


def test_min_has_the_steps_of_the_result_and_max_those_of_every_stage(machines: Machines) -> None:
    least, most = machines.local("least"), machines.local("most")
    context = machines.use("first")
    first = machines.build(context, "--cache-to", f"type=local,dest={least}")
    machines.build(context, "--cache-to", f"type=local,dest={most},mode=max")
    context = machines.use("second")
    source = f"type=local,src={least}"
    again = machines.build(context, "--cache-from", source)
    assert (again.executed, again.id) == ([], first.id)
    context = machines.use("third", two="new")
    steps = ["COPY one /", "COPY two /", "COPY --from=build / /", "COPY three /"]
    assert machines.build(context, "--cache-from", source).executed == steps
    source = f"type=local,src={most}"
    context = machines.use("fourth", two="new")
    assert machines.build(context, "--cache-from", source).executed == steps[1:]
    context = machines.use("fifth", three="new")
    top = machines.build(context, "--cache-from", source, "--explain-cache")
    assert top.executed == steps[3:]
    assert f"not cached, nor in {most}: COPY three /: never built before" in top.done.out


def test_what_comes_from_one_cache_goes_to_another_though_it_was_never_here(machines: Machines) -> None:
    one, two = machines.local("one"), machines.local("two")
    context = machines.use("first")
    machines.build(context, "--cache-to", f"type=local,dest={one},mode=max")
    context = machines.use("second")
    to = f"type=local,dest={two},mode=max,tag=main"
    machines.build(context, "--cache-from", f"type=local,src={one}", "--cache-to", to)
    [found] = json.loads((two / "index.json").read_text())["manifests"]
    [same] = json.loads((one / "index.json").read_text())["manifests"]
    assert found["digest"] == same["digest"]
    shutil.rmtree(one)
    context = machines.use("third", two="new")
    names = (f"type=local,src={two},tag=main", f"type=local,src={two},digest={found['digest']}")
    assert machines.build(context, "--cache-from", names[0]).executed[0] == "COPY two /"
    context = machines.use("fourth")
    assert machines.build(context, "--cache-from", names[1]).executed == []
    # What is here needs no other cache, and no one is asked.
    assert machines.build(context, "--cache-from", f"type=local,src={one}").said == []


@pytest.mark.needs("ids")
def test_a_layer_that_is_gone_is_made_again(machines: Machines) -> None:
    shared = machines.local()
    context = machines.use("first")
    machines.build(context, "--cache-to", f"type=local,dest={shared}")
    [entry] = json.loads((shared / "index.json").read_text())["manifests"]
    manifest = json.loads((shared / "blobs" / entry["digest"].replace(":", "/")).read_text())
    (shared / "blobs" / manifest["layers"][-1]["digest"].replace(":", "/")).unlink()
    context = machines.use("second")
    built = machines.build(context, "--cache-from", f"type=local,src={shared}")
    [said] = built.said
    assert said.startswith(f"the cache {shared}: COPY three /: its layer is not used: ")
    assert built.executed == ["COPY three /"]  # the layer that it lies on is used


def test_a_base_that_was_built_here_has_the_same_key_where_it_was_pulled(machines: Machines) -> None:
    shared, image = machines.local(), machines.local("image.tar")
    dockerfile = "FROM own:1\nCOPY three /other\n"
    context = machines.use("first", "FROM scratch\nCOPY one /\nCOPY two /\n")
    machines.build(context, "-o", f"type=oci,dest={image}", tag="own:1")
    (context / "Dockerfile").write_text(dockerfile)
    machines.build(context, "--cache-to", f"type=local,dest={shared}")
    context = machines.use("second", dockerfile)
    machines.cli("load", image)
    again = machines.build(context, "--cache-from", f"type=local,src={shared}")
    assert again.executed == []
    context = machines.use("third", "FROM scratch\nLABEL a=b\n")
    before = (shared / "index.json").read_bytes()
    none = machines.build(context, "--cache-to", f"type=local,dest={shared}")
    assert "no step is written to the cache" in none.done.out
    assert (shared / "index.json").read_bytes() == before


def test_caches_are_named_as_in_buildx(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    for option, value, said in (
        ("--cache-to", "type=gha", "expected type=registry or type=local, found type=gha"),
        ("--cache-to", "type=local,dest=x,mode=most", "expected mode=min or max, found 'most'"),
        ("--cache-to", "type=local,src=x", "expected dest= in 'type=local,src=x'"),
        ("--cache-from", "./x", "expected the name of a cache in a registry, found the path './x'"),
        ("--cache-from", "type=local,src=x,mode=max", "there is no 'mode' for a cache of type=local"),
    ):
        done = cli("build", option, value, ".", status=2)
        assert done.first == f"error: {option}: {said}"
    cli.setenv("FIREBUILD_CACHE__EXPORT_TO", "[type=local]")
    assert "cache.export_to" in cli("build", ".", status=2).err

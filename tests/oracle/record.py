#!/usr/bin/env python3
"""Record what BuildKit makes of the cases, in recorded/*.json.

    tests/oracle/buildkit/build && .venv/bin/python tests/oracle/record.py [--buildah] [NAME ...]

Needs root, busybox-static and runc; no network: it makes a namespace of its own that has loopback only. With
NAMEs, of cases or areas, only these are recorded again. With --buildah, buildah's opinion is recorded, too,
where it is another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle.corpus import HERE, Case, bases, cases, recorded
from oracle.daemon import BuildKit, Order, RefusedError, version
from oracle.tree import merged, plain_config, without_base

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # which buildah leaves out
_INSIDE = "FIREBUILD_RECORDING"


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--buildah", action="store_true", help="ask buildah as well")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases or areas; by default all")
    arguments = parser.parse_args()
    if _INSIDE not in os.environ:
        command = ["unshare", "--net", "--mount", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        command += [sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})
    with tempfile.TemporaryDirectory(prefix="oracle-") as directory:
        _record(Path(directory), arguments.names, ask_buildah=arguments.buildah)


def _record(directory: Path, names: Sequence[str], *, ask_buildah: bool) -> None:
    records = recorded()
    images = {name: (directory / "images" / name) for name in bases()}
    layouts = {name: (path, bases()[name].layout(path)) for name, path in images.items()}
    (directory / "daemon").mkdir()
    with BuildKit(directory / "daemon") as buildkit:
        for case in cases():
            if not names or case.name in names or case.area in names:
                record = outcome(case, directory / case.name, Ask(buildkit, layouts))
                records[case.name] = _with_remark(record, records.get(case.name, {}))
                print(case.area, case.name, record.get("refused", ""), flush=True)
    if ask_buildah:
        with Buildah(directory / "buildah") as buildah:
            for case in cases():
                if not names or case.name in names or case.area in names:
                    record = records[case.name]
                    record.pop("buildah", None)
                    if remark := buildah.remark(case, directory / f"{case.name}.buildah", record):
                        record["buildah"] = remark
                    print("buildah:", case.name, remark, flush=True)
    _write(records)


def _with_remark(record: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    return record | {name: old[name] for name in ("buildah",) if name in old}


def _write(records: Mapping[str, Any]) -> None:
    areas: dict[str, dict[str, Any]] = {}
    for case in cases():
        areas.setdefault(case.area, {})[case.name] = records[case.name]
    (HERE / "recorded").mkdir(exist_ok=True)
    for old in (HERE / "recorded").glob("*.json"):
        old.unlink()
    for area, members in areas.items():
        (HERE / "recorded" / f"{area}.json").write_text(_lines(members, depth=3) + "\n")
    (HERE / "recorded/VERSION").write_text(f"BuildKit {version()}\n")


def _lines(value: Any, depth: int) -> str:
    """Return JSON with a line for each case, file and member of the configuration."""
    if not isinstance(value, dict) or not value or depth == 0:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    members = (f"{json.dumps(name)}: {_lines(member, depth - 1)}" for name, member in sorted(value.items()))
    return "{\n" + ",\n".join(members) + "\n}"


class Ask:
    """BuildKit with the bases."""

    def __init__(self, buildkit: BuildKit, layouts: Mapping[str, tuple[Path, str]]) -> None:
        self._buildkit = buildkit
        self._layouts = layouts

    def build(self, case: Case, directory: Path, args: Mapping[str, str], archive: Path) -> None:
        """Build a case whose context has been laid into an archive of an OCI layout."""
        self._buildkit.build(
            Order(
                context=directory / "context",
                args=args,
                target=case.target,
                platform=case.platform,
                secrets={name: directory / "secrets" / name for name in case.secrets},
                contexts={name: directory / "contexts" / name for name in case.contexts},
                images=self._named_in(case.dockerfile),
                output=f"type=oci,dest={archive},compression=uncompressed",
            )
        )

    def _named_in(self, dockerfile: str) -> dict[str, tuple[Path, str]]:
        """Return the bases that a Dockerfile may mean; none may hide a stage of its name."""
        return {name: layout for name, layout in self._layouts.items() if f" AS {name}\n" not in dockerfile}


def outcome(case: Case, directory: Path, ask: Ask) -> dict[str, Any]:
    """Return the configuration and the files that BuildKit makes of a case, or why it refuses it."""
    case.lay(directory)
    archive = directory / "image.tar"
    try:
        with case.serving(directory) as args:
            ask.build(case, directory, args, archive)
    except RefusedError as error:
        return {"refused": _without(str(error), directory)}
    with tarfile.open(archive) as tar:
        return _image(case, tar)


def _without(message: str, directory: Path) -> str:
    """Return a message without what changes from run to run, or with the machine."""
    message = message.replace(str(directory), "DIRECTORY").partition(": failed to resolve source metadata")[0]
    message = re.sub(r"\S*/cachemounts/buildkit\d+", "", message)
    return re.sub(r" of ref \S+:", ":", message)[:300]


def _image(case: Case, tar: tarfile.TarFile) -> dict[str, Any]:
    """Describe the only image of an OCI layout in an archive."""

    def blob(digest: str) -> Any:
        return tar.extractfile(f"blobs/{digest.replace(':', '/')}")

    manifest = json.load(blob(json.load(_file(tar, "index.json"))["manifests"][0]["digest"]))
    config = json.load(blob(manifest["config"]["digest"]))
    with ExitStack() as opened:
        layers = [
            opened.enter_context(tarfile.open(fileobj=blob(each["digest"])))
            for each in manifest["layers"] or ()
        ]
        tree = merged(layers, times=case.times)
    return {"config": plain_config(config), "tree": without_base(tree, times=case.times)}


def _file(tar: tarfile.TarFile, name: str) -> Any:
    return tar.extractfile(next(each for each in tar if each.name.removeprefix("./") == name))


# --- the second opinion --------------------------------------------------------------------------


class Buildah:
    """buildah with a store of its own that holds the bases."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._storage = ["--storage-driver", "vfs", "--root", str(directory / "root")]
        self._storage += ["--runroot", str(directory / "run")]

    def __enter__(self) -> Buildah:
        for name, base in bases().items():
            path = self._directory / "layouts" / name
            base.layout(path)
            self._run("pull", f"oci:{path}")
            self._run("tag", self._run("images", "-q", "--no-trunc").split()[0], f"localhost/{name}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["buildah", *self._storage, "rm", "--all"], check=False, capture_output=True)
        subprocess.run(
            ["buildah", *self._storage, "rmi", "--all", "--force"], check=False, capture_output=True
        )

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            ["buildah", *self._storage, *arguments], check=False, capture_output=True, text=True
        )
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise RefusedError(lines[-1] if lines else f"status {done.returncode}")
        return done.stdout

    def remark(self, case: Case, directory: Path, record: Mapping[str, Any]) -> Any:
        """Return what buildah makes of a case where it is something else; None where it is the same."""
        case.lay(directory)
        words = ["bud", "--isolation", "chroot", "--quiet", "--layers=false", "--pull-never", "--tag", "out"]
        words += ["--target", case.target] if case.target else []
        words += (f"--secret=id={name},src={directory / 'secrets' / name}" for name in case.secrets)
        words += (f"--build-context={name}={directory / 'contexts' / name}" for name in case.contexts)
        try:
            with case.serving(directory) as args:
                words += (f"--build-arg={name}={value}" for name, value in args.items())
                self._run(*words, str(directory / "context"))
            self._run("push", "--quiet", "out", f"oci-archive:{directory / 'image.tar'}")
        except RefusedError as error:
            return None if "refused" in record else f"refused: {_without(str(error), directory)}"
        if "refused" in record:
            return "accepted"
        with _unpacked(directory / "image.tar") as tar:
            return _difference(_image(case, tar), record)


@contextmanager
def _unpacked(path: Path) -> Iterator[tarfile.TarFile]:
    with tarfile.open(path) as tar:
        yield tar


def _difference(theirs: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what differs, without what buildah leaves in every image."""
    found = {}
    for part in ("config", "tree"):
        for name in sorted({*theirs[part], *record[part]}):
            told = theirs[part].get(name, "not there")
            if isinstance(told, dict):
                told.pop("io.buildah.version", None)
            if told != record[part].get(name, "not there") and name not in (
                "etc/hostname",
                "Labels" * (not told),
            ):
                found[name] = told
    if record["config"].get("Env") == [f"PATH={_PATH}"] and found.get("Env") == "not there":
        del found["Env"]
    return found or None


if __name__ == "__main__":
    main()

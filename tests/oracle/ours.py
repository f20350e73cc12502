"""What firebuild makes of the cases: the only module here that knows how it is called."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.build import build_image
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.graph import ContextRef
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import OutputSpec, OutputType
from firebuild_bootstrap.request import BuildRequest, Secret
from firebuild_bootstrap.settings import BuildSettings
from oracle.corpus import Case, bases
from oracle.tree import Tree, merged, plain_config


class _Bases:
    def resolve(self, reference: str) -> ImageConfig:
        if reference not in bases():
            raise InputError(f"there is no image {reference}")
        return bases()[reference].config


def plan(case: Case, directory: Path, args: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration of the image of a case that has been laid into a directory; builds nothing.

    Raises:
        InputError: the Dockerfile is refused.
    """
    graph = read_graph(
        DockerfileSource.read(directory / "context/Dockerfile"),
        images=_Bases(),
        build_args=args,
        target=case.target or None,
        platform="linux/amd64",
        contexts={name: ContextRef(name) for name in case.contexts},
    )
    members = graph.target.config.as_json()
    return plain_config({"config": members, "author": members.pop("author", None)})


def home(directory: Path) -> Home:
    """Return a store that holds the bases."""
    store = Home(directory / "home")
    for base in bases().values():
        archive = directory / f"{base.name}.tar"
        archive.write_bytes(base.archive)
        store.bases.import_base(base.name, archive, base.config)
    return store


# Images that the store keeps: after each build it looks at all that it has.
_KEPT: Final = int(__import__("os").environ.get("KEPT", "12"))


def _forget_some(store: Home) -> None:
    """Remove the images of cases, and the layers that only they need, where there are many."""
    made = [name for name in store.images.names() if str(name).startswith("cases/")]
    if len(made) > _KEPT:
        for name in made:
            store.images.remove(name)
        store.cache.prune(everything=True)


def build(case: Case, directory: Path, args: Mapping[str, str], store: Home, *, cached: bool = False) -> Tree:
    """Build a case that has been laid into a directory, and return the image's files.

    Raises:
        FirebuildError: it is refused, or fails.
    """
    if not cached:
        _forget_some(store)
    request = BuildRequest(
        dockerfile=directory / "context/Dockerfile",
        context=directory / "context",
        tag=Reference.parse(f"cases/{case.name[:80].strip('-')}:1"),
        build_args=args,
        build_contexts={name: directory / "contexts" / name for name in case.contexts},
        secrets={name: Secret(value.encode()) for name, value in case.secrets.items()},
        target=case.target or None,
        outputs=(OutputSpec(OutputType.TAR),),
        no_cache=not cached,  # another case may be the same but for the times of its files
    )
    image = build_image(request, BuildSettings(), store)
    assert image is not None
    archive = image.output(OutputType.TAR)
    assert archive is not None
    with tarfile.open(archive) as tar:
        return merged([tar], times=case.times)

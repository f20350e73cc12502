"""What a build takes in from outside, as parts of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.context.digests import FileSetDigest, StatIndex, digest_of
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    ContextRef,
    Copy,
    Download,
    Files,
    GitTree,
    Operation,
    Run,
    TreeRef,
)
from firebuild_bootstrap.image.bases import Base
from firebuild_bootstrap.lowering import Sent, literal
from firebuild_bootstrap.solve.keys import Input, Parts, inputs_of


class Inputs:
    """Reads what comes from outside; an `InputReader`.

    Args:
        bases: the images that the Dockerfile names, by their references.
        contexts: the build contexts by name.
        sent: what was fetched for COPY and ADD.
        directory: where digests of files are kept between builds.
    """

    def __init__(
        self,
        bases: Mapping[str, Base],
        contexts: Mapping[str, BuildContext],
        sent: Sent,
        directory: Path,
    ) -> None:
        self._bases = bases
        self._contexts = contexts
        self._fetched = {group.source: group for resource in sent.values() for group in resource.groups}
        self._indexes = {name: StatIndex(directory, context.root) for name, context in contexts.items()}
        self._nothing = StatIndex(None, Path("/"))

    def save(self) -> None:
        """Keep what was learnt about files for later builds."""
        for index in self._indexes.values():
            index.save()

    def image(self, reference: str, platform: str) -> str:  # noqa: ARG002 - all are of this host's
        """Return the digest of an image."""
        return self._bases[reference].digest

    def files(self, files: Files, copy: Copy) -> Input:
        """Return what a source of a COPY matches in a build context."""
        found = self._digest(files.tree, files, copy)
        return Input(found.sha256, name=files.pattern, files=found.files)

    def bound(self, mount: BindMount) -> Input:
        """Return what a RUN sees of a build context."""
        found = self._digest(mount.tree, Files(literal(mount.source), mount.tree))
        return Input(found.sha256, name=mount.source, files=found.files)

    def download(self, download: Download) -> str:
        """Return the digest of what was downloaded."""
        return digest_of(self._fetched[download].entries(), self._nothing).sha256

    def commit(self, tree: GitTree) -> str:
        """Return the digest of what was fetched: with its files it is as good as the commit's."""
        return digest_of(self._fetched[tree].entries(), self._nothing).sha256

    def unchanged(self, operation: Operation, parts: Parts) -> bool:
        """Tell whether the files that an operation took are still those that its key was made of."""
        match operation:
            case Copy(sources=sources):
                taken = [each for each in sources if isinstance(each, Files)]
                now = {self.files(each, operation).digest for each in taken if _of_context(each)}
            case Run():
                bound = [each for each in inputs_of(operation) if isinstance(each, BindMount)]
                now = {self.bound(each).digest for each in bound if _of_context(each)}
            case _:
                return True
        return now <= {each.digest for each in parts.inputs}

    def _digest(self, tree: TreeRef, files: Files, copy: Copy | None = None) -> FileSetDigest:
        name = tree.name if isinstance(tree, ContextRef) else ""
        resource = self._contexts[name].resource(
            (files,),
            exclude=copy.exclude if copy is not None else (),
            parents=copy.parents if copy is not None else False,
            check=False,
        )
        return digest_of(resource.entries(), self._indexes[name])


def takes_files(operation: Operation) -> bool:
    """Whether an operation takes files of a build context, which may change while it is executed."""
    match operation:
        case Copy(sources=sources):
            return any(isinstance(each, Files) and _of_context(each) for each in sources)
        case Run():
            return any(isinstance(each, BindMount) and _of_context(each) for each in inputs_of(operation))
    return False


def _of_context(taken: Files | BindMount) -> bool:
    return isinstance(taken.tree, ContextRef)

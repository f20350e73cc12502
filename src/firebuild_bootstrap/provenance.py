"""The provenance of a build: the predicate of SLSA's provenance (slsa.dev/spec/v1.0/provenance).

It tells of all that went in, by its digest, and of what was asked for. A secret is in none of it: secrets and
SSH agents are told by their ids, a URL without user name, password and query, and where the value of a secret
stands in what else a user gave, such as a build argument, its id stands there instead.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from firebuild_bootstrap import __version__
from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    ContextRef,
    Copy,
    Download,
    Files,
    GitTree,
    ImageRef,
    Network,
    Run,
    Stage,
)
from firebuild_bootstrap.dockerfile.operations import redacted
from firebuild_bootstrap.image.attestations import package_url
from firebuild_bootstrap.image.layertrees import ArchiveLayer
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.platforms import host_platform
from firebuild_bootstrap.solve.keys import inputs_of
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.image.bases import Base
    from firebuild_bootstrap.request import BuildContextSource, BuildRequest, Secret
    from firebuild_bootstrap.resolving import Resolved
    from firebuild_bootstrap.solve.keys import Parts

BUILD_TYPE: Final = "urn:firebuild:build:dockerfile:v1"
"""What the parameters of a build mean: docs/provenance.md."""
BUILDER: Final = "urn:firebuild:builder"
FILES_DIGEST: Final = "firebuildFiles"
"""How the digest of what was used of a build context is made: SHA-256 over the digests of its sources."""
LAYERS_DIGEST: Final = "firebuildLayers"
"""The same of an image that was built here and has not gone out: SHA-256 of the names of its layers."""
_URL: Final = re.compile(r"://[^\s\"'<>]*")
_SHORTEST: Final = 4  # bytes; what is shorter stands in any text


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a build went.

    Args:
        build_id: names it.
        started: when.
        machine: name of the driver.
        ca_provider: name of the CA provider.
        issuer_fingerprint: SHA-256 of the certificate that issued its certificates, as hexadecimal digits;
            empty where none were issued, because everything was cached.
        executed: the steps that were, by the index of their stage and their place in it.
        parts: returns what the keys of a stage's steps are made of.
    """

    build_id: str
    started: datetime
    machine: str
    ca_provider: str
    issuer_fingerprint: str
    executed: Collection[tuple[int, int]]
    parts: Callable[[Stage], Sequence[Parts]]


def predicate(request: BuildRequest, resolved: Resolved, course: Course) -> dict[str, Any]:
    """Return the provenance of a build that has just ended."""
    shown = _Shown(request.secrets)
    runs = (step.operation for stage in resolved.graph.stages for step in stage.steps)
    reaches_out = any(isinstance(run, Run) and run.network is not Network.NONE for run in runs)
    steps = list(_steps(resolved, course.executed, shown))
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": _parameters(request, resolved, shown),
            "internalParameters": {"machine": course.machine, "builderPlatform": host_platform()},
            "resolvedDependencies": _dependencies(request, resolved, course, shown),
        },
        "runDetails": {
            "builder": {
                "id": request.attestations.builder_id or BUILDER,
                "version": {"firebuild": __version__, "python": platform.python_version()},
            },
            "metadata": {
                "invocationId": course.build_id,
                "startedOn": _time(course.started),
                "finishedOn": _time(datetime.now(UTC)),
                "firebuild_ca": _authority(course),
                "firebuild_cache": {
                    "steps": steps,
                    "executed": sum(not step["cached"] for step in steps),
                    "cached": sum(step["cached"] for step in steps),
                },
                # What a RUN fetched by itself is told by nobody.
                "firebuild_completeness": {"parameters": True, "resolvedDependencies": not reaches_out},
            },
        },
    }


class _Shown:
    """What is shown of texts that a user gave."""

    def __init__(self, secrets: Mapping[str, Secret]) -> None:
        values = ((name, secret.value.strip()) for name, secret in secrets.items())
        texts = (
            (name, value.decode("utf-8", "replace")) for name, value in values if len(value) >= _SHORTEST
        )
        self._secrets = sorted(texts, key=lambda each: -len(each[1]))

    def __call__(self, text: str) -> str:
        for name, value in self._secrets:
            text = text.replace(value, f"[secret {name}]")
        return _URL.sub(_public, text) if "://" in text else text

    def all(self, pairs: Mapping[str, str | None]) -> dict[str, str | None]:
        return {name: None if value is None else self(value) for name, value in sorted(pairs.items())}


def _public(url: re.Match[str]) -> str:
    """Leave user name, password and query of a URL out; the pattern finds `://` and what follows."""
    authority, slash, path = url[0][3:].partition("/")
    return f"://{authority.rpartition('@')[2]}{slash}{path}".partition("?")[0]


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _authority(course: Course) -> dict[str, Any]:
    if not course.issuer_fingerprint:
        # Everything was cached, and so no machine was started that could have needed one.
        return {"provider": course.ca_provider, "issued": False}
    issuer = {"digest": {"sha256": course.issuer_fingerprint}}
    return {"provider": course.ca_provider, "issued": True, "issuer": issuer}


def _parameters(request: BuildRequest, resolved: Resolved, shown: _Shown) -> dict[str, Any]:
    fresh = sorted(request.no_cache_stages)
    given: dict[str, Any] = {
        "dockerfile": os.path.basename(request.dockerfile_name),
        "platform": resolved.graph.target.platform,
        "target": request.target,
        "args": shown.all(request.build_args),
        "labels": shown.all(request.labels),
        "contexts": sorted(request.build_contexts),
        "secrets": [{"id": name} for name in sorted(request.secrets)],
        "ssh": [{"id": name} for name in sorted(request.agents)],
        "noCache": True if request.no_cache else fresh,
        "sourceDateEpoch": request.epoch,
    }
    return {name: value for name, value in given.items() if value not in (None, [], {})}


def _steps(
    resolved: Resolved, executed: Collection[tuple[int, int]], shown: _Shown
) -> Iterator[dict[str, Any]]:
    for stage in resolved.graph.stages:
        for place, step in enumerate(stage.steps):
            yield {
                "stage": stage.title,
                "line": step.origin.location.line,
                "instruction": shown(step.origin.text),
                "cached": (stage.index, place) not in executed,
            }


# --- what went in ---------------------------------------------------------------------------------


def _dependencies(
    request: BuildRequest, resolved: Resolved, course: Course, shown: _Shown
) -> list[dict[str, Any]]:
    """Return resource descriptors: the Dockerfile, contexts, images, and what came over the network."""
    text = resolved.dockerfile.text.encode()
    name = os.path.basename(request.dockerfile_name)
    found: list[dict[str, Any]] = [{"name": name, "digest": {"sha256": hashlib.sha256(text).hexdigest()}}]
    found += _contexts(request, resolved, course)
    graph = resolved.graph
    trees = {tree.reference for stage in graph.stages for tree in stage.trees() if isinstance(tree, ImageRef)}
    found += (_image(each, resolved.bases[each], graph.target.platform) for each in sorted(trees))
    fetched = dict[str, dict[str, Any]]()
    for _, resource in sorted(resolved.sent.items(), key=lambda each: each[0]):
        for group in resource.groups:
            if isinstance(group.source, Download | GitTree):
                each = _fetched(group.source, group.digest, shown)
                fetched[f"{each['uri']} {group.digest}"] = each
    return [*found, *(each for _, each in sorted(fetched.items()))]


def _contexts(request: BuildRequest, resolved: Resolved, course: Course) -> Iterator[dict[str, Any]]:
    used: dict[str, set[str]] = {}
    for stage in resolved.graph.stages:
        for step, parts in zip(stage.steps, course.parts(stage), strict=True):
            if not isinstance(step.operation, Copy | Run):
                continue
            for taken, found in zip(inputs_of(step.operation), parts.inputs, strict=True):
                if isinstance(taken, Files | BindMount) and isinstance(taken.tree, ContextRef):
                    used.setdefault(taken.tree.name, set()).add(found.digest)
    for name, digests in sorted(used.items()):
        source: BuildContextSource | Download | None = request.build_contexts.get(name)
        commit = resolved.contexts[name].commit
        if not name and request.remote is not None:
            source, commit = request.remote.source, request.remote.digest
        digest = {FILES_DIGEST: hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()}
        described: dict[str, Any] = {"name": f"context {name}" if name else "context", "digest": digest}
        if isinstance(source, GitTree):
            described["uri"] = _git_uri(source)
            digest["gitCommit"] = commit
        elif isinstance(source, Download):
            described["uri"] = redacted(source.url)
            algorithm, _, digest[algorithm] = commit.partition(":")
        yield described


def _image(reference: str, base: Base, target: str) -> dict[str, Any]:
    """Describe an image by what names it best: its manifest, its one archive, or the names of its layers."""
    wanted = Reference.parse(reference)
    described: dict[str, Any] = {"name": str(wanted)}
    algorithm, _, digits = base.digest.partition(":")
    if base.source is not None:
        described["uri"] = package_url(wanted.familiar, wanted.tag, target)
        algorithm, _, digits = base.source.manifest.digest.partition(":")
        described["annotations"] = {"config": base.source.config.digest, "also": sorted(base.source.digests)}
    elif base.build_id:
        described["annotations"] = {"invocationId": base.build_id}
        if not isinstance(base.layers[0] if len(base.layers) == 1 else None, ArchiveLayer):
            algorithm = LAYERS_DIGEST
    else:
        described["mediaType"] = "application/x-tar"
    return {**described, "digest": {algorithm: digits}}


def _fetched(source: Download | GitTree, digest: str, shown: _Shown) -> dict[str, Any]:
    algorithm, _, digits = digest.partition(":")
    uri = _git_uri(source) if isinstance(source, GitTree) else redacted(source.url)
    return {"uri": shown(uri), "digest": {algorithm: digits}}


def _git_uri(tree: GitTree) -> str:
    """Return how SPDX names a repository, `git+URL@REF` ("Package download location"), without a login."""
    url = redacted(tree.url)
    ref = f"@{tree.ref}" if tree.ref else ""
    below = f"#{tree.subdirectory}" if tree.subdirectory.strip("/") else ""
    return f"git+{url}{ref}{below}"

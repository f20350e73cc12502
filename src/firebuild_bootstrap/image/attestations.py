"""Attestations of an image, kept beside it: in-toto statements of its provenance and of its packages.

    <image>/provenance.json     predicateType and predicate, as the build wrote them
    <image>/sbom.json           the CycloneDX document, once somebody has asked for it

A statement is a predicate and its subject. The subject is the id of the image, which is found out when
somebody asks for it: a build does not read the layers that it has made only to name them. Sources: in-toto
attestation framework, spec/v1/statement.md; SLSA, spec/v1.0/provenance; the form in registries is that of
BuildKit, docs/attestations/attestation-storage.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firebuild_bootstrap.errors import MALFORMED, InputError, MachineError
from firebuild_bootstrap.image.content_store import write_whole
from firebuild_bootstrap.image.oci import CONFIG, Descriptor, Index, Manifest, canonical
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.sizes import parse_bool, split_fields
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.image.blobs import BlobStore
    from firebuild_bootstrap.image.store import StoredImage

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PROVENANCE: Final = "https://slsa.dev/provenance/v1"
SBOM: Final = "https://cyclonedx.org/bom"
_MEDIA_TYPE: Final = "application/vnd.in-toto+json"
_PREDICATE: Final = "in-toto.io/predicate-type"
_KIND: Final = "vnd.docker.reference.type"
_OF: Final = "vnd.docker.reference.digest"
_FILE: Final = "provenance.json"
_SBOM_FILE: Final = "sbom.json"
_MOST: Final = 64 << 20  # bytes of a file of ours; a list of 100,000 packages has half of it
_FORMS: Final = "type=provenance[,mode=min|max][,builder-id=URI] or type=sbom, and ,disabled=true for none"


class Mode(StrEnum):
    """How much of the provenance goes out with an image; the store keeps all of it."""

    MIN = "min"
    MAX = "max"


@dataclass(frozen=True)
class Attestations:
    """What a user wants to be said about an image.

    Args:
        provenance: how much of it goes out; None for none.
        sbom: whether the list of packages goes out.
        kept: whether a build keeps its provenance in the store.
        builder_id: URI of whoever builds; empty for that of firebuild.
    """

    provenance: Mode | None = None
    sbom: bool = False
    kept: bool = True
    builder_id: str = ""

    def __bool__(self) -> bool:
        """Whether anything goes out."""
        return self.sbom or self.provenance is not None


NONE: Final = Attestations()


def read_attestations(
    attest: Sequence[str] = (), provenance: str | None = None, sbom: str | None = None
) -> Attestations:
    """Read the options of `docker buildx build`, of which the short ones win over `--attest`.

    Args:
        attest: `type=provenance[,mode=…]` or `type=sbom`, as CSV (RFC 4180).
        provenance: of `--provenance`: a truth value or `mode=…`; None where it was not given.
        sbom: of `--sbom`: a truth value; None where it was not given.

    Raises:
        InputError: one has another form.
    """
    options = [(f"--attest {text}", _members(text)) for text in attest]
    if provenance is not None:
        options.append((f"--provenance={provenance}", _short("provenance", provenance)))
    if sbom is not None:
        options.append((f"--sbom={sbom}", _short("sbom", sbom)))
    found = NONE
    for option, members in options:
        found = _with(found, option[:200], dict(members))
    return found


def _members(text: str) -> dict[str, str]:
    try:
        members = split_fields(text)
    except ValueError as error:
        raise InputError(f"--attest {text[:200]}: {error}", hint=f"expected {_FORMS}") from error
    return {key: value for key, _, value in (each.partition("=") for each in members)}


def _short(kind: str, text: str) -> dict[str, str]:
    if (wanted := parse_bool(text)) is None:
        return {"type": kind, **_members(text)}
    return {"type": kind, "disabled": "false" if wanted else "true"}


def _with(found: Attestations, option: str, members: dict[str, str]) -> Attestations:
    kind, disabled = members.pop("type", ""), parse_bool(members.pop("disabled", "false"))
    mode, builder_id = members.pop("mode", Mode.MIN), members.pop("builder-id", "")
    if members.pop("version", "v1") != "v1":
        raise InputError(
            f"{option}: expected version=v1: other versions of SLSA's provenance are not written"
        )
    if "generator" in members:
        raise InputError(
            f"{option}: there are no generators: firebuild itself reads the packages of an image"
        )
    right = kind in ("provenance", "sbom") and mode in tuple(Mode) and not members
    if not right or disabled is None or (kind == "sbom" and (builder_id or mode != Mode.MIN)):
        raise InputError(f"{option}: expected {_FORMS}")
    if kind == "sbom":
        return replace(found, sbom=not disabled)
    provenance = None if disabled else Mode(mode)
    return replace(found, provenance=provenance, kept=not disabled, builder_id=builder_id)


# --- in the store ---------------------------------------------------------------------------------


def keep_provenance(directory: Path, predicate: Mapping[str, Any]) -> None:
    """Write the provenance of a build into the directory of its image.

    Raises:
        MachineError: it can't be written.
    """
    _keep(directory / _FILE, {"predicateType": PROVENANCE, "predicate": predicate})


def keep_sbom(directory: Path, document: Mapping[str, Any]) -> None:
    """Write the list of packages into the directory of the image.

    Raises:
        MachineError: it can't be written.
    """
    _keep(directory / _SBOM_FILE, document)


def has_provenance(directory: Path) -> bool:
    """Whether a build has left its provenance in the directory of an image."""
    return (directory / _FILE).is_file()


def reuse_documents(older: Path, new: Path) -> None:
    """Give the new directory of an image what an older one of the same image says about it.

    Raises:
        MachineError: the new directory can't be written.
    """
    for name in (_FILE, _SBOM_FILE):
        try:
            os.link(older / name, new / name)  # neither is ever changed in its place
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MachineError(f"{new / name} can't be written: {error.strerror}") from error


def provenance_of(image: StoredImage, mode: Mode = Mode.MAX) -> dict[str, Any]:
    """Return the predicate of the provenance of an image.

    Raises:
        InputError: it has none.
        MachineError: it is damaged.
    """
    document = _kept(image.directory / _FILE)
    if document is None:
        outside = image.record.source is not None
        raise InputError(
            f"the image {image.tag} has no provenance: "
            + ("it was not built here" if outside else "it was built without it, or by an earlier version"),
            hint="who built it may have attested it" if outside else "build it again with --no-cache",
        )
    try:
        predicate = document["predicate"]
        whole = (
            document["predicateType"] == PROVENANCE
            and predicate["buildDefinition"]
            and predicate["runDetails"]
        )
        if whole:
            return predicate if mode is Mode.MAX else _least(predicate)
    except MALFORMED:
        pass
    raise MachineError(
        f"{image.directory / _FILE} is damaged",
        hint="`firebuild store check --repair` removes it; then build the image again",
    )


def sbom_of(image: StoredImage) -> dict[str, Any] | None:
    """Return the list of packages of an image if it was made before.

    Raises:
        MachineError: it is damaged.
    """
    return _kept(image.directory / _SBOM_FILE)


def damaged_documents(image: StoredImage) -> Iterator[Path]:
    """Yield those documents beside an image that can't be read."""
    for name, read in ((_FILE, provenance_of), (_SBOM_FILE, sbom_of)):
        if (path := image.directory / name).exists():
            try:
                read(image)
            except MachineError:
                yield path


def _keep(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise MachineError(f"{path} can't be written: {error.strerror}") from error


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MOST))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise MachineError(f"{path} is damaged: {error}", hint="remove it") from error
    if not isinstance(document, dict):
        raise MachineError(f"{path} is damaged: it is not a JSON object", hint="remove it")
    return document


def _least(predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what BuildKit's mode=min leaves out: arguments, labels, ids of secrets, and the steps."""
    definition, details = dict(predicate["buildDefinition"]), dict(predicate["runDetails"])
    given = definition["externalParameters"]
    private = ("args", "labels", "secrets", "ssh")
    definition["externalParameters"] = {name: each for name, each in given.items() if name not in private}
    metadata = dict(details["metadata"])
    metadata["firebuild_completeness"] = {**metadata["firebuild_completeness"], "parameters": False}
    cache = metadata["firebuild_cache"]
    metadata["firebuild_cache"] = {name: each for name, each in cache.items() if name != "steps"}
    return {"buildDefinition": definition, "runDetails": {**details, "metadata": metadata}}


# --- statements -----------------------------------------------------------------------------------


def statement(names: Iterable[str], digest: str, kind: str, predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return an in-toto statement.

    Args:
        names: of the image.
        digest: `sha256:…` that it is about.
        kind: type of the predicate.
        predicate: what is said.
    """
    algorithm, _, digits = digest.partition(":")
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {algorithm: digits}} for name in names],
        "predicateType": kind,
        "predicate": predicate,
    }


def package_url(name: str, tag: str, platform: str) -> str:
    """Return the package URL of an image, as BuildKit writes it: `pkg:docker/debian@12?platform=…`."""
    from urllib.parse import quote

    # The colon of a port is data in there, and has to be quoted (purl-spec).
    path = "/".join(quote(part, safe="") for part in name.split("/"))
    return f"pkg:docker/{path}@{quote(tag, safe='')}?platform={quote(platform, safe='')}"


@dataclass(frozen=True)
class Attested:
    """An image and what is said about it, as a registry keeps them under one tag.

    Args:
        image: its manifest, which is the same as without.
        attestation: the manifest whose layers are the statements.
        index: names both.
    """

    image: Manifest
    attestation: Manifest
    index: Index


def attested(
    image: Manifest, platform: Platform, statements: Sequence[Mapping[str, Any]], blobs: BlobStore
) -> Attested:
    """Write what BuildKit writes for statements about an image; all of it is in `blobs` then, and held.

    The same statements give the same bytes. Readers that know nothing of attestations choose by platform,
    and that of this manifest is unknown/unknown.

    Raises:
        MachineError: the store of blobs can't be written.
    """
    layers = []
    for each in statements:
        data = canonical(each)
        kind = {_PREDICATE: str(each["predicateType"])}
        layers.append(Descriptor(_MEDIA_TYPE, blobs.add(data), len(data), annotations=kind))
    rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    unknown = {"architecture": "unknown", "os": "unknown", "config": {}, "rootfs": rootfs}
    config = canonical(unknown)
    manifest = Manifest.made_of(Descriptor(CONFIG, blobs.add(config), len(config)), layers)
    blobs.add(manifest.data)
    about = {_KIND: "attestation-manifest", _OF: image.digest}
    entries = (
        replace(image.descriptor, platform=platform),
        replace(manifest.descriptor, platform=Platform("unknown", "unknown"), annotations=about),
    )
    index = Index.made_of(entries)
    blobs.add(index.data)
    return Attested(image, manifest, index)

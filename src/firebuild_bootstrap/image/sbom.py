"""The SBOM of an image, as a CycloneDX document (cyclonedx.org/docs/1.6/json).

Written here and not by a library: a document of 5,000 packages takes `cyclonedx-python-lib` 6 s, and is plain
JSON. The tests check it with that library's schemas. The same layers give the same bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from packageurl import PackageURL

from firebuild_bootstrap import __version__
from firebuild_bootstrap.image.attestations import package_url

if TYPE_CHECKING:
    from firebuild_bootstrap.image.layertrees import LayerTrees
    from firebuild_bootstrap.image.store import StoredImage
    from firebuild_bootstrap.image.trees import Trees

# What a package URL calls a distribution that has no name: the most common one with such packages.
_DISTRIBUTIONS = {"deb": "debian", "apk": "alpine", "rpm": "redhat"}
_LIBRARIES = ("pypi", "npm")


def make_sbom(image: StoredImage, identity: str, layers: LayerTrees, trees: Trees) -> dict[str, Any]:
    """Return the packages that are found in the root file system of an image.

    Args:
        image: held by the caller.
        identity: its id, `sha256:…`.
        layers: where its layers are.
        trees: reads them, in a sandbox.

    Raises:
        InputError, MachineError: as `StoredImage.layers`; it can't be read.
    """
    found = trees.packages(layers.merged(image.layers(layers.root.name)))
    return document(
        identity,
        str(image.tag),
        package_url(image.tag.familiar, image.tag.tag, image.record.platform),
        image.record.created,  # SOURCE_DATE_EPOCH, if there was one
        found,
    )


def document(identity: str, name: str, purl: str, created: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document.

    Args:
        identity: id of the image.
        name: of the image.
        purl: its package URL.
        created: when the image was, RFC 3339.
        found: what `worker.packages.packages` returns.
    """
    notes = [{"name": "firebuild:incomplete", "value": note} for note in found["notes"]]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # Of the content, so that it is the same for the same image.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "version": 1,
        "metadata": {
            **_time(created),
            "tools": {"components": [{"type": "application", "name": "firebuild", "version": __version__}]},
            "component": {
                "type": "container",
                "bom-ref": "image",
                "name": name,
                "version": identity,
                "purl": purl,
                "hashes": [{"alg": "SHA-256", "content": identity.partition(":")[2]}],
            },
            **({"properties": notes} if notes else {}),
        },
        "components": list(_components(found["packages"], found["release"])),
    }


def _components(packages: Sequence[Sequence[str]], release: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield packages, each once: npm may have many copies of one, whose places are its evidence."""
    places: dict[tuple[str, ...], list[str]] = {}
    for kind, name, number, path, *others in packages:
        places.setdefault((kind, name, number, *others), []).append(path)
    for (kind, name, number, licence, arch, source), paths in sorted(places.items()):
        qualifiers = {"arch": arch, "upstream": source if source != name else ""}
        purl = _purl(kind, name, number, qualifiers, release)
        yield {
            "type": "library",
            "bom-ref": f"{purl}#{licence}" if licence else purl,
            "name": name,
            "version": number,
            "purl": purl,
            # As it is written: nobody has checked that it is an expression of SPDX.
            **({"licenses": [{"license": {"name": licence}}]} if licence else {}),
            "evidence": {"occurrences": [{"location": f"/{path}"} for path in paths]},
        }


def _purl(kind: str, name: str, number: str, qualifiers: dict[str, str], release: Mapping[str, str]) -> str:
    if kind in _LIBRARIES:
        namespace, _, last = name.rpartition("/")
        return PackageURL(kind, namespace or None, last, number).to_string()
    distribution = release.get("ID", "") or _DISTRIBUTIONS[kind]
    epoch, colon, rest = number.partition(":")
    if kind == "rpm" and colon:  # purl-spec, "rpm"
        qualifiers["epoch"], number = epoch, rest
    if "VERSION_ID" in release:
        qualifiers["distro"] = f"{distribution}-{release['VERSION_ID']}"
    given = {key: value for key, value in qualifiers.items() if value}
    return PackageURL(kind, distribution, name, number, given).to_string()


def _time(text: str) -> dict[str, str]:
    """Return when the image was made, unless an image from outside says what is not a time."""
    try:
        return {"timestamp": datetime.fromisoformat(text).astimezone(UTC).isoformat(timespec="seconds")}
    except ValueError:
        return {}

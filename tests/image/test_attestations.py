"""What users ask to be said about images, and what of it is kept and goes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.attestations import (
    NONE,
    Attestations,
    Mode,
    keep_provenance,
    keep_sbom,
    package_url,
    provenance_of,
    read_attestations,
    sbom_of,
)
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.store import ImageRecord, StoredImage

LEAST = Attestations(provenance=Mode.MIN)
MOST = Attestations(provenance=Mode.MAX)


@pytest.mark.parametrize(
    ("attest", "provenance", "sbom", "expected"),
    [
        ((), None, None, NONE),
        ((), "true", None, LEAST),
        ((), "1", "true", Attestations(provenance=Mode.MIN, sbom=True)),
        ((), "mode=max", None, MOST),
        ((), "false", "false", Attestations(kept=False)),
        (("type=provenance",), None, None, LEAST),
        (("type=provenance,mode=max,version=v1",), None, None, MOST),
        (("type=provenance,disabled=true",), None, None, Attestations(kept=False)),
        (("type=provenance,mode=max",), "mode=min", None, LEAST),
        (("type=sbom",), None, None, Attestations(sbom=True)),
        (("type=sbom",), None, "false", NONE),
        (
            ("type=provenance,builder-id=https://ci/1",),
            None,
            None,
            Attestations(provenance=Mode.MIN, builder_id="https://ci/1"),
        ),
    ],
)
def test_the_options_mean_what_they_mean_for_buildx(
    attest: tuple[str, ...], provenance: str | None, sbom: str | None, expected: Attestations
) -> None:
    found = read_attestations(attest, provenance, sbom)
    assert found == expected
    assert bool(found) == (expected.sbom or expected.provenance is not None)


EXPECTED = (
    "expected type=provenance[,mode=min|max][,builder-id=URI] or type=sbom, and ,disabled=true for none"
)


@pytest.mark.parametrize(
    ("attest", "said"),
    [
        ("type=vex", EXPECTED),
        ("", EXPECTED),
        ('"', "the double quote that is character 1 has no end"),
        ("type=provenance,mode=some", EXPECTED),
        ("type=provenance,inline-only=true", EXPECTED),
        ("type=sbom,mode=max", EXPECTED),
        ("type=sbom,disabled=maybe", EXPECTED),
        ("type=sbom,generator=image", "there are no generators"),
        ("type=provenance,version=v0.2", "expected version=v1"),
    ],
)
def test_what_is_not_understood_is_named(attest: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_attestations((attest,))
    assert caught.value.message.startswith(f"--attest {attest}: {said}")


def test_a_package_url_quotes_what_a_registry_has() -> None:
    assert package_url("host:5000/a/b", "1.0+x", "linux/arm64") == (
        "pkg:docker/host%3A5000/a/b@1.0%2Bx?platform=linux%2Farm64"
    )


def image_in(directory: Path) -> StoredImage:
    record = ImageRecord(tag="a:1", build_id="b", created="", firebuild_version="1")
    return StoredImage(Reference.parse("a:1"), directory, directory, record)


def test_what_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    image = image_in(tmp_path)
    assert sbom_of(image) is None
    with pytest.raises(InputError, match="the image a:1 has no provenance: it was built without it"):
        provenance_of(image)
    for text in ("{", "[]", '{"predicateType": "other", "predicate": {}}', "[" * 100_000):
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(MachineError, match=r"provenance\.json is damaged"):
            provenance_of(image)
    odd = '{"buildDefinition": {"externalParameters": 1}, "runDetails": {"a": 1}}'
    for predicate in ("{}", "[]", "1", odd):
        text = f'{{"predicateType": "https://slsa.dev/provenance/v1", "predicate": {predicate}}}'
        (tmp_path / "provenance.json").write_text(text)
        with pytest.raises(MachineError, match=r"provenance\.json is damaged"):
            provenance_of(image, Mode.MIN)


def test_what_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"provenance\.json can't be written: No such file"):
        keep_provenance(tmp_path / "none", {})
    keep_sbom(tmp_path, {"name": "\udc80"})
    assert sbom_of(image_in(tmp_path)) == {"name": "\udc80"}

"""The same Dockerfile gives the same bytes, and what holds nothing takes no room."""

from __future__ import annotations

import json
import tarfile
from datetime import datetime

import pytest

from cli.library import Library
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.image.store import configuration

pytestmark = [pytest.mark.needs("userns"), pytest.mark.needs("debugfs")]

DOCKERFILE = """
FROM host
WORKDIR /made
COPY Dockerfile .
RUN mkdir -p a/b && touch a/b/c && ln a/b/c d && rm -rf /srv && touch /etc/new
RUN truncate -s 8T /var/log/lastlog && printf begin > sparse && truncate -s 4G sparse
"""


def test_without_source_date_epoch_two_builds_differ_in_times_and_in_nothing_else(library: Library) -> None:
    images = [library.build(DOCKERFILE, tag=f"t/{name}:1", outputs=["dir"]) for name in ("first", "second")]
    first, second = (image.record for image in images)
    assert first.outputs == second.outputs  # the digest of a directory is without times
    documents = [json.loads(configuration(image, library.home.layers)) for image in images]
    for document in documents:
        document["rootfs"]["diff_ids"] = len(document["rootfs"]["diff_ids"])
        assert "created" not in document["history"][0]  # FROM host, which was imported at some time
        for dated in (document, *document["history"][1:]):
            assert datetime.fromisoformat(dated.pop("created")).tzinfo is not None
    assert documents[0] == documents[1]
    assert library.home.image_id(images[0]) != library.home.image_id(images[1])


def test_two_builds_give_the_same_bytes_in_every_form_and_holes_stay_holes(library: Library) -> None:
    first, second = (
        library.build(DOCKERFILE, tag=f"t/{name}:1", outputs=["tar", "dir", "ext4"], epoch=1_700_000_000)
        for name in ("first", "second")
    )
    assert first.record.created == second.record.created == "2023-11-14T22:13:20+00:00"
    assert first.record.outputs == second.record.outputs
    for kind in (OutputType.TAR, OutputType.DIR, OutputType.EXT4):
        path = first.output(kind)
        assert path is not None
        files = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_symlink()]
        youngest = max(each.stat().st_mtime for each in files)
        assert path.is_file() or youngest <= 1_700_000_000
        assert sum(each.stat().st_blocks * 512 for each in files) < 1 << 30
    archive = first.output(OutputType.TAR)
    assert archive is not None
    with tarfile.open(archive) as tar:
        sizes = {member.name: member.size for member in tar}
    assert sizes["var/log/lastlog"] == 8 << 40
    assert sizes["made/sparse"] == 4 << 30

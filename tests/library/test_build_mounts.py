"""A whole build with mounts: files of the context and of stages, caches that stay, no secret anywhere."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from cli.library import Library
from cli.watching import Watch
from firebuild_bootstrap.errors import StepFailed
from firebuild_bootstrap.events import StepOutput
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.request import Secret

pytestmark = pytest.mark.needs("userns")
NEEDLE = b"hunter2-9146"
DOCKERFILE = """\
FROM host AS made
RUN --mount=type=cache,target=/cache,sharing=locked echo made >> /cache/log && cp /cache/log /made
FROM host
WORKDIR /srv
RUN --mount=type=bind,target=in --mount=type=bind,from=made,source=/made,target=/made,rw \\
 --mount=type=cache,target=/cache --mount=type=tmpfs,target=/t --network=none \\
 --mount=type=secret,id=token,required --mount=type=secret,id=token,env=TOKEN \\
 --mount=type=secret,id=none,env=NONE --mount=type=ssh \\
 test "$TOKEN" = "$(cat /run/secrets/token)" && test "${NONE-unset}" = "" && cat in/hello /made \\
 && echo x > /made && echo x > /t/x && echo canary-9146 > /kept && cat /cache/log && ls -A /run/secrets
"""


def test_a_build_with_all_mounts_keeps_the_caches_and_no_secret(
    library: Library, host_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    shutil.copytree(host_home, home, symlinks=True)
    library.home = Home(home)
    (library.context / "hello").write_text("hello\n")
    secrets = {"token": Secret(NEEDLE)}
    watch = Watch([home])
    watch.expect("secret", NEEDLE)
    watch.expect("canary", b"canary-9146")
    with caplog.at_level(logging.DEBUG), watch.running():
        image = library.build(DOCKERFILE, secrets=secrets)
        with pytest.raises(StepFailed) as failed:
            library.build(
                f"{DOCKERFILE}RUN --mount=type=secret,id=token exit 3\n",
                secrets=secrets,
                keep_failed=home / "failed",
            )
    said = b"".join(event.data for event in library.of(StepOutput)).decode()
    assert said.startswith("hello\nmade\nmade\ntoken\n")
    assert "file" in watch.places("canary")
    # Of a command alone, as in every builder.
    assert watch.places("secret") <= {"environ"}
    told = [
        *(json.dumps(event.as_json()) + repr(event) for event in library.events),
        *(repr(record.__dict__) for record in caplog.records),
        caplog.text,
        repr(failed.value.__dict__) + str(failed.value),
        repr(image),
    ]
    assert not [text for text in told if NEEDLE.decode() in text]
    (log,) = home.glob("cache-mounts/*/*/0/data/log")
    assert log.read_text().startswith("made\n")


@pytest.mark.parametrize("source", ["", ",source=/data"])
def test_a_cache_begins_anew_when_the_files_that_it_begins_with_are_others(
    own_library: Library, tmp_path: Path, source: str
) -> None:
    files = tmp_path / "files"
    (files / "data").mkdir(parents=True)
    place = "/c" if source else "/c/data"
    mount = f"--mount=type=cache,target=/c,id=begun,from=files{source}"
    dockerfile = f"FROM host\nRUN {mount} cat {place}/*; echo x >> {place}/new\n"

    def build() -> bytes:
        own_library.events.clear()
        own_library.build(dockerfile, build_contexts={"files": files})
        return b"".join(event.data for event in own_library.of(StepOutput))

    (files / "data/old").write_text("1\n")
    assert [build(), build()] == [b"1\n", b"x\n1\n"]
    (files / "data/old").write_text("2\n")
    assert [build(), build()] == [b"2\n", b"x\n2\n"]
    (files / "data/old").write_text("1\n")
    assert build() == b"x\nx\n1\n"

"""COPY, ADD and WORKDIR with an old guest come to the same image as with ours."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import GuestLost, InputError, StepFailed
from firebuild_bootstrap.legacy import copying
from firebuild_bootstrap.sandbox import IdMap
from legacy.house import House, gnu, install

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("busybox")]


def fill(house: House) -> None:
    """A build context with one of everything."""
    house.file("a.txt", "A")
    house.file("b.txt", "B", mode=0o600)
    house.file("empty")
    house.file("tool", "#!/bin/sh\n", mode=0o4755)
    house.file("tree/one", "1", mode=0o640, time=1.1e9)
    house.file("tree/sub/two", "22", mode=0o755, time=1.2e9)
    house.file("tree/sub/.hidden", "h")
    house.file("tree/..odd", "o")
    house.link("tree/link", "sub/two")
    house.link("tree/dirlink", "sub")
    house.link("tree/dangling", "/nowhere/at all")
    (house.context / "tree/void").mkdir(exist_ok=True)
    (house.context / "tree/void").chmod(0o1777)
    (house.context / "tree/sub").chmod(0o2750)
    os.link(house.context / "tree/one", house.context / "tree/sub/one")
    house.file("other/one", "another one", time=1.3e9)
    house.file("other/sub/three", "333")


@pytest.mark.needs("ids")
def test_files_arrive_where_and_how_they_should(house: House) -> None:
    fill(house)
    house.both(
        "WORKDIR /srv/app\nCOPY a.txt /elsewhere/name.txt\nWORKDIR sub\nCOPY a.txt name.txt\nWORKDIR /\n"
        "COPY a.txt /made/here/\nCOPY a.txt b.txt empty /made/\n"
        "COPY a.txt .\nCOPY a.txt ./\nCOPY a.txt /x/.\nCOPY a.txt /etc\nCOPY a.txt /x/../y\n"
        "COPY a.txt /one\nCOPY a.txt /two\nCOPY a.txt /one\n"
        "COPY tool /bin-tool\nCOPY tool /tools/\n"
        "COPY tree /tree\nCOPY tree/ /again/tree/\nCOPY tree other /together/\n"
        "COPY tree /merged\nCOPY other /merged\nCOPY a.txt /merged/sub\nCOPY . /all\n"
        "COPY <<one <<two /texts/\n$HOME 'it' \\\none\n2\ntwo\n"
        "USER app\nWORKDIR /mine/deep\nCOPY a.txt .\nUSER 1000:50\nWORKDIR /his"
    )
    house.both("COPY tree /")
    house.both("COPY no* /x/\nCOPY --chown=root:root a.txt /y/\nRUN echo 1 > /z\nCOPY no* /q")


@pytest.mark.root
def test_owners_and_modes_are_as_asked_for(house: House) -> None:
    fill(house)
    house.both(
        "COPY --chown=7:8 tree /t\nCOPY --chown=7 a.txt /new/dir/\nCOPY --chown=app tree /named\n"
        "COPY --chown=app:staff a.txt /u/\nCOPY --chown=9:wheel a.txt /v/\nCOPY --chown=bare:77 a.txt /w\n"
        "RUN echo 'late:x:61:62::/:' >> /etc/passwd\nCOPY --chown=late a.txt /late\n"
        "COPY --chmod=4711 tree /octal\nCOPY --chmod=0600 a.txt /a\n"
        "COPY --chmod=u=rwX,go=rX tree /words\nCOPY --chmod=+x,o-r a.txt /x\nCOPY --chmod=g-s tree /less"
    )


def test_a_directory_does_not_give_its_mode_to_its_destination(house: House) -> None:
    fill(house)
    for directory in (house.context, house.context / "tree"):
        directory.chmod(0o700)
    house.change_image = lambda image: (image / "there").mkdir(mode=0o750)
    results = house.both("COPY . /all\nCOPY tree /deep/er\nADD tre[e] /there\nCOPY --chmod=711 tree /asked")
    for result in results:
        modes = [
            (result.image / path).stat().st_mode & 0o7777
            for path in ("all", "deep", "deep/er", "there", "asked", "all/tree")
        ]
        assert modes == [0o755, 0o755, 0o755, 0o750, 0o711, 0o700]


def test_any_name_is_possible(house: House) -> None:
    plain = ("with space", "quo'te", 'dou"ble', "-rf", "*", "[a-z]", "ü", "$HOME")
    for name in (*plain, "new\nline", "back\\slash", "bell\a"):
        house.file(f"d/{name}", name)
        house.file(f"d/dir {name}/{name}", f"below {name}")
    (house.context / "d/new\nhard").hardlink_to(house.context / "d/new\nline")
    house.link("d/link\n", "to\nwhat")
    house.both('COPY d /d\nCOPY d /e/\nCOPY ["d/with space", "/named here/"]\nCOPY d/new?line /renamed')


def existing(image: Path) -> None:
    """What was in an image before."""
    (image / "long").write_text("something that is longer than what replaces it")
    (image / "long").chmod(0o400)
    os.link(image / "long", image / "long-too")
    (image / "real").mkdir()
    (image / "real/one").write_text("another tail, much longer")
    (image / "linked").symlink_to("real")
    (image / "to-file").symlink_to("real/one")
    (image / "t").mkdir(mode=0o700)
    (image / "t/link").symlink_to("/real")
    (image / "t/sub").symlink_to("../real")
    (image / "t/one").symlink_to("/real/one")


@pytest.mark.parametrize(
    "dockerfile",
    [
        "COPY a.txt /long\nCOPY a.txt /to-file\nCOPY a.txt /real\nCOPY a.txt /linked\nCOPY a.txt /linked/\n"
        "WORKDIR /linked/below\nCOPY a.txt .\nRUN pwd",
        "COPY tree /t",
        "COPY tree /linked\nCOPY tree/sub/ /linked/sub",
    ],
)
def test_what_exists_is_replaced_or_kept_as_the_reference_says(house: House, dockerfile: str) -> None:
    fill(house)
    house.change_image = existing
    new, _ = house.both(dockerfile)
    assert (new.image / "long-too").read_text().startswith("something that is longer")


def member(archive: tarfile.TarFile, name: str, **fields: Any) -> None:
    content = fields.pop("content", b"")
    info = tarfile.TarInfo(name)
    for key, value in {"mode": 0o644, "mtime": 1_250_000_000, "uid": 0, "gid": 0, **fields}.items():
        setattr(info, key, value)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def plain(archive: tarfile.TarFile) -> None:
    member(archive, "d", type=tarfile.DIRTYPE, mode=0o2750, uid=5, gid=6)
    member(archive, "d/first", content=b"one", uid=5, gid=6, mode=0o4755)
    member(archive, "d/second", type=tarfile.LNKTYPE, linkname="d/first")
    member(archive, "d/sym", type=tarfile.SYMTYPE, linkname="first", uid=7, gid=8)
    member(archive, "implied/deep/file", content=b"x", uid=9, gid=9)


def overlapping(archive: tarfile.TarFile) -> None:
    member(archive, "real", type=tarfile.DIRTYPE, mode=0o755)
    member(archive, "real/f", content=b"old and longer")
    member(archive, "real/f", content=b"new")
    member(archive, "alias", type=tarfile.SYMTYPE, linkname="real")
    member(archive, "alias/through", content=b"a link")
    member(archive, "late", type=tarfile.LNKTYPE, linkname="real/f")
    member(archive, "real", type=tarfile.DIRTYPE, mode=0o700, mtime=1_260_000_000)
    member(archive, "implied/f", content=b"i")
    member(archive, "implied", type=tarfile.DIRTYPE, mode=0o711)


def with_root(archive: tarfile.TarFile) -> None:
    member(archive, ".", type=tarfile.DIRTYPE, mode=0o710, uid=3, gid=4)
    member(archive, "./f", content=b"f", mtime=1_250_000_000.25)


def leading_out(archive: tarfile.TarFile) -> None:
    for name, text in (
        ("abs", "/etc"),
        ("rel", "../../etc"),
        ("far", "abs/../../x/./y"),
        ("new\nline", "/v"),
    ):
        member(archive, name, type=tarfile.SYMTYPE, linkname=text)
        member(archive, f"{name}/passwd", content=b"evil")
        member(archive, f"{name}/d", type=tarfile.DIRTYPE, mode=0o711)
        member(archive, f"hard-{len(name)}", type=tarfile.LNKTYPE, linkname=f"{name}/passwd")
    member(archive, "out/passwd", content=b"evil")
    member(archive, "in/f", content=b"f")


def replacing(archive: tarfile.TarFile) -> None:
    member(archive, "full", content=b"a file")
    member(archive, "file", type=tarfile.DIRTYPE, mode=0o755)
    member(archive, "file/below", content=b"b")
    member(archive, "in", type=tarfile.DIRTYPE, mode=0o711)
    member(archive, "out", type=tarfile.DIRTYPE, mode=0o755)
    member(archive, "out/passwd", content=b"good")
    member(archive, "full", type=tarfile.DIRTYPE, mode=0o750)
    member(archive, "full/x", content=b"x")
    member(archive, "full", type=tarfile.SYMTYPE, linkname="file")


@pytest.mark.parametrize("make", [leading_out, replacing])
@pytest.mark.root
def test_archives_stay_in_their_destination_and_replace_what_is_there(
    house: House, make: Callable[[tarfile.TarFile], None]
) -> None:
    def change(image: Path) -> None:
        (image / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
        (image / "to/real").mkdir(parents=True, mode=0o700)
        (image / "to/full/of/files").mkdir(parents=True)
        (image / "to/file").write_text("a file")
        (image / "to/out").symlink_to("/etc")
        (image / "to/in").symlink_to("real")

    house.change_image = change
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        make(archive)
    house.file("a.tar", buffer.getvalue())
    house.file("tree/full/x", "tree")
    for result in house.both("ADD a.tar /to/\nADD a.tar tree a.tar /twice/"):
        assert (result.image / "etc/passwd").read_text() == "root:x:0:0::/:/bin/sh\n"


@pytest.mark.parametrize("make", [plain, overlapping, with_root])
@pytest.mark.root
def test_archives_are_unpacked(house: House, make: Callable[[tarfile.TarFile], None]) -> None:
    def change(image: Path) -> None:
        (image / "to").mkdir()
        # Without the set-group-ID bit where the archive implies directories: an old guest's don't inherit it.
        for name, mode in (("to/implied", 0o1700), ("implied", 0o1700), ("to/d", 0o2700)):
            (image / name).mkdir(mode=0o700)
            os.chown(image / name, 33, 34)
            (image / name).chmod(mode)

    house.change_image = change
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        make(archive)
    house.file("a.tar.gz", gzip.compress(buffer.getvalue()))
    house.both(
        "ADD a.tar.gz /to/\nADD a.tar.gz /\nADD --chown=70:71 a.tar.gz /owned\nADD a.tar.gz a.tar.gz /twice/"
    )


def test_a_file_of_any_size_needs_little_of_the_guests_memory(house: House) -> None:
    size = 2 * copying.PORTION_BYTES + 4096
    data = os.urandom(4096) * (size // 4096)
    house.file("d/large", data)
    house.file("d/new\nline", data[: copying.PORTION_BYTES + 1])
    for number in range(5):
        house.file(f"d/{number}", data[: copying.PORTION_BYTES // 3])
    _, old = house.both("COPY d /d")
    assert 0 < old.report["most_buffered"] <= copying.PORTION_BYTES + 1024 * 1024


def test_many_files_are_asked_for_in_portions(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_PORTION_PIECES", 7)
    for number in range(40):
        house.file(f"d/{number % 5}/{number}", str(number), time=1e9 + number % 3)
    house.both("COPY d /d")


@pytest.mark.parametrize(
    ("dockerfile", "step", "message"),
    [
        ("COPY a.txt /real/one/below", 2, "a file is where a directory is needed"),
        ("COPY tree /long", 2, "/long: a file is where a directory is needed"),
        (
            "COPY a.txt /x\nCOPY other /u",
            3,
            "/u/one: a directory is there, and a file or link can't replace it",
        ),
        ("COPY tree /v", 2, "/v/sub: a file is where a directory is needed"),
        ("COPY --chown=nobody-knows a.txt /a", 2, "/etc/passwd of the image has no 'nobody-knows'"),
        ("COPY --chown=7:strangers a.txt /a", 2, "/etc/group of the image has no 'strangers'"),
        ("WORKDIR /long/er", 2, "a file is where a directory is needed"),
    ],
)
def test_what_can_not_be_written_fails_the_step_with_the_words_of_vminit(
    house: House, dockerfile: str, step: int, message: str
) -> None:
    def change(image: Path) -> None:
        existing(image)
        (image / "u/one").mkdir(parents=True)
        (image / "v").mkdir()
        (image / "v/sub").write_text("a file")

    fill(house)
    house.change_image = change
    result = house.old(dockerfile)
    error = result.outcome.error
    assert isinstance(error, StepFailed)
    assert (error.step, result.steps[-1]) == (step, ("finished", step, 1))
    assert message in error.message


@pytest.mark.parametrize(
    "step", ["COPY --chown=1000 tree /x/", "COPY a.txt /etc/passwd/"], ids=["owner", "target"]
)
def test_a_step_that_fails_leaves_nothing_of_ours_in_the_root(
    house: House, single_idmap: IdMap, step: str
) -> None:
    """Where a user has no subordinate ids, no file can be given to another user."""
    fill(house)
    house.idmap = single_idmap
    done = house.old(step)
    assert isinstance(done.outcome.error, StepFailed)
    assert [name for name in done.tree() if "firebuild" in name] == []


def test_a_file_that_the_guest_loses_fails_the_step(house: House) -> None:
    fill(house)
    result = house.old("COPY a.txt /first\nCOPY tree /t\nRUN echo on", loses="/two")
    error = result.outcome.error
    assert isinstance(error, StepFailed)
    assert (error.step, error.message) == (3, "the files did not arrive")
    assert ("started", 4, 4) not in result.steps


def test_a_connection_that_breaks_in_the_middle_of_a_file_ends_the_build(house: House) -> None:
    house.file("d/large", os.urandom(copying.PORTION_BYTES - 1))
    result = house.old("COPY d /large\nRUN touch /ran", breaks="large")
    assert isinstance(result.outcome.error, GuestLost)
    assert result.outcome.message == "the connection broke while the files of step 2 were sent"
    assert not (result.image / "ran").exists()


@pytest.mark.root
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_scripts_work_with_the_tools_of_gnu_too(house: House, shell: str) -> None:
    def change(image: Path) -> None:
        gnu(image)
        for name in (shell, "base64", "dd", "setpriv", "id"):
            install(name, image)
        (image / "bin/sh").unlink()
        (image / "bin/sh").symlink_to(shell)
        existing(image)

    fill(house)
    house.file("d/new\nline", "n")
    house.change_image = change
    new, old = house.both(
        "COPY tree /t\nCOPY --chown=app:staff --chmod=u=rwX,go=rX tree /u\nCOPY tree other a.txt /to/\n"
        "COPY a.txt /to-file\nCOPY d /d\n"
        r"RUN printf 'a\377b\n\n'; cat /bin/cat >&2" + "\nUSER app\nRUN id; exit 0\n"
        'WORKDIR /mine\nRUN ["/bin/env"]'
    )
    for step in (7, 8):
        for stream in ("stdout", "stderr"):
            assert old.output(step, stream) == new.output(step, stream)
    outcome = house.old("USER app\nRUN id; exit 5").outcome
    assert (outcome.step, outcome.exit_code) == (2, 5)


@pytest.mark.parametrize("tool", ["stat", "sha256sum", "touch"])
def test_an_image_without_the_tools_is_refused_before_any_step(house: House, tool: str) -> None:
    def change(image: Path) -> None:
        gnu(image)
        (image / "bin" / tool).unlink()
        if tool == "touch":
            (image / "bin/touch").symlink_to("/bin/false-not-there")

    fill(house)
    house.change_image = change
    result = house.old("RUN env > /ran\nCOPY a.txt /a")
    assert isinstance(result.outcome.error, InputError)
    assert (
        f"the guest's vminit is too old to build this image: the image lacks {tool}" in result.outcome.message
    )
    assert result.steps == []
    assert not (result.image / "ran").exists()


@pytest.mark.parametrize(
    ("tool", "text", "message"),
    [
        ("touch", '[ "$1" != -h ]', "touch of the image does not know -h"),
        ("stat", "false", "stat of the image does not know -c"),
        ("sha256sum", "false", "sha256sum of the image does not know -c"),
        ("ln", "false", "no directory can be made in / of the image"),
    ],
)
def test_tools_that_do_too_little_are_found_out_before_any_step(
    house: House, tool: str, text: str, message: str
) -> None:
    def change(image: Path) -> None:
        gnu(image)
        (image / "bin" / tool).unlink()
        (image / "bin" / tool).write_text(f"#!/bin/sh\n{text}\n")
        (image / "bin" / tool).chmod(0o755)

    fill(house)
    house.change_image = change
    result = house.old("COPY a.txt /a")
    assert isinstance(result.outcome.error, InputError)
    assert message in result.outcome.message
    assert result.steps == []


def test_a_file_that_arrives_damaged_fails_the_step(house: House) -> None:
    """The last look is sha256sum's in the image, whatever happened on the way."""
    fill(house)

    result = house.old("COPY tree /deep/t", spoils="one")
    assert result.outcome.message == "the files did not arrive as they were sent"
    assert result.output(2, "stderr").startswith(b"0/one: FAILED\n")


@pytest.mark.parametrize("size", [3, 9])
def test_a_source_that_changes_meanwhile_fails_the_build(house: House, size: int) -> None:
    path = house.file("late", "12345")
    house.on_output = lambda: path.write_text("x" * size)
    result = house.old("RUN echo started\nCOPY late /late")
    assert isinstance(result.outcome.error, InputError)
    assert "late" in result.outcome.message

"""Configuring a machine from its metadata: what is written, what is refused, and that twice is once."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.guest.configure import Entrypoint, Paths, configure
from firebuild_bootstrap.guest.errors import InputError

pytestmark = pytest.mark.root

ED = "ssh-ed25519 " + base64.b64encode(b"x" * 51).decode()
NASTY = "a'b\"c$(touch /pwned)`id`\n\\end; exit 9"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image"
    (image / "etc").mkdir(parents=True)
    (image / "home/app").mkdir(parents=True)
    os.chown(image / "home/app", 1000, 1001)
    (image / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:\n")
    return image


def apply(image: Path, **document: Any) -> list[str]:
    return configure(document, str(image), Paths())


def refusal(image: Path, **document: Any) -> str:
    before = sorted(str(path) for path in image.rglob("*"))
    with pytest.raises(InputError) as caught:
        apply(image, **document)
    assert sorted(str(path) for path in image.rglob("*")) == before
    assert caught.value.exit_status == 2
    return caught.value.message


def test_variables_come_out_of_a_shell_as_they_went_in(image: Path) -> None:
    apply(image, Env={"NASTY": NASTY, "PLAIN": "1", "EMPTY": ""})
    file = image / "etc/profile.d/firebuild.sh"
    script = f'. {file}; printf "%s|" "$NASTY" "$PLAIN" "$EMPTY"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout.decode() == f"{NASTY}|1||"
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A=B", "A B", "$(id)", "Ä", "A\n"])
def test_a_name_that_no_shell_takes_is_refused(image: Path, name: str) -> None:
    assert "not the name of a variable" in refusal(image, Env={name: "x"})


@pytest.mark.parametrize("value", ["a\0b", 5, None])
def test_a_value_that_is_no_text_is_refused(image: Path, value: Any) -> None:
    assert "A is not text" in refusal(image, Env={"A": value})


def test_the_hostname_and_its_addresses_are_written_and_own_lines_kept(image: Path) -> None:
    (image / "etc/hosts").write_text("127.0.0.1 localhost\n10.0.0.9 mine")
    network = {"Interfaces": {"b": {"IP": "10.0.0.3/24"}, "a": {"IP": "fd00::1"}, "c": {}}}
    for _ in range(2):
        apply(image, LocalHostname="box.example.org", Network=network)
    assert (image / "etc/hostname").read_text() == "box.example.org\n"
    assert (image / "etc/hosts").read_text() == (
        "127.0.0.1 localhost\n10.0.0.9 mine\n# begin of what vminit manages\n"
        "::1 localhost ip6-localhost ip6-loopback\nfd00::1 box.example.org box\n"
        "10.0.0.3 box.example.org box\n"
        "# end of what vminit manages\n"
    )


def test_a_hosts_file_that_begins_the_block_again_and_again_takes_no_time_of_its_own(image: Path) -> None:
    (image / "etc/hosts").write_text("# begin of what vminit manages\n" * 30_000 + "\n" * 30_000)
    begin = time.process_time()
    apply(image, LocalHostname="box")
    assert time.process_time() - begin < 3
    text = (image / "etc/hosts").read_text()
    assert text.endswith("127.0.1.1 box\n# end of what vminit manages\n")
    apply(image, LocalHostname="box")
    assert (image / "etc/hosts").read_text().count("127.0.1.1 box") == 1


def test_a_hostname_without_addresses_is_a_loopback_name(image: Path) -> None:
    apply(image, LocalHostname="box")
    assert "127.0.0.1 localhost\n" in (image / "etc/hosts").read_text()
    assert "127.0.1.1 box\n" in (image / "etc/hosts").read_text()


@pytest.mark.parametrize(
    "name", ["-a", "a-", "a_b", "a..b", "a b", "a\n", ".", "x" * 65, "ä", "a;b", "x." * 30 + "y-"]
)
def test_what_is_no_hostname_is_refused(image: Path, name: str) -> None:
    assert "is not a host name" in refusal(image, LocalHostname=name)


def test_what_is_no_address_is_refused(image: Path) -> None:
    assert "'1.2.3'" in refusal(image, LocalHostname="a", Network={"Interfaces": {"m": {"IP": "1.2.3"}}})


def test_keys_are_added_once_with_the_right_owner_and_modes(image: Path) -> None:
    ssh = image / "home/app/.ssh"
    ssh.mkdir(mode=0o755)
    (ssh / "authorized_keys").write_text("own key\x1dkept")
    for _ in range(2):
        apply(image, Users={"app": {"SSHKeys": f"# comment\n\n{ED} me\n{ED} me\n"}})
    assert (ssh / "authorized_keys").read_text() == f"own key\x1dkept\n{ED} me\n"
    for path, mode in ((ssh, 0o700), (ssh / "authorized_keys", 0o600)):
        status = path.lstat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 1001, mode)


@pytest.mark.parametrize("where", [".ssh", ".ssh/authorized_keys"])
def test_keys_are_not_written_through_links(image: Path, tmp_path: Path, where: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("kept")
    link = image / "home/app" / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim if where == ".ssh" else "/etc/passwd")
    with pytest.raises(InputError, match="found a symbolic link; keys are not written there"):
        apply(image, Users={"app": {"SSHKeys": ED}})
    assert "app:x:1000" in (image / "etc/passwd").read_text()
    assert [path.name for path in victim.iterdir()] == ["file"]


def test_a_pipe_in_place_of_the_keys_is_refused(image: Path) -> None:
    (image / "home/app/.ssh").mkdir()
    os.mkfifo(image / "home/app/.ssh/authorized_keys")
    with pytest.raises(InputError, match="expected a file, found something else"):
        apply(image, Users={"app": {"SSHKeys": ED}})


@pytest.mark.parametrize(
    "line",
    ["nonsense", "ssh-ed25519", "ssh-ed25519 !!!", "ssh-ed25519 ", f"{ED} a\x07", f'command="x" {ED}'],
)
def test_what_is_no_key_is_refused_with_its_line(image: Path, line: str) -> None:
    said = refusal(image, Users={"app": {"SSHKeys": f"{ED}\n{line}\n"}})
    assert "SSHKeys of app, line 2" in said
    assert "\a" in line or "line 2: expected `type base64 comment`" in said


def test_an_unknown_user_or_a_missing_home_is_an_error(image: Path) -> None:
    with pytest.raises(InputError, match="no user 'other'"):
        apply(image, Users={"other": {"SSHKeys": ED}})
    with pytest.raises(InputError, match="the home /root of root does not exist"):
        apply(image, Users={"root": {"SSHKeys": ED}})


def entrypoint(image: Path, document: dict[str, Any], *arguments: str, **more: Any) -> str:
    apply(image, EntrypointJSON=json.dumps(document), **more)
    script = (image / "usr/bin/firebuild-entrypoint").read_text()
    # The paths in the script are those of the image; the test has no such root to run it in.
    script = script.replace("/etc/profile.d", f"{image}/etc/profile.d")
    done = subprocess.run(["sh", "-c", script, "runner", *arguments], capture_output=True, check=True)
    return done.stdout.decode()


def test_the_entrypoint_runs_with_its_arguments_variables_and_directory(image: Path) -> None:
    show = 'printf "%s|" "$0" "$@" "$A" "$B" "$PWD"'
    document = {"EntryPoint": ["sh", "-c", show], "Cmd": [NASTY], "Env": {"A": NASTY}, "Workdir": "/usr"}
    assert (
        entrypoint(image, document, "extra arg", Env={"B": "env"}) == f"{NASTY}|extra arg|{NASTY}|env|/usr|"
    )
    assert (image / "usr/bin/firebuild-entrypoint").stat().st_mode & 0o777 == 0o755


def test_the_old_form_with_values_is_read_too(image: Path) -> None:
    document = {
        "cmd": {"OriginalCommand": "CMD x", "Values": ["pwd"]},
        "Workdir": {"Value": "/tmp"},
        "User": {"Value": "0:0"},
        "Entrypoint": None,
    }
    assert entrypoint(image, document) == "/tmp\n"


@pytest.mark.parametrize(
    ("user", "shown"), [("1000:7", "1000 7"), ("1000", "1000 1000"), ("nobody", "65534 65534")]
)
def test_the_entrypoint_becomes_its_user(image: Path, user: str, shown: str) -> None:
    document = {
        "Cmd": ["sh", "-c", "echo $(id -u) $(id -g)"],
        "User": user.replace("nobody", "nobody:nogroup"),
    }
    assert entrypoint(image, document) == f"{shown}\n"


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"Users": {"nobody-here": {"SSHKeys": ED}}}, "the image has no user 'nobody-here'"),
        ({"Users": {"linked": {"SSHKeys": ED}}}, "expected a file, found a symbolic link"),
        ({"Env": {"A": "\ud800"}}, "a text that is not Unicode"),
        ({"EntrypointJSON": '{"Cmd": ["\\ud800"]}'}, "a text that is not Unicode"),
    ],
)
def test_nothing_is_written_where_anything_is_wrong(
    image: Path, document: dict[str, Any], words: str
) -> None:
    with (image / "etc/passwd").open("a") as passwd:
        passwd.write(f"linked:x:{os.getuid()}:{os.getgid()}::/linked:/bin/sh\n")
    (image / "linked/.ssh").mkdir(parents=True)
    (image / "linked/.ssh/authorized_keys").symlink_to("elsewhere")
    others = {"LocalHostname": "vm1", "Env": {"B": "b"}, "EntrypointJSON": '{"Cmd": ["x"]}'}
    assert words in refusal(image, **{**others, **document})


def test_no_entrypoint_no_runner(image: Path) -> None:
    apply(image, EntrypointJSON="")
    assert not (image / "usr").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "EntrypointJSON of the metadata is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"Cmd": "x"}', "Cmd in EntrypointJSON"),
        ('{"Cmd": {"Values": [1]}}', "Cmd in EntrypointJSON"),
        ('{"User": 5}', "User in EntrypointJSON: expected a string"),
        ('{"Env": []}', ""),
        ('{"Env": {"A": 1}}', "Env in EntrypointJSON"),
        ('{"Cmd": ["a\\u0000"]}', "the metadata has a NUL in"),
        ('{"Cmd": ["a"], "Env": {"A B": ""}}', "not the name of a variable"),
    ],
)
def test_a_malformed_entrypoint_is_refused(image: Path, text: str, words: str) -> None:
    if not words:  # empty is empty, whatever its brackets
        apply(image, EntrypointJSON=text)
        return
    assert words in refusal(image, EntrypointJSON=text)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"Env": "x"}, "Env of the metadata: expected an object"),
        ({"LocalHostname": 5}, "LocalHostname of the metadata: expected text"),
        ({"Users": {"app": "x"}}, "app of the metadata: expected an object"),
    ],
)
def test_members_of_a_wrong_type_are_refused(image: Path, document: dict[str, Any], words: str) -> None:
    assert words in refusal(image, **document)


def test_a_root_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none: No such file"):
        configure({}, str(tmp_path / "none"), Paths())


def test_files_that_are_links_are_written_inside_the_image(image: Path, tmp_path: Path) -> None:
    (tmp_path / "hostname").write_text("host's own")
    (image / "hostname").write_text("old")
    (image / "etc/hostname").symlink_to("../../hostname")
    apply(image, LocalHostname="box")
    assert (tmp_path / "hostname").read_text() == "host's own"
    assert (image / "hostname").read_text() == "box\n"


def test_the_running_machine_gets_its_name_only_as_root_directory(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[str] = []
    configure({"LocalHostname": "box"}, str(image), Paths(), set_hostname=named.append)
    assert named == []
    paths = Paths(*(f"{image}{path}" for path in ("/env", "/hostname", "/hosts", "/runner")))
    assert configure({"LocalHostname": "box"}, "/", paths, set_hostname=named.append) == []
    assert named == ["box"]

    def refuse(name: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    notes = configure({"LocalHostname": "box"}, "/", paths, set_hostname=refuse)
    assert notes == ["the running machine keeps its name: Operation not permitted"]


def test_a_users_file_that_cannot_be_read_is_an_error(image: Path) -> None:
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").mkdir()
    with pytest.raises(InputError, match="/etc/passwd of the image can't be read"):
        apply(image, Users={"app": {"SSHKeys": ED}})


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("1500", "--reuid=+1500 --regid=+1500 --clear-groups"),
        ("1500:1600", "--reuid=+1500 --regid=+1600 --clear-groups"),
        ("app:1600", "--reuid=app --regid=+1600 --clear-groups"),
        ("app", "--reuid=app --regid=app --init-groups"),
    ],
)
def test_an_entrypoints_number_is_an_id_even_where_it_is_a_name(user: str, words: str) -> None:
    assert words in Entrypoint(argv=("x",), user=user).script("/env")

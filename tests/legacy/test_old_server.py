"""Our vminit with a server as they are in the field."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest.bootstrap import bootstrap
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.errors import GuestError
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.legacy.old_server import OldServer as Calls
from firebuild_bootstrap.legacy.old_server import adapted, decoded
from firebuild_bootstrap.mmds import DataStore, MetadataEmulator
from firebuild_bootstrap.mmds.protocol import MmdsVersion
from firebuild_bootstrap.sandbox import Bind, IdMap, Runtime, Sandbox
from legacy.go_certificates import NAME, Authority, Form, KeyKind, intermediate, new_key, pem_key, root
from legacy.house import make_image
from legacy.old_server import CHUNK, OldBuild, OldServer

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("busybox")]


@dataclass
class Credentials:
    ca_chain: bytes
    client_ca: bytes
    server: tuple[bytes, bytes]
    guest: tuple[bytes, bytes]


def credentials(
    issuer: Authority, chain: bytes, kind: KeyKind = "rsa", form: Form = "traditional"
) -> Credentials:
    server, guest = new_key("rsa"), new_key(kind)
    return Credentials(
        chain,
        chain,
        (pem_key(server, "traditional"), issuer.issue(3, server)),
        (pem_key(guest, form), issuer.issue(4, guest)),
    )


@dataclass
class Place:
    """An image, a context, and everything that our vminit needs to build."""

    directory: Path
    runtime: Runtime
    idmap: IdMap
    credentials: Credentials
    build: OldBuild
    ping_interval: str = "5s"

    @property
    def image(self) -> Path:
        return self.directory / "image"

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        path = self.build.context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def server(self) -> tuple[OldServer, dict[str, str]]:
        key, certificate = self.credentials.server
        server = OldServer(self.build, key=key, certificate=certificate, client_ca=self.credentials.client_ca)
        return server, {
            "HostPort": f"127.0.0.1:{server.port}",
            "CAChain": self.credentials.ca_chain.decode(),
            "Cert": self.credentials.guest[1].decode(),
            "Key": self.credentials.guest[0].decode(),
            "ServerName": NAME,
            "PingInterval": self.ping_interval,
        }

    def join(self) -> None:
        """Make the first call, which is all that credentials are for."""
        server, block = self.server()
        stop = Stop()
        client = Client(wire.BootstrapBlock.from_json(block), stop)
        with server, Calls(client, stop, 5.0) as calls:
            assert [step.original for step in calls.steps()] == ["RUN true"]
            client.close()
        stop.close()

    def vminit(self) -> tuple[OldServer, int, str]:
        """Build, in a sandbox where something has to run."""
        if os.geteuid() == 0 and not any("Shell" in command for command in self.build.commands):
            return self._vminit_here()
        server, block = self.server()
        store = DataStore()
        store.put({"latest": {"meta-data": {"Bootstrap": block}}})
        emulator = MetadataEmulator(store, ("127.0.0.1", 0), version=MmdsVersion.V1)
        argv = [*self.runtime.module("firebuild_bootstrap.guest.main"), "--root", "/image", "--mmds"]
        binds = [*self.runtime.binds, Bind(self.image, "/image", read_only=False)]
        with server:
            try:
                process = Sandbox(self.idmap).popen(
                    [*argv, emulator.start()], binds=binds, env=self.runtime.env, stderr=subprocess.PIPE
                )
                try:
                    _, stderr = process.process.communicate(timeout=60)
                finally:
                    process.kill()
            finally:
                emulator.stop()
        status = process.poll()
        assert status is not None
        return server, status, stderr.decode()

    def _vminit_here(self) -> tuple[OldServer, int, str]:
        server, block = self.server()
        with server:
            try:
                bootstrap(wire.BootstrapBlock.from_json(block), str(self.image), sync=False)
            except GuestError as error:
                return server, error.exit_status, error.message
        return server, 0, ""

    def succeed(self) -> OldServer:
        server, status, words = self.vminit()
        assert (status, server.succeeded, server.aborted) == (0, 1, []), words
        return server

    def fail(self) -> str:
        server, status, words = self.vminit()
        assert (status, server.succeeded, len(server.aborted)) == (1, 0, 1), words
        return server.aborted[0]

    def tree(self) -> dict[str, str]:
        """What the build made: content of files, `dir` or `-> text`."""
        known = {"bin", "dev", "proc", "etc", "home"}
        found = {}
        for path in sorted(self.image.rglob("*")):
            name = str(path.relative_to(self.image))
            if name.split("/", maxsplit=1)[0] not in known:
                found[name] = "dir" if path.is_dir() else path.read_text()
        return found

    def facts(self, name: str) -> tuple[str, int, int]:
        status = (self.image / name).stat()
        return oct(stat.S_IMODE(status.st_mode)), status.st_uid, status.st_gid


@pytest.fixture(scope="session")
def go_root() -> Authority:
    return root()


@pytest.fixture(scope="session")
def go_credentials(go_root: Authority) -> Credentials:
    return credentials(go_root, go_root.pem)


@pytest.fixture
def place(tmp_path: Path, runtime: Runtime, idmap: IdMap, go_credentials: Credentials) -> Place:
    (tmp_path / "context").mkdir()
    make_image(tmp_path / "image")
    return Place(tmp_path, runtime, idmap, go_credentials, OldBuild(tmp_path / "context"))


def test_files_end_up_where_the_dockerfile_says(place: Place) -> None:
    place.file("a.txt", b"A", 0o640)
    place.file("d/one", b"1")
    place.file("d/sub/two", b"2", 0o755)
    place.file("etc/test", b"T")
    build = place.build
    build.workdir = "/srv/app"
    build.copy("a.txt", "/absolute/name")
    build.copy("./a.txt", "relative")
    build.copy("etc/test", "into/")
    build.copy("d", "/tree")
    build.copy("./d/", "tree", keyword="ADD")
    build.copy("/etc/test", "/from-stage", stage="builder")
    server = place.succeed()
    assert place.tree() == {
        **dict.fromkeys(("absolute", "srv", "srv/app", "srv/app/into"), "dir"),
        "absolute/name": "A",
        "srv/app/relative": "A",
        "srv/app/into/test": "T",
        "tree": "dir",
        "tree/one": "1",
        "tree/sub": "dir",
        "tree/sub/two": "2",
        "srv/app/tree": "dir",
        "srv/app/tree/one": "1",
        "srv/app/tree/sub": "dir",
        "srv/app/tree/sub/two": "2",
        "from-stage": "T",
    }
    owner = (os.geteuid(), os.getegid())
    assert place.facts("absolute/name") == ("0o640", *owner)
    assert place.facts("tree/sub/two") == ("0o755", *owner)
    assert server.requests[-1] == ("builder:///etc/test", "")


def test_a_file_from_a_stage_takes_the_name_that_is_written(place: Place) -> None:
    place.file("out/app", b"APP", 0o755)
    place.file("out/other", b"OTHER")
    (place.image / "opt").mkdir()
    build = place.build
    build.workdir = "/w"
    build.copy("/out/app", "/usr/bin/tool", stage="builder")
    build.copy("/out/other", "./below/", stage="builder")
    build.copy("/out/app", "/opt", stage="second")
    place.succeed()
    tree = place.tree()
    assert (tree["usr/bin/tool"], tree["w/below/other"], tree["opt/app"]) == ("APP", "OTHER", "APP")
    assert place.facts("usr/bin/tool") == ("0o755", os.geteuid(), os.getegid())


def test_a_directory_from_a_stage_is_not_mixed_up_in_silence(place: Place) -> None:
    place.file("out/x", b"X")
    place.file("out/y", b"Y")
    place.build.copy("/out", "/dst", stage="builder")
    said = place.fail()
    assert "the file for /dst/y in place of the one for /dst/x" in said
    assert "copy each by itself" in said
    assert place.tree() == {}


def test_two_copies_of_one_source_have_a_target_each(place: Place) -> None:
    place.file("a", b"A")
    place.file("d/sub/f", b"F")
    place.build.copy("a", "/first")
    place.build.workdir = "/w"
    place.build.copy("a", "second")
    for source, target in (
        ("d", "/t1"),
        ("d", "/t2"),
        (".", "/all"),
        (".", "/everything"),
        ("./d/", "/t3"),
        ("./d/", "/t4"),
    ):
        place.build.copy(source, target)
    place.succeed()
    tree = place.tree()
    assert (tree["first"], tree["w/second"]) == ("A", "A")
    for name in ("t1", "t2", "t3", "t4", "all/d", "everything/d"):
        assert tree[f"{name}/sub/f"] == "F"


@pytest.mark.root
def test_owners_are_the_servers_and_names_are_looked_up(place: Place) -> None:
    place.file("a", b"A")
    place.build.copy("a", "/named", chown="app:staff")
    place.build.copy("./a", "/numbered", chown="7")
    place.build.user = "bare"
    place.build.copy("../context/a", "/users")
    place.succeed()
    assert place.facts("named")[1:] == (1000, 50)
    assert place.facts("numbered")[1:] == (7, 7)
    assert place.facts("users")[1:] == (1002, 1002)


def meant(build: OldBuild) -> list[wire.RunCommand]:
    """What vminit makes of the commands, all of which are RUN."""
    steps = adapted(decoded([json.dumps(command) for command in build.commands]))
    return [step for step in steps if isinstance(step, wire.RunCommand)]


def test_run_gets_the_variables_that_were_meant(place: Place) -> None:
    build = place.build
    build.env |= {"A": '"two words"', "B": "'single $A'", "C": "plain", "D": 'x"y', "E": r'"a\"b"', "F": '"'}
    build.args |= {"G": '"arg"', "A": "hidden"}
    build.run("RUN env")
    [step] = meant(build)
    assert step.env == {"A": "two words", "B": "single $A", "C": "plain", "D": 'x"y', "E": 'a"b', "F": '"'}
    assert step.args == {"G": "arg", "A": "hidden"}


def test_an_exec_form_is_one_command_again(place: Place) -> None:
    build = place.build
    for _ in range(2):
        build.run('RUN ["/bin/echo", "$A", "two  words"]', "/bin/echo", "$A", "two  words")
    build.run('RUN --x=y [ "/bin/pwd" ]', "/bin/pwd")
    build.run('run ["/bin/echo", "lower"]', "/bin/echo", "lower")
    build.run("RUN [ -d / ] && echo [shell]", "[ -d / ] && echo [shell]")
    build.run('RUN ["/bin/echo", "cut"', '["/bin/echo", "cut" ] || echo no list')
    build.run("RUN [1]", "echo no words")
    build.run('RUN ["/bin/echo", "alone"]', "echo incomplete")
    shell = ("/bin/sh", "-c")
    assert [step.argv for step in meant(build)] == [
        *[("/bin/echo", "$A", "two  words")] * 2,
        ("/bin/pwd",),
        ("/bin/echo", "lower"),
        (*shell, "[ -d / ] && echo [shell]"),
        (*shell, '["/bin/echo", "cut" ] || echo no list'),
        (*shell, "echo no words"),
        (*shell, "echo incomplete"),
    ]


def test_what_old_guests_skip_in_silence_is_executed(place: Place) -> None:
    place.file("a", b"A")
    place.build.run("", "echo VOLUME of an old server comes without its instruction")
    place.build.run("run echo lower case", "echo lower case")
    place.build.copy("a", "/b", keyword="copy")
    place.build.run("LABEL a=b", "echo not this")
    place.build.run("RUN echo done")
    said = place.succeed().lines["StdOut"]
    assert said == [
        "VOLUME of an old server comes without its instruction",
        "lower case",
        "done",
    ]
    assert place.tree() == {"b": "A"}


def test_run_has_its_user_and_workdir_and_output_is_lines_of_text(place: Place) -> None:
    place.build.workdir = "/made/by/run"
    place.build.run(r"RUN pwd; id -un; printf 'one\n two \377\nrest'; echo err >&2")
    server = place.succeed()
    assert server.lines == {
        "StdOut": ["/made/by/run", "root", "one", " two \ufffd", "rest"],
        "StdErr": ["err"],
    }


def test_a_run_that_fails_aborts(place: Place) -> None:
    place.build.run("RUN exit 3")
    place.build.run("RUN touch /ran")
    assert place.fail() == "the command exited with status 3"
    assert place.tree() == {}


def test_commands_come_before_the_first_ping(place: Place) -> None:
    place.ping_interval = "100ms"
    place.build.run("RUN sleep 1")
    calls = place.succeed().calls
    assert (calls[0], calls.count("Commands")) == ("Commands", 1)
    assert "Ping" in calls


# --- what such servers get wrong ------------------------------------------------------------------------


def test_a_server_that_knows_no_pings_is_not_taken_for_lost(place: Place) -> None:
    place.ping_interval = "100ms"
    place.build.pings = False
    place.build.run("RUN sleep 1")
    assert "Ping" not in place.succeed().calls


def test_a_large_file_by_itself_arrives(place: Place) -> None:
    data = os.urandom(CHUNK) + os.urandom(CHUNK) + b"end"
    place.file("large", data)
    place.build.copy("large", "/large")
    place.succeed()
    assert (place.image / "large").read_bytes() == data


def test_a_large_file_in_a_directory_is_not_lost_in_silence(place: Place) -> None:
    place.file("d/large", os.urandom(CHUNK + 5))
    place.build.copy("d", "/d")
    message = place.fail()
    assert "d/large: the checksum of a chunk is wrong after 0 bytes" in message
    assert "copy such a file by itself" in message
    assert not (place.image / "d/large").exists()


@pytest.mark.parametrize("text", [".", "nowhere"])
def test_a_link_that_the_server_can_not_read_does_not_hang(place: Place, text: str) -> None:
    place.file("d/f", b"F")
    (place.build.context / "d/link").symlink_to(text)
    place.build.copy("d", "/d")
    assert "d/link: the server sends nothing but empty chunks" in place.fail()


def test_a_source_that_does_not_exist_aborts(place: Place) -> None:
    place.build.copy("nothing", "/x")
    assert place.fail() == "the server sent no files for 'nothing': there is no such source"


def test_an_error_of_the_server_is_not_the_end_of_the_files(place: Place) -> None:
    place.build.copy("gone", "/x")
    place.build.resources.clear()
    server, status, words = place.vminit()
    assert (status, server.succeeded) == (4, 0)
    assert "not found: '/gone'" in words
    assert "not found: '/gone'" in server.aborted[0]


# --- credentials ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("rsa", "pkcs8"),
        ("p256", "pkcs8"),
        ("p256", "traditional"),
        ("p384", "pkcs8"),
        ("p384", "traditional"),
    ],
)
def test_keys_of_every_form_are_taken(place: Place, go_root: Authority, kind: KeyKind, form: Form) -> None:
    place.credentials = credentials(go_root, go_root.pem, kind, form)
    place.build.run("RUN true")
    place.join()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_chain_may_come_in_any_order(place: Place, order: tuple[int, int]) -> None:
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("root", "middle")]
    top = root(names[0])
    middle = intermediate(top, names[1])
    pems = (top.pem, middle.pem)
    place.credentials = credentials(middle, b"\n".join(pems[index] for index in order))
    place.build.run("RUN true")
    place.join()

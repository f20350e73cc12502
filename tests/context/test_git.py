"""Repositories, fetched with the system's git from a plain web server."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap.context import BuildContext, Entry, FetchLimits, open_named
from firebuild_bootstrap.context.git import clone
from firebuild_bootstrap.dockerfile.graph import GitTree
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.solve.inputs import Inputs
from firebuild_bootstrap.sshagent import read_agents
from support import FilesHandler, serving_files

HERE = Location("Dockerfile", 2)
_TIME = 1_600_000_000
_ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "n"), ("EMAIL", "e@x"), ("DATE", f"{_TIME} +0000"))
    },
}

pytestmark = pytest.mark.needs("git")


def git(directory: Path, *words: str, text: str = "") -> str:
    done = subprocess.run(
        ["git", "-c", "protocol.file.allow=always", *words],
        cwd=directory,
        env=_ENVIRONMENT,
        input=text,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


class Server:
    """Two repositories behind a web server, one a submodule of the other."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory = directory
        self.url = url
        module = directory / "module"
        self._commit(module, {"inner": "of the module"})
        git(directory, "clone", "--quiet", "--bare", "module", "module.git")
        main = directory / "main"
        self.first = self._commit(main, {"a": "1", "d/b": "first", "run.sh": "x"}, tag="v1")
        (main / ".gitmodules").write_text('[submodule "m"]\n\tpath = m\n\turl = ../module.git\n')
        git(
            main,
            "-c",
            "protocol.file.allow=always",
            "submodule",
            "--quiet",
            "add",
            "--force",
            "../module",
            "m",
        )
        git(main, "config", "--file", ".gitmodules", "submodule.m.url", "../module.git")
        (main / "run.sh").chmod(0o755)
        (main / "link").symlink_to("a")
        self.second = self._commit(main, {"a": "2"})
        git(main, "branch", "--quiet", "other", "v1")
        git(directory, "clone", "--quiet", "--bare", "main", "main.git")
        for name in ("module.git", "main.git"):
            git(directory / name, "update-server-info")

    @staticmethod
    def _commit(directory: Path, files: dict[str, str], tag: str = "") -> str:
        if not directory.exists():
            directory.mkdir()
            git(directory, "init", "--quiet", "--initial-branch=main")
        for name, content in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(content)
        git(directory, "add", "--all")
        git(directory, "commit", "--quiet", "--message", "m")
        if tag:
            git(directory, "tag", "--annotate", "--message", "m", tag)
        return git(directory, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("repositories")
    with serving_files(directory) as address:
        yield Server(directory, f"http://{address}/main.git")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[BuildContext]:
    with BuildContext(tmp_path) as context:
        yield context


def sent(context: BuildContext, tree: GitTree, *exclude: str) -> dict[str, Entry]:
    entries = context.resource([tree], exclude=exclude, location=HERE).entries()
    return {entry.path: entry for entry in entries}


def content(entry: Entry) -> bytes:
    assert entry.open is not None
    with entry.open() as file:
        return file.read()


def test_a_repository_becomes_its_files_with_the_time_of_the_commit(
    server: Server, context: BuildContext
) -> None:
    entries = sent(context, GitTree(server.url))
    assert list(entries) == ["", ".gitmodules", "a", "d", "d/b", "link", "m", "m/inner", "run.sh"]
    assert content(entries["a"]) == b"2"
    assert content(entries["m/inner"]) == b"of the module"
    assert (entries["a"].mode, entries["run.sh"].mode, entries["d"].mode) == (0o644, 0o755, 0o755)
    assert (entries["link"].kind, entries["link"].link_target) == (tar.SYMLINK, "a")
    assert {entry.mtime_ns for entry in entries.values()} == {_TIME * 10**9}
    assert {entry.owner for entry in entries.values()} == {None}


def test_refs_directories_and_submodules_are_chosen(server: Server, context: BuildContext) -> None:
    for ref in ("v1", "refs/tags/v1", "other", server.first, server.first[:10]):
        entries = sent(context, GitTree(server.url, ref, submodules=False))
        assert content(entries["a"]) == b"1", ref
    assert list(sent(context, GitTree(server.url, "v1", "d"))) == ["", "b"]
    without = sent(context, GitTree(server.url, submodules=False), "d", "*.sh")
    assert list(without) == ["", ".gitmodules", "a", "link", "m"]


@pytest.mark.needs("ssh-agent")
def test_git_is_given_the_agent_of_the_build_for_ssh(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of ssh stands one that asks the agent for its keys, and goes no further than this host."""
    tools = tmp_path / "tools"
    tools.mkdir()
    words = 'shift $(($# - 1)); ssh-add -L > "$0.keys" && exec sh -c "$1"'
    (tools / "ssh").write_text(f"#!/bin/sh\ncase $* in *-G*) exit 1; esac\n{words}\n")
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    words_of_keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tools / "id")]
    subprocess.run(words_of_keygen, check=True)
    agent = read_agents([f"default={tools}/id"], {})["default"]
    tree = GitTree(f"ssh://git@host{server.directory}/module.git")
    with BuildContext(tmp_path, agent=agent) as context:
        assert content(sent(context, tree)["inner"]) == b"of the module"
    public = (tools / "id.pub").read_text().split()[:2]
    assert (tools / "ssh.keys").read_text().split()[:2] == public
    (tools / "ssh.keys").unlink()
    with open_named("n", tree, lambda: tmp_path, Tasks(), agent=agent) as named:
        assert named.root.joinpath("inner").read_text() == "of the module"
    assert (tools / "ssh.keys").read_text().split()[:2] == public
    with BuildContext(tmp_path) as context, pytest.raises(InputError, match="can't be fetched"):
        sent(context, tree)


def test_the_git_directory_is_kept_on_request(server: Server, context: BuildContext) -> None:
    entries = sent(context, GitTree(server.url, "v1", keep_git_dir=True))
    assert ".git/HEAD" in entries
    assert content(entries["a"]) == b"1"
    # They tell of this host and of this fetch.
    assert not [path for path in entries if path.endswith("FETCH_HEAD") or path.startswith(".git/logs")]


def test_a_commit_has_one_digest_wherever_it_is_fetched(server: Server, tmp_path: Path) -> None:
    digests = []
    for name, ref in (("one", "v1"), ("two", "v1"), ("three", "main")):
        (tmp_path / name).mkdir()
        tree = GitTree(server.url, ref, keep_git_dir=True)
        with BuildContext(tmp_path / name) as context:
            resource = context.resource([tree], location=HERE)
            digests.append(Inputs({}, {}, {(0, 0): resource}, tmp_path / "stat").commit(tree, (0, 0)))
    assert digests[0] == digests[1] != digests[2]


def test_each_step_counts_by_what_it_has_of_a_repository(
    server: Server, context: BuildContext, tmp_path: Path
) -> None:
    tree = GitTree(server.url, "v1")
    whole, less = context.resource([tree]), context.resource([tree], exclude=["d"])
    inputs = Inputs({}, {}, {(0, 0): whole, (0, 1): less}, tmp_path / "stat")
    alone = Inputs({}, {}, {(0, 0): whole}, tmp_path / "stat")
    assert inputs.commit(tree, (0, 0)) == alone.commit(tree, (0, 0)) != inputs.commit(tree, (0, 1))


def test_the_commit_has_to_be_the_expected_one(server: Server, context: BuildContext) -> None:
    assert sent(context, GitTree(server.url, "v1", checksum=server.first[:12]))
    with pytest.raises(InputError) as caught:
        sent(context, GitTree(server.url, "main", checksum=server.first))
    assert f"expected the commit {server.first}, found {server.second}" in caught.value.message


@pytest.mark.parametrize(
    ("ref", "directory", "message"),
    [
        ("nowhere", "", "can't be fetched: couldn't find remote ref nowhere"),
        ("0123456789", "", "can't be fetched: "),
        ("v1", "nowhere", "'nowhere' is not in the repository http://127.0.0.1"),
        ("v1", "a", "'a' of the repository http://127.0.0.1"),
        ("--upload-pack=touch x", "", "can't be fetched: "),
    ],
)
def test_what_is_not_there_is_an_error(
    server: Server, context: BuildContext, ref: str, directory: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        sent(context, GitTree(server.url, ref, directory))
    assert message in caught.value.message
    assert caught.value.location == HERE


def test_a_repository_that_is_not_there_is_an_error_without_its_password(
    server: Server, context: BuildContext
) -> None:
    with pytest.raises(InputError) as caught:
        sent(context, GitTree(server.url.replace("://", "://me:s3cret@").replace("main", "nowhere")))
    assert "nowhere.git can't be fetched" in caught.value.message
    assert "s3cret" not in str(caught.value)


class _LoggingIn(FilesHandler):
    """Serves those who log in, and looks meanwhile for the password in the arguments of all processes."""

    def do_GET(self) -> None:  # noqa: N802 - of http.server
        if self.headers.get("Authorization") != f"Basic {base64.b64encode(b'me@x:s3c%ret').decode()}":
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                assert b"s3c" not in path.read_bytes()
        super().do_GET()


@pytest.fixture(scope="module")
def login_server(server: Server) -> Iterator[str]:
    with serving_files(server.directory, _LoggingIn) as address:
        yield address


def test_a_login_is_in_no_argument_and_not_in_the_git_directory(
    login_server: str, context: BuildContext
) -> None:
    entries = sent(context, GitTree(f"http://me%40x:s3c%25ret@{login_server}/main.git", keep_git_dir=True))
    assert content(entries["m/inner"]) == b"of the module"
    files = {path: content(entry) for path, entry in entries.items() if entry.kind == tar.FILE}
    assert f"url = http://{login_server}/main.git".encode() in files[".git/config"]
    assert not [path for path, text in files.items() if b"s3c" in text]


def test_a_login_goes_to_no_other_server(login_server: str, server: Server, tmp_path: Path) -> None:
    module = tmp_path / "away"
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "away")
    (module / ".gitmodules").write_text(
        f'[submodule "m"]\n\tpath = m\n\turl = http://{login_server}/module.git\n'
    )
    inner = git(server.directory / "module", "rev-parse", "HEAD")
    git(module, "add", ".gitmodules")
    git(module, "update-index", "--add", "--cacheinfo", f"160000,{inner},m")
    git(module, "commit", "--quiet", "--message", "m")
    git(server.directory, "clone", "--quiet", "--bare", str(module), "away.git")
    git(server.directory / "away.git", "update-server-info")
    address = server.url.replace("://", "://me%40x:s3c%25ret@").replace("main", "away")
    with BuildContext(tmp_path) as context, pytest.raises(InputError, match="Failed to clone 'm'"):
        sent(context, GitTree(address))


@pytest.mark.parametrize("login", ["me:a%0Ahost=example.com", "me%00:a"])
def test_a_login_has_no_lines_for_git(login: str, server: Server, context: BuildContext) -> None:
    with pytest.raises(InputError, match="the login in the URL has a line break") as caught:
        sent(context, GitTree(server.url.replace("://", f"://{login}@")))
    assert login not in str(caught.value)


def test_a_proxy_that_git_can_not_read_is_not_shown(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "http_proxy": "http://me:s3c/ret@h"}
    with pytest.raises(InputError, match="HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is malformed") as caught:
        clone(
            GitTree("http://h.example/a.git"),
            tmp_path,
            location=HERE,
            limits=FetchLimits(),
            environment=environment,
        )
    assert "s3c" not in str(caught.value)


def test_a_password_for_ssh_is_refused(context: BuildContext) -> None:
    with pytest.raises(InputError, match="h/a can't be fetched: ssh takes no password from a URL") as caught:
        sent(context, GitTree("ssh://git:s3cret@h/a"))
    assert "s3cret" not in str(caught.value)


def test_what_ssh_says_is_the_reason(
    context: BuildContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git writes four lines below it, which end in "and the repository exists."."""
    (tools := tmp_path / "tools").mkdir()
    (tools / "ssh").write_text(
        "#!/bin/sh\nprintf 'git@host: Permission denied (publickey).\\r\\n' >&2\nexit 255\n"
    )
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(InputError) as caught:
        sent(context, GitTree("git@host:team/app.git"))
    assert caught.value.message.endswith("can't be fetched: git@host: Permission denied (publickey).")
    assert caught.value.hint is not None
    assert "--ssh default" in caught.value.hint
    (tools / "ssh").write_text("#!/bin/sh\nexit 255\n")
    with pytest.raises(InputError, match=r"fetched: Could not read from remote repository\.\n"):
        sent(context, GitTree("git@host:team/app.git"))


def test_a_submodule_that_can_not_be_fetched_is_named_with_the_reason(
    server: Server, context: BuildContext
) -> None:
    work = server.directory / "with-module"
    git(server.directory, "clone", "--quiet", "main", "with-module")
    git(work, "config", "--file", ".gitmodules", "submodule.m.url", "../nowhere.git")
    git(work, "commit", "--quiet", "--all", "--message", "m")
    git(server.directory, "clone", "--quiet", "--bare", "with-module", "with-module.git")
    git(server.directory / "with-module.git", "update-server-info")
    with pytest.raises(InputError) as caught:
        sent(context, GitTree(server.url.replace("main", "with-module")))
    assert "with-module.git can't be fetched: Failed to clone 'm' a second time" in caught.value.message
    assert "/nowhere.git/' not found" in caught.value.message


def test_files_of_this_host_are_no_repository(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transport 'file' not allowed"):
        clone(GitTree(f"file://{tmp_path}"), tmp_path, location=None, limits=FetchLimits())


def test_a_host_without_git_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the program git was not found"):
        clone(
            GitTree("https://host/a.git"),
            tmp_path,
            location=HERE,
            limits=FetchLimits(),
            environment={"PATH": str(tmp_path)},
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF\2\1\1" + bytes(100), "it is damaged, or made for another processor; install it"),
        (
            b"#!/nowhere/sh\n",
            "the interpreter that its first line names, or its loader, is missing; install it",
        ),
    ],
)
def test_a_git_that_can_not_be_executed_is_told_from_a_repository_that_fails(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "git").write_bytes(content)
    (tmp_path / "git").chmod(0o755)
    with pytest.raises(InputError, match="/git can't be started: ") as caught:
        clone(
            GitTree("https://host/a.git"),
            tmp_path,
            location=HERE,
            limits=FetchLimits(),
            environment={"PATH": str(tmp_path)},
        )
    assert words in (caught.value.hint or "")


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    slow = tmp_path / "git"
    slow.write_text('#!/bin/sh\ncase "$*" in *fetch*) sleep 600;; esac\n')
    slow.chmod(0o755)
    with pytest.raises(InputError, match=r"git fetch: it took longer than 0\.3 seconds"):
        clone(
            GitTree("https://host/a.git"),
            tmp_path,
            location=HERE,
            limits=FetchLimits(total_seconds=0.3),
            environment={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )


def bare(server: Server, name: str) -> Path:
    """Make an empty repository that the server has."""
    directory = server.directory / f"{name}.git"
    git(server.directory, "init", "--quiet", "--bare", "--initial-branch=main", directory.name)
    return directory


def bomb(server: Server, levels: int) -> GitTree:
    """Make a repository of a few objects, and ten files to the power of `levels`: all trees are the same."""
    directory = bare(server, f"bomb-{levels}")
    (directory / "zeros").write_bytes(bytes(1 << 20))
    line = f"100644 blob {git(directory, 'hash-object', '-w', 'zeros')}"
    for _ in range(levels):
        tree = "".join(f"{line}\t{number}\n" for number in range(10))
        line = f"040000 tree {git(directory, 'mktree', text=tree)}"
    commit = git(directory, "commit-tree", "-m", "m", line.rpartition(" ")[2])
    git(directory, "update-ref", "refs/heads/main", commit)
    git(directory, "update-server-info")
    return GitTree(server.url.replace("main", directory.stem))


def deep(server: Server, levels: int, name: str) -> GitTree:
    """Make a repository with a file below many directories of one name."""
    directory = bare(server, f"deep-{levels}-{len(name)}")
    head = f"commit refs/heads/main\ncommitter n <e@x> {_TIME} +0000\ndata 1\nm\n"
    path = f"{name}/" * levels + "f"
    git(directory, "fast-import", "--quiet", text=f"{head}M 100644 inline {path}\ndata 1\n1\n")
    git(directory, "update-server-info")
    return GitTree(server.url.replace("main", directory.stem))


@pytest.mark.parametrize(
    ("levels", "name"), [(20, "d" * 203), (1200, "d")], ids=["more than 4096 bytes", "1200 directories"]
)
def test_paths_may_be_as_long_as_git_writes_them(
    server: Server, context: BuildContext, levels: int, name: str
) -> None:
    entries = sent(context, deep(server, levels, name))
    assert list(entries)[-1] == f"{name}/" * levels + "f"
    assert len(entries) == levels + 2
    assert {entry.mtime_ns for entry in entries.values()} == {_TIME * 10**9}


@pytest.mark.parametrize(("levels", "name"), [(20, "d" * 240), (1, "d" * 300)], ids=["path", "name"])
def test_a_path_that_is_longer_than_linux_takes_is_named(
    server: Server, context: BuildContext, levels: int, name: str
) -> None:
    with pytest.raises(InputError, match=r"deep-.*\.git can't be fetched: a path in it is too long .*'ddd"):
        sent(context, deep(server, levels, name))


@pytest.mark.parametrize(
    ("levels", "limits", "message"),
    [
        (1, FetchLimits(total_bytes=8 << 20), "it has more than 8.0 MiB on disk"),
        (3, FetchLimits(total_entries=500), "it has more than 500 files and directories"),
        (9, FetchLimits(memory=64 << 20), "git may have 64.0 MiB of memory: Out of memory"),
    ],
)
def test_a_small_repository_that_becomes_large_is_refused(
    server: Server, tmp_path: Path, levels: int, limits: FetchLimits, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        clone(bomb(server, levels), tmp_path, location=HERE, limits=limits)
    assert f"bomb-{levels}.git can't be fetched: {message}" in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.location == HERE


@pytest.mark.parametrize(
    ("endless", "message"),
    [
        ("while head -c 1048576 /dev/zero >> more; do :; done", "it has more than 8.0 MiB on disk"),
        ("yes", "git fetch: it wrote more than 1048576 bytes"),
        ("yes >&2", "git fetch: it wrote more than 1048576 bytes"),
    ],
)
def test_a_git_that_goes_on_for_ever_is_ended(tmp_path: Path, endless: str, message: str) -> None:
    slow = tmp_path / "git"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *fetch*) {endless};; esac\n')
    slow.chmod(0o755)
    with pytest.raises(InputError) as caught:
        clone(
            GitTree("https://host/a.git"),
            tmp_path,
            location=HERE,
            limits=FetchLimits(total_bytes=8 << 20),
            environment={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        )
    assert f"can't be fetched: {message}" in caught.value.message

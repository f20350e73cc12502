"""`firebuild build` of what Docker calls a remote context: repositories, and what web servers have."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.conftest import Cli, nothing_is_left
from support import serving_files

pytestmark = pytest.mark.needs("userns", "git")

DOCKERFILE = "FROM scratch\nCOPY . /\n"
FILES = {
    "Dockerfile": DOCKERFILE,
    ".dockerignore": "ignored\nDockerfile\n.dockerignore\n",
    "a": "1",
    "ignored": "2",
}


class Web:
    """A web server with an archive, Dockerfiles, and a repository whose context is a directory of it."""

    def __init__(self, directory: Path, url: str) -> None:
        self.url = url
        with tarfile.open(directory / "context.tar.gz", "w:gz") as archive:
            for name, text in FILES.items():
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        (directory / "plain").write_text("FROM scratch\nLABEL plain=yes\n")
        (directory / "copies").write_text("FROM scratch\nCOPY a /\n")
        (directory / "junk").write_bytes(bytes(100))
        work = directory / "work"
        for name, text in FILES.items():
            (work / "dir").mkdir(parents=True, exist_ok=True)
            (work / "dir" / name).write_text(text)
        (work / "dir/outside").symlink_to("/etc/hostname")
        (work / "Dockerfile").symlink_to("/etc/hostname")
        self._git(work, "init", "--quiet", "--initial-branch=main")
        self._git(work, "add", "--all")
        self._git(work, "commit", "--quiet", "--message", "m")
        self.commit = self._git(work, "rev-parse", "HEAD")
        self._git(directory, "clone", "--quiet", "--bare", "work", "r.git")
        self._git(directory / "r.git", "update-server-info")

    @staticmethod
    def _git(directory: Path, *words: str) -> str:
        who = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["git", *words],
            cwd=directory,
            env={
                "PATH": os.environ["PATH"],
                "GIT_CONFIG_NOSYSTEM": "1",
                "GIT_CONFIG_GLOBAL": "/dev/null",
                **who,
            },
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    directory = tmp_path_factory.mktemp("web")
    with serving_files(directory) as address:
        yield Web(directory, f"http://{address}")


def files_of(cli: Cli, tag: str) -> list[str]:
    with tarfile.open(cli("images", "path", tag, "--output", "tar").out.strip()) as archive:
        return sorted(member.name for member in archive if not member.isdir())


def context_of(cli: Cli, tag: str) -> dict[str, object]:
    """What the provenance of an image says of its context."""
    statement = json.loads(cli("images", "provenance", tag).out)
    went_in = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    return next(each for each in went_in if each["name"] == "context")


def test_an_archive_is_a_context(cli: Cli, web: Web) -> None:
    url = web.url.replace("://", "://me:s3cret@")
    done = cli("build", "-t", "t/x", f"{url}/context.tar.gz?key=s3cret")
    assert done.err.startswith(f"fetching {web.url}/context.tar.gz …\n")
    assert "s3cret" not in done.out + done.err
    assert files_of(cli, "t/x") == ["a"]
    found = context_of(cli, "t/x")
    assert found["uri"] == f"{web.url}/context.tar.gz"
    assert isinstance(found["digest"], dict)
    assert len(found["digest"]["sha256"]) == 64
    assert nothing_is_left(cli)


def test_anything_else_is_a_dockerfile_with_an_empty_context(cli: Cli, web: Web) -> None:
    assert cli("build", "-q", "-t", "t/plain", f"{web.url}/plain").err == ""
    assert json.loads(cli("images", "inspect", "t/plain").out)["config"]["Labels"] == {"plain": "yes"}
    done = cli("build", "-q", f"{web.url}/copies", status=2)
    assert done.first == (
        "error: copies:2: 'a' is not in the build context, "
        f"which is empty where the Dockerfile comes from {web.url}/copies"
    )
    assert nothing_is_left(cli)


def test_a_directory_of_a_repository_is_a_context_without_its_git_directory(cli: Cli, web: Web) -> None:
    done = cli("build", "-t", "t/git", f"{web.url}/r.git#main:dir")
    assert done.err.startswith(f"fetching {web.url}/r.git …\n")
    assert files_of(cli, "t/git") == ["a", "outside"]
    found = context_of(cli, "t/git")
    assert found["uri"] == f"git+{web.url}/r.git@main#dir"
    assert isinstance(found["digest"], dict)
    assert found["digest"]["gitCommit"] == web.commit
    cli("build", "-q", "-t", "t/file", "-f", "dir/Dockerfile", f"{web.url}/r.git")
    assert "dir/a" in files_of(cli, "t/file")
    assert nothing_is_left(cli)


@pytest.mark.parametrize("context", ["r.git#main:dir", "context.tar.gz"])
def test_the_dockerfile_may_come_from_standard_input(
    cli: Cli, web: Web, stdin: Callable[[bytes], None], context: str
) -> None:
    stdin(b"FROM scratch\nCOPY a /piped\n")
    cli("build", "-q", "-t", "t/piped", "-f", "-", f"{web.url}/{context}")
    assert files_of(cli, "t/piped") == ["piped"]
    assert nothing_is_left(cli)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("WEB/none", "WEB/none can't be downloaded: the server answered 404 File not found"),
        ("WEB/junk", "WEB/junk holds neither a tar archive nor a Dockerfile"),
        ("-f x WEB/context.tar.gz", "x: the Dockerfile can't be read: No such file or directory"),
        ("-f x WEB/plain", "--file x names a file of the archive WEB/plain, and no archive came"),
        ("WEB/r.git#none", "WEB/r.git can't be fetched: couldn't find remote ref none"),
        ("WEB/r.git#:none", "'none' is not in WEB/r.git"),
        ("WEB/r.git?colour=red", "WEB/r.git: the query 'colour' of a git URL is not known"),
        ("WEB/r.git", "Dockerfile: the Dockerfile can't be read: No such file or directory"),
        ("github.com/a/b", "https://github.com/a/b.git can't be fetched: "),
        ("github.com/a/b.git/#x", "https://github.com/a/b.git can't be fetched: "),
        ("-f WEB/plain .", "--file WEB/plain is a URL, and has to be a file"),
    ],
)
def test_what_can_not_be_built_is_told(
    cli: Cli, web: Web, monkeypatch: pytest.MonkeyPatch, words: str, why: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")  # nothing is asked elsewhere
    done = cli("build", "-q", *words.replace("WEB", web.url).split(), status=2)
    assert done.first.startswith("error: " + why.replace("WEB", web.url))
    assert nothing_is_left(cli)


def test_a_directory_is_never_fetched(cli: Cli) -> None:
    directory = Path("github.com/a")
    directory.mkdir(parents=True)
    (directory / "Dockerfile").write_text("FROM scratch\nLABEL a=b\n")
    cli("build", "-q", "github.com/a")

"""Sources of ADD that are elsewhere: what is a git repository, and what its URL says."""

from __future__ import annotations

import pytest

from dockerfile.planning import Read
from firebuild_bootstrap.dockerfile.graph import Copy, Download, GitTree
from firebuild_bootstrap.dockerfile.operations import read_git
from firebuild_bootstrap.errors import InputError, Location

_COMMIT = "0123456789012345678901234567890123456789"


@pytest.mark.parametrize(
    ("url", "tree"),
    [
        ("https://host/a/b.git", GitTree("https://host/a/b.git")),
        ("http://host/b.git#v1", GitTree("http://host/b.git", "v1")),
        ("https://host/b.git#v1:docs/", GitTree("https://host/b.git", "v1", "docs")),
        ("https://host/b.git#:/../x/./y", GitTree("https://host/b.git", "", "x/y")),
        ("git@host:a/b", GitTree("git@host:a/b")),
        ("git@host:a/b.git#main:d", GitTree("git@host:a/b.git", "main", "d")),
        ("git://host/a", GitTree("git://host/a")),
        ("SSH://git@host:22/a#x", GitTree("SSH://git@host:22/a", "x")),
        ("https://host/b.git?tag=v1", GitTree("https://host/b.git", "refs/tags/v1")),
        ("https://host/b.git?branch=refs/heads/x", GitTree("https://host/b.git", "refs/heads/x")),
        (
            "https://host/b.git?ref=x&subdir=d&keep-git-dir&submodules=false",
            GitTree("https://host/b.git", "x", "d", keep_git_dir=True, submodules=False),
        ),
        (
            f"https://host/b.git?commit={_COMMIT}",
            GitTree("https://host/b.git", _COMMIT, checksum=_COMMIT),
        ),
        ("https://host/b.git?checksum=0123#x", GitTree("https://host/b.git", "x", checksum="0123")),
        ("https://host/b.git?submodules=1", GitTree("https://host/b.git")),
    ],
)
def test_a_repository_is_known_by_its_url(url: str, tree: GitTree) -> None:
    assert read_git(url) == tree


@pytest.mark.parametrize(
    "text",
    ["https://host/b.git/", "https://host/b", "https://b.git", "github.com/a/b", "b.git", "./git@h:x", ""],
)
def test_anything_else_is_no_repository(text: str) -> None:
    assert read_git(text) is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/b.git?colour=red", "the query 'colour' of a git URL is not known"),
        ("https://host/b.git?ref=a&ref=b", "the query ref is given twice"),
        ("https://host/b.git?ref=", "the query ref has no value"),
        ("https://host/b.git?ref=a#b", "ref is given as 'b' and as 'a'"),
        ("https://host/b.git?tag=a&branch=b", "branch and tag can't both be given"),
        ("https://host/b.git?subdir=a#x:b", "subdir is given as 'b' and as 'a'"),
        ("https://host/b.git?keep-git-dir=maybe", "keep-git-dir: expected true or false, found 'maybe'"),
        (
            "https://host/b.git?checksum=x",
            "expected the name of a commit in hexadecimal digits, found 'x'",
        ),
        ("https://host/b.git?keep-git-dir=0", "keep-git-dir of the URL contradicts --keep-git-dir"),
    ],
)
def test_a_url_that_contradicts_itself_is_an_error(read: Read, url: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\nADD --keep-git-dir {url} /x/\n")
    assert caught.value.message == f"ADD {url.partition('?')[0]}: {message}"
    assert caught.value.location == Location("Dockerfile", 2)


@pytest.mark.parametrize("end", ["/f", "/r.git"])
@pytest.mark.parametrize(
    ("login", "message"),
    [
        ("me:s3c/ret", "ADD http://…: after the host is no port; in a password / is written %2F"),
        ("me:s3c#ret", "ADD http://…: after the host is no port"),
        ("me:s3c?ret@more", "ADD http://…: after the host is no port"),
        ("me:s3c℀ret", "ADD http://host:1/{end}: its host is malformed"),
    ],
)
def test_a_password_that_ends_too_soon_is_not_shown(read: Read, login: str, message: str, end: str) -> None:
    with pytest.raises(InputError) as caught:
        read("FROM scratch\nARG U\nADD $U /x/\n", build_args={"U": f"http://{login}@host:1{end}"})
    assert message.replace("/{end}", end) in caught.value.message
    assert "s3c" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:9/f",
        "http://h:/f",
        "http://h:80?a",
        "http://h/a:b@c",
        "http://a:b@h/f",
        "https://a:b:c@h/f",
    ],
)
def test_ports_and_logins_are_where_they_should_be(read: Read, url: str) -> None:
    copy = read(f"FROM scratch\nADD {url} /x/y\n").target.steps[0].operation
    assert isinstance(copy, Copy)
    assert copy.sources == (Download(url),)


def test_flags_belong_to_what_they_are_for(read: Read) -> None:
    digest = "0" * 64
    graph = read(
        f"FROM scratch\nADD --checksum=0a1b --keep-git-dir=true https://host/b.git#v /a/\n"
        f"ADD --checksum=sha256:{digest} --unpack https://host/b.tgz /b/\n"
    )
    git, download = (step.operation for step in graph.target.steps)
    assert isinstance(git, Copy)
    assert isinstance(download, Copy)
    assert git.sources == (GitTree("https://host/b.git", "v", keep_git_dir=True, checksum="0a1b"),)
    assert (download.sources, download.unpack) == (
        (Download("https://host/b.tgz", f"sha256:{digest}"),),
        True,
    )


@pytest.mark.parametrize("url", ["git@host:a/b", "https://me:s3cret@host/b.git", "https://me:s3cret@host/f"])
def test_copy_takes_nothing_from_elsewhere_and_shows_no_secret(read: Read, url: str) -> None:
    with pytest.raises(InputError, match=r"COPY can't (clone|download)") as caught:
        read(f"FROM scratch\nCOPY {url} /x/\n")
    assert "s3cret" not in str(caught.value)

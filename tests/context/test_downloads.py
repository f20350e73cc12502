"""Remote files of ADD, from a real server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from firebuild_bootstrap.context import BuildContext, Entry, FetchLimits
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.graph import Download
from firebuild_bootstrap.dockerfile.operations import file_name
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.lowering import WireStep, lower
from firebuild_bootstrap.solve.inputs import Inputs

HERE = Location("Dockerfile", 5)
BODY = b"downloaded " * 1000  # what the server sends


class Web(Protocol):
    url: str
    requests: list[tuple[str, str | None]]
    proxied: list[str]
    sent: int


@pytest.fixture
def context(tmp_path: Path) -> Iterator[BuildContext]:
    (tmp_path / "context").mkdir()
    limits = FetchLimits(idle_seconds=0.3, total_seconds=0.8)
    with BuildContext(tmp_path / "context", limits=limits) as made:
        yield made


def download(context: BuildContext, url: str, checksum: str = "") -> Entry:
    (entry,) = context.resource([Download(url, checksum)], location=HERE).entries()
    return entry


def error_of(context: BuildContext, url: str, checksum: str = "") -> InputError:
    with pytest.raises(InputError) as caught:
        download(context, url, checksum)
    assert caught.value.location == HERE
    return caught.value


def test_a_download_becomes_a_private_file_named_after_the_url(web: Web, context: BuildContext) -> None:
    entry = download(context, f"{web.url}/dir/dated%20file.txt?token=1")
    assert (entry.path, entry.kind, entry.from_directory) == ("dated file.txt", tar.FILE, False)
    assert (entry.mode, entry.size) == (0o600, len(BODY))
    assert entry.mtime_ns == 1_445_412_480 * 10**9
    assert entry.open is not None
    with entry.open() as file:
        assert file.read() == BODY


def test_it_is_downloaded_once_at_planning_time(web: Web, context: BuildContext) -> None:
    resource = context.resource([Download(f"{web.url}/f")], location=HERE)
    for _ in range(2):
        (entry,) = resource.entries()
        assert entry.open is not None
        entry.open().close()
    assert web.requests == [("/f", None)]


def test_without_a_usable_date_a_download_is_from_1970(web: Web, context: BuildContext) -> None:
    assert download(context, f"{web.url}/f").mtime_ns == 0


def test_an_archive_from_the_web_is_not_unpacked(web: Web, context: BuildContext) -> None:
    resource = context.resource([Download(f"{web.url}/a.tar")], location=HERE, unpack=True)
    assert [entry.path for entry in resource.entries()] == ["a.tar"]


def test_a_download_counts_by_its_bytes_also_where_another_step_unpacks_it(
    web: Web, context: BuildContext, tmp_path: Path
) -> None:
    source = Download(f"{web.url}/f")
    sent = {(0, place): context.resource([source], unpack=place == 1) for place in range(2)}
    inputs = Inputs({}, {}, sent, tmp_path / "stat")
    for place in range(2):
        assert inputs.download(source, (0, place)) == f"sha256:{hashlib.sha256(BODY).hexdigest()}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500, 503])
def test_an_error_page_never_becomes_the_file(web: Web, context: BuildContext, status: int) -> None:
    error = error_of(context, f"{web.url}/status/{status}")
    assert f"the server answered {status}" in error.message
    assert (error.hint or "").startswith("is the URL right?")


@pytest.mark.parametrize("status", [200, 203])
def test_every_kind_of_success_counts(web: Web, context: BuildContext, status: int) -> None:
    assert download(context, f"{web.url}/status/{status}").size == len(b"error page")


@pytest.mark.parametrize("path", ["/short", "/chunked"])
def test_a_download_that_breaks_off_is_an_error(web: Web, context: BuildContext, path: str) -> None:
    error = error_of(context, f"{web.url}{path}")
    assert error.message == f"{web.url}{path} can't be downloaded: the answer was cut off"
    assert (error.hint or "").startswith("try again")


def test_a_server_that_is_silent_is_given_up(web: Web, context: BuildContext) -> None:
    assert "can't be downloaded: no answer in time" in error_of(context, f"{web.url}/silent").message


def test_a_server_that_only_trickles_is_given_up(web: Web, context: BuildContext) -> None:
    assert "it took too long" in error_of(context, f"{web.url}/slow").message
    assert "can't be downloaded: no answer in time" in error_of(context, f"{web.url}/slow-head").message
    assert "can't be downloaded: no answer in time" in error_of(context, f"{web.url}/slow-chunk").message


def test_redirects_are_followed_and_the_name_stays(web: Web, context: BuildContext) -> None:
    entry = download(context, f"{web.url}/redirect//elsewhere")
    assert (entry.path, entry.size) == ("elsewhere", len(BODY))
    assert [path for path, _ in web.requests] == ["/redirect//elsewhere", "/elsewhere"]


def test_what_comes_with_a_redirect_is_not_read(web: Web, context: BuildContext) -> None:
    assert download(context, f"{web.url}/long-redirect/elsewhere").size == len(BODY)
    assert web.sent < 32 << 20  # what is under way when the connection is closed


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("file:///etc/passwd", "redirects to file, which is not http"),
        ("ftp://127.0.0.1/f", "redirects to ftp, which is not http"),
        ("//a:x/", "redirects to no URL"),
    ],
)
def test_a_redirect_to_what_is_no_url_of_http_is_an_error(
    web: Web, context: BuildContext, target: str, why: str
) -> None:
    assert why in error_of(context, f"{web.url}/redirect/{target}").message


def test_a_redirect_gets_no_login_and_has_an_end(web: Web, context: BuildContext) -> None:
    download(context, web.url.replace("://", "://me:secret@") + "/redirect//elsewhere")
    assert [login for _, login in web.requests] == ["Basic " + base64.b64encode(b"me:secret").decode(), None]
    assert "redirects more than 10 times" in error_of(context, f"{web.url}/circle").message


def test_a_protected_download_works_and_is_not_redirected_to_an_open_one(
    secure_web: Web, web: Web, context: BuildContext
) -> None:
    assert download(context, f"{secure_web.url}/f").size == len(BODY)
    assert download(context, f"{secure_web.url}/redirect/{secure_web.url}/f").size == len(BODY)
    refused = error_of(context, f"{secure_web.url}/redirect/{web.url}/f")
    assert "unprotected URL" in refused.message
    assert refused.hint is None  # no proxy would change that
    assert web.requests == []


def test_a_certificate_that_nobody_trusts_is_an_error(
    secure_web: Web, context: BuildContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    refused = error_of(context, f"{secure_web.url}/f")
    assert "its TLS certificate is not accepted: self-signed certificate" in refused.message
    assert refused.hint == "SSL_CERT_FILE names the file of the CAs to trust"
    assert secure_web.requests == []


def test_credentials_in_the_url_are_used_and_never_shown(web: Web, context: BuildContext) -> None:
    url = web.url.replace("://", "://me:s%40cret@")
    entry = download(context, f"{url}/f")
    assert web.requests[-1][1] == "Basic " + base64.b64encode(b"me:s@cret").decode()
    assert entry.source == f"{web.url}/f"
    error = str(error_of(context, f"{url}/status/404?key=s3cret#s3cret"))
    assert "cret" not in error
    assert f"{web.url}/status/404 can't be downloaded" in error
    assert web.requests[-1][0] == "/status/404?key=s3cret"
    download(context, web.url.replace("://", "://me@") + "/f")
    assert web.requests[-1][1] == "Basic " + base64.b64encode(b"me:").decode()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http:///f", "its URL names no host"),
        ("http://127.0.0.1:1/f", "connection refused\n  hint: where only a proxy reaches it, HTTPS_PROXY"),
        ("http://[/f", "its URL is malformed"),
        ("http://127.0.0.1:x/f", "its URL is malformed"),
        ("http://me:s3cret@h\u2100/f", "its URL is malformed"),  # Python's error of it shows all of that
    ],
)
def test_a_url_that_leads_nowhere_is_an_error(context: BuildContext, url: str, why: str) -> None:
    error = str(error_of(context, url))
    assert f"can't be downloaded: {why}" in error
    assert "s3cret" not in error


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_download_goes_through_the_proxy_with_its_login(
    web: Web, context: BuildContext, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv(name, web.url.replace("://", "://me:s%40cret@"))
    assert download(context, "http://files.example/f").size == len(BODY)
    assert web.requests == [("http://files.example/f", None)]
    assert web.proxied == ["Basic " + base64.b64encode(b"me:s@cret").decode()]


def test_a_proxy_may_speak_tls(
    secure_web: Web, context: BuildContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("HTTP_PROXY", secure_web.url)
    assert download(context, "http://files.example/f").size == len(BODY)
    assert secure_web.requests == [("http://files.example/f", None)]
    monkeypatch.delenv("SSL_CERT_FILE")
    refused = error_of(context, "http://files.example/f")
    assert "proxy of the environment: its TLS certificate is not accepted: self-signed" in refused.message


def test_no_proxy_is_asked_for_this_host_or_for_what_no_proxy_names(
    web: Web, context: BuildContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("HTTP_PROXY", "http://me:s3cret@127.0.0.1:1")
    assert download(context, f"{web.url}/f").size == len(BODY)
    error = error_of(context, "http://198.51.100.1/f")
    assert "no connection by the proxy of the environment: connection refused" in error.message
    assert "NO_PROXY" in (error.hint or "")
    assert "s3cret" not in str(error)
    monkeypatch.setenv("NO_PROXY", "a.example, 198.51.100.0/24")
    assert "proxy" not in error_of(context, "http://198.51.100.1/f").message


@pytest.mark.parametrize(
    ("proxy", "why"),
    [
        ("socks5://a:1", "found the scheme socks5"),
        ("http://me:s3cret@a b", "found something else"),
        ("http://me:s3cret@proxy.invalid:1", "proxy of the environment: its name can't be looked up"),
    ],
)
def test_a_proxy_that_is_none_is_told_without_its_login(
    context: BuildContext, monkeypatch: pytest.MonkeyPatch, proxy: str, why: str
) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    error = str(error_of(context, "http://files.example/f"))
    assert why in error
    assert "s3cret" not in error


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_a_right_checksum_is_accepted(web: Web, context: BuildContext, algorithm: str) -> None:
    checksum = f"{algorithm}:{hashlib.new(algorithm, BODY).hexdigest()}"
    assert download(context, f"{web.url}/f", checksum).size == len(BODY)


def test_a_wrong_checksum_is_an_error_that_shows_both(web: Web, context: BuildContext) -> None:
    error = error_of(context, f"{web.url}/f", "sha256:" + "0" * 64)
    assert f"can't be downloaded: expected the checksum sha256:{'0' * 64}, found sha256:" in error.message
    assert hashlib.sha256(BODY).hexdigest() in error.message


def test_downloads_go_where_the_caller_says_and_stay_there(web: Web, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with BuildContext(tmp_path, downloads=lambda: tmp_path / "downloads") as context:
        entry = download(context, f"{web.url}/f")
    (path,) = (tmp_path / "downloads").iterdir()
    assert path.read_bytes() == BODY
    path.unlink()
    assert entry.open is not None
    with pytest.raises(InputError, match=r"the download .* can't be read"):
        entry.open()


def test_temporary_downloads_are_removed_with_the_context(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "context").mkdir()
    with BuildContext(tmp_path / "context") as context:
        download(context, f"{web.url}/f")
        download(context, f"{web.url}/g")
        assert len(list(tmp_path.glob("firebuild-*/*"))) == 2
    assert not list(tmp_path.glob("firebuild-*"))


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://h/a/b.txt", "b.txt"),
        ("http://h/b%20c?x=/y#z", "b c"),
        ("http://h/", ""),
        ("http://h", ""),
        ("http://h/..", ""),
        ("http://h/a%2Fb", "b"),
        ("http://h/%00", ""),
        ("http://[/f", "f"),
        ("http://me:p/w@h/f", "f"),
    ],
)
def test_the_file_name_is_the_last_name_of_the_path(url: str, name: str) -> None:
    assert file_name(url) == name


class _NoBases:
    def resolve(self, reference: str) -> ImageConfig:
        raise AssertionError(reference)


def planned(text: str, context: BuildContext) -> tuple[WireStep, ...]:
    graph = read_graph(DockerfileSource("Dockerfile", text), images=_NoBases())
    return lower(graph.target, lambda _: context)


def test_add_downloads_while_planning(web: Web, context: BuildContext) -> None:
    digest = hashlib.sha256(BODY).hexdigest()
    text = f"FROM scratch\nARG N=f\nADD --chmod=644 --checksum=sha256:{digest} {web.url}/$N /d/\n"
    made = planned(text, context)
    assert web.requests == [("/f", None)]
    (resource,) = made[0].resources.values()
    assert [entry.path for entry in resource.entries()] == ["f"]


def test_what_a_checksum_names_is_downloaded_once_somebody_needs_it(web: Web, context: BuildContext) -> None:
    source = Download(f"{web.url}/f", f"sha256:{hashlib.sha256(BODY).hexdigest()}")
    found = context.resource([source], location=HERE, check=False)
    assert web.requests == []
    assert [[entry.path for entry in found.entries()] for _ in range(2)] == [["f"], ["f"]]
    assert web.requests == [("/f", None)]


def test_a_url_without_a_name_can_be_added_under_another(web: Web, context: BuildContext) -> None:
    text = f"FROM scratch\nADD {web.url}/ /renamed\n"
    made = planned(text, context)
    (resource,) = made[0].resources.values()
    assert [entry.path for entry in resource.entries()] == ["download"]


def test_a_download_of_too_many_bytes_is_refused(web: Web, tmp_path: Path) -> None:
    with BuildContext(tmp_path, limits=FetchLimits(total_bytes=len(BODY))) as context:
        assert download(context, f"{web.url}/f").size == len(BODY)
    with BuildContext(tmp_path, limits=FetchLimits(total_bytes=len(BODY) - 1)) as context:
        message = error_of(context, f"{web.url}/f").message
    assert f"it has more than {len(BODY) - 1} bytes" in message

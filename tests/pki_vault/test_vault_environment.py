"""What is taken from around the process, and what leaks out of it: nothing that was not asked for."""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from baoserver import create_token
from firebuild_pki import Authority, CAError
from pki_vault.tools import ENVIRON, Backend, approle
from support import serving

pytestmark = pytest.mark.needs("bao")


def test_nothing_is_taken_silently(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".vault-token").write_text("s.from-home")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    wrong = {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / ".netrc"),
        "VAULT_TOKEN": "s.wrong",
        "VAULT_ADDR": "https://vault.invalid",
        "VAULT_NAMESPACE": "elsewhere",
        "VAULT_CACERT": "/nowhere",
        "VAULT_CAPATH": "/nowhere",
        "VAULT_CLIENT_CERT": "/nowhere",
        "VAULT_SKIP_VERIFY": "1",
        "REQUESTS_CA_BUNDLE": "/nowhere",
        "CURL_CA_BUNDLE": "/nowhere",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "HTTPS_PROXY": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with backend.open(environ={**wrong, **backend.environ}) as authority:
        assert authority.issue_server()
        assert authority.issue_guest()


class Tunnel(socketserver.StreamRequestHandler):
    """A proxy that knows CONNECT, and leads everywhere to the same place."""

    def handle(self) -> None:
        lines = [self.rfile.readline()]
        while (line := self.rfile.readline()).strip():
            lines.append(line)
        self.server.asked.append(b"".join(lines).decode())  # type: ignore[attr-defined]
        with socket.create_connection(self.server.target) as other:  # type: ignore[attr-defined]
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pump, args=(other, self.connection))
            back.start()
            _pump(self.connection, other)
            back.join()


def _pump(source: object, target: object) -> None:
    try:
        while data := source.recv(65536):  # type: ignore[attr-defined]
            target.sendall(data)  # type: ignore[attr-defined]
        target.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
    except OSError:
        return


class TunnelServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True


@pytest.fixture
def tunnel(tls_backend: Backend) -> Iterator[tuple[str, list[str]]]:
    """Address of a proxy in front of the server with TLS, and what it was asked."""
    server = TunnelServer(("127.0.0.1", 0), Tunnel)
    server.asked = []  # type: ignore[attr-defined]
    server.target = ("127.0.0.1", int(tls_backend.api.address.rpartition(":")[2]))  # type: ignore[attr-defined]
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", server.asked  # type: ignore[attr-defined]


def through(backend: Backend, environ: Mapping[str, str]) -> Authority:
    tls = {"ca_file": str(backend.api.ca_file), "server_name": "localhost"}
    address = "https://vault.example:8200"
    both = {**backend.environ, **environ}
    return backend.open(address=address, tls=tls, environ=both, retry_for="0s")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_https_goes_through_the_proxy_which_sees_the_address_only(
    name: str, tunnel: tuple[str, list[str]], tls_backend: Backend
) -> None:
    proxy, asked = tunnel
    with through(tls_backend, {name: proxy}) as authority:
        assert authority.issue_server()
        notes = authority.check()
    assert asked[0].startswith("CONNECT vault.example:8200 ")
    assert tls_backend.token not in "".join(asked)
    (reachable,) = (note for note in notes if note.about == "reachable")
    assert "through the proxy in HTTPS_PROXY" in reachable.message


@pytest.mark.parametrize("exempt", ["vault.example", ".example", "example", "a.test, vault.example", "*"])
def test_no_proxy_exempts(exempt: str, tunnel: tuple[str, list[str]], tls_backend: Backend) -> None:
    proxy, asked = tunnel
    with pytest.raises(CAError):
        through(tls_backend, {"HTTPS_PROXY": proxy, "NO_PROXY": exempt})
    assert asked == []


def test_a_proxy_that_is_away_is_named_without_its_password(tls_backend: Backend) -> None:
    environ = {"HTTPS_PROXY": "http://me:hunter2@127.0.0.1:1"}
    with pytest.raises(CAError, match="no connection by the proxy of the environment") as caught:
        through(tls_backend, environ)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_secrets_are_in_no_log_and_no_error(
    backend: Backend, unique: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    auth, environ = approle(backend, unique)
    texts = []
    with backend.open(auth=auth, environ=environ) as authority:
        token = next(iter(_tokens(authority)))
        assert authority.issue_server()
        authority.check()
        texts += [repr(authority), repr(vars(authority))]
    wrong: list[dict[str, Any]] = [
        {"server_role": "nobody"},
        {"mount": "nowhere"},
        {"address": "http://127.0.0.1:1"},
    ]
    for broken in wrong:
        with (
            pytest.raises(CAError) as caught,
            backend.open(auth=auth, environ=environ, retry_for="0s", **broken) as authority,
        ):
            authority.issue_server()
        texts += ["".join(traceback.format_exception(caught.value)), repr(caught.value)]
        assert caught.value.__cause__ is None
    assert any(record.name.startswith("urllib3") for record in caplog.records)
    told = "\n".join([caplog.text, *texts])
    for secret in (token, environ["ROLE_ID"], environ["SECRET_ID"]):
        assert secret not in told


def _tokens(authority: object) -> set[str]:
    session = authority._provider._provider._session  # type: ignore[attr-defined]
    return {session._token.value}


def test_a_wrong_token_is_not_repeated(backend: Backend) -> None:
    wrong = create_token(backend.api, "default")
    with pytest.raises(CAError) as caught, backend.open(environ={ENVIRON: wrong}) as authority:
        authority.issue_server()
    assert wrong not in "".join(traceback.format_exception(caught.value))


def test_hvac_is_imported_by_those_who_open_it_only() -> None:
    code = (
        "import sys\n"
        "from firebuild_pki import installed_providers, load_provider, open_authority\n"
        "assert 'vault' in {plugin.name for plugin in installed_providers()}\n"
        "open_authority().close()\n"
        "assert not [name for name in sys.modules if name.startswith('firebuild_pki.providers.vault')]\n"
        "load_provider('vault')\n"
        "print(sorted({'hvac', 'requests', 'urllib3'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_hvac_is_imported_in_one_place_only() -> None:
    package = Path(__file__).parents[2] / "src" / "firebuild_pki"
    users = [
        file.name
        for file in package.rglob("*.py")
        if re.search(r"^\s*(from|import) hvac", file.read_text("utf-8"), re.MULTILINE)
    ]
    assert users == ["transport.py"]

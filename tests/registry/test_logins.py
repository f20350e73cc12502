"""Who logs in, where the secrets go, and that they are seen nowhere."""

from __future__ import annotations

import base64
import json
import logging
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from firebuild_bootstrap.errors import InputError, Interrupted
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry import credentials
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.credentials import Credentials, find_credentials
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.settings import RegistrySettings
from registry.conftest import LOGIN, Client
from registry.servers import AUTH, BASIC, PASSWORD, Handler, Image, Small, always, wants_basic

SECRETS = (PASSWORD, AUTH, "the-token", "an-identity-token")


def wants_token(realm: str, token: str = "the-token", error: str = "") -> Any:
    """A registry that sends everybody to `realm`."""

    def behave(handler: Handler) -> bool:
        if "/v2/" not in handler.path or handler.headers.get("Authorization") == f"Bearer {token}":
            return False
        challenge = f'Bearer realm="{realm}",service="the \\"registry\\"",scope="registry:catalog:*"{error}'
        body = b'{"errors": [{"code": "DENIED", "message": "insufficient scope"}]}' if error else b""
        handler.answer(401, body, **{"WWW-Authenticate": challenge})
        return True

    return behave


def ask(registries: Registries, reference: str) -> str:
    return registries.digest(Reference.parse(reference))


def refused(registries: Registries, reference: str) -> RegistryError:
    with pytest.raises(RegistryError) as caught:
        ask(registries, reference)
    return caught.value


@pytest.fixture(autouse=True)
def silent(client: Client, caplog: pytest.LogCaptureFixture) -> Any:
    """No log of anybody and no event holds a secret, whatever is tested here."""
    client.environ["REGISTRY_PASSWORD"] = PASSWORD
    caplog.set_level(logging.DEBUG)
    yield
    for secret in SECRETS:
        assert secret not in caplog.text
        assert secret not in repr(client.events)


def test_basic_is_sent_when_it_is_asked_for_and_at_once_from_then_on(small: Small, client: Client) -> None:
    named = small.add(Image(), "1")
    small.behaviours.append(wants_basic)
    registries = client.registries(special={small.host: LOGIN})
    assert ask(registries, f"{small.host}/web:1") == named
    assert ask(registries, f"{small.host}/web:1") == named
    assert [headers.get("Authorization") for _, _, headers in small.requests] == [None, BASIC, BASIC]


def test_a_refused_login_says_whose_it_was(small: Small, client: Client) -> None:
    small.behaviours.append(wants_basic)
    error = refused(client.registries(small.host), f"{small.host}/web:1")
    assert error.message == (
        f"{small.host}: the manifest of web:1: it does not exist, or needs a login: 401 Unauthorized"
    )
    assert error.hint == (
        f"there is no login for {small.host}: `docker login {small.host}` or `podman login {small.host}`, "
        "or username and password in registries.hosts"
    )
    client.environ["REGISTRY_PASSWORD"] = "wrong"
    error = refused(client.registries(special={small.host: LOGIN}), f"{small.host}/web:1")
    assert error.hint == (
        f"the login comes from registries.hosts of {small.host}: is its password right, "
        "and may this user do that there?"
    )
    assert "wrong" not in str(error)


def test_a_token_is_asked_for_with_our_scope_and_used_until_it_ends(small: Small, client: Client) -> None:
    image = Image()
    small.add(image, "1")
    tokens = []

    def realm(handler: Handler) -> None:
        tokens.append((parse_qs(urlsplit(handler.path).query), handler.headers.get("Authorization")))
        handler.answer(200, json.dumps({"access_token": "the-token", "expires_in": 300}).encode())

    small.behaviours += [always("/realm", realm), wants_token(f"{small.url}/realm?account=me")]
    registries = client.registries(special={small.host: LOGIN})
    registries.pull(Reference.parse(f"{small.host}/team/web:1"), client.blobs, Platform.host())
    query = {"account": ["me"], "service": ['the "registry"'], "scope": ["repository:team/web:pull"]}
    assert tokens == [(query, BASIC)]
    ask(registries, f"{small.host}/other:1")
    assert tokens[1][0]["scope"] == ["repository:other:pull"]


def test_a_token_that_ended_is_renewed(small: Small, client: Client) -> None:
    small.add(Image(), "1")
    handed = iter(["the-token", "the-token-2"])
    small.behaviours.append(
        always("/realm", lambda handler: handler.answer(200, json.dumps({"token": next(handed)}).encode()))
    )
    small.behaviours.append(wants_token(f"{small.url}/realm"))
    registries = client.registries(small.host)
    ask(registries, f"{small.host}/web:1")
    small.behaviours[1] = wants_token(f"{small.url}/realm", "the-token-2")
    ask(registries, f"{small.host}/web:1")
    assert small.asked().count("/realm?service=the+%22registry%22&scope=repository%3Aweb%3Apull") == 2


def test_an_identity_token_is_exchanged(small: Small, client: Client) -> None:
    small.add(Image(), "1")
    bodies = []

    def realm(handler: Handler) -> None:
        bodies.append(parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode()))
        handler.answer(200, b'{"access_token": "the-token"}')

    small.behaviours += [always("/realm", realm), wants_token(f"{small.url}/realm")]
    client.environ["TOKEN"] = "an-identity-token"
    ask(client.registries(special={small.host: {"token": {"env": "TOKEN"}}}), f"{small.host}/web:1")
    assert bodies == [
        {
            "grant_type": ["refresh_token"],
            "service": ['the "registry"'],
            "client_id": ["firebuild"],
            "scope": ["repository:web:pull"],
            "refresh_token": ["an-identity-token"],
        }
    ]


def test_a_token_of_another_scope_ends_it(small: Small, client: Client) -> None:
    small.behaviours += [
        always("/realm", lambda handler: handler.answer(200, b'{"token": "of another scope"}')),
        wants_token(f"{small.url}/realm", error=',error="insufficient_scope"'),
    ]
    error = refused(client.registries(special={small.host: LOGIN}), f"{small.host}/web:1")
    assert error.message.endswith("it refuses the login: 401 Unauthorized")  # an answer to HEAD has no body
    assert len(small.requests) == 3
    registries = client.registries(special={small.host: LOGIN})
    with pytest.raises(RegistryError, match="it refuses the login: DENIED: insufficient scope"):
        registries.pull(Reference.parse(f"{small.host}/web:1"), client.blobs, Platform.host())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda handler: handler.answer(200, b"no token"), "to the login is not a token"),
        (lambda handler: handler.answer(200, b"[]"), "to the login is not a token"),
        (lambda handler: handler.answer(200, b'{"expires_in": 1%s}' % (b"0" * 400)), "is not a token"),
        (lambda handler: handler.answer(200, b'{"token": "a\\r\\nHost: b"}'), "to the login is not a token"),
        (lambda handler: handler.answer(200, bytes(1 << 19)), "has more than 262144 bytes"),
        (lambda handler: handler.answer(418, b""), "it answered 418"),
        (
            lambda handler: handler.answer(401, b'{"details": "wrong password"}'),
            "it refuses the login at https://localhost",
        ),
        (lambda handler: handler.answer(302, b"", Location="https://elsewhere.example"), "it answered 302"),
    ],
)
def test_a_realm_that_gives_no_token_is_named(small: Small, client: Client, answer: Any, why: str) -> None:
    small.behaviours += [always("/realm", answer), wants_token(f"{small.url}/realm")]
    error = refused(client.registries(special={small.host: LOGIN}), f"{small.host}/web:1")
    assert why in error.message


@pytest.mark.parametrize("realm", ["http://realm.example/token", "file:///etc/passwd", "", "https://[", "x"])
def test_no_secret_goes_to_a_realm_that_is_not_safe(small: Small, client: Client, realm: str) -> None:
    small.behaviours.append(wants_token(realm))
    error = refused(client.registries(special={small.host: LOGIN}), f"{small.host}/web:1")
    assert "which is neither https nor this machine" in error.message
    assert error.hint == "the registry has to name its token service with https"


def test_no_secret_follows_a_redirect_to_another_host(small: Small, mirror: Small, client: Client) -> None:
    image = Image()
    small.add(image, "1")
    mirror.add(image)
    small.behaviours.append(wants_basic)
    small.behaviours.append(
        always("/blobs/", lambda handler: handler.answer(307, Location=f"{mirror.url}{handler.path}"))
    )
    registries = client.registries(mirror.host, special={small.host: LOGIN})
    registries.pull(Reference.parse(f"{small.host}/web:1"), client.blobs, Platform.host())
    assert mirror.requests
    assert not any("Authorization" in headers for _, _, headers in mirror.requests)


def test_whoever_a_redirect_leads_to_names_no_realm_for_our_logins(
    small: Small, mirror: Small, client: Client
) -> None:
    small.add(Image(), "1")
    small.behaviours += [
        wants_basic,
        always("/blobs/", lambda handler: handler.answer(307, Location=f"{mirror.url}{handler.path}")),
    ]
    mirror.behaviours.append(wants_token(f"{mirror.url}/realm"))
    registries = client.registries(mirror.host, special={small.host: LOGIN})
    with pytest.raises(RegistryError, match="it answered 401 Unauthorized"):
        registries.pull(Reference.parse(f"{small.host}/web:1"), client.blobs, Platform.host())
    assert [path for path in mirror.asked() if "realm" in path] == []
    assert not any("Authorization" in headers for _, _, headers in mirror.requests)


def test_a_registry_that_asks_for_nothing_known_is_refused(small: Small, client: Client) -> None:
    challenge = {"WWW-Authenticate": "Negotiate, Digest realm=x"}
    small.behaviours.append(always("/", lambda handler: handler.answer(401, b"", **challenge)))
    error = refused(client.registries(special={small.host: LOGIN}), f"{small.host}/web:1")
    assert "it refuses the login" in error.message


# --- where logins come from ---------------------------------------------------------------------------


def found(environ: dict[str, str], host: str = "registry.example", repository: str = "team/web") -> Any:
    return find_credentials(host, repository, RegistrySettings(), environ)


def test_logins_come_from_the_files_of_docker_and_podman_in_order(tmp_path: Path) -> None:
    def write(path: str, user: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        auth = base64.b64encode(f"{user}:{PASSWORD}".encode()).decode()
        file.write_text(json.dumps({"auths": {"registry.example": {"auth": auth}}}))

    environ = {"HOME": str(tmp_path)}
    assert found(environ) is None
    write(".docker/config.json", "docker")
    assert found(environ) == Credentials(str(tmp_path / ".docker/config.json"), "docker", PASSWORD)
    write("docker/config.json", "chosen")
    assert found(environ | {"DOCKER_CONFIG": str(tmp_path / "docker")}).username == "chosen"
    write(".config/containers/auth.json", "podman")
    assert found(environ).username == "podman"
    write("run/containers/auth.json", "runtime")
    environ["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    assert found(environ).username == "runtime"
    write("auth.json", "named")
    environ["REGISTRY_AUTH_FILE"] = str(tmp_path / "auth.json")
    assert found(environ).username == "named"
    auths = {"auths": {"registry.example": {"username": "variable", "password": PASSWORD}}}
    environ["DOCKER_AUTH_CONFIG"] = json.dumps(auths)
    assert found(environ).username == "variable"
    settings = RegistrySettings.model_validate({"username": "ours", "password": {"env": "P"}})
    ours = find_credentials("registry.example", "web", settings, environ | {"P": PASSWORD})
    assert ours is not None
    assert (ours.username, PASSWORD in repr(ours)) == ("ours", False)
    with pytest.raises(InputError, match=r"hosts of registry.example: expected a secret in the environment"):
        find_credentials("registry.example", "web", settings, environ)


@pytest.mark.parametrize(
    ("auths", "host", "user"),
    [
        ({"https://index.docker.io/v1/": "hub"}, "docker.io", "hub"),
        ({"docker.io": "hub"}, "docker.io", "hub"),
        ({"https://registry.example/v2/": "url"}, "registry.example", "url"),
        ({"registry.example": "all", "registry.example/team": "team"}, "registry.example", "team"),
        ({"registry.example/team/web/x": "longer"}, "registry.example", ""),
        ({"registry.example:5000": "port"}, "registry.example", ""),
        ({"registry.example": ""}, "registry.example", ""),
    ],
)
def test_entries_are_found_by_host_and_the_longest_path(auths: dict[str, str], host: str, user: str) -> None:
    entries = {key: {"username": name, "password": name} for key, name in auths.items()}
    login = found({"HOME": "/none", "DOCKER_AUTH_CONFIG": json.dumps({"auths": entries})}, host)
    assert (login.username if login else "") == user


def test_tokens_of_files_are_kept_apart_from_passwords() -> None:
    auths = {"registry.example": {"identitytoken": "an-identity-token"}, "other": {"registrytoken": "t"}}
    environ = {"HOME": "/none", "DOCKER_AUTH_CONFIG": json.dumps({"auths": auths})}
    login = found(environ)
    assert (login.identity_token, login.basic) == ("an-identity-token", "")
    assert found(environ, "other").registry_token == "t"


def test_a_registry_token_is_sent_as_it_is(small: Small, client: Client) -> None:
    small.add(Image(), "1")
    small.behaviours.append(wants_token("https://realm.example"))
    auths = {small.host: {"registrytoken": "the-token"}}
    client.environ["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": auths})
    ask(client.registries(small.host), f"{small.host}/web:1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "DOCKER_AUTH_CONFIG is not a JSON object"),
        ("[]", "DOCKER_AUTH_CONFIG is not a JSON object"),
        (
            json.dumps({"auths": {"registry.example": {"auth": "%%%"}}}),
            "an entry of auths is not in base64",
        ),
        (
            json.dumps({"auths": {"registry.example": {"auth": "dXNlcg=="}}}),
            "the auth of an entry of auths is not the base64 of USER:PASSWORD",
        ),
        (
            json.dumps({"auths": {"registry.example": {"identitytoken": 5}}}),
            "identitytoken of an entry of auths is not a text",
        ),
        (
            json.dumps({"auths": {"registry.example": {"registrytoken": "a\nb"}}}),
            "a registrytoken in auths can't be a header of HTTP",
        ),
        (json.dumps({"credHelpers": {"registry.example": "../x"}}), "can't be the name of a program"),
        (json.dumps({"credsStore": "not-there"}), "the program docker-credential-not-there was not found"),
        ("/root/.docker/config.json", "DOCKER_AUTH_CONFIG is not a JSON object"),
    ],
)
def test_a_file_that_is_wrong_is_named_and_not_shown(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as caught:
        found({"HOME": "/none", "PATH": "/none", "DOCKER_AUTH_CONFIG": text})
    assert "auths" not in why or caught.value.hint == "log in again: docker login REGISTRY"
    assert "started" not in why or "credHelpers in DOCKER_AUTH_CONFIG" in str(caught.value.hint)
    assert "JSON" not in why or "not the path of one" in str(caught.value.hint)


def test_a_login_may_be_base64_in_several_lines() -> None:
    password = "long " * 30
    auth = base64.encodebytes(f"me:{password}".encode()).decode()
    assert auth.count("\n") > 1
    config = json.dumps({"auths": {"registry.example": {"auth": auth}}})
    login = found({"HOME": "/none", "DOCKER_AUTH_CONFIG": config})
    assert (login.username, login.password) == ("me", password)


def test_odd_sections_are_nothing(tmp_path: Path) -> None:
    text = json.dumps({"auths": [], "credHelpers": {"registry.example": 1}, "credsStore": 1})
    assert found({"HOME": "/none", "DOCKER_AUTH_CONFIG": text}) is None
    assert found({"HOME": "/none", "DOCKER_AUTH_CONFIG": " "}) is None
    (tmp_path / "auth.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="can't be read for credentials: it is not UTF-8 text"):
        found({"HOME": "/none", "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")})
    with open(tmp_path / "auth.json", "wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(InputError, match="can't be read for credentials: it has more than 1048576 bytes"):
        found({"HOME": "/none", "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json")})
    with pytest.raises(InputError, match="can't be read for credentials: Is a directory"):
        found({"HOME": "/none", "REGISTRY_AUTH_FILE": str(tmp_path)})


HELPER = """#!/bin/sh
read -r server
echo "$0 $* $server" >> {log}
case "$server" in
registry.example) echo '{{"ServerURL": "x", "Username": "helped", "Secret": "{secret}"}}' ;;
token.example) echo '{{"Username": "<token>", "Secret": "{secret}"}}' ;;
https://index.docker.io/v1/) echo '{{"Username": "hub", "Secret": "{secret}"}}' ;;
empty.example) echo '{{"Username": "", "Secret": ""}}' ;;
odd.example) echo '{{"Secret": "{secret}"}}' ;;
broken.example) echo 'the keychain is locked'; exit 1 ;;
moody.example) echo 'nobody is logged in' >&2; exit 1 ;;
mute.example) exit 3 ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


def test_programs_for_credentials_are_asked_on_standard_input(tmp_path: Path) -> None:
    program, log = tmp_path / "docker-credential-tests", tmp_path / "log"
    program.write_text(HELPER.format(log=log, secret=PASSWORD))
    program.chmod(0o755)
    auths = {"unknown.example": {"username": "plain", "password": PASSWORD}}
    config = json.dumps({"credHelpers": {"registry.example": "tests"}, "credsStore": "tests", "auths": auths})
    environ = {"HOME": "/none", "PATH": f"{tmp_path}:/bin:/usr/bin", "DOCKER_AUTH_CONFIG": config}
    assert found(environ) == Credentials("docker-credential-tests", "helped", PASSWORD)
    assert found(environ, "token.example").identity_token == PASSWORD
    assert found(environ, "docker.io").username == "hub"
    assert found(environ, "unknown.example").username == "plain"
    assert found(environ, "empty.example") is None
    for host, why, remedy in (
        ("broken", "failed with status 1: the keychain is locked", "echo broken.example | docker-"),
        ("moody", "failed with status 1: nobody is logged in", "echo moody.example | docker-"),
        ("mute", "failed with status 3: it said nothing", "echo mute.example | docker-"),
        ("odd", "no Username and", ""),
    ):
        with pytest.raises(InputError, match=why) as caught:
            found(environ, f"{host}.example")
        assert PASSWORD not in str(caught.value)
        assert remedy in (caught.value.hint or "")
    assert log.read_text().splitlines()[0] == f"{program} get registry.example"
    assert PASSWORD not in log.read_text()


def test_a_program_for_credentials_is_bounded_in_output_and_time_and_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, pid = tmp_path / "docker-credential-tests", tmp_path / "pid"
    config = json.dumps({"credsStore": "tests"})
    environ = {"HOME": "/none", "PATH": f"{tmp_path}:/bin:/usr/bin", "DOCKER_AUTH_CONFIG": config}

    def behaves(script: str) -> None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    behaves("cat /dev/zero")
    with pytest.raises(InputError, match="docker-credential-tests: it wrote more than 65536 bytes"):
        found(environ)
    # A child that keeps the pipe open is not waited for, and does not stay.
    behaves(f'sleep 600 & echo $! > {pid}; echo \'{{"Username": "me", "Secret": "{PASSWORD}"}}\'')
    assert found(environ).username == "me"
    assert ended(int(pid.read_text()))
    # One that closes its output goes on until it ends, or somebody is tired of it.
    behaves(f"echo $$ > {pid}; exec >&-; sleep 600")

    def interrupted() -> None:
        if pid.exists() and pid.read_text():
            raise Interrupted("the build was interrupted")

    pid.unlink()
    with pytest.raises(Interrupted):
        find_credentials("registry.example", "web", RegistrySettings(), environ, interrupted)
    assert ended(int(pid.read_text()))
    monkeypatch.setattr(credentials, "_HELPER_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"docker-credential-tests: it did not end within 0\.1 seconds"):
        found(environ)


def ended(pid: int) -> bool:
    """Whether a process has ended, or does now that it was killed."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False

"""In the middle of a build Vault is sealed, restarted, killed, or its operator changes something."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from baoserver import StoredServer, add_role
from firebuild_pki import Authority, open_authority
from pki_cluster.scene import Scene, failing

# One server for all of them, so that only one process starts it.
pytestmark = [pytest.mark.needs("bao"), pytest.mark.xdist_group("stored-vault")]

PATIENT = {"retry_for": "40s", "timeout": "2s"}
IMPATIENT = {"retry_for": "2s", "timeout": "1s"}
BOUND = 8  # seconds; generous, a busy machine may be slow
AT_ONCE = 5


@contextmanager
def meanwhile(action: Callable[[], object]) -> Iterator[None]:
    """Do something in a while, beside the block."""
    # Servers must be started by the main thread; what goes on here is about servers that run.
    timer = threading.Timer(1.0, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture(scope="module")
def _stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredServer]:
    with StoredServer(tmp_path_factory.mktemp("bao")) as server:
        yield server


@pytest.fixture
def stored_server(_stored: StoredServer) -> Iterator[StoredServer]:
    """A server to seal, stop and kill; it runs, unsealed, before and after each test."""
    yield _stored
    if not _stored.process.is_alive:
        _stored.start()
    elif _stored.is_sealed:
        _stored.unseal()


@pytest.fixture
def own(stored_server: StoredServer, unique: str) -> Scene:
    """A CA in that server."""
    return Scene.made(stored_server.api, unique)


def test_a_sealed_vault_is_waited_for(stored_server: StoredServer, own: Scene) -> None:
    with own.open(stored_server.address, **PATIENT) as authority:
        authority.issue_server()
        stored_server.seal()
        with meanwhile(stored_server.unseal):
            authority.issue_guest()
        assert not stored_server.is_sealed


def test_a_vault_that_stays_sealed_ends_the_build_in_words(stored_server: StoredServer, own: Scene) -> None:
    with own.open(stored_server.address, **IMPATIENT) as authority:
        stored_server.seal()
        with failing() as failure:
            authority.issue_server()
        assert failure.seconds < BOUND
        assert "sealed" in failure.text
        assert "unseal" in failure.text
        assert stored_server.address in failure.text
        stored_server.unseal()


def test_a_sealed_vault_opens_nothing(stored_server: StoredServer, own: Scene) -> None:
    stored_server.seal()
    with failing() as failure:
        own.open(stored_server.address, **IMPATIENT)
    assert "sealed" in failure.text
    assert failure.seconds < BOUND


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_is_waited_for(end: str, stored_server: StoredServer, own: Scene) -> None:
    done: list[str] = []
    with own.open(stored_server.address, **PATIENT) as authority:
        authority.issue_server()
        getattr(stored_server, end)()
        build = threading.Thread(target=lambda: done.append(authority.issue_guest().identity))
        build.start()
        time.sleep(0.5)
        assert not done
        stored_server.start()
        build.join()
    assert done


def test_a_vault_that_hangs_ends_the_build_in_words(stored_server: StoredServer, own: Scene) -> None:
    with own.open(stored_server.address, **IMPATIENT) as authority:
        authority.issue_server()
        stored_server.process.suspend()
        with failing() as failure:
            authority.issue_guest()
        stored_server.process.resume()
    assert failure.seconds < BOUND
    assert "no answer in time" in failure.text


def test_a_vault_that_hung_goes_on(stored_server: StoredServer, own: Scene) -> None:
    with own.open(stored_server.address, **PATIENT) as authority:
        stored_server.process.suspend()
        with meanwhile(stored_server.process.resume):
            authority.issue_server()


def logins(scene: Scene) -> int:
    """Count the tokens that come from AppRole."""
    found = scene.api.call("LIST", "auth/token/accessors")["data"]["keys"]
    paths = [
        scene.api.write("auth/token/lookup-accessor", accessor=accessor).get("path") for accessor in found
    ]
    return paths.count(f"auth/{scene.login.mount}/login")


def revoke_all(scene: Scene) -> None:
    scene.api.call("PUT", f"sys/leases/revoke-prefix/auth/{scene.login.mount}/login")


def test_a_revoked_token_is_replaced_once(scene: Scene) -> None:
    with scene.open(scene.api.address) as authority:
        authority.issue_server()
        assert logins(scene) == 1
        revoke_all(scene)
        assert logins(scene) == 0
        authority.issue_guest()
        authority.issue_server()
        assert logins(scene) == 1
    assert logins(scene) == 0, "the token outlived the build"


def test_a_login_that_is_refused_meanwhile_ends_the_build_in_words(scene: Scene) -> None:
    with scene.open(scene.api.address) as authority:
        revoke_all(scene)
        scene.api.delete(f"auth/{scene.login.mount}/role/builds")
        with failing() as failure:
            authority.issue_server()
    assert failure.seconds < AT_ONCE
    assert "approle" in failure.text
    for secret in (scene.login.secret_id, scene.login.role_id):
        assert secret not in failure.text


def with_fixed_token(scene: Scene, token: str) -> Authority:
    settings = scene.settings(scene.api.address, auth={"method": "token", "token": {"env": "TOKEN"}})
    return open_authority(settings, environ={"TOKEN": token})


def test_without_a_way_to_log_in_the_token_is_named(scene: Scene) -> None:
    token = scene.fixed_token()
    with with_fixed_token(scene, token) as authority:
        authority.issue_server()
        scene.api.write("auth/token/revoke", token=token)
        with failing() as failure:
            authority.issue_guest()
    assert failure.seconds < AT_ONCE
    assert "the token was valid before, and is not any more: used up (num_uses), expired, or" in failure.text
    assert token not in failure.text


def test_a_fixed_token_outlives_the_build(scene: Scene) -> None:
    token = scene.fixed_token()
    with with_fixed_token(scene, token) as authority:
        authority.issue_server()
    assert scene.api.with_token(token).read("auth/token/lookup-self")


def test_a_deleted_role_ends_the_build_at_once(scene: Scene) -> None:
    with scene.open(scene.api.address) as authority:
        authority.issue_server()
        scene.api.delete(f"{scene.mount}/roles/guest")
        with failing() as failure:
            authority.issue_guest()
        assert failure.seconds < AT_ONCE
        assert '"guest"' in failure.text or " guest" in failure.text
        assert "hint" in failure.text
        add_role(scene.api, "guest", mount=scene.mount, use="client")
        authority.issue_guest()


def test_an_unmounted_ca_ends_the_build_at_once(scene: Scene) -> None:
    with scene.open(scene.api.address) as authority:
        scene.api.delete(f"sys/mounts/{scene.mount}")
        with failing() as failure:
            authority.issue_server()
    assert failure.seconds < AT_ONCE
    assert scene.mount in failure.text


def test_a_role_that_allows_other_names_ends_the_build_at_once(scene: Scene) -> None:
    with scene.open(scene.api.address) as authority:
        add_role(scene.api, "server", mount=scene.mount, use="server", suffix="other.example")
        with failing() as failure:
            authority.issue_server()
    assert failure.seconds < AT_ONCE
    assert "allowed_domains" in failure.text


def test_a_build_that_ends_while_vault_is_down_says_so_and_ends(
    stored_server: StoredServer, own: Scene
) -> None:
    authority = own.open(stored_server.address, framework={"revoke_at_end": True}, **IMPATIENT)
    authority.issue_server()
    stored_server.kill()
    start = time.monotonic()
    authority.close()
    assert time.monotonic() - start < 3 * BOUND
    text = "\n".join(authority.warnings)
    assert "revok" in text
    assert "connection refused" in text


def test_all_certificates_are_revoked_at_the_end_if_wanted(scene: Scene) -> None:
    with scene.open(scene.api.address, framework={"revoke_at_end": True}) as authority:
        authority.issue_server()
        authority.issue_guest()
        assert not authority.warnings
    certificates = scene.api.call("LIST", f"{scene.mount}/certs/revoked")["data"]["keys"]
    assert len(certificates) == 2

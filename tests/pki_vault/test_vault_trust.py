"""Which certificates server and guest trust."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baoserver import add_role, mount_pki
from firebuild_pki import CAError, MaterialError, Profile, ProviderError
from firebuild_pki.providers.vault.mount import issuer_chain
from pki.tools import OperatorCA, certificates
from pki_vault.tools import Backend, raises

pytestmark = pytest.mark.needs("bao")


def roles(backend: Backend, mount: str, **parameters: Any) -> dict[str, Any]:
    """Make roles of the mount for both ends; return the changes to the settings."""
    add_role(backend.api, "server", mount=mount, use="server", **parameters)
    add_role(backend.api, "guest", mount=mount, use="client", **parameters)
    return {"mount": mount}


@pytest.fixture
def root(backend: Backend) -> Backend:
    """The server, with a token that may do anything."""
    return backend.with_token(backend.api.token)


@pytest.fixture
def rootless(root: Backend, unique: str) -> tuple[dict[str, Any], str, str]:
    """A mount that does not know its root: changes to the settings, issuing CA, root."""
    pki = mount_pki(root.api, unique)
    keys = root.api.call("LIST", f"{unique}/issuers")["data"]["keys"]
    for key in keys:
        found = root.api.read(f"{unique}/issuer/{key}")["certificate"]
        if certificates(found.encode()) == certificates(pki.root_pem.encode()):
            root.api.delete(f"{unique}/issuer/{key}")
    return roles(root, unique), pki.issuing_pem, pki.root_pem


def test_a_mount_without_its_root_is_trusted_for_what_it_has(
    root: Backend, rootless: tuple[dict[str, Any], str, str]
) -> None:
    changes, issuing, _ = rootless
    with root.open(**changes) as authority:
        material = authority.issue_server()
        assert authority.warnings == ()
        notes = authority.check()
    assert certificates(material.trust_pem) == certificates(issuing.encode())
    assert len(certificates(material.certificate_chain_pem)) == 1
    (note,) = (note for note in notes if "does not know the root" in note.message)
    assert (note.about, note.path) == ("ca", "trust")


def test_comments_and_marks_around_the_root_do_no_harm(
    root: Backend, rootless: tuple[dict[str, Any], str, str], tmp_path: Path
) -> None:
    changes, _, pem = rootless
    (tmp_path / "root.pem").write_text(f"\ufeff# Főtanúsítvány\n{pem}".replace("\n", "\r\n"), "utf-8")
    with root.open(**changes, trust=str(tmp_path / "root.pem")) as authority:
        assert certificates(authority.issue_server().trust_pem) == certificates(pem.encode())


def test_a_file_with_the_root_is_trusted_instead(
    root: Backend, rootless: tuple[dict[str, Any], str, str], tmp_path: Path
) -> None:
    changes, issuing, top = rootless
    file = tmp_path / "root.pem"
    file.write_text(top)
    with root.open(**changes, trust=str(file)) as authority:
        material = authority.issue_guest()
        assert not [note for note in authority.check() if "does not know the root" in note.message]
    assert certificates(material.trust_pem) == certificates(top.encode())
    assert certificates(material.certificate_chain_pem)[1:] == certificates(issuing.encode())


def test_the_issuer_itself_may_be_in_the_file(root: Backend, tmp_path: Path) -> None:
    file = tmp_path / "issuer.pem"
    file.write_text(root.pki.issuing_pem)
    with root.open(trust=str(file)) as authority:
        material = authority.issue_server()
    assert certificates(material.trust_pem) == certificates(root.pki.issuing_pem.encode())
    assert len(certificates(material.certificate_chain_pem)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "trust.pem: there is no such file"),
        ("nothing", "trust.pem: expected a certificate in PEM, found text without any BEGIN line"),
        (OperatorCA("Stranger").pem.decode(), "missing link"),
    ],
    ids=["missing", "no-certificates", "a-stranger"],  # the certificate is another one in each process
)
def test_a_file_that_does_not_fit_is_an_error(
    content: str | None, words: str, root: Backend, tmp_path: Path
) -> None:
    file = tmp_path / "trust.pem"
    if content is not None:
        file.write_text(content)
    # the stranger's certificate is of another time
    with pytest.raises(CAError) as caught, root.open(trust=str(file)) as authority:
        authority.issue_server()
    assert words in str(caught.value) or "is not valid before" in str(caught.value)


def test_an_issuer_of_the_role_is_found_out(root: Backend, unique: str) -> None:
    """The mount's default issuer is another one than that of the roles."""
    mount_pki(root.api, unique, intermediate=False)
    made = root.api.write(
        f"{unique}/root/generate/internal", common_name="Second", issuer_name="second", key_type="ec"
    )
    changes = roles(root, unique, issuer_ref="second")
    with root.open(**changes) as authority:
        material = authority.issue_server()
        assert authority.warnings == ()
    assert certificates(material.trust_pem) == certificates(made["certificate"].encode())


def test_the_issuer_of_the_settings_counts_more_than_that_of_the_role(root: Backend, unique: str) -> None:
    mount_pki(root.api, unique, intermediate=False)
    second = root.api.write(
        f"{unique}/root/generate/internal", common_name="Second", issuer_name="second", key_type="ec"
    )
    with root.open(**roles(root, unique), issuer="second") as authority:
        material = authority.issue_guest()
    assert certificates(material.trust_pem) == certificates(second["certificate"].encode())


def test_each_end_may_have_an_issuer_of_its_own(root: Backend, unique: str) -> None:
    first = mount_pki(root.api, unique, intermediate=False)
    second = root.api.write(
        f"{unique}/root/generate/internal", common_name="Second", issuer_name="second", key_type="ec"
    )
    changes = roles(root, unique)
    add_role(root.api, "guest", mount=unique, use="client", issuer_ref="second")
    third = root.api.write(
        f"{unique}/root/generate/internal", common_name="Third", issuer_name="third", key_type="ec"
    )
    add_role(root.api, "peer", mount=unique, use="both", issuer_ref="third")
    with root.open(**changes) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    wanted = certificates((first.root_pem + second["certificate"]).encode())
    assert certificates(server.trust_pem) == certificates(guest.trust_pem) == wanted
    with root.open(**changes, peer_role="peer") as authority:
        peer = authority.issue(Profile.PEER, "web.firebuild.internal")
    assert certificates(peer.trust_pem) == wanted + certificates(third["certificate"].encode())


def test_a_mount_without_a_ca_is_named(root: Backend, unique: str) -> None:
    root.api.call("POST", f"sys/mounts/{unique}", {"type": "pki"})
    with raises(ProviderError, "no default issuer currently configured", "import a CA in the mount"):
        root.open(**roles(root, unique))


def test_an_answer_without_certificates_is_named() -> None:
    with raises(MaterialError, "the mount has no CA certificate"):
        issuer_chain({"certificate": "", "ca_chain": None})


def test_chains_of_any_order_lead_to_the_root() -> None:
    top = OperatorCA("Root")
    middle = OperatorCA("Middle", issuer=top)
    low = OperatorCA("Low", issuer=middle)
    stranger = OperatorCA("Stranger")
    pems = [one.pem.decode() for one in (stranger, top, low, middle)]
    chain = issuer_chain({"certificate": low.pem.decode(), "ca_chain": pems})
    assert chain.certificates == (low.certificate, middle.certificate, top.certificate)
    assert (chain.anchor, chain.below) == (top.certificate, (low.certificate, middle.certificate))
    rootless = issuer_chain({"certificate": low.pem.decode(), "ca_chain": pems[2:]})
    assert (rootless.anchor, rootless.below) == (middle.certificate, (low.certificate,))

"""The certificates of one machine: issued, handed over, renewed, and never at the cost of the command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import GuestLost, InputError, MachineError
from firebuild_bootstrap.guest.csr import make_request
from firebuild_bootstrap.identities import IdentityRequest, MachineIdentity
from firebuild_bootstrap.mmds import DataStore
from firebuild_bootstrap.service.console import Console
from firebuild_bootstrap.service.identity import IdentityChannel
from firebuild_bootstrap.wire import IdentityFiles
from firebuild_pki import (
    Authority,
    Capability,
    MaterialError,
    Profile,
    ProviderError,
    open_authority,
    parse_certificates,
)

NAMES = ("web.example", "spiffe://example.org/web")
START = datetime(2026, 1, 1, tzinfo=UTC)


class Scene:
    """One machine: its metadata, its console, and a clock that moves when told to."""

    def __init__(
        self, authority: Authority, *, csr: bool = False, signal: int = 0, command: tuple[str, ...] = ()
    ) -> None:
        self.now = START
        self.authority = authority
        self.store = DataStore()
        self.console = Console()
        self.warnings: list[str] = []
        request = IdentityRequest(
            files=IdentityFiles(names=NAMES, csr=csr),
            ttl=timedelta(minutes=1),
            signal=signal,
            command=command,
        )
        self.identity = MachineIdentity(
            request,
            authority,
            self.store,
            self.console,
            warn=self.warnings.append,
            clock=lambda: self.now,
        )
        block = self.identity.begin()
        identity = {} if block is None else {"Identity": block.as_json()}
        self.store.put({"latest": {"meta-data": {"VMMID": "1", **identity}}})

    def started(self) -> None:
        """The guest has called, and works on the command."""
        self.console.begin(lambda: None)
        self.console.executed()
        if "Identity" in self.metadata:
            self.store.patch({"latest": {"meta-data": {"Identity": None}}})

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.identity.advance()

    def said(self, number: int, **fields: Any) -> None:
        self.console.identity.said(pb.IdentityState(number=number, **fields))
        self.identity.advance()

    def sent(self) -> list[pb.ToGuest]:
        return [pb.ToGuest.FromString(data) for data in self.console.messages()]

    def probes(self) -> list[tuple[str, ...]]:
        return [tuple(said.probe.argv) for said in self.sent() if said.HasField("probe")]

    @property
    def metadata(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.store.get("/latest/meta-data")
        return found


@pytest.fixture
def authority() -> Iterator[Authority]:
    with open_authority(names=NAMES, clock=lambda: START) as authority:
        yield authority


def test_a_certificate_of_a_minute_is_renewed_before_it_ends(authority: Authority) -> None:
    scene = Scene(authority, signal=1)
    first = scene.metadata["Identity"]
    assert first["Number"] == "1"
    (leaf, *_) = parse_certificates(first["Cert"].encode(), "the first")
    assert leaf.not_valid_after_utc == START + timedelta(minutes=1)
    scene.pass_time(50)
    assert scene.sent() == []  # the guest is not there yet, and has not read the first
    scene.started()
    scene.pass_time(0)
    second = scene.metadata["Identity"]
    assert second["Number"] == "2"
    assert second["Key"] != first["Key"]
    assert scene.sent() == [pb.ToGuest(identity=pb.Identity(number=2))]
    scene.said(2)
    assert "Identity" not in scene.metadata
    assert scene.sent() == [pb.ToGuest(signal=pb.Signal(number=1))]
    scene.pass_time(1)
    assert scene.sent() == []
    assert scene.warnings == []


def test_a_command_that_is_still_at_work_begins_anew(authority: Authority) -> None:
    scene = Scene(authority, command=("/bin/reload",))
    scene.started()
    probes = []
    for number in (2, 3, 4, 5):  # it ends when it can; one word is enough
        scene.pass_time(45)
        scene.said(number)
        probes += scene.probes()
    assert probes == [("/bin/reload",), ()]
    scene.console.probe_ended(pb.Probed(exit_code=137))
    scene.pass_time(0)
    assert scene.probes() == [("/bin/reload",)]
    assert scene.warnings == []  # it was killed here
    scene.console.probe_ended(pb.Probed(exit_code=1, output=b"\x1b[2Jno"))
    scene.pass_time(0)
    assert scene.warnings == ["/bin/reload (--identity-command) ended with status 1: \\x1b[2Jno"]


def test_the_key_of_a_guest_that_does_not_answer_is_wiped_and_a_late_word_does_no_harm(
    authority: Authority,
) -> None:
    scene = Scene(authority)
    scene.started()
    scene.pass_time(45)
    assert scene.metadata["Identity"]["Number"] == "2"
    scene.pass_time(61)
    assert "Identity" not in scene.metadata
    assert scene.warnings == [
        "the certificate of web.example, spiffe://example.org/web was not renewed, and has ended: "
        "the machine has not taken it"
    ]
    scene.pass_time(1)
    assert scene.metadata["Identity"]["Number"] == "3"
    scene.said(2)
    assert scene.metadata["Identity"]["Number"] == "3"
    scene.said(3, error="/run/firebuild/tls: No space left\x1b[2J")
    assert "\x1b" not in scene.warnings[-1]
    assert scene.warnings[-1].endswith("No space left\\x1b[2J")
    with pytest.raises(InputError, match="certificate 3 that it was not asked for"):
        scene.said(3)


def test_a_provider_that_fails_is_asked_again_and_again(authority: Authority) -> None:
    scene = Scene(authority)
    scene.started()
    authority.close()
    scene.pass_time(45)
    assert "ends at 00:01:00 UTC: the authority is closed" in scene.warnings[-1]
    for seconds in (1, 2, 4, 8):
        scene.pass_time(seconds - 0.5)
        before = len(scene.warnings)
        scene.pass_time(0.5)
        assert len(scene.warnings) == before + 1
    assert "has ended" in scene.warnings[-1]
    assert scene.sent() == []


def test_metadata_that_take_no_more_are_not_the_end(authority: Authority) -> None:
    class Full(DataStore):
        def patch(self, merge_patch: Any) -> None:
            raise MachineError("the metadata service is gone")

    scene = Scene(authority)
    scene.started()
    scene.store.__class__ = Full
    scene.pass_time(45)
    why = "the metadata service is gone"
    assert scene.warnings[0] == f"the key of the machine is still in its metadata: {why}"
    assert "was not renewed, and ends at 00:01:00 UTC: the metadata service is gone" in scene.warnings[1]


def test_a_key_of_the_machine_is_certified_and_its_request_is_held_to_the_names(
    authority: Authority,
) -> None:
    scene = Scene(authority, csr=True)
    assert "Identity" not in scene.metadata
    scene.started()
    scene.pass_time(0)
    assert scene.sent() == []
    _, csr = make_request(NAMES)
    scene.said(1, csr=csr)
    (message,) = scene.sent()
    (leaf, *_) = parse_certificates(message.identity.chain.encode(), "chain")
    assert leaf.public_key() == _key_of(csr)
    scene.said(1)
    scene.pass_time(45)
    assert scene.sent() == [pb.ToGuest(identity=pb.Identity(number=2))]
    _, other = make_request(["other.example"])
    scene.said(2, csr=other)
    assert "was not renewed" in scene.warnings[-1]
    assert scene.sent() == []

    scene = Scene(authority, csr=True)
    scene.started()
    with pytest.raises(MaterialError, match=r"other\.example"):
        scene.said(1, csr=other)
    with pytest.raises(InputError, match="not asked for"):
        scene.said(1, csr=csr)

    scene = Scene(authority, csr=True)
    scene.started()
    with pytest.raises(InputError, match="not asked for"):
        scene.said(1, csr=b"x" * 500_000)

    scene = Scene(authority, csr=True)
    scene.started()
    with pytest.raises(GuestLost, match="could not use its certificate: no room"):
        scene.said(1, error="no room")


def test_a_key_of_the_machine_may_have_as_many_and_as_long_names_as_one_of_the_host() -> None:
    names = tuple(f"{'abcdefghi.' * 23}host{number}.example" for number in range(100))
    _, csr = make_request(names)
    channel = IdentityChannel(lambda _: None)
    channel.expect(1, csr=True)
    channel.said(pb.IdentityState(number=1, csr=csr))
    answer = channel.answer()
    assert answer is not None
    with open_authority(names=names) as authority:
        authority.sign_csr(answer.csr, Profile.PEER, names)


def test_what_can_not_be_taken_back_is_said_and_not_asked_for_again(authority: Authority) -> None:
    class Backend:
        """A provider that revokes, and is not there any more."""

        capabilities = frozenset({Capability.REVOKE})
        asked = 0
        retryable = False

        def __getattr__(self, name: str) -> Any:
            return getattr(authority, name)

        def revoke(self, _: object) -> None:
            self.asked += 1
            raise ProviderError("it is sealed", retryable=self.retryable)

    backend = Backend()
    for retryable, expected in ((False, 2), (True, 1)):
        backend.asked, backend.retryable = 0, retryable
        scene = Scene(backend)  # type: ignore[arg-type]
        scene.started()
        scene.pass_time(45)
        scene.said(2)
        scene.identity.close()
        assert backend.asked == expected
        assert scene.warnings == ["the certificate of web.example was not revoked: it is sealed"] * expected
    scene.now += timedelta(hours=1)  # what has ended needs no revoking
    scene.identity.close()
    assert backend.asked == 1


def _key_of(csr: bytes) -> object:
    from cryptography import x509

    return x509.load_pem_x509_csr(csr).public_key()

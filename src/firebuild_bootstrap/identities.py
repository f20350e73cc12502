"""The identity of what runs: a certificate for the machine, renewed before it ends (docs/identity.md).

The provider of the configuration issues it. MMDS carries certificate and key until the guest has taken them;
or the guest makes the key, and its request and the certificate travel over the session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.errors import FirebuildError, GuestLost
from firebuild_bootstrap.mmds import IDENTITY_WIPE
from firebuild_bootstrap.wire import IdentityBlock, IdentityFiles
from firebuild_pki.display import one_line
from firebuild_pki.errors import CAError
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from firebuild_bootstrap.mmds import MetadataWriter
    from firebuild_bootstrap.service.console import Console
    from firebuild_bootstrap.service.identity import IdentityAnswer
    from firebuild_pki import Authority, IssuedCertificate, TLSMaterial

_ANSWER: Final = timedelta(minutes=1)
"""How long the guest may take with a renewal; then its key is wiped from the metadata all the same."""
_LONGEST_PAUSE: Final = timedelta(minutes=5)
_SHORTEST_PAUSE: Final = timedelta(seconds=1)


@dataclass(frozen=True, kw_only=True)
class IdentityRequest:
    """Who the machine is to be.

    Args:
        files: what the guest makes of it; its names are those of the certificate.
        ttl: wanted lifetime of each certificate.
        signal: sent to the command when the files have been replaced; 0 for none.
        command: executed beside it then, as its user and without a shell; empty for none.
    """

    files: IdentityFiles
    ttl: timedelta = timedelta(hours=1)
    signal: int = 0
    command: tuple[str, ...] = ()


class MachineIdentity:
    """The certificates of one machine, one after the other; all methods are called by one thread.

    Args:
        request: who it is.
        authority: issues them; it has been told of the names.
        metadata: of the machine.
        console: of its command.
        warn: takes a sentence for the user.
        clock: the current time, timezone-aware; a monotonic one would stand still while a laptop sleeps.
    """

    def __init__(
        self,
        request: IdentityRequest,
        authority: Authority,
        metadata: MetadataWriter,
        console: Console,
        *,
        warn: Callable[[str], None],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._request = request
        self._authority = authority
        self._metadata = metadata
        self._console = console
        self._warn = warn
        self._clock = clock
        self._number = 1
        self._issued: dict[int, TLSMaterial | IssuedCertificate] = {}
        self._in_use = 0
        self._pause = _SHORTEST_PAUSE
        self._due: datetime | None = None
        """When to renew; None while the guest is to answer."""
        self._late = datetime.max.replace(tzinfo=UTC)
        self._tell = False
        self._telling = False
        self._told: deque[tuple[int, bytes]] = deque()
        if request.command:
            console.probed = lambda status, output: self._told.append((status, output))

    def begin(self) -> IdentityBlock | None:
        """Issue the first certificate, and return what the metadata have to hold at the machine's start.

        None where the guest is to make the key: `advance` answers its request.

        Raises:
            firebuild_pki.CAError: the provider issued none.
        """
        if self._request.files.csr:
            self._console.identity.expect(1, csr=True)
            return None
        block = self._issue()
        self._taken()
        return block

    def advance(self) -> None:
        """Do what is due: answer a request, renew, or take note of what the guest has done. Does not wait.

        Raises:
            firebuild_pki.CAError: the provider did not sign the first request of the guest.
            GuestLost: the guest could not use its first certificate.
        """
        self._execute()
        if self._due is None:
            if (answer := self._console.identity.answer()) is not None:
                self._answered(answer)
            elif self._clock() >= self._late:
                self._failed("the machine has not taken it")
        elif self._console.identity.begun and self._clock() >= self._due:
            self._renew()

    def close(self) -> None:
        """Take back what is still valid, where the backend can."""
        from firebuild_pki import Capability, TLSMaterial

        if Capability.REVOKE not in self._authority.capabilities:
            return
        for one in self._issued.values():
            if one.not_after <= self._clock():
                continue
            try:
                self._authority.revoke(one if isinstance(one, TLSMaterial) else one.with_key(b""))
            except CAError as error:
                self._warn(f"the certificate of {one.identity} was not revoked: {error.message}")
                if error.retryable:  # the backend is away; asking for the others would only take time
                    return

    def _issue(self) -> IdentityBlock:
        from firebuild_pki import Profile

        files = self._request.files
        material = self._authority.issue(Profile.PEER, files.names, self._request.ttl)
        self._issued[self._number] = material
        return IdentityBlock(
            number=self._number,
            cert=material.certificate_chain_pem.decode(),
            key=material.private_key_pem.decode(),
            ca=material.trust_pem.decode(),
        )

    def _renew(self) -> None:
        self._number += 1
        self._due, self._late = None, self._clock() + _ANSWER
        csr = self._request.files.csr
        try:
            if not csr:
                block = self._issue()
                self._metadata.patch({"latest": {"meta-data": {"Identity": block.as_json()}}})
        except (CAError, FirebuildError) as error:
            self._failed(error.message)
            return
        self._console.identity.renew(self._number, csr=csr)

    def _answered(self, answer: IdentityAnswer) -> None:
        if answer.error:
            self._failed(one_line(answer.error, 300))
        elif answer.csr:
            self._certify(answer)
        else:
            self._wipe()
            self._taken()
            if self._number > 1:
                self._replaced()

    def _replaced(self) -> None:
        """Tell the command that there are other files."""
        if self._request.signal:
            self._console.signal(self._request.signal)
        ending, self._tell = self._tell, bool(self._request.command)
        if self._tell and self._telling and not ending:
            self._console.probe(())  # it is still at work, and has not heard of these: it starts again
        self._execute()

    def _execute(self) -> None:
        while self._told:
            status, output = self._told.popleft()
            self._telling = False
            if status and not self._tell:
                said = one_line(output.decode("utf-8", "replace").strip(), 300)
                name = self._request.command[0]
                self._warn(
                    f"{name} (--identity-command) ended with status {status}{f': {said}' if said else ''}"
                )
        if self._tell and not self._telling:
            self._tell, self._telling = False, True
            self._console.probe(self._request.command)

    def _certify(self, answer: IdentityAnswer) -> None:
        from firebuild_pki import Profile

        names, ttl = self._request.files.names, self._request.ttl
        try:
            one = self._authority.sign_csr(answer.csr, Profile.PEER, names, ttl)
        except CAError as error:
            if not self._in_use:
                raise
            self._failed(error.message)
            return
        self._issued[self._number] = one
        chain, trust = one.certificate_chain_pem.decode(), one.trust_pem.decode()
        self._console.identity.certify(self._number, chain, trust)

    def _taken(self) -> None:
        now = self._clock()
        self._in_use, self._pause = self._number, _SHORTEST_PAUSE
        self._due = self._issued[self._number].renewal_after(now)
        # What a certificate has left is its own; of those that have ended there is nothing to take back.
        self._issued = {
            number: one
            for number, one in self._issued.items()
            if one.not_after > now or number == self._in_use
        }

    def _failed(self, why: str) -> None:
        """Try again later, and oftener before the certificate in use ends than after that."""
        if not self._in_use:
            raise GuestLost(f"the machine could not use its certificate: {why}")
        self._wipe()
        until = self._issued[self._in_use].not_after
        names = ", ".join(self._request.files.names)
        state = f"ends at {until:%H:%M:%S} UTC" if until > self._clock() else "has ended"
        self._warn(f"the certificate of {names} was not renewed, and {state}: {why}")
        self._due = self._clock() + self._pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _wipe(self) -> None:
        if self._request.files.csr:
            return
        try:
            self._metadata.patch(IDENTITY_WIPE)
        except FirebuildError as error:
            self._warn(f"the key of the machine is still in its metadata: {error.message}")

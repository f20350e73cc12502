"""What host and guest say to each other about the certificate of a machine, over its session."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import InputError
from firebuild_pki.names import MAX_CSR

_MAX_REASON: Final = 2000


class IdentityAnswer(NamedTuple):
    """What the guest says: a request, or, without one and without an error, that the files are there.

    Args:
        number: which of the machine's certificates, from 1.
        csr: PKCS#10 in PEM, untrusted.
        error: why there are no new files; untrusted.
    """

    number: int
    csr: bytes
    error: str


class IdentityChannel:
    """From the one thread that renews to the guest, and back. A guest says only what it is asked for.

    Args:
        put: sends a message.
    """

    def __init__(self, put: Callable[[pb.ToGuest], None]) -> None:
        self._put = put
        self.begun = False
        """Whether the command runs; before that nobody renews: the guest may not have read its metadata."""
        self._lock = threading.Lock()
        self._number = 0
        self._due: bool | None = None  # and whether a request is
        self._answer: IdentityAnswer | None = None

    def expect(self, number: int, *, csr: bool) -> None:
        """Take an answer about certificate `number`: its request, or what has become of its files."""
        with self._lock:
            self._number, self._due, self._answer = number, csr, None

    def renew(self, number: int, *, csr: bool) -> None:
        """Have certificate `number` taken from the metadata, or requested; an answer is expected."""
        self.expect(number, csr=csr)
        self._put(pb.ToGuest(identity=pb.Identity(number=number)))

    def certify(self, number: int, chain: str, trust: str) -> None:
        """Send the certificate that was requested; an answer is expected."""
        self.expect(number, csr=False)
        self._put(pb.ToGuest(identity=pb.Identity(number=number, chain=chain, trust=trust)))

    def answer(self) -> IdentityAnswer | None:
        """Return what the guest has answered, once; None as long as it has not."""
        with self._lock:
            answer, self._answer = self._answer, None
            return answer

    def said(self, state: pb.IdentityState) -> None:
        """Take what a guest says; what comes too late, of a certificate before the last, is dropped.

        Raises:
            InputError: it was not asked for that.
        """
        with self._lock:
            if 0 < state.number < self._number:
                return
            due, self._due = self._due, None
            fits = due is not None and (bool(state.error) or bool(state.csr) == due)
            if not fits or state.number != self._number or len(state.csr) > MAX_CSR:
                raise InputError(
                    f"the guest said something of certificate {state.number} that it was not asked for"
                )
            self._answer = IdentityAnswer(state.number, state.csr, state.error[:_MAX_REASON])

"""What can go wrong on the way to a node, in words, and whether waiting can help."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

from firebuild_pki.errors import causes


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a node gave no usable answer.

    Args:
        address: the node.
        reason: what happened, after the address and a colon.
        lasting: whether trying again is useless.
        hint: what to change.
        retry_after: seconds to wait that the node asked for.
    """

    address: str
    reason: str
    lasting: bool = False
    hint: str | None = None
    retry_after: float = 0.0

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"


class NodeFailed(Exception):
    """A node gave no usable answer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def fault_of(address: str, error: Exception) -> Fault:
    """Explain an exception of the HTTP library; what it wraps decides."""
    chain = list(causes(error, _links))
    for cause in chain:
        if isinstance(cause, ssl.SSLError):
            return _tls_fault(address, cause)
        if isinstance(cause, socket.gaierror):
            return _name_fault(address, cause)
    return _connection_fault(address, chain)


def _connection_fault(address: str, chain: list[BaseException]) -> Fault:
    names = {type(cause).__name__ for cause in chain}
    if "ProxyError" in names:
        return Fault(address, "the proxy in HTTPS_PROXY did not connect to it: " + _last_words(chain))
    if any("Timeout" in name for name in names):
        return Fault(address, "no answer in time")
    if "IncompleteRead" in names:
        return Fault(address, "the answer was cut off")
    if names & {"InvalidURL", "LocationParseError", "InvalidHeader"}:
        return Fault(address, "not a usable address", lasting=True)
    return Fault(address, _last_words(chain))


def _last_words(chain: list[BaseException]) -> str:
    for cause in chain:
        if isinstance(cause, OSError) and cause.strerror and cause.errno is not None:
            return cause.strerror.lower()
    if any(type(cause).__name__ == "RemoteDisconnected" for cause in chain):
        return "the connection was closed without an answer"
    return "the connection failed"


def _tls_fault(address: str, error: ssl.SSLError) -> Fault:
    reason = (error.reason or "").lower()
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Fault(address, "the connection ended during the TLS handshake")
    if isinstance(error, ssl.SSLCertVerificationError):
        words = error.verify_message.rstrip(".").lower()
        hint = "set tls.ca_file to the CA certificate of Vault"
        if "mismatch" in words or "not valid for" in words:
            hint = "use an address that the certificate names, or set tls.server_name to a name in it"
        elif "expired" in words or "not yet valid" in words:
            hint = "renew Vault's own certificate, or set the clock of this machine"
        return Fault(address, f"its TLS certificate is not accepted: {words}", lasting=True, hint=hint)
    if "wrong_version" in reason or "http_request" in reason or "record_layer" in reason:
        hint = "is it plain http, or another service?"
        return Fault(address, "it does not speak TLS", lasting=True, hint=hint)
    if "alert" in reason:
        words = reason.replace("_", " ")
        hint = "set tls.cert_file and tls.key_file to a client certificate that Vault accepts"
        return Fault(address, f"it refused the TLS connection: {words}", lasting=True, hint=hint)
    return Fault(address, "TLS failed: " + (reason.replace("_", " ") or "unknown reason"), lasting=True)


def _name_fault(address: str, error: socket.gaierror) -> Fault:
    if error.errno == socket.EAI_AGAIN:
        return Fault(address, "its name cannot be looked up just now")
    return Fault(address, "its name is unknown", lasting=True, hint="look at the setting address")


def _links(error: BaseException) -> list[object]:
    # requests and urllib3 wrap what happened in several layers: arguments, `reason`, cause, context
    return [*error.args, getattr(error, "reason", None), error.__cause__, error.__context__]

"""The connection to the bootstrap server: one mutual-TLS channel, and the first call on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from firebuild_bootstrap import wire

from .errors import ServerLost
from .handshake import (
    Contact,
    Dropped,
    NotNow,
    Refusal,
    client_context,
    first_contact,
    has_nameless_issuer,
    is_beyond_openssl,
)
from .stop import Stop

_Answer = TypeVar("_Answer")

CALL_SECONDS = 300.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_SHORTEST_ATTEMPT = 0.5
# A server that closes connections after the handshake may be starting; one that does it so often refuses.
_MOST_DROPPED = 3
# A sign of life may take so many times the silence before it, or so many seconds.
_PATIENCE = 3
_LEAST_PATIENCE = 5.0
# What gRPC's core says when TLS itself refused; trying again can't help.
_TLS_REFUSALS = ("certificate", "handshake failed", "ssl", "verification check failed")


def failure(error: grpc.RpcError) -> str:
    """Put a failed call into words: the status code and what gRPC knows about it."""
    code, details = error.code(), error.details()
    return f"{code.name}: {details}" if details else str(code.name)


class Client:
    """The guest's side of the protocol.

    Args:
        block: where the server is and the credentials for it; the private key stays in memory.
        stop: its reason ends every call that is under way.
        connect_timeout: how many seconds the very first call is retried while nobody answers.
        call_timeout: seconds that the server may take to answer a later call, and between two messages of a
            stream. How long a step takes does not matter: it is the guest's own work.

    Raises:
        InputError: the block holds no usable credentials.
    """

    def __init__(
        self,
        block: wire.BootstrapBlock,
        stop: Stop,
        *,
        connect_timeout: float = 30.0,
        call_timeout: float = CALL_SECONDS,
    ) -> None:
        self._context = None if is_beyond_openssl(block) else client_context(block)
        self._block = block
        self._stop = stop
        self.connect_timeout = connect_timeout
        self.call_timeout = call_timeout
        self._channel: grpc.Channel | None = None

    def close(self) -> None:
        """End the channel and all calls on it."""
        if self._channel is not None:
            self._channel.close()

    def connect(self, first: Callable[[grpc.Channel], _Answer], *, silence: float = 0) -> _Answer:
        """Make the first call, on a new channel for each attempt, until the server answers.

        Args:
            first: makes it, with `connect_timeout` as its limit; may raise `grpc.RpcError`.
            silence: seconds without a word of the server after which it is asked for a sign of life, and the
                channel is given up when none comes; 0 for servers that may not be asked.

        Raises:
            ServerLost: the server stayed out of reach, or TLS or the server refused this guest.
        """
        deadline = time.monotonic() + self.connect_timeout
        pause, dropped = _FIRST_PAUSE, 0
        while True:
            try:
                return first(self._open(max(deadline - time.monotonic(), _SHORTEST_ATTEMPT), silence))
            except Refusal as error:
                raise ServerLost(self._cannot_connect(str(error), refused=True)) from error
            except NotNow as error:
                self._stop.check()
                dropped = dropped + 1 if isinstance(error, Dropped) else 0
                if dropped == _MOST_DROPPED or time.monotonic() > deadline:
                    why = str(error) if dropped else f"UNAVAILABLE: {error}"
                    raise ServerLost(self._cannot_connect(why, refused=dropped > 0)) from error
            except grpc.RpcError as error:
                self._stop.check()
                why = failure(error)
                refused = any(word in why.lower() for word in _TLS_REFUSALS)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or refused or time.monotonic() > deadline:
                    raise ServerLost(self._cannot_connect(why, refused)) from error
            self._stop.wait(pause)
            self._stop.check()
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _open(self, timeout: float, silence: float) -> grpc.Channel:
        if self._context is None or has_nameless_issuer(self._context):
            # gRPC's core takes these certificates, by their alternative names: old servers give no other, and
            # neither do CAs with ML-DSA, whose certificates this host's firebuild has checked.
            contact = Contact(self._block.ca_chain.encode(), "")
        else:
            contact = first_contact(self._block, self._context, self._stop, timeout)
        self.close()
        # The certificate is the server's own, which the guest has verified: gRPC's core takes an anchor that
        # is not a CA for itself alone, so each connection has to show that very one.
        credentials = grpc.ssl_channel_credentials(
            root_certificates=contact.certificate,
            private_key=self._block.key.encode(),
            certificate_chain=self._block.cert.encode(),
        )
        self._channel = grpc.secure_channel(
            self._block.host_port, credentials, options=_options(self._block, contact.token, silence)
        )
        return self._channel

    def _cannot_connect(self, why: str, refused: bool) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        hint = f" (the name, the CA or the validity does not fit; the guest's clock says {clock})"
        if self._context is None:
            hint = f" (the CA signs with ML-DSA, which gRPC before 1.85 does not know){hint}"
        return (
            f"can't join the build of the server {self._block.host_port} "
            f"as {self._block.server_name}: {why}{hint if refused else ''}"
        )


def _options(block: wire.BootstrapBlock, token: str, silence: float) -> list[tuple[str, Any]]:
    # gRPC's core asks for the way through as if the server were a proxy in front of itself.
    connect = [
        ("grpc.http_connect_server", block.host_port),
        ("grpc.http_connect_headers", f"Proxy-Authorization:Bearer {token}"),
    ]
    # Asked by gRPC's core, and answered by it, however busy the programs are.
    patience = round(max(_PATIENCE * silence, _LEAST_PATIENCE) * 1000)
    keepalive = [
        ("grpc.keepalive_time_ms", round(silence * 1000)),
        ("grpc.keepalive_timeout_ms", patience),
        ("grpc.http2.ping_timeout_ms", patience),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    return [
        *(connect if token else ()),
        *(keepalive if silence else ()),
        ("grpc.ssl_target_name_override", block.server_name),
        ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
        # What comes ahead of what is read: the core would let it grow to hundreds of megabytes on a fast
        # connection, where the guest is what is slow.
        ("grpc.http2.lookahead_bytes", wire.MAX_MESSAGE_BYTES),
        # A piece of files in one frame of HTTP/2, in place of 64, each of which the core looks at by itself.
        ("grpc.http2.max_frame_size", wire.CHUNK_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        # Not min_reconnect_backoff_ms: the core also takes it for the time that a connection attempt,
        # TLS handshake included, may last.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]

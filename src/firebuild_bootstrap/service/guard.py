"""What stands before every handler: the pinned certificate, the state of the build, and the errors."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc

from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.service.session import BuildEnded, Session
from firebuild_bootstrap.service.tls import PeerCertificate, Pin

if TYPE_CHECKING:
    _Context = grpc.ServicerContext
    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic for type checkers only

_MAX_DETAILS: Final = 1024


class Guard(grpc.ServerInterceptor):
    """Lets calls of one client certificate through, for as long as the build runs.

    Args:
        pin: the certificate that was issued to this build's guest.
        session: the build; an error of a handler ends it.
    """

    def __init__(self, pin: Pin, session: Session) -> None:
        self._pin = pin
        self._session = session

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Wrap the handler, also of a method that does not exist: refused peers learn nothing from that."""
        handler = continuation(handler_call_details)
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unknown_method)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._guard_stream(handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guard_stream(handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guard_unary(handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guard_unary(self, behaviour: Any) -> Callable[[Any, _Context], Any]:
        def call(request: Any, context: _Context) -> Any:
            self._admit(context)
            try:
                return behaviour(request, context)
            except Exception as error:
                self._fail(context, error)

        return call

    def _guard_stream(self, behaviour: Any) -> Callable[[Any, _Context], Iterator[Any]]:
        def call(request: Any, context: _Context) -> Iterator[Any]:
            self._admit(context)
            try:
                yield from behaviour(request, context)
            except Exception as error:
                self._fail(context, error)

        return call

    def _unknown_method(self, _: bytes, context: _Context) -> NoReturn:
        self._admit(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method")

    def _admit(self, context: _Context) -> None:
        certificate = _peer_certificate(context)
        if not self._pin.matches(certificate):
            self._session.refuse(context.peer(), certificate)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this build was not made for you")
        try:
            self._session.enter(context.peer())
        except BuildEnded:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")

    def _fail(self, context: _Context, error: Exception) -> NoReturn:
        if isinstance(error, BuildEnded):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")
        if not isinstance(error, FirebuildError):
            unexpected = FirebuildError(f"the bootstrap server failed: {error!r:.200}")
            unexpected.__cause__ = error
            error = unexpected
        self._session.fail(error)
        context.abort(grpc.StatusCode.ABORTED, error.message[:_MAX_DETAILS])


def _peer_certificate(context: _Context) -> PeerCertificate:
    pems: Any = context.auth_context()["x509_pem_cert"]  # a list, whatever the stubs say
    return PeerCertificate.of(ssl.PEM_cert_to_DER_cert(pems[0].decode("ascii")))

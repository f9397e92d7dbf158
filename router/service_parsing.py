"""Requests that are no messages: told so with a reason, like everything else that is wrong with a request.

Left to itself gRPC ends a call whose bytes cannot be parsed (truncated, a wrong wire type, text that is not UTF-8)
with UNKNOWN and no details, and prints a traceback of it for each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from baton.errors import BatonError, FieldViolation, invalid_request

Refuse = Callable[[Any, BatonError], Awaitable[None]]


class _Unreadable:
    """Stands where the message would be."""


_UNREADABLE = _Unreadable()


def unreadable(message_name: str) -> BatonError:
    """Says nothing of the bytes: they may be somebody's prompt."""
    problem = f"cannot be read as {message_name}: cut short, of another API, or text that is not UTF-8; send it whole"
    return invalid_request([FieldViolation("request", problem)])


class RefusesUnreadable:
    """Stands where generated code wants the server: every method added through this answers INVALID_REQUEST where
    its request cannot be parsed. ``refuse`` ends a call with an error."""

    def __init__(self, server: grpc.aio.Server, refuse: Refuse) -> None:
        self._server = server
        self._refuse = refuse

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """What comes here comes again, by name, as ``add_registered_method_handlers``."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        checked = {name: self._checked(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, checked),))
        self._server.add_registered_method_handlers(service, checked)

    def _checked(self, handler: Any) -> Any:
        if handler.request_streaming:
            raise ValueError("a stream of requests has no one message to refuse")
        parse: Callable[[bytes], Any] = handler.request_deserializer
        serve: Callable[[Any, Any], Awaitable[Any]] = handler.unary_stream or handler.unary_unary
        refuse = self._refuse
        error = unreadable(getattr(parse, "__self__", type(None)).__name__)

        def parsed(data: bytes) -> Any:
            try:
                return parse(data)
            except DecodeError:
                return _UNREADABLE

        async def served(request: Any, context: Any) -> Any:
            if request is _UNREADABLE:
                return await refuse(context, error)
            return await serve(request, context)

        kind = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return kind(served, parsed, handler.response_serializer)

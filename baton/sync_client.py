"""The client for programs without an event loop: the same calls, events and errors as ``baton.client``.

    with BatonClientSync("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", timeout=30):
            ...

Thread-safe, as gRPC channels are; each call blocks its own thread.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from baton.client import (
    DEFAULT_ADDRESS,
    Event,
    StreamGrammar,
    channel_options,
    chat_prompt,
    event_from_proto,
    prompt_of,
    request_to_proto,
)
from baton.request import ChatMessage, Prompt
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc


class BatonClientSync:
    """A client of one Baton. Use as a context manager, or ``close()``."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, options: Sequence[tuple[str, Any]] = ()) -> None:
        """``address``: host:port. ``options``: gRPC channel options over Baton's own."""
        self.address = address
        self._channel = grpc.insecure_channel(address, options=[*channel_options(address), *options])
        self._stub = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, timeout: float, **options: Any
    ) -> Generator[Event, None, None]:
        """Streams ``Started Chunk* Finished``. ``options``: the other keywords of ``BatonClient.generate``. Closing
        the generator cancels the call. Raises ``BatonError``, and ``ValueError`` as ``BatonClient.generate`` does."""
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be positive and finite seconds, not {timeout}")
        return self._events(request_to_proto(prompt_of(prompt), **options), timeout)

    def chat(
        self, messages: Sequence[ChatMessage | tuple[str, str]], *, timeout: float, **options: Any
    ) -> Generator[Event, None, None]:
        """Like ``generate`` for a conversation, oldest message first."""
        return self.generate(chat_prompt(messages), timeout=timeout, **options)

    def _events(self, message: pb.GenerateRequest, timeout: float) -> Generator[Event, None, None]:
        call = self._stub.Generate(message, timeout=timeout)
        grammar = StreamGrammar()
        try:
            for response in call:
                event = event_from_proto(response)
                if event is not None:
                    grammar.check(event)
                    yield event
            grammar.check_end()
        except grpc.RpcError as error:
            raise grammar.broken(from_rpc_error(error, peer=self.address)) from None
        finally:
            call.cancel()  # a finished call ignores it; an abandoned one must not run on

    def close(self) -> None:
        """Cancels what is open. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BatonClientSync {self.address}>"

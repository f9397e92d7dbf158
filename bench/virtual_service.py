"""The whole service in virtual time: the public API's own handlers in front of a virtual cluster, without a socket.

A call is a task that runs ``GenerationService.Generate`` with a context that keeps what was written. To cancel the
task is what gRPC does when its caller leaves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from baton.request import Role
from baton.v1 import generation_pb2 as pb
from bench.virtual_cluster import BLOCK, CONTEXT, COST, LEASE_S, SECRET, ProcessClient, VirtualCluster, WorkerProcess
from engine.sim import SimConfig
from engine.sim_tokens import TokenRule
from router.config import RouterConfig
from router.server import RouterServer
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model
from router.worker_client import WorkerClient

VOCABULARY: int = tiny_tokenizer().get_vocab_size()
RULE = TokenRule(vocab_size=VOCABULARY, special_token_count=3, eos_token_id=END_ID)


class Aborted(grpc.aio.BaseError):
    """As gRPC leaves a handler that aborts its call."""


class KeptCall:
    """A call's context: what was written, and how it was refused. A write takes a turn of the loop, as gRPC's does,
    or ``write_s``."""

    def __init__(self, time_remaining_s: float | None = 300.0, *, write_s: float = 0.0) -> None:
        self.written: list[Any] = []
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self._time_remaining_s = time_remaining_s
        self._write_s = write_s

    async def write(self, message: Any) -> None:
        await asyncio.sleep(self._write_s)
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        await asyncio.sleep(0)
        self.code, self.details = code, details
        raise Aborted(details)

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def done(self) -> bool:
        return False

    @property
    def token_ids(self) -> list[int]:
        """Of sample 0."""
        chunks = [message.chunk for message in self.written if message.HasField("chunk")]
        return [token_id for chunk in chunks if chunk.sample_index == 0 for token_id in chunk.token_ids]

    @property
    def is_finished(self) -> bool:
        return any(message.HasField("finished") for message in self.written)


class VirtualService(VirtualCluster):
    """A virtual cluster whose router is the real server's, sockets apart."""

    def __init__(
        self,
        config: SimConfig,
        directory: Path,
        connect: Callable[[WorkerProcess], WorkerClient],
        router: dict[str, Any],
    ) -> None:
        super().__init__(config)
        settings = {
            "model_name": "tiny",
            "model_dir": str(directory),
            "lease_s": LEASE_S,
            "max_context_token_count": CONTEXT,
            **router,
        }
        self.server = RouterServer(
            RouterConfig(**settings),
            secret=SECRET,
            connect=lambda spec: connect(self.processes[spec.worker_id]),
            rng=random.Random(7),  # noqa: S311  # a reproducible choice among equals
        )
        self.roster, self.admission, self.relay = self.server.roster, self.server.admission, self.server.relay

    async def generate(self, message: pb.GenerateRequest, call: KeptCall) -> None:
        """One call, served to its end in the task that awaits this."""
        try:
            await self.server.generation.Generate(message, call)
        except Aborted:
            return

    async def close(self) -> None:
        await self.server.close()
        for process in [*self.processes.values(), *self.dead]:
            process.go_on()
            await process.close()


def message_of(
    number: int, *, prompt_token_count: int = 20, max_output_token_count: int = 4, **more: Any
) -> pb.GenerateRequest:
    """A request, told from others by its number."""
    words = VOCABULARY - RULE.special_token_count
    prompt = [RULE.special_token_count + (7 * number + 11 * index) % words for index in range(prompt_token_count)]
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        stop=pb.StopConditions(max_output_token_count=max_output_token_count, ignore_eos=True),
        output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH),
        **more,
    )


@asynccontextmanager
async def virtual_service(
    directory: Path,
    prefill_count: int = 1,
    decode_count: int = 1,
    *,
    connect: Callable[[WorkerProcess], WorkerClient] = ProcessClient,
    **router: Any,
) -> AsyncIterator[VirtualService]:
    """``directory``: for the model's tokenizer. ``router``: keys of its configuration. At the end the books must
    balance."""
    write_tiny_model(directory, max_context_token_count=CONTEXT)
    config = SimConfig(
        engine_id="set-later",
        block_token_count=BLOCK,
        block_count=256,
        max_context_token_count=CONTEXT,
        enable_prefix_caching=False,  # cached blocks count as used: the books could not be seen to balance
        cost=COST,
        tokens=RULE,
    )
    service = VirtualService(dataclasses.replace(config), directory, connect, router)
    try:
        for role, count in ((Role.PREFILL, prefill_count), (Role.DECODE, decode_count)):
            for index in range(count):
                await service.launch(f"{role.value}-{index}", role)
        await service.until_ready()
        yield service
        await service.assert_balanced()
    finally:
        await service.close()

"""A fleet of simulated engines over real sockets and processes, on free ports. A helper of the tests beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from baton.client import BatonClient, Chunk, Finished
from baton.request import OutputOptions, StopConditions
from engine.sim_tokens import EMPTY_CONTENT, TokenRule, extend_content
from fleet.commands import until_router_sees
from fleet.config import FleetConfig, parse_config
from router.tiny_model import END_ID, tiny_tokenizer, write_tiny_model

READY_S = 150.0
ANSWER_S = 150.0
RULE = TokenRule(vocab_size=tiny_tokenizer().get_vocab_size(), special_token_count=3, eos_token_id=END_ID)

PROMPT = tuple(range(3, 203))


def simulated_toml(
    directory: Path, *, cluster: str = "", ray: str = "", prefill: str = "", decode: str = "", step_s: float = 0.01
) -> str:
    """One prefill and one decode worker unless the tables say otherwise. A decode step takes ``step_s``."""
    model = write_tiny_model(directory / "model")
    engine = 'kind = "simulated"\nblock_token_count = 16\nkv_cache_bytes = 536870912\nmax_context_token_count = 2048'
    simulated = (
        f"tokens = {{vocab_size = {RULE.vocab_size}, special_token_count = 3, eos_token_id = {END_ID}}}\n"
        f"cost = {{prefill = {{base_s = 0.005, per_token_s = 1e-5, per_token_squared_s = 0.0}}, "
        f"decode = {{base_s = {step_s}, per_context_token_s = 0.0, per_sequence_s = 0.0}}}}"
    )
    return f"""
[cluster]
name = "test"
state_dir = "{directory / "state"}"
start_deadline_s = 150.0
stop_deadline_s = 30.0
{cluster}
[cluster.ray]
{ray}
[model]
name = "tiny"
path = "{model}"
[router]
listen_address = "127.0.0.1:0"
admin_address = "127.0.0.1:0"
metrics_address = "127.0.0.1:0"
drain_grace_s = 2.0
worker_silence_s = 30.0
max_no_worker_wait_s = 60.0
[prefill]
{prefill}
[prefill.engine]
{engine}
[prefill.simulated]
{simulated}
[decode]
{decode}
[decode.engine]
{engine}
[decode.simulated]
{simulated}
"""


def simulated_config(directory: Path, **tables: Any) -> FleetConfig:
    text = simulated_toml(directory, **tables)
    file = directory / "fleet.toml"
    file.write_text(text, encoding="utf-8")
    return parse_config(text, source=str(file))


def expected_tokens(count: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What an undisturbed simulated model answers, computed here and not by any worker."""
    answer: list[int] = []
    content = extend_content(EMPTY_CONTENT, prompt)
    for _ in range(count):
        answer.append(RULE.next_token(content, len(prompt) + len(answer)))
        content = extend_content(content, answer[-1:])
    return answer


class Answer:
    """One streamed answer, growing while it comes."""

    def __init__(self, address: str, token_count: int) -> None:
        self.tokens: list[int] = []
        self.finished: Finished | None = None
        self._address, self._token_count = address, token_count
        self._grew = asyncio.Event()

    async def stream(self) -> None:
        async with BatonClient(self._address) as client:
            events = client.generate(
                PROMPT,
                timeout=ANSWER_S,
                stop=StopConditions(max_output_token_count=self._token_count),
                output=OutputOptions(wants_text=False, wants_token_ids=True),
            )
            async with aclosing(events):
                async for event in events:
                    match event:
                        case Chunk():
                            assert event.first_token_index == len(self.tokens)
                            self.tokens += event.token_ids
                            self._grew.set()
                        case Finished():
                            self.finished = event

    async def until(self, token_count: int) -> None:
        """Returns once that many tokens are here."""
        async with asyncio.timeout(ANSWER_S):
            while len(self.tokens) < token_count:
                self._grew.clear()
                await self._grew.wait()


async def generate(address: str, token_count: int) -> Answer:
    answer = Answer(address, token_count)
    await answer.stream()
    return answer


async def until_ready(fleet: Any) -> dict[str, Mapping[str, Any]]:
    """Waits for all members, and for the router to serve. Returns the endpoints by name."""
    version = -1
    async with asyncio.timeout(READY_S):
        while not fleet.is_ready:
            version = await fleet.changed(version, 1.0)
            assert not fleet.alarmed, f"{fleet.alarmed}"
    endpoints = {row.name: row.endpoint for row in fleet.states()}
    workers = [name for name in endpoints if name != "router"]
    assert await until_router_sees(endpoints["router"]["admin_address"], workers, READY_S)
    return endpoints


async def until_replaced(fleet: Any, name: str, old_pid: int) -> Mapping[str, Any]:
    """Waits until the member is ready again as another process."""
    version = -1
    async with asyncio.timeout(READY_S):
        while True:
            for row in fleet.states():
                if row.name == name and row.endpoint is not None and row.endpoint["pid"] != old_pid:
                    return dict(row.endpoint)
            version = await fleet.changed(version, 1.0)

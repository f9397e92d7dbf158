"""The router's end of the process that parses answers: starts it, asks it, and brings it back when it dies.

Owns the process, its pipes and what is under way in it. A stream asks one thing at a time, so what waits is bounded
by the streams there are; every wait has a deadline. A process that answers nobody for that long is stuck (a parser's
expression may run for hours on what a model says) and is killed. Whatever a dead process had open fails with a typed
error; the next is started at once, then after pauses that double.

    starting --ready--> serving --died--> pause --> starting ...        closed: it is ended, and nothing starts again
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.errors import BatonError, attempts_exhausted, deadline_exceeded, internal, no_worker
from baton.request import ToolCallDelta
from baton.timeline import Phase
from router.chats.answer_parsing import AnswerPlan, Parsed, WholeCall
from router.chats.parser_frames import HEADER_BYTES, FrameError, body_length, frame, message_of, packed_ids
from router.chats.parser_process import PARENT_VARIABLE
from router.config import RouterConfig

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0
STOP_S = 2.0

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TZ")
"""Of our environment. Not the cluster's secret: what runs there has no use for it."""
_SET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

logger = logging.getLogger("baton.router")


class ParserStartError(Exception):
    """The process did not get ready; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ParserSpec:
    """What to parse with."""

    model_dir: str
    tool_parser: str = ""
    """By vLLM's name. Empty: none."""
    reasoning_parser: str = ""
    deadline_s: float = 10.0
    """Of one step of one answer."""
    start_deadline_s: float = 120.0
    command: tuple[str, ...] = ("-m", "router.chats.parser_process")
    """What the interpreter runs; a test may have it run something quicker."""
    wait_s: float = 60.0
    """How long a request waits for a process that is being started again: ten seconds, or more on a busy machine."""


@dataclass(slots=True)
class _Running:
    """One process that got ready, and what is under way in it."""

    process: Process
    heard_at: float
    waiting: dict[tuple[int, int], asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    is_over: bool = False

    def send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        if not self.is_over:
            self.process.stdin.write(frame(message))

    def end(self) -> None:
        self.is_over = True
        for waits in self.waiting.values():
            if not waits.done():
                waits.set_exception(_Gone())
        self.waiting.clear()


class _Gone(Exception):
    """The process ended."""


class ParserChild:
    """One per router. ``start`` before requests come; ``close`` is idempotent."""

    def __init__(self, spec: ParserSpec) -> None:
        self._spec = spec
        self._numbers = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._running: _Running | None = None
        self._is_ready = asyncio.Event()
        self._keeping: Mapping[tuple[bool, bool], bool] = {}
        """Whether the parsers (of tools, of thinking) look for special tokens in the text; known once it started."""
        self.start_count = 0

    def __repr__(self) -> str:
        return (
            f"<ParserChild {'ready' if self._is_ready.is_set() else 'not ready'}, started {self.start_count} times>"
        )

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        return None if self._running is None else self._running.process.pid

    async def start(self) -> None:
        """Returns when it is ready. Raises ``ParserStartError``."""
        running = await self._started()
        self._serve_with(running)
        self._task = asyncio.create_task(self._keep(running), name="parsers")

    async def close(self) -> None:
        """Ends the process."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        running, self._running = self._running, None
        if running is not None:  # cancelled before its first step, the task ended nothing
            self._is_ready.clear()
            running.end()
            await _ended(running.process)

    async def ready(self) -> None:
        """Returns when there is a process that serves. Raises NO_WORKER after ``wait_s``."""
        if self._is_ready.is_set():
            return
        try:
            async with asyncio.timeout(self._spec.wait_s):
                await self._is_ready.wait()
        except TimeoutError:
            raise no_worker("parser", 0) from None

    def keeps_special_tokens(self, plan: AnswerPlan) -> bool:
        """Whether the text for this plan's parsers must have special tokens in it. After ``start``."""
        return not plan.is_required and self._keeping[plan.uses_tools, plan.uses_reasoning]

    def open(
        self, plan: AnswerPlan, prompt_token_ids: Sequence[int], *, keeps_special_tokens: bool, deadline_at: float
    ) -> ParserStream:
        """A stream for one answer; close it. Raises NO_WORKER."""
        running = self._running
        if running is None:
            raise no_worker("parser", 0)
        number = next(self._numbers)
        running.send(
            {
                "op": "open",
                "stream": number,
                "tools": plan.tools,
                "choice": plan.choice,
                "arguments": plan.template_arguments,
                "uses_tools": plan.uses_tools,
                "uses_reasoning": plan.uses_reasoning,
                "is_required": plan.is_required,
                "keeps_special_tokens": keeps_special_tokens,
                # Only thinking may have begun in the prompt.
                "prompt": packed_ids(prompt_token_ids if plan.uses_reasoning else ()),
            }
        )
        return ParserStream(running, number, deadline_s=self._spec.deadline_s, deadline_at=deadline_at)

    def _serve_with(self, running: _Running) -> None:
        self._running = running
        self._is_ready.set()

    async def _keep(self, running: _Running) -> None:
        """Serves with one process after the other, until cancelled."""
        pause_s = FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        while True:
            began_at = loop.time()
            try:
                await self._read(running)
            finally:
                self._running = None
                self._is_ready.clear()
                running.end()
                await _ended(running.process)
            logger.warning("the process that parses answers ended with %s", running.process.returncode)
            if loop.time() - began_at > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                try:
                    running = await self._started()
                    self._serve_with(running)
                    break
                except ParserStartError as error:
                    logger.error("%s", error)

    async def _started(self) -> _Running:
        spec = self._spec
        self.start_count += 1
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*spec.command, spec.model_dir, spec.tool_parser, spec.reasoning_parser),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,  # tracebacks of parsers may quote answers; why it did not start comes as a frame
            env={
                **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                **_SET,
                PARENT_VARIABLE: str(os.getpid()),
            },
        )
        is_ready = False
        try:
            async with asyncio.timeout(spec.start_deadline_s):
                message = await _read_frame(process)
            if "ready" not in message:
                raise ParserStartError(_why_not(spec, str(message.get("failed", "it said nothing we know"))))
            self._keeping = {
                (each["uses_tools"], each["uses_reasoning"]): each["keeps_special_tokens"]
                for each in message["ready"]
            }
            is_ready = True
            return _Running(process, asyncio.get_running_loop().time())
        except TimeoutError:
            what = f"it was not ready within {spec.start_deadline_s:g} s; set parser_start_deadline_s"
            raise ParserStartError(_why_not(spec, what)) from None
        except (FrameError, _Gone):
            raise ParserStartError(
                _why_not(spec, "it ended before it was ready; is vLLM installed where the router runs?")
            ) from None
        finally:
            if not is_ready:
                await _ended(process)

    async def _read(self, running: _Running) -> None:
        """Hands answers to those who wait for them, until the process ends."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await _read_frame(running.process)
            except _Gone:
                return
            except FrameError as error:
                logger.error("the process that parses answers is not itself any more: %s", error)
                return
            running.heard_at = loop.time()
            waits = running.waiting.pop((message.get("stream", 0), message.get("turn", 0)), None)
            if waits is not None and not waits.done():
                waits.set_result(message)


class ParserStream:
    """One answer in the process. One thing asked at a time; ``close`` once, whatever happened."""

    def __init__(self, running: _Running, number: int, *, deadline_s: float, deadline_at: float) -> None:
        self._running = running
        self._number = number
        self._deadline_s = deadline_s
        self._deadline_at = deadline_at
        self._turn = 0
        self._token_count = 0

    async def push(self, texts: Sequence[str], token_ids: Sequence[int]) -> Parsed:
        """What the parsers make of the next tokens, each with the text that it completed. Raises
        ATTEMPTS_EXHAUSTED when the process died or took too long, DEADLINE_EXCEEDED, INTERNAL for a parser that
        failed."""
        parsed = _parsed(await self._ask({"op": "push", "texts": list(texts), "ids": list(token_ids)}))
        self._token_count += len(token_ids)
        return parsed

    async def finish(self, text: str) -> Parsed:
        """The end: ``text`` was held back, and has no token. The calls come whole, too. Raises like ``push``."""
        return _parsed(await self._ask({"op": "finish", "text": text}))

    def close(self) -> None:
        self._running.send({"op": "close", "stream": self._number})

    async def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        running, loop = self._running, asyncio.get_running_loop()
        if running.is_over:
            raise self._lost("the process that parses answers ended")
        self._turn += 1
        key = (self._number, self._turn)
        answer = running.waiting[key] = loop.create_future()
        asked_at = loop.time()
        try:
            async with asyncio.timeout_at(min(asked_at + self._deadline_s, self._deadline_at)):
                assert running.process.stdin is not None
                running.send({**message, "stream": self._number, "turn": self._turn})
                await running.process.stdin.drain()
                reply: dict[str, Any] = await answer
        except TimeoutError:
            now = loop.time()
            # BESIDE an answer that takes long the others are served: nobody was, so it is stuck.
            if now - max(running.heard_at, asked_at) >= self._deadline_s and running.process.returncode is None:
                logger.error("the process that parses answers is stuck, and killed")
                running.process.kill()
            if now >= self._deadline_at:
                raise deadline_exceeded(Phase.DECODE.value, self._token_count) from None
            raise self._lost(f"parsing a step of the answer took longer than {self._deadline_s:g} s") from None
        except (_Gone, ConnectionError):
            raise self._lost("the process that parses answers ended") from None
        finally:
            running.waiting.pop(key, None)
        if "failed" in reply:
            # By its type alone: what a parser says of what it read may quote the answer.
            raise internal(f"vLLM's parser failed on this answer with {str(reply['failed'])[:64]}")
        return reply

    def _lost(self, what: str) -> BatonError:
        return attempts_exhausted(1, self._token_count, Phase.DECODE.value, what)


def parsers_of(config: RouterConfig) -> ParserChild | None:
    """As configured; None where no parser is."""
    if not (config.tool_parser or config.reasoning_parser):
        return None
    return ParserChild(
        ParserSpec(
            model_dir=str(Path(config.model_dir).expanduser()),
            tool_parser=config.tool_parser,
            reasoning_parser=config.reasoning_parser,
            deadline_s=config.parser_deadline_s,
            start_deadline_s=config.parser_start_deadline_s,
        )
    )


def _parsed(reply: Mapping[str, Any]) -> Parsed:
    return Parsed(
        text=reply["text"],
        reasoning_text=reply["reasoning"],
        calls=tuple(ToolCallDelta(index, "", name, arguments) for index, name, arguments in reply["calls"]),
        whole=tuple(WholeCall(name, arguments) for name, arguments in reply.get("whole", ())),
    )


async def _read_frame(process: Process) -> dict[str, Any]:
    """Raises ``_Gone`` at the end, ``FrameError`` for anything that is no frame."""
    assert process.stdout is not None
    try:
        return message_of(
            await process.stdout.readexactly(body_length(await process.stdout.readexactly(HEADER_BYTES)))
        )
    except (asyncio.IncompleteReadError, ConnectionError):
        raise _Gone from None


async def _ended(process: Process) -> None:
    """Ends it, the gentle way first: without input it has nothing to do."""
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError, RuntimeError):
        process.stdin.close()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise


def _why_not(spec: ParserSpec, why: str) -> str:
    keys = (("tool_parser", spec.tool_parser), ("reasoning_parser", spec.reasoning_parser))
    said = ", ".join(f'{key} = "{name}"' for key, name in keys if name)
    return f"{said}: the process that parses answers cannot start: {why}"

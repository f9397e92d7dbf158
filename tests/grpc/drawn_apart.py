"""Samples that differ: a simulated engine says the same whatever the seed; here each seed has an answer of its own.

A helper of the conformance tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from sim_cluster import SimCluster

from baton.leg import DecodeDone, Stepped
from baton.request import LegFinish
from engine.protocol import DecodeJob, PrefillJob
from router.tiny_model import END_ID


@contextmanager
def drawn_apart(cluster: SimCluster, says: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """``says``: the whole answer, by the seed it is drawn with. What a job's stop conditions end, ends here, too."""
    undo: list[Callable[[], None]] = []
    for worker in cluster.workers.values():
        engine: Any = worker.engine
        prefill, decode = engine.prefill, engine.decode

        async def said_first(job: PrefillJob, prefill: Any = prefill, engine: Any = engine) -> Any:
            answer = says.get(job.sampling.seed or 0)
            if answer is None:
                return await prefill(job)
            prefilled = await prefill(endless(job))
            token_id = answer[job.output_token_count]
            if not _ends(token_id, job):
                return replace(prefilled, first_token_id=token_id)
            if prefilled.held is not None:
                await engine.release(prefilled.held.handle)
            return replace(prefilled, first_token_id=token_id, finish=LegFinish.STOP, held=None)

        async def said(job: DecodeJob, decode: Any = decode) -> Any:
            answer, at = says.get(job.sampling.seed or 0), job.output_token_count
            async with aclosing(decode(job if answer is None else endless(job))) as events:
                async for event in events:
                    if answer is None or not isinstance(event, Stepped):
                        yield event
                        continue
                    fresh = tuple(answer[at : at + len(event.token_ids)])
                    ends = [place for place, each in enumerate(fresh) if _ends(each, job)]
                    fresh = fresh[: ends[0] + 1] if ends else fresh
                    at += len(fresh)
                    yield Stepped(fresh, event.logprobs[: len(fresh)])
                    if ends:
                        yield DecodeDone(LegFinish.STOP)
                        return

        engine.prefill, engine.decode = said_first, said
        undo.append(lambda engine=engine, prefill=prefill, decode=decode: _set(engine, prefill, decode))  # type: ignore[misc]
    try:
        yield
    finally:
        for each in undo:
            each()


def endless(job: Any) -> Any:
    """What the engine itself says is no end: what is told instead may be one."""
    return replace(job, stop=replace(job.stop, stop_token_ids=(), ignore_eos=True))


def _ends(token_id: int, job: PrefillJob | DecodeJob) -> bool:
    return token_id in job.stop.stop_token_ids or (token_id == END_ID and not job.stop.ignore_eos)


def _set(engine: Any, prefill: Any, decode: Any) -> None:
    engine.prefill, engine.decode = prefill, decode

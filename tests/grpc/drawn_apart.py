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


@contextmanager
def drawn_apart(cluster: SimCluster, says: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """``says``: the whole answer, by the seed it is drawn with. What a job's stop conditions end, ends here, too."""
    undo: list[Callable[[], None]] = []
    for worker in cluster.workers.values():
        engine: Any = worker.engine
        prefill, decode = engine.prefill, engine.decode

        async def said_first(job: PrefillJob, prefill: Any = prefill) -> Any:
            prefilled = await prefill(job)
            answer = says.get(job.sampling.seed or 0)
            if answer is None:
                return prefilled
            token_id = answer[job.output_token_count]
            return replace(prefilled, first_token_id=token_id)

        async def said(job: DecodeJob, decode: Any = decode) -> Any:
            answer, at = says.get(job.sampling.seed or 0), job.output_token_count
            async with aclosing(decode(job)) as events:
                async for event in events:
                    if answer is None or not isinstance(event, Stepped):
                        yield event
                        continue
                    fresh = tuple(answer[at : at + len(event.token_ids)])
                    ends = [place for place, each in enumerate(fresh) if each in job.stop.stop_token_ids]
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


def _set(engine: Any, prefill: Any, decode: Any) -> None:
    engine.prefill, engine.decode = prefill, decode

"""What every system is asked: one cell is one load, the same requests in the same order for every system of a round.

Pure. Lengths and rates are for the default model on two cores: from idle to beyond what two cores can do.

- *alone*: prompts of 64, 512 and 2,000 tokens one after another; the engine's own speed, nothing beside it.
- *streams*: four streams of 150 tokens while four prompts of 2,000 arrive. What counts is how long the streams are
  held up and how long the long prompts wait.
- *chat*, *bursts*, *agent*, *code*: open loops at rising rates. In *bursts* long prompts come together beside chat.
- *crowd*: eight callers who each ask again as soon as they were answered, for systems that serve one at a time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.traffic.draft import Draft
from bench.traffic.lengths import Fixed, LogNormal, Uniform
from bench.traffic.pacers import Gamma, Pacer, Poisson
from bench.traffic.plan import Plan, PlannedRequest
from bench.traffic.prompts import PromptMaker
from bench.traffic.traces import Trace, plan_from_trace, read_trace
from bench.traffic.workloads import make_plan

ALONE_LENGTHS = (64, 512, 2000)
ALONE_COUNTS = (4, 4, 2)
ALONE_OUTPUT_TOKEN_COUNT = 24
ALONE_PAUSE_S = 0.15
STREAM_COUNT = 4
STREAM_TOKEN_COUNTS = (64, 150)
"""Prompt and answer."""
ARRIVAL_TOKEN_COUNT = 2000
ARRIVAL_OUTPUT_TOKEN_COUNT = 4
FIRST_ARRIVAL_S = 1.0
ARRIVAL_INTERVAL_S = 1.5
CROWD_COUNT = 8
CROWD_TURN_COUNT = 2
CROWD_TOKEN_COUNTS = (64, 48)

CHAT = {
    "system_prompt_token_count": 40,
    "message_tokens": LogNormal(50, 0.8, high=400),
    "answer_tokens": LogNormal(40, 0.5, high=150),
}
AGENT = {"pause_mean_s": 0.3, "turns": Uniform(3, 6)}
AGENT_SCALE = 0.3
BURSTS = {
    "stream_answer_tokens": Fixed(60),
    "burst_prompt_tokens": Fixed(1500),
    "burst_size": 2,
    "burst_every_s": 7.0,
}
SEED_LIMIT = 200
CONTEXT_TOKEN_COUNT = 8192
CODE_SCALE = 0.2
CODE_LIKENESS_CV = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One load. ``rate_per_s``: requests (agent: sessions) a second, None where the load is not an open loop."""

    workload: str
    rate_per_s: float | None = None
    duration_s: float = 0.0
    repetition: int = 0
    """Of a load that is one sample a run: which one."""
    timeout_s: float = 30.0

    @property
    def name(self) -> str:
        rate = "" if self.rate_per_s is None else f"@{self.rate_per_s:g}"
        return f"{self.workload}{rate}" + (f"#{self.repetition}" if self.repetition else "")

    @property
    def group(self) -> str:
        """Cells that are repetitions of each other."""
        return self.name.partition("#")[0]


QUICK_CELLS = (
    Cell(workload="alone"),
    Cell(workload="streams"),
    Cell(workload="chat", rate_per_s=2.0, duration_s=10.0),
    Cell(workload="crowd", timeout_s=60.0),
)
FULL_CELLS = (
    Cell(workload="alone"),
    Cell(workload="streams"),
    Cell(workload="chat", rate_per_s=1.0, duration_s=10.0),
    Cell(workload="agent", rate_per_s=0.25, duration_s=10.0),
    Cell(workload="code", rate_per_s=0.5, duration_s=10.0),
    Cell(workload="bursts", rate_per_s=0.5, duration_s=11.0),
    Cell(workload="streams", repetition=1),
    Cell(workload="crowd", timeout_s=60.0),
    Cell(workload="chat", rate_per_s=3.0, duration_s=8.0),
    Cell(workload="code", rate_per_s=1.5, duration_s=8.0),
    Cell(workload="agent", rate_per_s=0.75, duration_s=8.0),
    Cell(workload="bursts", rate_per_s=1.5, duration_s=11.0),
    Cell(workload="chat", rate_per_s=6.0, duration_s=6.0),
)
"""Rising rates of a workload stay in this order, so that a rate beyond a system's end is known before the next."""


def beyond(cell: Cell, shares: dict[str, tuple[float, float]]) -> bool:
    """Whether a lower rate of the workload was already more than the system could do.

    ``shares``: by workload, the highest rate tried and the share of its requests that were answered. A system that
    answers fewer than half of them within the timeout is not asked for more: it would still be busy with that when
    the next load begins.
    """
    tried = shares.get(cell.workload)
    if tried is None or cell.rate_per_s is None:
        return False
    rate_per_s, answered_share = tried
    return cell.rate_per_s > rate_per_s and answered_share < 0.5


def chain(requests: Sequence[PlannedRequest], pause_s: float, *, first_at_s: float = 0.0) -> list[PlannedRequest]:
    """The requests one after another, each due ``pause_s`` after the end of the one before."""
    chained: list[PlannedRequest] = []
    for request in requests:
        if chained:
            chained.append(replace(request, at_s=pause_s, after=chained[-1].index))
        else:
            chained.append(replace(request, at_s=first_at_s, after=None))
    return chained


class CellPlans:
    """Plans of the cells. The same for every system of a pass, different from pass to pass and from cell to cell, so
    that no prompt of one is in the prefix cache of another; shared prefixes are shared within a cell.

    ``trace``: the code trace to replay; without it, requests of like lengths and burstiness. Raises ``TraceError``.
    """

    def __init__(self, prompts: PromptMaker, *, seed: int, trace: Path | None) -> None:
        self._prompts = prompts
        self._seed = seed
        self._trace: Trace | None = None if trace is None else read_trace(trace)

    @property
    def trace_facts(self) -> Mapping[str, object]:
        """Where the code cells come from; empty without a trace."""
        return {} if self._trace is None else self._trace.facts()

    def warm_up(self, round_number: int) -> Plan:
        """Short, long, short: one after another."""
        rng_key = f"warm-up/{self._seed}/{round_number}"
        return self._listed("warm-up", self._sequence(rng_key, (64, ARRIVAL_TOKEN_COUNT, 64), 8), {})

    def probe(self, round_number: int, number: int, count: int = 1) -> Plan:
        """Short requests one after another, to see whether a system is idle."""
        key = f"probe/{self._seed}/{round_number}/{number}"
        return self._listed("probe", self._sequence(key, (32,) * count, 8), {})

    def plan(self, cell: Cell, round_number: int) -> Plan:
        key = f"{self._seed}/{round_number}/{cell.name}"
        # Of this cell and pass alone; the same in every process, which hash() is not.
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big")
        match cell.workload:
            case "alone":
                lengths = [
                    length for length, count in zip(ALONE_LENGTHS, ALONE_COUNTS, strict=True) for _ in range(count)
                ]
                random.Random(seed).shuffle(lengths)  # noqa: S311 a reproducible load
                return self._listed(
                    "alone", self._sequence(key, lengths, ALONE_OUTPUT_TOKEN_COUNT), {"pause_s": ALONE_PAUSE_S}
                )
            case "streams":
                return self._streams(key)
            case "crowd":
                return self._crowd(key)
            case _:
                return self._open_loop(cell, seed, round_number)

    def _open_loop(self, cell: Cell, seed: int, round_number: int) -> Plan:
        """The first seed whose arrivals are about as many as the rate says: in so short a load they may be none."""
        assert cell.rate_per_s is not None
        if cell.workload == "code" and self._trace is not None:
            return self._code_of_trace(self._trace, cell, seed, round_number)
        expected = cell.rate_per_s * cell.duration_s
        name, pacer, scale, parameters = _open_loop_of(cell.workload, cell.rate_per_s)
        for tried in range(seed, seed + SEED_LIMIT):
            draft = Draft(seed=tried, prompts=self._prompts, scale=scale, context_token_count=CONTEXT_TOKEN_COUNT)
            arrival_count = len(pacer.times_s(cell.duration_s, draft.rng("pacer")))  # as the plan will draw them
            if abs(arrival_count - expected) <= max(1.0, 0.2 * expected):
                return make_plan(
                    name,
                    pacer=pacer,
                    duration_s=cell.duration_s,
                    seed=tried,
                    prompts=self._prompts,
                    scale=scale,
                    context_token_count=CONTEXT_TOKEN_COUNT,
                    parameters=parameters,
                )
        raise ValueError(f"{cell.name}: no seed gives about {expected:g} arrivals")

    def _code_of_trace(self, trace: Trace, cell: Cell, seed: int, round_number: int) -> Plan:
        """As many rows in sequence as the cell asks requests, their times brought to its duration.

        Each pass takes other rows. The bursts stay what they are among themselves: times are divided by one factor.
        """
        assert cell.rate_per_s is not None
        count = max(2, round(cell.rate_per_s * cell.duration_s))
        first = (round_number + 1) * len(trace.rows) // 7 % max(1, len(trace.rows) - count)
        rows = trace.rows[first : first + count]
        start_s, last_s = rows[0].at_s, rows[-1].at_s
        return plan_from_trace(
            trace,
            self._prompts,
            seed=seed,
            start_s=start_s,
            end_s=last_s + 1e-6,
            rate_scale=max(last_s - start_s, 1e-3) / cell.duration_s,
            length_scale=CODE_SCALE,
            request_limit=count,
        )

    def _streams(self, key: str) -> Plan:
        prompt_count, output_count = STREAM_TOKEN_COUNTS
        requests = [
            self._request(key, index, prompt_count, output_count, group="stream") for index in range(STREAM_COUNT)
        ]
        for place in range(STREAM_COUNT):
            at_s = FIRST_ARRIVAL_S + place * ARRIVAL_INTERVAL_S
            index = STREAM_COUNT + place
            requests.append(
                self._request(key, index, ARRIVAL_TOKEN_COUNT, ARRIVAL_OUTPUT_TOKEN_COUNT, group="arrival", at_s=at_s)
            )
        return self._listed("streams", requests, {"arrival_interval_s": ARRIVAL_INTERVAL_S})

    def _crowd(self, key: str) -> Plan:
        prompt_count, output_count = CROWD_TOKEN_COUNTS
        requests: list[PlannedRequest] = []
        for _ in range(CROWD_COUNT):
            first = len(requests)
            turns = [self._request(key, first + turn, prompt_count, output_count) for turn in range(CROWD_TURN_COUNT)]
            requests += chain(turns, 0.0)
        return self._listed("crowd", requests, {"caller_count": CROWD_COUNT})

    def _sequence(self, key: str, lengths: Sequence[int], output_token_count: int) -> list[PlannedRequest]:
        requests = [self._request(key, index, length, output_token_count) for index, length in enumerate(lengths)]
        return chain(requests, ALONE_PAUSE_S)

    def _request(
        self, key: str, index: int, prompt_count: int, output_count: int, *, group: str = "all", at_s: float = 0.0
    ) -> PlannedRequest:
        return PlannedRequest(
            index=index,
            at_s=at_s,
            prompt_token_ids=self._prompts.tokens(f"comparison/{key}/{index}", prompt_count),
            output_token_count=output_count,
            group=group,
        )

    def _listed(self, name: str, requests: Sequence[PlannedRequest], facts: dict[str, object]) -> Plan:
        duration_s = max(request.at_s for request in requests)
        return Plan(name=name, requests=tuple(requests), duration_s=duration_s, facts={"workload": name, **facts})


def _open_loop_of(workload: str, rate_per_s: float) -> tuple[str, Pacer, float, Mapping[str, object]]:
    """Name, pacer, scale and parameters of a workload of ``bench.traffic``."""
    match workload:
        case "chat":
            return "chat", Poisson(rate_per_s), 1.0, CHAT
        case "agent":
            return "agent", Poisson(rate_per_s), AGENT_SCALE, AGENT
        case "bursts":
            return "chat-bursts", Poisson(rate_per_s), 1.0, BURSTS
        case "code":
            return "code", Gamma(rate_per_s, CODE_LIKENESS_CV), CODE_SCALE, {}
        case _:
            raise ValueError(f"no load is called {workload!r}")

"""What an engine did in one step, read from a step log, and what its neighbours did meanwhile. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.simulation.disturbance import Others, others_during
from engine.cost import Chunk

STEP_LOG_VARIABLE = "BATON_BENCH_STEP_LOG"
"""The file that ``bench/simulation/step_log.py`` appends to."""
GOES_ON_S = 0.004
"""An engine whose next step begins within this time had work all along, and the gap is part of the step's cost.
An idle engine waits for a message, which takes a request from a caller longer than this."""


@dataclass(frozen=True, slots=True)
class Part:
    """One request's share of a step."""

    request_id: str
    new_token_count: int
    context_token_count: int
    has_token: bool
    queued_at: float | None = None
    """When the engine took it into its queue; in its first step only."""


@dataclass(frozen=True, slots=True)
class Step:
    """Times are seconds of CLOCK_MONOTONIC. A step is from ``began_at`` to ``until``; before it, from ``entered_at``,
    it pulled."""

    worker_id: str
    entered_at: float
    began_at: float
    ended_at: float
    parts: tuple[Part, ...]
    until: float
    """The next step's ``entered_at`` where the engine went on at once, otherwise ``ended_at``."""
    pull_count: int = 0
    overlap_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of it during which a neighbour was in a step, by the neighbour's kind: "prefill" or "decode"."""
    cpu_s: float = 0.0
    """What its process used of the processor from ``began_at`` to ``ended_at``."""
    others_share: float = 0.0
    """Of one core, what others than the measured cluster used meanwhile."""

    @property
    def duration_s(self) -> float:
        return self.until - self.began_at

    @property
    def went_on(self) -> bool:
        return self.until > self.ended_at

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """A single token counts as decoding, as in ``engine.sim_scheduler``."""
        return tuple(Chunk(p.new_token_count, p.context_token_count) for p in self.parts if p.new_token_count > 1)

    @property
    def context_token_counts(self) -> tuple[int, ...]:
        return tuple(part.context_token_count for part in self.parts if part.new_token_count == 1)

    @property
    def kind(self) -> str:
        """ "prefill", "decode" or "mixed"."""
        if not self.chunks:
            return "decode"
        return "mixed" if self.context_token_counts else "prefill"


def read_steps(lines: Iterable[str], others: Sequence[Others] = ()) -> list[Step]:
    """By time of beginning. Raises ``ValueError`` for a line that is none of ``step_log``'s."""
    by_worker: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        document = json.loads(line)
        if not isinstance(document, dict) or not {"engine_id", "entered_at", "began_at", "ended_at"} <= set(document):
            raise ValueError("a line of the step log lacks its keys")
        by_worker.setdefault(str(document["engine_id"]).rpartition("-")[0], []).append(document)
    spans: dict[str, list[Step]] = {}
    for worker_id, documents in by_worker.items():
        documents.sort(key=lambda each: float(each["began_at"]))
        seen: set[str] = set()
        for index, document in enumerate(documents):
            parts = tuple(Part(*part) for part in document["requests"])
            following = documents[index + 1]["entered_at"] if index + 1 < len(documents) else float("inf")
            ended_at = float(document["ended_at"])
            # A request that begins with one token after a context was pulled, but where its prompt was cached here.
            pull_count = sum(
                part.request_id not in seen and part.new_token_count == 1 and part.context_token_count > 0
                for part in parts
            )
            seen.update(part.request_id for part in parts)
            spans.setdefault(worker_id, []).append(
                Step(
                    worker_id,
                    float(document["entered_at"]),
                    float(document["began_at"]),
                    ended_at,
                    parts,
                    float(following) if following - ended_at < GOES_ON_S else ended_at,
                    pull_count,
                    cpu_s=float(document.get("cpu_s", 0.0)),
                    others_share=others_during(others, float(document["entered_at"]), ended_at),
                )
            )
    return sorted(
        (_beside(step, spans) for steps in spans.values() for step in steps), key=lambda step: step.began_at
    )


def _beside(step: Step, spans: Mapping[str, Sequence[Step]]) -> Step:
    overlap_s = {"prefill": 0.0, "decode": 0.0}
    for worker_id, others in spans.items():
        if worker_id == step.worker_id:
            continue
        for other in _within(others, step.began_at, step.until):
            shared_s = min(other.until, step.until) - max(other.entered_at, step.began_at)
            overlap_s["decode" if other.kind == "decode" else "prefill"] += max(0.0, shared_s)
    return replace(step, overlap_s=overlap_s)


def _within(steps: Sequence[Step], start: float, end: float) -> Iterable[Step]:
    """Of steps in order, those that are not over before ``start`` nor begin after ``end``."""
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if steps[middle].until <= start:
            low = middle + 1
        else:
            high = middle
    for index in range(low, len(steps)):
        if steps[index].entered_at >= end:
            return
        yield steps[index]

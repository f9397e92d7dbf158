"""Where a request goes: a function from a snapshot of the cluster to a placement.

Filter, score in [0, 1], pick. Pure: no I/O, no clock, and the random generator is an argument (it breaks ties only).
Never waits and never remembers: waiting is admission's, remembering is the roster's and the prefix index's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from baton.request import PlacementMode, Role
from router.cluster_view import ClusterView, WorkerIdentity, WorkerView

AFFINITY_WEIGHT = 0.5
"""Against 1 for load: a worker that has the whole prefix is preferred to an idle one until it has one request."""
SESSION_AFFINITY = 0.5
"""The share of the prompt that a session's previous worker is believed to have when nothing better is known."""


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """Raises ``ValueError`` naming the key."""

    mode: str = "auto"
    """"auto": split, or local for short prompts; "split": never local while a prefill worker is ready; "local":
    the decode worker computes every prompt itself."""
    local_prompt_token_count: int = 0
    """With "auto": prompts with at most this many tokens not in the decode worker's cache go local. 0: none do."""
    serves_without_decoder: bool = True
    """With no decode worker ready, a prefill worker serves whole requests: every engine can do both."""
    decode_ahead_count: int = 2
    """Requests placed on a decode worker beyond what it runs at once, so that its batch is refilled without
    waiting for a prefill."""
    expected_output_token_count: int = 128
    """Blocks are set aside for the prompt and at most this much output: enough that most fit, and the engine
    preempts when they do not."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "split", "local"):
            raise ValueError(f'mode is "{self.mode}"; must be "auto", "split" or "local"')
        for key in ("local_prompt_token_count", "decode_ahead_count", "expected_output_token_count"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class PlacementAsk:
    """What placement needs to know of a request."""

    prompt_token_count: int
    max_output_token_count: int = 1
    cached_token_counts: Mapping[WorkerIdentity, int] = field(default_factory=dict)
    """Prompt tokens each worker is believed to have in its prefix cache."""
    session_worker_ids: frozenset[str] = frozenset()
    """Workers that served this session before."""
    excluded: frozenset[WorkerIdentity] = frozenset()
    """Processes that failed this request."""
    needs_recompute: bool = False
    """Its ticket was refused: compute the prompt where it is decoded."""
    sample_count: int = 1
    """Answers that are decoded together and share the prompt's blocks."""
    near: str = ""
    """Id of a worker whose cache has the prompt: served there whole if it decodes, prefilled there if it prefills,
    as long as it can take it."""
    has_room_kept: bool = False
    """The worker it is to be near keeps room for it."""

    def kept_token_count(self, policy: PlacementPolicy) -> int:
        """Tokens the decode worker is expected to keep in cache for it."""
        return self.prompt_token_count + self.sample_count * self.answer_token_count(policy)

    def answer_token_count(self, policy: PlacementPolicy) -> int:
        """Tokens it is expected to keep of one answer."""
        return min(self.max_output_token_count, policy.expected_output_token_count)


@dataclass(frozen=True, slots=True)
class Placement:
    """``prefill`` is None when the decode worker computes the prompt itself (mode LOCAL)."""

    prefill: WorkerIdentity | None
    decode: WorkerIdentity
    mode: PlacementMode
    reason: str
    """One of: split, short_prompt, no_prefill_worker, no_decode_worker, policy, recompute, shared_prompt."""


def place(
    view: ClusterView, ask: PlacementAsk, rng: random.Random, policy: PlacementPolicy = PlacementPolicy()
) -> Placement | None:
    """The placement of one request now; None when every worker that could take it is full or none is ready."""
    ready = [worker for worker in view.ready() if worker.identity not in ask.excluded]
    decoders = [worker for worker in ready if worker.role is Role.DECODE]
    prefillers = [worker for worker in ready if worker.role is Role.PREFILL]
    reason = ""
    if not decoders and policy.serves_without_decoder:
        decoders, prefillers, reason = prefillers, [], "no_decode_worker"
    near = next((worker for worker in ready if worker.worker_id == ask.near), None)
    if near is not None and near in decoders and (ask.has_room_kept or _can_decode(near, ask, policy)):
        return Placement(None, near.identity, PlacementMode.LOCAL, "shared_prompt")
    decoder = _pick([w for w in decoders if _can_decode(w, ask, policy)], lambda w: _decode_score(w, ask), rng)
    if decoder is None:
        return None
    reason = reason or _why_local(decoder, prefillers, ask, policy)
    if reason:
        return Placement(None, decoder.identity, PlacementMode.LOCAL, reason)
    prefiller = near if near in prefillers else _pick(prefillers, lambda w: _prefill_score(w, ask), rng)
    assert prefiller is not None
    return Placement(prefiller.identity, decoder.identity, PlacementMode.SPLIT, "split")


def _why_local(
    decoder: WorkerView, prefillers: Sequence[WorkerView], ask: PlacementAsk, policy: PlacementPolicy
) -> str:
    """The reason not to split, or an empty string."""
    if ask.needs_recompute:
        return "recompute"
    if policy.mode == "local":
        return "policy"
    if not prefillers:
        return "no_prefill_worker"
    uncached_token_count = ask.prompt_token_count - ask.cached_token_counts.get(decoder.identity, 0)
    limit = policy.local_prompt_token_count
    if policy.mode == "auto" and limit > 0 and uncached_token_count <= limit:
        return "short_prompt"
    return ""


def _can_decode(worker: WorkerView, ask: PlacementAsk, policy: PlacementPolicy) -> bool:
    """Whether a running slot and cache blocks are left, by this router's books and by the worker's report."""
    assert worker.info is not None
    if worker.assigned.decode_count == 0:
        return True  # a request too large for the pool must not wait for ever: the worker says what is wrong
    # Samples beyond what it runs at once follow the others: for them no worker need be idle.
    slot_count = min(ask.sample_count, worker.info.max_running_count)
    if worker.assigned.decode_count + slot_count > worker.info.max_running_count + policy.decode_ahead_count:
        return False
    block_token_count = worker.info.block_token_count
    expected_block_count = -(-worker.assigned.decode_token_count // block_token_count)
    load = worker.load
    used_block_count = 0 if load is None else load.used_block_count + load.reserved_block_count
    needed_block_count = -(-ask.kept_token_count(policy) // block_token_count)
    return max(expected_block_count, used_block_count) + needed_block_count <= worker.info.block_count


def _decode_score(worker: WorkerView, ask: PlacementAsk) -> float:
    assert worker.info is not None
    # The larger of both counts: the report may not know of what was just placed, and the router not of others'.
    reported_count = 0 if worker.load is None else worker.load.running_count + worker.load.waiting_count
    running = max(worker.assigned.request_count, reported_count) / worker.info.max_running_count
    used = 0.0 if worker.load is None else worker.load.used_block_count / max(1, worker.load.block_count)
    return _blend(1.0 - min(1.0, max(running, used)), _affinity(worker, ask))


def _prefill_score(worker: WorkerView, ask: PlacementAsk) -> float:
    reported_count = 0 if worker.load is None else worker.load.running_count + worker.load.waiting_count
    others_count = max(0, reported_count - worker.assigned.request_count)
    # Prompts ahead, counted in prompts of this size: two short ones do not weigh as much as two long ones.
    ahead = worker.assigned.prefill_token_count / max(1, ask.prompt_token_count) + others_count
    return _blend(1.0 / (1.0 + ahead), _affinity(worker, ask))


def _affinity(worker: WorkerView, ask: PlacementAsk) -> float:
    cached = ask.cached_token_counts.get(worker.identity, 0) / max(1, ask.prompt_token_count)
    session = SESSION_AFFINITY if worker.worker_id in ask.session_worker_ids else 0.0
    return min(1.0, max(cached, session))


def _blend(load: float, affinity: float) -> float:
    return (load + AFFINITY_WEIGHT * affinity) / (1.0 + AFFINITY_WEIGHT)


def _pick(
    workers: Sequence[WorkerView], score: Callable[[WorkerView], float], rng: random.Random
) -> WorkerView | None:
    """The best; among equals, any."""
    if not workers:
        return None
    scores = [score(worker) for worker in workers]
    best = max(scores)
    return rng.choice([worker for worker, each in zip(workers, scores, strict=True) if each == best])

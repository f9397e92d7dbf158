"""Every Prometheus name, label and bucket of Baton, in one file.

Owns the instruments; never decides when to observe. The router's observations of a request come from its
``Timeline`` in one call, ``RouterMetrics.request_ended``, so that response, log line and metrics agree.

Labels are small closed sets (outcomes, phases, modes, check names of refused tickets) or worker ids, which
the fleet's configuration bounds. No label ever carries text from a request.

Standard terms: TTFT, time to first token; ITL, inter-token latency, per gap between messages of tokens; TPOT,
time per output token after the first; E2E, receipt to last message.
"""

from __future__ import annotations

import enum
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from baton.errors import BatonError, Reason
from baton.leg import RecomputeReason, WorkerLoad
from baton.request import PlacementMode, Usage
from baton.timeline import PHASES, PhaseDurations
from baton.transfer_report import TransferReport

SECONDS_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
"""One scale for all phases, so that they can be stacked: a millisecond (a queue hop) to five minutes."""

ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Finer around what a reader notices (50 ms) and wide enough to show a stall."""

PART_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
"""From a tenth of a millisecond: posting a read between neighbours takes no more."""

TOKEN_BUCKETS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Outcome(enum.Enum):
    """How a request ended. accepted = sum over all outcomes: every request ends in exactly one."""

    OK = "ok"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    """Before the queue: bad input, unknown model, queue full, draining."""
    NO_WORKER = "no_worker"
    FAILED = "failed"


def outcome_of(error: BatonError) -> Outcome:
    """The outcome that a failed request is counted under."""
    match error.reason:
        case Reason.DEADLINE_EXCEEDED:
            return Outcome.DEADLINE
        case Reason.NO_WORKER:
            return Outcome.NO_WORKER
        case (
            Reason.INVALID_REQUEST
            | Reason.PROMPT_TOO_LONG
            | Reason.MODEL_NOT_FOUND
            | Reason.QUEUE_FULL
            | Reason.DRAINING
            | Reason.UNAUTHENTICATED
            | Reason.PERMISSION_DENIED
            | Reason.TOO_MANY_RESUMABLE
        ):
            return Outcome.REJECTED
        case _:
            return Outcome.FAILED


class PlainCounter(Collector):
    """A counter for what happens with every token: an addition, where the library takes a lock. One thread counts;
    whoever collects may be another, and reads a number that is whole."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self.count = 0
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._documentation)
        family.add_metric([], self.count)
        yield family


class PlainHistogram(Collector):
    """The same, as a histogram."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        """``bounds``: upper ones, ascending; a value that equals one is within it."""
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        counts = itertools.accumulate(self._counts)
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets=list(zip(names, counts, strict=True)), sum_value=self._sum)
        yield family


class RouterMetrics:
    """What the router tells Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("baton_requests", "Requests that ended, by outcome.", ["outcome"], registry=registry)
        self.placements = Counter(
            "baton_placements", "Finished requests by placement.", ["mode", "reason"], registry=registry
        )
        self.lost_legs = Counter(
            "baton_lost_legs", "Legs that failed and were retried or given up.", ["phase"], registry=registry
        )
        self.phase = Histogram(
            "baton_phase_seconds",
            "Time of a request in each phase; the phases sum to its end-to-end time.",
            ["phase"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.ttft = Histogram(
            "baton_time_to_first_token_seconds",
            "Receipt of a request to its first token leaving the router.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.itl = PlainHistogram(
            "baton_inter_token_latency_seconds",
            "Gap between successive messages that carried tokens.",
            ITL_BUCKETS,
            registry,
        )
        self.tpot = Histogram(
            "baton_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), per request.",
            buckets=ITL_BUCKETS,
            registry=registry,
        )
        self.e2e = Histogram(
            "baton_end_to_end_seconds",
            "Receipt of a request to its last message.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens of finished requests.", registry=registry)
        self.cached_tokens = Counter(
            "baton_cached_prompt_tokens", "Of those, found in the prefill's prefix cache.", registry=registry
        )
        self.output_tokens = PlainCounter("baton_output_tokens", "Tokens sent to callers.", registry)
        self.prompt_length = Histogram(
            "baton_prompt_length_tokens", "Prompt length.", buckets=TOKEN_BUCKETS, registry=registry
        )
        self.kv_bytes = Counter(
            "baton_kv_transfer_bytes", "KV bytes moved from prefill to decode workers.", registry=registry
        )
        self.kv_pulls = Counter("baton_kv_pulls", "Pulls of KV tried.", registry=registry)
        self.kv_descriptors = Counter(
            "baton_kv_descriptors", "Memory regions read by pulls, as the transfer library counts.", registry=registry
        )
        self.kv_part = Histogram(
            "baton_kv_transfer_part_seconds",
            "Of the phase kv_transfer: preparing and posting reads, bytes moving, verifying. Requests that pulled.",
            ["part"],
            buckets=PART_BUCKETS,
            registry=registry,
        )
        self.recomputes = Counter(
            "baton_recomputes", "Requests whose KV was not usable, by the last reason.", ["reason"], registry=registry
        )
        self.no_room = Counter(
            "baton_no_room_refusals",
            "Decodes that a worker refused for want of KV blocks, and that were placed elsewhere or later.",
            registry=registry,
        )
        self.recomputed_tokens = Counter(
            "baton_recomputed_tokens",
            "Prompt tokens computed again because KV was not usable.",
            registry=registry,
        )
        self.queued = Gauge("baton_queued_requests", "Waiting for admission or placement.", registry=registry)
        self.in_flight = Gauge("baton_in_flight_requests", "Received and not yet ended.", registry=registry)
        self.ready_workers = Gauge(
            "baton_ready_workers", "Workers a request could be placed on.", ["role"], registry=registry
        )
        self.introductions = Counter(
            "baton_introductions",
            "Times that the engine of one worker was to meet that of another, by whether it has.",
            ["result"],
            registry=registry,
        )
        self.resumes = Counter(
            "baton_resumes",
            "Calls that went on with a generation: one that was here, or one computed on from a continuation.",
            ["kind"],
            registry=registry,
        )
        self.abandoned = Counter(
            "baton_abandoned_generations",
            "Resumable generations cancelled because nobody came back within their grace.",
            registry=registry,
        )
        self.resumable = Gauge(
            "baton_resumable_generations", "Kept, with or without a reader, ended ones included.", registry=registry
        )
        self.detached = Gauge(
            "baton_detached_generations", "Running resumable generations without a reader.", registry=registry
        )
        self.replay_bytes = Gauge("baton_replay_window_bytes", "Kept for callers to resume from.", registry=registry)
        for kind in ("attached", "continued"):
            self.resumes.labels(kind)
        for result in ("met", "failed"):
            self.introductions.labels(result)
        # Looked up once: with every request it would cost more than to count it.
        self._request_counts = {outcome: self.requests.labels(outcome.value) for outcome in Outcome}
        self._phase_times = [(phase, self.phase.labels(phase.value)) for phase in PHASES]
        self._kv_part_times = tuple(self.kv_part.labels(part) for part in ("post", "wire", "verify"))
        self._placement_counts: dict[tuple[PlacementMode, str], Counter] = {}
        for reason in RecomputeReason:
            self.recomputes.labels(reason.value)

    def introduced(self, has_met: bool) -> None:
        self.introductions.labels("met" if has_met else "failed").inc()

    def request_ended(
        self,
        outcome: Outcome,
        durations: PhaseDurations | None = None,
        *,
        usage: Usage | None = None,
        transfer: TransferReport | None = None,
        mode: PlacementMode | None = None,
        placement_reason: str = "",
    ) -> None:
        """Counts one ended request. ``durations`` and ``usage`` are observed for outcome OK only: a
        cancelled request's partial phases would make the distributions lie."""
        self._request_counts[outcome].inc()
        if outcome is not Outcome.OK or durations is None:
            return
        for phase, times in self._phase_times:
            times.observe(durations[phase])
        self.e2e.observe(durations.total_s)
        if durations.time_to_first_token_s is not None:
            self.ttft.observe(durations.time_to_first_token_s)
        if usage is not None:
            self.prompt_tokens.inc(usage.prompt_token_count)
            self.cached_tokens.inc(usage.cached_prompt_token_count)
            self.prompt_length.observe(usage.prompt_token_count)
            if usage.output_token_count > 1 and durations.time_to_first_token_s is not None:
                after_first_s = durations.total_s - durations.time_to_first_token_s
                self.tpot.observe(after_first_s / (usage.output_token_count - 1))
        if transfer is not None:
            self._pulled(transfer)
        if mode is not None:
            count = self._placement_counts.get((mode, placement_reason))
            if count is None:  # both are of small closed sets
                count = self.placements.labels(mode.value, placement_reason)
                self._placement_counts[mode, placement_reason] = count
            count.inc()

    def _pulled(self, transfer: TransferReport) -> None:
        self.kv_bytes.inc(transfer.kv_bytes)
        self.kv_descriptors.inc(transfer.descriptor_count)
        self.kv_pulls.inc(transfer.pull_count)
        self.recomputed_tokens.inc(transfer.recomputed_token_count)
        if transfer.recompute_reason is not None:
            self.recomputes.labels(transfer.recompute_reason.value).inc()
        if transfer.pull_count:
            post, wire, verify = self._kv_part_times
            post.observe(transfer.post_s)
            wire.observe(transfer.wire_s)
            verify.observe(transfer.verify_s)

    def tokens_sent(self, token_count: int, gap_s: float | None) -> None:
        """Counts a message of tokens; ``gap_s`` since the previous one, None for the first."""
        self.output_tokens.count += token_count
        if gap_s is not None:
            self.itl.observe(gap_s)

    def set_ready_workers(self, counts: Iterable[tuple[str, int]]) -> None:
        for role, count in counts:
            self.ready_workers.labels(role).set(count)


class WorkerMetrics:
    """What a worker tells Prometheus. One per process; ``worker_id`` labels the scrape target itself."""

    def __init__(self, registry: CollectorRegistry, worker_id: str) -> None:
        self._worker_id = worker_id
        info = Gauge("baton_worker_info", "Always 1; names the worker.", ["worker_id"], registry=registry)
        info.labels(worker_id).set(1)
        self.legs = Counter(
            "baton_worker_legs",
            "Legs that ended, by phase and outcome.",
            ["phase", "outcome"],
            registry=registry,
        )
        self.leg_queue = Histogram(
            "baton_worker_queue_seconds",
            "Time of a leg in the engine's queue.",
            ["phase"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.prefill_compute = Histogram(
            "baton_worker_prefill_compute_seconds",
            "Computing a prompt, to its first token.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.kv_transfer = Histogram(
            "baton_worker_kv_transfer_seconds",
            "Pulling one request's KV.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.decode = Histogram(
            "baton_worker_decode_seconds",
            "One leg from its first step of decode to its end.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.kv_bytes = Counter("baton_worker_kv_transfer_bytes", "KV bytes pulled.", registry=registry)
        self.prefill_tokens = Counter("baton_worker_prefill_tokens", "Prompt tokens computed.", registry=registry)
        self.decode_tokens = Counter("baton_worker_decode_tokens", "Tokens generated by decode.", registry=registry)
        self.refused_tickets = Counter(
            "baton_worker_refused_tickets",
            "KV tickets refused, by failed check.",
            ["check"],
            registry=registry,
        )
        self.no_room = Counter(
            "baton_worker_no_room_refusals",
            "Decodes refused before anything was pulled, because too few KV blocks were free.",
            registry=registry,
        )
        self.blocks_reserved = Gauge(
            "baton_worker_kv_blocks_reserved",
            "KV blocks promised to decodes that are not known to have them yet.",
            registry=registry,
        )
        self.expired_leases = Counter(
            "baton_worker_expired_leases", "Leases that ended by time, not by release.", registry=registry
        )
        self.failed_releases = Counter(
            "baton_worker_failed_releases",
            "Releases the engine did not take; its own backstop frees the KV.",
            registry=registry,
        )
        self.held_leases = Gauge("baton_worker_held_leases", "Open leases.", registry=registry)
        self.quarantined_pulls = Gauge(
            "baton_worker_quarantined_pulls",
            "Pulls given up whose reads are not known to be over; their blocks are kept from others.",
            registry=registry,
        )
        self.blocks_used = Gauge("baton_worker_kv_blocks_used", "KV blocks in use.", registry=registry)
        self.blocks_total = Gauge("baton_worker_kv_blocks", "KV blocks in the pool.", registry=registry)
        self.running = Gauge("baton_worker_running_requests", "Requests being computed.", registry=registry)
        self.waiting = Gauge("baton_worker_waiting_requests", "Requests waiting in the engine.", registry=registry)

    def set_load(self, load: WorkerLoad) -> None:
        self.held_leases.set(load.held_lease_count)
        self.quarantined_pulls.set(load.quarantined_pull_count)
        self.blocks_used.set(load.used_block_count)
        self.blocks_reserved.set(load.reserved_block_count)
        self.blocks_total.set(load.block_count)
        self.running.set(load.running_count)
        self.waiting.set(load.waiting_count)

    def leg_ended(self, phase: str, outcome: Outcome) -> None:
        """``phase`` is "prefill" or "decode"."""
        self.legs.labels(phase, outcome.value).inc()

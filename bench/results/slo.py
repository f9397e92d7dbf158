"""What counts as a good answer, and how many of all requests were one.

A request is good when it ended OK and met *every* bound of the SLO: time to first token (from the intended time),
time per output token, and its own tail gap. The mean alone (TPOT) hides a stall: one pause of two seconds in 150
tokens adds 13 ms to it. Every request is in the denominator, however it ended.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bench.results.records import Outcome, RequestRecord
from bench.results.statistics import Interval, percentile, wilson_interval

CRITERIA = ("outcome", "ttft", "tpot", "tail_itl")
"""What a request can fail by, in the order in which they are named first."""
TAIL_MULTIPLE = 4.0
"""Tail bound of who reads or listens along, in TPOTs: at 50 ms a token, a pause of 200 ms, about where a listener
hears a pause in speech as one; three tokens late, which an ordinary reading speed still covers."""
UNWATCHED_TAIL_MULTIPLE = 10.0
"""Of who does not: a stall matters to them only as a sign that the server starves running answers."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds of one request, all inclusive, in seconds; already scaled by ``scale``."""

    name: str
    ttft_s: float
    """Intended time to first token."""
    tpot_s: float
    """(last token - first token) / (tokens - 1); an answer of one token has none and meets it."""
    tail_itl_s: float
    """The request's own tail gap: the ``tail_percent`` percentile of the gaps between its messages."""
    tail_percent: float = 100.0
    """100: the longest gap. A p99 of one answer of 150 tokens would let its worst stall pass unseen."""
    scale: float = 1.0
    """By how much the bounds were multiplied, for slow machines; stands in every report."""

    def __post_init__(self) -> None:
        if min(self.ttft_s, self.tpot_s, self.tail_itl_s, self.scale) <= 0 or not 0 < self.tail_percent <= 100:
            raise ValueError("bounds and scale of an SLO are above 0, its tail percentile at most 100")

    def scaled(self, factor: float) -> Slo:
        """All bounds times ``factor``."""
        return dataclasses.replace(
            self,
            ttft_s=self.ttft_s * factor,
            tpot_s=self.tpot_s * factor,
            tail_itl_s=self.tail_itl_s * factor,
            scale=self.scale * factor,
        )


def _preset(name: str, ttft_ms: float, tpot_ms: float, tail_multiple: float = TAIL_MULTIPLE) -> Slo:
    return Slo(name, ttft_ms / 1e3, tpot_ms / 1e3, tail_multiple * tpot_ms / 1e3)


PRESETS: Mapping[str, Slo] = MappingProxyType(
    {
        slo.name: slo
        for slo in (
            _preset("chatbot", 500, 50),
            _preset("code-completion", 200, 30),
            _preset("voice", 100, 20),
            _preset("batch", 5000, 100, UNWATCHED_TAIL_MULTIPLE),
            _preset("rag", 1000, 80),
        )
    }
)


def tail_gap_s(record: RequestRecord, percent: float = 100.0) -> float | None:
    """The percentile of the gaps between the request's messages; None for fewer than two messages."""
    gaps = record.message_gaps_s
    if not gaps:
        return None
    return max(gaps) if percent == 100.0 else percentile(gaps, percent)


def broken(record: RequestRecord, slo: Slo) -> tuple[str, ...]:
    """The ``CRITERIA`` that the request fails; empty: it is good. One that did not end OK fails by ``outcome`` and is
    judged by no other, since what is missing of it cannot be measured."""
    if record.outcome is not Outcome.OK or record.ttft_s is None:
        return ("outcome",)
    tail_s = tail_gap_s(record, slo.tail_percent)
    failed = []
    # Times are kept in microseconds: half of one decides nothing.
    if record.ttft_s > slo.ttft_s + 5e-7:
        failed.append("ttft")
    if record.tpot_s is not None and record.tpot_s > slo.tpot_s + 5e-7:
        failed.append("tpot")
    if tail_s is not None and tail_s > slo.tail_itl_s + 5e-7:
        failed.append("tail_itl")
    return tuple(failed)


def meets(record: RequestRecord, slo: Slo) -> bool:
    return not broken(record, slo)


@dataclass(frozen=True, slots=True)
class Goodput:
    """Of a set of requests, all of them in the denominator, over a window."""

    slo: Slo
    good_count: int
    total_count: int
    share: float | None
    """None for no requests."""
    interval: Interval
    """Of the share; Wilson, 95%."""
    good_requests_per_s: float | None
    """None for a window without length."""
    good_tokens_per_s: float | None
    """Output tokens of good requests."""
    failed_by: Mapping[str, int]
    """Requests failing each of ``CRITERIA``; one may fail several."""
    failed_only_by: Mapping[str, int]
    """Requests that would be good but for this one."""

    @property
    def failed_most_by(self) -> str | None:
        """The criterion that most requests fail; None when all are good."""
        worst = max(CRITERIA, key=lambda name: self.failed_by[name])
        return worst if self.failed_by[worst] else None


def goodput(records: Iterable[RequestRecord], slo: Slo, window_s: float) -> Goodput:
    """``window_s``: length of the window that the requests were meant to be sent in."""
    chosen: Sequence[RequestRecord] = list(records)
    failed_by, failed_only_by = Counter[str](), Counter[str]()
    good_count = good_token_count = 0
    for record in chosen:
        failed = broken(record, slo)
        failed_by.update(failed)
        if not failed:
            good_count += 1
            good_token_count += record.output_token_count
        elif len(failed) == 1:
            failed_only_by[failed[0]] += 1
    return Goodput(
        slo=slo,
        good_count=good_count,
        total_count=len(chosen),
        share=good_count / len(chosen) if chosen else None,
        interval=wilson_interval(good_count, len(chosen)),
        good_requests_per_s=good_count / window_s if window_s > 0 else None,
        good_tokens_per_s=good_token_count / window_s if window_s > 0 else None,
        failed_by={name: failed_by[name] for name in CRITERIA},
        failed_only_by={name: failed_only_by[name] for name in CRITERIA},
    )

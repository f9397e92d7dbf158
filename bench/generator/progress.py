"""Shows a run as it goes: a live table on a terminal, a line every few seconds elsewhere, nothing with ``--quiet``.

Only looks: it reads the sender's state once a second and costs the sender's per-token path nothing. What a look takes
(a few milliseconds, of rich above all) may fall on a request that is due, hence not more often.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from bench.generator.sender import RunState
from bench.results.records import Outcome, RequestRecord, was_sent
from bench.results.slo import Slo, meets

LIVE_INTERVAL_S = 1.0
LINE_INTERVAL_S = 5.0
RATE_WINDOW_S = 5.0
ROLLING_COUNT = 200
"""Percentiles of the last so many requests."""


class Progress:
    """Give its ``observe`` to ``send_plan``; ``close`` it afterwards. Must be made inside the running loop."""

    def __init__(self, slo: Slo | None, *, title: str, is_quiet: bool = False, stream: TextIO | None = None) -> None:
        self._slo, self._title, self._is_quiet = slo, title, is_quiet
        self._console = Console(file=stream or sys.stderr)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._figures: Figures | None = None

    def observe(self, state: RunState) -> None:
        if not self._is_quiet:
            self._figures = Figures(state, self._slo, self._loop.time)
            show = self._live if self._console.is_terminal else self._lines
            self._task = self._loop.create_task(show(self._figures))

    async def close(self) -> None:
        """Shows the last state. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled() and (error := self._task.exception()) is not None:
                raise error
            self._task = None

    async def _live(self, figures: Figures) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(table_of(figures, self._title), refresh=True)
                await asyncio.sleep(LIVE_INTERVAL_S)

    async def _lines(self, figures: Figures) -> None:
        while True:
            await asyncio.sleep(LINE_INTERVAL_S)
            self._console.print(line_of(figures), highlight=False, markup=False, soft_wrap=True)


class Figures:
    """What is shown, computed from the sender's state; each ended record is looked at once."""

    def __init__(self, state: RunState, slo: Slo | None, now: Callable[[], float]) -> None:
        self.state = state
        self._slo, self._now = slo, now
        self._seen_count = 0
        self._recent: deque[RequestRecord] = deque(maxlen=ROLLING_COUNT)
        self._recent_gaps: deque[npt.NDArray[np.float64]] = deque(maxlen=ROLLING_COUNT)
        self.outcomes: Counter[Outcome] = Counter()
        self.good_count = 0
        self._ended_token_count = 0
        self._marks: deque[tuple[float, int]] = deque([(state.started_at_s, 0)])
        """(when, tokens by then), of the last ``RATE_WINDOW_S`` and one before."""

    def refresh(self) -> None:
        """Takes in what ended since the last call."""
        ended = self.state.ended
        while self._seen_count < len(ended):
            record = ended[self._seen_count]
            self._seen_count += 1
            self.outcomes[record.outcome] += 1
            self._ended_token_count += record.output_token_count
            if was_sent(record):
                self._recent.append(record)
                self._recent_gaps.append(np.diff(record.message_at_s))
            if self._slo is not None and meets(record, self._slo):
                self.good_count += 1
        flowing = sum(record.output_token_count for record in self.state.in_flight.values())
        now = self._now()
        while len(self._marks) > 1 and self._marks[1][0] <= now - RATE_WINDOW_S:
            self._marks.popleft()
        self._marks.append((now, self._ended_token_count + flowing))

    @property
    def elapsed_s(self) -> float:
        return max(0.0, self._now() - self.state.started_at_s)

    @property
    def in_flight_count(self) -> int:
        return len(self.state.in_flight)

    @property
    def ended_count(self) -> int:
        return self._seen_count

    @property
    def sent_count(self) -> int:
        return self._seen_count + self.in_flight_count

    @property
    def tokens_per_s(self) -> float:
        """Of the last seconds, or looks where those are further apart."""
        (first_at, first), (last_at, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.sent_count / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def goodput_share(self) -> float | None:
        """Of all that ended, however it did."""
        return self.good_count / self._seen_count if self._slo is not None and self._seen_count else None

    def ttft_s(self, quantile: float) -> float | None:
        return _quantile([r.ttft_s for r in self._recent if r.ttft_s is not None], quantile)

    def itl_s(self, quantile: float) -> float | None:
        """Between messages of the last requests."""
        return _quantile(np.concatenate(self._recent_gaps), quantile) if self._recent_gaps else None

    def lag_s(self, quantile: float) -> float | None:
        return _quantile([record.lag_s for record in self._recent], quantile)


def _quantile(values: Sequence[float] | npt.NDArray[np.float64], quantile: float) -> float | None:
    return float(np.quantile(values, quantile)) if len(values) else None


def milliseconds(value_s: float | None) -> str:
    if value_s is None:
        return "–"
    value_ms = value_s * 1e3
    return (
        f"{value_ms:.2f} ms" if value_ms < 10 else f"{value_ms:.0f} ms" if value_ms < 10_000 else f"{value_s:.1f} s"
    )


def _ends(figures: Figures) -> str:
    return ", ".join(f"{count} {outcome.value}" for outcome, count in sorted(figures.outcomes.items())) or "none yet"


def line_of(figures: Figures) -> str:
    figures.refresh()
    goodput = "" if figures.goodput_share is None else f", goodput {figures.goodput_share:.0%}"
    return (
        f"{figures.elapsed_s:.0f}/{figures.state.duration_s:.0f} s: "
        f"sent {figures.sent_count}/{figures.state.planned_count}, in flight {figures.in_flight_count}, "
        f"ended {_ends(figures)}; {figures.tokens_per_s:.0f} tokens/s, "
        f"TTFT p50 {milliseconds(figures.ttft_s(0.5))} p99 {milliseconds(figures.ttft_s(0.99))}, "
        f"ITL p99 {milliseconds(figures.itl_s(0.99))}, lag p99 {milliseconds(figures.lag_s(0.99))}{goodput}"
    )


def table_of(figures: Figures, title: str) -> Table:
    figures.refresh()
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("elapsed", f"{figures.elapsed_s:.0f} of {figures.state.duration_s:.0f} s (then the last answers)")
    table.add_row(
        "requests",
        f"{figures.sent_count} of {figures.state.planned_count} sent ({figures.requests_per_s:.2f}/s), "
        f"{figures.in_flight_count} in flight",
    )
    table.add_row("ended", _ends(figures))
    table.add_row("tokens out", f"{figures.tokens_per_s:.0f}/s")
    table.add_row("TTFT", f"p50 {milliseconds(figures.ttft_s(0.5))}   p99 {milliseconds(figures.ttft_s(0.99))}")
    table.add_row("ITL", f"p99 {milliseconds(figures.itl_s(0.99))}")
    table.add_row("schedule lag", f"p99 {milliseconds(figures.lag_s(0.99))}")
    if figures.goodput_share is not None:
        table.add_row("goodput", f"{figures.goodput_share:.1%} of what ended")
    return table

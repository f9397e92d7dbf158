"""One run as the report looks at it: who it is, which requests count, and its summary.

Pure. Every figure comes from ``bench.results.summary``; nothing is computed or judged anew here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.results.records import RequestRecord, TimelineSample, was_sent
from bench.results.run_data import RunData
from bench.results.steady import Window
from bench.results.summary import LAG_LIMIT_S, summarise

LAG_LIMIT_MS = LAG_LIMIT_S * 1000.0


@dataclass(frozen=True)
class RunView:
    """A run, read once."""

    number: int
    """Its place in the report, from 1."""
    facts: Mapping[str, Any]
    records: Sequence[RequestRecord]
    """All of them, in order of intended time."""
    measured: Sequence[RequestRecord]
    """Those that count: due in the window."""
    samples: Sequence[TimelineSample]
    summary: Mapping[str, Any]
    shows_workload: bool
    """Names carry the workload, since the report has more than one."""

    @classmethod
    def of(cls, number: int, run: RunData, *, shows_workload: bool) -> RunView:
        ordered = sorted(run.records, key=lambda record: (record.intended_at_s, record.index))
        summary = summarise(run)
        window = Window(summary["window"]["start_s"], summary["window"]["end_s"])
        measured = [record for record in ordered if window.holds(record.intended_at_s)]
        return cls(number, run.facts, ordered, measured, run.samples, summary, shows_workload)

    @property
    def plan(self) -> Mapping[str, Any]:
        plan = self.facts.get("plan")
        return plan if isinstance(plan, Mapping) else {}

    @property
    def system(self) -> str:
        """Runs with one label are of one system: one colour, one line."""
        return str(self.facts.get("label") or "unnamed")

    @property
    def workload(self) -> str:
        return str(self.plan.get("workload") or "unnamed")

    @property
    def is_simulated(self) -> bool:
        return self.facts.get("kind") == "simulated"

    @property
    def is_valid(self) -> bool:
        return bool(self.summary["validity"]["valid"])

    @property
    def line_name(self) -> str:
        """The system, as a line of a sweep."""
        says_so = "simulated" in self.system.lower()
        name = f"{self.system} (simulated)" if self.is_simulated and not says_so else self.system
        return f"{name}, {self.workload}" if self.shows_workload else name

    @property
    def name(self) -> str:
        """The run, as a curve among others."""
        return f"{self.line_name} @ {self.rate_name.replace(' requests', '')}"

    @property
    def duration_s(self) -> float:
        """Length of the arrival schedule; of what there is where the run does not say."""
        stated = number(self.plan.get("duration_s"))
        last = max((record.intended_at_s for record in self.records), default=0.0)
        return stated if stated is not None and stated > 0 else last

    @property
    def offered_per_s(self) -> float:
        """Requests/s: the planned rate; where there is none (a trace), or where it is one of sessions, streams or
        bursts, the requests that fell due in the schedule, over its length. Turns never sent were never due."""
        stated = self._pacer_rate_per_s
        if stated is not None and self._is_request_an_arrival:
            return stated
        if self.duration_s <= 0:
            return 0.0
        due = sum(1 for record in self.records if record.intended_at_s <= self.duration_s and was_sent(record))
        return float(f"{due / self.duration_s:.4g}")

    @property
    def rate_key(self) -> float:
        """Runs of one workload with the same one had the same load; sessions may offer different requests/s then."""
        stated = self._pacer_rate_per_s
        return self.offered_per_s if stated is None else stated

    @property
    def rate_name(self) -> str:
        """``rate_key`` with its unit: "2 requests/s", "0.5 sessions/s"."""
        if self._pacer_rate_per_s is None or self._is_request_an_arrival:
            return f"{self.rate_key:.4g} requests/s"
        what = self._arrivals.split()[0].rstrip(";")
        return f"{self.rate_key:.4g} {'arrivals' if what == 'requests' else what}/s"

    @property
    def _pacer_rate_per_s(self) -> float | None:
        return number(self.plan.get("rate_per_s"))

    @property
    def _arrivals(self) -> str:
        return str(self.plan.get("arrivals") or "requests")

    @property
    def _is_request_an_arrival(self) -> bool:
        """Whether the pacer's rate is one of requests: sessions of one turn are, requests with bursts are not."""
        arrivals, requests = self.plan.get("arrival_count"), self.plan.get("request_count")
        if isinstance(arrivals, int) and isinstance(requests, int):
            return arrivals == requests
        return self._arrivals == "requests"

    @property
    def window(self) -> tuple[float, float]:
        """Start and end, in seconds of the run, of the part that counts."""
        return self.summary["window"]["start_s"], self.summary["window"]["end_s"]

    def latency_ms(self, metric: str, statistic: str) -> float | None:
        """``latency_ms("ttft", "p99")``; of ttft, service_ttft, itl_message, itl_token, tpot, e2e, longest_gap."""
        value = self.summary["latency"][f"{metric}_s"][statistic]
        return None if value is None else value * 1000.0

    def goodput(self, slo: str, figure: str) -> float | None:
        value: float | None = self.summary["goodput"][slo][figure]
        return value

    @property
    def output_tokens_per_s(self) -> float | None:
        value: float | None = self.summary["throughput"]["output_tokens_per_s"]
        return value

    @property
    def tokens_per_s_per_user(self) -> float | None:
        """1 / median TPOT."""
        tpot_ms = self.latency_ms("tpot", "p50")
        return 1000.0 / tpot_ms if tpot_ms else None


def number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

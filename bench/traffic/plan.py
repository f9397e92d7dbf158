"""A request as it is planned: what will be asked, and when. Pure data; a plan is made once and sent to every target.

The times are intentions, in seconds from the start of the run. Every latency is measured from them, so that a
generator or a target that is late cannot hide it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request. Greedy, end tokens ignored: every target has to give exactly ``output_token_count`` tokens.

    A turn of a session (``after`` not None) is due ``at_s`` seconds after the request ``after`` ended, not at a time
    of the run: a person answers what they have read. Its intended time is fixed when that request ends; when that one
    fails, its turns are recorded as errors of their own ("not sent: the turn before failed").
    """

    index: int
    """Its place in the plan, from 0; unique in it."""
    at_s: float
    """Intended send time from the start of the run; with ``after``, the pause after that request's end."""
    prompt_token_ids: tuple[int, ...]
    output_token_count: int
    """1 or more."""
    group: str = "all"
    """Which part of a mixed workload it is: reports give figures for each."""
    session_id: str = ""
    """Requests of one session, which share prefixes; empty: none."""
    after: int | None = None
    """Index of the request of the same session that it follows."""
    cancel_after_s: float | None = None
    """The caller leaves this long after the intended time, whatever has come. Counted as cancelled, never as good."""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All requests of a run, in order of ``index``, and everything needed to make them again."""

    name: str
    """The workload, such as "chat"."""
    requests: tuple[PlannedRequest, ...]
    duration_s: float
    """Length of the arrival schedule; the last answers end later."""
    facts: dict[str, object]
    """Fit for JSON: pacer and its parameters, lengths, seed, scale rules, hash of a trace. In every report."""

"""Which phase of a request each moment belongs to: the rule that turns what happened into a ``Timeline``.

Owns one request's timeline. Pure: the time is passed in. The router's own clock draws the borders it can see; what a
worker measured on its clock is carved out of the span between two of them, never added, so the phases always sum to
the whole and a skewed clock cannot break that.

Split:
    received       StartPrefill           PrefillDone                 Adopted                    last message taken
        |---- QUEUE ----|------ PREFILL ------|----- HANDOFF_WAIT -----|--------- DECODE ---------|
                         carved: QUEUE queue_s  carved: KV_TRANSFER transfer_s,
                                                DECODE_WAIT decode_wait_s, DECODE first_step_s
Local:
    received       StartDecode                             Adopted                               last message taken
        |---- QUEUE ----|-------------- PREFILL --------------|--------------- DECODE -------------|
                         carved: QUEUE wait_s, DECODE first_step_s

So a hop to a worker counts as the phase it leads to: the way to the prefill worker and back as PREFILL, the way to
the decode worker as HANDOFF_WAIT. After a lost leg the account goes back to QUEUE and on from there: the phases of
all attempts add up. Time to first token is the moment the caller takes it.
"""

from __future__ import annotations

from baton.leg import KvAdopted, PrefillReply
from baton.timeline import Phase, PhaseDurations, Timeline


class PhaseAccount:
    """Called by the relay at each border, in whatever order attempts bring them."""

    def __init__(self, received_at: float) -> None:
        self._timeline = Timeline(received_at)
        self._is_split = False

    def placing(self, now: float) -> None:
        self._timeline.enter(Phase.QUEUE, now)

    def prefill_started(self, now: float) -> None:
        self._timeline.enter(Phase.PREFILL, now)

    def prefill_done(self, reply: PrefillReply, now: float) -> None:
        self._timeline.enter_carved(Phase.HANDOFF_WAIT, now, [(Phase.QUEUE, reply.queue_s)])

    def decode_started(self, *, is_split: bool, now: float) -> None:
        self._is_split = is_split
        if not is_split:
            self._timeline.enter(Phase.PREFILL, now)

    def adopted(self, kv: KvAdopted, now: float) -> None:
        if self._is_split:
            spans = [
                (Phase.KV_TRANSFER, kv.transfer_s),
                (Phase.DECODE_WAIT, kv.decode_wait_s),
                (Phase.DECODE, kv.first_step_s),
            ]
        else:
            spans = [(Phase.QUEUE, kv.wait_s), (Phase.DECODE, kv.first_step_s)]
        self._timeline.enter_carved(Phase.DECODE, now, spans)

    def first_token(self, now: float) -> None:
        self._timeline.first_token(now)

    def close(self, now: float) -> None:
        self._timeline.close(now)

    def durations(self) -> PhaseDurations:
        return self._timeline.durations()

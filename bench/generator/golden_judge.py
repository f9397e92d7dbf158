"""Judges a generator by the golden server's notes: what it counted, and when it says that things happened. Pure.

Both stamps of a message are of one clock: the server's from just before it handed the message over, the generator's
from when it had it. So the difference is never negative, and it is the generator's error and the way there, whatever
the script had planned and however late the server was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.generator.golden import GoldenRecord, prompt_digest
from bench.results.records import RequestRecord
from bench.traffic.plan import Plan


@dataclass(slots=True)
class Judgement:
    """Differences, seconds. Of requests that both sides know, and messages that both sides saw."""

    miscounts: list[str] = field(default_factory=list)
    """In words: what one side counted and the other did not."""
    request_delay_s: list[float] = field(default_factory=list)
    """From the generator's time of sending to the server's receipt. Part of any TTFT that a caller sees."""
    arrival_lag_s: list[float] = field(default_factory=list)
    """From the intended time to the server's receipt: the schedule lag as the server sees it."""
    message_delay_s: list[float] = field(default_factory=list)
    """From the server's stamp of each message to the generator's."""
    ttft_error_s: list[float] = field(default_factory=list)
    """Time to first token as measured minus as it was, both from the intended time: the first message's delay."""
    gap_error_s: list[float] = field(default_factory=list)
    """Gap between messages as measured minus as it was; either sign."""
    server_lateness_s: list[float] = field(default_factory=list)
    """How late the server was with each message: what the machine did to a process that is not judged."""


def judge(
    plan: Plan, records: Sequence[RequestRecord], notes: Sequence[GoldenRecord], *, zero_at_s: float
) -> Judgement:
    """``zero_at_s``: the time on the clock of the notes at which the run's clock was 0. Prompts must be distinct.

    A request whose caller left may lack messages that were on their way; whoever has a message that was never sent is
    always wrong.
    """
    found = Judgement()
    by_digest: dict[str, GoldenRecord] = {}
    for note in notes:
        if by_digest.setdefault(note.prompt_digest, note) is not note:
            found.miscounts.append("one prompt was received twice")
    prompts = {request.index: request.prompt_token_ids for request in plan.requests}
    if len(records) != len(plan.requests):
        found.miscounts.append(f"{len(records)} records of {len(plan.requests)} planned requests")
    for record in records:
        digest = prompt_digest(prompts[record.index])
        if digest not in by_digest:
            found.miscounts.append(f"request {record.index} never reached the server")
            continue
        note = by_digest.pop(digest)
        seen, sent = record.message_token_counts, note.token_counts
        if seen != (sent[: len(seen)] if note.ending == "left" else sent):
            found.miscounts.append(
                f"request {record.index} ({record.outcome}, {note.ending}): {len(seen)} messages with {sum(seen)} "
                f"tokens counted, {len(sent)} with {sum(sent)} sent"
            )
            continue
        found.request_delay_s.append(note.received_at_s - (zero_at_s + record.sent_at_s))
        found.arrival_lag_s.append(note.received_at_s - (zero_at_s + record.intended_at_s))
        delays = [
            zero_at_s + at_s - sent_at_s for at_s, sent_at_s in zip(record.message_at_s, note.sent_at_s, strict=False)
        ]
        found.message_delay_s += delays
        found.gap_error_s += [later - earlier for earlier, later in itertools.pairwise(delays)]
        if delays:
            found.ttft_error_s.append(delays[0])
        found.server_lateness_s += note.lateness_s
    if by_digest:
        found.miscounts.append(f"{len(by_digest)} requests reached the server that nobody has a record of")
    return found

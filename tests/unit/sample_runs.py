"""Made-up runs to look at: two systems over four rates, a simulated one, a hostile label. Always the same."""

from __future__ import annotations

import bisect
import random

from bench.results.records import Outcome, RequestRecord, TimelineSample
from bench.results.run_data import RunData

HOSTILE = (
    '<script>document.title="owned"</script><img src="https://x.invalid/a.png" onerror="document.title=\'owned\'">'
)
"""Markup that would run, or fetch, where it is not escaped; plotly itself reads tags in its texts."""


def sample_run(
    label: str,
    rate_per_s: float,
    *,
    capacity_per_s: float = 6.0,
    duration_s: float = 60.0,
    kind: str = "measured",
    valid: bool = True,
    has_phases: bool = True,
    seed: int = 1,
) -> RunData:
    """A queue with one server, so that it saturates at ``capacity_per_s``; tokens in messages of one or two."""
    rng = random.Random(seed)
    records: list[RequestRecord] = []
    at_s = free_at_s = 0.0
    while (at_s := at_s + rng.expovariate(rate_per_s)) < duration_s:
        prompt = rng.choice((40, 90, 300, 900, 2000, 5000))
        output = rng.randint(8, 40)
        prefill_s = (0.2 + prompt / 2500) / capacity_per_s
        start_s = max(at_s, free_at_s)
        free_at_s = start_s + prefill_s
        outcome = rng.choices((Outcome.OK, Outcome.REFUSED, Outcome.TIMEOUT, Outcome.CANCELLED), (98, 0.6, 0.2, 1))[0]
        now_s = free_at_s
        times: list[float] = []
        counts: list[int] = []
        while outcome is not Outcome.REFUSED and sum(counts) < output:
            times.append(now_s)
            counts.append(min(output - sum(counts), rng.choice((1, 1, 1, 2))))
            now_s += rng.gauss(0.03, 0.004) * (1 + rate_per_s / 8) + (0.4 if rng.random() < 0.01 else 0.0)
            if outcome is not Outcome.OK and len(times) > 4:
                break
        phases = {
            "queue": start_s - at_s,
            "prefill": prefill_s,
            "handoff_wait": 0.002,
            "kv_transfer": prompt * 2e-6,
            "decode_wait": 0.001,
            "decode": now_s - free_at_s,
        }
        records.append(
            RequestRecord(
                index=len(records),
                group="long" if prompt > 1000 else "short",
                session_id="",
                prompt_token_count=prompt,
                output_token_limit=output,
                intended_at_s=at_s,
                sent_at_s=at_s + abs(rng.gauss(0, 3e-4)),
                message_at_s=times,
                message_token_counts=counts,
                ended_at_s=now_s,
                outcome=outcome,
                error=None if outcome is Outcome.OK else f"said {label}",
                phases_s=phases if has_phases and times else None,
                kv_transfer_bytes=prompt * 23040,
                placement="split",
                attempt_count=1,
            )
        )
    starts = [record.intended_at_s for record in records]
    ends = sorted(record.ended_at_s for record in records)
    samples = [
        TimelineSample(
            at_s=second / 2,
            source=worker,
            running_count=float(bisect.bisect(starts, second / 2) - bisect.bisect(ends, second / 2)),
            waiting_count=float(rng.randint(0, 3)),
            kv_used_share=min(1.0, 0.2 + second / 400),
        )
        for worker in ("p0", "d0")
        for second in range(int(duration_s * 2))
    ]
    facts = {
        "kind": kind,
        "label": label,
        "target": {"kind": "baton", "address": "127.0.0.1:1"},
        "plan": {
            "workload": "chat",
            "rate_per_s": rate_per_s,
            "duration_s": duration_s,
            "seed": seed,
            "request_count": len(records),
            "pacer": {"name": "poisson"},
            "trace_sha256": "0" * 64,
        },
        "machine": {"cpu": "a made-up one", "core_count": 2, "governor": None},
        "versions": {"baton": "0", "vllm": "0.32.0"},
        "model": "none",
        "started_at": "2026-01-01T00:00:00Z",
        "worker_counts": {"prefill": 1, "decode": 1},
        "valid": valid,
        "invalid_reasons": [] if valid else [f"steal 7% is over 2% ({label})"],
        "slo_scale": 2.0,
    }
    return RunData(facts, records, samples)


def sample_sweep(hostile: str = HOSTILE) -> list[RunData]:
    """Two systems at four rates each (one run of the second is invalid), and one simulated run of the first."""
    rates = (1.0, 3.0, 5.0, 8.0)
    runs = [sample_run("baton 1P+1D", rate, seed=place) for place, rate in enumerate(rates)]
    runs += [
        sample_run(hostile, rate, capacity_per_s=4.0, seed=10 + place, valid=rate < 8, has_phases=False)
        for place, rate in enumerate(rates)
    ]
    return [*runs, sample_run("baton 1P+1D", 5.0, kind="simulated", seed=99)]

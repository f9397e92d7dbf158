"""The volumes behind the promises: ``python -m bench.soak [section ...]`` writes docs/evidence/.

``SECTIONS`` lists them. Each judges for itself, writes its page whatever it finds, and the command's exit status
is 1 if any promise was broken. Nothing here asserts a time but the two that are promised: rest within a second of a
storm, and no request beyond its deadline by more.

A new section is a module with ``run(options)`` and, if it has volumes of its own, ``add_options(parser)``; it takes
what it shares with the others from ``bench/soaking.py``, and its line in ``SECTIONS`` is all that is needed here.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from baton.request import Role
from bench import (
    cancels_api,
    evidence,
    fuzz,
    modes,
    soak_books,
    soak_faults,
    soak_resume,
    soak_structures,
    stock_modes,
    validity,
)
from bench.drills import (
    Overrun,
    answer_of,
    baseline_of,
    compare,
    kill_while_streaming,
    resumed_after_all_died,
    storm,
)
from bench.exactness import TIE_GAP_BFLOAT16, TIE_GAP_FLOAT32, Case, Verdict, expected, judge
from bench.fleet_under_test import running_fleet
from bench.questions import Questions, ask_oracle, make_questions
from bench.real_fleet import fleet_config
from bench.simulated_deaths import run_interleavings
from bench.soaking import SEED, model_directory, say

QUIET_WITHIN_S = 1.0
DEADLINE_SLACK_S = 1.0


async def exactness(options: argparse.Namespace) -> bool:
    """Point 1: greedy tokens through the service equal those of one engine, alone and eight at a time.

    In bfloat16 another batch shape may turn a near tie. What tied is asked again in float32, where it may not.
    """
    model = model_directory()
    say(f"exactness: asking the oracle {options.prompts} prompts of 1 to {options.longest} tokens")
    asked = await make_questions(
        model, count=options.prompts, max_length=options.longest, seed=SEED, stop_base_count=25
    )
    rows, records = await _passes(asked, asked.cases, "bfloat16", TIE_GAP_BFLOAT16)
    wrong = [verdict for verdict in records if verdict.kind == "wrong"]
    ties = [verdict for verdict in records if verdict.kind == "tie"]
    names = {verdict.case for verdict in (*ties, *wrong)}
    unsettled: list[Verdict] = []
    if names:
        cases = [case for case in asked.cases if case.name in names]
        say(f"exactness: asking {len(cases)} cases again in float32")
        oracle = await ask_oracle(model, cases, dtype="float32", cores="0")
        more_rows, more = await _passes(replace(asked, oracle=oracle), cases, "float32", TIE_GAP_FLOAT32)
        rows += more_rows
        unsettled = [verdict for verdict in more if verdict.kind != "exact"]
    lengths = [len(case.prompt_token_ids) for case in asked.cases]
    summary = [
        f"{len(asked.cases)} cases a pass: prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{len({length % 128 for length in lengths})} of 128 residues modulo the block size, "
        f"{sum(length % 128 == 0 for length in lengths)} exactly on it",
        f"EOS as the first token: {_eos_first_count(asked)} cases; one token of output: "
        f"{sum(case.max_token_count == 1 for case in asked.cases)}; stop cases: "
        f"{sum('-stop-' in case.name for case in asked.cases)}; repeated prompts: "
        f"{sum(case.name.endswith('-again') for case in asked.cases)}",
        f"bfloat16: wrong {len(wrong)}; near ties (within {TIE_GAP_BFLOAT16} nats of the oracle's best) {len(ties)}"
        + (f", widest gap {max(tie.gap for tie in ties):.4f}" if ties else ""),
        f"the {len(names)} cases that tied, asked again of float32 engines: {len(unsettled)} differ",
    ]
    told = [record for record in (*records, *unsettled) if record.kind != "exact"]
    evidence.write("exactness", "Exactness against one monolithic engine", summary, rows, told)
    return not wrong and not unsettled


async def _passes(
    asked: Questions, cases: Sequence[Case], dtype: str, tie_gap: float
) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """Asks ``cases`` of a fleet of that dtype, one and then eight at a time."""
    rows: list[dict[str, Any]] = []
    records: list[Verdict] = []
    with tempfile.TemporaryDirectory() as state:
        config = fleet_config(
            model_directory(), Path(state), prefill_cores="[[0]]", decode_cores="[[1]]", dtype=dtype
        )
        async with running_fleet(config) as fleet, fleet.client() as client:
            for concurrency in (1, 8):
                say(f"exactness: {len(cases)} cases, {concurrency} at a time, {dtype}")
                verdicts = await compare(
                    client,
                    asked.corpus,
                    cases,
                    asked.oracle,
                    concurrency=concurrency,
                    tie_gap=tie_gap,
                    eos_token_id=asked.eos_token_id,
                )
                counts = Counter(verdict.kind for verdict in verdicts)
                records += verdicts
                rows.append({"dtype": dtype, "concurrency": concurrency, "cases": len(cases), **_kinds(counts)})
                say(f"exactness: {rows[-1]}")
    return rows, records


def _kinds(counts: Counter[str]) -> dict[str, int]:
    return {kind: counts[kind] for kind in ("exact", "tie", "wrong")}


def _eos_first_count(asked: Questions) -> int:
    return sum(
        asked.oracle[case.name].token_ids[0] == asked.eos_token_id and not case.ignore_eos for case in asked.cases
    )


async def storms(options: argparse.Namespace) -> bool:
    """Point 2: after storms of cancels, deadlines and disconnects the books are balanced within a second."""
    model = model_directory()
    asked = await make_questions(model, count=3, max_length=64, seed=SEED)
    rows = []
    overruns: list[Overrun] = []
    is_kept = True
    with tempfile.TemporaryDirectory() as state:
        config = fleet_config(model, Path(state), prefill_cores="[[0]]", decode_cores="[[1]]")
        async with running_fleet(config) as fleet:
            baseline = await baseline_of(fleet, asked.corpus)
            for number in range(options.storms):
                report = await storm(
                    fleet,
                    asked.corpus,
                    baseline,
                    count=options.storm_size,
                    concurrency=(1, 4, 8, 16)[number % 4],
                    longest_prompt=3000,
                    seed=SEED + number,
                    quiet_timeout_s=30.0,
                )
                overruns += report.overruns
                late_s = max(overrun.past_deadline_s for overrun in report.overruns)
                is_kept &= report.quiet_after_s <= QUIET_WITHIN_S and late_s <= DEADLINE_SLACK_S
                outcomes = Counter(overrun.outcome for overrun in report.overruns)
                rows.append(
                    {
                        "storm": number + 1,
                        "requests": len(report.overruns),
                        "at rest after, s": f"{report.quiet_after_s:.3f}",
                        "latest past its deadline, s": f"{late_s:.3f}",
                        "outcomes": ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())),
                    }
                )
                say(f"storms: {rows[-1]}")
    kinds = Counter(overrun.kind for overrun in overruns)
    summary = [
        f"{len(overruns)} requests abandoned at random points: {dict(kinds)}; leases of 600 s: no timer helps",
        "at rest: both engines' own block count, ledgers and legs at zero, tasks at baseline, nothing in flight",
        f"promise (rest within {QUIET_WITHIN_S:g} s, no request more than {DEADLINE_SLACK_S:g} s late): "
        + ("kept" if is_kept else "BROKEN"),
    ]
    evidence.write("storms", "The books balance after a storm", summary, rows, overruns)
    return is_kept


async def deaths(options: argparse.Namespace) -> bool:
    """Point 3, on real engines: two prefill and two decode workers, one killed at each stage of a request."""
    model = model_directory()
    stages = {
        "decode, streaming": (Role.DECODE, 10, 300, 40),
        "prefill, before": (Role.PREFILL, -1, 700, 12),
        "prefill, computing": (Role.PREFILL, 0, 2000, 12),
        "prefill, after its first token": (Role.PREFILL, 1, 1500, 24),
    }
    held_back = [
        (f"{stage} {number}", length, token_count)
        for stage, (_, _, length, token_count) in stages.items()
        for number in range(options.deaths)
    ]
    asked = await make_questions(model, count=3, max_length=64, seed=SEED, held_back=held_back)
    rows = []
    is_kept = True
    with tempfile.TemporaryDirectory() as state:
        config = fleet_config(model, Path(state), prefill_cores="[[0], [0]]", decode_cores="[[1], [1]]")
        async with running_fleet(config) as fleet:
            for stage, (role, after_token_count, _, _) in stages.items():
                for number in range(options.deaths):
                    case = asked.held_back[f"{stage} {number}"]
                    heard, victim = await kill_while_streaming(
                        fleet, case, role=role, after_token_count=after_token_count
                    )
                    if heard.error is None:
                        answer = asked.oracle[case.name]
                        want = expected(asked.corpus, case, answer, asked.eos_token_id)
                        verdict = judge(case, want, answer_of(heard), answer, TIE_GAP_BFLOAT16).kind
                    else:
                        verdict = f"error {heard.error.reason.value}"
                    is_kept &= verdict in ("exact", "tie") and bool(victim)
                    phases = heard.finished.phases if heard.finished else None
                    rows.append(
                        {
                            "killed": stage,
                            "victim": victim or "none found",
                            "tokens": verdict,
                            "attempts": phases.attempt_count if phases else "",
                            "recomputed tokens": phases.recomputed_token_count if phases else "",
                            "end to end, s": f"{phases.total_s:.2f}" if phases else "",
                        }
                    )
                    say(f"deaths: {rows[-1]}")
                    await fleet.until_ready(240)
            refused, back_after_s = await resumed_after_all_died(fleet, asked.corpus.prompt(50), back_within_s=240)
            say(f"deaths: all killed: {refused!r}; service back after {back_after_s:.1f} s")
    summary = [
        "two prefill and two decode workers on two cores; the victim gets SIGKILL and nothing tells the router",
        f"every worker killed: the client got {refused.status.value}/{refused.reason.value}: {refused.message}",
        f"the fleet brought service back by itself after {back_after_s:.1f} s",
        "promise (exact sequence, no gap, no repeat, no error): " + ("kept" if is_kept else "BROKEN"),
    ]
    evidence.write("deaths", "The death of a worker", summary, rows, rows)
    return is_kept


async def interleavings(options: argparse.Namespace) -> bool:
    """Point 3, simulated: the real router and workers in virtual time, killed and cancelled at every moment."""
    report = await asyncio.to_thread(run_interleavings, options.interleavings, SEED, say)
    evidence.write("interleavings", "Every interleaving of deaths, cancels and deadlines, simulated",
                   report.summary, report.rows, [asdict(failure) for failure in report.failures])  # fmt: skip
    return not report.failures


@dataclass(frozen=True, slots=True)
class Section:
    """``run`` returns whether every promise was kept; ``add_options`` adds the section's volumes."""

    run: Callable[[argparse.Namespace], Awaitable[bool]]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


SECTIONS: dict[str, Section] = {
    "exactness": Section(exactness),
    "storms": Section(storms),
    "books": Section(soak_books.run, soak_books.add_options),
    "deaths": Section(deaths),
    "interleavings": Section(interleavings),
    "modes": Section(modes.run, modes.add_options),
    "modes-stock": Section(stock_modes.run, stock_modes.add_options),
    "resume": Section(soak_resume.run, soak_resume.add_options),
    "faults": Section(soak_faults.run, soak_faults.add_options),
    "faults-real": Section(soak_faults.run_real),
    "validity": Section(validity.run, validity.add_options),
    "fuzz": Section(fuzz.run, fuzz.add_options),
    "structures": Section(soak_structures.run, soak_structures.add_options),
    "cancels-api": Section(cancels_api.run, cancels_api.add_options),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="default: all")
    parser.add_argument("--prompts", type=int, default=300, help="plain exactness prompts (stop cases come on top)")
    parser.add_argument("--longest", type=int, default=4000, help="longest exactness prompt, tokens")
    parser.add_argument("--storms", type=int, default=4)
    parser.add_argument("--storm-size", type=int, default=50)
    parser.add_argument("--deaths", type=int, default=1, help="kills at each stage")
    parser.add_argument("--interleavings", type=int, default=5000)
    for section in SECTIONS.values():
        section.add_options(parser)
    options = parser.parse_args()
    is_kept = True
    for name in options.sections or SECTIONS:
        kept = asyncio.run(_run(SECTIONS[name].run, options))
        say(f"{name}: {'kept' if kept else 'BROKEN'}")
        is_kept &= kept
    return 0 if is_kept else 1


async def _run(section: Callable[[argparse.Namespace], Awaitable[bool]], options: argparse.Namespace) -> bool:
    return await section(options)


if __name__ == "__main__":
    sys.exit(main())

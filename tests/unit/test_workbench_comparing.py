"""Two systems compared: the verdicts, what speaks against them, and the command."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from workbench_records import failed, queue, record

from bench.commands import compare as command
from bench.results.comparing import (
    METRICS,
    PAIRS_FOR_A_CLAIM,
    Comparison,
    ComparisonError,
    MetricResult,
    Verdict,
    compare,
)
from bench.results.records import Outcome, RequestRecord
from bench.results.run_data import RunData
from bench.results.store import write_run


def run(records: list[RequestRecord], **more: Any) -> RunData:
    facts = {
        "label": "a",
        "kind": "measured",
        "plan": {"workload": "chat", "duration_s": 100.0, "seed": 1},
        "machine": {"cpu_model": "one", "core_count": 2},
        "model": "m",
        "valid": True,
    }
    return RunData(facts | more, records)


def noisy(seed: int, ttft_s: float, *, count: int = 50, gap_s: float = 0.02) -> list[RequestRecord]:
    rng = random.Random(seed)
    return [
        record(
            index,
            at_s=index * 100.0 / count,
            ttft_s=ttft_s * rng.uniform(0.9, 1.1),
            gaps_s=tuple(gap_s * rng.uniform(0.9, 1.1) for _ in range(5)),
        )
        for index in range(count)
    ]


def pairs(ttft_s: float, count: int = PAIRS_FOR_A_CLAIM, **more: Any) -> tuple[list[RunData], list[RunData]]:
    """Runs of A at 200 ms and of B at ``ttft_s``."""
    a = [run(noisy(seed, 0.2, **more)) for seed in range(count)]
    b = [run(noisy(1000 + seed, ttft_s, **more), label="b") for seed in range(count)]
    return a, b


def result(comparison: Comparison, name: str) -> MetricResult:
    (found,) = [each for each in comparison.results if each.name == name]
    return found


# --- Verdicts


def test_a_faster_b_is_better_and_the_interval_holds_the_truth() -> None:
    comparison = compare(*pairs(0.1), metrics=["ttft_s"])
    found = result(comparison, "ttft_s.p50")
    assert found.verdict is Verdict.B_BETTER
    assert found.ratio == pytest.approx(0.5, rel=0.02)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.5 < found.high
    assert found.a == pytest.approx(0.2, rel=0.02)
    assert comparison.is_claim
    assert [each.name for each in comparison.results] == [f"ttft_s.{word}" for word in ("mean", "p50", "p95", "p99")]


def test_a_slower_b_is_worse() -> None:
    comparison = compare(*pairs(0.3), metrics=["ttft_s.mean"])
    assert result(comparison, "ttft_s.mean").verdict is Verdict.A_BETTER


def test_an_interval_within_the_margin_is_no_difference_even_where_it_excludes_one() -> None:
    found = result(compare(*pairs(0.2, count=20), metrics=["ttft_s.mean"]), "ttft_s.mean")
    assert found.verdict is Verdict.NO_DIFFERENCE
    # Sharper than the margin: a difference that is there, and does not matter.
    a, b = [run([record(0, ttft_s=0.2)] * 40)] * 10, [run([record(0, ttft_s=0.202)] * 40)] * 10
    found = result(compare(a, b, metrics=["ttft_s.mean"]), "ttft_s.mean")
    assert found.low is not None
    assert found.low > 1.0
    assert found.verdict is Verdict.NO_DIFFERENCE
    assert result(compare(a, b, metrics=["ttft_s.mean"], margin=0.001), "ttft_s.mean").verdict is Verdict.A_BETTER


def test_one_pair_whose_interval_has_no_width_cannot_tell_a_throughput() -> None:
    # Equal requests: every resample of them is the same, whatever the next run would give.
    a = run([record(i, at_s=i * 1.0) for i in range(100)])
    b = run([record(i, at_s=i * 1.0, ttft_s=3.0) for i in range(100)], label="b")
    names = ["requests_per_s", "output_tokens_per_s", "input_tokens_per_s"]
    for comparison in (compare([a], [b], metrics=names), compare([a], [a], metrics=names)):
        for found in comparison.results:
            assert found.verdict is Verdict.CANNOT_TELL
            assert "no width" in found.note
    assert {found.verdict for found in compare([a] * 10, [b] * 10, metrics=names).results} == {Verdict.A_BETTER}


def test_runs_of_one_side_differ_in_their_seed_alone_else_they_are_no_repetitions() -> None:
    def plan(seed: int, rate_per_s: float) -> dict[str, Any]:
        derived = {"arrival_count": seed, "session_count": seed, "groups": {"all": seed}}
        return {"workload": "chat", "duration_s": 100.0, "seed": seed, "rate_per_s": rate_per_s, **derived}

    repeated = [run(noisy(seed, 0.2), plan=plan(seed, 1.0)) for seed in (1, 2)]
    assert compare(repeated, repeated, metrics=["success"]).warnings == []
    sweep = [run(noisy(seed, 0.2), plan=plan(seed, float(seed))) for seed in (1, 2)]
    comparison = compare(sweep, sweep, metrics=["success"])
    said = "are of different plans, and no repetitions: rate_per_s differ"
    assert list(comparison.warnings) == [f"the runs of A {said}", f"the runs of B {said}"]
    assert not comparison.is_claim


def test_a_wide_interval_around_one_cannot_tell() -> None:
    a = [run(queue(seed, load=0.8)) for seed in range(3)]
    b = [run(queue(100 + seed, load=0.8)) for seed in range(3)]
    found = result(compare(a, b, metrics=["ttft_s.mean"]), "ttft_s.mean")
    assert found.verdict is Verdict.CANNOT_TELL
    assert "wider than the margin" in found.note


def test_the_same_queue_is_seldom_called_different() -> None:
    # Requests that queue are not independent: resampled one by one, half of these would differ.
    called = 0
    for seed in range(12):
        a = [run(queue(1000 * seed + place, load=0.7, duration_s=30.0)) for place in range(3)]
        b = [run(queue(1000 * seed + 500 + place, load=0.7, duration_s=30.0)) for place in range(3)]
        found = result(compare(a, b, metrics=["ttft_s.mean"], resample_count=200), "ttft_s.mean")
        called += found.verdict in (Verdict.A_BETTER, Verdict.B_BETTER)
    assert called <= 1


def test_a_p99_of_too_few_requests_cannot_tell_and_says_how_many_it_takes() -> None:
    comparison = compare(*pairs(0.1, count=2), metrics=["ttft_s", "e2e_s.p95"])
    found = result(comparison, "ttft_s.p99")
    assert found.verdict is Verdict.CANNOT_TELL
    assert found.note == "100 values are too few for a p99: it takes 459"
    assert found.ratio is not None
    assert result(comparison, "e2e_s.p95").verdict is Verdict.B_BETTER


def test_a_p99_of_gaps_takes_as_many_gaps_and_twenty_requests() -> None:
    a, b = (
        [run(noisy(seed, 0.2, count=count, gap_s=gap_s)) for seed in range(2)]
        for count, gap_s in ((50, 0.02), (50, 0.04))
    )
    found = result(compare(a, b, metrics=["itl_message_s.p99"]), "itl_message_s.p99")
    assert found.verdict is Verdict.A_BETTER  # 500 gaps of 100 requests each
    found = result(compare(a[:1], b[:1], metrics=["itl_message_s.p99"]), "itl_message_s.p99")
    assert found.note == "250 values are too few for a p99: it takes 459"
    long = [[run([record(i, at_s=i * 5.0, gaps_s=(gap_s,) * 99) for i in range(19)])] for gap_s in (0.02, 0.04)]
    found = result(compare(*long, metrics=["itl_message_s.p99"]), "itl_message_s.p99")
    assert found.note == "the gaps of 19 requests are too few: it takes 20 requests"


def test_gaps_are_compared_on_messages_and_on_tokens() -> None:
    a = run(noisy(1, 0.2))
    b = run([record(r.index, at_s=r.intended_at_s, gaps_s=(0.08,), message_token_counts=[1, 4]) for r in a.records])
    comparison = compare([a], [b], metrics=["itl_message_s.mean", "itl_token_s.mean"])
    assert result(comparison, "itl_message_s.mean").ratio == pytest.approx(4.0, rel=0.02)
    assert result(comparison, "itl_token_s.mean").ratio == pytest.approx(1.0, rel=0.02)


def test_goodput_is_a_difference_of_shares_at_each_runs_scale() -> None:
    a, b = pairs(1.2, count=2)
    comparison = compare(a, b, metrics=["goodput.chatbot", "goodput.rag", "success"])
    chat = result(comparison, "goodput.chatbot")
    assert (chat.a, chat.b, chat.difference, chat.ratio) == (1.0, 0.0, -1.0, None)
    assert chat.verdict is Verdict.A_BETTER
    assert result(comparison, "success").verdict is Verdict.CANNOT_TELL  # 100 of 100 each: within 3.7 points
    for data in (*a, *b):
        data.facts["slo_scale"] = 4.0
    assert result(compare(a, b, metrics=["goodput.chatbot"]), "goodput.chatbot").difference == 0.0


def test_equal_shares_of_many_requests_are_no_difference() -> None:
    a, b = pairs(0.2, count=10)
    found = result(compare(a, b, metrics=["success"]), "success")
    assert found.low == pytest.approx(-0.0076, abs=2e-4)
    assert found.high == pytest.approx(0.0076, abs=2e-4)
    assert found.verdict is Verdict.NO_DIFFERENCE


def test_throughput_counts_the_drain_and_failures() -> None:
    a = run([record(index, at_s=index * 1.0, gaps_s=(0.02,) * 9) for index in range(100)])
    b = run([record(index, at_s=index * 1.0, ttft_s=0.1 + index, gaps_s=(0.02,) * 9) for index in range(100)])
    found = result(compare([a] * 2, [b] * 2, metrics=["output_tokens_per_s"]), "output_tokens_per_s")
    assert found.a == pytest.approx(1000 / 100, rel=0.01)
    assert found.b == pytest.approx(1000 / 198.28, rel=0.01)
    assert found.verdict is Verdict.A_BETTER
    half = run([r if r.index % 2 else failed(r.index, at_s=r.intended_at_s) for r in a.records])
    comparison = compare([a], [half], metrics=["requests_per_s"])
    assert result(comparison, "requests_per_s").ratio == pytest.approx(0.5, rel=0.02)
    assert any("50.0% of B's requests did not end OK" in warning for warning in comparison.warnings)


def test_throughput_per_worker_needs_known_workers_and_divides_by_all() -> None:
    a, b = run(noisy(1, 0.2)), run(noisy(1, 0.2))
    names = ["output_tokens_per_s", "output_tokens_per_s_per_worker"]
    assert [each.name for each in compare([a], [b], metrics=names).results] == names[:1]
    a.facts["worker_counts"], b.facts["worker_counts"] = {"prefill": 1, "decode": 1}, {"both": 1}
    comparison = compare([a], [b], metrics=names)
    assert result(comparison, names[1]).ratio == pytest.approx(2.0)
    assert any("unequal numbers of workers" in warning for warning in comparison.warnings)


def test_both_of_a_pair_are_judged_over_the_window_that_both_have() -> None:
    warm = [record(index, at_s=index * 0.5, ttft_s=0.1 + 1e-4 * (index % 7)) for index in range(200)]
    cold = [record(r.index, at_s=r.intended_at_s, ttft_s=3.0 if r.index < 20 else r.ttft_s or 0.0) for r in warm]
    comparison = compare([run(warm)], [run(cold)], metrics=["ttft_s.mean"])
    assert comparison.windows[0].start_s == pytest.approx(10.0)
    found = result(comparison, "ttft_s.mean")
    assert found.ratio == pytest.approx(1.0)
    assert found.a_request_count == found.b_request_count == 180


def test_a_comparison_is_the_same_again_and_of_a_with_itself_no_difference() -> None:
    a, b = pairs(0.19, count=3)
    names = ["ttft_s", "goodput", "output_tokens_per_s"]
    one, again, other = (compare(a, b, metrics=names, seed=seed, resample_count=200) for seed in (5, 5, 6))
    assert one == again
    assert one.results != other.results
    # What else is asked for changes nothing.
    alone = compare(a, b, metrics=["goodput.chatbot"], seed=5, resample_count=200)
    assert alone.results[0] in one.results
    own = compare(a, a, resample_count=200)
    assert {each.ratio for each in own.results if each.ratio is not None} == {1.0}
    assert not {Verdict.A_BETTER, Verdict.B_BETTER} & {each.verdict for each in own.results}


def test_turned_around_the_verdicts_are_turned_around() -> None:
    a, b = pairs(0.1, count=3)
    one, other = (compare(*runs, metrics=["ttft_s.p50", "goodput.voice"]) for runs in ((a, b), (b, a)))
    for here, there in zip(one.results, other.results, strict=True):
        assert here.verdict is Verdict.B_BETTER
        assert there.verdict is Verdict.A_BETTER
        if here.ratio is not None and there.ratio is not None:
            assert here.ratio * there.ratio == pytest.approx(1.0)


def test_all_failed_and_no_requests_are_compared_as_far_as_it_goes() -> None:
    for records in ([], [failed(index, at_s=float(index)) for index in range(20)]):
        comparison = compare([run(records)], [run(noisy(1, 0.2))])
        assert result(comparison, "ttft_s.p50").verdict is Verdict.CANNOT_TELL
        assert result(comparison, "ttft_s.p50").note == "no values"
        json.dumps(comparison.as_json(), allow_nan=False)


# --- What speaks against it


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"plan": {"workload": "rag", "duration_s": 100.0, "seed": 2}}, "the plans differ in workload, seed"),
        ({"machine": {"cpu_model": "two", "core_count": 4}}, "the machines differ in cpu_model, core_count"),
        ({"model": "n"}, "the models differ: 'm' and 'n'"),
        ({"kind": "simulated"}, "the kinds differ: 'measured' and 'simulated'"),
        ({"slo_scale": 2.0}, "the SLO scales differ: None and 2.0"),
        ({"valid": False, "invalid_reasons": ["late"]}, "run 1 of B is invalid: late"),
    ],
)
def test_what_differs_between_the_runs_is_told_and_takes_the_claim_away(change: dict[str, Any], warning: str) -> None:
    a, b = pairs(0.1)
    b[0].facts |= change
    comparison = compare(a, b, metrics=["ttft_s.mean"])
    assert any(told.endswith(warning) for told in comparison.warnings)
    assert not comparison.is_claim


def test_load_and_time_of_day_do_not_make_two_machines() -> None:
    a, b = pairs(0.1, count=1)
    b[0].facts["machine"] = {**b[0].facts["machine"], "at": "later", "load_average": [9.0]}
    assert compare(a, b, metrics=["success"]).warnings == []


def test_nine_pairs_are_no_claim() -> None:
    assert not compare(*pairs(0.1, count=9), metrics=["ttft_s.mean"]).is_claim
    assert compare(*pairs(0.1, count=10), metrics=["ttft_s.mean"]).is_claim


def test_runs_that_cannot_be_paired_or_metrics_that_are_none_are_refused() -> None:
    a, b = pairs(0.1, count=2)
    with pytest.raises(ComparisonError, match="2 runs of A and 1 of B cannot be paired"):
        compare(a, b[:1])
    with pytest.raises(ComparisonError, match="no metric 'speed'; there are ttft_s, "):
        compare(a, b, metrics=["speed"])


# --- The command


def directories(tmp_path: Path, ttft_s: float, count: int) -> tuple[Path, Path]:
    a, b = pairs(ttft_s, count=count)
    for name, runs in (("a", a), ("b", b)):
        for place, data in enumerate(runs):
            write_run(tmp_path / name / f"block-{place}", data)
    return tmp_path / "a", tmp_path / "b"


def main(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    arguments = parser.parse_args(["compare", *map(str, words)])
    code: int = arguments.run(arguments)
    return code


def test_the_command_compares_directories_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = directories(tmp_path, 0.1, count=2)
    assert main(a, b) == 0
    out = capsys.readouterr().out
    assert "B = b against A = a" in out
    assert "ttft_s.p50" in out
    assert "B better" in out
    assert "2 pairs of runs: an indication; a claim takes 10 interleaved pairs." in out


def test_a_worse_b_is_exit_code_1_and_two_single_runs_will_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = directories(tmp_path, 0.4, count=1)
    assert main(a / "block-0", b / "block-0", "--metric", "ttft_s.p50", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["pair_count"] == 1
    assert found["metrics"]["ttft_s.p50"]["verdict"] == "A better"
    assert found["metrics"]["ttft_s.p50"]["ratio"] == pytest.approx(2.0, rel=0.05)


def test_all_metrics_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = directories(tmp_path, 0.2, count=1)
    main(a, b, "--metric", "all", "--json")
    names = set(json.loads(capsys.readouterr().out)["metrics"])
    assert names == {name for name in METRICS if not name.endswith("_per_worker")}


def test_bad_input_is_exit_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = directories(tmp_path, 0.2, count=1)
    assert main(a, tmp_path / "none") == 2
    assert main(a, b, "--metric", "speed") == 2
    assert main(a, b, "--margin-percent", "-1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("baton bench compare: ") for line in lines)
    assert "there is no run here" in lines[0]


def test_blocks_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_run(tmp_path / f"block-{number}", run([], label=str(number)))
    assert [data.facts["label"] for data in command.read_runs(tmp_path)] == ["1", "2", "10"]


def test_cancelled_requests_are_in_no_latency_but_in_every_share() -> None:
    answers = noisy(1, 0.2)
    left = [*answers, *(failed(100 + place, at_s=1.0, outcome=Outcome.CANCELLED) for place in range(50))]
    comparison = compare([run(answers)], [run(left)], metrics=["ttft_s.mean", "goodput.chatbot", "success"])
    assert result(comparison, "success").b == 0.5
    assert result(comparison, "goodput.chatbot").b == 0.5
    assert result(comparison, "ttft_s.mean").ratio == pytest.approx(1.0)
    assert not math.isnan(result(comparison, "ttft_s.mean").ratio or math.nan)

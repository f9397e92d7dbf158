"""Traces: read, refused with the line and the fix, and replayed with their lengths and their shared prefixes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.traffic import traces
from bench.traffic.draft import summary_of
from bench.traffic.plan import Plan
from bench.traffic.prompts import PromptMaker
from bench.traffic.sharing import prefix_hit_share
from bench.traffic.traces import Trace, TraceError, TraceRow, plan_from_trace, read_trace

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "traces"
"""Other people's traces, which are no part of the repository: replayed where they lie beside the checkout."""
PROMPTS = PromptMaker.without_tokenizer(30_000)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def mooncake(path: Path, rows: Sequence[tuple[float, int, int, list[int]]]) -> Path:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    return written(path, "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


def lengths_of(plan: Plan) -> list[tuple[int, int]]:
    return [(len(request.prompt_token_ids), request.output_token_count) for request in plan.requests]


# ---- reading


def test_mooncakes_lines_are_read_in_seconds_from_the_first(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "trace.jsonl", [(1500, 600, 20, [7, 8]), (4500, 512, 3, [7]), (4500, 1, 1, [9])])
    trace = read_trace(path)
    assert trace.rows == (
        TraceRow(0.0, 600, 20, (7, 8)),
        TraceRow(3.0, 512, 3, (7,)),
        TraceRow(3.0, 1, 1, (9,)),
    )
    assert (trace.form, trace.name) == ("mooncake", "trace.jsonl")
    assert trace.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    facts = json.loads(json.dumps(trace.facts()))
    assert facts["row_count"] == 3
    assert facts["duration_s"] == 3.0
    assert facts["gap_cv"] == 1.0  # gaps 3 and 0: mean 1.5, deviation 1.5
    assert str(tmp_path) not in json.dumps(facts)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            "azure",
            "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
            "2023-11-16 18:17:04.2299600,3180,8",
        ),
        (
            "azure",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,4808,10\n"
            "2024-05-10 00:00:00.259930+00:00,3180,8\n",
        ),
        (
            "burstgpt",
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,4808,10,4818,"
            "Conversation log\n5.25,GPT-4,3180,8,3188,API log\n",
        ),
        ("plain", "at_s,prompt_token_count,output_token_count\n0,4808,10\n\n0.25,3180,8\n"),
        ("plain", "\ufeffoutput_token_count,note,at_s,prompt_token_count\n10,a,3,4808\n8,b,3.25,3180\n"),
        (
            "plain",
            '{"at_s": 1, "prompt_token_count": 4808, "output_token_count": 10}\n'
            '{"at_s": 1.25, "prompt_token_count": 3180, "output_token_count": 8}\n',
        ),
    ],
)
def test_every_known_form_is_read(tmp_path: Path, form: str, text: str) -> None:
    trace = read_trace(written(tmp_path / "trace", text))
    assert trace.rows == (TraceRow(0.0, 4808, 10), TraceRow(0.25, 3180, 8))
    assert trace.form == form


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        (AZURE, "no rows after the header"),
        ("a,b,c\n1,2,3\n", "line 1: neither JSON nor a known header"),
        ('{"time": 3}\n', "line 1: unknown keys"),
        ("{nonsense\n", "line 1: not valid JSON"),
        (AZURE + "2023-11-16 18:17:03,5,5\n2023-11-16 18:17:04,5\n", "line 3: 2 columns, the header has 3"),
        (AZURE + "yesterday,5,5\n", "line 2: the time is not like"),
        (AZURE + "2023-11-16 18:17:03,many,5\n", "line 2: a token count is not a whole number"),
        (AZURE + "2023-11-16 18:17:03,10000001,5\n", "line 2: a prompt of 10000001 tokens"),
        (AZURE + "2023-11-16 18:17:03,5,99999999\n", "line 2: an answer of 99999999 tokens"),
        (AZURE + "2023-11-16 18:17:03,5,5\n2023-11-16 18:17:02,5,5\n", "line 3: the time goes back: sort the file"),
        (MOONCAKE + "[1]\n", "line 2: not a JSON object"),
        (MOONCAKE + MOONCAKE.replace("600", "6.5"), "line 2: input_length is not a whole number"),
        (MOONCAKE + MOONCAKE.replace("600", "true"), "line 2: input_length is not a whole number"),
        (MOONCAKE + MOONCAKE.replace("0,", '"now",', 1), "line 2: timestamp is not a number"),
        (MOONCAKE + MOONCAKE.replace("0,", "NaN,", 1), "line 2: the time is not a finite number"),
        (
            MOONCAKE + MOONCAKE.replace("[1, 2]", "[1, 2, 3]"),
            "line 2: 3 hash_ids for 600 tokens; one for each 512 would be 2",
        ),
        (MOONCAKE + MOONCAKE.replace("[1, 2]", '["a", "b"]'), "line 2: hash_ids is not a list of whole numbers"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(written(tmp_path / "bad.trace", text))
    assert says in str(caught.value)
    assert "bad.trace" in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "zip.csv").write_bytes(AZURE.encode() + b"\xff\xfe\n")
    with pytest.raises(TraceError, match="line 2: not UTF-8: unpack"):
        read_trace(tmp_path / "zip.csv")


def test_reading_is_bounded_in_rows_and_in_the_length_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mooncake(tmp_path / "trace.jsonl", [(i, 1, 1, [i]) for i in range(30)])
    monkeypatch.setattr(traces, "MAX_ROW_COUNT", 20)
    with pytest.raises(TraceError, match="more than 20 rows: cut the file"):
        read_trace(path)
    monkeypatch.setattr(traces, "MAX_LINE_BYTES", 40)
    with pytest.raises(TraceError, match="line 1: longer than 40 bytes"):
        read_trace(path)


# ---- replaying


def test_the_same_id_gives_the_same_tokens_and_other_ids_others(tmp_path: Path) -> None:
    path = mooncake(
        tmp_path / "trace.jsonl", [(0, 1200, 5, [0, 1, 2]), (1000, 1300, 5, [0, 1, 3]), (2000, 1024, 5, [0, 4])]
    )
    first, second, third = (
        request.prompt_token_ids for request in plan_from_trace(read_trace(path), PROMPTS, seed=1).requests
    )
    assert (len(first), len(second), len(third)) == (1200, 1300, 1024)
    assert first[:1024] == second[:1024]
    assert first[1024:1040] != second[1024:1040]
    assert third[:512] == first[:512]
    assert third[512:528] != first[512:528]
    other_seed = plan_from_trace(read_trace(path), PROMPTS, seed=2).requests[0].prompt_token_ids
    assert prefix_hit_share([first, other_seed]) == 0.0


def test_a_length_scale_keeps_lengths_and_sharing_whatever_it_is() -> None:
    rows = tuple(
        TraceRow(float(i), 512 * 20 + 256, 100, (*range(i % 4 * 5), *range(100 * i, 100 * i + 21 - i % 4 * 5)))
        for i in range(40)
    )
    trace = Trace("t", "mooncake", "0", rows)
    for scale in (1.0, 0.25, 0.0321, 0.0013):
        plan = plan_from_trace(trace, PROMPTS, seed=1, length_scale=scale, context_token_count=20_000)
        assert plan.facts["length_scale"] == plan.facts["scale"] == scale
        assert {len(request.prompt_token_ids) for request in plan.requests} == {math.floor(10_496 * scale + 0.5)}
        assert {request.output_token_count for request in plan.requests} == {max(1, math.floor(100 * scale + 0.5))}
        for place in range(4, 40, 4):
            # Of the blocks 0, 1, 2..., rows have none, 5, 10 and 15 in common with the last that has them all.
            for row, shared in ((0, 0), (1, 5), (2, 10), (3, 15)):
                common = math.floor(shared * 512 * scale + 0.5)
                ids, others = plan.requests[place + row].prompt_token_ids, plan.requests[3].prompt_token_ids
                assert ids[:common] == others[:common]
                if scale > 0.01:
                    assert ids[common : common + 5] != others[common : common + 5]


def test_bailians_blocks_are_of_16_tokens_and_its_times_in_seconds(tmp_path: Path) -> None:
    row = {"chat_id": 1, "parent_chat_id": -1, "output_length": 9, "type": "text", "turn": 1}
    rows = [
        {**row, "timestamp": 61.114, "input_length": 40, "hash_ids": [5, 6, 7]},
        {**row, "timestamp": 62.5, "input_length": 33, "hash_ids": [5, 6, 8]},
        {**row, "timestamp": 63.0, "input_length": 33, "hash_ids": [5]},
    ]
    trace = read_trace(written(tmp_path / "qwen.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert (trace.form, trace.block_token_count) == ("bailian", 16)
    assert [row.at_s for row in trace.rows] == [0.0, 1.386, 1.886]
    first, second, third = (request.prompt_token_ids for request in plan_from_trace(trace, PROMPTS, seed=1).requests)
    assert (len(first), len(second), len(third)) == (40, 33, 33)
    assert first[:32] == second[:32]
    assert first[:16] == third[:16]
    assert third[16:32] != second[16:32], "what no id stands for is unique"


def test_rows_without_ids_share_nothing_and_keep_their_exact_lengths() -> None:
    rows = tuple(TraceRow(float(i), 100 + i, 3 + i) for i in range(50))
    plan = plan_from_trace(Trace("t", "plain", "0", rows), PROMPTS, seed=1)
    assert lengths_of(plan) == [(100 + i, 3 + i) for i in range(50)]
    assert plan.facts["prefix_hit_share_infinite_cache"] == 0.0
    assert [request.at_s for request in plan.requests] == [float(i) for i in range(50)]
    assert plan.duration_s == 50.0
    halved = plan_from_trace(Trace("t", "plain", "0", rows), PROMPTS, seed=1, length_scale=0.5)
    assert lengths_of(halved)[1] == (51, 2)  # 50.5 and 2: halves go up


def test_what_does_not_fit_is_cut_or_dropped_and_counted() -> None:
    rows = (
        TraceRow(0.0, 900, 50),
        TraceRow(1.0, 1000, 50),
        TraceRow(2.0, 100, 2000),
        TraceRow(3.0, 3000, 2000, tuple(range(6))),
        TraceRow(4.0, 10, 0),
        TraceRow(5.0, 0, 10),
    )
    trace = Trace("t", "plain", "0", rows)
    cut = plan_from_trace(trace, PROMPTS, seed=1, context_token_count=1000)
    assert lengths_of(cut) == [(900, 50), (950, 50), (100, 900), (500, 500)]
    assert cut.facts["cut"] == {"dropped_without_prompt_or_answer": 2, "outputs_cut": 2, "prompts_cut": 2}
    dropped = plan_from_trace(trace, PROMPTS, seed=1, context_token_count=1000, too_long="drop")
    assert lengths_of(dropped) == [(900, 50)]
    assert dropped.facts["cut"] == {"dropped_too_long": 3, "dropped_without_prompt_or_answer": 2}
    assert dropped.facts["too_long"] == "drop"


def test_a_cut_prompt_keeps_its_shared_beginning() -> None:
    rows = tuple(TraceRow(float(i), 3000, 10, (0, 1, 2, 3, 4, 5)) for i in range(2))
    plan = plan_from_trace(Trace("t", "mooncake", "0", rows), PROMPTS, seed=1, context_token_count=1210)
    whole = plan_from_trace(Trace("t", "mooncake", "0", rows), PROMPTS, seed=1, context_token_count=8000)
    assert plan.requests[0].prompt_token_ids == whole.requests[0].prompt_token_ids[:1200]
    assert plan.facts["cut"] == {"prompts_cut": 2}


def test_slices_scales_and_the_tick_are_applied_and_named() -> None:
    rows = tuple(TraceRow(i // 10 * 3.0, 10, 1) for i in range(200))
    trace = Trace("t", "mooncake", "0", rows)
    plan = plan_from_trace(trace, PROMPTS, seed=1, start_s=6.0, end_s=36.0, rate_scale=2.0)
    assert plan.duration_s == 15.0
    assert len(plan.requests) == 100
    for place, request in enumerate(plan.requests):
        assert place // 10 * 1.5 <= request.at_s < place // 10 * 1.5 + 1.5
    pacer = plan.facts["pacer"]
    assert isinstance(pacer, dict)
    assert (pacer["bin_s"], pacer["rate_scale"], pacer["start_s"], pacer["end_s"]) == (3.0, 2.0, 6.0, 36.0)
    assert {r.at_s for r in plan_from_trace(trace, PROMPTS, seed=1, jitter="none").requests} == {
        i * 3.0 for i in range(20)
    }
    narrow = plan_from_trace(trace, PROMPTS, seed=1, jitter="0.5")
    assert all(0 <= request.at_s % 3 < 0.5 for request in narrow.requests)
    assert len(plan_from_trace(trace, PROMPTS, seed=1, request_limit=7).requests) == 7
    for jitter in ("auto", "none", "0.5"):  # the tick that is in the facts makes the same plan again
        once = plan_from_trace(trace, PROMPTS, seed=1, jitter=jitter)
        found = once.facts["pacer"]
        assert isinstance(found, dict)
        assert plan_from_trace(trace, PROMPTS, seed=1, jitter=repr(found["bin_s"])) == once
    thinned = plan_from_trace(trace, PROMPTS, seed=1, keep_share=0.5)
    assert 60 < len(thinned.requests) < 140


def test_the_same_seed_gives_the_same_plan() -> None:
    rows = tuple(TraceRow(i // 10 * 3.0, 40, 1, (i % 3,)) for i in range(100))
    trace = Trace("t", "mooncake", "0", rows)
    assert plan_from_trace(trace, PROMPTS, seed=5) == plan_from_trace(trace, PROMPTS, seed=5)
    assert plan_from_trace(trace, PROMPTS, seed=5).requests != plan_from_trace(trace, PROMPTS, seed=6).requests


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"start_s": 100.0}, "before the slice begins"),
        ({"start_s": 5.0, "end_s": 2.0}, "empty"),
        ({"jitter": "some"}, "'auto', 'none' or a number"),
        ({"too_long": "keep"}, "'cut' or 'drop'"),
        ({"rate_scale": 0.0}, "rate scale 0"),
        ({"length_scale": 0.0}, "scale 0"),
        ({"length_scale": -1.0}, "scale -1"),
        ({"length_scale": math.nan}, "scale nan"),
        ({"context_token_count": 1}, "room for a token"),
        ({"start_s": 1.1, "end_s": 1.9}, "no request falls"),
    ],
)
@pytest.mark.parametrize("ids", [(), (1,)])
def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, float], says: str, ids: tuple[int, ...]
) -> None:
    rows = tuple(TraceRow(float(i), 10, 1, ids) for i in range(5))
    with pytest.raises(ValueError, match=says):
        plan_from_trace(Trace("t", "plain", "0", rows), PROMPTS, seed=1, **arguments)  # type: ignore[arg-type]


# ---- the public traces, where they are


def public(name: str) -> Path:
    if not (PUBLIC / name).is_file():
        pytest.skip(f"{name} does not lie in ../shared/traces beside the checkout")
    return PUBLIC / name


@pytest.mark.parametrize(
    ("name", "row_count", "duration_s", "gap_cv", "prompt_figures", "output_figures"),
    [
        ("mooncake_conversation.jsonl", 12_031, 3537, None, (6909, 39_552, 126_195, 12_035), (350, 698, 2000, 343)),
        ("mooncake_synthetic.jsonl", 3993, 1022, 1.01, (11_587, 49_009, 191_378, 15_325), (69, 519, 893, 149)),
        ("azure23_code.csv", 8819, 3436, 13.2, (1469, 7315, 7437, 2048), (13, 90, 1899, 27.9)),
    ],
)
def test_public_traces_are_what_was_measured_of_them(
    name: str,
    row_count: int,
    duration_s: float,
    gap_cv: float | None,
    prompt_figures: tuple[float, ...],
    output_figures: tuple[float, ...],
) -> None:
    trace = read_trace(public(name))
    facts = trace.facts()
    assert facts["row_count"] == row_count
    assert facts["duration_s"] == pytest.approx(duration_s, abs=0.5)
    if gap_cv is not None:
        assert facts["gap_cv"] == pytest.approx(gap_cv, abs=0.06)
    for figures, counts in (
        (prompt_figures, [row.prompt_token_count for row in trace.rows]),
        (output_figures, [row.output_token_count for row in trace.rows]),
    ):
        summary = summary_of(counts)
        p50, p95, most, mean = figures
        assert (summary["p50"], summary["max"]) == (p50, most)
        # Within one row: percentiles of a list have more than one definition.
        ordered = sorted(counts)
        place = ordered.index(int(summary["p95"]))
        assert ordered[place - 2] <= p95 <= ordered[min(place + 2 + ordered.count(int(p95)), len(ordered) - 1)]
        assert summary["mean"] == pytest.approx(mean, rel=0.004)


def test_a_replay_of_mooncakes_conversations_keeps_their_prefix_sharing_and_unfolds_their_clock() -> None:
    """37.4% of prompt tokens hit an infinite cache, counted over the trace's own blocks."""
    trace = read_trace(public("mooncake_conversation.jsonl"))
    plan = plan_from_trace(trace, PROMPTS, seed=1, length_scale=1 / 32)
    assert len(plan.requests) == 12_031
    assert plan.facts["cut"] == {}
    assert plan.facts["prefix_hit_share_infinite_cache"] == pytest.approx(0.374, abs=0.001)
    pacer = plan.facts["pacer"]
    assert isinstance(pacer, dict)
    assert pacer["bin_s"] == pytest.approx(3.0, abs=0.003)
    gaps = np.diff([request.at_s for request in plan.requests])
    assert np.sum(gaps == 0) == 0  # 90% were
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1.0, abs=0.1)  # 3.03 as recorded


def test_a_replay_of_the_code_trace_is_as_bursty_as_it_was() -> None:
    trace = read_trace(public("azure23_code.csv"))
    plan = plan_from_trace(trace, PROMPTS, seed=1, length_scale=1 / 64)
    gaps = np.diff([request.at_s for request in plan.requests])
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(13.15, abs=0.01)
    per_second = np.bincount(np.array([request.at_s for request in plan.requests]).astype(int))
    assert per_second.max() / (len(plan.requests) / plan.duration_s) == pytest.approx(26, abs=1.0)


def test_a_replay_of_the_synthetic_trace_is_poisson_and_keeps_its_sharing() -> None:
    plan = plan_from_trace(read_trace(public("mooncake_synthetic.jsonl")), PROMPTS, seed=1, length_scale=1 / 32)
    pacer = plan.facts["pacer"]
    assert isinstance(pacer, dict)
    assert pacer["jitter"] == "none"
    assert plan.facts["prefix_hit_share_infinite_cache"] == pytest.approx(0.651, abs=0.001)

"""A run on disk is the run that was written; cut off it can still be read; every fault is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workbench_records import failed, record

from bench.results.records import Outcome, RequestRecord, TimelineSample
from bench.results.store import (
    RecordWriter,
    RunData,
    StoreError,
    fit_for_json,
    read_parquet,
    read_run,
    request_as_json,
    request_from_json,
    write_run,
)

TOLD = record(
    1,
    at_s=1.0,
    message_token_counts=[2, 1, 4],
    phases_s={"queue": 0.01, "prefill": 0.09},
    kv_transfer_bytes=2**40,
    placement="split/split",
    attempt_count=2,
    prefill_worker_id="p0",
    decode_worker_id="d0",
    cached_prompt_token_count=64,
)
SAMPLE = TimelineSample(at_s=0.5, source="p0", running_count=2.0, waiting_count=1.0, kv_used_share=0.25)


def run_data() -> RunData:
    records = [record(0), TOLD, failed(2, outcome=Outcome.REFUSED)]
    return RunData({"label": "baton", "plan": {"workload": "chat", "duration_s": 2.0}}, records, [SAMPLE])


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = run_data()
    write_run(tmp_path / "run", data)
    assert read_run(tmp_path / "run") == data
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("requests.jsonl", "requests.parquet", "run.json", "summary.json", "timeline.jsonl")
    ]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["requests"]["count"] == 3


def test_parquet_has_the_records_of_the_lines(tmp_path: Path) -> None:
    write_run(tmp_path, run_data())
    assert read_parquet(tmp_path / "requests.parquet") == read_run(tmp_path).records
    table = pyarrow.parquet.read_table(tmp_path / "requests.parquet")
    assert table.column("message_token_counts").to_pylist()[1] == [2, 1, 4]
    assert set(table.column_names) == set(request_as_json(TOLD))


def test_a_run_without_requests_can_be_kept(tmp_path: Path) -> None:
    write_run(tmp_path, RunData({}, []))
    assert read_run(tmp_path) == RunData({}, [])
    assert read_parquet(tmp_path / "requests.parquet") == []


def test_times_are_kept_in_microseconds() -> None:
    kept = request_as_json(record(at_s=1.23456789, ttft_s=0.1, gaps_s=()))
    assert kept["intended_at_s"] == 1.234568
    assert kept["message_at_s"] == [1.334568]


times_s = st.floats(0.0, 1e6).map(lambda value: round(value, 6))
texts = st.text(max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        RequestRecord,
        index=st.integers(0, 2**40),
        group=texts,
        session_id=texts,
        prompt_token_count=st.integers(0, 2**31),
        output_token_limit=st.integers(1, 2**31),
        intended_at_s=times_s,
        sent_at_s=times_s,
        ended_at_s=times_s,
        message_at_s=st.just([0.25, 0.5]),
        message_token_counts=st.lists(st.integers(1, 1000), min_size=2, max_size=2),
        outcome=st.sampled_from(Outcome),
        error=st.none() | texts,
        phases_s=st.none() | st.dictionaries(texts, times_s, max_size=3),
        kv_transfer_bytes=st.none() | st.integers(0, 2**62),
    )
)
def test_every_record_survives_lines_and_parquet(tmp_path_factory: Any, kept: RequestRecord) -> None:
    assert request_from_json(json.loads(json.dumps(request_as_json(kept)))) == kept
    directory = tmp_path_factory.mktemp("run")
    write_run(directory, RunData({}, [kept]))
    assert read_parquet(directory / "requests.parquet") == [kept]


def test_a_run_cut_off_can_be_read_without_its_partial_line(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, {"label": "x"})
    writer.add(record(0))
    writer.add(record(1))
    writer.add_sample(SAMPLE)
    with pytest.raises(ZeroDivisionError), writer:
        1 / 0  # noqa: B018
    lines = tmp_path / "requests.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    found = read_run(tmp_path)
    assert found.records == [record(0)]
    assert found.samples == [SAMPLE]
    assert not found.is_complete
    assert found.cut_off_line_count == 1
    assert not (tmp_path / "summary.json").exists()


def test_each_request_can_be_read_as_soon_as_it_was_added(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {}) as writer:
        writer.add(record(0))
        assert read_run(tmp_path).records == [record(0)]
        assert not read_run(tmp_path).is_complete
    assert read_run(tmp_path).is_complete


def test_the_facts_of_the_end_replace_those_of_the_start(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {"label": "x"}) as writer:
        assert writer.close({"label": "x", "valid": True}).facts == {"label": "x", "valid": True}
    assert read_run(tmp_path).facts == {"label": "x", "valid": True}


def test_what_json_has_no_word_for_becomes_null_in_facts_and_an_error_in_records(tmp_path: Path) -> None:
    assert fit_for_json({"a": math.nan, "b": (1, math.inf)}) == {"a": None, "b": [1, None]}
    assert fit_for_json({1: Outcome.OK, "sample": SAMPLE})["sample"]["source"] == "p0"
    with RecordWriter(tmp_path, {}) as writer, pytest.raises(ValueError, match="no number"):
        writer.add(record(at_s=math.nan))


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    write_run(tmp_path, run_data())
    with pytest.raises(StoreError, match="there is a run here already"):
        write_run(tmp_path, RunData({}, []))
    assert read_run(tmp_path) == run_data()


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"run\.json: there is no run here"):
        read_run(tmp_path)


def broken(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(tmp_path, RunData({}, [record(0), record(1)]))
    path = tmp_path / "requests.jsonl"
    first, second = path.read_text().splitlines()
    row = json.loads(second) | change
    row = {name: value for name, value in row.items() if value != "gone"}
    path.write_text(f"{first}\n{json.dumps(row)}\n")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"outcome": "fine"}, "field 'outcome' is 'fine', not one of ok, "),
        ({"index": 1.5}, "field 'index' is a float, not a whole number"),
        ({"sent_at_s": "gone"}, "field 'sent_at_s' is missing or null"),
        ({"ended_at_s": True}, "field 'ended_at_s' is a bool"),
        ({"message_at_s": [1.0]}, "differ in length"),
        ({"message_at_s": None}, "field 'message_at_s' is missing or null, not a list"),
        ({"colour": "red"}, "unknown field 'colour'"),
        ({"phases_s": {"queue": "long"}}, r"field 'phases_s\.queue' is a str"),
        ({"group": 3}, "field 'group' is a int, not a text"),
    ],
)
def test_a_bad_line_is_named_with_its_file_number_and_fix(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    broken(tmp_path, change)
    with pytest.raises(StoreError, match=rf"requests\.jsonl, line 2: .*{problem}.*Correct or remove") as caught:
        read_run(tmp_path)
    assert caught.value.line == 2


@pytest.mark.parametrize("line", ['{"index": 1,', "", "\x00\x00", "[]"])
def test_a_line_that_is_no_record_is_named_unless_it_is_the_last_and_partial(tmp_path: Path, line: str) -> None:
    write_run(tmp_path, RunData({}, [record(0)]))
    path = tmp_path / "requests.jsonl"
    path.write_text(f"{line}\n" + path.read_text())
    with pytest.raises(StoreError, match=r"requests\.jsonl, line 1"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ({"schema": 99, "facts": {}}, "has schema 99, this version reads 1"),
        ({"schema": 1}, "is not the head of a run"),
        ([], "is not the head of a run"),
    ],
)
def test_a_head_of_another_kind_is_refused(tmp_path: Path, head: Any, problem: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(head))
    with pytest.raises(StoreError, match=problem):
        read_run(tmp_path)


def test_parquet_of_something_else_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match="has schema none"):
        read_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(StoreError, match="cannot be read"):
        read_parquet(tmp_path / "b.parquet")

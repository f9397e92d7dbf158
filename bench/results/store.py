"""A run on disk: written as it goes, so that a run cut off can be read, and read back with every fault named.

A run is a directory:

- ``run.json``: ``{"schema": 1, "is_complete": bool, "facts": {...}}``
- ``requests.jsonl``: one ``RequestRecord`` a line, in the order in which requests ended
- ``requests.parquet``: the same records, columns of the same names; ``phases_s`` is a map. Only when complete
- ``timeline.jsonl``: one ``TimelineSample`` a line
- ``summary.json``: what ``bench.results.summary.summarise`` says of it. Only when complete

Times are rounded to microseconds. Numbers that JSON has no word for (NaN, infinity) become null in facts, and are an
error in a record.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

import pyarrow
import pyarrow.parquet

from bench.results.records import Outcome, RequestRecord, TimelineSample
from bench.results.run_data import RunData
from bench.results.summary import summarise

__all__ = ["SCHEMA", "RecordWriter", "RunData", "StoreError", "read_parquet", "read_run", "write_run"]

SCHEMA = 1
TIME_DIGITS = 6
RUN, REQUESTS, PARQUET, TIMELINE, SUMMARY = (
    *("run.json", "requests.jsonl", "requests.parquet"),
    *("timeline.jsonl", "summary.json"),
)
T = TypeVar("T")

_INTEGERS = ("index", "prompt_token_count", "output_token_limit")
_TIMES = ("intended_at_s", "sent_at_s", "ended_at_s")
_OPTIONAL_INTEGERS = ("kv_transfer_bytes", "attempt_count", "cached_prompt_token_count")
_OPTIONAL_TEXTS = ("error", "placement", "prefill_worker_id", "decode_worker_id")
_REQUEST_FIELDS = frozenset(field.name for field in dataclasses.fields(RequestRecord))
_SAMPLE_FIELDS = tuple(field.name for field in dataclasses.fields(TimelineSample))

_ARROW = pyarrow.schema(
    [
        *(pyarrow.field(name, pyarrow.int64(), nullable=False) for name in _INTEGERS),
        *(pyarrow.field(name, pyarrow.float64(), nullable=False) for name in _TIMES),
        *(pyarrow.field(name, pyarrow.string(), nullable=False) for name in ("group", "session_id", "outcome")),
        pyarrow.field("message_at_s", pyarrow.list_(pyarrow.float64()), nullable=False),
        pyarrow.field("message_token_counts", pyarrow.list_(pyarrow.int32()), nullable=False),
        pyarrow.field("phases_s", pyarrow.map_(pyarrow.string(), pyarrow.float64())),
        *(pyarrow.field(name, pyarrow.int64()) for name in _OPTIONAL_INTEGERS),
        *(pyarrow.field(name, pyarrow.string()) for name in _OPTIONAL_TEXTS),
    ],
    metadata={"baton_run_schema": str(SCHEMA)},
)


class StoreError(Exception):
    """A run that cannot be written or read: which file, which line of it, and what to do."""

    def __init__(self, path: Path, problem: str, fix: str, *, line: int | None = None) -> None:
        where = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {problem}. {fix}")
        self.path = path
        self.line = line
        self.problem = problem
        self.fix = fix


class RecordWriter:
    """Writes a run as it goes: each request when it ended, each sample when it was taken.

    Owns its files: ``close`` (or leaving the context) completes the run with Parquet and summary. Left by an
    exception it only closes the files: what was written can be read, as a run that is not complete. Every line is
    handed to the system before ``add`` returns. Raises ``StoreError`` if the directory has a run already.
    """

    def __init__(self, directory: Path | str, facts: Mapping[str, Any]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        if (self._directory / RUN).exists():
            raise StoreError(self._directory / RUN, "there is a run here already", "Give another directory")
        self.facts: dict[str, Any] = dict(facts)
        """May be changed until ``close``."""
        self._records: list[RequestRecord] = []
        self._samples: list[TimelineSample] = []
        _write_json(self._directory / RUN, {"schema": SCHEMA, "is_complete": False, "facts": self.facts})
        self._requests: TextIO = (self._directory / REQUESTS).open("w", encoding="utf-8")
        self._timeline: TextIO = (self._directory / TIMELINE).open("w", encoding="utf-8")

    def add(self, record: RequestRecord) -> None:
        line = _as_line(request_as_json(record))
        self._records.append(record)
        self._requests.write(line)
        self._requests.flush()

    def add_sample(self, sample: TimelineSample) -> None:
        line = _as_line(sample_as_json(sample))
        self._samples.append(sample)
        self._timeline.write(line)
        self._timeline.flush()

    def close(self, facts: Mapping[str, Any] | None = None) -> RunData:
        """Completes the run and returns it as it would be read back. ``facts``: the final ones, if they changed."""
        if facts is not None:
            self.facts = dict(facts)
        self.abandon()
        data = RunData(
            facts=fit_for_json(self.facts),
            records=[request_from_json(request_as_json(record)) for record in self._records],
            samples=[sample_from_json(sample_as_json(sample)) for sample in self._samples],
        )
        write_parquet(self._directory / PARQUET, data.records)
        _write_json(self._directory / SUMMARY, summarise(data))
        _write_json(self._directory / RUN, {"schema": SCHEMA, "is_complete": True, "facts": data.facts})
        return data

    def abandon(self) -> None:
        """Closes the files and leaves the run as it is: not complete."""
        self._requests.close()
        self._timeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
        elif not self._requests.closed:
            self.close()


def write_run(directory: Path | str, data: RunData) -> None:
    """Writes a whole run. Raises ``StoreError`` if the directory has one already, or a record has no finite time."""
    with RecordWriter(directory, data.facts) as writer:
        for record in data.records:
            writer.add(record)
        for sample in data.samples:
            writer.add_sample(sample)
        writer.close()


def read_run(directory: Path | str) -> RunData:
    """A run, complete or cut off; a last line without its end is left out and counted.

    Raises ``StoreError`` for anything else that is not as ``RecordWriter`` writes it.
    """
    directory = Path(directory)
    path = directory / RUN
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(path, "there is no run here", "Give the directory of a run") from None
    except (OSError, ValueError) as error:
        raise StoreError(path, f"cannot be read: {_short(error)}", "Restore it, or measure again") from None
    if not isinstance(head, dict) or not isinstance(head.get("facts"), dict) or "schema" not in head:
        raise StoreError(path, "is not the head of a run", "Give the directory of a run of `baton bench`")
    if head["schema"] != SCHEMA:
        raise StoreError(
            path,
            f"has schema {head['schema']!r}, this version reads {SCHEMA}",
            "Read it with the version that wrote it",
        )
    records, cut_requests = _read_lines(directory / REQUESTS, request_from_json)
    samples: list[TimelineSample] = []
    cut_samples = 0
    if (directory / TIMELINE).exists():
        samples, cut_samples = _read_lines(directory / TIMELINE, sample_from_json)
    return RunData(
        facts=head["facts"],
        records=records,
        samples=samples,
        is_complete=head.get("is_complete") is True,
        cut_off_line_count=cut_requests + cut_samples,
    )


def write_parquet(path: Path, records: Iterable[RequestRecord]) -> None:
    rows = []
    for record in records:
        row = request_as_json(record)
        if row["phases_s"] is not None:
            row["phases_s"] = list(row["phases_s"].items())
        rows.append(row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_ARROW), path, compression="zstd")


def read_parquet(path: Path | str) -> list[RequestRecord]:
    """The records of a ``requests.parquet``: the same as those of ``requests.jsonl`` beside it."""
    path = Path(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise StoreError(path, f"cannot be read: {_short(error)}", "Read requests.jsonl beside it") from None
    schema = (table.schema.metadata or {}).get(b"baton_run_schema", b"none").decode()
    if schema != str(SCHEMA):
        raise StoreError(
            path, f"has schema {schema}, this version reads {SCHEMA}", "Read it with the version that wrote it"
        )
    records = []
    for row in table.to_pylist():
        if row["phases_s"] is not None:
            row["phases_s"] = dict(row["phases_s"])
        records.append(request_from_json(row))
    return records


def request_as_json(record: RequestRecord) -> dict[str, Any]:
    """All fields by name, times in whole microseconds. Raises ``ValueError`` for a time that is not finite."""
    row = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    row["outcome"] = record.outcome.value
    for name in _TIMES:
        row[name] = _rounded(row[name])
    row["message_at_s"] = [_rounded(at_s) for at_s in record.message_at_s]
    row["message_token_counts"] = list(record.message_token_counts)
    if record.phases_s is not None:
        row["phases_s"] = {name: _rounded(value) for name, value in record.phases_s.items()}
    return row


def request_from_json(row: Any) -> RequestRecord:
    """Raises ``ValueError``, which says what is wrong with which field."""
    fields = _fields(row)
    unknown = sorted(set(fields) - _REQUEST_FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    outcome = fields.get("outcome")
    if outcome not in set(Outcome):
        raise ValueError(f"field 'outcome' is {outcome!r}, not one of {', '.join(Outcome)}")
    message_at_s = _list(fields, "message_at_s", _number)
    message_token_counts = _list(fields, "message_token_counts", _integer)
    if len(message_at_s) != len(message_token_counts):
        raise ValueError("fields 'message_at_s' and 'message_token_counts' differ in length")
    phases_s = fields.get("phases_s")
    if phases_s is not None:
        if not isinstance(phases_s, dict):
            raise ValueError("field 'phases_s' is no mapping")
        phases_s = {str(name): _number(value, f"phases_s.{name}") for name, value in phases_s.items()}
    values: dict[str, Any] = {
        **{name: _integer(fields.get(name), name) for name in _INTEGERS},
        **{name: _number(fields.get(name), name) for name in _TIMES},
        **{name: _optional(fields.get(name), name, _integer) for name in _OPTIONAL_INTEGERS},
        **{name: _optional(fields.get(name), name, _text) for name in _OPTIONAL_TEXTS},
    }
    return RequestRecord(
        **values,
        group=_text(fields.get("group"), "group"),
        session_id=_text(fields.get("session_id"), "session_id"),
        message_at_s=message_at_s,
        message_token_counts=message_token_counts,
        outcome=Outcome(outcome),
        phases_s=phases_s,
    )


def sample_as_json(sample: TimelineSample) -> dict[str, Any]:
    return {
        "at_s": _rounded(sample.at_s),
        "source": sample.source,
        "running_count": _rounded(sample.running_count),
        "waiting_count": _rounded(sample.waiting_count),
        "kv_used_share": _rounded(sample.kv_used_share),
    }


def sample_from_json(row: Any) -> TimelineSample:
    fields = _fields(row)
    unknown = sorted(set(fields) - set(_SAMPLE_FIELDS))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}")
    numbers = {name: _number(fields.get(name), name) for name in _SAMPLE_FIELDS if name != "source"}
    return TimelineSample(source=_text(fields.get("source"), "source"), **numbers)


def fit_for_json(value: Any) -> Any:
    """Dataclasses and mappings as objects, sequences as lists, numpy's numbers as numbers, NaN and infinity as null;
    anything else by its text."""
    if isinstance(value, enum.Enum):
        return fit_for_json(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: fit_for_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): fit_for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fit_for_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((fit_for_json(item) for item in value), key=str)
    if hasattr(value, "tolist"):
        return fit_for_json(value.tolist())
    return str(value)


def _rounded(value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number to keep")
    return round(value, TIME_DIGITS)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n"


def _write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half of it."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(fit_for_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _read_lines(path: Path, parse: Callable[[Any], T]) -> tuple[list[T], int]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(path, f"cannot be read: {_short(error)}", "Restore it, or measure again") from None
    lines = text.split(b"\n")
    last = lines.pop()
    read: list[T] = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append(parse(json.loads(line)))
        except ValueError as error:
            raise StoreError(path, _short(error), "Correct or remove the line", line=number) from None
    return read, 1 if last else 0


def _short(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _fields(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    return row


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"field {name!r} is {_seen(value)}, not a finite number")
    return float(value)


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"field {name!r} is {_seen(value)}, not a whole number")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {_seen(value)}, not a text")
    return value


def _seen(value: Any) -> str:
    return "missing or null" if value is None else f"a {type(value).__name__}"


def _optional(value: Any, name: str, parse: Callable[[Any, str], T]) -> T | None:
    return None if value is None else parse(value, name)


def _list(fields: dict[str, Any], name: str, parse: Callable[[Any, str], T]) -> list[T]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise ValueError(f"field {name!r} is {_seen(values)}, not a list")
    return [parse(value, name) for value in values]

"""Traces of real traffic: read, checked line by line, and made into plans. Reads files; writes none.

Known are the JSON lines of Mooncake's and of Qwen-Bailian's traces, the CSV files of Azure's and of BurstGPT's, and a
plain form of our own as JSON lines or CSV: ``at_s``, ``prompt_token_count``, ``output_token_count``, and for JSON
``hash_ids``. Other people's traces stay where they are published: docs/workbench/workloads.md says where.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from bench.traffic.draft import Draft
from bench.traffic.pacers import Replay, detect_bin_s
from bench.traffic.plan import Plan
from bench.traffic.prompts import PromptMaker

MAX_ROW_COUNT = 5_000_000
MAX_LINE_BYTES = 4_000_000
MAX_TOKEN_COUNT = 10_000_000
BLOCK_TOKEN_COUNTS = {"mooncake": 512, "bailian": 16, "plain": 512}
"""Tokens of prompt that one of ``hash_ids`` stands for."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request. ``hash_ids``: one for each block of the prompt, the last one possibly not full."""

    at_s: float
    """From the first row."""
    prompt_token_count: int
    output_token_count: int
    """Either count is 0 in records of requests that failed."""
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """What a file says, in its order."""

    name: str
    """The file's name, without its folder."""
    form: str
    """"mooncake", "bailian", "azure", "burstgpt" or "plain"."""
    sha256: str
    """Of the file."""
    rows: tuple[TraceRow, ...]
    block_token_count: int = 512
    """Tokens of a block of ``hash_ids``."""

    def facts(self) -> dict[str, object]:
        """Fit for JSON."""
        gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(self.rows)]
        mean_s = statistics.fmean(gaps) if gaps else 0.0
        return {
            "name": self.name,
            "form": self.form,
            "sha256": self.sha256,
            "row_count": len(self.rows),
            "duration_s": self.rows[-1].at_s,
            "gap_cv": round(statistics.pstdev(gaps) / mean_s, 4) if mean_s > 0 else None,
            "has_hash_ids": any(row.hash_ids for row in self.rows),
        }


class TraceError(ValueError):
    """A trace cannot be read. Names the file, the line and what to do."""


def read_trace(path: Path) -> Trace:
    """Reads a trace line by line, whatever known form it has. Raises ``TraceError``."""
    if not path.is_file():
        raise TraceError(f"{path}: no such file; docs/workbench/workloads.md says where traces are published")
    digest = hashlib.sha256()
    lines = _lines(path, digest)
    try:
        first = next(lines)
    except StopIteration:
        raise TraceError(f"{path.name}: the file is empty") from None
    form, read_row = _form_of(path.name, first)
    rows: list[TraceRow] = []
    origin_s: float | None = None
    last_s = -math.inf
    started = _chained(first, lines) if form.endswith("json") else lines
    for number, line in started:
        if not line.strip():
            continue
        try:
            at_s, row = read_row(line)
            _check_counts(row)
            if not math.isfinite(at_s):
                raise ValueError("the time is not a finite number")
            if at_s < last_s:
                raise ValueError("the time goes back: sort the file by time")
        except ValueError as error:
            raise TraceError(f"{path.name}, line {number}: {error}") from None
        last_s = at_s
        origin_s = at_s if origin_s is None else origin_s
        # To the microsecond: a difference of dates as floats has noise below that.
        rows.append(TraceRow(round(at_s - origin_s, 6), *row))
        if len(rows) > MAX_ROW_COUNT:
            raise TraceError(f"{path.name}: more than {MAX_ROW_COUNT} rows: cut the file")
    if not rows:
        raise TraceError(f"{path.name}: there are no rows after the header")
    name = form.split("-")[0]
    return Trace(path.name, name, digest.hexdigest(), tuple(rows), BLOCK_TOKEN_COUNTS.get(name, 512))


_Fields = tuple[int, int, tuple[int, ...]]
_RowReader = Callable[[str], tuple[float, _Fields]]


def _lines(path: Path, digest: hashlib._Hash) -> Iterator[tuple[int, str]]:
    """(line number from 1, text), each within its bound; ``digest`` sees every byte."""
    with path.open("rb") as file:
        for number in range(1, MAX_ROW_COUNT + 10):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                raise TraceError(f"{path.name}, line {number}: longer than {MAX_LINE_BYTES} bytes: is this a trace?")
            digest.update(line)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise TraceError(f"{path.name}, line {number}: not UTF-8: unpack or convert the file") from None
        raise TraceError(f"{path.name}: more than {MAX_ROW_COUNT} rows: cut the file")


def _chained(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _form_of(file: str, first: tuple[int, str]) -> tuple[str, _RowReader]:
    line = first[1].strip()
    if line.startswith("{"):
        try:
            keys = set(_object_of(line))
        except ValueError as error:
            raise TraceError(f"{file}, line 1: {error}") from None
        if {"timestamp", "input_length", "output_length"} <= keys:
            # The same names, but seconds for milliseconds and 16 tokens for 512.
            return ("bailian-json", _bailian_row) if "chat_id" in keys else ("mooncake-json", _mooncake_row)
        if {"at_s", "prompt_token_count", "output_token_count"} <= keys:
            return "plain-json", _plain_json_row
        raise TraceError(
            f"{file}, line 1: unknown keys; known: timestamp, input_length, output_length, hash_ids (Mooncake), or "
            "at_s, prompt_token_count, output_token_count, hash_ids"
        )
    columns = [name.strip() for name in next(csv.reader([line]))]
    for form, needed in _CSV_FORMS.items():
        if set(needed) <= set(columns):
            places = [columns.index(name) for name in needed]
            return f"{form}-csv", _csv_reader(places, len(columns), _CSV_TIMES[form])
    known = "; ".join(", ".join(needed) for needed in _CSV_FORMS.values())
    raise TraceError(f"{file}, line 1: neither JSON nor a known header; known headers have: {known}")


_CSV_FORMS: Mapping[str, tuple[str, str, str]] = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "plain": ("at_s", "prompt_token_count", "output_token_count"),
}


def _object_of(line: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        raise ValueError("not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _mooncake_row(line: str) -> tuple[float, _Fields]:
    value = _object_of(line)
    return _real(value, "timestamp") / 1000, _json_fields(value, "mooncake", "input_length", "output_length")


def _bailian_row(line: str) -> tuple[float, _Fields]:
    value = _object_of(line)
    return _real(value, "timestamp"), _json_fields(value, "bailian", "input_length", "output_length")


def _plain_json_row(line: str) -> tuple[float, _Fields]:
    value = _object_of(line)
    return _real(value, "at_s"), _json_fields(value, "plain", "prompt_token_count", "output_token_count")


def _json_fields(value: Mapping[str, object], form: str, prompt: str, output: str) -> _Fields:
    hash_ids = value.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(hash_id) is int for hash_id in hash_ids):
        raise ValueError("hash_ids is not a list of whole numbers")
    fields = (_whole(value, prompt), _whole(value, output), tuple(hash_ids))
    block = BLOCK_TOKEN_COUNTS[form]
    needed = -(-fields[0] // block)
    if len(hash_ids) > needed:
        raise ValueError(f"{len(hash_ids)} hash_ids for {fields[0]} tokens; one for each {block} would be {needed}")
    return fields


def _real(value: Mapping[str, object], key: str) -> float:
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{key} is not a number")
    return float(number)


def _whole(value: Mapping[str, object], key: str) -> int:
    number = value.get(key)
    if type(number) is not int:
        raise ValueError(f"{key} is not a whole number")
    return number


def _csv_reader(places: list[int], column_count: int, time_of: Callable[[str], float]) -> _RowReader:
    def read(line: str) -> tuple[float, _Fields]:
        cells = next(csv.reader([line]))
        if len(cells) != column_count:
            raise ValueError(f"{len(cells)} columns, the header has {column_count}")
        at, prompt, output = (cells[place].strip() for place in places)
        for count in (prompt, output):
            if not (count.isascii() and count.isdecimal()):
                raise ValueError("a token count is not a whole number")
        return time_of(at), (int(prompt), int(output), ())

    return read


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("the time is not a number of seconds") from None


_EPOCH = datetime(2000, 1, 1)


def _date(text: str) -> float:
    """Seconds since 2000 of ``2023-11-16 18:17:03.9799600``, to the microsecond; a time zone is dropped."""
    try:
        return (datetime.fromisoformat(text).replace(tzinfo=None) - _EPOCH).total_seconds()
    except ValueError:
        raise ValueError("the time is not like 2023-11-16 18:17:03.97") from None


_CSV_TIMES: Mapping[str, Callable[[str], float]] = {"azure": _date, "burstgpt": _seconds, "plain": _seconds}


def _check_counts(fields: _Fields) -> None:
    prompt, output, _ = fields
    if not 0 <= prompt <= MAX_TOKEN_COUNT:
        raise ValueError(f"a prompt of {prompt} tokens is not within 0 and {MAX_TOKEN_COUNT}")
    if not 0 <= output <= MAX_TOKEN_COUNT:
        raise ValueError(f"an answer of {output} tokens is not within 0 and {MAX_TOKEN_COUNT}")


def plan_from_trace(
    trace: Trace,
    prompts: PromptMaker,
    *,
    seed: int,
    start_s: float = 0.0,
    end_s: float = math.inf,
    rate_scale: float = 1.0,
    keep_share: float = 1.0,
    length_scale: float = 1.0,
    jitter: str = "auto",
    context_token_count: int = 8192,
    too_long: str = "cut",
    request_limit: int | None = None,
) -> Plan:
    """The requests of the trace's slice [start_s, end_s), with its lengths and its shared prefixes.

    ``rate_scale`` divides the times. ``keep_share``: each request is kept with this probability. ``jitter``: "auto"
    spreads arrivals within the tick of a coarse clock if the trace shows one, "none" takes the times as they are, a
    number is the tick in seconds. ``too_long`` for requests beyond ``context_token_count``: "cut" them or "drop"
    them. Both are counted in the facts, and so are rows without a prompt or an answer, which are always dropped.

    Where the trace has ``hash_ids``, the same id gives the same tokens: block i of a prompt reaches from i to i + 1
    times the block's length times the scale, each rounded to whole tokens, so that lengths and sharing are scaled by
    the very same factor. What ids do not cover is unique. Raises ``ValueError``.
    """
    if too_long not in ("cut", "drop"):
        raise ValueError(f"too_long is 'cut' or 'drop', not {too_long!r}")
    if not (math.isfinite(length_scale) and length_scale > 0):
        raise ValueError(f"length scale {length_scale:g} is not above 0")
    times = tuple(row.at_s for row in trace.rows)
    pacer = Replay(times, _bin_s(jitter, times), start_s, end_s, rate_scale, keep_share)
    duration_s = pacer.natural_duration_s
    if duration_s <= 0:
        raise ValueError(f"the trace ends at {pacer.recorded_duration_s:g} s, before the slice begins")
    draft = Draft(seed=seed, prompts=prompts, scale=length_scale, context_token_count=context_token_count)
    arrivals = pacer.arrivals(duration_s, draft.rng("pacer"))[:request_limit]
    for place, at_s in arrivals:
        row = trace.rows[place]
        if row.output_token_count == 0 or row.prompt_token_count == 0:
            draft.notes["dropped_without_prompt_or_answer"] += 1
            continue
        prompt_count, output_count = draft.scaled(row.prompt_token_count), draft.scaled(row.output_token_count)
        if too_long == "drop" and not draft.fits(prompt_count, output_count):
            draft.notes["dropped_too_long"] += 1
            continue
        prompt: list[int] = []
        for block, hash_id in enumerate(row.hash_ids, start=1):
            end = min(math.floor(block * trace.block_token_count * length_scale + 0.5), prompt_count)
            prompt += draft.shared(("block", hash_id), end - len(prompt))
            if len(prompt) >= context_token_count:
                break  # a prompt far beyond the context is not made only to be cut
        else:
            prompt += draft.unique(("row", place), prompt_count - len(prompt))
        draft.start(at_s, prompt, output_count)
    return draft.plan(
        "trace",
        duration_s,
        {
            "pacer": pacer.facts(),
            "rate_per_s": None,
            "arrivals": "requests",
            "arrival_count": len(arrivals),
            "request_limit": request_limit,
            "trace": trace.facts(),
            "length_scale": length_scale,
            "too_long": too_long,
        },
    )


def _bin_s(jitter: str, times_s: tuple[float, ...]) -> float:
    if jitter == "auto":
        return detect_bin_s(times_s)
    if jitter == "none":
        return 0.0
    try:
        bin_s = float(jitter)
    except ValueError:
        raise ValueError(f"jitter is 'auto', 'none' or a number of seconds, not {jitter!r}") from None
    return bin_s

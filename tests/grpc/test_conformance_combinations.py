"""What is asked together, beside what each alone promises: many drawn requests against a reference of few lines.

Answers are scripted: emoji over several tokens, combining characters, right-to-left text, NUL, bytes that are no
character, special tokens in the middle. Drawn with them: stop sequences cut from the answer, stop tokens, least
and most lengths, samples, chunk sizes, contents, logprobs, echo, readers who pause, and resuming at any border, here
and at another router. In virtual time, reproducible by their number.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from drawn_apart import drawn_apart
from raw_calls import Outcome
from sim_cluster import TOKENIZER
from virtual_calls import Context, VirtualCluster, virtual_cluster

from baton.testing import run_virtual
from baton.v1 import generation_pb2 as pb
from router.tiny_model import END_ID

PROMPT = tuple(range(20, 29))
LONGEST = 30
BITS = (
    "a",
    "the",
    " ",
    "\n",
    "\0",
    "é",
    "e\u0301",
    "שלום",
    "👩‍👩‍👧",
    "🔥",
    "🇳🇴",
    "\u200f",
    "日本",
    "x",
    "aa",
    "aaa",
    "ab",
    "\u202e",
)
BATCHES, BATCH_SIZE = 6, 25


@dataclass(frozen=True)
class Wanted:
    """How one answer must come out."""

    token_count: int
    text: str
    reason: int
    stop_sequence: str = ""
    stop_token_id: int | None = None


def reference(ids: Sequence[int], stop: pb.StopConditions) -> Wanted:
    """Bytes of tokens to characters, one by one, and at each the question whether something ends here."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for count, token_id in enumerate(ids, start=1):
        is_least = count > stop.min_output_token_count
        is_end = token_id in stop.stop_token_ids or (token_id == END_ID and not stop.ignore_eos)
        is_full = count >= stop.max_output_token_count
        fresh = "" if is_end else decoder.decode(bytes_of(token_id))
        fresh += decoder.decode(b"", final=True) if is_end or is_full else ""
        for char in fresh:
            text += char
            found = [sequence for sequence in stop.stop_sequences if text.endswith(sequence)]
            if found and is_least:
                longest = max(found, key=len)
                return Wanted(count, text[: -len(longest)], pb.FINISH_REASON_STOP, longest)
        if is_end:
            return Wanted(count, text, pb.FINISH_REASON_STOP, stop_token_id=token_id)
        if is_full:
            return Wanted(count, text, pb.FINISH_REASON_MAX_OUTPUT_TOKENS)
    raise AssertionError("the script is longer than any answer")


def bytes_of(token_id: int) -> bytes:
    """Nothing of a special token."""
    assert TOKENIZER._bytes_of_id is not None
    return b"" if token_id in TOKENIZER.special_token_ids else TOKENIZER._bytes_of_id[token_id]


def written(drawn: random.Random, length: int) -> str:
    return "".join(drawn.choice(BITS) for _ in range(length))


def script(drawn: random.Random) -> tuple[int, ...]:
    """Text, and in it tokens that are no character, parts of one, and special ones."""
    ids = list(TOKENIZER.encode(written(drawn, drawn.randint(1, 12))))
    for _ in range(drawn.randint(0, 6)):
        odd = drawn.choice([drawn.randrange(3, TOKENIZER.vocab_size), drawn.randrange(3, 259), 0, 1, END_ID])
        ids.insert(drawn.randrange(len(ids) + 1), odd)
    while len(ids) < LONGEST:
        ids += TOKENIZER.encode(written(drawn, 4))
    return tuple(ids[:LONGEST])


def stop_conditions(drawn: random.Random, ids: Sequence[int]) -> pb.StopConditions:
    text = TOKENIZER.decode(tuple(ids))
    stop = pb.StopConditions(max_output_token_count=drawn.choice([1, 2, 5, 20, 28]), ignore_eos=drawn.random() < 0.4)
    for _ in range(drawn.choice([0, 0, 1, 1, 2, 4])):
        at = drawn.randrange(len(text))
        of_answer = text[at : at + drawn.randint(1, 4)].replace("\ufffd", "")
        if sequence := of_answer if drawn.random() < 0.6 else written(drawn, drawn.randint(1, 2)):
            stop.stop_sequences.append(sequence)
    if drawn.random() < 0.3:
        stop.stop_token_ids.append(drawn.choice(list(ids)))
    elif stop.ignore_eos:  # what an engine does not draw before the least length, these scripts would say
        stop.min_output_token_count = drawn.choice([0, stop.max_output_token_count, stop.max_output_token_count // 2])
    return stop


def request(drawn: random.Random, ids: Sequence[int], sample_count: int, seed: int) -> pb.GenerateRequest:
    output = pb.OutputOptions(
        content=drawn.choice([0, 1, 2, 3]),  # type: ignore[arg-type]
        max_chunk_token_count=drawn.choice([None, 1, 3, 100]),
        top_logprob_count=drawn.choice([None, 0, 2]),
    )
    message = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT),
        sampling=pb.Sampling(temperature=1, seed=seed),
        stop=stop_conditions(drawn, ids),
        output=output,
        priority=drawn.randint(-3, 3),
        session_id=drawn.choice(["", "s"]),
        tenant=drawn.choice(["", "t"]),
        sample_count=sample_count if sample_count > 1 else drawn.choice([0, 1]),
    )
    if drawn.random() < 0.5:
        message.resume.SetInParent()
    else:
        message.output.echo_prompt = drawn.random() < 0.5
        if drawn.random() < 0.5:
            message.output.prompt_logprob_count = drawn.choice([0, 2])
    return message


def of_sample(outcome: Outcome, index: int) -> list[pb.Chunk]:
    return [chunk for chunk in outcome.chunks if chunk.sample_index == index]


def joined(chunks: Sequence[pb.Chunk]) -> tuple[str, list[int], list[bytes]]:
    """Text, ids and logprobs of chunks, however they were cut."""
    return (
        "".join(chunk.text for chunk in chunks),
        [token_id for chunk in chunks for token_id in chunk.token_ids],
        [each.SerializeToString(deterministic=True) for chunk in chunks for each in chunk.logprobs],
    )


def assert_as_asked(asked: pb.GenerateRequest, scripts: Sequence[Sequence[int]], outcome: Outcome) -> None:
    assert outcome.code is grpc.StatusCode.OK, outcome
    output, finished, total = asked.output, outcome.finished, 0
    ends: Sequence[Any] = finished.samples if len(scripts) > 1 else [finished]
    for index, (ids, end) in enumerate(zip(scripts, ends, strict=True)):
        wanted, chunks = reference(ids, asked.stop), of_sample(outcome, index)
        text, token_ids, logprobs = joined(chunks)
        assert text == (wanted.text if output.content != pb.OutputOptions.CONTENT_TOKEN_IDS else "")
        assert token_ids == (list(ids[: wanted.token_count]) if output.content >= 2 else [])
        assert len(logprobs) == (wanted.token_count if output.HasField("top_logprob_count") else 0)
        assert sum(chunk.token_count for chunk in chunks) == wanted.token_count
        assert (end.reason, end.matched_stop_sequence) == (wanted.reason, wanted.stop_sequence)
        matched = end.matched_stop_token_id if end.HasField("matched_stop_token_id") else None
        assert matched == wanted.stop_token_id
        assert end.HasField("cumulative_logprob") is output.HasField("top_logprob_count")
        at = 0
        for place, chunk in enumerate(chunks):
            assert chunk.first_token_index == at
            assert chunk.token_count >= (1 if place < len(chunks) - 1 else 0)
            assert chunk.token_count <= (output.max_chunk_token_count or 64)
            assert chunk.token_count or chunk.text, "a chunk of nothing is not sent"
            at += chunk.token_count
        total += wanted.token_count
        if len(scripts) > 1:
            assert end.output_token_count == wanted.token_count
    assert (finished.usage.prompt_token_count, finished.usage.output_token_count) == (len(PROMPT), total)
    parts = [each.prompt for each in outcome.messages if each.WhichOneof("event") == "prompt"]
    is_prompt_told = output.echo_prompt or output.HasField("prompt_logprob_count")
    assert sum(part.token_count for part in parts) == (len(PROMPT) if is_prompt_told else 0)
    echoed = TOKENIZER.decode(PROMPT) if output.echo_prompt and output.content != 2 else ""
    assert "".join(part.text for part in parts) == echoed
    assert sum(len(part.logprobs) for part in parts) == (
        len(PROMPT) if output.HasField("prompt_logprob_count") else 0
    )


def borders(chunks: Sequence[pb.Chunk], sample_count: int) -> Iterator[tuple[list[int], int]]:
    """Indices to resume at after each number of chunks."""
    indices = [0] * sample_count
    yield list(indices), 0
    for cut, chunk in enumerate(chunks, start=1):
        indices[chunk.sample_index] = chunk.first_token_index + chunk.token_count + (chunk.token_count == 0)
        yield list(indices), cut


def bare(finished: pb.Finished) -> pb.Finished:
    """Without the times, which are the first reader's."""
    copy = pb.Finished()
    copy.CopyFrom(finished)
    copy.ClearField("phases")
    return copy


async def assert_resumes(
    drawn: random.Random, cluster: VirtualCluster, asked: pb.GenerateRequest, whole: Outcome, sample_count: int
) -> None:
    token = whole.started.resume_token
    everywhere = list(borders(whole.chunks, sample_count))
    for indices, cut in drawn.sample(everywhere, min(3, len(everywhere))):
        message = pb.ResumeGenerateRequest(resume_token=token, tenant=asked.tenant)
        if sample_count > 1:
            message.next_token_indices.extend(indices)
        else:
            message.next_token_index = indices[0]
        again = await cluster.call("ResumeGenerate", message)
        assert again.code is grpc.StatusCode.OK, again
        token = again.started.resume_token
        for index in range(sample_count):
            rest = [chunk for chunk in whole.chunks[cut:] if chunk.sample_index == index]
            assert joined(of_sample(again, index)) == joined(rest)
        assert bare(again.finished) == bare(whole.finished)
    cancel = pb.CancelGenerationRequest(resume_token=token, tenant=asked.tenant)
    assert not (await cluster.call("CancelGeneration", cancel)).messages[0].was_running


async def assert_goes_on(
    drawn: random.Random, other: VirtualCluster, asked: pb.GenerateRequest, whole: Outcome, ids: Sequence[int]
) -> None:
    """At another router, which has only what the caller brings."""
    everywhere = list(borders(whole.chunks, 1))
    (index,), cut = drawn.choice(everywhere)
    message = pb.ResumeGenerateRequest(
        resume_token=whole.started.resume_token, tenant=asked.tenant, next_token_index=index
    )
    message.continuation.request.CopyFrom(asked)
    had = sum(chunk.token_count for chunk in whole.chunks[:cut])
    if had:
        message.continuation.samples.add(ids=ids[:had])
    again = await other.call("ResumeGenerate", message)
    assert again.code is grpc.StatusCode.OK, again
    text, token_ids, _ = joined(again.chunks)
    wanted_text, wanted_ids, _ = joined(whole.chunks[cut:])
    assert (text, token_ids) == (wanted_text, wanted_ids)
    mine, theirs = bare(again.finished), bare(whole.finished)
    for each in (mine, theirs):
        each.ClearField("cumulative_logprob")  # of tokens that this router has not seen
        each.usage.ClearField("cached_prompt_token_count")
    assert mine == theirs
    cancel = pb.CancelGenerationRequest(resume_token=again.started.resume_token, tenant=asked.tenant)
    await other.call("CancelGeneration", cancel)


async def one(number: int, cluster: VirtualCluster, other: VirtualCluster) -> None:
    drawn = random.Random(number)
    sample_count, seed = drawn.choice([1, 1, 1, 2, 3]), drawn.randrange(1000)
    scripts = [script(drawn) for _ in range(sample_count)]
    asked = request(drawn, scripts[0], sample_count, seed)
    does_pause = drawn.random() < 0.5
    context = Context(timeout=1000, on_write=lambda _: drawn.choice([0, 0, 0.004, 0.02]) if does_pause else 0.0)
    says = {seed + index: ids for index, ids in enumerate(scripts)}
    with drawn_apart(cluster, says), drawn_apart(other, says):
        whole = await cluster.generate(asked, context=context)
        assert_as_asked(asked, scripts, whole)
        if asked.HasField("resume"):
            if sample_count == 1 and asked.output.content >= 2:
                await assert_goes_on(drawn, other, asked, whole, scripts[0])
            await assert_resumes(drawn, cluster, asked, whole, sample_count)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_what_is_asked_together_comes_as_each_alone_promises(batch: int, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            virtual_cluster(tmp_path / "one", decode_count=2) as cluster,
            virtual_cluster(tmp_path / "other", decode_count=1) as other,
        ):
            for number in range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE):
                try:
                    await one(number, cluster, other)
                except BaseException as error:
                    error.add_note(f"the request drawn with number {number}")
                    raise

    run_virtual(scenario())

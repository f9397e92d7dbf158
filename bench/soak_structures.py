"""Soak section ``structures``: does an answer that is held to a JSON schema always parse, and fit it?

Real engines, through the public API. Two hundred schemas made from numbers, greedy and drawn; then single keywords,
of which the engine may refuse some: with a typed error, or what it says must fit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from baton.errors import Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc
from bench import evidence
from bench.fleet_under_test import running_fleet
from bench.real_fleet import fleet_config
from bench.schemas import FEATURES, Schema, schema_of
from bench.soaking import SEED, model_directory, say
from router.tokenizer import Tokenizer

MAX_TOKEN_COUNT = 320
"""Enough for the largest of these schemas; so small a model would else fill the rest of its context."""
MOST_CUT_SHARE = 0.03
CONCURRENCY = 8
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """``kind``: fits, cut (by the token limit, so it cannot parse), refused, or wrong."""

    name: str
    kind: str
    detail: str = ""
    output_token_count: int = 0


def hurry(tokenizer: Tokenizer) -> list[pb.TokenBias]:
    """A model of 135 million parameters fills JSON with white space, and numbers with digits. White space alone is
    made unlikely, and what ends something likelier; what the schema permits is the engine's to say."""
    biases: dict[int, float] = {}
    for text, bias in (("}", 8.0), ('"', 6.0), ('"}', 6.0), ("]", 8.0), (",", 4.0), ('",', 4.0)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            biases[ids[0]] = bias
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode((token_id,))
        if text and not text.strip():
            biases[token_id] = -100.0
    return [pb.TokenBias(token_id=token_id, bias=bias) for token_id, bias in biases.items()]


async def ask_schema(
    stub: Any, name: str, schema: Schema, biases: Sequence[pb.TokenBias], *, seed: int | None = None
) -> Verdict:
    """Asks for an answer that fits ``schema``, and judges it. ``seed``: drawn instead of greedy."""
    sampling = pb.Sampling(
        structure=pb.StructuredOutput(json_schema=json.dumps(schema)),
        logit_bias=biases,
        temperature=0.0 if seed is None else 0.8,
        seed=seed,
    )
    messages = [pb.ChatMessage(role="user", content="Give an example as JSON.")]
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=messages),
        sampling=sampling,
        stop=pb.StopConditions(max_output_token_count=MAX_TOKEN_COUNT),
    )
    text, finished = "", None
    try:
        async for message in stub.Generate(request, timeout=TIMEOUT_S):
            if message.WhichOneof("event") == "chunk":
                text += message.chunk.text
            elif message.WhichOneof("event") == "finished":
                finished = message.finished
    except grpc.aio.AioRpcError as failed:
        error = from_rpc_error(failed)
        fields = [violation.field for violation in error.violations]
        if error.reason is Reason.INVALID_REQUEST and any(each.startswith("sampling.structure") for each in fields):
            return Verdict(name, "refused", error.violations[0].description)
        return Verdict(name, "wrong", f"{error.status.value} {error.reason.value}: {error.message}")
    assert finished is not None, "a stream that ends well has its end"
    count = finished.usage.output_token_count
    if finished.reason == pb.FINISH_REASON_MAX_OUTPUT_TOKENS:
        return Verdict(name, "cut", text[:80], count)
    return Verdict(name, *judge(text, schema), count)


def judge(text: str, schema: Schema) -> tuple[str, str]:
    """(fits or wrong, why)."""
    import jsonschema  # type: ignore[import-untyped]  # comes with vLLM, without stubs; other sections need neither

    try:
        value = json.loads(text)
    except ValueError as error:
        return "wrong", f"does not parse ({error}): {text[:200]}"
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    problem = next(validator.iter_errors(value), None)
    return ("fits", "") if problem is None else ("wrong", f"{problem.message}: {text[:200]}")


async def ask_schemas(
    stub: Any, count: int, biases: Sequence[pb.TokenBias], *, concurrency: int = CONCURRENCY, tell: bool = False
) -> list[Verdict]:
    """Every other one greedy, the rest drawn with a seed."""
    turns = asyncio.Semaphore(concurrency)
    verdicts: list[Verdict] = []

    async def one(number: int) -> None:
        async with turns:
            seed = None if number % 2 == 0 else number
            verdicts.append(await ask_schema(stub, str(number), schema_of(number, SEED), biases, seed=seed))
            if tell and len(verdicts) % 20 == 0:
                say(f"structures: {len(verdicts)} of {count}: {dict(Counter(each.kind for each in verdicts))}")

    await asyncio.gather(*(one(number) for number in range(count)))
    return verdicts


async def ask_features(stub: Any, biases: Sequence[pb.TokenBias]) -> list[Verdict]:
    return [await ask_schema(stub, name, schema, biases) for name, schema in FEATURES.items()]


def verdict_of(wrong_count: int, cut_count: int, refused_count: int) -> str:
    """Of the promise that answers always parse and fit: one that was cut does neither, though nobody is wrong."""
    if wrong_count or refused_count:
        return f"BROKEN: {wrong_count} wrong, {refused_count} refused"
    return f"{cut_count} cut by the token limit, 0 wrong" if cut_count else "kept"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schemas", type=int, default=200, help="JSON schemas that answers are held to")


async def run(options: argparse.Namespace) -> bool:
    """Structured output always parses and fits; what the engine cannot follow is refused, and never ignored."""
    model = model_directory()
    biases = hurry(Tokenizer.load(model))
    with tempfile.TemporaryDirectory() as state:
        config = fleet_config(model, Path(state), prefill_cores="[[0]]", decode_cores="[[1]]")
        async with running_fleet(config) as fleet, grpc.aio.insecure_channel(fleet.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            say(f"structures: {options.schemas} schemas, {CONCURRENCY} at a time")
            verdicts = await ask_schemas(stub, options.schemas, biases, tell=True)
            features = await ask_features(stub, biases)
    kinds = Counter(each.kind for each in verdicts)
    wrong = [each for each in (*verdicts, *features) if each.kind == "wrong"]
    most_cut = MOST_CUT_SHARE * len(verdicts)
    is_kept = not wrong and kinds["refused"] == 0 and kinds["cut"] <= most_cut and len(verdicts) == options.schemas
    for each in (*wrong, *(each for each in verdicts if each.kind != "fits")):
        say(f"structures: {each}")
    tokens = [each.output_token_count for each in verdicts]
    summary = [
        f"{len(verdicts)} schemas (nested objects, lists with bounds, enums, constants, numbers, texts with patterns "
        f"and formats, anyOf, oneOf, references, null), every other one drawn at temperature 0.8; real engines",
        f"parse and fit (jsonschema, draft 2020-12, formats checked): {kinds['fits']}; wrong: {kinds['wrong']}; cut "
        f"at {MAX_TOKEN_COUNT} tokens: {kinds['cut']}; refused: {kinds['refused']}; answers of {min(tokens)} to "
        f"{max(tokens)} tokens",
        "white space is made unlikely by a bias and ends likelier: so small a model would not come to an end; what "
        "may be said is the schema's alone",
        "single keywords, below: what the engine does not follow must be refused with INVALID_REQUEST, not ignored",
        "promise (always parses, always fits): "
        + verdict_of(len(wrong), kinds["cut"], kinds["refused"])
        + (f", more than the {most_cut:.0f} allowed: BROKEN" if kinds["cut"] > most_cut else ""),
    ]
    rows: list[Mapping[str, Any]] = [
        {"keyword": each.name, "engine": each.kind, "says": each.detail.replace("|", "\\|")} for each in features
    ]
    evidence.write("structures", "Structured output always parses", summary, rows,
                   [asdict(each) for each in (*verdicts, *features)])  # fmt: skip
    return is_kept

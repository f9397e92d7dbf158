"""``baton generate "…"``: one prompt, the answer as it streams, and the phases if asked for."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.phase_table import phase_lines
from baton.client import DEFAULT_ADDRESS, BatonClient, Chunk, Finished, Started, TokenLogprob
from baton.errors import BatonError
from baton.request import (
    ChatMessage,
    ChatPrompt,
    OutputOptions,
    Prompt,
    Sampling,
    StopConditions,
    Structure,
    StructureKind,
    TextPrompt,
)
from baton.timeline import PHASES


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate", help="generate an answer to one prompt", description="Generates an answer and streams it."
    )
    parser.add_argument("prompt", help='the prompt; "-" reads it from standard input')
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", help="continue the text as it is, instead of answering it as a chat message"
    )
    form.add_argument("--system", help="the system message of the chat")
    add_sampling_arguments(parser)
    add_mode_arguments(parser)
    parser.add_argument("--phases", action="store_true", help="print where the time went")
    parser.add_argument("--json", action="store_true", help="print one JSON object per event instead of text")
    parser.set_defaults(run=run)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``generate`` and ``chat`` share."""
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="host:port of the router (default %(default)s)")
    parser.add_argument("--model", default="", help="model to ask for (default: the only one served)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: the context)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of this mass",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: all")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop tokens below this fraction of the likeliest"
    )
    parser.add_argument("--seed", type=int, help="makes a drawn answer reproducible")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop sequence; may be repeated")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds per answer (%(default)s)")


def add_mode_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``generate`` has beyond ``chat``."""
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N", help="fewest tokens to generate")
    parser.add_argument(
        "--stop-token-id", type=int, action="append", default=[], metavar="ID", help="stop token; may be repeated"
    )
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="off tokens the answer has; -2 to 2"
    )
    parser.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="the same per occurrence; -2 to 2"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divides the logits of tokens of prompt and answer; 0.01 to 100, 1 is none",
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="print each token's logprob and the N likeliest at its place (0 to 20)",
    )
    parser.add_argument("--tenant", default="", help="share cached prefixes within this tenant only")
    structure = parser.add_mutually_exclusive_group()
    structure.add_argument("--json-schema", metavar="FILE", help="the answer matches this JSON schema")
    structure.add_argument("--json-object", action="store_true", help="the answer is a JSON object")
    structure.add_argument("--regex", metavar="RE", help="the answer matches this regular expression")
    structure.add_argument(
        "--choice", action="append", default=[], metavar="TEXT", help="the answer is one of these; may be repeated"
    )
    structure.add_argument("--grammar", metavar="FILE", help="the answer matches this grammar (EBNF)")


def modes_of(arguments: argparse.Namespace) -> tuple[Sampling, StopConditions]:
    """Everything that ``generate`` was told of drawing and stopping. Raises ``OSError`` or ``ValueError`` for a file
    that cannot be read as text."""
    sampling = replace(
        sampling_of(arguments),
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        repetition_penalty=arguments.repetition_penalty,
        structure=_structure_of(arguments),
    )
    stop = replace(
        stop_of(arguments),
        min_output_token_count=arguments.min_tokens,
        stop_token_ids=tuple(arguments.stop_token_id),
    )
    return sampling, stop


def _structure_of(arguments: argparse.Namespace) -> Structure | None:
    if arguments.json_schema is not None:
        return Structure(StructureKind.JSON_SCHEMA, Path(arguments.json_schema).read_text(encoding="utf-8"))
    if arguments.json_object:
        return Structure(StructureKind.JSON_OBJECT)
    if arguments.regex is not None:
        return Structure(StructureKind.REGEX, arguments.regex)
    if arguments.choice:
        return Structure(StructureKind.CHOICE, choices=tuple(arguments.choice))
    if arguments.grammar is not None:
        return Structure(StructureKind.GRAMMAR, Path(arguments.grammar).read_text(encoding="utf-8"))
    return None


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
    )


def stop_of(arguments: argparse.Namespace) -> StopConditions:
    return StopConditions(max_output_token_count=arguments.max_tokens, stop_sequences=tuple(arguments.stop))


def run(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt: Prompt
    if arguments.raw:
        prompt = TextPrompt(text)
    else:
        system = [ChatMessage("system", arguments.system)] if arguments.system is not None else []
        prompt = ChatPrompt((*system, ChatMessage("user", text)))
    try:
        with event_loop.runner() as runner:
            return runner.run(_generate(arguments, prompt))
    except BatonError as error:
        return exits.report(error, arguments.address)
    except (OSError, ValueError) as error:  # a file that cannot be read, a number that no message can carry
        print(f"baton: {error}", file=sys.stderr)
        return exits.USAGE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exits.INTERRUPTED


async def _generate(arguments: argparse.Namespace, prompt: Prompt) -> int:
    sampling, stop = modes_of(arguments)
    wants_table = arguments.logprobs is not None and not arguments.json
    tokens: list[tuple[str, TokenLogprob]] = []
    loop = asyncio.get_running_loop()
    async with BatonClient(arguments.address) as client:
        began_at = loop.time()
        events = client.generate(
            prompt,
            timeout=arguments.timeout,
            model=arguments.model,
            sampling=sampling,
            stop=stop,
            output=OutputOptions(
                wants_token_ids=arguments.json,
                # One token a chunk: then a chunk's text is its token's.
                max_chunk_token_count=1 if wants_table else OutputOptions().max_chunk_token_count,
                top_logprob_count=arguments.logprobs,
            ),
            tenant=arguments.tenant,
        )
        async with aclosing(events):
            async for event in events:
                if arguments.json:
                    print(json.dumps(event_as_json(event), ensure_ascii=False), flush=True)
                    continue
                match event:
                    case Chunk():
                        print(event.text, end="", flush=True)
                        tokens.extend((event.text, each) for each in event.logprobs)
                    case Finished():
                        print()
                        if wants_table:
                            print()
                            print("\n".join(logprob_lines(tokens, event.cumulative_logprob)))
                        if arguments.phases:
                            print()
                            print("\n".join(phase_lines(event, loop.time() - began_at)))
    return exits.OK


def logprob_lines(tokens: Sequence[tuple[str, TokenLogprob]], cumulative: float | None) -> list[str]:
    """A table, one line per token. Text that a token completed stands beside it; it is quoted, since most tokens
    begin with a space."""
    has_top = any(each.top for _, each in tokens)
    lines = [f"{'':>5} {'id':>7} {'logprob':>9} {'rank':>6}  text{'  likeliest (id logprob)' if has_top else ''}"]
    for index, (text, each) in enumerate(tokens):
        top = "  " + ", ".join(f"{token_id} {logprob:.3f}" for token_id, logprob in each.top) if has_top else ""
        lines.append(f"{index:>5} {each.token_id:>7} {each.logprob:>9.4f} {each.rank:>6}  {json.dumps(text)}{top}")
    if cumulative is not None:
        lines.append(f"{'sum':>5} {'':>7} {cumulative:>9.4f}")
    return lines


def event_as_json(event: Started | Chunk | Finished) -> dict[str, Any]:
    match event:
        case Started():
            return {
                "event": "started",
                "generation_id": event.generation_id,
                "model": event.model,
                "prompt_token_count": event.prompt_token_count,
            }
        case Chunk():
            return {
                "event": "chunk",
                "first_token_index": event.first_token_index,
                "text": event.text,
                "token_ids": list(event.token_ids),
                "token_count": event.token_count,
                "logprobs": [
                    {"token_id": each.token_id, "logprob": each.logprob, "rank": each.rank, "top": list(each.top)}
                    for each in event.logprobs
                ],
            }
        case Finished():
            phases, transfer = event.phases, event.phases.transfer
            return {
                "event": "finished",
                "reason": event.reason.value if event.reason else None,
                "matched_stop_sequence": event.matched_stop_sequence,
                "matched_stop_token_id": event.matched_stop_token_id,
                "cumulative_logprob": event.cumulative_logprob,
                "usage": {
                    "prompt_token_count": event.usage.prompt_token_count,
                    "output_token_count": event.usage.output_token_count,
                    "cached_prompt_token_count": event.usage.cached_prompt_token_count,
                },
                "phases": {
                    **{f"{phase.value}_s": phases[phase] for phase in PHASES},
                    "total_s": phases.total_s,
                    "time_to_first_token_s": phases.time_to_first_token_s,
                    "kv_transfer_bytes": transfer.kv_bytes,
                    "kv_descriptor_count": transfer.descriptor_count,
                    "kv_pull_count": transfer.pull_count,
                    "kv_post_s": transfer.post_s,
                    "kv_wire_s": transfer.wire_s,
                    "kv_verify_s": transfer.verify_s,
                    "kv_wire_bytes_per_s": transfer.wire_bytes_per_s,
                    "handover": phases.handover.value if phases.handover else None,
                    "prefill_worker_id": phases.prefill_worker_id,
                    "decode_worker_id": phases.decode_worker_id,
                    "attempt_count": phases.attempt_count,
                    "placement_mode": phases.placement_mode.value if phases.placement_mode else None,
                    "placement_reason": phases.placement_reason,
                    "recomputed_token_count": transfer.recomputed_token_count,
                    "recompute_reason": transfer.recompute_reason.value if transfer.recompute_reason else None,
                },
            }

"""``baton generate "…"``: one prompt, the answer as it streams, and the phases if asked for."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from contextlib import aclosing
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.phase_table import phase_lines
from baton.client import DEFAULT_ADDRESS, BatonClient, Chunk, Finished, Started
from baton.errors import BatonError
from baton.request import ChatMessage, ChatPrompt, OutputOptions, Prompt, Sampling, StopConditions, TextPrompt
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
    except ValueError as error:  # a number that no message can carry
        print(f"baton: {error}", file=sys.stderr)
        return exits.USAGE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exits.INTERRUPTED


async def _generate(arguments: argparse.Namespace, prompt: Prompt) -> int:
    loop = asyncio.get_running_loop()
    async with BatonClient(arguments.address) as client:
        began_at = loop.time()
        events = client.generate(
            prompt,
            timeout=arguments.timeout,
            model=arguments.model,
            sampling=sampling_of(arguments),
            stop=stop_of(arguments),
            output=OutputOptions(wants_token_ids=arguments.json),
        )
        async with aclosing(events):
            async for event in events:
                if arguments.json:
                    print(json.dumps(event_as_json(event), ensure_ascii=False), flush=True)
                    continue
                match event:
                    case Chunk():
                        print(event.text, end="", flush=True)
                    case Finished():
                        print()
                        if arguments.phases:
                            print()
                            print("\n".join(phase_lines(event, loop.time() - began_at)))
    return exits.OK


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
            }
        case Finished():
            phases = event.phases
            return {
                "event": "finished",
                "reason": event.reason.value if event.reason else None,
                "matched_stop_sequence": event.matched_stop_sequence,
                "matched_stop_token_id": event.matched_stop_token_id,
                "usage": {
                    "prompt_token_count": event.usage.prompt_token_count,
                    "output_token_count": event.usage.output_token_count,
                    "cached_prompt_token_count": event.usage.cached_prompt_token_count,
                },
                "phases": {
                    **{f"{phase.value}_s": phases[phase] for phase in PHASES},
                    "total_s": phases.total_s,
                    "time_to_first_token_s": phases.time_to_first_token_s,
                    "kv_transfer_bytes": phases.kv_transfer_bytes,
                    "prefill_worker_id": phases.prefill_worker_id,
                    "decode_worker_id": phases.decode_worker_id,
                    "attempt_count": phases.attempt_count,
                    "placement_mode": phases.placement_mode.value if phases.placement_mode else None,
                    "placement_reason": phases.placement_reason,
                    "recomputed_token_count": phases.recomputed_token_count,
                },
            }

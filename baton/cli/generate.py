"""``baton generate "…"``: one prompt, the answer as it streams. The answer goes to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.arguments import (
    add_generation_arguments,
    add_json_argument,
    client_of,
    options_of,
    prompt_of,
    timeout_of,
)
from baton.cli.json_lines import event_as_json, json_line
from baton.cli.phase_table import phase_lines
from baton.client import Chunk, Event, Finished, PromptPart, TokenLogprob
from baton.errors import BatonError
from baton.request import OutputOptions, ToolCall


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="generate an answer to one prompt",
        description="Generates an answer and streams it to stdout; all else goes to stderr.",
    )
    parser.add_argument("prompt", help='the prompt; "-" reads it from standard input')
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--raw", action="store_true", help="continue the text as it is, instead of answering it as a chat message"
    )
    form.add_argument("--token-ids", action="store_true", help="the prompt is token ids, as 5,17,42")
    form.add_argument("--system", help="the system message of the chat")
    add_generation_arguments(parser)
    shown = parser.add_argument_group("what is printed")
    shown.add_argument("--samples", type=int, default=1, metavar="N", help="draw N answers, 1 to 16")
    shown.add_argument(
        "--echo", action="store_true", help="print the prompt as the model read it, ahead of the answer"
    )
    shown.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="print each token's logprob and the N likeliest at its place (0 to 20)",
    )
    shown.add_argument("--prompt-logprobs", type=int, metavar="N", help="the same of the prompt's tokens")
    shown.add_argument("--phases", action="store_true", help="print where the time went")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
        with event_loop.runner() as runner:
            return runner.run(_generate(arguments, text))
    except BatonError as error:
        return exits.report(error, arguments.address, as_json=arguments.json)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        return exits.usage(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exits.INTERRUPTED


def output_of(arguments: argparse.Namespace) -> OutputOptions:
    """What is asked for, for what is printed."""
    # One token a chunk: then a chunk's text is its token's.
    wants_table = arguments.logprobs is not None and not arguments.json
    return OutputOptions(
        wants_token_ids=arguments.json,
        max_chunk_token_count=1 if wants_table else OutputOptions().max_chunk_token_count,
        top_logprob_count=arguments.logprobs,
        echo_prompt=arguments.echo,
        prompt_logprob_count=arguments.prompt_logprobs,
    )


async def _generate(arguments: argparse.Namespace, text: str) -> int:
    timeout_s, prompt = timeout_of(arguments), prompt_of(arguments, text)
    options = options_of(arguments, output=output_of(arguments), sample_count=arguments.samples)
    printer = Printer(is_several=arguments.samples > 1)
    loop = asyncio.get_running_loop()
    async with client_of(arguments) as client:
        began_at = loop.time()
        async with aclosing(client.generate(prompt, timeout=timeout_s, **options)) as events:
            async for event in events:
                if arguments.json:
                    print(json_line(event_as_json(event)), flush=True)
                    continue
                printer.take(event)
                if isinstance(event, Finished):
                    lines = printer.logprob_lines(event)
                    if arguments.phases:
                        lines += ["", *phase_lines(event, loop.time() - began_at)]
                    if lines:
                        print("\n".join(lines), file=sys.stderr)
    return exits.OK


class Printer:
    """Prints an answer as it comes: text and tool calls to stdout, thinking to stderr. Of several samples the first
    streams, and the others, kept until then, follow it, each under its number."""

    def __init__(self, *, is_several: bool = False) -> None:
        self._is_several = is_several
        self._later: dict[int, list[str]] = {}
        self._tokens: dict[int, list[tuple[str, TokenLogprob]]] = {}
        self._prompt: list[tuple[str, TokenLogprob]] = []
        self._has_begun = False
        self._is_thinking = False

    def take(self, event: Event) -> None:
        match event:
            case PromptPart():
                print(event.text, end="", flush=True)
                self._prompt.extend(("", each) for each in event.logprobs)
            case Chunk():
                self._chunk(event)
            case Finished():
                self._end(event)

    def _chunk(self, chunk: Chunk) -> None:
        self._tokens.setdefault(chunk.sample_index, []).extend((chunk.text, each) for each in chunk.logprobs)
        if chunk.sample_index > 0:
            self._later.setdefault(chunk.sample_index, []).append(chunk.text)
            return
        if self._is_several and not self._has_begun:
            print(_heading(0))
        self._has_begun = True
        if chunk.reasoning_text:
            self._is_thinking = True
            print(chunk.reasoning_text, end="", file=sys.stderr, flush=True)
        if chunk.text:
            if self._is_thinking:
                self._is_thinking = False
                print(file=sys.stderr, flush=True)
            print(chunk.text, end="", flush=True)

    def _end(self, finished: Finished) -> None:
        if self._is_thinking:
            print(file=sys.stderr, flush=True)
        print(flush=True)
        print_calls(finished.tool_calls)
        for sample in finished.samples[1:]:
            print(_heading(sample.sample_index))
            print("".join(self._later.get(sample.sample_index, ())))
            print_calls(sample.tool_calls)

    def logprob_lines(self, finished: Finished) -> list[str]:
        """A table of the prompt's tokens and of each sample's, as far as they were asked for."""
        lines = ["prompt", *logprob_lines(self._prompt, None)] if self._prompt else []
        sums = {sample.sample_index: sample.cumulative_logprob for sample in finished.samples}
        for index, tokens in sorted(self._tokens.items()):
            if tokens:
                lines += [_heading(index)] if self._is_several else []
                lines += logprob_lines(tokens, sums.get(index, finished.cumulative_logprob))
        return lines


def print_calls(calls: Sequence[ToolCall]) -> None:
    """A call is the answer, too: one JSON object a line."""
    for call in calls:
        print(json_line({"tool_call": {"id": call.id, "name": call.name, "arguments_json": call.arguments_json}}))


def _heading(sample_index: int) -> str:
    return f"--- sample {sample_index}"


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

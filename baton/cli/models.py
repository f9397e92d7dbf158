"""``baton models``: what is served, and what requests may ask of it."""

from __future__ import annotations

import argparse
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.arguments import add_connection_arguments, add_json_argument, client_of, timeout_of
from baton.cli.json_lines import json_line, model_as_json
from baton.errors import BatonError
from baton.models import Model


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="list the served models, their limits and what they can do")
    parser.add_argument("name", nargs="?", default="", help="this one alone (default: all)")
    add_connection_arguments(parser, timeout_s=10.0)
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        with event_loop.runner() as runner:
            models = runner.run(_models(arguments))
    except BatonError as error:
        return exits.report(error, arguments.address, as_json=arguments.json)
    except (OSError, ValueError) as error:
        return exits.usage(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    for model in models:
        print(json_line(model_as_json(model)) if arguments.json else "\n".join(model_lines(model)))
    return exits.OK


async def _models(arguments: argparse.Namespace) -> tuple[Model, ...]:
    timeout_s = timeout_of(arguments)
    async with client_of(arguments) as client:
        if arguments.name:
            return (await client.get_model(arguments.name, timeout=timeout_s),)
        return await client.list_models(timeout=timeout_s)


def model_lines(model: Model) -> list[str]:
    """Lines without line ends; the name first and alone, so that ``head -1`` is one."""
    can = model.capabilities
    chat = "no chat template" if not can.has_chat else "chat"
    tools = f", tools ({can.tool_parser})" if can.has_tools else ""
    thinking = f", thinking ({can.reasoning_parser})" if can.reasoning_parser else ""
    resume = ", resume" if can.has_resume else ""
    lines = [
        model.name,
        f"  context          {model.max_context_token_count} tokens, prompt and answer",
        f"  vocabulary       {model.vocab_size} tokens, {len(model.special_tokens)} of them special",
        f"  ends at          {', '.join(map(str, model.end_token_ids)) or 'no token of its own'}",
        f"  can              {chat}{tools}{thinking}{resume}",
        f"  most             {can.max_sample_count} samples, {can.max_top_logprob_count} logprobs a token",
    ]
    if can.template_argument_names:
        lines.append(f"  template takes   {', '.join(can.template_argument_names)}")
    return lines

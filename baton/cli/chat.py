"""``baton chat``: a conversation in the terminal. Ctrl-C cancels the answer and not the program, Ctrl-D leaves."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from contextlib import aclosing
from typing import Any

from baton import event_loop
from baton.cli import exits
from baton.cli.arguments import (
    add_generation_arguments,
    add_json_argument,
    client_of,
    conversation_of,
    options_of,
    timeout_of,
)
from baton.cli.generate import Printer
from baton.cli.json_lines import event_as_json, json_line
from baton.cli.phase_table import phase_lines, summary_line
from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError, Reason
from baton.events import AnswerBuilder
from baton.request import ChatMessage

_HELP = "Ctrl-C cancels an answer, Ctrl-D leaves, /clear forgets the conversation."


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="chat in the terminal",
        description=f"Chats in the terminal, or answers each line of a file. {_HELP} Answers go to stdout, all else "
        "to stderr.",
    )
    add_generation_arguments(parser)
    parser.add_argument("--system", help="the system message")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--phases", action="store_true", help="print the table of phases after each answer")
    shown.add_argument("--quiet", action="store_true", help="print nothing of tokens and times")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_HELP, file=sys.stderr)
    # One Runner for the whole chat: its loop owns the channel, and each run turns Ctrl-C into a cancellation.
    with event_loop.runner() as runner:
        try:
            chat = Chat(arguments, runner.run(_client(arguments)))
        except (OSError, ValueError) as error:
            return exits.usage(error)
        try:
            return _converse(chat, runner, is_terminal)
        finally:
            runner.run(chat.client.close())


def _converse(chat: Chat, runner: asyncio.Runner, is_terminal: bool) -> int:
    code = exits.OK
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return code
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            continue
        if not line:
            continue
        if line == "/clear":
            chat.clear()
            continue
        try:
            runner.run(chat.answer(line))
        except KeyboardInterrupt:
            print("\n(cancelled)", file=sys.stderr)
        except BatonError as error:
            code = exits.report(error, chat.client.address, as_json=chat.is_json)
            if error.reason is Reason.PROMPT_TOO_LONG:
                print("baton: the conversation is too long; /clear forgets it", file=sys.stderr)
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:  # a file that is gone, or a line that is not text
            code = exits.usage(error)


class Chat:
    """The conversation so far. A message whose answer failed is forgotten; a cancelled answer is kept as far as it
    came, since that is what the reader has seen."""

    def __init__(self, arguments: argparse.Namespace, client: BatonClient) -> None:
        self.client = client
        self.is_json = bool(arguments.json)
        self._arguments = arguments
        self.messages: list[ChatMessage] = []
        self.clear()

    def clear(self) -> None:
        system = self._arguments.system
        self.messages = [ChatMessage("system", system)] if system is not None else []

    async def answer(self, text: str) -> None:
        """Prints the answer as it streams. Raises ``BatonError``; cancel it to cancel the answer."""
        arguments = self._arguments
        conversation = [*self.messages, ChatMessage("user", text)]
        prompt, options = conversation_of(arguments, conversation), options_of(arguments)
        printer, builder, said = Printer(), AnswerBuilder(), [""]
        answered: ChatMessage | None = None
        try:
            async with aclosing(self.client.generate(prompt, timeout=timeout_of(arguments), **options)) as events:
                async for event in events:
                    builder.add(event)
                    if isinstance(event, Chunk):
                        said.append(event.text)
                    if self.is_json:
                        print(json_line(event_as_json(event)), flush=True)
                    else:
                        printer.take(event)
                    if isinstance(event, Finished):
                        answered = builder.answer().message()
                        self._print_times(event)
        except asyncio.CancelledError:
            if half := "".join(said):
                answered = ChatMessage("assistant", half)
            raise
        finally:
            if answered is not None:
                self.messages = [*conversation, answered]

    def _print_times(self, finished: Finished) -> None:
        if self._arguments.phases:
            print("\n".join(phase_lines(finished)), file=sys.stderr)
        elif not self._arguments.quiet and not self.is_json:
            print(summary_line(finished), file=sys.stderr)


async def _client(arguments: argparse.Namespace) -> BatonClient:
    return client_of(arguments)

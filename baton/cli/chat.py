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
from baton.cli.generate import add_sampling_arguments, sampling_of, stop_of
from baton.cli.phase_table import phase_lines
from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError, Reason
from baton.request import ChatMessage

_HELP = "Ctrl-C cancels an answer, Ctrl-D leaves, /clear forgets the conversation."


def add_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="chat in the terminal", description=f"Chats in the terminal. {_HELP}")
    add_sampling_arguments(parser)
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--phases", action="store_true", help="print where the time went after each answer")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(_HELP, file=sys.stderr)
    # One Runner for the whole chat: its loop owns the channel, and each run turns Ctrl-C into a cancellation.
    with event_loop.runner() as runner:
        chat = Chat(arguments, runner.run(_client(arguments.address)))
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
            code = exits.report(error, chat.client.address)
            if error.reason is Reason.PROMPT_TOO_LONG:
                print("baton: the conversation is too long; /clear forgets it", file=sys.stderr)
        except ValueError as error:  # a number that no message can carry, or a line that is not text
            code = exits.USAGE
            print(f"baton: {error}", file=sys.stderr)


class Chat:
    """The conversation so far. A message whose answer failed is forgotten; a cancelled answer is kept as far as it
    came, since that is what the reader has seen."""

    def __init__(self, arguments: argparse.Namespace, client: BatonClient) -> None:
        self.client = client
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
        said: list[str] = []
        is_kept = False
        try:
            events = self.client.chat(
                conversation,
                timeout=arguments.timeout,
                model=arguments.model,
                sampling=sampling_of(arguments),
                stop=stop_of(arguments),
            )
            async with aclosing(events):
                async for event in events:
                    match event:
                        case Chunk():
                            said.append(event.text)
                            print(event.text, end="", flush=True)
                        case Finished():
                            is_kept = True
                            print()
                            if arguments.phases:
                                print("\n".join(phase_lines(event)))
        except asyncio.CancelledError:
            is_kept = bool("".join(said))
            raise
        finally:
            if is_kept:
                self.messages = [*conversation, ChatMessage("assistant", "".join(said))]


async def _client(address: str) -> BatonClient:
    return BatonClient(address)

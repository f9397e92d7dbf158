"""The process that parses answers: vLLM's own parsers of tool calls and of thinking, away from the event loop.

    python -m router.chats.parser_process MODEL_DIR TOOL_PARSER REASONING_PARSER      (empty: none)

Reads frames (parser_frames.py) from standard input and answers on standard output; ends when its input does, when its
router dies, or when it has grown beyond its bound. Owns the state of the streams that are open; knows no request.
Text is fed to the parsers token by token, however it came: what they say after a token then depends on the tokens
alone, so that an answer which another router goes on with is parsed the same.

    {"op": "open",   "stream": 7, "tools": [..], "choice": .., "prompt": "<ids>", ..}     no answer
    {"op": "push",   "stream": 7, "turn": 1, "texts": [..], "ids": [..]} -> {"stream": 7, "turn": 1, "text": .., ..}
    {"op": "finish", "stream": 7, "turn": 2, "text": ".."}  -> the same, with "whole": [[name, arguments]]
    {"op": "close",  "stream": 7}                                          no answer
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from router.chats.parser_frames import HEADER_BYTES, body_length, frame, message_of, unpacked_ids

PARENT_VARIABLE = "BATON_PARSER_PARENT_PID"
MAX_STREAM_COUNT = 8192
MAX_STREAM_CHARS = 16 * 1024 * 1024
MAX_GROWTH_BYTES = 1024**3
"""Beyond what it had when it was ready: it then ends, and is started again."""
GROWN = 3
"""Exit status of a process that has grown too large."""

_FRAMES_BETWEEN_LOOKS = 1000
_PR_SET_PDEATHSIG = 1


class Parsers:
    """vLLM's parsers for one model. Made once; what it makes is used for one answer."""

    def __init__(self, model_dir: str, tool_parser: str, reasoning_parser: str) -> None:
        """Raises whatever vLLM raises for a parser it does not have or that does not suit the tokenizer."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser.abstract_parser import DelegatingParser
        from vllm.parser.parser_manager import ParserManager
        from vllm.tokenizers import get_tokenizer
        from vllm.tool_parsers import ToolParser

        class JsonCalls(DelegatingParser):  # type: ignore[misc]
            """Of an answer that was held to the tools' schemas: JSON, whatever the model's own way of calling is."""

            tool_parser_cls = ToolParser

        self.tokenizer = get_tokenizer(model_dir, trust_remote_code=False)
        self._request_class = ChatCompletionRequest
        self._required_class: Any = JsonCalls
        self._classes: dict[tuple[bool, bool], Any] = {}
        for uses_tools in {False, bool(tool_parser)}:
            for uses_reasoning in {False, bool(reasoning_parser)}:
                if uses_tools or uses_reasoning:
                    self._classes[uses_tools, uses_reasoning] = ParserManager.get_parser(
                        tool_parser_name=tool_parser if uses_tools else None,
                        reasoning_parser_name=reasoning_parser if uses_reasoning else None,
                        enable_auto_tools=True,
                        tokenizer=self.tokenizer,
                    )
        added = self.tokenizer.get_added_vocab()
        special = set(self.tokenizer.all_special_ids)
        self.spelling = {token_id: text for text, token_id in added.items()}
        """Of added tokens."""
        self.plain_spelling = {each: text for each, text in self.spelling.items() if each not in special}
        """Of those that have text even where special tokens have none."""

    def keeps_special_tokens(self, *, uses_tools: bool, uses_reasoning: bool) -> bool:
        """Whether these parsers look for special tokens in the text, which then must have them."""
        request = self.request([_EXAMPLE] if uses_tools else [], "auto", {})
        adjusted = self.parser(request, uses_tools=uses_tools, uses_reasoning=uses_reasoning).adjust_request(request)
        return not adjusted.skip_special_tokens

    def abilities(self) -> list[dict[str, bool]]:
        return [
            {
                "uses_tools": uses_tools,
                "uses_reasoning": uses_reasoning,
                "keeps_special_tokens": self.keeps_special_tokens(
                    uses_tools=uses_tools, uses_reasoning=uses_reasoning
                ),
            }
            for uses_tools, uses_reasoning in self._classes
        ]

    def request(self, tools: Sequence[Mapping[str, Any]], choice: Any, arguments: Mapping[str, Any]) -> Any:
        """What parsers look at of a request: its tools and which of them it must call."""
        said: dict[str, Any] = {"model": "", "messages": [{"role": "user", "content": ""}]}
        if tools:
            said |= {"tools": list(tools), "tool_choice": choice}
        if arguments:
            said["chat_template_kwargs"] = dict(arguments)
        return self._request_class(**said)

    def parser(self, request: Any, *, uses_tools: bool, uses_reasoning: bool, is_required: bool = False) -> Any:
        """A fresh one. With ``is_required``: for an answer that was held to the tools' schemas."""
        kind = self._required_class if is_required else self._classes[uses_tools, uses_reasoning]
        arguments = request.chat_template_kwargs or {}
        return kind(self.tokenizer, request.tools, model_config=None, chat_template_kwargs=arguments)


class Stream:
    """One answer on its way through the parsers."""

    def __init__(self, parsers: Parsers, opening: Mapping[str, Any]) -> None:
        self._parsers = parsers
        self._uses_tools: bool = opening["uses_tools"]
        self._uses_reasoning: bool = opening["uses_reasoning"]
        self._is_required: bool = opening["is_required"]
        self._spelling = parsers.spelling if opening["keeps_special_tokens"] else parsers.plain_spelling
        self._request = parsers.request(opening["tools"], opening["choice"], opening["arguments"])
        self._parser = self._new_parser(self._uses_reasoning)
        self._request = self._parser.adjust_request(self._request)
        self._prompt_ids = unpacked_ids(opening["prompt"])
        # What came, what waits for its text, and what was said of it.
        self._text = ""
        self._ids: list[int] = []
        self._waiting_text = ""
        self._waiting_ids: list[int] = []
        self._said_text = ""
        self._said_reasoning = ""
        self._said_calls: list[list[str]] = []

    def push(self, texts: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
        """The next tokens, each with the text it completed."""
        parts = _Parts()
        for text, token_id in zip(texts, ids, strict=True):
            self._take(text, [token_id])
            if self._is_settled():
                self._parse(parts, is_last=False)
        return self._said(parts)

    def finish(self, text: str) -> dict[str, Any]:
        """The end: text that was held back, without a token. Says what is left, and the calls whole."""
        parts = _Parts()
        self._take(text, [])
        self._parse(parts, is_last=True)
        said = self._said(parts)
        reasoning, content, calls = self._whole()
        # What the streaming parse swallowed for good, such as the beginning of a call that never ended, is text.
        said["text"] += _rest(self._said_text, content)
        said["reasoning"] += _rest(self._said_reasoning, reasoning)
        said["whole"] = [self._reconciled(index, *call, said["calls"]) for index, call in enumerate(calls)]
        return said

    def _new_parser(self, uses_reasoning: bool) -> Any:
        return self._parsers.parser(
            self._request,
            uses_tools=self._uses_tools,
            uses_reasoning=uses_reasoning,
            is_required=self._is_required,
        )

    def _take(self, text: str, ids: list[int]) -> None:
        if len(self._text) + len(text) > MAX_STREAM_CHARS:
            raise OverflowError
        self._text += text
        self._ids += ids
        self._waiting_text += text
        self._waiting_ids += ids

    def _is_settled(self) -> bool:
        """Parsers look for a marker's token and for its text at once; its text may lag behind (it may begin a stop
        sequence). Such a token waits for its text."""
        return all(self._spelling[each] in self._waiting_text for each in self._waiting_ids if each in self._spelling)

    def _parse(self, parts: _Parts, *, is_last: bool) -> None:
        text, self._waiting_text = self._waiting_text, ""
        ids, self._waiting_ids = self._waiting_ids, []
        delta = self._parser.parse_delta(
            text, ids, self._request, prompt_token_ids=self._prompt_ids, finished=is_last
        )
        if delta is not None:
            parts.add(delta)

    def _said(self, parts: _Parts) -> dict[str, Any]:
        self._said_text += parts.text
        self._said_reasoning += parts.reasoning
        for index, name, arguments in parts.calls:
            while len(self._said_calls) <= index:
                self._said_calls.append(["", ""])
            self._said_calls[index][0] += name
            self._said_calls[index][1] += arguments
        return {"text": parts.text, "reasoning": parts.reasoning, "calls": parts.calls}

    def _whole(self) -> tuple[str, str, list[tuple[str, str]]]:
        """The parse of the whole answer: thinking, text, calls. A call whose arguments are no JSON object (cut off,
        or written badly) is none."""
        # Where the prompt ended the thinking already, the answer has none, and no mark of its end either.
        is_thinking = self._uses_reasoning and not self._parser.is_reasoning_end(self._prompt_ids)
        if not (self._uses_tools or self._is_required or is_thinking):
            return self._said_reasoning, self._said_text, []
        reasoning, content, calls = self._new_parser(is_thinking).parse(
            self._text, self._request, enable_auto_tools=True, model_output_token_ids=self._ids
        )
        told = [(_clean(call.name), _clean(call.arguments or "") or "{}") for call in calls or ()]
        return _clean(reasoning or ""), _clean(content or ""), [call for call in told if _object(call[1]) is not None]

    def _reconciled(self, index: int, name: str, arguments: str, calls: list[list[Any]]) -> list[str]:
        """The call as it was streamed, where that means the same; what was not streamed is added to ``calls``."""
        if index >= len(self._said_calls) or self._said_calls[index] == ["", ""]:
            calls.append([index, name, arguments])
            return [name, arguments]
        said_name, said_arguments = self._said_calls[index]
        if said_name == name and _object(said_arguments) == _object(arguments):
            return [name, said_arguments]
        if said_name == name and (rest := _rest(said_arguments, arguments)):
            calls.append([index, "", rest])
        return [name, arguments]


class _Parts:
    """What the parsers said of some tokens."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[list[Any]] = []

    def add(self, delta: Any) -> None:
        self.text += _clean(delta.content or "")
        self.reasoning += _clean(delta.reasoning or "")
        for call in delta.tool_calls or ():
            function = call.function
            name = _clean(function.name or "") if function is not None else ""
            arguments = _clean(function.arguments or "") if function is not None else ""
            if not name and not arguments:
                continue
            if self.calls and self.calls[-1][0] == call.index and not name:
                self.calls[-1][2] += arguments
            else:
                self.calls.append([call.index, name, arguments])


_EXAMPLE = {"type": "function", "function": {"name": "example", "parameters": {"type": "object", "properties": {}}}}


def _rest(said: str, whole: str) -> str:
    return whole[len(said) :] if whole.startswith(said) else ""


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _clean(text: str) -> str:
    """A model may write half a surrogate pair into JSON; it is no character, and protobuf takes none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Desk:
    """The open streams, by number."""

    def __init__(self, parsers: Parsers) -> None:
        self._parsers = parsers
        self._streams: dict[int, Stream | str] = {}
        """A stream that could not be opened or went wrong is the name of why: text never reaches it."""

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """To one frame; None where none is expected."""
        number = message["stream"]
        match message["op"]:
            case "open":
                self._streams[number] = self._opened(message)
                return None
            case "close":
                self._streams.pop(number, None)
                return None
        told = {"stream": number, "turn": message["turn"]}
        stream = self._streams.get(number, "KeyError")
        if isinstance(stream, str):
            return {**told, "failed": stream}
        try:
            if message["op"] == "push":
                return {**told, **stream.push(message["texts"], message["ids"])}
            return {**told, **stream.finish(message["text"])}
        except Exception as error:  # a parser is code of somebody else, run on whatever the model says
            self._streams[number] = type(error).__name__
            return {**told, "failed": type(error).__name__}

    def _opened(self, message: Mapping[str, Any]) -> Stream | str:
        if len(self._streams) >= MAX_STREAM_COUNT:
            return "TooManyStreams"
        try:
            return Stream(self._parsers, message)
        except Exception as error:  # as above
            return type(error).__name__


def frames(source: BinaryIO) -> Iterator[dict[str, Any]]:
    while header := source.read(HEADER_BYTES):
        yield message_of(source.read(body_length(header)))


def serve(source: BinaryIO, write: Callable[[bytes], object], parsers: Parsers) -> int:
    """Until the input ends. Returns the exit status."""
    desk = Desk(parsers)
    most = _resident_bytes() + MAX_GROWTH_BYTES
    write(frame({"ready": parsers.abilities()}))
    for count, message in enumerate(frames(source), start=1):
        reply = desk.answer(message)
        if reply is not None:
            write(frame(reply))
        if count % _FRAMES_BETWEEN_LOOKS == 0 and _resident_bytes() > most:
            return GROWN
    return 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _die_with_parent() -> None:
    """The kernel ends this process with its router, even while a parser is at work."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it died before the call above: then no signal will ever come
            os._exit(1)


def main(arguments: Sequence[str]) -> int:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in a terminal is the router's to hear
    model_dir, tool_parser, reasoning_parser = arguments
    # What libraries print must not come between the frames.
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(answers, data) :]

    try:
        parsers = Parsers(model_dir, tool_parser, reasoning_parser)
    except Exception as error:
        write(frame({"failed": f"{type(error).__name__}: {error}"}))
        return 1
    logging.disable(logging.CRITICAL)  # parsers log what they could not read: words of an answer
    with contextlib.suppress(BrokenPipeError):
        return serve(sys.stdin.buffer, write, parsers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

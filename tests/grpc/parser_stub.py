"""Stands in for ``router.chats.parser_process`` where a test is about the process and not about what parsers say.

Speaks the same frames. Every text comes back in capitals. What an answer says so far, and nothing else, does more:
"die" ends the process, "hang" keeps it busy, "fail" is a parser that raises, "noise" is answered with what is no
frame. The name of the tool parser says how it starts: "never" does not, "broken" says why not, "mute" ends without a
word.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from router.chats.parser_frames import frame
from router.chats.parser_process import frames

READY = [
    {"uses_tools": tools, "uses_reasoning": reasoning, "keeps_special_tokens": tools}
    for tools, reasoning in ((True, False), (False, True), (True, True))
]


def main(model_dir: str, tool_parser: str, reasoning_parser: str) -> None:
    if tool_parser == "never":
        time.sleep(600)
    if tool_parser == "mute":
        sys.exit(7)
    if tool_parser == "broken":
        say({"failed": "KeyError: no such parser"})
        return
    say({"ready": READY})
    so_far: dict[int, str] = {}
    for message in frames(sys.stdin.buffer):
        if message["op"] in ("open", "close"):
            so_far.pop(message["stream"], None)
            continue
        text = "".join(message["texts"]) if message["op"] == "push" else message["text"]
        told: dict[str, Any] = {"stream": message["stream"], "turn": message["turn"]}
        so_far[message["stream"]] = so_far.get(message["stream"], "") + text
        match so_far[message["stream"]]:
            case "die":
                os._exit(9)
            case "hang":
                time.sleep(600)
            case "noise":
                sys.stdout.buffer.write(b"\xff\xff\xff\xff")
                sys.stdout.buffer.flush()
            case "fail":
                say({**told, "failed": "IndexError"})
            case "environment":
                say({**told, "text": ",".join(sorted(os.environ)), "reasoning": "", "calls": []})
            case _:
                say({**told, "text": text.upper(), "reasoning": "", "calls": [], "whole": [["f", "{}"]]})


def say(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(frame(message))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The readers of ``bench.open_streams``, one process: many streams over a few connections, each checked: no token
missing or twice, and at the end the whole text, which depends on every token of it.

Every tenth stream or so is on a connection whose calls have windows of a few bytes, given anew for what was read.
Told to stall, those get no room any more: once their windows are full, no byte can be sent to them.

One JSON line on standard input is a command, answered by one JSON line. Times are CLOCK_MONOTONIC's, of the moment at
which the bytes were in hand.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
import time
from array import array
from typing import Any

from baton.v1 import generation_pb2 as pb
from bench.http2_reader import Connection
from engine.sim_tokens import TokenRule, simulated_answer
from router.tiny_model import tiny_tokenizer

STALLER_HEADER = "bench-staller"
"""On the calls that may stall: see ``bench.open_streams_router``."""
GENERATE = "/baton.v1.GenerationService/Generate"
CONNECTION_STREAM_COUNT = 500
WINDOW_BYTES = 1 << 20
"""Of a reader's call: more than its whole answer."""
SMALL_WINDOW_BYTES = 64
"""Of a call that stalls when told to: a message or two."""
PROMPT_COUNT = 16
PROMPT_TOKEN_COUNT = 32
RECEIVE_BYTES = 1 << 18
MOST_KNOWN = 200_000


class Stream:
    """One call. ``wrong`` says what was not as it should be."""

    __slots__ = ("count", "is_finished", "last_at", "letter_count", "message_count", "prompt", "stalls", "wrong")

    def __init__(self, prompt: int, *, stalls: bool) -> None:
        self.prompt = prompt
        self.stalls = stalls
        self.count = self.message_count = self.letter_count = 0
        self.last_at = 0.0
        self.is_finished = False
        self.wrong = ""

    @property
    def is_over(self) -> bool:
        return self.is_finished or bool(self.wrong)


class Link:
    """A connection and its socket."""

    def __init__(self, readers: Readers, address: str, *, stalls: bool) -> None:
        self.stalls = stalls
        self.streams: dict[int, Stream] = {}
        self._readers = readers
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = Connection(
            address,
            window_bytes=SMALL_WINDOW_BYTES if stalls else WINDOW_BYTES,
            on_message=self._message,
            on_end=self._end,
        )

    def call(self, stream: Stream, request: bytes, timeout_s: float) -> None:
        headers = {STALLER_HEADER: "1"} if self.stalls else {}
        self.streams[self.connection.call(GENERATE, request, timeout_s=timeout_s, headers=headers)] = stream
        self.flush()

    def receive(self) -> None:
        data = self.socket.recv(RECEIVE_BYTES)
        self._readers.now = time.monotonic()
        if not data:
            raise ConnectionError("the router closed a connection")
        self.connection.feed(data)
        if self.stalls and self._readers.may_read:
            self.give_all()
        self.flush()

    def give_all(self) -> None:
        for number, byte_count in self.connection.ungiven.items():
            if byte_count:
                self.connection.give(number)

    def flush(self) -> None:
        if data := self.connection.to_send():
            self.socket.sendall(data)  # a few bytes, and the router always reads

    def full_count(self) -> int:
        """Calls that have no room for another byte."""
        return sum(byte_count == SMALL_WINDOW_BYTES for byte_count in self.connection.ungiven.values())

    def _message(self, number: int, message: bytes) -> None:
        self._readers.message(self.streams[number], message)

    def _end(self, number: int, how: str) -> None:
        stream = self.streams[number]
        if not stream.is_over:
            stream.wrong = f"{how} after {stream.count} tokens, without Finished"
        self._readers.ended(stream)


class Readers:
    def __init__(self) -> None:
        self.now = 0.0
        self.may_read = True
        self._poll = select.epoll()
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._links: dict[int, Link] = {}
        self._streams: list[Stream] = []
        self._expected: list[str] = []
        self._known: dict[bytes, tuple[int, int, str]] = {}
        """Chunks as they were parsed: (first token, how many, text). Streams of one prompt are told the same."""
        self._token_count = 0
        self._unbegun_count = self._open_count = 0
        self._is_measuring = False
        self._times = array("d")
        self._gaps = array("d")

    # Reading

    def message(self, stream: Stream, message: bytes) -> None:
        chunk = self._known.get(message)
        if chunk is None:
            event = pb.GenerateResponse.FromString(message)
            if not event.HasField("chunk"):
                if event.HasField("finished"):
                    self._finished(stream)
                return
            chunk = event.chunk.first_token_index, event.chunk.token_count, event.chunk.text
            if len(self._known) < MOST_KNOWN:
                self._known[message] = chunk
        first, count, text = chunk
        at = self.now
        if stream.count:
            if self._is_measuring and not stream.stalls:
                self._times.append(at)
                self._gaps.append(at - stream.last_at)
        else:
            self._unbegun_count -= 1
        stream.last_at = at
        stream.message_count += 1
        if first != stream.count and not stream.wrong:
            stream.wrong = f"token {stream.count} was expected and {first} came"
        stream.count += count
        if not self._expected[stream.prompt].startswith(text, stream.letter_count) and not stream.wrong:
            stream.wrong = f"the text of tokens {first} to {stream.count - 1} is not the answer's"
        stream.letter_count += len(text)

    def _finished(self, stream: Stream) -> None:
        is_whole = stream.count == self._token_count and stream.letter_count == len(self._expected[stream.prompt])
        if is_whole and not stream.wrong:
            stream.is_finished = True
        elif not stream.wrong:
            stream.wrong = f"{stream.count} tokens came, and {stream.letter_count} letters: not the answer"

    def ended(self, stream: Stream) -> None:
        self._open_count -= 1
        if not stream.count:
            self._unbegun_count -= 1

    def turn(self, timeout_s: float) -> bool:
        """Deals with what is there; whether there is a command."""
        is_told = False
        for number, _ in self._poll.poll(max(0.0, timeout_s)):
            link = self._links.get(number)
            if link is None:
                is_told = True
            else:
                link.receive()
        return is_told

    # Commands

    def open(
        self,
        address: str,
        stream_count: int,
        token_count: int,
        per_s: float,
        stalled_share: float,
        timeout_s: float,
        rule: dict[str, Any],
    ) -> dict[str, Any]:
        """Opens streams evenly, and returns when each has brought a token or failed."""
        token_rule = TokenRule(**rule)
        special, words = token_rule.special_token_count, token_rule.vocab_size - token_rule.special_token_count
        prompts = [
            [special + (7 * number + 11 * index) % words for index in range(PROMPT_TOKEN_COUNT)]
            for number in range(PROMPT_COUNT)
        ]
        self._token_count = token_count
        decode = tiny_tokenizer().decode
        self._expected = [decode(simulated_answer(p, token_count, token_rule, ignore_eos=True)) for p in prompts]
        requests = [
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=prompt),
                stop=pb.StopConditions(max_output_token_count=token_count, ignore_eos=True),
            ).SerializeToString()
            for prompt in prompts
        ]
        every = round(1 / stalled_share) if stalled_share else 0
        staller_count = stream_count // every if every else 0
        links = {
            stalls: [self._link(address, stalls=stalls) for _ in range(1 + count // CONNECTION_STREAM_COUNT)]
            for stalls, count in ((False, stream_count - staller_count), (True, staller_count))
        }
        self._streams = []
        self._known.clear()
        self._unbegun_count = self._open_count = stream_count
        began_at = time.monotonic()
        for number in range(stream_count):
            stream = Stream(number % PROMPT_COUNT, stalls=bool(every) and number % every == every - 1)
            of_kind = links[stream.stalls]
            link = of_kind[(number // every if stream.stalls else number) % len(of_kind)]
            link.call(stream, requests[stream.prompt], timeout_s)
            self._streams.append(stream)
            while (early_s := began_at + (number + 1) / per_s - time.monotonic()) > 0:
                self.turn(early_s)
        while self._unbegun_count:
            self.turn(1.0)
        return self.stats()

    def _link(self, address: str, *, stalls: bool) -> Link:
        link = Link(self, address, stalls=stalls)
        self._links[link.socket.fileno()] = link
        self._poll.register(link.socket.fileno(), select.EPOLLIN)
        return link

    def stats(self) -> dict[str, Any]:
        streams = self._streams
        return {
            "streams": len(streams),
            "stallers": sum(stream.stalls for stream in streams),
            "begun": sum(stream.count > 0 for stream in streams),
            "finished": sum(stream.is_finished for stream in streams),
            "tokens": sum(stream.count for stream in streams),
            "stalled_tokens": sum(stream.count for stream in streams if stream.stalls),
            "messages": sum(stream.message_count for stream in streams),
            "full": sum(link.full_count() for link in self._links.values() if link.stalls),
            "wrong": [stream.wrong for stream in streams if stream.wrong][:5],
            "wrong_count": sum(bool(stream.wrong) for stream in streams),
        }

    def measure(self) -> dict[str, Any]:
        """From now on the gap before each message counts."""
        self._times, self._gaps = array("d"), array("d")
        self._is_measuring = True
        return self.stats()

    def measured(self, path: str) -> dict[str, Any]:
        """The span is over. Writes the moments at which its gaps ended, then the gaps, seconds, as doubles."""
        self._is_measuring = False
        with open(path, "wb") as file:
            self._times.tofile(file)
            self._gaps.tofile(file)
        return self.stats()

    def stall(self) -> dict[str, Any]:
        self.may_read = False
        return self.stats()

    def go_on(self) -> dict[str, Any]:
        self.may_read = True
        for link in self._links.values():
            if link.stalls:
                link.give_all()
                link.flush()
        return self.stats()

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Waits until every stream has ended, says how, and closes the connections."""
        ends_at = time.monotonic() + timeout_s
        while self._open_count and time.monotonic() < ends_at:
            self.turn(1.0)
        told = self.stats()
        for link in self._links.values():
            self._poll.unregister(link.socket.fileno())
            link.socket.close()
        self._links.clear()
        return told


def serve() -> None:
    readers = Readers()
    commands = {
        each.__name__: each
        for each in (
            readers.open,
            readers.stats,
            readers.measure,
            readers.measured,
            readers.stall,
            readers.go_on,
            readers.finish,
        )
    }
    gc.freeze()
    said = b""
    while True:
        if not readers.turn(1.0):
            continue
        heard = os.read(sys.stdin.fileno(), 1 << 16)
        if not heard:
            return
        *lines, said = (said + heard).split(b"\n")
        for line in lines:
            command, *arguments = json.loads(line)
            print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    serve()

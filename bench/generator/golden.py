"""What the golden server answers, and what it notes of having answered: the script and the record. Pure.

The script says when each message of an answer is due, from the request alone. The record says when it was really
handed over. A generator is judged by the record: that a server on a busy machine is late is not the generator's
fault, and must not be able to hide one.
"""

from __future__ import annotations

import enum
import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

WORD = " the"
"""The text of every token; one token of most vocabularies, so that who counts by tokenising counts the same."""
TOKEN_ID = 260
"""The id of every token, where ids are asked for; above the special tokens of most vocabularies."""
BYTES_PER_TOKEN = 4
"""How a prompt of text is counted: there is no tokenizer here. Give token ids where the count matters."""


class Ending(enum.StrEnum):
    """How an answer ends."""

    COMPLETE = "complete"
    REFUSE = "refuse"
    """Turned away at the time of the first message, before any token (HTTP 429, gRPC RESOURCE_EXHAUSTED)."""
    ERROR = "error"
    """An error in the stream, after some tokens or none."""
    TRUNCATE = "truncate"
    """Ends as a complete answer does, but too early."""
    DISCONNECT = "disconnect"
    """The connection (HTTP) or the call (gRPC, UNAVAILABLE) breaks."""
    STALL = "stall"
    """Nothing more comes until the caller leaves."""
    SURPLUS = "surplus"
    """One token more than was asked for."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """``ending``, and for one that comes early after how many messages."""

    ending: Ending = Ending.COMPLETE
    message_count: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gets: messages due so many seconds after its receipt, then its ending."""

    due_after_s: tuple[float, ...]
    token_counts: tuple[int, ...]
    ending: Ending
    ends_after_s: float
    """When the ending itself is due, where it is not the last message's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenScript:
    """Time of message k: ``ttft_s + ttft_per_prompt_token_s * prompt tokens`` + k gaps."""

    ttft_s: float = 0.05
    ttft_per_prompt_token_s: float = 0.0
    gap_s: float = 0.01
    gap_jitter_share: float = 0.0
    """0: all gaps alike. x: each drawn evenly from gap_s * (1 - x) to gap_s * (1 + x), by seed and prompt."""
    gap_pattern: tuple[float, ...] = (1.0,)
    """Gap k is gap_s times entry k of it, repeated as a cycle: the same for every request."""
    tokens_per_message: tuple[int, ...] = (1,)
    """Repeated as a cycle."""
    seed: int = 0
    behaviours: tuple[Behaviour, ...] = (Behaviour(),)
    """A prompt of token ids gets the one that its first id names, modulo their number; a text gets the first."""

    def __post_init__(self) -> None:
        if min(self.ttft_s, self.ttft_per_prompt_token_s, self.gap_s) < 0:
            raise ValueError("times must be 0 s or more")
        if not self.gap_pattern or min(self.gap_pattern) < 0:
            raise ValueError("gap_pattern must have factors of 0 or more")
        if not 0 <= self.gap_jitter_share <= 1:
            raise ValueError("gap_jitter_share must be from 0 to 1")
        if not self.tokens_per_message or min(self.tokens_per_message) < 1 or not self.behaviours:
            raise ValueError("messages need at least one token each, and requests at least one behaviour")

    def answer(self, prompt: Sequence[int] | str, output_token_count: int) -> Answer:
        """The answer to ``prompt`` (ids or text), asked for ``output_token_count`` tokens (1 or more)."""
        behaviour = self.behaviours[0 if isinstance(prompt, str) else prompt[0] % len(self.behaviours)]
        rng = random.Random(f"{self.seed}/{prompt_digest(prompt)}")  # noqa: S311  # replayable, not secret
        wanted = output_token_count + (behaviour.ending is Ending.SURPLUS)
        at_s = self.ttft_s + self.ttft_per_prompt_token_s * prompt_token_count(prompt)
        due: list[float] = []
        counts: list[int] = []
        while wanted > 0:
            due.append(at_s)
            counts.append(min(self.tokens_per_message[len(counts) % len(self.tokens_per_message)], wanted))
            wanted -= counts[-1]
            gap_s = self.gap_s * self.gap_pattern[(len(counts) - 1) % len(self.gap_pattern)]
            at_s += gap_s * (1 + self.gap_jitter_share * (2 * rng.random() - 1))
        if behaviour.ending in (Ending.COMPLETE, Ending.SURPLUS):
            return Answer(tuple(due), tuple(counts), behaviour.ending, due[-1])
        kept = 0 if behaviour.ending is Ending.REFUSE else min(behaviour.message_count, len(due) - 1)
        return Answer(tuple(due[:kept]), tuple(counts[:kept]), behaviour.ending, due[kept])


def prompt_token_count(prompt: Sequence[int] | str) -> int:
    """Tokens of a prompt of ids; of a text, one for every ``BYTES_PER_TOKEN`` begun."""
    if isinstance(prompt, str):
        return max(1, -(-len(prompt.encode()) // BYTES_PER_TOKEN))
    return len(prompt)


def prompt_digest(prompt: Sequence[int] | str) -> str:
    """By which a record is found again; the prompt itself is kept nowhere."""
    data = prompt.encode() if isinstance(prompt, str) else array("i", prompt).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass(slots=True, kw_only=True)
class GoldenRecord:
    """What one request really got. Times are CLOCK_MONOTONIC, seconds; lists have one entry a message with tokens."""

    protocol: str
    """"http" or "grpc"."""
    prompt_digest: str
    prompt_token_count: int
    received_at_s: float
    due_at_s: list[float] = field(default_factory=list)
    sent_at_s: list[float] = field(default_factory=list)
    """Just before the message was handed to the socket (HTTP) or to gRPC: what comes after is the reader's."""
    token_counts: list[int] = field(default_factory=list)
    held_count: int = 0
    """Messages that found earlier bytes still waiting, because the reader was slow."""
    ending: str = ""
    """An ``Ending``, or "left" when the caller went first; empty while it runs."""

    @property
    def output_token_count(self) -> int:
        return sum(self.token_counts)

    @property
    def lateness_s(self) -> list[float]:
        """How late the server itself was with each message: its own fault, or the machine's."""
        return [sent - due for due, sent in zip(self.due_at_s, self.sent_at_s, strict=True)]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GoldenRecord:
        return cls(**fields)

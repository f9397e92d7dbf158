"""The micro harness of the transfer figures: pairs of processes, one per path, that take turns on two cores.

All pairs live through the whole section, so that every round is a fair comparison; those whose turn it is not are
stopped (SIGSTOP), so that a thread that spins in one cannot slow another. Yields records; never aggregates.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.children import Child, ChildError
from bench.kv_pair import BLOCK_BYTES, BLOCK_TOKEN_COUNT, POOL_BYTES
from bench.real_fleet import free_ports
from engine.environment import preloads
from kvtransfer.side_channel import KEY_VARIABLE

BLOCK_COUNTS = {BLOCK_TOKEN_COUNT: (1, 2, 16, 32), 32: (1, 6)}
"""By tokens of a block: 2.8, 5.6, 45 and 90 MiB in the default's; 0.7 and 4.2 MiB in smaller ones, because less than
a block never moves."""
LAYOUTS = ("adjacent", "descending", "scattered")
"""Block ids as a fresh pool gives them out; as pools do that got them back, from the last to the first; and at
random, as the worst case of old ones. Every read is from and to another part of the pools, raw NIXL's too: what is
read again and again would come out of the caches."""
MEMCPY = "memcpy"
RAW_DESCRIPTOR_BYTES = (96 * 1024, 256 * 1024, 1 << 20, 4 << 20, 1 << 30)
READY_DEADLINE_S = 600.0
ANSWER_DEADLINE_S = 180.0
IDLE_S = 2.0
HANDOFF_S = 0.004
"""Between a prefill's end and the decode's order, through a router: the holder digests meanwhile."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an end of a pair lives."""

    host: str = "127.0.0.1"
    command: tuple[str, ...] = ()
    """In front of the end's own."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Goes over the rest."""


HERE = (Place(), Place())


class Pair:
    """A holder on the first core and a reader on the second, of one path."""

    def __init__(
        self,
        path: str,
        model: Path,
        cores: Sequence[int],
        logs: Path,
        places: Sequence[Place] = HERE,
        module: str = "bench.kv_pair",
        block_token_count: int = BLOCK_TOKEN_COUNT,
    ) -> None:
        self.path = path
        self.block_token_count = block_token_count
        self.block_bytes = BLOCK_BYTES * block_token_count // BLOCK_TOKEN_COUNT
        self.children: dict[str, Child] = {}
        self._files: dict[str, TextIO] = {}
        self._sockets = ExitStack()
        self._folder = self._sockets.enter_context(tempfile.TemporaryDirectory(prefix="pair-"))
        self._listener = self._sockets.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(f"{self._folder}/s")
        self._listener.listen()
        environment = {**_environment(), KEY_VARIABLE: secrets.token_hex(32)}  # both ends are of one cluster
        for end, core, port, place in zip(("holder", "reader"), cores, free_ports(2), places, strict=True):
            command = [*place.command, sys.executable, "-m", module, "--end", end, "--path", path]
            command += ["--socket", f"{self._folder}/s", "--model", str(model)]
            command += ["--host", place.host, "--port", str(port)]
            if block_token_count != BLOCK_TOKEN_COUNT:
                command += ["--block-tokens", str(block_token_count)]
            log_path = logs / f"pair-{path}-{end}.log"
            self.children[end] = Child(
                log_path.stem,
                command,
                environment={**environment, **place.environment},
                log_path=log_path,
                cores=[core],
            )

    def await_ready(self) -> None:
        """Both ends have joined, and shaken hands where their path needs it."""
        self._listener.settimeout(1.0)
        deadline = time.monotonic() + READY_DEADLINE_S
        while len(self._files) < 2:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                for child in self.children.values():
                    if not child.is_running() or time.monotonic() > deadline:
                        raise child.failed("did not become ready") from None
                continue
            self._sockets.enter_context(connection).settimeout(ANSWER_DEADLINE_S)
            file = connection.makefile("rw")
            self._files[file.readline().strip()] = file
        holder = self.ask("holder", "hello")
        self.ask("reader", "hello", peer=holder)

    def pin(self, cores: Sequence[int]) -> None:
        """Every thread back to its core, as ``taskset -a`` would."""
        for child, core in zip(self.children.values(), cores, strict=True):
            child.pin([core])

    def ask(self, end: str, command: str, **arguments: Any) -> dict[str, Any]:
        file = self._files[end]
        file.write(json.dumps({"command": command, **arguments}) + "\n")
        file.flush()
        answer: dict[str, Any] = json.loads(file.readline() or '{"error": "it hung up"}')
        if "error" in answer:
            raise ChildError(f"{self.path} {end}: {command}: {answer['error']}")
        return answer

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for child in self.children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        with ExitStack() as stack:
            stack.callback(self._sockets.close)
            for child in self.children.values():
                stack.callback(child.stop)


def pair_records(
    paths: Sequence[str],
    model: Path,
    cores: Sequence[int],
    logs: Path,
    *,
    round_count: int,
    seed: int,
    block_token_count: int = BLOCK_TOKEN_COUNT,
) -> Iterator[dict[str, Any]]:
    """Of one size of block. What an idle pair burns is told of the default size alone."""
    with ExitStack() as stack:
        pairs = []
        for path in paths:
            pairs.append(Pair(path, model, cores, logs, block_token_count=block_token_count))
            stack.callback(pairs[-1].stop)
        for pair in pairs:
            pair.await_ready()
            if pair.path not in ("stock-as-shipped", "raw"):
                pair.pin(cores)
        rng = random.Random(seed)  # noqa: S311 a reproducible load
        for pair in pairs:
            read_by(pair, rng, 1, "adjacent", is_checked=True)  # first contact, paid here
            pair.ask("holder", "idle")
        for pair in pairs:
            with pair.turn():
                pass
        for pair in pairs if block_token_count == BLOCK_TOKEN_COUNT else ():
            yield idle_of(pair)
        for number in range(round_count):
            # Forth and back, so that a drift of the machine hits all alike.
            for pair in pairs if number % 2 == 0 else reversed(pairs):
                with pair.turn():
                    for record in _reads(pair, rng, is_checked=number == 0):
                        yield {"record": "read", "path": pair.path, "round": number, **record}
                    pair.ask("holder", "idle")


def _reads(pair: Pair, rng: random.Random, *, is_checked: bool) -> Iterator[dict[str, Any]]:
    """One of each kind, in an order of its own each time, after one for warmth: others have used the caches."""
    kinds: list[tuple[int, str]] = []
    block_counts = BLOCK_COUNTS[pair.block_token_count]
    for block_count in block_counts:
        if pair.path == "raw":
            kinds += [(block_count, name) for name in (MEMCPY, *map(str, _raw_sizes(block_count * pair.block_bytes)))]
        else:
            kinds += [(block_count, layout) for layout in LAYOUTS]
    rng.shuffle(kinds)
    read_by(pair, rng, max(block_counts), "adjacent", is_checked=False)
    for block_count, layout in kinds:
        byte_count = block_count * pair.block_bytes
        if layout == MEMCPY:
            yield {"layout": layout, "byte_count": byte_count, **pair.ask("reader", "memcpy", byte_count=byte_count)}
        elif pair.path == "raw":
            read = read_by(pair, rng, block_count, "adjacent", is_checked=is_checked, descriptor_bytes=int(layout))
            yield {**read, "layout": layout}
        else:
            yield read_by(pair, rng, block_count, layout, is_checked=is_checked)


def _raw_sizes(byte_count: int) -> list[int]:
    return sorted({min(size, byte_count) for size in RAW_DESCRIPTOR_BYTES})


def read_by(
    pair: Pair,
    rng: random.Random,
    block_count: int,
    layout: str,
    *,
    is_checked: bool,
    descriptor_bytes: int = 1 << 20,
) -> dict[str, Any]:
    """Raises ``ChildError`` when other bytes arrived than were held."""
    request_id = f"read.{rng.getrandbits(48):x}-{rng.getrandbits(32):08x}"
    usable = range(1, POOL_BYTES // pair.block_bytes)  # block 0 is vLLM's null block
    ids = [_block_ids(usable, layout, block_count, rng) for _ in range(2)]
    byte_count = block_count * pair.block_bytes
    theirs, ours = (first[0] * pair.block_bytes for first in ids)  # of raw NIXL, which knows no blocks
    held = pair.ask("holder", "hold", request_id=request_id, block_ids=ids[0], byte_count=byte_count, offset=theirs)
    time.sleep(HANDOFF_S)
    got = pair.ask(
        "reader",
        "read",
        request_id=f"reader.{request_id}",
        block_ids=ids[1],
        params=held["params"],
        is_checked=is_checked,
        byte_count=byte_count,
        offset=ours,
        their_offset=theirs,
        descriptor_bytes=descriptor_bytes,
    )
    pair.ask("holder", "release", request_id=request_id)
    if not got["is_ok"] or (is_checked and got["checksum"] != held["checksum"]):
        raise ChildError(f"{pair.path}: {block_count} blocks, {layout}: not what was held arrived")
    return {"layout": layout, "byte_count": byte_count, **{k: v for k, v in got.items() if k != "checksum"}}


def _block_ids(usable: range, layout: str, block_count: int, rng: random.Random) -> list[int]:
    if layout == "scattered":
        return rng.sample(usable, block_count)
    first = rng.randrange(len(usable) - block_count + 1)
    ids = list(usable[first : first + block_count])
    return ids if layout == "adjacent" else ids[::-1]


def idle_of(pair: Pair) -> dict[str, Any]:
    """What both ends burn while nothing is asked of them."""
    with pair.turn():
        before = {end: child.cpu().total_s for end, child in pair.children.items()}
        began = time.monotonic()
        time.sleep(IDLE_S)
        span_s = time.monotonic() - began
        shares = {end: (child.cpu().total_s - before[end]) / span_s for end, child in pair.children.items()}
    return {"record": "idle pair", "path": pair.path, "cpu_share": {end: round(s, 4) for end, s in shares.items()}}


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(preloads()),
        "OMP_NUM_THREADS": "1",
        "UCX_NET_DEVICES": "lo",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
    }

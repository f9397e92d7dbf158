"""KV over TCP between two network namespaces, beside one raw TCP stream on the same wire, in one run. Needs root.

    python -m bench.tcp_pairs --quick          # about a minute; prints the section of the report

A holder in one namespace and a reader in the other, KV laid out as the default model's and no model
(``bench/kv_pair.py``), with the environment Baton gives its engines and UCX_TLS=tcp. Turns in mirrored order; who
has none is stopped. For ``bench/transfer_figures.py``: ``tcp_records`` yields the raw records, and
``bench/tcp_report.py`` makes the section from them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench import transfer_pairs
from bench.children import ChildError
from bench.kv_pair import BLOCK_BYTES, POOL_BLOCK_COUNT, READ_DEADLINE_S, fill, serve
from bench.namespaces import DEVICE, Hosts, two_hosts
from bench.transfer_pairs import Pair, Place
from engine.config import EngineConfig
from engine.environment import engine_environment

STREAM = "tcp-stream"
TCP_PATHS = ("baton", "stock-tuned", STREAM)
BLOCK_COUNTS = (2, 16, 32)
"""5.6, 45 and 90 MiB."""
LAYOUTS = ("adjacent", "scattered")
STREAM_KINDS = (("auto", 64 << 10), ("auto", 256 << 10), ("4 MiB", 256 << 10), ("4 MiB", 1 << 20))
"""Socket buffers (the kernel's own choice, or this) and bytes a call: which is fastest depends on the machine."""
_SOCKET_BYTES = {"auto": 0, "4 MiB": 4 << 20}


def tcp_records(
    model: Path, cores: Sequence[int], logs: Path, *, round_count: int, seed: int, paths: Sequence[str] = TCP_PATHS
) -> Iterator[dict[str, Any]]:
    """Raises ``NoNamespacesError`` where there can be none, ``ChildError`` when other bytes arrived than held."""
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        pairs = []
        for path in paths:
            module = "bench.tcp_pairs" if path == STREAM else "bench.kv_pair"
            pairs.append(Pair(path, model, cores, logs / "tcp", _places(path, hosts, cores), module))
            stack.callback(pairs[-1].stop)
        rng = random.Random(seed)  # noqa: S311 a reproducible load
        for pair in pairs:
            pair.await_ready()
            pair.pin(cores)
            for _ in _reads(pair, rng, is_checked=True):  # first contact, and that the right bytes arrive
                pass
            pair.ask("holder", "idle")
        for pair in pairs:
            with pair.turn():
                pass
        for pair in pairs:
            yield {**transfer_pairs.idle_of(pair), "record": "tcp idle"}
        for number in range(round_count):
            # Forth and back, so that a drift of the machine hits all alike.
            for pair in pairs if number % 2 == 0 else reversed(pairs):
                with pair.turn():
                    for record in _reads(pair, rng, is_checked=False):
                        yield {"record": "tcp read", "path": pair.path, "round": number, **record}
                    pair.ask("holder", "idle")


def _places(path: str, hosts: Hosts, cores: Sequence[int]) -> list[Place]:
    places = []
    for name, address, core in ((hosts.p, hosts.p_address, cores[0]), (hosts.d, hosts.d_address, cores[1])):
        environment = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": DEVICE}
        if path == "baton":
            config = EngineConfig(
                model_name="kv",
                model_path="none",
                kv_cache_bytes=POOL_BLOCK_COUNT * BLOCK_BYTES,
                side_channel_host=address,
                transports=("tcp",),
                net_devices=(DEVICE,),
                cores=(core,),
            )
            environment = engine_environment(config)
        places.append(Place(address, ("ip", "netns", "exec", name), environment))
    return places


def _reads(pair: Pair, rng: random.Random, *, is_checked: bool) -> Iterator[dict[str, Any]]:
    """One of each kind, in an order of its own each time, after one for warmth: others have used the caches."""
    kinds: Sequence[Any] = STREAM_KINDS if pair.path == STREAM else LAYOUTS
    readings = [(block_count, kind) for block_count in BLOCK_COUNTS for kind in kinds]
    rng.shuffle(readings)
    for number, (block_count, kind) in enumerate([(max(BLOCK_COUNTS), kinds[0]), *readings]):
        if pair.path == STREAM:
            record = _streamed(pair, block_count * BLOCK_BYTES, *kind, is_checked=is_checked)
        else:
            record = transfer_pairs.read_by(pair, rng, block_count, kind, is_checked=is_checked)
        if number:
            yield record


def _streamed(pair: Pair, byte_count: int, buffers: str, call_bytes: int, *, is_checked: bool) -> dict[str, Any]:
    named = {"byte_count": byte_count, "is_checked": is_checked}
    got = pair.ask("reader", "read", buffers=buffers, call_bytes=call_bytes, **named)
    if is_checked and got["checksum"] != pair.ask("holder", "hold", **named)["checksum"]:
        raise ChildError("the raw stream: not what was sent arrived")
    return {
        "layout": f"{buffers} buffers, {call_bytes >> 10} KiB a call",
        "byte_count": byte_count,
        "elapsed_s": got["elapsed_s"],
    }


class StreamEnd:
    """A plain socket: the holder sends the beginning of its pool to whoever asks; the reader asks and receives."""

    def __init__(self, host: str, seed: int) -> None:
        self._memory = np.zeros((1, POOL_BLOCK_COUNT * BLOCK_BYTES // 8), dtype=np.uint64)
        fill([self._memory], seed)
        self._bytes = memoryview(self._memory.reshape(-1).view(np.uint8).data)
        self._streams: dict[tuple[str, int], socket.socket] = {}
        self._peer = ("", 0)
        self._listener = socket.create_server((host, 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            accepted, _ = self._listener.accept()
            threading.Thread(target=self._send, args=(accepted,), daemon=True).start()

    def _send(self, connection: socket.socket) -> None:
        orders = connection.makefile("r")
        buffers, call_bytes = orders.readline().split("/")
        _size(connection, buffers)
        for line in orders:
            byte_count = int(line)
            for offset in range(0, byte_count, int(call_bytes)):
                connection.sendall(self._bytes[offset : min(byte_count, offset + int(call_bytes))])

    def hello(self, *, peer: dict[str, Any] | None = None, **_: Any) -> dict[str, Any]:
        if peer is not None:
            self._peer = (peer["host"], peer["port"])
        host, port = self._listener.getsockname()
        return {"host": host, "port": port}

    def hold(self, *, byte_count: int, **_: Any) -> dict[str, Any]:
        return {"checksum": int(self._memory[0, : byte_count // 8].sum(dtype=np.uint64))}

    def read(self, *, byte_count: int, buffers: str, call_bytes: int, is_checked: bool, **_: Any) -> dict[str, Any]:
        stream = self._streams.get((buffers, call_bytes))
        if stream is None:
            stream = self._streams[buffers, call_bytes] = socket.socket()
            _size(stream, buffers)  # BEFORE it connects: the window's scale is agreed on then
            stream.settimeout(READ_DEADLINE_S)
            stream.connect(self._peer)
            stream.sendall(f"{buffers}/{call_bytes}\n".encode())
        if is_checked:
            self._memory[0, : byte_count // 8] = 0
        received = 0
        began = time.perf_counter()
        stream.sendall(f"{byte_count}\n".encode())
        while received < byte_count:
            count = stream.recv_into(self._bytes[received : min(byte_count, received + call_bytes)])
            if not count:
                raise ConnectionError("the sender hung up")
            received += count
        elapsed_s = time.perf_counter() - began
        total = int(self._memory[0, : byte_count // 8].sum(dtype=np.uint64)) if is_checked else None
        return {"elapsed_s": elapsed_s, "checksum": total}

    def step(self) -> None:
        """Nothing to do: the stream has threads of its own."""


def _size(connection: socket.socket, buffers: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if size := _SOCKET_BYTES[buffers]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tcp_pairs", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="8 rounds instead of 24")
    parser.add_argument("--model", type=Path, default=Path("~/.cache/baton/models/smollm2-135m-instruct"))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, help="raw records")
    parser.add_argument("--logs", type=Path, default=Path(".baton/bench"))
    for name in ("--end", "--path", "--socket", "--host", "--port"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # of a pair's end
    options = parser.parse_args(arguments)
    if options.end is not None:
        return _end(options.end, options.socket, options.host)
    from bench.tcp_report import tcp_section

    every = sorted(os.sched_getaffinity(0))
    records = list(
        tcp_records(
            options.model.expanduser(),
            (every[0], every[-1]),
            options.logs,
            round_count=8 if options.quick else 24,
            seed=options.seed,
        )
    )
    if options.out is not None:
        options.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print("\n\n".join(tcp_section(records, options.seed)))
    return 0


def _end(end: str, path: str, host: str) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(end.encode() + b"\n")
        serve(StreamEnd(host, 1 if end == "holder" else 2), connection)
    return 0


if __name__ == "__main__":
    sys.exit(main())

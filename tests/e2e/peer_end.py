"""An end of a pair for the tests of peers: a connector without an engine, whose clock can be put forward.

Started by ``bench/transfer_pairs.py`` in place of ``bench/kv_pair.py``.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path
from typing import Any

from bench.kv_pair import BLOCK_TOKEN_COUNT, ConnectorEnd, serve
from kvtransfer.peer import PeerAddress


class PeerEnd(ConnectorEnd):
    def meet(self, *, worker_id: str, engine_id: str, port: int, **_: Any) -> dict[str, Any]:
        """Begins an introduction, as the router does."""
        self._worker.begin_introductions([PeerAddress(worker_id, "e", engine_id, "127.0.0.1", port)])
        return {}

    def said(self, *, engine_id: str, **_: Any) -> dict[str, Any]:
        """What became of it, and whether the engine is known."""
        problem, _took_s = self._worker.introductions([engine_id])[engine_id]
        return {"problem": problem, "is_known": engine_id in self._worker._remote_agents}

    def pass_time(self, *, span_s: float, **_: Any) -> dict[str, Any]:
        """All peers were last read from ``span_s`` earlier than they were."""
        last_active = self._worker._engine_last_active
        for engine_id in last_active:
            last_active[engine_id] -= span_s
        return {}

    @property
    def _worker(self) -> Any:
        return self._worker_side.connector_worker


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--end", "--path", "--socket", "--host"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    block_token_count = int(os.environ.get("BATON_TEST_BLOCK_TOKENS", BLOCK_TOKEN_COUNT))
    end = PeerEnd(
        "baton", options.model, options.host, options.port, 1 if options.end == "holder" else 2, block_token_count
    )
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(options.socket)
        connection.sendall(options.end.encode() + b"\n")
        serve(end, connection)


if __name__ == "__main__":
    main()
    os._exit(0)

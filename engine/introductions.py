"""What a worker says of its engine to other workers, and what it does when it is told of theirs.

Owns the seal on both: coordinates come from the cluster or not at all. The engine does the meeting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from baton.errors import FieldViolation, invalid_request
from baton.leg import Introduced
from engine.protocol import Engine
from kvtransfer.peer import MAX_PEER_COUNT, PeerRefusedError, open_peer, seal_peer

__all__ = ["Introductions"]


class Introductions:
    """Of a *started* engine."""

    def __init__(self, engine: Engine, *, worker_id: str, secret: bytes, allowed_hosts: Collection[str]) -> None:
        """``allowed_hosts``: the only ones that are ever dialled, whoever names another."""
        self._engine = engine
        self._worker_id = worker_id
        self._secret = secret
        self._allowed_hosts = frozenset(allowed_hosts)
        self._turn = asyncio.Lock()
        """One call at a time: each may have the engine begin as many handshakes as are allowed in one."""

    @property
    def sealed(self) -> bytes:
        """This worker's own coordinates; empty: its engine needs no introductions."""
        peer = self._engine.transfer_peer
        return b"" if peer is None else seal_peer(peer, self._secret)

    async def introduce(self, sealed: Sequence[bytes]) -> list[Introduced]:
        """One result for each, in order, less this worker's own. Raises INVALID_REQUEST for too many, and for what
        this cluster has not sealed: then nobody is met."""
        if len(sealed) > MAX_PEER_COUNT:
            raise invalid_request([FieldViolation("transfer_peers", f"must be at most {MAX_PEER_COUNT}")])
        peers = []
        for index, data in enumerate(sealed):
            try:
                peer = open_peer(data, self._secret)
            except PeerRefusedError as error:
                raise invalid_request([FieldViolation(f"transfer_peers[{index}]", str(error))]) from None
            if peer.worker_id != self._worker_id:
                peers.append(peer)
        allowed = [peer for peer in peers if peer.host in self._allowed_hosts]
        async with self._turn:
            met = await self._engine.introduce(allowed) if allowed else []
        results = dict(zip((peer.engine_id for peer in allowed), met, strict=True))
        not_allowed = "its host is not in this engine's peer_hosts"
        return [
            results.get(peer.engine_id, Introduced(peer.worker_id, peer.epoch, not_allowed, 0.0)) for peer in peers
        ]

"""Coordinates of an engine open as they were sealed, and nothing else opens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.peer import MAGIC, MAX_PEER_BYTES, PeerAddress, PeerRefusedError, _mac, open_peer, seal_peer

SECRET = bytes(range(32))
ADDRESS = PeerAddress("prefill-0", "e1", "prefill-0-abc", "10.0.0.1", 5600)


def sealed(**changes: Any) -> bytes:
    content = {"worker_id": "w", "epoch": "e", "engine_id": "w-1", "host": "10.0.0.1", "port": 5600, **changes}
    body = json.dumps({key: value for key, value in content.items() if value is not None}).encode()
    return MAGIC + _mac(body, SECRET) + body


def test_what_was_sealed_opens_again() -> None:
    for address in (ADDRESS, replace(ADDRESS, host="fe80::1%eth0"), replace(ADDRESS, host="node-7.example", port=1)):
        assert open_peer(seal_peer(address, SECRET), SECRET) == address


def test_no_bit_of_it_can_be_changed() -> None:
    data = seal_peer(ADDRESS, SECRET)
    for position in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[position] ^= bit
            with pytest.raises(PeerRefusedError):
                open_peer(bytes(changed), SECRET)
    for length in range(len(data)):
        with pytest.raises(PeerRefusedError):
            open_peer(data[:length], SECRET)
    with pytest.raises(PeerRefusedError, match="cluster"):
        open_peer(data, bytes(32))
    with pytest.raises(PeerRefusedError, match="larger"):
        open_peer(data + bytes(MAX_PEER_BYTES), SECRET)


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 0},
        {"port": 65_536},
        {"port": True},
        {"port": "5600"},
        {"host": ""},
        {"host": "a b"},
        {"host": "a/../b"},
        {"host": 7},
        {"engine_id": "x" * 129},
        {"worker_id": None},
        {"more": 1},
    ],
)
def test_a_seal_does_not_excuse_malformed_fields(changes: dict[str, Any]) -> None:
    assert open_peer(sealed(), SECRET).port == 5600
    with pytest.raises(PeerRefusedError):
        open_peer(sealed(**changes), SECRET)


def test_what_is_not_json_is_refused_although_it_is_sealed() -> None:
    for body in (b"x", b"[]", b"null", b"1"):
        with pytest.raises(PeerRefusedError):
            open_peer(MAGIC + _mac(body, SECRET) + body, SECRET)

"""A router that ends says so to its connections in order: gRPC, where it is cut off, prints a line of its own to the
terminal of whoever is connected. The fleet's own supervisor always is, on the admin port."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
from sim_cluster import SECRET, sim_cluster

from baton.admin_client import AdminClient
from baton.status_client import StatusClient
from router import server

ROUND_COUNT = 4
"""It was a race: one round showed it half of the time."""


async def test_a_router_that_ends_makes_grpc_print_nothing_at_clients_that_have_no_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL_S", 60.0)  # nobody waits so long; a machine that stands still may
    for _ in range(ROUND_COUNT):
        async with (
            sim_cluster(tmp_path) as cluster,
            AdminClient(cluster.endpoint.admin_address, secret=SECRET) as admin,
            StatusClient(cluster.endpoint.address) as status,
        ):
            async with aclosing(admin.watch()) as clusters, aclosing(status.watch()) as statuses:
                await anext(clusters)
                await anext(statuses)
            await cluster.server.close()
    said = capfd.readouterr()
    assert "goaway" not in (said.out + said.err).lower()

"""Two Ray nodes on one machine, as a program: prints its address, and ends when its standard input does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only, see fleet/ray_fleet.py
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": sys.argv[1],
    }
)

from ray.cluster_utils import Cluster

TRY_COUNT = 3


def two_nodes() -> tuple[Cluster, dict[str, str]]:
    cluster = Cluster()
    nodes = {}
    try:
        for name in ("node-a", "node-b"):
            node = cluster.add_node(
                node_ip_address="127.0.0.1",
                num_cpus=1,
                resources={name: 1},
                include_dashboard=False,
                object_store_memory=80 << 20,
            )
            nodes[name] = node.node_id
    except BaseException:
        cluster.shutdown()
        raise
    return cluster, nodes


def main() -> None:
    Path("/tmp/ray").mkdir(exist_ok=True)
    for left_count in reversed(range(TRY_COUNT)):
        try:
            cluster, nodes = two_nodes()
            break
        except Exception as error:
            # Ray gives a node 30 s to start, a limit that is written into it; a busy machine may need longer.
            if not left_count or "timed out during startup" not in str(error):
                raise
    try:
        print(json.dumps({"address": cluster.address, "nodes": nodes}), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()

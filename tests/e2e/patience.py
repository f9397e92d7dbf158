"""How long tests of real engines wait, and clusters that give nothing up because the machine stood still for a while.

Nothing here is measured: a wait ends when what it waits for has happened, and its bound only makes a failure of a
hang. What deadlines do is shown in virtual time (tests/scenarios).
"""

from __future__ import annotations

from dataclasses import replace

from fleet.config import FleetConfig

WITHIN_S = 300.0
"""For what takes a moment."""
START_S = 900.0
"""For a cluster to be ready."""
LEASE_S = 600.0
"""Of held KV that is to be there when somebody comes for it."""
PULL_TIMEOUT_S = 120.0
TEST_S = 1800.0
"""A test, with the start of what it is the first to use."""
SILENCE_S = 60.0
"""Of a worker that is there: as much as a router may be told."""
NO_WORKER_WAIT_S = 3.0
"""Far below the start of an engine: who asks while there is none is told so before there is one."""


def patient(config: FleetConfig) -> FleetConfig:
    """A worker is lost when its process is, and not because it was silent; a pull is over when it is."""
    router = replace(
        config.router,
        worker_silence_s=SILENCE_S,
        max_no_worker_wait_s=NO_WORKER_WAIT_S,
        max_queue_wait_s=START_S,
        prefill_timeout_s=START_S,
        gap_timeout_s=START_S,
        parser_deadline_s=WITHIN_S,
        parser_start_deadline_s=START_S,
    )
    engines = {role: replace(engine, pull_timeout_s=PULL_TIMEOUT_S) for role, engine in config.engines.items()}
    cluster = replace(config.cluster, start_deadline_s=START_S)
    return replace(config, router=router, engines=engines, cluster=cluster)

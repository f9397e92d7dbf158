"""The connector's configuration as vLLM wants it. Owns the mapping and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm.config import KVTransferConfig

from kvtransfer.connector import CONNECTOR, CONNECTOR_MODULE
from kvtransfer.connector_faults import FAULTS_KEY
from kvtransfer.connector_scheduler import SIDE_CHANNEL_HOST_KEY, SIDE_CHANNEL_PORT_KEY
from kvtransfer.connector_worker import DIGESTS_KEY, PROGRESS_THREAD_KEY
from kvtransfer.pull_deadlines import PULL_TIMEOUT_KEY


def transfer_config(
    *,
    engine_id: str,
    side_channel_host: str,
    side_channel_port: int,
    lease_s: float,
    enable_progress_thread: bool,
    device: str,
    pull_timeout_s: float,
    enable_kv_digests: bool,
    transfer_faults: Mapping[str, Any],
) -> Any:
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=CONNECTOR_MODULE,
        # Any engine may do either phase: a role is a placement, not a property of the process.
        kv_role="kv_both",
        engine_id=engine_id,
        kv_buffer_device=device,
        # KV that cannot be had is computed; the default would end the request with an error.
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "kv_lease_duration": math.ceil(lease_s),
            # On CPU the thread that posts a read also copies; NIXL's own threads would only listen and wait.
            **({"num_threads": 0} if device == "cpu" else {}),
            SIDE_CHANNEL_HOST_KEY: side_channel_host,
            SIDE_CHANNEL_PORT_KEY: side_channel_port,
            PROGRESS_THREAD_KEY: enable_progress_thread,
            PULL_TIMEOUT_KEY: pull_timeout_s,
            DIGESTS_KEY: enable_kv_digests,
            **({FAULTS_KEY: dict(transfer_faults)} if transfer_faults else {}),
        },
    )

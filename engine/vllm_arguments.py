"""An engine's configuration in vLLM's words. Owns the mapping; starts nothing and never imports vLLM itself."""

from __future__ import annotations

import uuid
from typing import Any

from engine.config import EngineConfig, EngineIdentity


def engine_arguments(config: EngineConfig, identity: EngineIdentity) -> dict[str, Any]:
    """Arguments for ``AsyncEngineArgs``. Imports the connector, hence vLLM: call it off the event loop."""
    from kvtransfer.connector_executor import EXECUTOR, WORKER_EXTENSION
    from kvtransfer.connector_settings import transfer_config
    from kvtransfer.connector_steps import SCHEDULER

    arguments: dict[str, Any] = {
        "model": config.model_path,
        "served_model_name": config.model_name,
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.max_context_token_count,
        "block_size": config.block_token_count,
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "max_num_seqs": config.max_running_count,
        "max_num_batched_tokens": config.max_batched_token_count,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enforce_eager": config.enforce_eager,
        "scheduling_policy": "priority",
        # A step's tokens must be out before the next step decides: what a prefill holds is counted in them.
        "async_scheduling": False,
        "scheduler_cls": SCHEDULER,
        "distributed_executor_backend": EXECUTOR,
        "worker_extension_cls": WORKER_EXTENSION,
        "kv_transfer_config": transfer_config(
            engine_id=f"{identity.worker_id}-{uuid.uuid4().hex}",
            side_channel_host=config.side_channel_host,
            side_channel_port=config.side_channel_port,
            lease_s=config.lease_s,
            enable_progress_thread=config.enable_progress_thread,
            device=config.device,
            enable_kv_digests=config.has_kv_digests,
            pull_timeout_s=config.pull_timeout_s,
            transfer_faults=config.transfer_faults,
        ),
        # Named: left to choose, an engine keeps whichever its first structured request needed, and two engines that
        # go on with each other's answers would mask different tokens. This one, because it bounds its own work: over
        # an ambiguous grammar of one line, vLLM's first choice kept the engine's loop busy for more than a minute.
        "structured_outputs_config": {"backend": "guidance"},
        # Requests, hence prompts, are never logged; statistics reach us through ``reports`` alone.
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if config.device == "cpu":
        from kvtransfer.connector_runner import CPU_WORKER

        arguments["worker_cls"] = CPU_WORKER
    return {**arguments, **config.extra_args}

"""Which environment makes a vLLM engine compute on given cores, and nothing else.

Owns the words vLLM and OpenMP read at process start. It never starts a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.environment import preloads

CLOCK_VARIABLE = "BATON_BENCH_STEP_CLOCK"
"""The file that ``bench/step_clock.py`` notes engine steps in."""


def pinned_engine_environment(base: Mapping[str, str], cores: Sequence[int]) -> dict[str, str]:
    """``base`` plus what an engine pinned to ``cores`` (by affinity, set by the caller) should see.

    One OpenMP thread per core, and the preloads Baton's own workers get, so that a peer lacks nothing.
    ``VLLM_CPU_OMP_THREADS_BIND`` names the cores for vLLM's own process manager; the UniProc executor ignores it
    and follows ``OMP_NUM_THREADS`` and the affinity.
    """
    environment = dict(base)
    libraries = preloads()
    if libraries:
        environment["LD_PRELOAD"] = ":".join(libraries)
    environment["OMP_NUM_THREADS"] = str(len(cores))
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    environment["VLLM_LOGGING_LEVEL"] = "WARNING"
    # Nothing leaves the machine: no usage statistics, no model hub.
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}
    return environment

"""The systems a comparison can start, by name. Pure: what each is, not how it is started (``bench/peers.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "baton", "baton-aggregated", "engine", "engine-all-cores", "balanced", "stock-pd", "stock-router", "naive"
]
"""baton, baton-aggregated: the fleet of a TOML file, and the same workers all computing prompts and answers.
engine, engine-all-cores: one vLLM server on the first worker's cores, or on all. balanced: a vLLM server for each
worker's cores behind a balancer. stock-pd: vLLM's NIXL connector behind the proxy of ``bench/stock_proxy.py``.
stock-router: the same behind vllm-router. naive: ``bench/comparison/naive_server.py``."""

VLLM_OWN_CHUNK = 2048
"""What vLLM's server takes on CPU unless told otherwise."""


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """One column of the table."""

    name: str
    kind: Kind
    title: str
    as_shipped: bool = False
    """vLLM's default executor (API server, engine core and worker are three processes) and no re-pinning."""
    max_batched_token_count: int | None = None
    """Prefill chunk, where it differs from Baton's configuration."""

    @property
    def environments(self) -> Sequence[str]:
        """The peer environments it needs, by the name of their lock."""
        match self.kind:
            case "naive":
                return ("peer-naive",)
            case "stock-router":
                return ("peer-router",)
            case "balanced":
                return ("peer-haproxy",)
            case _:
                return ()


SYSTEMS: dict[str, SystemSpec] = {
    spec.name: spec
    for spec in (
        SystemSpec("baton", "baton", "Baton 1P+1D"),
        SystemSpec("baton-aggregated", "baton-aggregated", "Baton, two aggregated workers"),
        SystemSpec(
            "vllm-2core",
            "engine-all-cores",
            "one vLLM server, both cores, as shipped",
            as_shipped=True,
            max_batched_token_count=VLLM_OWN_CHUNK,
        ),
        SystemSpec(
            "vllm-2core-chunk-128",
            "engine-all-cores",
            "one vLLM server, both cores, chunks of 128",
            max_batched_token_count=128,
        ),
        SystemSpec(
            "vllm-2core-chunk-256",
            "engine-all-cores",
            "one vLLM server, both cores, chunks of 256",
            max_batched_token_count=256,
        ),
        SystemSpec(
            "vllm-2x1core",
            "balanced",
            "two vLLM servers, one core each, behind HAProxy, as shipped",
            as_shipped=True,
            max_batched_token_count=VLLM_OWN_CHUNK,
        ),
        SystemSpec(
            "vllm-2x1core-chunk-128",
            "balanced",
            "two vLLM servers, one core each, behind HAProxy, chunks of 128",
            max_batched_token_count=128,
        ),
        SystemSpec(
            "stock-router",
            "stock-router",
            "stock vLLM P/D behind vllm-router, as shipped",
            as_shipped=True,
            max_batched_token_count=VLLM_OWN_CHUNK,
        ),
        SystemSpec("stock-router-tuned", "stock-router", "stock vLLM P/D behind vllm-router, tuned"),
        SystemSpec("naive", "naive", "FastAPI + transformers.generate, both cores"),
        # Of bench/transfer_figures.py and bench/stock_modes.py: one core, or a proxy of ours.
        SystemSpec("engine", "engine", "one vLLM engine, one core", max_batched_token_count=VLLM_OWN_CHUNK),
        SystemSpec("stock-pd", "stock-pd", "stock vLLM P/D, tuned"),
        SystemSpec("stock-pd-as-shipped", "stock-pd", "stock vLLM P/D, as shipped", as_shipped=True),
    )
}

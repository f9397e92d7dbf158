"""From the configuration to the processes of a fleet: one router, and the workers of each role.

Pure. Owns the names of members and the arguments they are started with. The secret is not among the arguments:
it goes by environment, since arguments can be read by everyone on the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from baton.request import Role
from baton.secret import SECRET_VARIABLE
from fleet.child_process import ChildSpec
from fleet.config import FleetConfig, PoolConfig
from fleet.reconcile import Desired, Policy
from fleet.router_ports import counted_up, router_at
from router.config import RouterConfig

ROUTER = "router"
WORKER_MODULE = "fleet.worker_process"
ROUTER_MODULE = "fleet.router_process"


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the fleet, and what it needs to be placed."""

    child: ChildSpec
    role: Role | None
    """None: the router."""
    cpu_count: float
    gpu_count: float
    resources: Mapping[str, float]
    stop_grace_s: float = 0.0

    @property
    def name(self) -> str:
        return self.child.name

    @property
    def desired(self) -> Desired:
        return Desired(self.name, self.child.fingerprint, self.stop_grace_s)


def members_of(config: FleetConfig, secret: bytes) -> tuple[Member, ...]:
    """The routers first, then prefill and decode workers in order."""
    env = {SECRET_VARIABLE: secret.hex()}
    members = [
        Member(
            child=_child(router_name(index), ROUTER_MODULE, asdict(router), env),
            role=None,
            cpu_count=0,
            gpu_count=0,
            resources={},
            stop_grace_s=config.router.stop_grace_s,
        )
        for index, router in enumerate(router_configs(config))
    ]
    slot = 0
    gpu = 0.0
    for role in Role:
        pool = config.pools[role]
        for index in range(pool.count):
            members.append(_worker(config, role, pool, index, slot, gpu, env))
            slot += pool.cores_per_worker
            gpu += pool.gpus_per_worker
    return tuple(members)


def router_configs(config: FleetConfig) -> list[RouterConfig]:
    """Of every router: alike but for the ports."""
    return [router_at(config.router, index) for index in range(config.cluster.router_count)]


def router_name(index: int) -> str:
    return f"{ROUTER}-{index}" if index else ROUTER


def is_router(name: str) -> bool:
    """Workers are named by their role and number."""
    return name == ROUTER or name.startswith(f"{ROUTER}-")


def policy_of(config: FleetConfig) -> Policy:
    cluster = config.cluster
    return Policy(
        start_deadline_s=cluster.start_deadline_s,
        stop_deadline_s=cluster.stop_deadline_s,
        restart_delay_s=cluster.restart_delay_s,
        restart_delay_max_s=cluster.restart_delay_max_s,
        alarm_after_failure_count=cluster.alarm_after_failure_count,
    )


def _worker(
    config: FleetConfig,
    role: Role,
    pool: PoolConfig,
    index: int,
    slot: int,
    gpu: float,
    env: Mapping[str, str],
) -> Member:
    name = f"{role.value}-{index}"
    cores = pool.cores[index] if pool.cores else ()
    cpu_count = len(cores) or pool.cores_per_worker
    engine = asdict(config.engines[role])
    for filled_in_by_the_worker in ("cores", "side_channel_host", "side_channel_port"):
        del engine[filled_in_by_the_worker]
    arguments: dict[str, Any] = {
        "worker_id": name,
        "role": role.value,
        "bind_host": config.cluster.bind_host,
        "port": counted_up(pool.port, index),
        "metrics_port": counted_up(pool.metrics_port, index),
        "side_channel_port": counted_up(pool.side_channel_port, index),
        "cores": list(cores),
        "core_slots": [] if cores else list(range(slot, slot + cpu_count)),
        "gpus": _gpus(gpu, pool.gpus_per_worker),
        "stop_deadline_s": config.cluster.stop_deadline_s,
        "engine": engine,
        "simulated": dict(config.simulated[role]),
    }
    return Member(
        child=_child(name, WORKER_MODULE, arguments, {**pool.env, **env}),
        role=role,
        cpu_count=cpu_count,
        gpu_count=pool.gpus_per_worker,
        resources=pool.resources,
    )


def _child(name: str, module: str, arguments: Mapping[str, Any], env: Mapping[str, str]) -> ChildSpec:
    said = json.dumps(arguments, sort_keys=True)
    digest = hashlib.sha256(f"{module}\n{said}\n{json.dumps(dict(env), sort_keys=True)}".encode()).hexdigest()
    return ChildSpec(name=name, module=module, arguments=("--config", said), env=env, fingerprint=digest[:16])


def _gpus(first: float, count: float) -> list[int]:
    """Numbers of the GPUs a worker uses when nobody else (Ray) hands them out."""
    if count <= 0:
        return []
    return list(range(int(first + 1e-9), max(int(first + 1e-9) + 1, int(first + count + 1e-9))))

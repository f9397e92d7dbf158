"""The fleet's one TOML file as frozen dataclasses: who runs where, on which cores, with which model and ports.

Owns the shape of that file and the checks that concern the fleet. The engine's and the router's own values are
checked by their own configuration classes, which this builds. Reads the file; starts nothing.

A key's documentation is the text under it here, and its comment in ``deploy/baton.toml``.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from baton.request import Role
from engine.config import EngineConfig
from engine.sim_config import SimConfig
from fleet.router_ports import router_at
from fleet.toml_table import ConfigError, build, key_path, refuse_unknown_keys
from router.config import ConfigError as RouterConfigError
from router.config import RouterConfig

__all__ = ["ClusterConfig", "ConfigError", "FleetConfig", "ModelConfig", "PoolConfig", "RayConfig", "load_config"]

MODEL_FILE = "config.json"
"""What a prepared model directory has for certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """Which Ray to use, when ``cluster.runner`` is "ray"."""

    address: str = ""
    """host:port of a running Ray cluster. Empty: start one on this machine, on loopback only, with token
    authentication, and stop it with the fleet."""
    namespace: str = "baton"
    """Ray namespace of the fleet's actors. Two fleets on one cluster need two."""
    num_cpus: int = 0
    """CPUs the local Ray may hand out. 0: as many as the workers ask for together."""
    object_store_bytes: int = 80 << 20
    """Ray's object store; Baton moves nothing through it, and Ray wants at least 75 MiB."""
    outage_tolerance_s: float = 3600.0
    """How long workers go on without Ray's head (its GCS) before Ray stops them. Local Ray only; elsewhere set
    RAY_gcs_rpc_server_reconnect_timeout_s where Ray is started."""

    def __post_init__(self) -> None:
        if self.address and not _is_host_port(self.address):
            raise ConfigError(f'address: is {self.address!r}; give "host:port", or "" to start Ray here')
        if not self.namespace:
            raise ConfigError("namespace: is empty; give a name")
        _whole("num_cpus", self.num_cpus, 0, 4096)
        _whole("object_store_bytes", self.object_store_bytes, 75 << 20, 1 << 40)
        _number("outage_tolerance_s", self.outage_tolerance_s, 1, 86400 * 30)


MAX_ROUTER_COUNT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The fleet as a whole."""

    name: str = "baton"
    """For people: in process lists and ``baton status``."""
    runner: Literal["ray", "local"] = "ray"
    """"ray": Ray places and restarts the workers. "local": plain child processes of one supervisor."""
    state_dir: str = ".baton"
    """Where this fleet's secret, logs and state file live; relative to the current directory. Made with mode 0700."""
    secret_file: str = ""
    """A file with the cluster's secret, 64 hexadecimal digits. Empty: made at the first start, in state_dir.
    Every process that takes part in the cluster must have the same one."""
    bind_host: str = "127.0.0.1"
    """Address that workers listen on. "node": the address of the Ray node a worker runs on; needed as soon as
    workers are on more than one machine."""
    router_count: int = 1
    """Routers over the same workers. Each further one listens 10 ports above the one before it (metrics: 1 above).
    With two, one may be restarted: callers who asked to be resumable go on at the other."""
    start_deadline_s: float = 240.0
    """A worker that is not ready by then is killed and started again. Loading a model takes its time."""
    stop_deadline_s: float = 10.0
    """A process asked to stop is killed after this."""
    restart_delay_s: float = 0.2
    """Before the first restart of what died; doubled with each further failure..."""
    restart_delay_max_s: float = 15.0
    """...up to this. The supervisor never stops trying."""
    alarm_after_failure_count: int = 3
    """Failures in a row, without having been ready in between, after which ``baton up`` gives up waiting."""
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: is empty; give a name")
        if not self.state_dir:
            raise ConfigError("state_dir: is empty; give a directory")
        if not self.bind_host:
            raise ConfigError('bind_host: is empty; give an address, or "node" for that of each Ray node')
        if self.bind_host == "node" and self.runner != "ray":
            raise ConfigError('bind_host: is "node", which only runner = "ray" knows; give an address')
        _whole("router_count", self.router_count, 1, MAX_ROUTER_COUNT)
        _number("start_deadline_s", self.start_deadline_s, 1, 3600)
        _number("stop_deadline_s", self.stop_deadline_s, 0.1, 600)
        _number("restart_delay_s", self.restart_delay_s, 0.01, 60)
        _number("restart_delay_max_s", self.restart_delay_max_s, self.restart_delay_s, 3600)
        _whole("alarm_after_failure_count", self.alarm_after_failure_count, 1, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is served."""

    name: str
    """What callers name it, and what answers say."""
    path: str
    """Directory with config.json, weights and tokenizer; "~" is understood. The same on every machine."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("name: is empty; give the name that callers will use")
        if not self.path:
            raise ConfigError("path: is empty; give the directory of the prepared model")

    @property
    def directory(self) -> Path:
        return Path(self.path).expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The workers of one role. Workers are alike but for the cores they run on."""

    count: int = 1
    """How many. 0 is allowed for prefill: decode workers then compute prompts themselves."""
    cores_per_worker: int = 1
    """CPU cores each worker gets for itself. The fleet deals them out in order, prefill first."""
    cores: tuple[tuple[int, ...], ...] = ()
    """Instead: the cores of each worker by number, one list per worker."""
    gpus_per_worker: float = 0.0
    """GPUs each worker gets. A fraction shares one."""
    port: int = 0
    """gRPC port of the first worker, counted up by one for each further. 0: any free port."""
    metrics_port: int = 0
    """Port of /metrics of the first worker, counted up likewise. 0: any free port."""
    side_channel_port: int = 0
    """Port at which the first worker's peers fetch transfer metadata, counted up likewise. 0: any free port."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Ray resources a worker asks for beside its cores and GPUs: {"node-a" = 0.01} places it on nodes that
    have them."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the worker process, such as LD_PRELOAD."""

    def __post_init__(self) -> None:
        _whole("count", self.count, 0, 256)
        _whole("cores_per_worker", self.cores_per_worker, 1, 1024)
        _number("gpus_per_worker", self.gpus_per_worker, 0, 64)
        for key in ("port", "metrics_port", "side_channel_port"):
            first = getattr(self, key)
            if first != 0:
                _whole(key, first, 1024, 65535 - max(0, self.count - 1))
        if self.cores and len(self.cores) != self.count:
            raise ConfigError(
                f"cores: has {len(self.cores)} lists for {self.count} workers; give one list per worker"
            )
        for each in self.cores:
            if not each or len(set(each)) != len(each) or any(core < 0 for core in each):
                raise ConfigError(f"cores: {list(each)} is not a list of different core numbers")
        for resource, amount in self.resources.items():
            _number(f"resources.{resource}", amount, 0.0001, 1e6)
        if "BATON_CLUSTER_SECRET" in self.env:
            raise ConfigError("env.BATON_CLUSTER_SECRET: cannot be set here; use cluster.secret_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """The whole file, checked. ``engines`` are templates: each worker's start fills in its cores and ports."""

    cluster: ClusterConfig
    model: ModelConfig
    router: RouterConfig
    pools: Mapping[Role, PoolConfig]
    engines: Mapping[Role, EngineConfig]
    simulated: Mapping[Role, Mapping[str, Any]]
    """Arguments of ``engine.sim_config.SimConfig`` for simulated engines, over those its engine implies."""
    source: str = "<text>"

    @property
    def fingerprint(self) -> str:
        """Changes with any value in the file."""
        said = json.dumps(_plain(self), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def state_path(self) -> Path:
        return Path(self.cluster.state_dir).expanduser().absolute()

    @property
    def uses_real_model(self) -> bool:
        return any(self.pools[role].count and self.engines[role].kind == "vllm" for role in Role)


ENGINE_KEYS_FROM_ELSEWHERE = {
    "model_path": "set model.path",
    "model_name": "set model.name",
    "cores": "set cores_per_worker or cores of the role",
    "side_channel_host": "it is the worker's address, see cluster.bind_host",
    "side_channel_port": "set side_channel_port of the role",
}
ROUTER_KEYS_FROM_ELSEWHERE = {
    "model_dir": "set model.path",
    "model_name": "set model.name",
}
_TABLES = ("cluster", "model", "router", *(role.value for role in Role))


def load_config(path: str | Path) -> FleetConfig:
    """Reads and checks ``path``. Raises ``ConfigError``: no file, no TOML, an unknown key, a wrong value."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {file}; deploy/baton.toml is one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    try:
        return parse_config(text, source=str(file))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse_config(text: str, source: str = "<text>") -> FleetConfig:
    """Checks the text of a configuration. Raises ``ConfigError``."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    refuse_unknown_keys(data, _TABLES, "")
    for name in _TABLES:
        if name in data and not isinstance(data[name], Mapping):
            raise ConfigError(f"{name} must be a table ([{name}])")
    if "model" not in data:
        raise ConfigError("the table [model] is required and missing; give name and path")
    model = build(ModelConfig, data["model"], "model")
    cluster = build(ClusterConfig, data.get("cluster", {}), "cluster")
    pools: dict[Role, PoolConfig] = {}
    engines: dict[Role, EngineConfig] = {}
    simulated: dict[Role, Mapping[str, Any]] = {}
    for role in Role:
        table = dict(data.get(role.value, {}))
        engine_table = _sub_table(table, "engine", role.value)
        simulated[role] = _sub_table(table, "simulated", role.value)
        pools[role] = build(PoolConfig, table, role.value)
        engines[role] = build(
            EngineConfig,
            engine_table,
            key_path(role.value, "engine"),
            given={"model_path": str(model.directory), "model_name": model.name},
            given_from=ENGINE_KEYS_FROM_ELSEWHERE,
        )
        _check_simulated(engines[role], simulated[role], key_path(role.value, "simulated"))
    config = FleetConfig(
        cluster=cluster,
        model=model,
        router=_router(data.get("router", {}), model, engines),
        pools=pools,
        engines=engines,
        simulated=simulated,
        source=source,
    )
    _check_together(config)
    return config


def check_model_directory(config: FleetConfig) -> None:
    """Raises ``ConfigError`` saying how to make the model, if it is not on this machine."""
    directory = config.model.directory
    if not (directory / MODEL_FILE).is_file():
        raise ConfigError(
            f"model.path: there is no model in {directory} (no {MODEL_FILE}). Run `make model` to prepare the "
            "default model there, or set model.path to the directory of a model in Hugging Face layout."
        )


def _sub_table(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    sub = table.pop(key, {})
    if not isinstance(sub, Mapping):
        raise ConfigError(f"{where}.{key} must be a table ([{where}.{key}])")
    return dict(sub)


def _router(table: Mapping[str, Any], model: ModelConfig, engines: Mapping[Role, EngineConfig]) -> RouterConfig:
    # What the engines can take is known here; a request must fit both.
    context = min(engine.max_context_token_count for engine in engines.values())
    return build(
        RouterConfig,
        {"max_context_token_count": context, **table},
        "router",
        given={"model_dir": str(model.directory), "model_name": model.name},
        given_from=ROUTER_KEYS_FROM_ELSEWHERE,
    )


def _check_simulated(engine: EngineConfig, table: Mapping[str, Any], where: str) -> None:
    if engine.kind == "simulated":
        try:
            SimConfig.from_engine_config(engine, engine_id=where, overrides=table)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}.{error}") from error
    elif table:
        raise ConfigError(f"{where}: only an engine of kind simulated has these; set kind or take the table out")


def _check_together(config: FleetConfig) -> None:
    prefill, decode = config.pools[Role.PREFILL], config.pools[Role.DECODE]
    if decode.count == 0:
        raise ConfigError("decode.count: is 0; without a decode worker nothing can be generated, give at least 1")
    engines = [config.engines[role] for role in Role if config.pools[role].count]
    pull_timeout_s = max(engine.pull_timeout_s for engine in engines)
    if config.router.gap_timeout_s <= pull_timeout_s:
        raise ConfigError(
            f"router.gap_timeout_s: is {config.router.gap_timeout_s:g}, not above engine.pull_timeout_s "
            f"({pull_timeout_s:g}); a pull that hangs would be taken for an engine that does, so raise it"
        )
    for key in ("kind", "device", "dtype", "block_token_count"):
        values = {getattr(engine, key) for engine in engines}
        if len(values) > 1:
            raise ConfigError(
                f"prefill.engine.{key} and decode.engine.{key} differ ({', '.join(map(str, sorted(values)))}); KV "
                "moves only between engines that agree on it"
            )
    taken = _router_ports(config)
    for role in Role:
        pool = config.pools[role]
        for key in ("port", "metrics_port", "side_channel_port"):
            first = getattr(pool, key)
            for port in range(first, first + pool.count) if first else ():
                _take(taken, port, f"{role.value}.{key}")
    if prefill.count and bool(prefill.cores) != bool(decode.cores):
        raise ConfigError("cores: give it for both roles or for neither; otherwise they would be dealt out twice")


def _router_ports(config: FleetConfig) -> dict[int, str]:
    """Every port that a router listens on, and whose it is. Raises ``ConfigError`` for one that two would have."""
    taken: dict[int, str] = {}
    for index in range(config.cluster.router_count):
        which = f" of router {index} (cluster.router_count)" if index else ""
        try:
            router = router_at(config.router, index)
        except RouterConfigError as error:
            raise ConfigError(f"cluster.router_count: router {index} would have no port: {error}") from error
        for key in ("listen_address", "admin_address", "metrics_address"):
            port = int(getattr(router, key).rpartition(":")[2])
            if port:
                _take(taken, port, f"router.{key}{which}")
    return taken


def _take(taken: dict[int, str], port: int, key: str) -> None:
    if port in taken:
        raise ConfigError(f"{key}: port {port} is given to {taken[port]} already; set one of them to another port")
    taken[port] = key


def _plain(config: FleetConfig) -> dict[str, Any]:
    return {
        "cluster": asdict(config.cluster),
        "model": asdict(config.model),
        "router": asdict(config.router),
        **{
            role.value: {
                "pool": asdict(config.pools[role]),
                "engine": asdict(config.engines[role]),
                "simulated": dict(config.simulated[role]),
            }
            for role in Role
        },
    }


def _is_host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536


def _whole(key: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{key}: is {value!r}; give a whole number between {low} and {high}")


def _number(key: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{key}: is {value!r}; give a number between {low:g} and {high:g}")

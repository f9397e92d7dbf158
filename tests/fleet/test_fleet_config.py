"""The TOML file: what is accepted, and what each refusal says."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from baton.request import Role
from engine.config import EngineConfig
from fleet.config import (
    ENGINE_KEYS_FROM_ELSEWHERE,
    ROUTER_KEYS_FROM_ELSEWHERE,
    ClusterConfig,
    FleetConfig,
    ModelConfig,
    PoolConfig,
    RayConfig,
    check_model_directory,
    load_config,
    parse_config,
)
from fleet.members import members_of
from fleet.toml_table import ConfigError
from fleet.worker_process import engine_config, read_config
from router.config import RouterConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SECRET = b"s" * 32

MINIMAL = """
[model]
name = "tiny"
path = "/models/tiny"
[prefill.engine]
kv_cache_bytes = 1073741824
[decode.engine]
kv_cache_bytes = 1073741824
"""


def with_lines(table: str, *lines: str) -> str:
    """``MINIMAL`` with more lines in a table."""
    header = f"[{table}]"
    body = "\n".join(lines)
    if header in MINIMAL:
        return MINIMAL.replace(header, f"{header}\n{body}")
    return f"{MINIMAL}\n{header}\n{body}\n"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    return str(caught.value)


def documented_keys() -> list[tuple[str, str, bool]]:
    tables: list[tuple[str, type, set[str]]] = [
        ("cluster", ClusterConfig, {"ray"}),
        ("cluster.ray", RayConfig, set()),
        ("model", ModelConfig, set()),
        ("router", RouterConfig, set(ROUTER_KEYS_FROM_ELSEWHERE)),
        ("prefill", PoolConfig, set()),
        ("prefill.engine", EngineConfig, set(ENGINE_KEYS_FROM_ELSEWHERE)),
    ]
    return [
        (table, field.name, field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
        for table, cls, elsewhere in tables
        for field in dataclasses.fields(cls)
        if field.name not in elsewhere
    ]


def section(text: str, table: str) -> str:
    found = re.search(rf"^\[{re.escape(table)}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"baton.toml has no table [{table}]"
    return found[1]


@pytest.mark.parametrize(("table", "key", "is_required"), documented_keys())
def test_every_key_stands_in_the_example_with_a_comment_above_it(table: str, key: str, is_required: bool) -> None:
    lines = section((DEPLOY / "baton.toml").read_text(encoding="utf-8"), table).splitlines()
    at = [i for i, line in enumerate(lines) if re.match(rf"(# )?{key} = ", line)]
    assert len(at) == 1, f"[{table}] {key} stands {len(at)} times in baton.toml"
    comment = lines[at[0] - 1]
    is_comment = comment.startswith("# ") and not re.match(r"# \w+ = ", comment)
    assert is_comment, f"[{table}] {key} has no comment"
    if is_required:
        assert not lines[at[0]].startswith("#"), f"[{table}] {key} has no default and must be set"


def test_the_defaults_shown_in_the_example_are_the_defaults() -> None:
    text = (DEPLOY / "baton.toml").read_text(encoding="utf-8")
    shown = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    assert shown != text
    assert parse_config(shown).fingerprint == parse_config(text).fingerprint


def test_the_example_mentions_no_key_that_does_not_exist() -> None:
    text = (DEPLOY / "baton.toml").read_text(encoding="utf-8")
    tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE))  # each line that looks like a key is one


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("baton*.toml")), ids=lambda file: file.name)
def test_every_example_is_accepted_and_names_its_members(file: Path) -> None:
    config = load_config(file)
    names = [member.name for member in members_of(config, SECRET)]
    assert names[0] == "router"
    assert len(names) == 1 + sum(config.pools[role].count for role in Role)


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("baton*.toml")), ids=lambda file: file.name)
def test_what_a_worker_is_told_makes_the_very_engine_that_was_configured(file: Path) -> None:
    config = load_config(file)
    by_the_worker: dict[str, Any] = {"cores": (), "side_channel_host": "127.0.0.1", "side_channel_port": 5600}
    for member in members_of(config, SECRET)[1:]:
        told = read_config(member.child.arguments[1])
        made = engine_config(told, available_cores=tuple(range(64)))
        assert member.role is not None
        assert dataclasses.replace(made, **by_the_worker) == dataclasses.replace(
            config.engines[member.role], **by_the_worker
        )


def test_an_unknown_key_is_refused_by_name_with_the_nearest_known_one() -> None:
    assert "unknown key 'prefill.cuont': did you mean 'count'?" in refusal(with_lines("prefill", "cuont = 1"))
    assert "'prefill.engine.kv_cache_byte': did you mean 'kv_cache_bytes'?" in refusal(
        with_lines("prefill.engine", "kv_cache_byte = 1")
    )
    assert "unknown key 'decoder'" in refusal(with_lines("decoder", "count = 1"))
    assert "router.listen_adress" in refusal(with_lines("router", 'listen_adress = "127.0.0.1:1"'))
    assert "cluster.ray.adress" in refusal(with_lines("cluster.ray", 'adress = ""'))


def test_all_unknown_keys_of_a_table_are_named_at_once() -> None:
    said = refusal(with_lines("prefill", "cuont = 1", "coers = 1"))
    assert "prefill.cuont" in said
    assert "prefill.coers" in said


@pytest.mark.parametrize(
    ("table", "line", "expected"),
    [
        ("prefill", 'count = "1"', "prefill.count must be a whole number, not a string"),
        ("prefill", "count = true", "prefill.count must be a whole number, not a boolean"),
        ("prefill", "count = 1.5", "prefill.count must be a whole number, not a number"),
        ("prefill", "cores = [0]", "prefill.cores[0] must be a list"),
        ("prefill", "env = 3", "prefill.env must be a table"),
        ("cluster", "name = 3", "cluster.name must be a string"),
        ("cluster", 'runner = "slurm"', "cluster.runner must be one of 'ray', 'local'"),
        ("decode", "resources = {a = 'x'}", "decode.resources.a must be a number"),
        ("router", "queue_limit = 1.5", "router.queue_limit must be a whole number"),
    ],
)
def test_a_wrong_type_is_refused_with_its_key(table: str, line: str, expected: str) -> None:
    assert expected in refusal(with_lines(table, line))


@pytest.mark.parametrize(
    ("table", "line", "expected"),
    [
        ("prefill", "count = -1", "prefill.count: is -1; give a whole number between 0 and 256"),
        ("decode", "count = 0", "decode.count: is 0"),
        ("prefill", "cores_per_worker = 0", "prefill.cores_per_worker: is 0"),
        ("prefill", "metrics_port = 80", "prefill.metrics_port: is 80; give a whole number between 1024 and"),
        ("cluster", "stop_deadline_s = 0", "cluster.stop_deadline_s: is 0.0"),
        ("cluster", "start_deadline_s = nan", "cluster.start_deadline_s: is nan"),
        ("cluster.ray", "object_store_bytes = 1", "cluster.ray.object_store_bytes: is 1"),
        ("cluster.ray", 'address = "head"', "cluster.ray.address: is 'head'"),
        ("router", "queue_limit = -1", "router.queue_limit is -1; must be 0 to"),
        ("router", "gap_timeout_s = 10", "router.gap_timeout_s: is 10, not above engine.pull_timeout_s (10)"),
        ("router", 'listen_address = "0.0.0.0:50051"', "allow_non_loopback"),
        ("prefill.engine", 'dtype = "int4"', "prefill.engine.dtype: is 'int4'"),
        ("prefill.engine", "block_token_count = 100", "needs a multiple of 32"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_bounds(table: str, line: str, expected: str) -> None:
    assert expected in refusal(with_lines(table, line))


def test_a_key_that_belongs_elsewhere_is_sent_there() -> None:
    assert "prefill.engine.model_path cannot be set here: set model.path" in refusal(
        with_lines("prefill.engine", 'model_path = "/x"')
    )
    assert "router.model_dir cannot be set here: set model.path" in refusal(with_lines("router", 'model_dir = "/x"'))
    assert "use cluster.secret_file" in refusal(with_lines("prefill", 'env = {BATON_CLUSTER_SECRET = "x"}'))


def test_engines_that_cannot_exchange_kv_are_refused() -> None:
    assert "prefill.engine.dtype and decode.engine.dtype differ" in refusal(
        with_lines("prefill.engine", 'dtype = "float32"')
    )


def test_one_port_cannot_be_given_twice() -> None:
    text = with_lines("prefill", "count = 2", "metrics_port = 9410") + "\n[decode]\nmetrics_port = 9411\n"
    assert "decode.metrics_port: port 9411 is given to prefill.metrics_port already" in refusal(text)


def test_routers_are_given_no_port_of_each_other_or_of_a_worker() -> None:
    """Each further router's ports are counted up, and reach those of the workers some day."""
    workers = ("prefill", "metrics_port = 9410")
    parse_config(with_lines(*workers) + "\n[cluster]\nrouter_count = 10\n")
    text = with_lines(*workers) + "\n[cluster]\nrouter_count = 11\n"
    said = refusal(text)
    assert "prefill.metrics_port: port 9410 is given to router.metrics_address of router 10" in said
    assert "set one of them to another port" in said
    for line, count, key in (
        ('metrics_address = "127.0.0.1:50051"', 1, "router.metrics_address: port 50051"),
        (
            'admin_address = "127.0.0.1:50061"',
            2,
            "router.listen_address of router 1 (cluster.router_count): port 50061",
        ),
        ('listen_address = "127.0.0.1:65530"', 2, "cluster.router_count: router 1 would have no port"),
    ):
        assert key in refusal(with_lines("router", line) + f"\n[cluster]\nrouter_count = {count}\n")
    parse_config(with_lines("router", 'listen_address = "127.0.0.1:0"', 'admin_address = "127.0.0.1:0"'))


def test_settings_of_the_simulator_are_checked_and_only_it_has_them() -> None:
    assert "prefill.simulated" in refusal(with_lines("prefill.simulated", "start_s = 1.0"))
    both = MINIMAL.replace("kv_cache_bytes", 'kind = "simulated"\nkv_cache_bytes')
    parse_config(both + "\n[prefill.simulated]\nstart_s = 1.0\n")
    with pytest.raises(ConfigError, match=r"prefill\.simulated\.strat_s"):
        parse_config(both + "\n[prefill.simulated]\nstrat_s = 1.0\n")


def test_a_missing_table_file_or_syntax_error_says_so(tmp_path: Path) -> None:
    assert "[model] is required" in refusal("[prefill]\ncount = 1\n")
    assert "prefill.engine.kv_cache_bytes is required" in refusal('[model]\nname = "a"\npath = "/b"\n')
    assert "not valid TOML" in refusal("[model\n")
    with pytest.raises(ConfigError, match=r"no configuration file .*deploy/baton\.toml"):
        load_config(tmp_path / "none.toml")


def test_a_missing_model_says_how_to_make_it() -> None:
    with pytest.raises(ConfigError, match="make model"):
        check_model_directory(parse_config(MINIMAL))


def test_the_secret_is_in_no_argument_and_no_repr() -> None:
    for member in members_of(parse_config(MINIMAL), SECRET):
        assert member.child.env["BATON_CLUSTER_SECRET"] == SECRET.hex()
        assert SECRET.hex() not in " ".join(member.child.arguments)
        assert SECRET.hex() not in repr(member)


def test_cores_are_dealt_out_in_order_prefill_first() -> None:
    text = with_lines("prefill", "count = 2", "cores_per_worker = 2") + "\n[decode]\ncount = 1\n"
    slots = [_argument(member, "core_slots") for member in members_of(parse_config(text), SECRET)[1:]]
    assert slots == [[0, 1], [2, 3], [4]]


def test_any_changed_value_changes_the_fingerprint_of_the_members_it_concerns() -> None:
    def fingerprints(config: FleetConfig) -> dict[str, str]:
        return {member.name: member.child.fingerprint for member in members_of(config, SECRET)}

    before = fingerprints(parse_config(MINIMAL))
    after = fingerprints(parse_config(with_lines("decode.engine", "max_running_count = 4")))
    assert before["prefill-0"] == after["prefill-0"]
    assert before["decode-0"] != after["decode-0"]


def _argument(member: object, key: str) -> object:
    import json

    return json.loads(member.child.arguments[1])[key]  # type: ignore[attr-defined]

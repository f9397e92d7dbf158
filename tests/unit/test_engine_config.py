"""An engine's configuration is refused before it costs a process, with the key and the fix."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from engine import environment
from engine.config import EngineConfig
from engine.environment import engine_environment, put_in_force
from kvtransfer.side_channel import KEY_VARIABLE

GOOD = EngineConfig(model_path="/models/small", model_name="small", kv_cache_bytes=64 << 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "magic"},
        {"device": "tpu"},
        {"dtype": "int3"},
        {"model_name": ""},
        {"model_path": ""},
        {"kv_cache_bytes": 0},
        {"kv_cache_bytes": True},
        {"block_token_count": 100},
        {"max_context_token_count": 1},
        {"max_running_count": 0},
        {"max_batched_token_count": 8, "max_running_count": 9},
        {"cores": (0, 0)},
        {"cores": (-1,)},
        {"peer_hosts": ("",)},
        {"side_channel_host": ""},
        {"side_channel_port": 0},
        {"side_channel_port": 65_536},
        {"lease_s": 0.0},
        {"lease_s": float("nan")},
        {"seed": -1},
        {"extra_args": {"enable_log_requests": True}},
        {"extra_args": {"max_model_len": 64}},
    ],
    ids=lambda wrong: ",".join(f"{key}={value}" for key, value in wrong.items()),
)
def test_a_wrong_value_is_refused_with_its_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(GOOD, **wrong)


def test_a_simulated_engine_needs_no_model_and_any_block_size() -> None:
    config = EngineConfig(kind="simulated", model_name="sim", kv_cache_bytes=1 << 20, block_token_count=16)
    assert config.model_path == ""


def test_lists_of_a_configuration_file_become_values_that_do_not_change() -> None:
    extra = {"max_logprobs": 5}
    config = replace(GOOD, cores=[0, 1], extra_args=extra)  # type: ignore[arg-type]
    extra["max_logprobs"] = 6
    assert config.cores == (0, 1)
    assert config.extra_args == {"max_logprobs": 5}


def test_configuration_imports_without_an_engine() -> None:
    banned = "{'vllm', 'torch', 'ray', 'grpc', 'nixl'}"
    code = f"import engine.config, engine.environment, sys; sys.exit(bool({banned} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_on_cpu_gets_a_thread_per_core_and_no_way_out_of_the_machine() -> None:
    variables = engine_environment(replace(GOOD, cores=(3, 5)))
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["HF_HUB_OFFLINE"] == variables["VLLM_NO_USAGE_STATS"] == variables["DO_NOT_TRACK"] == "1"
    assert "OMP_NUM_THREADS" not in engine_environment(replace(GOOD, device="cuda"))


@pytest.mark.parametrize(
    ("asked", "is_expected"),
    [
        ({"transports": ("tcp",)}, True),
        ({"side_channel_host": "10.0.0.1"}, True),
        ({"side_channel_host": "10.0.0.1", "transports": ("rc",)}, False),
        ({}, False),
    ],
)
def test_reads_over_tcp_are_answered_in_large_messages_unless_somebody_said_otherwise(
    asked: dict[str, Any], is_expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    variables = engine_environment(replace(GOOD, **asked))
    assert names & variables.keys() == (names if is_expected else set())
    monkeypatch.setenv("UCX_TCP_RX_SEG_SIZE", "64k")  # a half of ours with a half of theirs may not fit together
    assert not names & engine_environment(replace(GOOD, **asked)).keys()


def test_two_engines_of_a_process_cannot_ask_for_different_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.environment._in_force", {})
    for name in ("BATON_TEST_A", "BATON_TEST_B", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "before")
    put_in_force({"BATON_TEST_A": "1"})
    put_in_force({"BATON_TEST_A": "1", "BATON_TEST_B": "2"})
    with pytest.raises(ValueError, match="BATON_TEST_A"):
        put_in_force({"BATON_TEST_A": "3"})


def test_a_key_inherited_from_the_starting_process_gives_way_and_a_second_one_of_ours_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker started by a process that itself ran engines inherits the key of those."""
    monkeypatch.setattr(environment, "_handed_down", "")
    monkeypatch.setenv(KEY_VARIABLE, "aa" * 32)
    environment.hand_down_key(b"b" * 32)
    assert os.environ[KEY_VARIABLE] == (b"b" * 32).hex()
    environment.hand_down_key(b"b" * 32)
    with pytest.raises(ValueError, match="one cluster"):
        environment.hand_down_key(b"c" * 32)

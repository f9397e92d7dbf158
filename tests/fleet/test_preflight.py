"""What is refused before anything is started, and what the refusal tells one to do."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_fleet import simulated_config

from fleet import commands, preflight
from fleet.config import load_config
from fleet.preflight import CannotStart
from fleet.state_dir import FleetRecord, StateDir, process_start
from fleet.supervisor import AlreadyRunning
from fleet.toml_table import ConfigError

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_a_port_in_use_is_named_with_its_key(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = simulated_config(tmp_path)
        config = replace(config, router=replace(config.router, admin_address=f"127.0.0.1:{port}"))
        with pytest.raises(CannotStart, match=rf"port {port} is in use \(router\.admin_address\)"):
            preflight.check(config)


def test_a_processor_without_the_needed_instructions_is_refused_for_real_engines_only(tmp_path: Path) -> None:
    with pytest.raises(CannotStart, match="AVX2"):
        preflight.check_cpu(load_config(DEPLOY / "baton.toml"), frozenset({"sse2"}))
    preflight.check_cpu(load_config(DEPLOY / "baton.toml"), frozenset({"avx2"}))
    preflight.check_cpu(simulated_config(tmp_path), frozenset({"sse2"}))


def test_too_little_memory_is_refused_before_a_model_is_loaded() -> None:
    config = load_config(DEPLOY / "baton.toml")
    with pytest.raises(CannotStart, match="lower kv_cache_bytes"):
        preflight.check_memory(config, 1 << 30)
    preflight.check_memory(config, 64 << 30)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        preflight.check(config)


def test_a_file_of_tls_that_cannot_be_used_is_told_before_anything_is_started(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    router = replace(
        config.router, tls_certificate_path=str(tmp_path / "c.pem"), tls_key_path=str(tmp_path / "k.pem")
    )
    with pytest.raises(ConfigError, match=r"router\.tls_certificate_path: cannot read .*c\.pem"):
        preflight.check(replace(config, router=router))


def test_the_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    secret = state.secret()
    assert len(secret) == 32
    assert state.secret() == secret
    file = tmp_path / "state" / "secret"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        state.secret()


def test_a_secret_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    with pytest.raises(ConfigError, match="there is no file"):
        state.secret(str(tmp_path / "none"))
    (tmp_path / "short").write_text("abcd")
    with pytest.raises(ConfigError, match="holds 2 bytes"):
        state.secret(str(tmp_path / "short"))


def _record(pid: int, start: str, family: list[list[object]] | None = None) -> FleetRecord:
    return FleetRecord("test", "local", "x.toml", pid, start, "127.0.0.1:1", "127.0.0.1:2", family=family or [])


def test_a_running_fleet_is_not_started_twice_and_a_dead_ones_record_does_not_count(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    state = StateDir(config.state_path)
    state.write_record(_record(os.getpid(), process_start(os.getpid())))
    with pytest.raises(AlreadyRunning, match="baton down"):
        commands.refuse_running(config)
    state.write_record(_record(os.getpid(), "1"))  # the number was reused by another process
    commands.refuse_running(config)


def test_two_supervisors_cannot_share_a_directory(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    held = state.lock()
    with pytest.raises(BlockingIOError):
        state.lock()
    os.close(held)
    os.close(state.lock())

"""The commands of the README, on the real engine and on Ray, as a person runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PULL_TIMEOUT_S, SILENCE_S, START_S

from bench.real_fleet import free_ports

pytestmark = pytest.mark.real


def config_file(folder: Path, model_path: Path) -> Path:
    """deploy/baton.toml in small: Ray, one prefill and one decode worker, ports of its own; and patient."""
    listen, admin, metrics = free_ports(3)
    file = folder / "baton.toml"
    file.write_text(f"""
        [cluster]
        state_dir = "{folder / "state"}"
        start_deadline_s = {START_S}
        [model]
        name = "smollm2-135m-instruct"
        path = "{model_path}"
        [router]
        listen_address = "127.0.0.1:{listen}"
        admin_address = "127.0.0.1:{admin}"
        metrics_address = "127.0.0.1:{metrics}"
        worker_silence_s = {SILENCE_S}
        gap_timeout_s = {START_S}
        [prefill.engine]
        pull_timeout_s = {PULL_TIMEOUT_S}
        kv_cache_bytes = 268435456
        [decode.engine]
        pull_timeout_s = {PULL_TIMEOUT_S}
        kv_cache_bytes = 268435456
        max_batched_token_count = 512
    """)
    return file


def test_the_demo_answers_shows_the_phases_and_leaves_nothing_running(tmp_path: Path, model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "baton", "demo", "--config", str(config_file(tmp_path, model_path))],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout
    for phase in ("queue", "prefill", "handoff wait", "KV transfer", "decode wait", "decode", "sum"):
        assert re.search(rf"^{phase} +\d", done.stdout, re.MULTILINE), phase
    assert re.search(r"KV transfer +[\d.]+ .*MiB at [\d.]+ [GM]iB/s", done.stdout)
    assert "prefill-0 → decode-0" in done.stdout
    assert "no process of it is left" in done.stdout
    assert not list((tmp_path / "state").glob("fleet.json"))

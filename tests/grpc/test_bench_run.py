"""``baton bench run`` as people run it: a process of its own, against a whole Baton on simulated engines."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sim_cluster import FAST, TOKENIZER, SimCluster, sim_cluster

from baton.__main__ import main
from bench.results.records import Outcome
from bench.results.store import read_run
from engine.cost import CostModel, DecodeCost

SHORT = (
    "--set",
    "message_tokens=constant:20",
    "--set",
    "answer_tokens=constant:8",
    "--set",
    "system_prompt_token_count=16",
)
TOKEN_IDS = ("--token-ids", f"3..{TOKENIZER.vocab_size - 1}")
"""The tiny model's tokenizer has too few words to make prompts of."""
SLOW = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.2))


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "baton", "bench", "run"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def command(cluster: SimCluster, *arguments: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    endpoint = cluster.endpoint
    return started(
        *("--target", f"baton://{endpoint.address}", "--admin", endpoint.admin_address),
        *("--context", "512"),
        *TOKEN_IDS,
        *arguments,
    )


async def outcome(process: asyncio.subprocess.Process, limit_s: float = 60.0) -> tuple[int, str, str]:
    async with asyncio.timeout(limit_s):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_run_is_judged_printed_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with sim_cluster(tmp_path / "model") as cluster:
        arguments = ("--rate", "20", "--duration", "2", *SHORT, "--out", str(directory), "--label", "simulated")
        async with command(cluster, *arguments) as process:
            code, out, err = await outcome(process)
    data = read_run(directory)
    # Whether this machine kept the schedule meanwhile is not what is tested.
    assert code == (0 if data.facts["valid"] else 1), err
    assert data.is_complete
    assert len(data.records) == data.facts["plan"]["request_count"] > 10
    assert {record.outcome for record in data.records} == {Outcome.OK}
    assert {record.output_token_count for record in data.records} == {8}
    assert {sample.source for sample in data.samples} == {"prefill-0", "decode-0", "router"}
    assert data.facts["worker_counts"] == {"decode": 1, "prefill": 1}
    assert (data.facts["label"], data.facts["model"], data.facts["loop"]) == ("simulated", "tiny", "open")
    assert data.facts["machine"]["during"]["context_switch_count"] > 0
    for words in ("TTFT", "ITL, messages", "kv_transfer", "goodput", "chatbot", "schedule lag", str(directory)):
        assert words in out
    assert "<html" in (directory / "report.html").read_text(encoding="utf-8")


async def test_a_sweep_has_a_directory_a_rate(tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    async with sim_cluster(tmp_path / "model") as cluster:
        arguments = (
            "--rates",
            "10,20",
            "--seed",
            "7",
            "--duration",
            "1",
            *SHORT,
            "--out",
            str(directory),
            "--json",
            "--quiet",
        )
        async with command(cluster, *arguments) as process:
            code, out, err = await outcome(process)
    assert code in (0, 1)
    assert err == ""
    summaries: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    plans = [read_run(directory / name).facts["plan"] for name in ("rate-10", "rate-20")]
    assert [plan["rate_per_s"] for plan in plans] == [10, 20]
    assert [plan["seed"] for plan in plans] == [7, 8], "the second finds no prompt of the first in a cache"
    assert [summary["workload"] for summary in summaries] == ["chat", "chat"]
    assert (directory / "report.html").is_file()


async def test_an_interrupted_run_is_kept_and_marked(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with sim_cluster(tmp_path / "model", sim={"cost": SLOW}) as cluster:
        arguments = ("--rate", "20", "--duration", "60", *SHORT, "--out", str(directory), "--quiet")
        async with command(cluster, *arguments) as process:
            await cluster.until(lambda: cluster.server.generation.call_count > 5, "requests in flight")
            process.send_signal(signal.SIGINT)
            code, _, err = await outcome(process)
    assert code == 130
    assert "interrupted" in err
    data = read_run(directory)
    assert data.is_complete
    assert data.facts["valid"] is False
    assert any("interrupted" in reason for reason in data.facts["invalid_reasons"])
    assert any(record.error == "interrupted" for record in data.records)


async def test_a_run_in_which_nothing_succeeds_fails(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with sim_cluster(tmp_path / "model") as cluster:
        too_long = ("--set", "message_tokens=constant:4000", "--context", "8192")  # twice what the model takes
        arguments = ("--rate", "10", "--duration", "1", *too_long, "--out", str(directory), "--quiet")
        async with command(cluster, *arguments) as process:
            code, out, _ = await outcome(process)
    assert code == 1
    assert "No request succeeded." in out
    assert "INVALID_ARGUMENT/PROMPT_TOO_LONG" in out
    assert {record.outcome for record in read_run(directory).records} == {Outcome.REFUSED}


async def test_nobody_there_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path / "model") as cluster:
        for target, words in (
            ("http://127.0.0.1:9", "nothing that lists models answers at http://127.0.0.1:9"),
            (f"http://{cluster.endpoint.metrics_address}", "nothing that lists models"),
        ):
            async with started("--target", target, *TOKEN_IDS, "--out", str(tmp_path / "x")) as process:
                code, out, err = await outcome(process)
            assert (code, out) == (3, "")
            assert words in err
    assert not (tmp_path / "x").exists()


def test_a_wrong_command_line_says_what_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--workload", "nonsense"), "no workload is called 'nonsense'"),
        (("--set", "nonsense"), "NAME=VALUE is expected"),
        (("--slo", "nonsense"), "chatbot"),
        (("--slo-scale", "0"), "above 0"),
        (("--target", "ftp://x"), "baton://host:port or http://host:port is expected"),
        (("--target", "baton://x"), "a host and a port"),
        (("--target", "http://127.0.0.1:9", "--dialect", "nonsense"), "llamacpp"),
        (("--target", "http://127.0.0.1:9", "--dialect", "tgi"), "drop --token-ids"),
        (("--target", "http://127.0.0.1:9", "--api-key-env", "BATON_TEST_NO_SUCH_KEY"), "is not set"),
        (("--token-ids", "5"), "LOW..HIGH"),
        (("--rates", "1,1"), "different rates"),
        (("--rates", "one"), "numbers with commas"),
        (("--pacer", "ramp:1..2", "--rate", "3"), "has no one rate"),
        (("--until-saturated",), "--rates"),
        (("--trace", str(tmp_path / "none")), "none"),
        (("--trace", str(tmp_path / "none"), "--rate", "2"), "--trace-rate"),
    ):
        code = main(["bench", "run", *TOKEN_IDS, *arguments])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), (arguments, err)
        assert words in err, (arguments, err)


def test_without_a_tokenizer_it_says_how_to_name_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "run", "--tokenizer", str(tmp_path)]) == 2
    assert "--tokenizer names the folder" in capsys.readouterr().err

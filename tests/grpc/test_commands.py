"""The baton command as people run it: a process of its own, against a whole Baton on simulated engines."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from sim_cluster import FAST, TOKENIZER, SimCluster, sim_cluster

from baton.testing import FakeBaton
from engine.cost import CostModel, DecodeCost

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
"""What a terminal is told to show another screen, and the one before it."""
ON_ITS_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on its Ctrl-C is ours
os.execv(sys.executable, [sys.executable, "-m", "baton", *sys.argv[1:]])
"""
SLOW = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.05))


def command(*arguments: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    return started(sys.executable, "-m", "baton", *arguments)


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    async with command(*arguments) as process, asyncio.timeout(60):
        out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


def at(cluster: SimCluster) -> tuple[str, str]:
    return "--address", cluster.endpoint.address


async def test_generate_prints_the_text_and_the_phases(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("generate", "hi", "--max-tokens", "12", "--phases", *at(cluster))
        assert (code, out.count("\n")) == (0, 1)
        for words in ("KV transfer", "sum", "time to first token", "prefill-0 → decode-0", "12 out"):
            assert words in err


@pytest.mark.parametrize("flags", [(), ("--json",)])
async def test_a_character_that_the_output_cannot_carry_does_not_end_the_answer(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with FakeBaton() as fake:
        fake.will_answer("Gr", "\u00fc\u00df", " \U0001f600", " end")
        code, out, err = await run("generate", "hi", *flags, "--address", fake.address)
    assert (code, err) == (0, "")
    if flags:
        events = [json.loads(line) for line in out.splitlines()]
        assert (
            "".join(event.get("text", "") for event in events if event["event"] == "chunk")
            == "Gr\u00fc\u00df \U0001f600 end"
        )
    else:
        assert out == "Gr\\xfc\\xdf \\U0001f600 end\n"


async def test_the_python_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(example.strip().splitlines()) <= 10
    async with sim_cluster(tmp_path) as cluster:
        program = example.replace("127.0.0.1:50051", cluster.endpoint.address)
        assert program != example
        async with started(sys.executable, "-c", program) as process, asyncio.timeout(60):
            out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert re.search(r"\n\d+ tokens in \d+\.\d\d s\n$", out.decode())


async def test_a_chat_survives_what_cannot_be_sent(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("chat", "--timeout", "0", *at(cluster), stdin="one\ntwo\n")
        assert (code, out, err.count("timeout must be positive")) == (2, "", 2)


async def test_the_wrong_port_is_said_to_be_one(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, _, err = await run("generate", "hi", "--address", cluster.endpoint.admin_address)
        assert (code, err.count("\n")) == (1, 1)
        assert "is this the right port?" in err


async def test_generate_as_json_is_one_event_per_line_and_adds_up(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, _ = await run(
            "generate", "-", "--raw", "--json", "--max-tokens", "9", *at(cluster), stdin="hi there"
        )
        events = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert [events[0]["event"], events[-1]["event"]] == ["started", "finished"]
        ids = [token_id for event in events[1:-1] for token_id in event["token_ids"]]
        assert len(ids) == 9
        assert "".join(event.get("text", "") for event in events) == TOKENIZER.decode(ids)
        phases = events[-1]["phases"]
        names = ("queue_s", "prefill_s", "handoff_wait_s", "kv_transfer_s", "decode_wait_s", "decode_s")
        assert abs(sum(phases[name] for name in names) - phases["total_s"]) < 1e-9


async def test_generate_takes_every_mode_and_prints_logprobs_under_the_answer(tmp_path: Path) -> None:
    schema = tmp_path / "answer.json"
    schema.write_text('{"type": "object"}')
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run(
            *(
                "generate",
                "hi",
                "--max-tokens",
                "6",
                "--min-tokens",
                "6",
                "--logprobs",
                "2",
                "--seed",
                "3",
                "--ignore-eos",
            ),
            *("--temperature", "0.5", "--presence-penalty", "1", "--frequency-penalty", "-1", "--tenant", "blue"),
            *("--repetition-penalty", "1.5", "--stop-token-id", "200", *at(cluster)),
        )
        assert (code, out.count("\n")) == (0, 1)
        table = err.splitlines()
        assert table[0].split()[:3] == ["id", "logprob", "rank"]
        assert [line.split()[0] for line in table[1:]] == ["0", "1", "2", "3", "4", "5", "sum"]
        code, out, err = await run("generate", "hi", "--max-tokens", "6", "--json-schema", str(schema), *at(cluster))
        assert (code, err) == (0, "")
        code, _, err = await run("generate", "hi", "--regex", "a", "--min-tokens", "1", *at(cluster))
        assert (code, err.count("\n")) == (2, 1)
        assert "stop.min_output_token_count" in err


async def test_errors_are_one_line_with_the_exit_code_of_their_kind(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster:
        for arguments, expected_code, word in (
            (["generate", "hi", "--temperature", "9"], 2, "sampling.temperature"),
            (["generate", "hi", "--model", "gpt-9"], 2, "gpt-9"),
            (["generate", "", "--raw"], 2, "prompt"),
            (["generate", "hi", "--timeout", "0.4"], 4, "deadline"),
        ):
            code, _, err = await run(*arguments, *at(cluster))
            assert (code, err.count("\n")) == (expected_code, 1), err
            assert word in err


async def test_an_interrupt_ends_generate_with_130_and_frees_everything(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster,
        command("generate", "hi", *at(cluster)) as process,
        asyncio.timeout(60),
    ):
        assert process.stdout is not None
        await process.stdout.read(1)
        with cluster.standing():
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            await cluster.until_balanced()


async def test_an_interrupt_in_a_chat_cancels_the_answer_and_not_the_program(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster:
        async with command("chat", *at(cluster), "--max-tokens", "400") as process, asyncio.timeout(60):
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write(b"first\n")
            await process.stdout.read(1)
            with cluster.standing():
                process.send_signal(signal.SIGINT)
                while b"cancelled" not in await process.stderr.readline():
                    pass
                await cluster.until_balanced()
            process.stdin.write(b"second\n")
            await process.stdin.drain()
            await cluster.until(lambda: cluster.server.generation.call_count == 1, "a second answer")
            cluster.set_cost(FAST)
            process.stdin.close()  # Ctrl-D
            await process.stdout.read()
            assert await process.wait() == 0
        assert cluster.server.generation.ended_count == 2


async def test_top_prints_a_frame_and_health_says_serving(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, _ = await run("top", "--once", *at(cluster))
        assert code == 0
        for words in ("decode-0", "prefill-0", "ready", "KV transfer", "serving"):
            assert words in out
        assert await run("health", *at(cluster)) == (0, "serving\n", "")
        cluster.set_workers()
        code, _, err = await run("health", *at(cluster))
        assert code == 3
        assert "not serving" in err


async def test_ctrl_c_leaves_the_live_display_of_top_and_gives_the_terminal_back(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        screen = b""

        async def shown(words: bytes) -> None:
            nonlocal screen
            while words not in screen:
                screen += await asyncio.to_thread(os.read, ours, 65_536)

        ours, theirs = os.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ON_ITS_TERMINAL, "top", "--interval", "0.1", *at(cluster)),
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "140", "LINES": "50"},
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(60):
                    await shown(ENTER_SCREEN)
                    await shown(b"decode-0")
                    os.write(ours, b"\x03")
                    await shown(LEAVE_SCREEN)
                    assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert b"Traceback" not in screen
        finally:
            os.close(theirs)
            os.close(ours)


async def test_top_and_health_as_json_are_objects_a_line(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("top", "--once", "--json", *at(cluster))
        (status,) = map(json.loads, out.splitlines())
        assert (code, err, status["event"], status["is_serving"]) == (0, "", "status", True)
        assert [worker["worker_id"] for worker in status["workers"]] == ["decode-0", "prefill-0"]
        async with command("top", "--json", "--interval", "0.1", *at(cluster)) as process, asyncio.timeout(60):
            assert process.stdout is not None
            for _ in range(3):
                assert json.loads(await process.stdout.readline())["event"] == "status"
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
        code, out, _ = await run("health", "--json", *at(cluster))
        assert (code, json.loads(out)["is_serving"]) == (0, True)
        cluster.set_workers()
        code, out, err = await run("health", "--json", *at(cluster))
        assert (code, json.loads(out)["is_serving"], err.count("\n")) == (3, False, 1)


async def test_models_are_listed_with_their_limits(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("models", *at(cluster))
        assert (code, out.splitlines()[0], err) == (0, "tiny", "")
        assert "2048 tokens" in out
        code, out, _ = await run("models", "tiny", "--json", *at(cluster))
        assert (code, json.loads(out)["max_context_token_count"]) == (0, 2048)
        code, out, err = await run("models", "gpt-9", "--json", *at(cluster))
        assert (code, json.loads(out)["reason"], err.count("\n")) == (2, "MODEL_NOT_FOUND", 1)


async def test_a_failure_as_json_is_the_last_line_and_the_exit_code(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("generate", "hi", "--json", "--temperature", "9", *at(cluster))
        error = json.loads(out.splitlines()[-1])
        assert (code, error["event"], error["reason"], err.count("\n")) == (2, "error", "INVALID_REQUEST", 1)
        assert error["violations"][0]["field"] == "sampling.temperature"


async def test_several_samples_are_drawn_and_the_prompt_echoed(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        drawn = ("--samples", "3", "--temperature", "1", "--seed", "5", "--max-tokens", "4")
        code, out, err = await run("generate", "hi", "--raw", *drawn, *at(cluster))
        assert (code, err) == (0, "")
        assert [line for line in out.splitlines() if line.startswith("--- ")] == [f"--- sample {i}" for i in range(3)]
        code, out, err = await run("generate", "hi there", "--raw", "--echo", "--max-tokens", "2", *at(cluster))
        assert (code, err, out.startswith("hi there")) == (0, "", True)


async def test_a_chat_from_a_pipe_answers_each_line_and_says_the_pace_on_stderr(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster:
        code, out, err = await run("chat", "--max-tokens", "5", *at(cluster), stdin="one\n\ntwo\n")
        assert (code, out.count("\n")) == (0, 2)
        assert len(re.findall(r"^\[5 tokens, [0-9.]+ tokens/s, first after \d+ ms; ms: queue ", err, flags=re.M)) == 2
        code, out, err = await run("chat", "--quiet", "--resume", "--max-tokens", "5", *at(cluster), stdin="one\n")
        assert (code, out.count("\n"), err) == (0, 1, "")
        code, out, err = await run("chat", "--json", "--max-tokens", "5", *at(cluster), stdin="one\ntwo\n")
        events = [json.loads(line)["event"] for line in out.splitlines()]
        assert (code, err, events.count("started"), events.count("finished")) == (0, "", 2, 2)
        first, second = (json.loads(line) for line in out.splitlines() if '"started"' in line)
        assert second["prompt_token_count"] > first["prompt_token_count"] + 5, "the history is part of the prompt"


async def test_a_reader_that_leaves_ends_the_answer_and_frees_everything(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster:
        async with command("generate", "hi", "--resume", *at(cluster)) as process, asyncio.timeout(60):
            assert process.stdout is not None
            assert process.stderr is not None
            await process.stdout.read(1)
            process.stdout._transport.close()  # type: ignore[attr-defined]  # what `| head -1` does
            assert await process.wait() == 141  # once there is more to write
            assert await process.stderr.read() == b""
        with cluster.standing():
            await cluster.until_balanced()


async def test_an_interrupted_resumable_answer_does_not_wait_for_its_grace(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster,
        command("generate", "hi", "--resume", *at(cluster)) as process,
        asyncio.timeout(60),
    ):
        assert process.stdout is not None
        await process.stdout.read(1)
        with cluster.standing():
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130
            await cluster.until_balanced()


async def test_every_verb_carries_the_api_key_and_says_when_it_is_missing(tmp_path: Path) -> None:
    key = "a-key-of-ours"
    keys, file = tmp_path / "keys.toml", tmp_path / "key.txt"
    keys.write_text(f'[us]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n', encoding="utf-8")
    file.write_text(key + "\n", encoding="utf-8")
    async with sim_cluster(tmp_path / "model", api_keys_path=str(keys)) as cluster:
        for verb in (("generate", "hi", "--max-tokens", "2"), ("models",), ("top", "--once")):
            code, out, err = await run(*verb, *at(cluster))
            assert (code, out) == (5, ""), (verb, err)
            code, out, err = await run(*verb, "--api-key-file", str(file), *at(cluster))
            assert (code, bool(out)) == (0, True), (verb, err)
        assert (await run("generate", "hi", "--api-key-file", "/nowhere", *at(cluster)))[0] == 2

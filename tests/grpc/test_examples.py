"""The examples of `examples/`, each run as its page says, against a whole Baton on simulated engines."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sim_cluster import FAST, SimCluster, sim_cluster

from baton.client import BatonClient
from baton.request import StopConditions
from deploy.setup import prepare_examples
from deploy.setup.prepare_model import baton_home
from engine.cost import CostModel, DecodeCost

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SLOW = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.02))


@asynccontextmanager
async def started(*arguments: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def run(*arguments: str | Path) -> tuple[int | None, str, str]:
    async with started(*arguments) as process, asyncio.timeout(60):
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()


async def port_of(process: asyncio.subprocess.Process) -> int:
    """From its first line, which says where it listens."""
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(60):
        line = (await process.stdout.readline()).decode()
    found = re.search(r"127\.0\.0\.1:(\d+)", line)
    assert found, line + (await process.stderr.read()).decode()
    return int(found[1])


def test_every_example_has_its_line_on_the_page() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"({path.name})" in page or f"({path.name}/" in page, path.name


# The internal service


@asynccontextmanager
async def summary_service(cluster: SimCluster) -> AsyncIterator[int]:
    command = (sys.executable, EXAMPLES / "summary_service.py", "--baton", cluster.endpoint.address, "--port", "0")
    async with started(*command) as process:
        yield await port_of(process)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 0


async def asked(port: int, *lines: str) -> list[Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        replies = []
        for line in lines:
            writer.write(line.encode() + b"\n")
            async with asyncio.timeout(60):
                replies.append(json.loads(await reader.readline()))
        return replies
    finally:
        writer.close()


async def test_the_service_answers_within_its_callers_deadline_or_says_why_not(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster, summary_service(cluster) as port:
        good, late, wrong, again = await asked(
            port,
            '{"text": "a long text", "timeout_s": 60}',
            '{"text": "a long text", "timeout_s": 0.3}',
            '{"text": "a long text"}',
            '{"text": "another", "timeout_s": 60}',
        )
        assert good["output_token_count"] >= 1
        assert again["summary"]
        assert late["error"]["kind"] == "deadline"
        assert wrong["error"]["kind"] == "invalid"
        strange = await asked(
            port,
            '{"text": "a long text", "timeout_s": NaN}',
            '{"text": "a long text", "timeout_s": "nan"}',
            '{"text": "half a pair: \\ud800", "timeout_s": 20}',
            f'{{"text": "a long text", "timeout_s": 1{"0" * 400}}}',
            "[" * 100_000,
        )
        assert [reply["error"]["kind"] for reply in strange] == ["invalid"] * 5
        async with asyncio.timeout(60):
            await cluster.until_balanced()


async def test_a_caller_of_the_service_that_hangs_up_frees_everything(tmp_path: Path) -> None:
    forever = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=60.0))
    async with sim_cluster(tmp_path, sim={"cost": forever}) as cluster, summary_service(cluster) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b'{"text": "a long text", "timeout_s": 60}\n')
        decoding = cluster.workers["decode-0"].engine
        await cluster.until(lambda: decoding.load().running_count == 1, "a decode of the call")
        writer.close()
        await cluster.until_balanced()


# The batch


async def test_a_batch_answers_what_is_missing_and_waits_when_it_is_told_to(tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    items = [{"id": str(number), "prompt": f"question {number}"} for number in range(12)]
    items[5]["prompt"] = "long " * 4000
    items[7]["prompt"] = "half a pair: \ud800"
    prompts.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    answers.write_text('{"id": "3", "text": "there before"}\n{"id": "4", "te', encoding="utf-8")
    # Two may run and none may wait: of eight at once most are refused with RetryInfo, and come back.
    async with sim_cluster(tmp_path / "model", max_in_flight_count=2, queue_limit=1) as cluster:
        command = (sys.executable, EXAMPLES / "batch.py", prompts, answers, "--address", cluster.endpoint.address)
        code, out, err = await run(*command, "--concurrency", "8", "--max-tokens", "8", "--attempts", "40")
        assert (code, out) == (0, ""), err
        assert "9 answered, 2 refused for good, 0 left, 1 there before" in err
        written = {line["id"]: line for line in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
        assert written.keys() == {item["id"] for item in items}
        assert written["3"]["text"] == "there before"
        assert written["5"]["error"]["reason"] == "PROMPT_TOO_LONG"
        assert written["7"]["error"]["reason"] == "INVALID_REQUEST"
        assert all(line["output_token_count"] >= 1 for key, line in written.items() if key not in ("3", "5", "7"))
        assert cluster.server.generation.failed_count > 1, "nothing was ever refused: the test shows nothing"
        before = answers.read_bytes()
        assert (await run(*command))[0] == 0
        assert answers.read_bytes() == before


async def test_a_batch_leaves_for_the_next_run_what_cannot_be_answered_now(tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"id": "1", "prompt": "hi"}\n', encoding="utf-8")
    command = (sys.executable, EXAMPLES / "batch.py", prompts, answers, "--address", "127.0.0.1:1")
    code, _, err = await run(*command, "--attempts", "1")
    assert (code, answers.read_text(encoding="utf-8")) == (1, "")
    assert "left for the next run" in err


# The chat in the browser


@asynccontextmanager
async def chat_ui(cluster: SimCluster) -> AsyncIterator[httpx.AsyncClient]:
    command = (sys.executable, EXAMPLES / "chat_ui" / "bridge.py", "--baton", cluster.endpoint.address, "--port", "0")
    async with started(*command) as process:
        port = await port_of(process)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as browser:
            yield browser
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await process.wait()


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(block[0].removeprefix("event: "), json.loads(block[1].removeprefix("data: "))) for block in blocks]


async def test_the_bridge_streams_the_answer_as_events_and_serves_its_page(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path) as cluster,
        chat_ui(cluster) as browser,
        BatonClient(cluster.endpoint.address) as client,
    ):
        page = await browser.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        reply = await browser.post("/chat", json={"messages": [{"role": "user", "content": "hi"}]})
        events = events_of(reply.text)
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert {name for name, _ in events[:-1]} == {"token"}
        assert events[-1][0] == "done"
        whole = await client.complete_chat([("user", "hi")], timeout=60)
        assert "".join(data["text"] for name, data in events if name == "token") == whole.text
        assert events[-1][1]["output_token_count"] == whole.usage.output_token_count
        assert (await browser.post("/chat", json={"messages": []})).status_code == 422
        too_long = {"messages": [{"role": "user", "content": "long " * 4000}]}
        ((name, data),) = events_of((await browser.post("/chat", json=too_long)).text)
        assert (name, data["reason"]) == ("error", "PROMPT_TOO_LONG")


async def test_a_browser_that_leaves_ends_its_resumable_generation_at_once(tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "hi"}]}
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster, chat_ui(cluster) as browser:
        with ExitStack() as stood:
            async with browser.stream("POST", "/chat", json=said) as reply:
                async for _ in reply.aiter_text():
                    break
                stood.enter_context(cluster.standing())
            await cluster.until_balanced()  # long before the grace of a resumable generation is over


# Node.js


@pytest.fixture(scope="module")
def node() -> str:
    """The program, once its packages are those of the lock."""
    fault = prepare_examples.fault_of(prepare_examples.EXAMPLE)
    npm = prepare_examples.node_of(baton_home())
    if fault is not None or npm is None:
        pytest.fail(
            f"the Node example cannot run: {fault or 'there is no node'}. Run `make examples`.", pytrace=False
        )
    return npm.node


async def test_node_streams_an_answer_and_lists_models(tmp_path: Path, node: str) -> None:
    async with sim_cluster(tmp_path) as cluster, BatonClient(cluster.endpoint.address) as client:
        at = ("--address", cluster.endpoint.address)
        code, out, err = await run(node, EXAMPLES / "node" / "chat.js", "--max-tokens", "9", *at, "hi")
        stop = StopConditions(max_output_token_count=9)
        whole = await client.complete_chat([("user", "hi")], timeout=60, stop=stop)
        assert (code, out) == (0, whole.text + "\n"), err
        assert "9 out, ended by FINISH_REASON_MAX_OUTPUT_TOKENS" in err
        assert await run(node, EXAMPLES / "node" / "chat.js", "--models", *at) == (0, "tiny\t2048 tokens\n", "")


async def test_node_reads_reason_violations_and_when_to_come_back(tmp_path: Path, node: str) -> None:
    chat = EXAMPLES / "node" / "chat.js"
    async with sim_cluster(tmp_path, sim={"cost": SLOW}, max_no_worker_wait_s=0.05) as cluster:
        at = ("--address", cluster.endpoint.address)
        code, _, err = await run(node, chat, "--temperature", "9", *at, "hi")
        assert code == 2
        assert "INVALID_ARGUMENT INVALID_REQUEST" in err
        assert "sampling.temperature is 9; must be 0 to 2" in err
        code, _, err = await run(node, chat, "--timeout", "0.4", *at, "hi")
        assert code == 4
        assert "DEADLINE_EXCEEDED" in err
        cluster.set_workers()
        code, _, err = await run(node, chat, "--timeout", "60", *at, "hi")
        assert code == 3
        assert "NO_WORKER" in err
    code, _, err = await run(node, chat, "--timeout", "60", "--address", "127.0.0.1:1", "hi")
    assert (code, "(no reason given)" in err) == (3, True)


async def test_node_that_is_interrupted_frees_everything(tmp_path: Path, node: str) -> None:
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster:
        command = (node, EXAMPLES / "node" / "chat.js", "--resume", "--address", cluster.endpoint.address, "hi")
        async with started(*command) as process, asyncio.timeout(60):
            assert process.stdout is not None
            await process.stdout.read(1)
            with cluster.standing():
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
                await cluster.until_balanced()


class CuttingProxy:
    """Between a client and the router; cuts every connection once so many bytes have come back over it."""

    def __init__(self, target: str, after_bytes: int) -> None:
        self._target = target
        self._after_bytes = after_bytes
        self.cut_count = 0

    @asynccontextmanager
    async def listening(self, max_cut_count: int) -> AsyncIterator[str]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host, _, port = self._target.rpartition(":")
            back, forth = await asyncio.open_connection(host, int(port))
            cuts = self.cut_count < max_cut_count

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int | None) -> None:
                left = limit
                while data := await source.read(4096):
                    sink.write(data)
                    await sink.drain()
                    if left is not None:
                        left -= len(data)
                        if left <= 0:
                            self.cut_count += 1
                            return

            tasks = [
                asyncio.create_task(copy(reader, forth, None)),
                asyncio.create_task(copy(back, writer, self._after_bytes if cuts else None)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for each in (writer, forth):
                    each.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_node_goes_on_with_a_cut_stream_without_gap_or_repeat(tmp_path: Path, node: str) -> None:
    chat = EXAMPLES / "node" / "chat.js"
    async with sim_cluster(tmp_path, sim={"cost": SLOW}) as cluster, BatonClient(cluster.endpoint.address) as client:
        stop = StopConditions(max_output_token_count=60)
        whole = await client.complete_chat([("user", "hi")], timeout=60, stop=stop)
        assert whole.usage.output_token_count > 40, "too short to be cut: the test shows nothing"
        proxy = CuttingProxy(cluster.endpoint.address, after_bytes=900)
        async with proxy.listening(max_cut_count=3) as address:
            code, out, err = await run(node, chat, "--resume", "--max-tokens", "60", "--address", address, "hi")
            assert (code, out) == (0, whole.text + "\n"), err
            assert proxy.cut_count == 3
            # Without resume the same cut is an error, and what came is not passed off as the answer.
            proxy.cut_count = 0
            code, out, _ = await run(node, chat, "--max-tokens", "60", "--address", address, "hi")
            assert code != 0
            assert whole.text.startswith(out)

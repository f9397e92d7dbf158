"""Stand-alone worker processes: started by hand, told to stop by a signal, and clear about what is wrong."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.leg import pack_token_ids
from baton.secret import SECRET_VARIABLE, TOKEN_KEY, cluster_token
from baton.worker.v1 import worker_pb2, worker_pb2_grpc

SECRET = bytes(range(32))
SERVING = health_pb2.HealthCheckResponse.SERVING
TOKEN = ((TOKEN_KEY, cluster_token(SECRET)),)
FILE = """
[worker]
id = "{role}-9"
[host]
drain_s = 3.0
[limits]
max_leg_count = 4
[limits.transfer]
allowed_hosts = ["127.0.0.1"]
[engine]
kind = "simulated"
model_name = "sim"
kv_cache_bytes = 268435456
"""
ENVIRONMENT = {**os.environ, SECRET_VARIABLE: SECRET.hex()}


@asynccontextmanager
async def a_process(role: str, file: Path, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"{role}_worker", str(file), *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def address_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = (await process.stdout.readline()).decode()
    found = re.search(r"ready on (\S+),", line)
    assert found, line
    return found[1]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {role: tmp_path / f"{role}.toml" for role in ("prefill", "decode")}
    for role, path in paths.items():
        path.write_text(FILE.format(role=role))
    return paths


async def test_two_processes_serve_one_request_and_end_on_a_signal_with_status_0(files: dict[str, Path]) -> None:
    prompt = tuple(range(10, 60))
    common: dict[str, Any] = {
        "sampling": worker_pb2.SamplingSpec(top_p=1.0, repetition_penalty=1.0),
        "leg_id": "leg-1",
    }
    async with a_process("prefill", files["prefill"]) as p, a_process("decode", files["decode"]) as d:
        async with (
            grpc.aio.insecure_channel(await address_of(p)) as prefill_channel,
            grpc.aio.insecure_channel(await address_of(d)) as decode_channel,
        ):
            prefill = worker_pb2_grpc.PrefillServiceStub(prefill_channel)  # type: ignore[no-untyped-call]
            decode = worker_pb2_grpc.DecodeServiceStub(decode_channel)  # type: ignore[no-untyped-call]
            order = worker_pb2.PrefillRequest(
                prompt_token_ids=pack_token_ids(prompt),
                stop=worker_pb2.StopSpec(max_token_count=4, ignore_eos=True),
                lease_s=600,
                **common,
            )
            reply = await prefill.Prefill(order, metadata=TOKEN, timeout=60)
            continuation = worker_pb2.DecodeRequest(
                prompt_token_ids=pack_token_ids((*prompt, reply.first_token_id)),
                stop=worker_pb2.StopSpec(max_token_count=3, ignore_eos=True),
                ticket=reply.ticket,
                **common,
            )
            events = [event async for event in decode.Decode(continuation, metadata=TOKEN, timeout=60)]
            assert sum(len(event.step.token_ids) for event in events) == 3
            assert events[0].adopted.transfer_byte_count > 0
            release = worker_pb2.ReleaseKvRequest(ticket_id=reply.ticket_id)
            assert (await prefill.ReleaseKv(release, metadata=TOKEN, timeout=60)).was_held
            with pytest.raises(grpc.aio.AioRpcError, match="Method not found"):  # a single phase is served
                await worker_pb2_grpc.PrefillServiceStub(decode_channel).Prefill(  # type: ignore[no-untyped-call]
                    order, metadata=TOKEN, timeout=60
                )
        for process in (p, d):
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert [await p.wait(), await d.wait()] == [0, 0]


async def test_a_second_signal_ends_the_wait_for_held_kv(files: dict[str, Path]) -> None:
    files["prefill"].write_text(FILE.format(role="prefill").replace("drain_s = 3.0", "drain_s = 600.0"))
    async with a_process("prefill", files["prefill"]) as process:
        async with grpc.aio.insecure_channel(await address_of(process)) as channel:
            stub = worker_pb2_grpc.PrefillServiceStub(channel)  # type: ignore[no-untyped-call]
            order = worker_pb2.PrefillRequest(
                leg_id="leg-1",
                prompt_token_ids=pack_token_ids(range(10, 60)),
                sampling=worker_pb2.SamplingSpec(top_p=1.0, repetition_penalty=1.0),
                stop=worker_pb2.StopSpec(max_token_count=4, ignore_eos=True),
                lease_s=600,
            )
            await stub.Prefill(order, metadata=TOKEN, timeout=60)
            process.send_signal(signal.SIGTERM)
            health = health_pb2_grpc.HealthStub(channel)
            async with asyncio.timeout(60):  # two signals at once would be one
                while (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await process.wait() == 130, "it waited for what is held until the second signal"


async def said(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(60):
        _, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stderr.decode()


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
async def test_a_port_in_use_ends_the_process_with_a_message_that_helps(files: dict[str, Path], flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with a_process("decode", files["decode"], flag, str(port)) as process:
            status, stderr = await said(process)
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{port}" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[host]", "[hots]", "[hots] is not a table known here"),
        ("drain_s = 3.0", "drain = 3.0", "[host] drain: is not known"),
        ("drain_s = 3.0", 'drain_s = "3"', "[host] drain_s: is '3'"),
        ("max_leg_count = 4", "max_leg_count = 0", "[limits] max_leg_count: is 0"),
        ('allowed_hosts = ["127.0.0.1"]', "port = 3", "[limits] transfer.port: is not known"),
        ("kv_cache_bytes = 268435456", "", "[engine]"),
        ('id = "{role}-9"', 'id = "a b"', "[worker] id: must be"),
        ("[worker]", "[worker", "is not TOML"),
    ],
)
async def test_a_wrong_file_is_refused_by_the_name_of_what_is_wrong(
    files: dict[str, Path], before: str, after: str, words: str
) -> None:
    files["prefill"].write_text(FILE.replace(before, after).format(role="prefill"))
    async with a_process("prefill", files["prefill"]) as process:
        status, stderr = await said(process)
    assert status == 2
    assert words in stderr
    assert "Traceback" not in stderr


async def test_without_the_secret_no_worker_starts(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENT, SECRET_VARIABLE, "")
    async with a_process("prefill", files["prefill"]) as process:
        status, stderr = await said(process)
    assert status == 2
    assert SECRET_VARIABLE in stderr

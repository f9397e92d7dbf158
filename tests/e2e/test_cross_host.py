"""Two hosts: prefill and decode worker in network namespaces of their own, KV over TCP, nothing shared but a wire.

The workers are the stand-alone ones, spoken to over gRPC as the router does. The oracle is the decode engine alone,
under another tenant, whose cached prefixes are not shared.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from engine_pair import BLOCK, MODEL_PATH, OUTPUT_TOKEN_COUNT, TRY_COUNT, becomes_true, prompt
from namespaces import DEVICE, Hosts, two_hosts
from patience import LEASE_S, PULL_TIMEOUT_S, SILENCE_S, START_S, WITHIN_S

from baton.admin_client import AdminClient
from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError
from baton.leg import DecodeDone, DecodeOrder, KvAdopted, PrefillOrder, PrefillReply, Stepped, WorkerInfo
from baton.request import EngineStop, OutputOptions, Sampling, StopConditions
from baton.secret import SECRET_VARIABLE, new_secret, side_channel_key
from bench.decode_events import told
from fleet.roster_client import RosterClient
from kvtransfer.peer import PeerAddress, open_peer, seal_peer
from kvtransfer.side_channel import NONCE_BYTES, ClientSession, ServerSession, SideChannelError
from router.grpc_worker_client import GrpcWorkerClient

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

SECRET = new_secret()
KEY = side_channel_key(SECRET)
GREEDY = Sampling(temperature=0.0)
GRPC_PORT, METRICS_PORT, SIDE_PORT, ROUTER_PORT = 6410, 6411, 6412, 6420
CALL_S = WITHIN_S


@dataclass
class RunningWorker:
    """A worker process in a namespace, and the client that a router would have of it."""

    process: asyncio.subprocess.Process
    client: GrpcWorkerClient
    info: WorkerInfo
    side_channel: tuple[str, int]
    log: list[str] = field(default_factory=list)

    @property
    def peer(self) -> PeerAddress:
        return open_peer(self.info.transfer_peer, SECRET)


@dataclass
class TwoHosts:
    hosts: Hosts
    prefill: RunningWorker
    decode: RunningWorker
    files: Path


def configuration(role: str, hosts: Hosts, core_index: int) -> str:
    address, other = (hosts.p_address, hosts.d_address) if role == "prefill" else (hosts.d_address, hosts.p_address)
    cores = sorted(os.sched_getaffinity(0))
    return f"""
[worker]
id = "{role}-0"
[host]
host = "{address}"
port = {GRPC_PORT}
metrics_port = {METRICS_PORT}
[engine]
model_path = "{MODEL_PATH}"
model_name = "smollm2-135m-instruct"
kv_cache_bytes = {384 << 20}
max_context_token_count = 4096
max_batched_token_count = 512
cores = [{cores[core_index % len(cores)]}]
side_channel_host = "{address}"
side_channel_port = {SIDE_PORT}
pull_timeout_s = {PULL_TIMEOUT_S}
transports = ["tcp"]
net_devices = ["{DEVICE}"]
peer_hosts = ["{other}", "{hosts.here}", "{hosts.nobody}"]
"""


@asynccontextmanager
async def worker(role: str, hosts: Hosts, files: Path, core_index: int) -> AsyncIterator[RunningWorker]:
    """Ready. Killed at the end, whatever it does then; its engine process dies with it."""
    file = files / f"{role}.toml"
    file.write_text(configuration(role, hosts, core_index), encoding="utf-8")
    name, address = (hosts.p, hosts.p_address) if role == "prefill" else (hosts.d, hosts.d_address)
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", name, sys.executable, "-m", f"{role}_worker", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, SECRET_VARIABLE: SECRET.hex(), "NO_PROXY": "*"},
    )
    client = GrpcWorkerClient(f"{address}:{GRPC_PORT}", SECRET)
    log: list[str] = []
    ready = asyncio.Event()

    async def listen() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            log.append(line.decode(errors="replace").rstrip())
            if f"{role}-0 ready on" in log[-1]:
                ready.set()
        ready.set()

    listening = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(START_S):
            await ready.wait()
        assert process.returncode is None, "\n".join(log[-20:])
        info = await client.info(timeout_s=CALL_S)
        yield RunningWorker(process, client, info, (address, SIDE_PORT), log)
    except BaseException:
        print("\n".join(log[-60:]))
        raise
    finally:
        await client.close()
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()
        await listening


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TwoHosts]:
    files = tmp_path_factory.mktemp("hosts")
    with two_hosts() as hosts:
        async with AsyncExitStack() as stack:
            starting = [
                stack.enter_async_context(worker(role, hosts, files, index))
                for index, role in enumerate(("prefill", "decode"))
            ]
            prefill, decode = await asyncio.gather(*starting)
            yield TwoHosts(hosts, prefill, decode, files)


# -- what the tests do over and over -----------------------------------------------------------------------------


def stop(count: int) -> EngineStop:
    return EngineStop(count, ignore_eos=True)


async def prefilled(by: RunningWorker, ids: tuple[int, ...], leg: str = "prefill") -> PrefillReply:
    order = PrefillOrder(leg, ids, GREEDY, stop(OUTPUT_TOKEN_COUNT), lease_s=LEASE_S)
    return await by.client.prefill(order, timeout_s=CALL_S)


async def decoded(by: RunningWorker, order: DecodeOrder) -> tuple[KvAdopted, list[int]]:
    adopted, *steps, done = [event async for event in told(by.client, order, CALL_S)]
    assert isinstance(adopted, KvAdopted)
    assert isinstance(done, DecodeDone)
    return adopted, [token for step in steps if isinstance(step, Stepped) for token in step.token_ids]


async def handed_over(two: TwoHosts, ids: tuple[int, ...], leg: str) -> tuple[KvAdopted, list[int]]:
    first = await prefilled(two.prefill, ids, leg)
    order = DecodeOrder(
        f"{leg}.d",
        (*ids, first.first_token_id),
        GREEDY,
        stop(OUTPUT_TOKEN_COUNT - 1),
        ticket=first.ticket,
        output_token_count=1,
    )
    adopted, rest = await decoded(two.decode, order)
    await two.prefill.client.release_kv(first.ticket_id, timeout_s=CALL_S)
    return adopted, [first.first_token_id, *rest]


async def alone(two: TwoHosts, ids: tuple[int, ...]) -> list[int]:
    order = DecodeOrder("oracle", ids, GREEDY, stop(OUTPUT_TOKEN_COUNT), tenant="the oracle")
    _, tokens = await decoded(two.decode, order)
    return tokens


async def has_work(worker: RunningWorker) -> None:
    """By its own count."""
    async with asyncio.timeout(WITHIN_S), aclosing(worker.client.watch_load(0.02)) as loads:
        async for load in loads:
            if load.running_count:
                return
    raise AssertionError("the worker stopped telling its load")


async def both_are_ready(admin_address: str) -> None:
    client = AdminClient(admin_address)
    async with asyncio.timeout(CALL_S), client, aclosing(client.watch(interval_s=0.1)) as views:
        async for view in views:
            if [worker.health for worker in view.workers] == ["ready"] * 2:
                return
    raise AssertionError("the router stopped telling its view")


@asynccontextmanager
async def router(two: TwoHosts) -> AsyncIterator[str]:
    """The address of a router in the decode worker's namespace that was told of both workers."""
    address = two.hosts.d_address
    file = two.files / "router.json"
    places = {name: f"{address}:{ROUTER_PORT + i}" for i, name in enumerate(("listen_address", "admin_address"))}
    names = {"model_name": "smollm2-135m-instruct", "model_dir": str(MODEL_PATH)}
    rest = {"metrics_address": "127.0.0.1:0", "allow_non_loopback": True, "placement": "split"}
    rest |= {"worker_silence_s": SILENCE_S, "gap_timeout_s": START_S}
    file.write_text(json.dumps({**names, **places, **rest}), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", two.hosts.d, sys.executable, "-m", "router", "--config", str(file)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, SECRET_VARIABLE: SECRET.hex(), "NO_PROXY": "*"},
    )
    roster = RosterClient(places["admin_address"], SECRET)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(CALL_S):
            assert await process.stdout.readline()  # where it listens: it does
        workers = {"prefill": (two.prefill, two.hosts.p_address), "decode": (two.decode, two.hosts.d_address)}
        await roster.publish(
            [
                {"worker_id": f"{role}-0", "address": f"{at}:{GRPC_PORT}", "role": role, "epoch": each.info.epoch}
                for role, (each, at) in workers.items()
            ]
        )
        await both_are_ready(places["admin_address"])
        yield places["listen_address"]
    finally:
        await roster.close()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def introduced(to: RunningWorker, *peers: PeerAddress, silent_count: int = 0) -> list[str]:
    """The problem with each. Again where it was that the machine took too long; the first ``silent_count`` never
    answer."""
    for _ in range(TRY_COUNT):
        results = await to.client.introduce([seal_peer(peer, SECRET) for peer in peers], timeout_s=CALL_S)
        problems = [each.problem for each in results]
        if not any(late in problem for problem in problems[silent_count:] for late in ("timed out", "in time")):
            return problems
    raise AssertionError(f"no answer in time, {TRY_COUNT} times: {problems}")


async def asked(at: tuple[str, int], key: bytes, request: bytes) -> bytes:
    """What an engine answers to somebody who knows ``key``."""
    reader, writer = await asyncio.open_connection(*at)
    try:
        async with asyncio.timeout(WITHIN_S):
            session = ClientSession(key, os.urandom(NONCE_BYTES), request)
            writer.write(session.start())
            while not session.is_done:
                data = await reader.read(65_536)
                if not data:
                    raise SideChannelError("hung up")
                writer.write(session.feed(data))
            return session.reply
    finally:
        writer.close()


async def welcome_of(of: RunningWorker) -> dict[str, Any]:
    """What the engine of a worker says of itself to its peers."""
    request = msgspec.msgpack.encode({"engine_id": "a-test", "wanted_engine_id": of.peer.engine_id})
    for _ in range(TRY_COUNT):
        with suppress(SideChannelError, ConnectionError):  # we were slow, and it hung up
            said: dict[str, Any] = msgspec.msgpack.decode(await asked(of.side_channel, KEY, request))
            return said
    raise AssertionError(f"hung up on, {TRY_COUNT} times")


@asynccontextmanager
async def impostor(two: TwoHosts, key: bytes, welcome: dict[str, Any]) -> AsyncIterator[PeerAddress]:
    """An engine, as far as the side channel shows, on the test's own address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = ServerSession(key, os.urandom(NONCE_BYTES), lambda _: msgspec.msgpack.encode(welcome))
        with suppress(ConnectionError, SideChannelError):
            while not session.is_done and (data := await reader.read(65_536)):
                writer.write(session.feed(data))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, two.hosts.here, 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield PeerAddress("impostor", "e1", welcome["engine_id"], two.hosts.here, port)


# -- the tests, in order: the last one restarts a worker -----------------------------------------------------------


async def test_a_pair_that_was_introduced_pays_nothing_for_its_first_request(two: TwoHosts) -> None:
    assert await introduced(two.decode, two.prefill.peer) == [""]
    assert await introduced(two.prefill, two.decode.peer) == [""]
    assert await introduced(two.decode, two.prefill.peer, two.decode.peer) == [""]  # again, and itself: nothing
    for number in range(4):
        adopted, _ = await handed_over(two, prompt(1000, seed=100 + number), f"first-{number}")
        assert adopted.recomputed_token_count == 0
        print(f"pull {number}: {adopted.transfer_s * 1e3:.1f} ms for {adopted.transfer_bytes} bytes")


@pytest.mark.parametrize("token_count", [1, 127, 128, 129, 300, 1000])
async def test_answers_across_hosts_are_those_of_one_engine(two: TwoHosts, token_count: int) -> None:
    ids = prompt(token_count, seed=200)
    adopted, answer = await handed_over(two, ids, f"exact-{token_count}")
    assert adopted.recomputed_token_count == 0
    assert adopted.transfer_bytes == -(-token_count // BLOCK) * BLOCK * 23_040
    assert answer == await alone(two, ids)


async def test_a_router_streams_an_answer_whose_kv_crossed_the_wire(two: TwoHosts) -> None:
    ids = prompt(1000, seed=210)
    before = two.hosts.received_byte_count(two.hosts.d)
    chunks: list[Chunk] = []
    async with router(two) as address, BatonClient(address) as client:
        async for event in client.generate(
            ids,
            timeout=CALL_S,
            sampling=GREEDY,
            stop=StopConditions(max_output_token_count=OUTPUT_TOKEN_COUNT, ignore_eos=True),
            output=OutputOptions(wants_token_ids=True),
            tenant="caller",
        ):
            match event:
                case Chunk():
                    chunks.append(event)
                case Finished(phases=phases):
                    transfer, workers = phases.transfer, (phases.prefill_worker_id, phases.decode_worker_id)
    assert len(chunks) > 1
    assert workers == ("prefill-0", "decode-0")
    assert transfer.kv_bytes == -(-1000 // BLOCK) * BLOCK * 23_040
    assert transfer.recomputed_token_count == 0
    # Nothing else is between the namespaces: no shared memory, no copy from one process to another.
    assert two.hosts.received_byte_count(two.hosts.d) - before >= transfer.kv_bytes
    assert [token for chunk in chunks for token in chunk.token_ids] == await alone(two, ids)
    print(f"{transfer.kv_bytes} bytes by TCP alone (UCX_TLS=tcp), wire {transfer.wire_s * 1e3:.1f} ms")


async def test_engines_listen_on_the_configured_address_alone(two: TwoHosts) -> None:
    for name, address in ((two.hosts.p, two.hosts.p_address), (two.hosts.d, two.hosts.d_address)):
        places = two.hosts.listening(name)
        assert {(address, GRPC_PORT), (address, SIDE_PORT), ("127.0.0.1", METRICS_PORT)} <= places
        assert {place for place, _ in places} <= {address, "127.0.0.1"}


async def test_a_read_does_not_wait_for_an_owner_that_computes(two: TwoHosts) -> None:
    was_busy = False
    for number in range(TRY_COUNT):  # on a machine that stood still, the prompt may be over before the read
        ids = prompt(1000, seed=300 + 10 * number)
        first = await prefilled(two.prefill, ids, f"held-{number}")
        order = PrefillOrder(f"busy-{number}", prompt(3900, seed=301 + 10 * number), GREEDY, stop(1), lease_s=LEASE_S)
        busy = asyncio.create_task(two.prefill.client.prefill(order, timeout_s=CALL_S))
        begun = asyncio.create_task(has_work(two.prefill))
        await asyncio.wait([busy, begun], return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        read = DecodeOrder(
            f"reader-{number}",
            (*ids, first.first_token_id),
            GREEDY,
            stop(3),
            ticket=first.ticket,
            output_token_count=1,
        )
        adopted, _ = await decoded(two.decode, read)
        was_busy = not busy.done()
        assert adopted.recomputed_token_count == 0
        await busy
        await two.prefill.client.release_kv(first.ticket_id, timeout_s=CALL_S)
        if was_busy:
            break
    assert was_busy, "the prefill was to be busy all the while"
    print(f"pull from a computing owner: {adopted.transfer_s * 1e3:.1f} ms for {adopted.transfer_bytes} bytes")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "another-model"),
        ("weights", "0123456789abcdef"),
        ("dtype", "float32"),
        ("block_token_count", "16"),
        ("layers", "31"),
        ("vllm", "0.1"),
        ("connector", "0/1"),
    ],
)
async def test_a_peer_that_differs_is_refused_by_the_name_of_what_differs(
    two: TwoHosts, name: str, value: str
) -> None:
    welcome = await welcome_of(two.prefill)
    here = welcome["facts"][name]
    welcome |= {"engine_id": f"impostor-{name}", "facts": {**welcome["facts"], name: value}, "agent": b"never read"}
    async with impostor(two, KEY, welcome) as peer:
        (problem,) = await introduced(two.decode, peer)
    assert problem.endswith(f"{name}: {here} here, {value} there")


async def test_a_peer_of_another_cluster_is_refused_and_told_nothing(two: TwoHosts) -> None:
    welcome = {**await welcome_of(two.prefill), "engine_id": "impostor-key"}
    async with impostor(two, side_channel_key(new_secret()), welcome) as peer:
        (problem,) = await introduced(two.decode, peer)
    assert "does not know the cluster's key" in problem


async def test_who_does_not_know_the_key_gets_no_answer_and_does_no_harm(two: TwoHosts) -> None:
    request = msgspec.msgpack.encode({"engine_id": "x", "wanted_engine_id": two.prefill.peer.engine_id})
    with pytest.raises(SideChannelError):
        await asked(two.prefill.side_channel, side_channel_key(new_secret()), request)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"BKS1" + bytes(32) + b"\xff\xff\xff\xff", b"BKS1" + bytes(200)):
        with socket.create_connection(two.prefill.side_channel, timeout=WITHIN_S) as outsider:
            outsider.sendall(said)
            received = b""
            with suppress(ConnectionResetError):
                while more := outsider.recv(65_536):
                    received += more
        assert len(received) <= NONCE_BYTES + 32  # at most the server's own proof, and then the end
    assert (await welcome_of(two.prefill))["engine_id"] == two.prefill.peer.engine_id


async def test_neither_silent_callers_nor_silent_peers_hold_up_a_handshake(two: TwoHosts) -> None:
    with SilentCrowd() as crowd:
        for _ in range(200):
            crowd.add(two.prefill.side_channel)
        assert (await welcome_of(two.prefill))["engine_id"] == two.prefill.peer.engine_id
    nobodies = [PeerAddress(f"n{i}", "e", f"nobody-{i}", two.hosts.nobody, 1000 + i) for i in range(6)]
    welcome = {**await welcome_of(two.prefill), "engine_id": "impostor-slow", "facts": {}}
    async with impostor(two, KEY, welcome) as peer:
        problems = await introduced(two.decode, *nobodies, peer, silent_count=len(nobodies))
    assert all(problems[:-1])
    assert "cannot exchange KV" in problems[-1]


async def test_a_worker_that_restarts_on_its_ports_is_met_again_and_nobody_crashes(two: TwoHosts) -> None:
    before = two.prefill.peer
    decode_pid = two.decode.process.pid
    two.prefill.process.kill()
    await two.prefill.process.wait()

    async def port_is_free() -> bool:
        return not any(port == SIDE_PORT for _, port in two.hosts.listening(two.hosts.p))

    await becomes_true(port_is_free)
    async with worker("prefill", two.hosts, two.files, 0) as again:
        now = TwoHosts(two.hosts, again, two.decode, two.files)
        assert again.peer.engine_id != before.engine_id
        assert await introduced(two.decode, again.peer) == [""]
        (gone,) = await introduced(two.decode, before)
        assert gone == "another engine answers there now"
        ids = prompt(700, seed=400)
        adopted, answer = await handed_over(now, ids, "again")
        assert adopted.recomputed_token_count == 0
        assert answer == await alone(now, ids)
    assert (two.decode.process.pid, two.decode.process.returncode) == (decode_pid, None)
    with pytest.raises(BatonError):
        await two.prefill.client.info(timeout_s=1.0)


class SilentCrowd:
    """Connections that say nothing."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> SilentCrowd:
        return self

    def add(self, at: tuple[str, int]) -> None:
        self._sockets.append(socket.create_connection(at, timeout=WITHIN_S))

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

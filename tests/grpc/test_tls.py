"""TLS on the public port, over real sockets: who is let in, who is told what to check, and renewed certificates."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sim_cluster import FAST, SimCluster, sim_cluster
from test_examples import EXAMPLES, node  # noqa: F401  # node is a fixture
from test_reflection import Reflected
from test_resume import keys_file, second_router
from tls_files import Authority, Identity

from baton.client import BatonClient, Chunk, Finished
from baton.errors import BatonError, HandshakeFailed, Unavailable
from baton.request import ResumeOptions, StopConditions
from baton.status_client import StatusClient
from baton.sync_client import BatonClientSync
from baton.tls import Tls
from bench.tcp_cutter import tcp_cutter
from engine.cost import CostModel, DecodeCost

PROMPT = "Once upon a time there was a small model"
SLOW: dict[str, Any] = {
    "cost": CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.01, per_context_token_s=0.0, per_sequence_s=0))
}
ENOUGH = ResumeOptions(grace_s=60.0)
CALL_S = 60.0


def tokens(count: int) -> StopConditions:
    return StopConditions(max_output_token_count=count, ignore_eos=True)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "pki")


async def failure_of(client: BatonClient, **options: Any) -> BatonError:
    async with client:
        with pytest.raises(BatonError) as caught:
            await client.complete(PROMPT, timeout=CALL_S, stop=tokens(2), **options)
    return caught.value


class Tap:
    """Between client and router: hears every byte."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self.heard = b""

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, up = await asyncio.open_connection(self._host, self._port)
        await asyncio.gather(self._copy(reader, up), self._copy(upstream, writer), return_exceptions=True)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


# What works


async def test_nobody_on_the_way_reads_the_prompt(tmp_path: Path, authority: Authority) -> None:
    tls = Tls(authority.path)
    async with sim_cluster(tmp_path / "m", **authority.issue().of_router) as cluster:
        tap = Tap(cluster.endpoint.address)
        async with tap.listening() as address, BatonClient(address, tls=tls) as client:
            answer = await client.complete(PROMPT, timeout=CALL_S, stop=tokens(8))
        assert answer.usage.output_token_count == 8
        assert tap.heard
        assert PROMPT.encode() not in tap.heard
    async with sim_cluster(tmp_path / "m") as cluster:
        tap = Tap(cluster.endpoint.address)
        async with tap.listening() as address, BatonClient(address) as client:
            assert (await client.complete(PROMPT, timeout=CALL_S, stop=tokens(8))).text == answer.text
        assert PROMPT.encode() in tap.heard, "the tap hears nothing: the test shows nothing"


async def test_both_clients_health_status_and_reflection_work_over_tls(tmp_path: Path, authority: Authority) -> None:
    tls = Tls(authority.path)
    keys, key = keys_file(tmp_path, us=("a-key-of-ours", "")), "a-key-of-ours"
    async with sim_cluster(tmp_path / "m", api_keys_path=str(keys), **authority.issue().of_router) as cluster:
        address = cluster.endpoint.address

        def in_a_thread() -> str:
            with BatonClientSync(address, tls=tls, api_key=key) as client:
                return client.complete(PROMPT, timeout=CALL_S, stop=tokens(8)).text

        async with BatonClient(address, tls=tls, api_key=key) as client:
            await client.wait_until_serving(timeout=CALL_S)
            answer = await client.complete(PROMPT, timeout=CALL_S, stop=tokens(8))
            assert [model.name for model in await client.list_models(timeout=CALL_S)] == ["tiny"]
        assert await asyncio.to_thread(in_a_thread) == answer.text
        async with (
            StatusClient(address, tls=tls, api_key=key) as status,
            aclosing(status.watch(timeout=CALL_S)) as statuses,
        ):
            assert (await anext(statuses)).is_serving

        def grpcurl() -> list[str]:
            caller = Reflected(address, tls.credentials())
            try:
                return caller.services()
            finally:
                caller.close()

        assert "baton.v1.GenerationService" in await asyncio.to_thread(grpcurl)


async def test_leaving_the_loop_frees_everything_over_tls(tmp_path: Path, authority: Authority) -> None:
    forever = {"cost": CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=60.0))}
    async with (
        sim_cluster(tmp_path / "m", sim=forever, **authority.issue().of_router) as cluster,
        BatonClient(cluster.endpoint.address, tls=Tls(authority.path)) as client,
    ):
        async with aclosing(client.generate(PROMPT, timeout=CALL_S)) as events:
            async for event in events:
                if isinstance(event, Chunk):
                    break
        await cluster.until_balanced()


async def test_cut_connections_are_not_seen_over_tls(tmp_path: Path, authority: Authority) -> None:
    rng, tls = random.Random(11), Tls(authority.path)
    async with sim_cluster(tmp_path / "m", sim=SLOW, **authority.issue().of_router) as cluster:
        async with BatonClient(cluster.endpoint.address, tls=tls) as client:
            whole = await client.complete(PROMPT, timeout=CALL_S, stop=tokens(100))
        async with (
            tcp_cutter(cluster.endpoint.address, lambda: rng.randrange(4000, 9000)) as cutter,
            BatonClient(cutter.address, tls=tls, rng=rng) as client,
        ):
            answer = await client.complete(PROMPT, timeout=CALL_S, stop=tokens(100), resume=ENOUGH)
            assert cutter.cut_count > 0
        assert (answer.text, answer.usage) == (whole.text, whole.usage)
        assert answer.resume_count > 0
        for kept in [*cluster.server.resumables._kept]:
            kept.forget()


async def test_a_router_that_stops_hands_its_streams_to_another_over_tls(
    tmp_path: Path, authority: Authority
) -> None:
    tls = Tls(authority.path)
    async with (
        sim_cluster(tmp_path / "m", sim=SLOW, **authority.issue().of_router) as cluster,
        AsyncExitStack() as stack,
    ):
        first = await stack.enter_async_context(second_router(cluster))
        async with BatonClient([first, cluster.endpoint.address], tls=tls) as client:
            text, resume_count = "", 0
            async with aclosing(client.generate(PROMPT, timeout=CALL_S, stop=tokens(80), resume=ENOUGH)) as stream:
                async for event in stream:
                    text += event.text
                    if isinstance(event, Chunk) and event.first_token_index >= 10:
                        await stack.aclose()  # once: then it is empty
                    if isinstance(event, Finished):
                        resume_count = event.resume_count
            assert (text, resume_count) == (
                (await client.complete(PROMPT, timeout=CALL_S, stop=tokens(80))).text,
                1,
            )
        for kept in [*cluster.server.resumables._kept]:
            kept.forget()


# Who is told what to check


def expired(authority: Authority) -> Identity:
    return authority.issue(
        "localhost",
        "127.0.0.1",
        not_before=datetime(2020, 1, 1, tzinfo=UTC),
        not_after=datetime(2021, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("identity", "trusts_it", "kind", "words"),
    [
        (lambda authority: authority.issue(), False, "not_trusted", "--tls-ca"),
        (lambda authority: authority.issue("baton.example.org"), True, "wrong_name", "--tls-server-name"),
        (expired, True, "expired", "has expired"),
    ],
)
async def test_a_certificate_that_is_not_good_is_told_apart(
    tmp_path: Path,
    authority: Authority,
    identity: Callable[[Authority], Identity],
    trusts_it: bool,
    kind: str,
    words: str,
) -> None:
    ca = authority if trusts_it else Authority(tmp_path / "another")
    tls = Tls(ca.path)
    async with sim_cluster(tmp_path / "m", **identity(authority).of_router) as cluster:
        address = cluster.endpoint.address
        # Resumable, too: what fails every time is not tried for as long as a router may be away.
        for options in ({}, {"resume": True}):
            error = await failure_of(BatonClient(address, tls=tls), **options)
            assert isinstance(error, HandshakeFailed)
            assert (error.metadata["tls"], error.is_retryable) == (kind, False)
            assert words in error.message
            assert address in error.message

        def in_a_thread() -> None:
            with BatonClientSync(address, tls=tls) as client:
                client.complete(PROMPT, timeout=CALL_S)

        with pytest.raises(HandshakeFailed, match=words):
            await asyncio.to_thread(in_a_thread)
        async with StatusClient(address, tls=tls) as status, aclosing(status.watch(timeout=CALL_S)) as statuses:
            with pytest.raises(HandshakeFailed, match=words):
                await anext(statuses)
        async with BatonClient(address, tls=tls) as client:
            assert not await client.is_serving(timeout=CALL_S)
            assert isinstance(await client.serving_problem(timeout=CALL_S), HandshakeFailed)
        assert cluster.server.generation.ended_count == 0


async def test_a_name_of_the_certificate_can_be_given_for_the_address(tmp_path: Path, authority: Authority) -> None:
    async with sim_cluster(tmp_path / "m", **authority.issue("baton.example.org").of_router) as cluster:
        tls = Tls(authority.path, server_name="baton.example.org")
        async with BatonClient(cluster.endpoint.address, tls=tls) as client:
            assert await client.is_serving(timeout=CALL_S)


async def test_a_server_of_no_public_ca_is_not_trusted_by_default(tmp_path: Path, authority: Authority) -> None:
    async with sim_cluster(tmp_path / "m", **authority.issue().of_router) as cluster:
        error = await failure_of(BatonClient(cluster.endpoint.address, tls=True))
        assert error.metadata["tls"] == "not_trusted"


async def test_one_side_alone_with_tls_is_told_so(tmp_path: Path, authority: Authority) -> None:
    async with sim_cluster(tmp_path / "m", **authority.issue().of_router) as cluster:
        error = await failure_of(BatonClient(cluster.endpoint.address))
        # gRPC says only that the server hung up, which may have another cause: a hint, and to be retried.
        assert (type(error), error.metadata["tls"], error.is_retryable) == (Unavailable, "unsure", True)
        assert "--tls" in error.message
    async with sim_cluster(tmp_path / "m") as cluster:
        error = await failure_of(BatonClient(cluster.endpoint.address, tls=Tls(authority.path)))
        assert (type(error), error.metadata["tls"]) == (HandshakeFailed, "plaintext_server")


async def test_a_router_with_another_certificate_does_not_keep_a_client_from_the_next(
    tmp_path: Path, authority: Authority
) -> None:
    stranger = Authority(tmp_path / "another").issue()
    async with (
        sim_cluster(tmp_path / "m", **authority.issue().of_router) as cluster,
        AsyncExitStack() as stack,
    ):
        first = await stack.enter_async_context(second_router(cluster, **stranger.of_router))
        async with BatonClient([first, cluster.endpoint.address], tls=Tls(authority.path)) as client:
            assert (await client.complete(PROMPT, timeout=CALL_S, stop=tokens(2))).usage.output_token_count == 2
            assert await client.list_models(timeout=CALL_S)


# Clients' certificates


async def test_who_has_no_certificate_of_the_named_ca_is_turned_away(tmp_path: Path, authority: Authority) -> None:
    clients, strangers = Authority(tmp_path / "clients"), Authority(tmp_path / "strangers")
    good, bad = clients.issue("us"), strangers.issue("them")
    config: dict[str, Any] = {**authority.issue().of_router, "tls_client_ca_path": str(clients.path)}
    async with sim_cluster(tmp_path / "m", **config) as cluster:
        address = cluster.endpoint.address
        tls = Tls(authority.path, good.certificate_path, good.key_path)
        async with BatonClient(address, tls=tls) as client:
            assert (await client.complete(PROMPT, timeout=CALL_S, stop=tokens(2))).usage.output_token_count == 2
        error = await failure_of(BatonClient(address, tls=Tls(authority.path)))
        assert (error.metadata["tls"], "--tls-certificate" in error.message) == ("unsure", True)
        error = await failure_of(BatonClient(address, tls=Tls(authority.path, bad.certificate_path, bad.key_path)))
        assert (error.metadata["tls"], "tls_client_ca_path" in error.message) == ("unsure", True)
        assert cluster.server.generation.ended_count == 1


# Renewed certificates


async def test_a_renewed_certificate_is_used_at_once_and_disturbs_no_stream(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    identity = authority.issue()
    renewing = Authority(tmp_path / "renewing")
    async with sim_cluster(tmp_path / "m", sim=SLOW, **identity.of_router) as cluster:
        address = cluster.endpoint.address

        async def is_let_in(ca: Authority) -> bool:
            async with BatonClient(address, tls=Tls(ca.path)) as client:
                return await client.is_serving(timeout=CALL_S)

        async with (
            BatonClient(address, tls=Tls(authority.path)) as before,
            aclosing(before.generate(PROMPT, timeout=CALL_S, stop=tokens(60))) as events,
        ):
            async for event in events:
                if isinstance(event, Chunk):
                    break
            assert (await is_let_in(authority), await is_let_in(renewing)) == (True, False)
            # Half of a renewal: what does not belong together is not used, and said once.
            new = renewing.issue(at=tmp_path / "new")
            identity.certificate_path.write_bytes(new.certificate_path.read_bytes())
            assert (await is_let_in(authority), await is_let_in(authority)) == (True, True)
            (refused,) = [each for each in caplog.records if "is not used" in each.message]
            assert "tls_key_path" in refused.getMessage()
            identity.key_path.write_bytes(new.key_path.read_bytes())
            assert (await is_let_in(authority), await is_let_in(renewing)) == (False, True)
            last = [event async for event in events][-1]
            assert isinstance(last, Finished), "the stream of before goes on over its connection"


# The command line, and Node


async def run(*arguments: str | Path, **environment: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    try:
        async with asyncio.timeout(CALL_S):
            out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def baton(cluster: SimCluster, verb: str, *arguments: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "baton", verb, *arguments, "--address", cluster.endpoint.address)


async def test_every_verb_speaks_tls_and_says_what_to_give_it(tmp_path: Path, authority: Authority) -> None:
    clients = Authority(tmp_path / "clients")
    us = clients.issue("us")
    config: dict[str, Any] = {**authority.issue().of_router, "tls_client_ca_path": str(clients.path)}
    ours = ("--tls-certificate", us.certificate_path, "--tls-key", us.key_path)
    variables = {"BATON_TLS_CERTIFICATE": str(us.certificate_path), "BATON_TLS_KEY": str(us.key_path)}
    async with sim_cluster(tmp_path / "m", **config) as cluster:
        code, out, err = await run(*baton(cluster, "health", "--tls-ca", authority.path, *ours))
        assert (code, out, err) == (0, "serving\n", "")
        verbs: list[tuple[str, ...]] = [("generate", "hi", "--max-tokens", "2"), ("models",), ("top", "--once")]
        good = (run(*baton(cluster, *verb), BATON_TLS_CA=str(authority.path), **variables) for verb in verbs)
        for code, out, err in await asyncio.gather(*good):
            assert (code, bool(out), err) == (0, True, "")
        verbs = [("generate", "hi"), ("top", "--once"), ("health",)]
        bad = (run(*baton(cluster, *verb, "--tls"), **variables) for verb in verbs)
        for code, out, err in await asyncio.gather(*bad):
            assert (code, out, err.count("\n"), "--tls-ca" in err) == (3, "", 1, True), err
        code, _, err = await run(*baton(cluster, "models"))
        assert (code, err.count("\n"), "--tls" in err) == (3, 1, True), err
        code, _, err = await run(*baton(cluster, "generate", "hi", "--tls-ca", "/nowhere.pem"))
        assert (code, err) == (2, "baton: ca_path: cannot read /nowhere.pem: No such file or directory\n")


async def test_the_command_sends_no_key_in_clear_to_another_machine() -> None:
    arguments = (sys.executable, "-m", "baton", "generate", "hi", "--address", "192.0.2.1:50051")
    code, out, err = await run(*arguments, BATON_API_KEY="a-key-of-ours")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "192.0.2.1:50051" in err
    assert "--allow-plaintext-api-key" in err
    assert "a-key-of-ours" not in err


async def test_node_speaks_tls_where_a_variable_names_the_ca(
    tmp_path: Path,
    authority: Authority,
    node: str,  # noqa: F811
) -> None:
    chat = EXAMPLES / "node" / "chat.js"
    clients = Authority(tmp_path / "clients")
    us = clients.issue("us")
    variables = {"BATON_TLS_CERTIFICATE": str(us.certificate_path), "BATON_TLS_KEY": str(us.key_path)}
    config: dict[str, Any] = {**authority.issue().of_router, "tls_client_ca_path": str(clients.path)}
    async with sim_cluster(tmp_path / "m", **config) as cluster:
        at = ("--address", cluster.endpoint.address)
        ask = (node, chat, "--max-tokens", "4", *at, "hi")
        code, out, err = await run(*ask, BATON_TLS_CA=str(authority.path), **variables)
        assert (code, bool(out)) == (0, True), err
        code, _, err = await run(*ask, BATON_TLS_CA=str(clients.path), **variables)
        assert (code, "certificate" in err) == (3, True), err
    code, _, err = await run(node, chat, "--address", "192.0.2.1:50051", "hi", BATON_API_KEY="a-key-of-ours")
    assert (code, "in clear to 192.0.2.1:50051" in err, "a-key-of-ours" in err) == (1, True, False)

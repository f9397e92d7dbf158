"""``resume=True`` of both clients against the real router: cut sockets, routers that go, readers that leave."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest
from sim_cluster import FAST, SimCluster, sim_cluster
from test_resume import keys_file, second_router

from baton.client import Answer, BatonClient, Chunk, Finished, Started
from baton.errors import BatonError, Interrupted, Reason, ResumeFailed, StatusName
from baton.request import OutputOptions, ResumeOptions, Sampling, StopConditions
from baton.sync_client import BatonClientSync
from baton.testing import FakeBaton
from bench.tcp_cutter import tcp_cutter
from engine.cost import CostModel, DecodeCost

PROMPT = "Once upon a time there was a small model"
SLOW: dict[str, Any] = {
    "cost": CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.01, per_context_token_s=0.0, per_sequence_s=0))
}
ENOUGH = ResumeOptions(grace_s=60.0)
"""No grace may do here what a client must."""


def tokens(count: int) -> StopConditions:
    return StopConditions(max_output_token_count=count, ignore_eos=True)


async def uncut(cluster: SimCluster, count: int, **options: Any) -> Answer:
    async with BatonClient(cluster.endpoint.address) as client:
        return await client.complete(PROMPT, timeout=60, stop=tokens(count), **options)


def forget_all(cluster: SimCluster) -> None:
    """What a caller was never told of waits for its grace; the books are to balance before."""
    for kept in [*cluster.server.resumables._kept]:
        kept.forget()


async def test_cut_sockets_are_not_seen_by_who_reads(tmp_path: Path) -> None:
    rng = random.Random(7)
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, 100)
        async with (
            tcp_cutter(cluster.endpoint.address, lambda: rng.randrange(400, 3000)) as cutter,
            BatonClient(cutter.address, rng=rng) as client,
        ):
            answers = await asyncio.gather(
                *(client.complete(PROMPT, timeout=60, stop=tokens(100), resume=ENOUGH) for _ in range(4))
            )
            assert cutter.cut_count > 4
        assert {answer.text for answer in answers} == {whole.text}
        assert {answer.usage for answer in answers} == {whole.usage}
        assert all(answer.token_ids == () for answer in answers), "nobody asked for token ids"
        assert sum(answer.resume_count for answer in answers) > 4
        forget_all(cluster)


async def test_cut_sockets_are_not_seen_by_a_thread_that_reads(tmp_path: Path) -> None:
    rng = random.Random(8)
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, 100, output=OutputOptions(wants_token_ids=True))
        async with tcp_cutter(cluster.endpoint.address, lambda: rng.randrange(400, 2000)) as cutter:

            def read() -> Answer:
                with BatonClientSync(cutter.address, rng=rng) as client:
                    both = OutputOptions(wants_token_ids=True)
                    return client.complete(PROMPT, timeout=60, stop=tokens(100), resume=ENOUGH, output=both)

            answer = await asyncio.to_thread(read)
        assert (answer.text, answer.token_ids, answer.usage) == (whole.text, whole.token_ids, whole.usage)
        assert answer.resume_count > 0
        forget_all(cluster)


async def test_samples_go_on_each_from_its_own_token(tmp_path: Path) -> None:
    rng = random.Random(9)
    drawn: dict[str, Any] = {"sample_count": 3, "sampling": Sampling(temperature=1.0, seed=5)}
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, 60, **drawn)
        async with (
            tcp_cutter(cluster.endpoint.address, lambda: rng.randrange(1000, 4000)) as cutter,
            BatonClient(cutter.address, rng=rng) as client,
        ):
            answer = await client.complete(PROMPT, timeout=60, stop=tokens(60), resume=ENOUGH, **drawn)
        assert [sample.text for sample in answer.samples] == [sample.text for sample in whole.samples]
        assert answer.resume_count > 0
        forget_all(cluster)


async def test_without_resume_a_cut_after_tokens_is_one_to_start_over_from(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim=SLOW) as cluster,
        tcp_cutter(cluster.endpoint.address, lambda: None) as cutter,
        BatonClient(cutter.address) as client,
    ):
        async with aclosing(client.generate(PROMPT, timeout=60, stop=tokens(1000))) as stream:
            while not isinstance(await anext(stream), Chunk):
                pass
            cutter.cut_all()
            with pytest.raises(Interrupted) as caught:
                [event async for event in stream]
        assert int(caught.value.metadata["emitted_token_count"]) > 0
        assert not caught.value.is_retryable


async def test_a_router_that_stops_hands_its_streams_to_the_next_address(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, AsyncExitStack() as stack:
        whole = await uncut(cluster, 80)
        first = await stack.enter_async_context(second_router(cluster))
        async with BatonClient([first, cluster.endpoint.address]) as client:
            text = ""
            async with aclosing(client.generate(PROMPT, timeout=60, stop=tokens(80), resume=ENOUGH)) as stream:
                async for event in stream:
                    text += event.text
                    if isinstance(event, Chunk) and event.first_token_index >= 10:
                        await stack.aclose()  # the router is gone, and every connection with it
                    if isinstance(event, Finished):
                        assert event.resume_count == 1
            assert text == whole.text
            assert client.address == cluster.endpoint.address, "the next call goes where the last one was answered"
        forget_all(cluster)


async def test_a_router_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, AsyncExitStack() as stack:
        whole = await uncut(cluster, 60)
        address = await stack.enter_async_context(second_router(cluster))

        async def restart() -> None:
            await stack.aclose()
            await stack.enter_async_context(second_router(cluster, listen_address=address))

        async with BatonClient(address) as client:
            text, restarting = "", None
            async with aclosing(client.generate(PROMPT, timeout=60, stop=tokens(60), resume=ENOUGH)) as stream:
                async for event in stream:
                    text += event.text
                    if isinstance(event, Chunk) and event.first_token_index >= 10:
                        restarting = restarting or asyncio.create_task(restart())
            assert restarting is not None
            await restarting
            assert text == whole.text


@pytest.mark.parametrize("how", ["break", "cancel"])
async def test_who_leaves_ends_the_generation_long_before_its_grace(tmp_path: Path, how: str) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, BatonClient(cluster.endpoint.address) as client:
        has_chunk = asyncio.Event()

        async def read() -> None:
            async with aclosing(client.generate(PROMPT, timeout=60, stop=tokens(1500), resume=ENOUGH)) as stream:
                async for event in stream:
                    if isinstance(event, Chunk):
                        has_chunk.set()
                        if how == "break":
                            break

        task = asyncio.create_task(read())
        await has_chunk.wait()
        with cluster.standing():
            if how == "cancel":
                task.cancel()
            await asyncio.wait([task])
            await cluster.until_balanced()


async def test_a_thread_that_leaves_ends_the_generation_long_before_its_grace(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:

        def read() -> None:
            with BatonClientSync(cluster.endpoint.address) as client:
                stream = client.generate(PROMPT, timeout=60, stop=tokens(1500), resume=ENOUGH)
                for event in stream:
                    if isinstance(event, Chunk):
                        break
                stream.close()

        await asyncio.to_thread(read)
        with cluster.standing():
            await cluster.until_balanced()


async def test_a_generation_can_be_cancelled_by_its_token(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim=SLOW) as cluster,
        BatonClient(cluster.endpoint.address) as client,
        aclosing(client.generate(PROMPT, timeout=60, stop=tokens(1500), resume=ENOUGH)) as stream,
    ):
        started = await anext(stream)
        assert isinstance(started, Started)
        assert started.resume_token not in repr(started)
        with cluster.standing():
            assert await client.cancel_generation(started.resume_token, timeout=60)
            with pytest.raises(ResumeFailed):
                [event async for event in stream]
            assert not await client.cancel_generation(started.resume_token, timeout=60)
            await cluster.until_balanced()


async def test_a_cancel_that_could_not_be_asked_everywhere_does_not_say_that_nothing_ran() -> None:
    home, other = FakeBaton(), FakeBaton()
    home.start()
    other.start()
    home.stop()  # out of reach; what it ran may be running
    try:
        async with BatonClient([home.address, other.address]) as client:
            with pytest.raises(BatonError) as failed:
                await client.cancel_generation("fake-resume-0", timeout=60)
            assert failed.value.status is StatusName.UNAVAILABLE
        with BatonClientSync([home.address, other.address]) as blocking, pytest.raises(BatonError):
            await asyncio.to_thread(blocking.cancel_generation, "fake-resume-0", timeout=60)
    finally:
        other.stop()


async def test_the_key_is_sent_with_every_call_and_shown_by_none(tmp_path: Path) -> None:
    keys = keys_file(tmp_path, chat=("key-one", "shop"))
    async with sim_cluster(tmp_path / "model", sim=SLOW, api_keys_path=str(keys)) as cluster:
        async with BatonClient(cluster.endpoint.address) as client:
            with pytest.raises(BatonError) as caught:
                await client.list_models(timeout=60)
            assert caught.value.reason is Reason.UNAUTHENTICATED
        async with (
            tcp_cutter(cluster.endpoint.address, lambda: 1500) as cutter,
            BatonClient(cutter.address, api_key="key-one") as client,
        ):
            assert "key-one" not in repr(client)
            assert [model.name for model in await client.list_models(timeout=60)] == ["tiny"]
            answer = await client.complete(PROMPT, timeout=60, stop=tokens(60), resume=ENOUGH)
            assert answer.resume_count > 0
        forget_all(cluster)

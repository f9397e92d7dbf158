"""Resumable generations over real sockets: cut, attached to again, taken over, abandoned, cancelled, gone on with."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from sim_cluster import FAST, RULE, SECRET, SimCluster, sim_cluster

from baton.client import BatonClient
from baton.errors import BatonError, Reason
from baton.status import from_rpc_error
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from bench.resuming_caller import Heard, ResumingCaller, channel_to
from bench.tcp_cutter import tcp_cutter
from engine.cost import CostModel, DecodeCost
from router.config import RouterConfig
from router.server import RouterServer

PROMPT = "Once upon a time there was a small model"
SLOW = {
    "cost": CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.01, per_context_token_s=0.0, per_sequence_s=0))
}


def resumable(count: int = 40, text: str = PROMPT, grace_s: float = 20.0, **more: Any) -> pb.GenerateRequest:
    request = pb.GenerateRequest(text=text, **more)
    request.stop.max_output_token_count = count
    request.stop.ignore_eos = True
    request.output.content = pb.OutputOptions.CONTENT_BOTH
    request.resume.grace.FromNanoseconds(round(grace_s * 1e9))
    return request


def plain(request: pb.GenerateRequest) -> pb.GenerateRequest:
    copy = pb.GenerateRequest()
    copy.CopyFrom(request)
    copy.ClearField("resume")
    return copy


def stub_of(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]


async def uncut(cluster: SimCluster, request: pb.GenerateRequest) -> Heard:
    async with channel_to(cluster.endpoint.address) as channel:
        heard = Heard(request)
        async for response in stub_of(channel).Generate(plain(request), timeout=60):
            heard.take(response)
    return heard


async def begin(stub: Any, request: pb.GenerateRequest, *, until_index: int) -> tuple[Heard, Any]:
    """The beginning of a stream, and the call, which still runs."""
    heard = Heard(request)
    call = stub.Generate(request, timeout=60)
    async for response in call:
        heard.take(response)
        if heard.next_index >= until_index:
            break
    return heard, call


async def go_on(stub: Any, heard: Heard, *, has_continuation: bool = False, **options: Any) -> Heard:
    options.setdefault("timeout", 60)
    async for response in stub.ResumeGenerate(heard.resume_request(has_continuation=has_continuation), **options):
        heard.take(response)
    return heard


async def refusal(call: Any) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


def same_answer(heard: Heard, whole: Heard) -> bool:
    assert heard.finished is not None
    assert whole.finished is not None
    return (heard.token_ids, heard.text, heard.finished.reason, heard.finished.usage.output_token_count) == (
        whole.token_ids,
        whole.text,
        whole.finished.reason,
        whole.finished.usage.output_token_count,
    )


@asynccontextmanager
async def second_router(cluster: SimCluster, **config: Any) -> AsyncIterator[str]:
    """Another router of the same cluster, over the same workers; gives its address."""
    values = {name: getattr(cluster.config, name) for name in RouterConfig.__slots__}
    server = RouterServer(
        RouterConfig(**{**values, **config}),
        secret=SECRET,
        connect=lambda spec: cluster.workers[spec.worker_id].client(),
    )
    try:
        endpoint = await server.start()
        server.roster.set_workers([worker.spec for worker in cluster.workers.values()])
        ready = len(cluster.workers)
        await cluster.until(lambda: len(server.roster.view().ready()) == ready, "all workers ready")
        yield endpoint.address
    finally:
        await server.close()


# Where the generation is


async def test_a_cut_stream_goes_on_where_its_caller_left_off(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, resumable())
        async with channel_to(cluster.endpoint.address) as channel:
            stub = stub_of(channel)
            heard, call = await begin(stub, resumable(grace_s=1.0), until_index=5)
            call.cancel()
            await go_on(stub, heard)
        assert same_answer(heard, whole)
        assert len(set(heard.generation_ids)) == 1, "it is the same generation"
        assert cluster.server.metrics.resumes.labels("attached")._value.get() == 1
        await cluster.until(lambda: cluster.server.resumables.kept_count == 0, "forgotten after the grace")
        assert cluster.server.resumables.used_bytes == 0


async def test_an_answer_that_ended_without_its_reader_is_still_there(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, resumable(10))
        async with channel_to(cluster.endpoint.address) as channel:
            stub = stub_of(channel)
            heard, call = await begin(stub, resumable(10), until_index=2)
            call.cancel()
            await cluster.until(lambda: cluster.server.resumables.running_count == 0, "ended by itself")
            await go_on(stub, heard)
            again = Heard(heard.request, token=heard.token)
            assert same_answer(await go_on(stub, again), whole), "and from its very beginning"
        assert same_answer(heard, whole)


async def test_many_random_cuts_of_the_socket_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    rng = random.Random(5)
    async with sim_cluster(tmp_path, sim=SLOW) as cluster:
        whole = await uncut(cluster, resumable(120))
        async with (
            tcp_cutter(cluster.endpoint.address, lambda: rng.randrange(200, 3000)) as cutter,
            channel_to(cutter.address) as channel,
        ):
            caller = ResumingCaller([channel])
            answers = await asyncio.gather(*(caller.ask(resumable(120)) for _ in range(4)))
        assert all(same_answer(heard, whole) for heard in answers)
        assert cutter.cut_count >= 5
        assert sum(heard.calls["Generate"] for heard in answers) >= 4
        await cancel_all(cluster)


async def cancel_all(cluster: SimCluster) -> None:
    """What a caller was never told of waits for its grace; the books are to balance before."""
    for resumable in [*cluster.server.resumables._kept]:
        resumable.forget()


async def test_the_newest_reader_is_right_and_the_older_one_is_told(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        whole = await uncut(cluster, resumable())
        heard, call = await begin(stub, resumable(), until_index=3)
        newer = Heard(heard.request, token=heard.token)
        taken_over = asyncio.create_task(refusal(call))
        assert same_answer(await go_on(stub, newer), whole)
        assert (await taken_over).reason is Reason.ATTACHED_ELSEWHERE


async def test_a_plain_request_ends_with_its_connection_at_once(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        heard, call = await begin(stub_of(channel), plain(resumable(1000)), until_index=3)
        assert heard.token == ""
        with cluster.standing():
            call.cancel()
            await cluster.until_balanced()
            assert cluster.server.relay.in_flight_count == 0


async def test_what_nobody_comes_back_to_is_cancelled_after_its_grace_and_counted(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(1500, grace_s=1.0), until_index=3)
        with cluster.standing():
            call.cancel()
            await cluster.until(lambda: cluster.server.resumables.detached_count == 1, "detached, and running")
            await cluster.until(lambda: cluster.server.resumables.kept_count == 0, "cancelled after the grace")
            await cluster.until_balanced()
        assert cluster.server.metrics.abandoned._value.get() == 1
        late = await refusal(stub.ResumeGenerate(heard.resume_request(has_continuation=False), timeout=60))
        assert (late.reason, late.status.value) == (Reason.RESUME_UNKNOWN, "NOT_FOUND")


async def test_a_generation_is_cancelled_at_once_when_its_caller_says_so(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(1500), until_index=3)
        message = pb.CancelGenerationRequest(resume_token=heard.token)
        ended = asyncio.create_task(refusal(call))
        with cluster.standing():
            assert (await stub.CancelGeneration(message, timeout=60)).was_running
            assert (await ended).reason is Reason.RESUME_UNKNOWN
            assert not (await stub.CancelGeneration(message, timeout=60)).was_running, "idempotent"
            await cluster.until_balanced()


# Who may come back


@pytest.mark.parametrize(("begun_by", "asked_by"), [("a", "b"), ("a", ""), ("", "a")])
async def test_another_tenant_cannot_attach_nor_cancel(tmp_path: Path, begun_by: str, asked_by: str) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(tenant=begun_by), until_index=3)
        stolen = heard.resume_request()
        stolen.tenant = asked_by
        denied = await refusal(stub.ResumeGenerate(stolen, timeout=60))
        assert (denied.reason, denied.status.value) == (Reason.RESUME_DENIED, "PERMISSION_DENIED")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CancelGeneration(pb.CancelGenerationRequest(resume_token=heard.token, tenant=asked_by))
        assert from_rpc_error(caught.value).reason is Reason.RESUME_DENIED
        async for response in call:
            heard.take(response)  # its own caller was not disturbed
        assert heard.finished is not None
        await cancel_all(cluster)


async def test_a_token_that_was_changed_is_denied_with_the_same_words(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(), until_index=3)
        middle = len(heard.token) // 2
        other = "A" if heard.token[middle] != "A" else "B"
        for token in (heard.token[:middle] + other + heard.token[middle + 1 :], "", "brt1.", heard.token[:-4]):
            message = pb.ResumeGenerateRequest(resume_token=token, next_token_index=3)
            denied = await refusal(stub.ResumeGenerate(message, timeout=60))
            assert denied.reason is Reason.RESUME_DENIED
            assert denied.message.startswith("the resume token is not valid for this caller")
        call.cancel()
        await cancel_all(cluster)


def keys_file(directory: Path, **keys: tuple[str, str]) -> Path:
    path = directory / "keys.toml"
    lines = []
    for name, (key, tenant) in keys.items():
        digest = hashlib.sha256(key.encode()).hexdigest()
        lines.append(f'[{name}]\nsha256 = "{digest}"\ntenant = "{tenant}"\n')
    path.write_text("".join(lines))
    assert set(tomllib.loads(path.read_text())) == set(keys)
    return path


async def test_where_keys_are_asked_for_no_public_call_goes_without_and_none_reads_anothers(tmp_path: Path) -> None:
    keys = keys_file(tmp_path, chat=("key-one", "shop"), batch=("key-two", "shop"))
    mine, theirs = (("authorization", "Bearer key-one"),), (("authorization", "Bearer key-two"),)
    async with (
        sim_cluster(tmp_path / "model", sim=SLOW, api_keys_path=str(keys)) as cluster,
        channel_to(cluster.endpoint.address) as channel,
    ):
        stub = stub_of(channel)
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "key-one"),)):
            denied = await refusal(stub.Generate(resumable(), timeout=60, metadata=metadata))
            assert (denied.reason, denied.status.value) == (Reason.UNAUTHENTICATED, "UNAUTHENTICATED")
        other = await refusal(stub.Generate(resumable(tenant="bank"), timeout=60, metadata=mine))
        assert (other.reason, other.status.value) == (Reason.PERMISSION_DENIED, "PERMISSION_DENIED")
        heard = Heard(resumable())
        call = stub.Generate(heard.request, timeout=60, metadata=mine)
        async for response in call:
            heard.take(response)
            if heard.next_index >= 3:
                break
        call.cancel()
        denied = await refusal(stub.ResumeGenerate(heard.resume_request(), timeout=60, metadata=theirs))
        assert denied.reason is Reason.RESUME_DENIED, "the same tenant, and yet another caller"
        denied = await refusal(stub.ResumeGenerate(heard.resume_request(), timeout=60))
        assert denied.reason is Reason.UNAUTHENTICATED
        await go_on(stub, heard, metadata=mine)
        assert heard.finished is not None
        await cancel_all(cluster)


# What is asked wrongly


@pytest.mark.parametrize(
    ("change", "field_name", "words"),
    [
        ({"next_token_index": 39}, "next_token_index", "is 39; the answer has no more than"),
        ({"next_token_index": -1}, "next_token_index", "is -1; must be 0 or more"),
        ({"next_token_index": 1, "next_token_indices": [1]}, "next_token_index", "is 1 beside next_token_indices"),
        ({"next_token_indices": [1, 1]}, "next_token_indices", "says 2 samples; the request asked for 1"),
    ],
)
async def test_an_index_that_cannot_be_is_refused_and_disturbs_nobody(
    tmp_path: Path, change: dict[str, Any], field_name: str, words: str
) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(400), until_index=3)
        error = await refusal(
            stub.ResumeGenerate(pb.ResumeGenerateRequest(resume_token=heard.token, **change), timeout=60)
        )
        assert words in error.message
        assert [each.field for each in error.violations] == ([field_name] if field_name else [])
        await asyncio.sleep(0)
        async for response in call:
            heard.take(response)
            if heard.next_index >= 6:
                break
        call.cancel()
        await cancel_all(cluster)


async def test_what_left_the_window_is_too_late_without_a_continuation_and_made_again_with_one(
    tmp_path: Path,
) -> None:
    async with sim_cluster(tmp_path, sim=SLOW, resume_window_token_count=64) as cluster:
        whole = await uncut(cluster, resumable(120))
        async with channel_to(cluster.endpoint.address) as channel:
            stub = stub_of(channel)
            heard, call = await begin(stub, resumable(120), until_index=3)
            call.cancel()
            await cluster.until(lambda: cluster.server.resumables.running_count == 0, "ended by itself")
            error = await refusal(stub.ResumeGenerate(heard.resume_request(has_continuation=False), timeout=60))
            assert (error.reason, error.status.value) == (Reason.RESUME_TOO_LATE, "OUT_OF_RANGE")
            assert error.metadata["next_token_index"] == str(heard.next_index)
            assert int(error.metadata["first_token_index"]) >= 52
            await go_on(stub, heard, has_continuation=True)
            assert same_answer(heard, whole)
            assert len(set(heard.generation_ids)) == 2, "another generation goes on with it"
            await cancel_all(cluster)


async def test_a_resumed_call_whose_time_ends_in_the_queue_says_so(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim=SLOW, default_deadline_s=0.4) as cluster,
        channel_to(cluster.endpoint.address) as channel,
    ):
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(400), until_index=3)
        call.cancel()
        await stub.CancelGeneration(pb.CancelGenerationRequest(resume_token=heard.token))
        cluster.set_workers()
        await cluster.until(lambda: not cluster.server.roster.view().ready(), "no worker is ready")
        told = await refusal(stub.ResumeGenerate(heard.resume_request(has_continuation=True)))
        assert told.reason is Reason.DEADLINE_EXCEEDED
        assert told.metadata == {"phase": "queue", "emitted_token_count": str(heard.next_index)}


async def test_whoever_reads_an_answer_after_its_deadline_has_all_the_time_of_the_call(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path) as cluster, channel_to(cluster.endpoint.address) as channel:
        stub = stub_of(channel)
        heard, call = await begin(stub, resumable(), until_index=3)
        call.cancel()
        (kept,) = cluster.server.resumables._kept
        await cluster.until(lambda: kept.window.last is not None, "the answer's end")
        kept.about = replace(kept.about, deadline_at=asyncio.get_running_loop().time() - 1.0)
        again = stub.ResumeGenerate(heard.resume_request(), timeout=60)
        assert 50 < (await again.read()).started.time_allowed.ToSeconds() <= 60
        again.cancel()


async def test_a_router_that_keeps_none_does_not_say_that_it_does(tmp_path: Path) -> None:
    for count in (0, 1):
        async with (
            sim_cluster(tmp_path, max_resumable_count=count) as cluster,
            BatonClient(cluster.endpoint.address) as client,
        ):
            assert (await client.get_model(timeout=60)).capabilities.has_resume is (count > 0)


async def test_there_is_a_limit_to_what_is_kept(tmp_path: Path) -> None:
    async with (
        sim_cluster(tmp_path, sim=SLOW, max_resumable_count=1) as cluster,
        channel_to(cluster.endpoint.address) as channel,
    ):
        stub = stub_of(channel)
        _, call = await begin(stub, resumable(1000), until_index=2)
        full = await refusal(stub.Generate(resumable(), timeout=60))
        assert (full.reason, full.status.value) == (Reason.TOO_MANY_RESUMABLE, "RESOURCE_EXHAUSTED")
        assert full.retry_after_s is not None
        call.cancel()
        await cancel_all(cluster)
        whole, _ = await begin(stub, resumable(3), until_index=10**9)
        assert whole.finished is not None
        again, _ = await begin(stub, resumable(3), until_index=10**9)  # in place of the one that was read to its end
        assert again.finished is not None
        await cancel_all(cluster)


# Where the generation is not


async def test_another_router_of_the_cluster_goes_on_from_what_the_caller_has(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        whole = await uncut(cluster, resumable())
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            heard, call = await begin(stub_of(channel), resumable(), until_index=7)
            unknown = await refusal(
                stub_of(elsewhere).ResumeGenerate(heard.resume_request(has_continuation=False), timeout=60)
            )
            assert unknown.reason is Reason.RESUME_UNKNOWN
            call.cancel()
            await cancel_all(cluster)  # its router is gone
            await go_on(stub_of(elsewhere), heard, has_continuation=True)
        assert same_answer(heard, whole)
        assert len(set(heard.generation_ids)) == 2


async def test_a_continuation_is_of_the_request_that_the_token_is_of(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            heard, call = await begin(stub_of(channel), resumable(), until_index=3)
            call.cancel()
            message = heard.resume_request()
            message.continuation.request.text = "Something else"
            assert (
                await refusal(stub_of(elsewhere).ResumeGenerate(message, timeout=60))
            ).reason is Reason.RESUME_DENIED
            message = heard.resume_request()
            del message.continuation.samples[0].ids[-2:]
            error = await refusal(stub_of(elsewhere).ResumeGenerate(message, timeout=60))
            assert [each.field for each in error.violations] == ["continuation.samples[0].ids"]
            message = heard.resume_request()
            message.next_token_index += 1  # as if the last chunk had had no token
            error = await refusal(stub_of(elsewhere).ResumeGenerate(message, timeout=60))
            assert [each.field for each in error.violations] == ["next_token_index"]
        await cancel_all(cluster)


@pytest.mark.parametrize("wrong", [-5, 10**9])
async def test_tokens_that_are_none_of_the_models_are_refused_by_place_and_cost_nothing(
    tmp_path: Path, wrong: int
) -> None:
    async with (
        sim_cluster(tmp_path, sim=SLOW) as cluster,
        second_router(cluster) as other,
        channel_to(cluster.endpoint.address) as channel,
        channel_to(other) as elsewhere,
    ):
        heard, call = await begin(stub_of(channel), resumable(), until_index=3)
        call.cancel()
        await cancel_all(cluster)
        message = heard.resume_request()
        message.continuation.samples[0].ids[1] = wrong
        error = await refusal(stub_of(elsewhere).ResumeGenerate(message, timeout=60))
        assert [each.field for each in error.violations] == ["continuation.samples[0].ids"]
        said = error.violations[0].description
        assert f"is {wrong} at index 1; must be 0 to {RULE.vocab_size - 1}, a token id of" in said


async def test_a_token_that_is_over_finds_nothing_though_its_generation_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, channel_to(cluster.endpoint.address) as channel:
        heard, call = await begin(stub_of(channel), resumable(9), until_index=3)
        call.cancel()
        desk = cluster.server.generation._desk
        now = desk._now()
        monkeypatch.setattr(desk, "_now", lambda: now + 7200.0)
        message = heard.resume_request(has_continuation=False)
        error = await refusal(stub_of(channel).ResumeGenerate(message, timeout=60))
        assert error.reason is Reason.RESUME_UNKNOWN
        monkeypatch.undo()
        await go_on(stub_of(channel), heard)
        await cancel_all(cluster)


async def test_an_answer_whose_tokens_are_all_there_ends_without_an_engine(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        whole = await uncut(cluster, resumable(9))
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            heard, call = await begin(stub_of(channel), resumable(9), until_index=9)
            call.cancel()
            await cancel_all(cluster)
            heard.finished = None
            await go_on(stub_of(elsewhere), heard, has_continuation=True)
        assert same_answer(heard, whole)
        assert heard.finished is not None
        assert heard.finished.phases.attempt_count == 0
        assert heard.finished.phases.placement_reason == "already_ended"


async def test_a_continuation_of_which_its_caller_heard_nothing_makes_place_for_the_next(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        whole = await uncut(cluster, resumable(60))
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            heard, call = await begin(stub_of(channel), resumable(60), until_index=3)
            call.cancel()
            await cancel_all(cluster)
            old = heard.token
            call = stub_of(elsewhere).ResumeGenerate(heard.resume_request(), timeout=60)
            async for response in call:
                assert response.started.resume_token != old
                break  # and the caller never got it
            call.cancel()
            await go_on(stub_of(elsewhere), heard, has_continuation=True)
            assert same_answer(heard, whole)


async def test_whoever_is_ahead_of_a_continuation_it_never_heard_of_goes_on_from_its_own_tokens(
    tmp_path: Path,
) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        whole = await uncut(cluster, resumable(60))
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            heard, call = await begin(stub_of(channel), resumable(60), until_index=3)
            call.cancel()
            unheard = stub_of(elsewhere).ResumeGenerate(heard.resume_request(), timeout=60)
            async for _ in unheard:
                break
            unheard.cancel()
            async for response in stub_of(channel).ResumeGenerate(heard.resume_request(), timeout=60):
                heard.take(response)  # back at the first router, which is ahead of the second
                if heard.next_index >= 30:
                    break
            await go_on(stub_of(elsewhere), heard, has_continuation=True)
            assert same_answer(heard, whole)
        await cancel_all(cluster)


# Several answers at once


def three(count: int = 30) -> pb.GenerateRequest:
    request = resumable(count)
    request.sample_count = 3
    request.sampling.temperature = 1.0
    request.sampling.seed = 11
    return request


class ThreeHeard:
    """What a caller of three samples keeps."""

    def __init__(self) -> None:
        self.samples = [Heard(pb.GenerateRequest()) for _ in range(3)]
        self.token = ""
        self.finished: pb.Finished | None = None

    def take(self, response: Any) -> None:
        match response.WhichOneof("event"):
            case "started":
                self.token = response.started.resume_token
            case "chunk":
                self.samples[response.chunk.sample_index].take(response)
            case "finished":
                self.finished = response.finished

    def resume_request(self, request: pb.GenerateRequest | None) -> pb.ResumeGenerateRequest:
        message = pb.ResumeGenerateRequest(
            resume_token=self.token, next_token_indices=[each.next_index for each in self.samples]
        )
        if request is not None:
            message.continuation.request.CopyFrom(request)
            for each in self.samples:
                message.continuation.samples.add(ids=each.token_ids)
        return message

    def said(self) -> list[tuple[list[int], str]]:
        assert self.finished is not None
        assert [each.output_token_count for each in self.finished.samples] == [
            len(each.token_ids) for each in self.samples
        ]
        return [(each.token_ids, each.text) for each in self.samples]


async def whole_of_three(stub: Any, request: pb.GenerateRequest) -> ThreeHeard:
    heard = ThreeHeard()
    async for response in stub.Generate(plain(request), timeout=60):
        heard.take(response)
    return heard


@pytest.mark.parametrize("token_count", [1, 20, 60, 88])
@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_several_samples_go_on_each_from_its_own_place(
    tmp_path: Path, token_count: int, is_elsewhere: bool
) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            stub = stub_of(channel)
            whole = await whole_of_three(stub, three())
            heard = ThreeHeard()
            call = stub.Generate(three(), timeout=60)
            async for response in call:
                heard.take(response)
                if sum(len(each.token_ids) for each in heard.samples) >= token_count:
                    break
            call.cancel()
            if is_elsewhere:
                await cancel_all(cluster)
            message = heard.resume_request(three() if is_elsewhere else None)
            async for response in stub_of(elsewhere if is_elsewhere else channel).ResumeGenerate(message, timeout=60):
                heard.take(response)
        assert heard.said() == whole.said()
        await cancel_all(cluster)


async def test_samples_whose_lead_has_ended_go_on_without_it(tmp_path: Path) -> None:
    async with sim_cluster(tmp_path, sim=SLOW) as cluster, second_router(cluster) as other:
        async with channel_to(cluster.endpoint.address) as channel, channel_to(other) as elsewhere:
            stub = stub_of(channel)
            whole = await whole_of_three(stub, three())
            heard = ThreeHeard()
            call = stub.Generate(three(), timeout=60)
            async for response in call:
                heard.take(response)
                if heard.samples[0].next_index >= 5:
                    break
            call.cancel()
            await cancel_all(cluster)
            lead = heard.samples[0]
            lead.token_ids, lead.text, lead.next_index = list(whole.samples[0].token_ids), whole.samples[0].text, 30
            async for response in stub_of(elsewhere).ResumeGenerate(heard.resume_request(three()), timeout=60):
                heard.take(response)
        assert heard.said() == whole.said()

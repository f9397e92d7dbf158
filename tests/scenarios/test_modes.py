"""Logprobs, least lengths, tenants and the account of a transfer, through router and simulated workers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from baton.leg import DecodeOrder, KvAdopted, RecomputeReason
from baton.request import Handover, LegFinish, TokenLogprobs
from baton.testing import in_virtual_time
from bench.virtual_cluster import RULE, ProcessClient, TokenAnswer, VirtualCluster, virtual_cluster
from router.answering import Completed, Piece, RoutedRequest
from router.placement import PlacementPolicy
from router.worker_client import DecodeSink


class Listened:
    """Every piece of one answer, and its end."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.completed: Completed | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return [each for piece in self.pieces for each in piece.logprobs]


async def listen(
    cluster: VirtualCluster,
    request: RoutedRequest,
    *,
    stop: Sequence[int] = (),
    on_token: Callable[[int], None] | None = None,
    pause_s: float = 0.0,
) -> Listened:
    heard = Listened()
    now = asyncio.get_running_loop().time()
    async with aclosing(cluster.relay.run(request, TokenAnswer(stop), now + 300, received_at=now)) as events:
        async for event in events:
            match event:
                case Piece():
                    heard.pieces.append(event)
                    if on_token is not None:
                        on_token(len(heard.token_ids))
                    await asyncio.sleep(pause_s)
                case Completed():
                    heard.completed = event
    return heard


def assert_aligned(heard: Listened) -> None:
    for piece in heard.pieces:
        assert len(piece.logprobs) == len(piece.token_ids)
        for token_id, each in zip(piece.token_ids, piece.logprobs, strict=True):
            assert each.top[0] == (token_id, each.logprob)  # the simulated engine draws the likeliest
    assert heard.completed is not None
    assert heard.completed.usage.output_token_count == len(heard.logprobs)
    assert heard.completed.cumulative_logprob == pytest.approx(sum(each.logprob for each in heard.logprobs))


@pytest.mark.parametrize("mode", ["split", "local"])
def test_every_token_has_its_logprobs_the_first_included_and_their_sum_is_told(mode: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(policy=PlacementPolicy(mode=mode)) as cluster:
            request = cluster.request(50, 12, top_logprob_count=3)
            heard = await listen(cluster, request)
            assert heard.token_ids == cluster.expected(request)
            assert_aligned(heard)
            assert all(len(each.top) == 3 for each in heard.logprobs)

    scenario()


@in_virtual_time
async def test_without_asking_nobody_gets_logprobs() -> None:
    async with virtual_cluster() as cluster:
        heard = await listen(cluster, cluster.request(50, 12))
        assert heard.logprobs == []
        assert heard.completed is not None
        assert heard.completed.cumulative_logprob is None


@pytest.mark.parametrize("at_token", [1, 2, 7, 11])
def test_logprobs_survive_the_death_of_a_decode_worker_without_gap_or_repeat(at_token: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(1, 2) as cluster:
            request = cluster.request(50, 12, top_logprob_count=2)
            undisturbed = await listen(cluster, request)

            def kill(count: int) -> None:
                for flight in cluster.relay._flights:
                    if count == at_token and flight.handoff.decode_worker_id:
                        cluster.processes[flight.handoff.decode_worker_id].die()

            heard = await listen(cluster, replace(request, generation_id="again"), on_token=kill)
            assert heard.token_ids == undisturbed.token_ids
            assert heard.logprobs == undisturbed.logprobs
            assert_aligned(heard)

    scenario()


@pytest.mark.parametrize("max_chunk_token_count", [1, 4, 64])
def test_a_stop_sequence_cuts_ids_logprobs_counts_and_sum_at_the_same_token(max_chunk_token_count: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            request = cluster.request(50, 30, top_logprob_count=1, max_chunk_token_count=max_chunk_token_count)
            whole = cluster.expected(request)
            heard = await listen(cluster, request, stop=whole[9:11])
            assert heard.token_ids == whole[:11]
            assert_aligned(heard)

    scenario()


class HastyClient(ProcessClient):
    """Five tokens come at once, as after a pause of the network."""

    async def decode(self, order: DecodeOrder, *, timeout_s: float, sink: DecodeSink) -> None:
        await super().decode(order, timeout_s=timeout_s, sink=FiveAtOnce(sink))


class FiveAtOnce:
    def __init__(self, sink: DecodeSink) -> None:
        self._sink = sink
        self._waiting: list[tuple[int, TokenLogprobs]] = []

    def adopted(self, kv: KvAdopted) -> None:
        self._sink.adopted(kv)

    def tokens(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        self._waiting += zip(token_ids, logprobs, strict=True)
        if len(self._waiting) >= 5:
            self._let_go()

    def done(self, finish: LegFinish) -> None:
        if self._waiting:
            self._let_go()
        self._sink.done(finish)

    def _let_go(self) -> None:
        token_ids, logprobs = zip(*self._waiting, strict=True)
        self._waiting.clear()
        self._sink.tokens(token_ids, logprobs)


@pytest.mark.parametrize("stop_at", range(6, 12))
@pytest.mark.parametrize("max_chunk_token_count", [2, 64])
def test_a_stop_sequence_among_tokens_that_came_together_takes_no_logprob_from_behind_it(
    stop_at: int, max_chunk_token_count: int
) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(connect=HastyClient) as cluster:
            request = cluster.request(50, 30, top_logprob_count=1, max_chunk_token_count=max_chunk_token_count)
            whole = cluster.expected(request)
            heard = await listen(cluster, request, stop=whole[stop_at - 2 : stop_at])
            assert heard.token_ids == whole[:stop_at]
            assert_aligned(heard)

    scenario()


@in_virtual_time
async def test_a_slow_reader_gets_merged_pieces_whose_logprobs_are_still_one_per_token() -> None:
    async with virtual_cluster() as cluster:
        request = cluster.request(50, 60, top_logprob_count=1, max_chunk_token_count=16)
        heard = await listen(cluster, request, pause_s=30.0)
        assert heard.token_ids == cluster.expected(request)
        assert len(heard.pieces) < 10
        assert_aligned(heard)


@in_virtual_time
async def test_a_least_length_is_kept_over_the_whole_answer_also_when_a_worker_dies_in_it() -> None:
    rule = replace(RULE, eos_when=lambda position: True)
    async with virtual_cluster(1, 2, sim={"tokens": rule}) as cluster:
        request = cluster.request(50, 12, min_output_token_count=7)

        def kill(count: int) -> None:
            for flight in cluster.relay._flights:
                if count == 3 and flight.handoff.decode_worker_id:
                    cluster.processes[flight.handoff.decode_worker_id].die()

        assert (await listen(cluster, cluster.request(50, 12))).token_ids == [2]
        heard = await listen(cluster, request, on_token=kill)
        assert len(heard.token_ids) == 8
        assert heard.token_ids[-1] == 2
        assert 2 not in heard.token_ids[:-1]
        assert heard.completed is not None
        assert heard.completed.report.attempt_count == 2


@in_virtual_time
async def test_the_report_says_how_tokens_were_handed_over_and_what_the_pull_took() -> None:
    async with virtual_cluster() as cluster:
        report = (await cluster.exact(cluster.request(100, 5))).report
        assert report.handover is Handover.OUTPUT_INJECTION
        assert report.transfer.kv_bytes > 0
        assert report.transfer.pull_count == 1
        assert report.transfer.recompute_reason is None
        one_token = (await cluster.exact(cluster.request(100, 1))).report
        assert (one_token.handover, one_token.transfer.pull_count) == (Handover.NONE, 0)
    async with virtual_cluster(policy=PlacementPolicy(mode="local")) as cluster:
        local = (await cluster.exact(cluster.request(100, 5))).report
        assert (local.handover, local.transfer.kv_bytes) == (Handover.NONE, 0)


@in_virtual_time
async def test_an_answer_that_goes_on_locally_after_a_death_was_handed_its_tokens_too() -> None:
    async with virtual_cluster(0, 2) as cluster:

        def kill(count: int) -> None:
            for flight in cluster.relay._flights:
                if count == 4 and flight.handoff.decode_worker_id:
                    cluster.processes[flight.handoff.decode_worker_id].die()

        heard = await listen(cluster, cluster.request(50, 9), on_token=kill)
        assert heard.completed is not None
        assert heard.completed.report.attempt_count == 2
        assert heard.completed.report.handover is Handover.OUTPUT_INJECTION


def test_a_failed_pull_is_told_alike_in_report_metrics_and_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            cluster.network.cut_off(cluster.processes["prefill-0"].engine.config.engine_id)
            report = (await cluster.exact(cluster.request(100, 5, tenant="blue"))).report
            transfer = report.transfer
            assert transfer.recomputed_token_count > 0
            assert transfer.recompute_reason is RecomputeReason.FAILED
            sample = cluster.registry.get_sample_value
            assert sample("baton_recomputed_tokens_total") == transfer.recomputed_token_count
            assert sample("baton_recomputes_total", {"reason": "failed"}) == 1
            assert sample("baton_kv_pulls_total") == transfer.pull_count
            assert sample("baton_kv_descriptors_total") == transfer.descriptor_count
            for part in ("post", "wire", "verify"):
                told = sample("baton_kv_transfer_part_seconds_sum", {"part": part})
                assert told == getattr(transfer, f"{part}_s")
        (line,) = [record.getMessage() for record in caplog.records if record.name == "router.request"]
        said = json.loads(line)
        assert (said["recomputed_tokens"], said["recompute_reason"]) == (transfer.recomputed_token_count, "failed")
        assert (said["kv_pulls"], said["kv_descriptors"]) == (transfer.pull_count, transfer.descriptor_count)
        assert (said["handover"], said["tenant"]) == ("output_injection", "blue")

    scenario()

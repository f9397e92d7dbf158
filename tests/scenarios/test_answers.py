"""Answers when nothing goes wrong: complete, exact, counted, and with nothing left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from baton.request import FinishReason, PlacementMode
from baton.testing import in_virtual_time
from baton.timeline import Phase
from bench.virtual_cluster import BLOCK, CONTEXT, RULE, VirtualCluster, virtual_cluster
from engine.sim import PhaseDelays
from router.placement import PlacementPolicy


@in_virtual_time
async def test_a_prompt_goes_in_and_the_exact_tokens_come_out_of_split_prefill_and_decode() -> None:
    async with virtual_cluster() as cluster:
        heard = await cluster.exact(cluster.request(100, 20))
        assert heard.completed is not None
        assert heard.completed.reason is FinishReason.MAX_OUTPUT_TOKENS
        assert heard.completed.usage.prompt_token_count == 100
        report = heard.report
        assert (report.prefill_worker_id, report.decode_worker_id) == ("prefill-0", "decode-0")
        assert (report.mode, report.placement_reason) == (PlacementMode.SPLIT, "split")
        assert report.attempt_count == 1
        assert report.kv_transfer_bytes > 0
        assert report.recomputed_token_count == 0


@in_virtual_time
async def test_every_residue_of_the_prompt_length_modulo_the_block_size_is_exact() -> None:
    async with virtual_cluster(policy=PlacementPolicy()) as cluster:
        for prompt_token_count in range(1, 3 * BLOCK + 1):
            await cluster.exact(cluster.request(prompt_token_count, 2 * BLOCK + 1))


@pytest.mark.parametrize("mode", ["split", "local"])
def test_one_token_is_enough(mode: str) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(policy=PlacementPolicy(mode=mode)) as cluster:
            heard = await cluster.exact(cluster.request(50, 1))
            assert len(heard.tokens) == 1
            expected = PlacementMode.PREFILL_ONLY if mode == "split" else PlacementMode.LOCAL
            assert heard.report.mode is expected
            assert heard.report.kv_transfer_bytes == 0

    scenario()


@in_virtual_time
async def test_eos_as_first_token_never_reaches_a_decode_worker() -> None:
    rule = replace(RULE, eos_when=lambda position: position == 40)
    async with virtual_cluster(sim={"tokens": rule}) as cluster:
        heard = await cluster.exact(cluster.request(40, 10))
        assert heard.tokens == [2]
        assert heard.completed is not None
        assert heard.completed.reason is FinishReason.STOP
        assert heard.completed.matched_stop_token_id == 2
        assert heard.report.mode is PlacementMode.PREFILL_ONLY
        assert heard.report.decode_worker_id == ""


@in_virtual_time
async def test_eos_and_stop_tokens_end_the_answer_and_say_which_it_was() -> None:
    rule = replace(RULE, eos_when=lambda position: position == 45)
    async with virtual_cluster(sim={"tokens": rule}) as cluster:
        heard = await cluster.exact(cluster.request(40, 10))
        assert heard.completed is not None
        assert (heard.tokens[-1], heard.completed.matched_stop_token_id) == (2, 2)
        request = cluster.request(40, 10, ignore_eos=True)
        heard = await cluster.exact(request)
        assert heard.completed is not None
        assert heard.completed.reason is FinishReason.MAX_OUTPUT_TOKENS
        stopper = cluster.expected(cluster.request(30, 9))[3]
        request = cluster.request(30, 9)
        request = replace(request, stop_token_ids=(cluster.expected(request)[3], stopper))
        heard = await cluster.exact(request)
        assert heard.completed is not None
        assert heard.completed.matched_stop_token_id == heard.tokens[-1]


@pytest.mark.parametrize("first", [0, 1, 4])
def test_a_stop_sequence_ends_the_answer_at_the_token_that_completes_it(first: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            request = cluster.request(60, 30)
            expected = cluster.expected(request)
            heard = await cluster.ask(request, stop=expected[first : first + 1])
            assert heard.completed is not None
            assert heard.tokens == expected[: first + 1]
            assert heard.completed.reason is FinishReason.STOP
            assert heard.completed.matched_stop_sequence == "stop"
            assert heard.completed.usage.output_token_count == first + 1
            if first == 0:
                assert heard.report.decode_worker_id == "", "a stop in the first token must not cost a decode"

    scenario()


@in_virtual_time
async def test_a_full_context_is_told_from_a_limit_of_the_caller() -> None:
    async with virtual_cluster() as cluster:
        request = cluster.request(CONTEXT - 5, 5, is_context_bound=True)
        heard = await cluster.exact(request)
        assert heard.completed is not None
        assert heard.completed.reason is FinishReason.CONTEXT_FULL


@in_virtual_time
async def test_local_prefill_gives_the_same_answer() -> None:
    async with virtual_cluster(policy=PlacementPolicy(local_prompt_token_count=64)) as cluster:
        short = await cluster.exact(cluster.request(64, 12))
        assert (short.report.mode, short.report.placement_reason) == (PlacementMode.LOCAL, "short_prompt")
        assert short.report.durations[Phase.HANDOFF_WAIT] == short.report.durations[Phase.KV_TRANSFER] == 0
        assert short.report.durations[Phase.PREFILL] > 0.064
        assert (await cluster.exact(cluster.request(65, 12))).report.mode is PlacementMode.SPLIT


@in_virtual_time
async def test_many_requests_at_once_are_all_exact() -> None:
    async with virtual_cluster(2, 2) as cluster:
        requests = [cluster.request(1 + 13 * index % 300, 1 + index % 40) for index in range(120)]
        await asyncio.gather(*(cluster.exact(request) for request in requests))


PHASE_DELAYS = {
    Phase.QUEUE: ("prefill", PhaseDelays(queue=0.7)),
    Phase.PREFILL: ("prefill", PhaseDelays(prefill=0.7)),
    Phase.HANDOFF_WAIT: ("decode", PhaseDelays(queue=0.7)),
    Phase.KV_TRANSFER: ("decode", PhaseDelays(transfer=0.7)),
    Phase.DECODE_WAIT: ("decode", PhaseDelays(decode_wait=0.7)),
    Phase.DECODE: ("decode", PhaseDelays(decode=0.7)),
}


@pytest.mark.parametrize("phase", list(PHASE_DELAYS))
def test_a_delay_injected_into_one_phase_shows_in_that_phase_alone(phase: Phase) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            plain = (await cluster.exact(cluster.request(100, 3))).report.durations
            role, delays = PHASE_DELAYS[phase]
            cluster.processes[f"{role}-0"].engine.extra_delay_s = delays
            slow = (await cluster.exact(cluster.request(100, 3))).report.durations
            steps = 2 if phase is Phase.DECODE else 1
            for each in Phase:
                added = steps * 0.7 if each is phase else 0.0
                assert slow[each] - plain[each] == pytest.approx(added, abs=1e-9), each

    scenario()


@in_virtual_time
async def test_metrics_say_the_same_as_the_report() -> None:
    async with virtual_cluster() as cluster:
        report = (await cluster.exact(cluster.request(100, 20))).report
        sample = cluster.registry.get_sample_value
        for phase in Phase:
            assert sample("baton_phase_seconds_sum", {"phase": phase.value}) == report.durations[phase]
        assert sample("baton_end_to_end_seconds_sum") == report.durations.total_s
        assert sample("baton_time_to_first_token_seconds_sum") == report.durations.time_to_first_token_s
        assert sample("baton_requests_total", {"outcome": "ok"}) == 1
        assert sample("baton_output_tokens_total") == 20
        assert sample("baton_kv_transfer_bytes_total") == report.kv_transfer_bytes


def test_the_log_line_says_the_same_as_the_report_and_nothing_of_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            request = cluster.request(100, 20, correlation_id='line\nbreak"')
            report = (await cluster.exact(request)).report
            (line,) = [record.getMessage() for record in caplog.records if record.name == "router.request"]
            fields = json.loads(line)
            assert "\n" not in line
            assert fields["correlation_id"] == 'line\nbreak"'
            assert (fields["outcome"], fields["output_tokens"], fields["mode"]) == ("ok", 20, "split")
            assert fields["kv_bytes"] == report.kv_transfer_bytes
            for phase in Phase:
                assert fields[f"{phase.value}_s"] == pytest.approx(report.durations[phase], abs=1e-6)
            said = "".join(record.getMessage() for record in caplog.records)
            assert ", ".join(map(str, request.prompt_token_ids[:3])) not in said

    scenario()


@in_virtual_time
async def test_a_stalled_reader_holds_nothing_up_and_gets_its_pieces_merged() -> None:
    async with virtual_cluster() as cluster:
        request = cluster.request(100, 200, max_chunk_token_count=50)
        events = _stalling(cluster, request)
        first = await anext(events)
        await asyncio.sleep(60)
        books = cluster.books()
        assert books["decode-0"]["legs"] == 0, "decode waited for a slow reader"
        assert books["prefill-0"]["leases"] == 0
        pieces = [first] + [piece async for piece in events]
        assert [token for piece in pieces for token in piece] == cluster.expected(request)
        assert max(map(len, pieces)) <= 50
        assert len(pieces) <= 10


async def _stalling(cluster: VirtualCluster, request):  # type: ignore[no-untyped-def]
    from contextlib import aclosing

    from bench.virtual_cluster import TokenAnswer
    from router.answering import Piece

    now = asyncio.get_running_loop().time()
    async with aclosing(cluster.relay.run(request, TokenAnswer(), now + 300, received_at=now)) as events:
        async for event in events:
            if isinstance(event, Piece):
                yield event.token_ids


def test_the_log_line_of_a_failure_names_its_reason_and_phase(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster() as cluster:
            heard = await cluster.ask(cluster.request(100, 50), timeout_s=0.05)
            assert heard.error is not None
        (line,) = [record.getMessage() for record in caplog.records if record.name == "router.request"]
        said = json.loads(line)
        assert (said["outcome"], said["error"], said["error_phase"]) == ("deadline", "DEADLINE_EXCEEDED", "prefill")

    scenario()

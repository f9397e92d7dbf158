"""Streams cut on the running cluster, with real engines: read on where they are, computed on where they are not."""

from __future__ import annotations

import pytest
from patience import WITHIN_S
from service_under_test import Service

from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc as pb_grpc
from bench.exactness import TIE_GAP_BFLOAT16, Answer, expected, judge
from bench.resuming_caller import Heard, ResumingCaller, channel_to
from bench.tcp_cutter import tcp_cutter

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="session")]

TOKEN_COUNT = 48


def request_of(prompt_token_ids: tuple[int, ...], token_count: int = TOKEN_COUNT) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    request.token_ids.ids.extend(prompt_token_ids)
    request.stop.max_output_token_count = token_count
    request.stop.ignore_eos = True
    request.output.content = pb.OutputOptions.CONTENT_BOTH
    request.resume.SetInParent()
    return request


async def test_a_stream_whose_sockets_are_cut_is_the_stream_that_was_made(service: Service) -> None:
    prompt = service.questions.corpus.prompt(120)
    # The first three are less than any connection brings that brings the end, even of an answer that is over by then
    # and comes in one piece. The very first lets the resume token through.
    budgets = iter((700, 250, 250, 900, 1500, 2500))
    async with (
        tcp_cutter(service.fleet.address, lambda: next(budgets, None)) as cutter,
        channel_to(cutter.address) as channel,
    ):
        heard = await ResumingCaller([channel], timeout_s=WITHIN_S).ask(request_of(prompt))
    assert heard.finished is not None
    assert heard.ends.total() - heard.ends["finished"] >= 3, "it was cut indeed"
    assert len(set(heard.generation_ids)) == 1, "computed once, read in parts"
    async with channel_to(service.fleet.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        whole = Heard(heard.request, token=heard.token)
        async for response in stub.ResumeGenerate(whole.resume_request(has_continuation=False), timeout=WITHIN_S):
            whole.take(response)
        assert (whole.token_ids, whole.text) == (heard.token_ids, heard.text)
        assert len(whole.token_ids) == TOKEN_COUNT
        await stub.CancelGeneration(pb.CancelGenerationRequest(resume_token=heard.token), timeout=WITHIN_S)
    await service.fleet.quiet_after_s(service.baseline, WITHIN_S)


async def test_what_its_router_no_longer_has_is_computed_on_as_one_engine_would(service: Service) -> None:
    asked = service.questions
    case = next(case for case in asked.cases if case.max_token_count >= 12 and not case.stop_sequences)
    oracle = asked.oracle[case.name]
    async with channel_to(service.fleet.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        request = request_of(case.prompt_token_ids, case.max_token_count)
        request.stop.ignore_eos = case.ignore_eos
        request.stop.stop_token_ids.extend(case.stop_token_ids)
        heard = Heard(request)
        call = stub.Generate(request, timeout=WITHIN_S)
        async for response in call:
            heard.take(response)
            if heard.next_index >= 5:
                break
        call.cancel()
        await stub.CancelGeneration(pb.CancelGenerationRequest(resume_token=heard.token), timeout=WITHIN_S)
        async for response in stub.ResumeGenerate(heard.resume_request(), timeout=WITHIN_S):
            heard.take(response)
        assert len(set(heard.generation_ids)) == 2
        assert heard.finished is not None
        got = Answer(tuple(heard.token_ids), heard.text, pb.FinishReason.Name(heard.finished.reason)[14:])
        want = expected(asked.corpus, case, oracle, asked.eos_token_id)
        verdict = judge(case, want, got, oracle, TIE_GAP_BFLOAT16)
        assert verdict.kind in ("exact", "tie"), verdict
        await stub.CancelGeneration(pb.CancelGenerationRequest(resume_token=heard.token), timeout=WITHIN_S)
    await service.fleet.quiet_after_s(service.baseline, WITHIN_S)

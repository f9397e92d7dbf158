"""The Node example's way to go on with a cut stream, against a server that says exactly what each test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from test_examples import EXAMPLES, node, run  # noqa: F401  # node is a fixture

from baton.errors import BatonError, Reason, StatusName
from baton.status import to_rpc_status
from baton.v1 import generation_pb2 as pb
from baton.v1 import generation_pb2_grpc

READ = """
const { Baton } = require(process.argv[2]);
(async () => {
  const baton = new Baton(process.argv[3]);
  const texts = {};
  let error = null;
  try {
    for await (const { chunk } of baton.generate(JSON.parse(process.argv[4]), { timeoutMs: 20000 })) {
      if (chunk) texts[chunk.sample_index] = (texts[chunk.sample_index] ?? "") + chunk.text;
    }
  } catch (failure) {
    error = failure.reason ?? failure.status ?? String(failure);
  }
  baton.close();
  console.log(JSON.stringify({ texts, error }));
})();
"""

Said = pb.GenerateResponse
STARTED = Said(started=pb.Started(generation_id="g", model="m", resume_token="token"))
FINISHED = Said(finished=pb.Finished(reason=pb.FINISH_REASON_STOP))
LOST = grpc.StatusCode.UNAVAILABLE
Step = pb.GenerateResponse | BatonError | grpc.StatusCode


def chunk(first: int, text: str, *ids: int, sample: int = 0) -> pb.GenerateResponse:
    return Said(
        chunk=pb.Chunk(first_token_index=first, text=text, token_ids=ids, token_count=len(ids), sample_index=sample)
    )


@dataclass
class Scripted(generation_pb2_grpc.GenerationServiceServicer):
    """Says the first list to Generate and the next ones to the resumes, and keeps what it was asked."""

    script: list[list[Step]]
    resumes: list[pb.ResumeGenerateRequest] = field(default_factory=list)
    cancel_count: int = 0

    def Generate(self, message: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        return self._say(context)

    def ResumeGenerate(self, message: pb.ResumeGenerateRequest, context: Any) -> Iterator[pb.ResumeGenerateResponse]:
        self.resumes.append(message)
        for event in self._say(context):
            yield pb.ResumeGenerateResponse.FromString(event.SerializeToString())

    def CancelGeneration(self, message: pb.CancelGenerationRequest, context: Any) -> pb.CancelGenerationResponse:
        self.cancel_count += 1
        return pb.CancelGenerationResponse(was_running=True)

    def _say(self, context: Any) -> Iterator[pb.GenerateResponse]:
        for step in self.script.pop(0):
            match step:
                case pb.GenerateResponse():
                    yield step
                case BatonError():
                    code, text, trailers = to_rpc_status(step)
                    context.set_trailing_metadata(trailers)
                    context.abort(code, text)
                case _:
                    context.abort(step, "Socket closed")


@contextmanager
def listening(service: Scripted) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


async def read(program: str, script: list[list[Step]], tmp_path: Path, **request: Any) -> tuple[Any, Scripted]:
    service = Scripted(script)
    path = tmp_path / "read.js"
    path.write_text(READ, encoding="utf-8")
    with listening(service) as address:
        asked = json.dumps({"text": "x", "resume": {}, **request})
        code, out, err = await run(program, path, EXAMPLES / "node" / "baton.js", address, asked)
    assert code == 0, err
    return json.loads(out), service


async def test_text_held_back_to_the_end_counts_as_a_token_and_is_not_asked_for_again(
    tmp_path: Path,
    node: str,  # noqa: F811
) -> None:
    first: list[Step] = [STARTED, chunk(0, "one", 7, 8), chunk(2, " tail"), LOST]
    heard, service = await read(node, [first, [STARTED, FINISHED]], tmp_path)
    assert heard == {"texts": {"0": "one tail"}, "error": None}
    (resume,) = service.resumes
    assert (resume.next_token_index, list(resume.next_token_indices)) == (3, [])
    assert [list(each.ids) for each in resume.continuation.samples] == [[7, 8]]


async def test_samples_go_on_each_from_its_own_token(tmp_path: Path, node: str) -> None:  # noqa: F811
    first: list[Step] = [STARTED, chunk(0, "a", 5, sample=1), chunk(0, "b", 6, 7), chunk(1, "c", 8, sample=1), LOST]
    rest: list[Step] = [STARTED, chunk(0, "d", 9, sample=2), chunk(2, "e", 4), FINISHED]
    heard, service = await read(node, [first, rest], tmp_path, sample_count=3)
    assert heard == {"texts": {"0": "be", "1": "ac", "2": "d"}, "error": None}
    (resume,) = service.resumes
    assert (resume.next_token_index, list(resume.next_token_indices)) == (0, [2, 2, 0])
    assert [list(each.ids) for each in resume.continuation.samples] == [[6, 7], [5, 8], []]


async def test_it_comes_back_for_every_reason_of_the_page(tmp_path: Path, node: str) -> None:  # noqa: F811
    cuts = [
        (Reason.DRAINING, StatusName.ABORTED),
        (Reason.NO_WORKER, StatusName.UNAVAILABLE),
        (Reason.QUEUE_FULL, StatusName.RESOURCE_EXHAUSTED),
        (Reason.ATTEMPTS_EXHAUSTED, StatusName.ABORTED),
        (Reason.STALLED, StatusName.ABORTED),
        (Reason.RESUME_TOO_LATE, StatusName.OUT_OF_RANGE),
    ]
    script: list[list[Step]] = [
        [STARTED, chunk(at, "x", at), BatonError(reason, status, "cut", retry_after_s=0.01)]
        for at, (reason, status) in enumerate(cuts)
    ]
    heard, service = await read(node, [*script, [STARTED, FINISHED]], tmp_path)
    assert heard == {"texts": {"0": "xxxxxx"}, "error": None}
    assert [each.next_token_index for each in service.resumes] == [1, 2, 3, 4, 5, 6]
    assert service.cancel_count == 0


async def test_who_is_too_late_from_the_beginning_of_a_call_does_not_ask_for_ever(
    tmp_path: Path,
    node: str,  # noqa: F811
) -> None:
    cut = BatonError(Reason.STALLED, StatusName.ABORTED, "cut")
    late = BatonError(Reason.RESUME_TOO_LATE, StatusName.OUT_OF_RANGE, "late")
    heard, service = await read(node, [[STARTED, chunk(0, "x", 7), cut], [late]], tmp_path)
    assert heard == {"texts": {"0": "x"}, "error": "RESUME_TOO_LATE"}
    assert len(service.resumes) == 1


@pytest.mark.parametrize(
    ("reason", "cancel_count"), [(Reason.ATTACHED_ELSEWHERE, 0), (Reason.INTERNAL, 1), (Reason.RESUME_UNKNOWN, 1)]
)
async def test_what_is_no_cut_ends_the_stream_and_another_reader_s_generation_is_left_to_it(
    tmp_path: Path,
    node: str,  # noqa: F811
    reason: Reason,
    cancel_count: int,
) -> None:
    failed = BatonError(reason, StatusName.ABORTED, "no cut")
    heard, service = await read(node, [[STARTED, chunk(0, "x", 7), failed]], tmp_path)
    assert heard == {"texts": {"0": "x"}, "error": reason.value}
    assert (service.resumes, service.cancel_count) == ([], cancel_count)


SECURITY = """
const { tlsOf } = require(process.argv[2]);
const found = JSON.parse(process.argv[3]).map((env) => {
  try {
    return tlsOf(env) && "TLS";
  } catch (error) {
    return error.message;
  }
});
console.log(JSON.stringify(found));
"""


async def test_an_empty_variable_or_one_that_it_does_not_know_is_no_plaintext(tmp_path: Path, node: str) -> None:  # noqa: F811
    path = tmp_path / "security.js"
    path.write_text(SECURITY, encoding="utf-8")
    names = [f"BATON_TLS_{each}" for each in ("CA", "CERTIFICATE", "KEY", "SERVER_NAME")]
    plain = [{}, {"BATON_TLS": ""}, {"BATON_TLS": "0"}, {"BATON_TLS": "0", "BATON_TLS_CA": ""}]
    cases = [
        *plain,
        {"BATON_TLS": "1"},
        *({name: ""} for name in names),
        {names[-1]: "n"},
        {names[-1]: "n", "BATON_TLS": "1"},
    ]
    code, out, err = await run(node, path, EXAMPLES / "node" / "baton.js", json.dumps(cases))
    assert code == 0, err
    empty = [f"{name} is set and empty; unset it" for name in names]
    alone = f"{names[-1]} alone is not for this client; add BATON_TLS=1"
    assert json.loads(out) == [*[None] * 4, "TLS", *empty, alone, "TLS"]

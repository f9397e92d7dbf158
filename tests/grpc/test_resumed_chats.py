"""A chat whose stream was cut goes on elsewhere with the calls, ids and text that it would have had.

vLLM's own parsers on two routers of one cluster, in front of engines that say what the test scripts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sim_cluster import RULE, TOKENIZER, sim_cluster
from test_resume import SLOW, cancel_all, go_on, second_router, stub_of

from baton.v1 import generation_pb2 as pb
from baton.v1 import model_pb2, model_pb2_grpc
from bench.resuming_caller import Heard as Cut
from bench.resuming_caller import channel_to
from router.tiny_model import END_ID

TEMPLATE = Path(__file__).parents[2] / "deploy/templates/chatml-tools.jinja"
SAID = (
    "<think>hm, the fox</think>Let me see. "
    '<tool_call>\n{"name": "tell_time", "arguments": {"zone": "the dog"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "tell_time", "arguments": {}}\n</tool_call>'
)
CUTS = (1, 6, 20, 45, 70)
REQUEST = pb.GenerateRequest(
    chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Time?")], tools=[pb.Tool(name="tell_time")]),
    output=pb.OutputOptions(content=pb.OutputOptions.CONTENT_BOTH),
    resume=pb.ResumeOptions(),
)


@dataclass
class Answer:
    text: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=lambda: defaultdict(lambda: ["", "", ""]))
    whole: list[tuple[str, str, str]] = field(default_factory=list)
    reason: int = 0

    def take(self, response: Any) -> None:
        match response.WhichOneof("event"):
            case "chunk":
                self.text += response.chunk.text
                self.reasoning += response.chunk.reasoning_text
                for delta in response.chunk.tool_call_deltas:
                    parts = (delta.id, delta.name, delta.arguments_json)
                    self.calls[delta.index] = [
                        had + more for had, more in zip(self.calls[delta.index], parts, strict=True)
                    ]
            case "finished":
                self.reason = response.finished.reason
                self.whole = [(call.id, call.name, call.arguments_json) for call in response.finished.tool_calls]


class BothHeard(Cut):
    """What resuming needs to know, and what a reader of chats does."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        super().__init__(request)
        self.answer = Answer()

    def take(self, response: Any) -> None:
        super().take(response)
        self.answer.take(response)


async def test_a_cut_chat_goes_on_elsewhere_with_the_same_calls(tmp_path: Path) -> None:
    ids = (*TOKENIZER.encode(SAID, add_special_tokens=False), END_ID)
    start = 0

    def scripted(position: int) -> int | None:
        return ids[position - start] if 0 <= position - start < len(ids) else None

    sim = {**SLOW, "tokens": replace(RULE, scripted=scripted)}
    config: dict[str, Any] = {
        "tool_parser": "hermes",
        "reasoning_parser": "qwen3",
        "chat_template_path": str(TEMPLATE),
    }
    async with (
        sim_cluster(tmp_path, sim=sim, **config) as cluster,
        second_router(cluster) as other,
        channel_to(cluster.endpoint.address) as channel,
        channel_to(other) as elsewhere,
    ):
        models = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        start = (await models.CountTokens(model_pb2.CountTokensRequest(chat=REQUEST.chat))).token_count
        whole = BothHeard(REQUEST)
        async for response in stub_of(channel).Generate(REQUEST, timeout=60):
            whole.take(response)
        await cancel_all(cluster)
        expected = whole.answer
        assert (expected.text.strip(), expected.reasoning) == ("Let me see.", "hm, the fox")
        assert [call[1:] for call in expected.whole] == [
            ("tell_time", '{"zone": "the dog"}'),
            ("tell_time", "{}"),
        ]
        assert [tuple(expected.calls[index]) for index in (0, 1)] == expected.whole
        for cut in CUTS:
            heard = BothHeard(REQUEST)
            call = stub_of(channel).Generate(REQUEST, timeout=60)
            async for response in call:
                heard.take(response)
                if heard.next_index >= cut:
                    break
            call.cancel()
            await cancel_all(cluster)
            await go_on(stub_of(elsewhere), heard, has_continuation=True)
            assert heard.answer == expected, cut

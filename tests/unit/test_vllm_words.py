"""What Baton's words become in vLLM's, without an engine: its modules are stood in for."""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.protocol import DecodeJob, EngineInfo
from engine.vllm_engine import VllmEngine


class Recorder:
    """Stands in for ``AsyncLLM``: notes what it was asked, and answers with nothing."""

    errored = False

    def __init__(self) -> None:
        self.priorities: list[int] = []

    async def generate(
        self, prompt: Any, sampling: Any, request_id: str, *, priority: int
    ) -> AsyncGenerator[Any, None]:
        self.priorities.append(priority)
        return
        yield

    async def abort(self, request_id: str) -> None:
        pass


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, **content: Any) -> None:
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)

    def anything(*args: Any, **named: Any) -> dict[str, Any]:
        return named

    kind = types.SimpleNamespace(DELTA="delta")
    module("vllm", SamplingParams=anything)
    module("vllm.exceptions", VLLMClientError=type("VLLMClientError", (Exception,), {}))
    module("vllm.inputs")
    module("vllm.inputs.engine", tokens_input=list)
    module("vllm.sampling_params", RequestOutputKind=kind)


@pytest.mark.usefixtures("no_vllm")
async def test_a_larger_priority_is_served_first_which_vllm_calls_a_smaller_one() -> None:
    config = EngineConfig(kind="vllm", model_path="/nowhere", model_name="m", kv_cache_bytes=1 << 24)
    engine = VllmEngine(config)
    engine._llm = recorder = Recorder()
    engine._info = EngineInfo("vllm", "m", 1024, 16, 100, 4, 10, 500)
    for priority in (-100, 0, 7):
        job = DecodeJob(leg_id="g.1", prompt_token_ids=(5, 6), priority=priority)
        assert [output async for output in engine._generate("r", job, 4, None)] == []
    assert recorder.priorities == [100, 0, -7]

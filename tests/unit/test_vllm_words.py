"""What Baton's words become in vLLM's, without an engine: its modules are stood in for."""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from baton.errors import BatonError, Reason
from baton.request import EngineStop, Sampling, Structure, StructureKind
from engine.config import EngineConfig
from engine.protocol import DecodeJob, EngineInfo
from engine.vllm_engine import VllmEngine
from kvtransfer.emitted_tokens import emitted_token_ids


class Recorder:
    """Stands in for ``AsyncLLM``: notes what it was asked, and answers with nothing."""

    errored = False

    def __init__(self) -> None:
        self.priorities: list[int] = []
        self.prompts: list[Any] = []
        self.samplings: list[Any] = []

    async def generate(
        self, prompt: Any, sampling: Any, request_id: str, *, priority: int
    ) -> AsyncGenerator[Any, None]:
        self.priorities.append(priority)
        self.prompts.append(prompt)
        self.samplings.append(sampling)
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

    def anything(*args: Any, **named: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**named)

    kind = types.SimpleNamespace(DELTA="delta")
    module("vllm", SamplingParams=anything)
    module("vllm.exceptions", VLLMClientError=type("VLLMClientError", (Exception,), {}))
    module("vllm.inputs")
    module("vllm.inputs.engine", tokens_input=lambda ids, *, cache_salt: (ids, cache_salt))
    module("vllm.sampling_params", RequestOutputKind=kind, StructuredOutputsParams=anything)
    module("vllm.v1.structured_output.backend_guidance", validate_guidance_grammar=refuses_the_word_bad)


def refuses_the_word_bad(sampling: Any) -> None:
    if "bad" in str(sampling.structured_outputs):
        raise ValueError("bad")
    if "broken" in str(sampling.structured_outputs):
        raise AttributeError("broken is what was asked for")


def engine_with(recorder: Recorder) -> VllmEngine:
    engine = VllmEngine(EngineConfig(kind="vllm", model_path="/nowhere", model_name="m", kv_cache_bytes=1 << 24))
    engine._llm = recorder
    engine._info = EngineInfo("vllm", "m", 1024, 16, 100, 4, 10, 500)
    return engine


async def asked(job: DecodeJob, max_token_count: int = 5, transfer: dict[str, Any] | None = None) -> Recorder:
    recorder = Recorder()
    _ = [output async for output in engine_with(recorder)._generate("r", job, max_token_count, transfer)]
    return recorder


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


@pytest.mark.usefixtures("no_vllm")
async def test_what_was_emitted_is_not_prompt_and_counts_towards_lengths() -> None:
    stop = EngineStop(5, min_token_count=4)
    job = DecodeJob("leg", (1, 2, 3, 4, 5), stop=stop, output_token_count=2, tenant="t", top_logprob_count=0)
    recorder = await asked(job, transfer={"do_remote_prefill": True})
    assert recorder.prompts == [([1, 2, 3], "t")]
    (params,) = recorder.samplings
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (7, 4, 0)
    assert emitted_token_ids(params.extra_args) == [4, 5]
    assert params.extra_args["kv_transfer_params"] == {"do_remote_prefill": True}


@pytest.mark.usefixtures("no_vllm")
async def test_a_prefill_is_asked_for_one_token_more_and_no_more_at_least() -> None:
    (params,) = (await asked(DecodeJob("leg", (1, 2, 3), stop=EngineStop(9, min_token_count=8)), 1)).samplings
    assert (params.max_tokens, params.min_tokens, params.extra_args) == (1, 1, None)


@pytest.mark.usefixtures("no_vllm")
async def test_every_mode_has_its_word() -> None:
    sampling = Sampling(
        0.5,
        0.25,
        3,
        0.125,
        7,
        1.0,
        -1.0,
        1.5,
        logit_bias=((5, -1.0),),
        allowed_token_ids=(1, 2),
        bad_token_sequences=((3,), (4, 5)),
        structure=Structure(StructureKind.REGEX, "a+"),
    )
    stop = EngineStop(5, stop_token_ids=(9,), ignore_eos=True)
    (params,) = (await asked(DecodeJob("leg", (1,), sampling, stop))).samplings
    said = (params.temperature, params.top_p, params.top_k, params.min_p, params.seed)
    assert said == (0.5, 0.25, 3, 0.125, 7)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (params.logit_bias, params.allowed_token_ids) == ({5: -1.0}, [1, 2])
    assert params._bad_words_token_ids == [[3], [4, 5]]
    assert params.structured_outputs == types.SimpleNamespace(regex="a+")
    assert (params.stop_token_ids, params.ignore_eos, params.logprobs) == ([9], True, None)


@pytest.mark.usefixtures("no_vllm")
async def test_no_mode_asked_for_is_none() -> None:
    (params,) = (await asked(DecodeJob("leg", (1,)))).samplings
    nothing = (params.logit_bias, params.allowed_token_ids, params.structured_outputs, params.extra_args)
    assert nothing == (None, None, None, None)
    assert not hasattr(params, "_bad_words_token_ids")


@pytest.mark.parametrize(
    ("structure", "word"),
    [
        (Structure(StructureKind.JSON_SCHEMA, "{}"), {"json": "{}"}),
        (Structure(StructureKind.JSON_OBJECT), {"json_object": True}),
        (Structure(StructureKind.GRAMMAR, "root ::= x"), {"grammar": "root ::= x"}),
        (Structure(StructureKind.CHOICE, choices=("a", "b")), {"choice": ["a", "b"]}),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.usefixtures("no_vllm")
async def test_every_structure_has_its_word(structure: Structure, word: dict[str, Any]) -> None:
    (params,) = (await asked(DecodeJob("leg", (1,), Sampling(structure=structure)))).samplings
    assert params.structured_outputs == types.SimpleNamespace(**word)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sampling.structure", {"sampling": Sampling(structure=Structure(StructureKind.REGEX, "bad"))}),
        ("sampling.structure", {"sampling": Sampling(structure=Structure(StructureKind.REGEX, "(" * 99))}),
        ("sampling.logit_bias", {"sampling": Sampling(logit_bias=((500, 1.0),))}),
        ("output_token_count", {"output_token_count": 2}),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.usefixtures("no_vllm")
async def test_what_the_engine_could_not_follow_never_reaches_it(field: str, changes: dict[str, Any]) -> None:
    recorder = Recorder()
    engine = engine_with(recorder)
    with pytest.raises(BatonError) as caught:
        _ = [output async for output in engine._generate("r", DecodeJob("leg", (1, 2), **changes), 5, None)]
    assert (caught.value.reason, caught.value.violations[0].field) == (Reason.INVALID_REQUEST, field)
    assert recorder.samplings == []


@pytest.mark.usefixtures("no_vllm")
async def test_a_fault_in_the_check_of_a_structure_is_not_told_as_the_callers() -> None:
    recorder = Recorder()
    job = DecodeJob("leg", (1, 2), Sampling(structure=Structure(StructureKind.REGEX, "broken")))
    with pytest.raises(BatonError) as caught:
        _ = [output async for output in engine_with(recorder)._generate("r", job, 5, None)]
    assert caught.value.reason is Reason.ENGINE_FAILED
    assert "AttributeError" in str(caught.value)
    assert "broken" not in str(caught.value)
    assert recorder.samplings == []

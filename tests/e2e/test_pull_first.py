"""The scheduler that pulls before it computes, on vLLM's scheduler and block manager, without a model.

Marked ``real`` for vLLM; starts no engine. Transfers are stood in for: a read takes as many looks as a test says.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm import AsyncEngineArgs, SamplingParams
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorTransferResults
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine.config import EngineConfig, EngineIdentity
from engine.vllm_arguments import engine_arguments
from kvtransfer import connector_steps
from kvtransfer.connector_steps import PullFirstScheduler

pytestmark = pytest.mark.real

BLOCK = 32
LATER = 10**9


class Transfers(KVConnectorBase_V1):  # type: ignore[misc]
    """Both sides of a connector. A read is over at the look that its request's parameters name, the first being 1."""

    requires_kv_delivery = False

    def __init__(self) -> None:
        self.connector_scheduler = self
        self.answers_pulls_only = False
        self.asked: dict[str, Request] = {}
        self.reading: dict[str, int] = {}
        self.failing: set[str] = set()
        self.begun: Counter[str] = Counter()
        self._bound: Any = None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        params = request.kv_transfer_params
        missing = request.num_tokens - 1 - num_computed_tokens if params and params["do_remote_prefill"] else 0
        if self.answers_pulls_only and missing <= 0:
            return None, False
        return max(0, missing), missing > 0

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return (0,)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if params and params["do_remote_prefill"]:
            params["do_remote_prefill"] = False
            if num_external_tokens:
                self.asked[request.request_id] = request

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        asked, self.asked = self.asked, {}
        return asked

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        self._bound = connector_metadata

    def clear_connector_metadata(self) -> None:
        self._bound = None

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        for request_id, request in self._bound.items():
            self.begun[request_id] += 1
            self.reading[request_id] = request.kv_transfer_params["looks"]
            if request.kv_transfer_params["fails"]:
                self.failing.add(request_id)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        for request_id in self.reading:
            self.reading[request_id] -= 1
        over = {request_id for request_id, looks in self.reading.items() if looks <= 0}
        for request_id in over:
            del self.reading[request_id]
        return KVConnectorTransferResults(finished_recving=over, failed_recving=over & self.failing)

    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None: ...
    def wait_for_save(self) -> None: ...


class Bench:
    """A scheduler with somebody who does what it says."""

    def __init__(self, kind: type[Scheduler], vllm_config: Any, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
        self.transfers = Transfers()
        vllm_config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        kv = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            kv_cache_layout="LBHNC",
        )
        monkeypatch.setattr(
            KVConnectorFactory, "create_connector", lambda config, role, kv_cache_config: self.transfers
        )
        monkeypatch.setattr(connector_steps, "_obstacle", lambda scheduler: None)
        monkeypatch.setattr(connector_steps, "get_kv_transfer_group", lambda: self.transfers)
        self.scheduler = kind(vllm_config, kv, StructuredOutputManager(vllm_config), BLOCK, log_stats=True)
        init_none_hash(hash)
        self._hasher = get_request_block_hasher(BLOCK, lambda value: hash(value).to_bytes(8, "big", signed=True))
        self.told_finished: Counter[str] = Counter()
        self.token_counts: Counter[str] = Counter()

    def add(
        self, name: str, length: int, output: int, *, looks: int = 0, fails: bool = False, priority: int = 0
    ) -> None:
        transfer = {"do_remote_prefill": True, "looks": looks, "fails": fails} if looks else None
        sampling = SamplingParams(
            max_tokens=output, ignore_eos=True, extra_args={"kv_transfer_params": transfer} if transfer else None
        )
        tokens = (
            list(range(length))
            if name.startswith("same")
            else [zlib.crc32(f"{name}/{n}".encode()) % 1000 for n in range(length)]
        )
        request = Request(
            name,
            tokens,
            sampling,
            None,
            arrival_time=len(self.scheduler.requests),
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        for name in output.finished_req_ids:
            self.told_finished[name] += 1
        worker = self.transfers
        worker.bind_connector_metadata(output.kv_connector_metadata)
        worker.start_load_kv(None)
        results = worker.get_transfer_results(set())
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        sampled = [[] if requests[name].is_prefill_chunk else [7] for name in names]
        for name, tokens in zip(names, sampled, strict=True):
            assert name not in worker.reading, "computed into blocks that a read may still write to"
            self.token_counts[name] += len(tokens)
        told = KVConnectorOutput(finished_recving=results.finished_recving, failed_recving=results.failed_recving)
        done = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=told,
        )
        self.scheduler.update_from_output(output, done)
        return output

    @property
    def free_block_count(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    model = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
        "max_position_embeddings": 512, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(model))
    config = EngineConfig(
        model_path=str(folder),
        model_name="none",
        kv_cache_bytes=1 << 20,
        max_context_token_count=512,
        max_batched_token_count=128,
        max_running_count=4,
        block_token_count=BLOCK,
    )
    whole = AsyncEngineArgs(**engine_arguments(config, EngineIdentity("w"))).create_engine_config()
    whole.model_config.skip_tokenizer_init = True  # there is none, and nothing here has a structure
    return whole


@pytest.fixture
def bench(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    return lambda kind=PullFirstScheduler, blocks=40: Bench(kind, vllm_config, monkeypatch, blocks)


def test_vllms_own_scheduler_takes_a_pulled_request_up_a_step_later(bench: Callable[..., Bench]) -> None:
    """What there is to gain, and that this bench shows it."""
    ours, stock = bench(), bench(Scheduler)
    for each, computed in ((ours, {"stream": 1, "pulled": 1}), (stock, {"stream": 1})):
        each.add("stream", 40, 50)
        each.step()
        each.add("pulled", 80, 50, looks=1)
        assert each.step().num_scheduled_tokens == computed
        assert each.step().num_scheduled_tokens == {"stream": 1, "pulled": 1}
        assert each.transfers.begun == {"pulled": 1}


def test_what_a_pass_says_once_is_said_to_the_worker(bench: Callable[..., Bench]) -> None:
    each = bench()
    for name in ("stays", "ends"):
        each.add(name, 40, 50)
    each.step()
    each.scheduler.finish_requests("ends", RequestStatus.FINISHED_ABORTED)
    each.add("pulled", 80, 50, looks=1)
    output = each.step()
    assert output.finished_req_ids == {"ends"}
    assert set(output.num_scheduled_tokens) == {"stays", "pulled"}
    # The worker still has the tokens of those that ran in the step before, and is not told them again.
    assert not output.scheduled_cached_reqs.all_token_ids
    assert each.step().finished_req_ids == set()


def test_a_read_that_goes_on_is_left_to_the_ordinary_steps(bench: Callable[..., Bench]) -> None:
    each = bench()
    each.add("stream", 40, 50)
    each.step()
    each.add("pulled", 80, 50, looks=4)
    assert [dict(each.step().num_scheduled_tokens) for _ in range(3)] == [{"stream": 1}] * 3
    assert each.step().num_scheduled_tokens == {"stream": 1, "pulled": 1}
    assert each.transfers.begun == {"pulled": 1}


def test_a_pull_begins_although_a_long_prompt_takes_the_whole_step(bench: Callable[..., Bench]) -> None:
    each = bench()
    each.add("long", 300, 50)
    each.step()
    each.add("pulled", 80, 50, looks=1)
    assert each.step().num_scheduled_tokens == {"long": 128}
    assert each.transfers.begun == {"pulled": 1}
    assert each.step().num_scheduled_tokens == {"long": 300 - 2 * 128, "pulled": 1}


def test_a_request_aborted_while_its_read_hangs_keeps_its_blocks(bench: Callable[..., Bench]) -> None:
    each = bench()
    before = each.free_block_count
    each.add("pulled", 80, 50, looks=LATER)
    each.step()
    each.scheduler.finish_requests("pulled", RequestStatus.FINISHED_ABORTED)
    each.step()
    assert each.free_block_count == before - 3
    each.transfers.reading["pulled"] = 1
    each.step()
    assert each.free_block_count == before


def test_a_failed_pull_is_computed_in_the_same_step(bench: Callable[..., Bench]) -> None:
    each = bench()
    each.add("pulled", 80, 3, looks=1, fails=True)
    assert each.step().num_scheduled_tokens == {"pulled": 80}


def test_a_prompt_that_is_all_cached_is_not_computed_by_the_pass_for_pulls(bench: Callable[..., Bench]) -> None:
    each = bench()
    each.add("same-1", 65, 1)
    each.step()
    each.add("same-2", 65, 2, looks=1)
    assert each.step().num_scheduled_tokens == {"same-2": 1}
    assert not each.transfers.begun


def test_a_pull_does_not_overtake_a_prompt_that_has_no_room(bench: Callable[..., Bench]) -> None:
    each = bench(blocks=12)
    each.add("stream", 120, 50)
    each.step()
    each.add("long", 300, 1)
    each.add("pulled", 20, 1, looks=1)
    assert each.step().num_scheduled_tokens == {"stream": 1}
    assert not each.transfers.begun


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_each_is_answered_and_nothing_is_left(bench: Callable[..., Bench], seed: int) -> None:
    """Prompts and pulls, quick, slow and failing, of all priorities, aborted at any moment, with too few blocks."""
    rng = random.Random(seed)
    each = bench(blocks=rng.choice((14, 24, 60)))
    before = each.free_block_count
    expected: dict[str, int] = {}
    aborted: set[str] = set()
    for number in range(40):
        for _ in range(rng.choice((0, 0, 1, 1, 3))):
            name = f"{rng.choice(('same', 'own'))}-{number}-{len(expected)}"
            expected[name] = rng.randint(1, 12)
            looks = rng.choice((0, 1, 1, 1, 2, 5))
            fails = rng.random() < 0.2
            length = rng.randint(2, 240)
            each.add(name, length, expected[name], looks=looks, fails=fails, priority=rng.choice((0, 0, 1)))
        if each.scheduler.requests and rng.random() < 0.2:
            name = rng.choice(list(each.scheduler.requests))
            aborted.add(name)
            each.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        each.step()
        queued = [*each.scheduler.waiting, *each.scheduler.kv_holding_waiting, *each.scheduler.running]
        assert len(queued) == len(set(queued))
        assert each.scheduler.deferred_waiting <= set(queued) - set(each.scheduler.running)
    for _ in range(1000):
        if not each.scheduler.has_requests():
            break
        each.step()
    assert not each.scheduler.requests
    assert each.free_block_count == before
    assert {name: each.token_counts[name] for name in expected if name not in aborted} == {
        name: count for name, count in expected.items() if name not in aborted
    }
    assert each.told_finished == dict.fromkeys(expected, 1)
    assert not each.transfers.reading
    assert set(each.transfers.begun.values()) <= {1}

"""vLLM's CPU worker with two mistakes of its model runner undone. Owns nothing; runs in the engine process.

A step that computes only part of a prompt samples a token all the same and throws it away. vLLM then takes the draw
back from the request's generator by its offset, which generators on a CPU do not have: a seeded request with a prompt
longer than one step ended the engine process, and its retries the next ones.

A request that goes on with an answer begun elsewhere (``kvtransfer/connector_scheduler.py`` gives its tokens to the
scheduler as output) reaches this runner as a new one, whose output it takes to be empty. Here it gets what a request
has that was preempted and resumed: the tokens, and a seed from which as many tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from kvtransfer.emitted_tokens import emitted_token_ids

CPU_WORKER = "kvtransfer.connector_runner.SeededCpuWorker"


class SeededRunner(CPUModelRunner):  # type: ignore[misc]
    def _update_states(self, scheduler_output: Any) -> Any:
        emitted = {
            new.req_id: token_ids
            for new in scheduler_output.scheduled_new_reqs
            if new.sampling_params is not None and (token_ids := emitted_token_ids(new.sampling_params.extra_args))
        }
        if not emitted:
            return super()._update_states(scheduler_output)
        with _resuming(self.input_batch, emitted):
            return super()._update_states(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Rows whose token is thrown away draw from no request's generator, so there is nothing to take back."""
        row_count = self.input_batch.num_reqs
        thrown_away = np.nonzero(self.discard_request_mask.np[:row_count])[0]
        with _without(self.input_batch.generators, map(int, thrown_away)):
            return super().sample_tokens(grammar_output)


class SeededCpuWorker(CPUWorker):  # type: ignore[misc]
    def init_device(self) -> None:
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SeededRunner  # the one place that names the class to make
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock


@contextmanager
def _resuming(batch: Any, emitted: Mapping[str, list[int]]) -> Iterator[None]:
    """While it lasts, a request joins the batch with what it has emitted.

    BEFORE it joins: the batch then copies tokens, counts and penalties, and tells the logits processors, as for any
    request that has output. The list is extended in place, because all of those keep this very list.
    """
    join = batch.add_request

    def add_request(request: Any) -> Any:
        token_ids = emitted.get(request.req_id)
        if token_ids is not None and not request.output_token_ids:
            request.output_token_ids.extend(token_ids)
            if request.generator is not None:
                burn_draws(request.generator, len(token_ids))
        return join(request)

    batch.add_request = add_request
    try:
        yield
    finally:
        del batch.add_request  # the instance's; the class's is there again


def burn_draws(generator: torch.Generator, token_count: int) -> None:
    """Leaves the generator as it is after so many tokens: vLLM's CPU sampler draws one seed for each."""
    for _ in range(token_count):
        torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)


@contextmanager
def _without(generators: dict[int, Any], rows: Iterator[int]) -> Iterator[None]:
    """The sampler sees this very dictionary. Rows do not move while tokens are sampled."""
    set_aside = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(set_aside)

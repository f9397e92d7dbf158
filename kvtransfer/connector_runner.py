"""vLLM's CPU worker with one mistake of its model runner undone. Owns nothing; runs in the engine process.

A step that computes only part of a prompt samples a token all the same and throws it away. vLLM then takes the draw
back from the request's generator by its offset, which generators on a CPU do not have: a seeded request with a prompt
longer than one step ended the engine process, and its retries the next ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

CPU_WORKER = "kvtransfer.connector_runner.SeededCpuWorker"


class SeededRunner(CPUModelRunner):  # type: ignore[misc]
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
def _without(generators: dict[int, Any], rows: Iterator[int]) -> Iterator[None]:
    """The sampler sees this very dictionary. Rows do not move while tokens are sampled."""
    set_aside = {row: generators.pop(row) for row in rows if row in generators}
    try:
        yield
    finally:
        generators.update(set_aside)

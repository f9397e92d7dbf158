"""The pair of engines once more on CUDA: the same code by configuration. Left out where there is no device."""

from __future__ import annotations

from typing import Any

import pytest
from engine_pair import alone, continuation, decoded, is_idle, kv_of, prefilled, prompt, running_pair

pytestmark = [pytest.mark.gpu, pytest.mark.real]


@pytest.mark.parametrize("token_count", [1, 15, 16, 17, 256, 2000])
async def test_a_handed_over_answer_is_the_answer_of_one_engine_on_cuda(token_count: int) -> None:
    changes: dict[str, Any] = {
        "device": "cuda",
        "dtype": "float32",
        "block_token_count": 16,
        "kv_cache_bytes": 2 << 30,
    }
    async with running_pair(**changes) as pair:
        ids = prompt(token_count)
        expected = await alone(pair.decoder, ids)
        first = await prefilled(pair.prefiller, ids)
        adopted, rest, _ = await decoded(pair.decoder, continuation(ids, first))
        await pair.prefiller.release(kv_of(first).handle)
        assert [first.first_token_id, *rest] == expected
        assert adopted.recomputed_token_count == 0
        assert adopted.transfer_bytes > 0
        await is_idle(pair.prefiller)
        await is_idle(pair.decoder)

"""An answer that nobody reads: what waits is bounded in bytes, and past the bound nothing is computed for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from baton.errors import BatonError, Reason
from baton.testing import in_virtual_time
from bench.virtual_cluster import TokenAnswer, virtual_cluster
from router.answering import Piece
from router.flight import FlightLimits
from router.samples.fan_out import fan_out

SMALL = FlightLimits(max_unread_bytes=16 * 1024)
TOKEN_COUNT = 900


@pytest.mark.parametrize("sample_count", [2, 4])
def test_past_the_bound_the_engines_stop_and_the_reader_gets_what_was_kept(sample_count: int) -> None:
    @in_virtual_time
    async def scenario() -> None:
        async with virtual_cluster(flight=SMALL) as cluster:
            now = asyncio.get_running_loop().time()
            events = fan_out(
                cluster.request(100, TOKEN_COUNT),
                cluster.relay.samples(sample_count),
                lambda sample, seat: cluster.relay.run(sample, TokenAnswer(), now + 600, received_at=now, seat=seat),
            )
            heard: dict[int, list[int]] = {}

            def hear(piece: Piece) -> None:
                of_sample = heard.setdefault(piece.sample_index, [])
                assert piece.first_token_index == len(of_sample)
                of_sample.extend(piece.token_ids)

            async with aclosing(events):
                while len(heard) < sample_count:
                    event = await anext(events)
                    if isinstance(event, Piece):
                        hear(event)
                await asyncio.sleep(300)
                for process in cluster.processes.values():
                    assert process.engine.load().used_block_count == 0, "it computes for nobody"

                async def rest() -> None:
                    async for event in events:
                        if isinstance(event, Piece):
                            hear(event)

                with pytest.raises(BatonError) as failed:
                    await rest()
            assert failed.value.reason is Reason.READER_TOO_SLOW
            assert not failed.value.is_retryable
            counts = [len(each) for each in heard.values()]
            assert failed.value.metadata["emitted_token_count"] == str(sum(counts))
            assert all(0 < count < TOKEN_COUNT for count in counts)

    scenario()

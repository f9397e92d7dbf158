"""API keys change while the router runs: calls that come later are let in or refused by the new ones."""

from __future__ import annotations

import hashlib
import logging
from contextlib import aclosing
from pathlib import Path

import pytest
from sim_cluster import FAST, SimCluster, sim_cluster

from baton.client import BatonClient
from baton.errors import Unauthenticated
from baton.events import Chunk, Started
from baton.request import StopConditions
from baton.status_client import StatusClient
from engine.cost import CostModel, DecodeCost
from router import key_file

SLOW = CostModel(prefill=FAST.prefill, decode=DecodeCost(base_s=0.05))
LONG = StopConditions(max_output_token_count=2000, ignore_eos=True)


def table(**keys: str) -> str:
    return "".join(f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n' for name, key in keys.items())


async def is_let_in(cluster: SimCluster, key: str) -> bool:
    async with BatonClient(cluster.endpoint.address, api_key=key) as client:
        try:
            return bool(await client.list_models(timeout=60))
        except Unauthenticated:
            return False


async def test_keys_change_for_the_calls_that_come_and_not_for_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(key_file, "LOOK_EVERY_S", 0.02)
    keys = tmp_path / "keys.toml"
    keys.write_text(table(chat="key-one", batch="key-two"))
    async with sim_cluster(tmp_path / "model", sim={"cost": SLOW}, api_keys_path=str(keys)) as cluster:
        callers = cluster.server._callers

        async def until_read_again(known: object) -> None:
            await cluster.until(lambda: callers._keys is not known, "the file was read again")

        async with (
            BatonClient(cluster.endpoint.address, api_key="key-one") as client,
            aclosing(client.generate("hi", timeout=600, stop=LONG)) as stream,
        ):
            assert isinstance(await anext(stream), Started)
            before = callers._keys
            keys.write_text(table(batch="key-three"))
            await until_read_again(before)
            assert [await is_let_in(cluster, f"key-{each}") for each in ("one", "two", "three")] == [
                False,
                False,
                True,
            ]
            with pytest.raises(Unauthenticated):
                await client.list_models(timeout=60)
            for _ in range(3):
                assert isinstance(await anext(stream), Chunk), "what was let in goes on"
        with caplog.at_level(logging.WARNING, logger=key_file.__name__):
            keys.write_text("[half a table")
            await cluster.until(lambda: bool(caplog.records), "a warning")
            assert await is_let_in(cluster, "key-three"), "a broken file changes nothing"
        before = callers._keys
        keys.write_text(table(batch="key-four"))
        await until_read_again(before)
        assert [await is_let_in(cluster, f"key-{each}") for each in ("three", "four")] == [False, True]


async def test_who_watches_with_a_key_that_is_taken_out_watches_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_file, "LOOK_EVERY_S", 0.02)
    keys = tmp_path / "keys.toml"
    keys.write_text(table(ops="key-one", other="key-two"))
    async with (
        sim_cluster(tmp_path / "model", api_keys_path=str(keys)) as cluster,
        StatusClient(cluster.endpoint.address, api_key="key-one") as ours,
        StatusClient(cluster.endpoint.address, api_key="key-two") as theirs,
        aclosing(ours.watch(interval_s=0.1)) as our_watch,
        aclosing(theirs.watch(interval_s=0.1)) as their_watch,
    ):
        callers = cluster.server._callers
        before = callers._keys
        assert (await anext(our_watch)).is_serving
        assert (await anext(their_watch)).is_serving
        keys.write_text(table(other="key-two"))
        await cluster.until(lambda: callers._keys is not before, "the file was read again")
        with pytest.raises(Unauthenticated):
            _ = [each async for each in our_watch]
        for _ in range(3):
            assert (await anext(their_watch)).is_serving, "a key that stays watches on"

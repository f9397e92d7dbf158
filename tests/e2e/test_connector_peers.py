"""Peers that were idle for longer than vLLM remembers them, and peers that differ: connectors without engines."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_pair import MODEL_PATH
from patience import WITHIN_S

from bench.transfer_pairs import Pair, Place, read_by

pytestmark = pytest.mark.real

REMEMBERED_S = 3600.0
"""vLLM's ``engine_ttl``."""


@contextmanager
def running_pair(files: Path, **reader_environment: str) -> Iterator[Pair]:
    here = Path(__file__).parent
    environment = {"PYTHONPATH": f"{here}:{here.parents[1]}"}
    places = (Place(environment=environment), Place(environment={**environment, **reader_environment}))
    cores = sorted(os.sched_getaffinity(0))
    made = Pair("baton", MODEL_PATH, (cores[0], cores[-1]), files, places, "peer_end")
    try:
        made.await_ready()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("pair")) as made:
        yield made


def said_of(pair: Pair, engine_id: str) -> dict[str, Any]:
    """What the reader's introduction to an engine came to."""
    ends_at = time.monotonic() + WITHIN_S
    while (said := pair.ask("reader", "said", engine_id=engine_id))["problem"] is None:
        assert time.monotonic() < ends_at, "the introduction does not end"
        time.sleep(0.01)
    return said


def test_a_peer_idle_for_an_hour_is_met_again_before_it_is_needed(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    pair.ask("reader", "meet", worker_id="prefill-0", **holder)
    assert said_of(pair, holder["engine_id"]) == {"problem": "", "is_known": True}
    pair.ask("reader", "pass_time", span_s=REMEMBERED_S + 1)
    # Somebody new, which is when vLLM forgets; that it does not answer makes no difference.
    pair.ask("reader", "meet", worker_id="prefill-1", engine_id="nobody", port=9)
    assert said_of(pair, "nobody")["problem"]
    assert said_of(pair, holder["engine_id"]) == {"problem": "", "is_known": True}
    read_by(pair, random.Random(1), 2, "adjacent", is_checked=True)


def test_a_read_from_a_peer_that_was_just_forgotten_meets_it_anew(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    pair.ask("reader", "meet", worker_id="prefill-0", **holder)
    assert said_of(pair, holder["engine_id"])["is_known"]
    pair.ask("reader", "pass_time", span_s=REMEMBERED_S + 1)
    pair.ask("reader", "meet", worker_id="prefill-1", engine_id="nobody-else", port=9)
    read_by(pair, random.Random(2), 2, "scattered", is_checked=True)  # no look in between: it meets it, and reads
    assert said_of(pair, holder["engine_id"])["is_known"]


def test_a_peer_that_is_gone_stays_forgotten(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    pair.ask("reader", "meet", worker_id="prefill-0", **holder)
    assert said_of(pair, holder["engine_id"])["is_known"]
    pair.ask("reader", "pass_time", span_s=REMEMBERED_S + 1)
    pair.children["holder"].stop()
    pair.ask("reader", "meet", worker_id="prefill-1", engine_id="nobody-at-all", port=9)
    assert said_of(pair, "nobody-at-all")["problem"]
    said = said_of(pair, holder["engine_id"])
    assert said["problem"]
    assert not said["is_known"]


def test_a_real_peer_with_other_blocks_is_refused_by_name_and_not_read_from(tmp_path: Path) -> None:
    with running_pair(tmp_path, BATON_TEST_BLOCK_TOKENS="64") as pair:
        holder = pair.ask("holder", "hello")
        pair.ask("reader", "meet", worker_id="prefill-0", **holder)
        said = said_of(pair, holder["engine_id"])
        assert not said["is_known"]
        assert "block_token_count: 64 here, 128 there" in said["problem"]
        assert "block_bytes: 49152 x 30 here, 98304 x 30 there" in said["problem"]

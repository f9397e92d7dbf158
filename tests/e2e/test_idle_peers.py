"""Peers that nobody has read from for longer than vLLM remembers them, with its connector and no engine."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_pair import MODEL_PATH

from bench.transfer_pairs import Pair, Place, _read

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

REMEMBERED_S = 3600.0
"""vLLM's ``engine_ttl``."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    here = Path(__file__).parent
    place = Place(environment={"PYTHONPATH": f"{here}:{here.parents[1]}"})
    cores = sorted(os.sched_getaffinity(0))
    files = tmp_path_factory.mktemp("pair")
    made = Pair("baton", MODEL_PATH, (cores[0], cores[-1]), files, (place, place), "idle_peer_end")
    try:
        made.await_ready()
        yield made
    finally:
        made.stop()


def said_of(pair: Pair, engine_id: str) -> dict[str, Any]:
    """What the reader's introduction to an engine came to."""
    ends_at = time.monotonic() + 20.0
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
    _read(pair, random.Random(1), 2, "adjacent", is_checked=True)


def test_a_read_from_a_peer_that_was_just_forgotten_meets_it_anew(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    pair.ask("reader", "meet", worker_id="prefill-0", **holder)
    assert said_of(pair, holder["engine_id"])["is_known"]
    pair.ask("reader", "pass_time", span_s=REMEMBERED_S + 1)
    pair.ask("reader", "meet", worker_id="prefill-1", engine_id="nobody-else", port=9)
    _read(pair, random.Random(2), 2, "scattered", is_checked=True)  # no look in between: it meets it, and reads
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

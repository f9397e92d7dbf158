"""Peers that were idle for longer than vLLM remembers them, and peers that differ: connectors without engines."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_pair import MODEL_PATH, TRY_COUNT
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
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Pair]]:
    made: list[Pair] = []
    with ExitStack() as stack:

        def latest() -> Pair:
            if not made or not made[-1].children["holder"].is_running():
                made.append(stack.enter_context(running_pair(tmp_path_factory.mktemp("pair"))))
            return made[-1]

        yield latest


@pytest.fixture
def pair(pairs: Callable[[], Pair]) -> Pair:
    """The one there is, while both of its ends live."""
    return pairs()


def said_of(pair: Pair, engine_id: str) -> dict[str, Any]:
    """What the reader's introduction to an engine came to."""
    ends_at = time.monotonic() + WITHIN_S
    while (said := pair.ask("reader", "said", engine_id=engine_id))["problem"] is None:
        assert time.monotonic() < ends_at, "the introduction does not end"
        time.sleep(0.01)
    return said


def met(pair: Pair, worker_id: str, **peer: Any) -> dict[str, Any]:
    """What an introduction came to. Once more where it was that the machine took longer than its second."""
    for _ in range(TRY_COUNT):
        pair.ask("reader", "meet", worker_id=worker_id, **peer)
        said = said_of(pair, peer["engine_id"])
        if not is_late(said):
            return said
    raise AssertionError(f"no introduction was over in time, {TRY_COUNT} times")


def is_late(said: dict[str, Any]) -> bool:
    return any(late in said["problem"] for late in ("timed out", "in time"))


def forget_all(pair: Pair, newcomer: str) -> None:
    """An hour passes. Then there is somebody new, which is when vLLM forgets; that it does not answer makes no
    difference."""
    pair.ask("reader", "pass_time", span_s=REMEMBERED_S + 1)
    pair.ask("reader", "meet", worker_id="prefill-1", engine_id=newcomer, port=9)


def test_a_peer_idle_for_an_hour_is_met_again_before_it_is_needed(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    for number in range(TRY_COUNT):
        assert met(pair, "prefill-0", **holder) == {"problem": "", "is_known": True}
        forget_all(pair, f"nobody-{number}")
        assert said_of(pair, f"nobody-{number}")["problem"]
        if not is_late(said := said_of(pair, holder["engine_id"])):
            break
    assert said == {"problem": "", "is_known": True}
    read_by(pair, random.Random(1), 2, "adjacent", is_checked=True)


def test_a_read_from_a_peer_that_was_just_forgotten_meets_it_anew(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    assert met(pair, "prefill-0", **holder)["is_known"]
    forget_all(pair, "nobody-else")
    read_by(pair, random.Random(2), 2, "scattered", is_checked=True)  # no look in between: it meets it, and reads
    assert said_of(pair, holder["engine_id"])["is_known"]


def test_a_peer_that_is_gone_stays_forgotten(pair: Pair) -> None:
    holder = pair.ask("holder", "hello")
    assert met(pair, "prefill-0", **holder)["is_known"]
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
        said = met(pair, "prefill-0", **holder)
        assert not said["is_known"]
        assert "block_token_count: 64 here, 128 there" in said["problem"]
        assert "block_bytes: 49152 x 30 here, 98304 x 30 there" in said["problem"]

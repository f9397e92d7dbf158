"""Which pulls may begin ahead of a step: never at the cost of a request that the step would have served first."""

from __future__ import annotations

from kvtransfer.early_pulls import EarlyPulls, Waiting, early_pulls


def chosen(waiting: list[Waiting], *, places: int = 8, free: int = 100, running: int = 0) -> EarlyPulls:
    return early_pulls(waiting, place_count=places, free_block_count=free, running_block_count=running)


def pull(name: str, block_count: int = 4) -> Waiting:
    return Waiting(name, is_pull=True, block_count=block_count)


def prompt(name: str, block_count: int = 4) -> Waiting:
    return Waiting(name, is_pull=False, block_count=block_count)


def test_pulls_begin_in_the_order_of_the_queue() -> None:
    assert chosen([pull("b"), pull("a"), pull("c")]).request_ids == ("b", "a", "c")


def test_no_more_pulls_begin_than_there_are_places() -> None:
    assert chosen([pull("a"), pull("b"), pull("c")], places=2).request_ids == ("a", "b")
    assert chosen([pull("a")], places=0) == EarlyPulls()
    assert chosen([pull("a")], places=-1) == EarlyPulls()


def test_a_prompt_ahead_of_a_pull_keeps_its_place() -> None:
    assert chosen([prompt("p"), pull("a")], places=1).request_ids == ()
    assert chosen([prompt("p"), pull("a")], places=2).request_ids == ("a",)


def test_blocks_are_left_for_running_requests_and_for_prompts_ahead() -> None:
    assert chosen([pull("a")], running=3).reserved_block_count == 3
    assert chosen([prompt("p", 10), pull("a")], running=3).reserved_block_count == 13


def test_a_prompt_behind_the_last_pull_holds_nothing_back() -> None:
    assert chosen([pull("a"), prompt("p", 10)], running=3) == EarlyPulls(("a",), 3)


def test_nobody_overtakes_a_prompt_for_which_there_is_no_room() -> None:
    waiting = [pull("a"), prompt("p", 90), prompt("q", 7), pull("b")]
    assert chosen(waiting, free=100).request_ids == ("a",)
    assert chosen(waiting, free=102).request_ids == ("a", "b")


def test_nobody_overtakes_a_pull_for_which_there_is_no_room() -> None:
    """The first is tried: the engine knows better than this bound what of it is cached already."""
    assert chosen([pull("a", 100), pull("b", 1)], free=100).request_ids == ("a",)


def test_no_pull_begins_where_running_requests_may_need_every_block() -> None:
    assert chosen([pull("a", 1)], free=5, running=5).request_ids == ()
    assert chosen([pull("a", 1)], free=6, running=5).request_ids == ("a",)

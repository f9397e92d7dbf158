"""A write that was begun is settled once, raises where it is settled, and leaves nothing when it is given up."""

from __future__ import annotations

import asyncio

import pytest

from router.begun_write import BegunWrite


class Wire:
    """Writes that are over when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.over: list[str] = []
        self.gates: list[asyncio.Future[None]] = []

    async def write(self, message: str, waits: int = 1) -> None:
        self.begun.append(message)
        for _ in range(waits):
            gate = asyncio.get_running_loop().create_future()
            self.gates.append(gate)
            await gate
        self.over.append(message)


async def test_a_write_begins_at_once_and_is_over_without_anybody_waiting() -> None:
    wire, writes = Wire(), BegunWrite()
    assert writes.try_settle()
    writes.begin(wire.write("a"))
    assert (wire.begun, writes.is_under_way, writes.try_settle()) == (["a"], True, False)
    wire.gates[0].set_result(None)
    assert not writes.is_under_way
    assert writes.try_settle()
    assert wire.over == ["a"]
    writes.begin(wire.write("b"))
    assert wire.begun == ["a", "b"]
    writes.close()


async def test_settling_waits_through_every_wait_of_the_write() -> None:
    wire, writes = Wire(), BegunWrite()
    writes.begin(wire.write("a", waits=2))
    settling = asyncio.create_task(writes.settle())
    for number in range(2):
        await asyncio.sleep(0)
        assert not settling.done()
        wire.gates[number].set_result(None)
        await asyncio.sleep(0)
    await settling
    assert wire.over == ["a"]


async def test_a_write_that_gives_way_to_others_is_settled_too() -> None:
    async def write() -> None:
        await asyncio.sleep(0)

    writes = BegunWrite()
    writes.begin(write())
    assert not writes.try_settle()
    await writes.settle()
    assert writes.try_settle()


async def test_what_a_write_raises_is_raised_where_it_is_settled_and_once() -> None:
    wire, writes = Wire(), BegunWrite()
    for settle in (True, False):
        writes.begin(wire.write("a"))
        wire.gates[-1].set_exception(ConnectionError("gone"))
        with pytest.raises(ConnectionError):
            await writes.settle() if settle else writes.try_settle()
        assert writes.try_settle()


async def test_a_write_that_cannot_begin_raises_at_once_and_the_next_one_may() -> None:
    async def refused() -> None:
        raise ConnectionError("gone")

    writes = BegunWrite()
    with pytest.raises(ConnectionError):
        writes.begin(refused())
    assert writes.try_settle()


async def test_closing_gives_up_what_is_under_way() -> None:
    wire, writes = Wire(), BegunWrite()
    writes.begin(wire.write("a"))
    writes.close()
    writes.close()
    assert wire.gates[0].cancelled()
    assert wire.over == []
    assert writes.try_settle()


async def test_a_settling_that_is_cancelled_leaves_the_write_to_be_closed() -> None:
    wire, writes = Wire(), BegunWrite()
    writes.begin(wire.write("a"))
    settling = asyncio.create_task(writes.settle())
    await asyncio.sleep(0)
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert writes.is_under_way
    writes.close()


async def test_a_write_that_is_over_when_it_is_given_up_comes_to_its_end_which_frees_what_it_holds() -> None:
    wire, writes = Wire(), BegunWrite()
    writes.begin(wire.write("a"))
    wire.gates[0].set_result(None)
    writes.close()
    assert wire.over == ["a"]
    writes.begin(wire.write("b", waits=2))
    wire.gates[1].set_result(None)
    writes.close()
    assert wire.gates[2].cancelled()
    writes.begin(wire.write("c"))
    wire.gates[3].set_exception(ConnectionError("the caller is gone"))
    writes.close()
    assert writes.try_settle()
    assert wire.over == ["a"]

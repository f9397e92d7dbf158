"""Every lease leaves the books exactly once."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.ledger import Ledger


def a_ledger(count: int = 4, hold_s: float = 60.0) -> Ledger:
    return Ledger(max_lease_count=count, max_hold_s=hold_s)


def test_a_lease_is_over_at_its_instant_and_not_before() -> None:
    ledger = a_ledger()
    ledger.grant(10.0, "t", "h", 5.0, kv_bytes=7)
    assert (ledger.next_expiry_at, ledger.held_bytes) == (15.0, 7)
    assert ledger.expire(14.999) == []
    assert [lease.handle for lease in ledger.expire(15.0)] == ["h"]
    assert ledger.expire(99.0) == []
    assert ledger.release("t") is None
    assert ledger.next_expiry_at is None


def test_a_released_lease_never_expires_and_is_released_once() -> None:
    ledger = a_ledger()
    ledger.grant(0.0, "t", "h", 5.0)
    released = ledger.release("t")
    assert released is not None
    assert released.handle == "h"
    assert ledger.release("t") is None
    assert ledger.expire(1e9) == []


def test_an_extension_starts_the_lease_anew_up_to_the_longest_hold() -> None:
    ledger = a_ledger(hold_s=12.0)
    ledger.grant(0.0, "t", "h", 5.0)
    assert ledger.extend(4.0, "t", 5.0)
    assert ledger.next_expiry_at == 9.0
    assert ledger.expire(5.0) == []
    assert ledger.extend(8.0, "t", 100.0)
    assert ledger.next_expiry_at == 12.0
    assert len(ledger.expire(12.0)) == 1
    assert not ledger.extend(12.0, "t", 5.0)


def test_an_extension_that_comes_at_the_end_or_later_is_too_late_even_before_the_sweep() -> None:
    ledger = a_ledger()
    ledger.grant(0.0, "t", "h", 5.0)
    assert not ledger.extend(5.0, "t", 5.0)
    assert len(ledger.expire(5.0)) == 1


def test_an_extension_may_shorten() -> None:
    ledger = a_ledger()
    ledger.grant(0.0, "t", "h", 50.0)
    assert ledger.extend(1.0, "t", 1.0)
    assert ledger.next_expiry_at == 2.0


def test_a_full_ledger_says_so_before_and_refuses_after() -> None:
    ledger = a_ledger(count=2)
    ledger.grant(0.0, "a", "1", 5.0)
    assert ledger.can_grant()
    assert not ledger.can_grant(reserved_count=1)
    ledger.grant(0.0, "b", "2", 5.0)
    with pytest.raises(ValueError, match="full"):
        ledger.grant(0.0, "c", "3", 5.0)
    assert repr(ledger) == "<Ledger [2 of 2 leases | 0 bytes]>"


def test_what_a_lease_cannot_be_is_refused() -> None:
    ledger = a_ledger()
    ledger.grant(0.0, "a", "1", 5.0)
    with pytest.raises(ValueError, match="already"):
        ledger.grant(0.0, "a", "2", 5.0)
    for bad in (0.0, -1.0, 60.1, float("nan")):
        with pytest.raises(ValueError, match="lease_s"):
            ledger.grant(0.0, "b", "2", bad)
    for count, hold_s in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ValueError):
            Ledger(max_lease_count=count, max_hold_s=hold_s)


def test_endless_extensions_do_not_grow_the_books() -> None:
    ledger = a_ledger(count=1, hold_s=1e9)
    ledger.grant(0.0, "a", "1", 5.0)
    for i in range(10_000):
        assert ledger.extend(i * 1.0, "a", 5.0)
    assert len(ledger._by_expiry) < 64
    assert len(ledger.expire(1e8)) == 1


class AgainstADict(RuleBasedStateMachine):
    """The ledger against the dumbest thing that could work."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = a_ledger(count=5, hold_s=20.0)
        self.now = 0.0
        self.open: dict[str, tuple[float, float]] = {}  # ticket: (granted_at, expires_at)
        self.granted: list[str] = []
        self.let_go: list[str] = []

    @rule(by_s=st.floats(0, 8))
    def time_passes(self, by_s: float) -> None:
        self.now += by_s

    @precondition(lambda self: len(self.open) < 5)
    @rule(lease_s=st.floats(0.5, 20))
    def grant(self, lease_s: float) -> None:
        ticket_id = f"t{len(self.granted)}"
        self.ledger.grant(self.now, ticket_id, ticket_id, lease_s)
        self.granted.append(ticket_id)
        self.open[ticket_id] = (self.now, self.now + lease_s)

    @rule(which=st.integers(0, 30))
    def release(self, which: int) -> None:
        lease = self.ledger.release(f"t{which}")
        assert (lease is not None) == (f"t{which}" in self.open)
        if lease is not None:
            del self.open[f"t{which}"]
            self.let_go.append(lease.handle)

    @rule(which=st.integers(0, 30), lease_s=st.floats(0.5, 20))
    def extend(self, which: int, lease_s: float) -> None:
        ticket_id = f"t{which}"
        granted_at, expires_at = self.open.get(ticket_id, (0.0, -1.0))
        assert self.ledger.extend(self.now, ticket_id, lease_s) == (expires_at > self.now)
        if expires_at > self.now:
            self.open[ticket_id] = (granted_at, min(self.now + lease_s, granted_at + 20.0))

    @rule()
    def sweep(self) -> None:
        expected = {ticket_id for ticket_id, (_, at) in self.open.items() if at <= self.now}
        expired = [lease.handle for lease in self.ledger.expire(self.now)]
        assert sorted(expired) == sorted(expected)
        for ticket_id in expected:
            del self.open[ticket_id]
        self.let_go.extend(expired)

    @rule()
    def close(self) -> None:
        self.let_go.extend(lease.handle for lease in self.ledger.close())
        self.open.clear()

    @invariant()
    def books_balance(self) -> None:
        assert len(self.ledger) == len(self.open)
        assert self.ledger.next_expiry_at == min((at for _, at in self.open.values()), default=None)
        assert sorted([*self.let_go, *self.open]) == sorted(self.granted)


TestAgainstADict = AgainstADict.TestCase

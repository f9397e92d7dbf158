"""Placement decides from a snapshot alone, and says why."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from baton.leg import WorkerInfo, WorkerLoad
from baton.request import PlacementMode, Role
from router.affinity import AffinityLimits, PrefixIndex
from router.cluster_view import Assigned, ClusterView, Health, WorkerIdentity, WorkerView
from router.placement import Placement, PlacementAsk, PlacementPolicy, place

RNG = random.Random(1)
ASK = PlacementAsk(prompt_token_count=100, max_output_token_count=20)


def worker(name: str, role: Role = Role.DECODE, **changes: Any) -> WorkerView:
    info = WorkerInfo(name, "e", role, "m", 1024, 16, 100, 4, 10, "simulated", 500)
    load = WorkerLoad("e", 0, 0, 0, 100, 0, False)
    view = WorkerView(WorkerIdentity(name, "e"), f"{name}:1", role, Health.READY, info, load)
    return replace(view, **changes)


def prefiller(name: str, **changes: Any) -> WorkerView:
    return worker(name, Role.PREFILL, **changes)


def placed(*workers: WorkerView, ask: PlacementAsk = ASK, **policy: Any) -> Placement | None:
    return place(ClusterView(workers), ask, RNG, PlacementPolicy(**policy))


def names(placement: Placement | None) -> tuple[str | None, str]:
    assert placement is not None
    return placement.prefill.worker_id if placement.prefill else None, placement.decode.worker_id


def test_with_both_roles_ready_the_phases_are_split() -> None:
    placement = placed(prefiller("p"), worker("d"))
    assert names(placement) == ("p", "d")
    assert placement is not None
    assert (placement.mode, placement.reason) == (PlacementMode.SPLIT, "split")


@pytest.mark.parametrize("health", [health for health in Health if health is not Health.READY])
def test_only_ready_workers_get_requests(health: Health) -> None:
    assert placed(worker("d", health=health)) is None
    local = placed(prefiller("p", health=health), worker("d"))
    assert names(local) == (None, "d")
    assert local is not None
    assert local.reason == "no_prefill_worker"


def test_nobody_ready_gives_no_placement() -> None:
    assert placed() is None


def test_without_a_decode_worker_a_prefill_worker_does_both_unless_told_not_to() -> None:
    placement = placed(prefiller("p"))
    assert names(placement) == (None, "p")
    assert placement is not None
    assert placement.reason == "no_decode_worker"
    assert placed(prefiller("p"), serves_without_decoder=False) is None


def test_a_full_decode_worker_is_waited_for_not_gone_around() -> None:
    full = worker("d", assigned=Assigned(decode_count=6, decode_token_count=10))
    assert placed(prefiller("p"), full) is None
    assert placed(prefiller("p"), replace(full, assigned=Assigned(decode_count=5, decode_token_count=10))) is not None


def test_blocks_are_counted_by_the_routers_books_and_by_the_workers_report() -> None:
    ask = replace(ASK, prompt_token_count=500)  # 33 of 100 blocks with its output
    assert placed(worker("d", assigned=Assigned(decode_count=2, decode_token_count=67 * 16)), ask=ask) is not None
    assert placed(worker("d", assigned=Assigned(decode_count=2, decode_token_count=68 * 16)), ask=ask) is None
    busy = WorkerLoad("e", 1, 0, 68, 100, 0, False)
    assert placed(worker("d", load=busy, assigned=Assigned(decode_count=1)), ask=ask) is None


def test_a_request_larger_than_the_pool_goes_to_an_idle_worker_which_will_say_what_is_wrong() -> None:
    assert placed(worker("d"), ask=replace(ASK, prompt_token_count=100_000)) is not None


def test_the_least_loaded_workers_are_chosen() -> None:
    placement = placed(
        prefiller("p0", assigned=Assigned(prefill_count=1, prefill_token_count=100)),
        prefiller("p1"),
        worker("d0", assigned=Assigned(decode_count=2)),
        worker("d1", assigned=Assigned(decode_count=1)),
    )
    assert names(placement) == ("p1", "d1")


def test_prompts_ahead_weigh_by_their_tokens() -> None:
    placement = placed(
        prefiller("p0", assigned=Assigned(prefill_count=1, prefill_token_count=2000)),
        prefiller("p1", assigned=Assigned(prefill_count=3, prefill_token_count=90)),
        worker("d"),
    )
    assert names(placement) == ("p1", "d")


def test_ties_are_broken_by_chance_and_by_nothing_else() -> None:
    counts = Counter(names(placed(worker("d0"), worker("d1"), worker("d2"))) for _ in range(300))
    assert len(counts) == 3
    assert min(counts.values()) > 60


def test_affinity_wins_against_idleness_until_a_queue_forms() -> None:
    ask = replace(ASK, cached_token_counts={WorkerIdentity("p0", "e"): 96})
    queue = Assigned(prefill_count=1, prefill_token_count=80)
    assert names(placed(prefiller("p0", assigned=queue), prefiller("p1"), worker("d"), ask=ask))[0] == "p0"
    queue = Assigned(prefill_count=3, prefill_token_count=300)
    assert names(placed(prefiller("p0", assigned=queue), prefiller("p1"), worker("d"), ask=ask))[0] == "p1"


def test_a_session_returns_to_its_worker() -> None:
    ask = replace(ASK, session_worker_ids=frozenset({"d1"}))
    assert {names(placed(worker("d0"), worker("d1"), ask=ask)) for _ in range(20)} == {(None, "d1")}


def test_processes_that_failed_the_request_are_avoided_even_where_only_the_other_role_is_left() -> None:
    ask = replace(ASK, excluded=frozenset({WorkerIdentity("d0", "e")}))
    assert names(placed(prefiller("p"), worker("d0"), worker("d1"), ask=ask)) == ("p", "d1")
    assert names(placed(prefiller("p"), worker("d0"), ask=ask)) == (None, "p")
    assert placed(worker("d0"), ask=ask) is None


def test_short_prompts_go_local_by_their_uncached_tokens() -> None:
    assert names(placed(prefiller("p"), worker("d"), local_prompt_token_count=100)) == (None, "d")
    assert names(placed(prefiller("p"), worker("d"), local_prompt_token_count=99)) == ("p", "d")
    ask = replace(ASK, cached_token_counts={WorkerIdentity("d", "e"): 64})
    assert names(placed(prefiller("p"), worker("d"), ask=ask, local_prompt_token_count=36)) == (None, "d")
    assert names(placed(prefiller("p"), worker("d"), ask=ask, mode="split", local_prompt_token_count=36))[0] == "p"
    fully = replace(ASK, cached_token_counts={WorkerIdentity("d", "e"): 100})
    assert names(placed(prefiller("p"), worker("d"), ask=fully))[0] == "p", "threshold 0 means never local"


@pytest.mark.parametrize(("ask", "policy", "reason"), [(ASK, "local", "policy"), (ASK, "auto", "recompute")])
def test_local_says_why(ask: PlacementAsk, policy: str, reason: str) -> None:
    ask = replace(ask, needs_recompute=reason == "recompute")
    placement = placed(prefiller("p"), worker("d"), ask=ask, mode=policy)
    assert placement is not None
    assert (placement.mode, placement.reason) == (PlacementMode.LOCAL, reason)


@pytest.mark.parametrize("bad", [{"mode": "never"}, {"local_prompt_token_count": -1}, {"decode_ahead_count": -1}])
def test_a_policy_that_makes_no_sense_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PlacementPolicy(**bad)


# The prefix index -------------------------------------------------------------------------------------------

W0, W1 = WorkerIdentity("w0", "e"), WorkerIdentity("w1", "e")


def test_the_index_knows_who_has_how_much_of_a_prefix() -> None:
    index = PrefixIndex(AffinityLimits(block_token_count=4))
    first = index.chain(range(12))
    index.note(first, "", [W0])
    index.note(index.chain([*range(8), 99, 98, 97, 96]), "", [W1])
    assert index.cached_token_counts(first) == {W0: 12, W1: 8}
    assert index.cached_token_counts(index.chain([*range(4), 50, 51, 52, 53])) == {W0: 4, W1: 4}
    assert index.cached_token_counts(index.chain([7, *range(11)])) == {}
    assert index.chain(range(3)) == ()


def test_a_prefix_is_known_to_its_own_tenant_alone() -> None:
    index = PrefixIndex(AffinityLimits(block_token_count=4))
    index.note(index.chain(range(8), "blue"), "", [W0])
    assert index.cached_token_counts(index.chain(range(8), "blue")) == {W0: 8}
    assert index.cached_token_counts(index.chain(range(8), "red")) == {}
    assert index.cached_token_counts(index.chain(range(8))) == {}


def test_a_process_that_is_gone_is_forgotten_and_its_sessions_stay() -> None:
    index = PrefixIndex(AffinityLimits(block_token_count=4))
    chain = index.chain(range(8))
    index.note(chain, "s", [W0])
    index.forget(W0)
    assert index.cached_token_counts(chain) == {}
    assert len(index) == 0
    assert index.session_worker_ids("s") == {"w0"}
    assert index.session_worker_ids("") == frozenset()


def test_the_index_is_bounded_and_drops_the_end_of_the_oldest_first() -> None:
    index = PrefixIndex(AffinityLimits(block_token_count=1, max_entry_count=6, max_session_count=2))
    old, new = index.chain(range(4)), index.chain(range(100, 104))
    index.note(old, "a", [W0])
    index.note(new, "b", [W0])
    index.note((), "c", [W0])
    assert len(index) == 6
    assert index.cached_token_counts(old) == {W0: 2}
    assert index.cached_token_counts(new) == {W0: 4}
    assert index.session_worker_ids("a") == frozenset()


def test_only_so_many_workers_are_remembered_for_a_block() -> None:
    index = PrefixIndex(AffinityLimits(block_token_count=1, max_workers_per_entry=2))
    workers = [WorkerIdentity(f"w{number}", "e") for number in range(5)]
    chain = index.chain((1,))
    for each in workers:
        index.note(chain, "", [each])
    assert set(index.cached_token_counts(chain)) == set(workers[-2:])


def test_samples_need_slots_and_blocks_together() -> None:
    busy = worker("d", assigned=Assigned(decode_count=4, decode_token_count=100))  # 4 at once, and 2 ahead
    assert placed(prefiller("p"), busy, ask=replace(ASK, sample_count=2)) is not None
    assert placed(prefiller("p"), busy, ask=replace(ASK, sample_count=3)) is None
    one = worker("d", assigned=Assigned(decode_count=1, decode_token_count=16 * 86))  # of 100 blocks, 14 are left
    assert placed(prefiller("p"), one, ask=replace(ASK, sample_count=6)) is not None  # 100 + 6 * 20 tokens
    assert placed(prefiller("p"), one, ask=replace(ASK, sample_count=7)) is None


def test_more_samples_than_a_worker_runs_at_once_do_not_wait_until_it_is_idle() -> None:
    many = replace(ASK, sample_count=16)
    assert placed(prefiller("p"), worker("d", assigned=Assigned(decode_count=2)), ask=many) is not None
    assert placed(prefiller("p"), worker("d", assigned=Assigned(decode_count=3)), ask=many) is None


def test_a_sample_goes_where_its_prompt_is_whatever_else_is_idle() -> None:
    busy = worker("d0", assigned=Assigned(decode_count=5, decode_token_count=100))
    ask = replace(ASK, near="d0")
    placement = placed(prefiller("p"), busy, worker("d1"), ask=ask)
    assert placement is not None
    assert names(placement) == (None, "d0")
    assert (placement.mode, placement.reason) == (PlacementMode.LOCAL, "shared_prompt")


def test_a_sample_whose_worker_cannot_take_it_goes_the_ordinary_way() -> None:
    ask = replace(ASK, near="d0")
    full = worker("d0", assigned=Assigned(decode_count=6, decode_token_count=100))
    for near in (full, worker("d0", health=Health.LOST), worker("d0", health=Health.DRAINING)):
        assert names(placed(prefiller("p"), near, worker("d1"), ask=ask)) == ("p", "d1")
    excluded = replace(ask, excluded=frozenset({WorkerIdentity("d0", "e")}))
    assert names(placed(prefiller("p"), worker("d0"), worker("d1"), ask=excluded)) == ("p", "d1")
    assert names(placed(prefiller("p"), full, worker("d1"), ask=replace(ask, has_room_kept=True))) == (None, "d0")


def test_a_sample_near_a_prefill_worker_is_prefilled_there() -> None:
    busy = prefiller("p0", assigned=Assigned(prefill_count=3, prefill_token_count=3000))
    assert names(placed(busy, prefiller("p1"), worker("d"), ask=replace(ASK, near="p0"))) == ("p0", "d")
    assert names(placed(busy, prefiller("p1"), worker("d"))) == ("p1", "d")

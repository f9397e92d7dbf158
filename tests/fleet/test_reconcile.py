"""The supervisor's decisions, one sentence each."""

from __future__ import annotations

import random

import pytest

from fleet.reconcile import (
    Alarm,
    Desired,
    Forget,
    Kill,
    Observed,
    Plan,
    Policy,
    Publish,
    Published,
    Restart,
    Start,
    State,
    Stop,
    backoff_s,
    became_ready,
    current_roster,
    exited,
    has_alarmed,
    plan,
    started,
    was_asked_to_stop,
    was_killed,
)

POLICY = Policy(
    start_deadline_s=60, stop_deadline_s=10, restart_delay_s=0.5, restart_delay_max_s=8, alarm_after_failure_count=3
)
WANTED = {"prefill-0": Desired("prefill-0", "v1"), "decode-0": Desired("decode-0", "v1")}
QUIET = Published((), 0.0)


def one(state: State, since: float = 0.0, **more: object) -> dict[str, Observed]:
    return {"w": Observed("w", "v1", state, since, **more)}  # type: ignore[arg-type]


def decide(actual: dict[str, Observed], now: float, *, wanted: bool = True, fingerprint: str = "v1") -> Plan:
    desired = {"w": Desired("w", fingerprint)} if wanted else {}
    roster = current_roster(desired, actual)
    return plan(desired, actual, now, POLICY, Published(roster, now))


def test_what_is_wanted_and_not_there_is_started_in_the_order_wanted() -> None:
    assert plan(WANTED, {}, 0.0, POLICY, QUIET).actions == (Start("prefill-0"), Start("decode-0"))


def test_what_is_there_and_not_wanted_is_stopped_and_forgotten_once_gone() -> None:
    seen = one(State.READY)
    assert decide(seen, 1.0, wanted=False).actions == (Stop("w"),)
    seen["w"] = was_asked_to_stop(seen["w"], 1.0)
    assert decide(seen, 2.0, wanted=False).actions == ()
    seen["w"] = exited(seen["w"], "exit code 0", 3.0)
    assert decide(seen, 3.0, wanted=False).actions == (Forget("w"),)


def test_what_ignores_the_request_to_stop_is_killed_at_the_deadline_and_only_once() -> None:
    seen = one(State.STOPPING, since=5.0)
    assert decide(seen, 14.9, wanted=False).next_check_at == pytest.approx(15.0)
    assert [type(a) for a in decide(seen, 15.0, wanted=False).actions] == [Kill]
    seen["w"] = was_killed(seen["w"])
    assert decide(seen, 99.0, wanted=False).actions == ()


def test_what_is_not_ready_in_time_is_killed_and_that_counts_as_a_failure() -> None:
    seen = one(State.STARTING, since=0.0)
    assert decide(seen, 59.0).actions == ()
    assert [type(a) for a in decide(seen, 60.0).actions] == [Kill]
    assert exited(was_killed(seen["w"]), "killed", 60.1).failure_count == 1


def test_what_died_is_restarted_after_a_wait_that_doubles_up_to_the_maximum() -> None:
    assert [backoff_s(n, POLICY) for n in (1, 2, 3, 4, 5, 6, 10_000)] == [0.5, 1, 2, 4, 8, 8, 8]
    seen = one(State.EXITED, since=10.0, failure_count=2)
    assert decide(seen, 10.9).actions == ()
    assert decide(seen, 10.9).next_check_at == pytest.approx(11.0)
    assert decide(seen, 11.0).actions == (Restart("w", 2),)


def test_having_been_ready_ends_a_series_of_failures() -> None:
    seen = Observed("w", "v1", State.STARTING, 0.0, failure_count=7, has_alarmed=True)
    ready = became_ready(seen, "here", 1.0)
    assert (ready.failure_count, ready.has_alarmed) == (0, False)
    assert exited(ready, "signal 9", 2.0).failure_count == 1


def test_a_start_after_failures_still_remembers_them() -> None:
    failed = Observed("w", "v1", State.EXITED, 0.0, failure_count=2, detail="exit code 1")
    again = started(Desired("w", "v1"), failed, 1.0)
    assert (again.state, again.failure_count) == (State.STARTING, 2)


def test_an_alarm_is_raised_once_and_the_restarts_go_on() -> None:
    seen = one(State.EXITED, since=0.0, failure_count=3, detail="exit code 1")
    assert decide(seen, 0.0).actions == (Alarm("w", 3, "exit code 1"),)
    seen["w"] = has_alarmed(seen["w"])
    assert decide(seen, 0.0).actions == ()
    assert decide(seen, 2.0).actions == (Restart("w", 3),)


def test_a_changed_configuration_stops_the_old_and_starts_the_new_without_waiting() -> None:
    seen = one(State.READY)
    assert decide(seen, 1.0, fingerprint="v2").actions == (Stop("w"),)
    seen["w"] = exited(was_asked_to_stop(seen["w"], 1.0), "exit code 0", 2.0)
    assert decide(seen, 2.0, fingerprint="v2").actions == (Start("w"),)
    assert started(Desired("w", "v2"), seen["w"], 2.0).failure_count == 0


def test_a_failure_of_the_old_configuration_does_not_delay_the_new() -> None:
    seen = one(State.EXITED, since=0.0, failure_count=9)
    assert decide(seen, 0.0, fingerprint="v2").actions == (Start("w"),)


def test_the_roster_holds_the_ready_ones_only_and_is_published_on_change() -> None:
    actual = {
        "prefill-0": Observed("prefill-0", "v1", State.STARTING, 0.0),
        "decode-0": Observed("decode-0", "v1", State.READY, 0.0, endpoint="d"),
    }
    assert plan(WANTED, actual, 0.0, POLICY, QUIET).actions == (Publish(("decode-0",)),)
    told = Published((("decode-0", "d"),), 0.0)
    assert plan(WANTED, actual, 1.0, POLICY, told).actions == ()


def test_a_worker_that_came_back_at_another_address_is_a_change() -> None:
    actual = {"decode-0": Observed("decode-0", "v1", State.READY, 0.0, endpoint="new")}
    desired = {"decode-0": WANTED["decode-0"]}
    assert plan(desired, actual, 0.1, POLICY, Published((("decode-0", "old"),), 0.0)).actions == (
        Publish(("decode-0",)),
    )


def test_an_unchanged_roster_is_published_again_as_a_heartbeat() -> None:
    decided = plan({}, {}, 1.0, POLICY, QUIET)
    assert decided.actions == ()
    assert decided.next_check_at == pytest.approx(2.0)
    assert plan({}, {}, 2.0, POLICY, QUIET).actions == (Publish(()),)


def test_a_restarted_supervisor_tells_nothing_until_it_has_found_all_or_had_its_time() -> None:
    some = {"decode-0": Observed("decode-0", "v1", State.READY, 0.0, endpoint="d")}
    everyone = {**some, "prefill-0": Observed("prefill-0", "v1", State.READY, 0.0, endpoint="p")}
    starting = {**some, "prefill-0": Observed("prefill-0", "v1", State.STARTING, 0.0)}
    assert plan(WANTED, starting, 5.0, POLICY, None, publish_from=20.0).actions == ()
    assert plan(WANTED, everyone, 5.0, POLICY, None, publish_from=20.0).actions == (
        Publish(("prefill-0", "decode-0")),
    )
    assert plan(WANTED, starting, 20.0, POLICY, None, publish_from=20.0).actions == (Publish(("decode-0",)),)


def test_late_news_of_readiness_does_not_revive_what_was_asked_to_stop() -> None:
    stopping = was_asked_to_stop(one(State.STARTING)["w"], 1.0)
    assert became_ready(stopping, "here", 2.0).state is State.STOPPING


def test_under_random_facts_the_plan_always_ends_in_what_is_wanted() -> None:
    """A driver that obeys, and processes that fail at random for a while: in the end all wanted are ready."""
    for seed in range(200):
        rng = random.Random(seed)
        desired = {f"w{i}": Desired(f"w{i}", "v1") for i in range(3)}
        actual: dict[str, Observed] = {"stray": Observed("stray", "v0", State.READY, 0.0)}
        now, told = 0.0, Published((), 0.0)
        for step in range(400):
            for action in plan(desired, actual, now, POLICY, told).actions:
                match action:
                    case Start(name) | Restart(name, _):
                        actual[name] = started(desired[name], actual.get(name), now)
                    case Stop(name):
                        actual[name] = was_asked_to_stop(actual[name], now)
                    case Kill(name, _):
                        actual[name] = was_killed(actual[name])
                    case Forget(name):
                        del actual[name]
                    case Alarm(name, _, _):
                        actual[name] = has_alarmed(actual[name])
                    case Publish():
                        told = Published(current_roster(desired, actual), now)
            now += rng.random() * 3
            for name, seen in list(actual.items()):
                if seen.state is State.STOPPING or seen.is_kill_sent:
                    actual[name] = exited(seen, "gone", now)
                elif step < 200 and seen.state is not State.EXITED and rng.random() < 0.3:
                    actual[name] = exited(seen, "crash", now)
                elif seen.state is State.STARTING and (step >= 200 or rng.random() < 0.3):
                    actual[name] = became_ready(seen, f"{name}@{step}", now)
        assert {name: seen.state for name, seen in actual.items()} == dict.fromkeys(desired, State.READY)
        assert [name for name, _ in told.roster] == list(desired)

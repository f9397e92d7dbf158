"""Faults come from an engine's configuration, twice said, and from nowhere else; the decorator keeps to the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import BatonError
from engine.config import EngineConfig
from fleet.config import parse_config
from fleet.toml_table import ConfigError
from kvtransfer.connector_faults import FAULTS_KEY, NOTIFY_PAUSE_S, FaultyAgent, faulty
from kvtransfer.faults import Fault, FaultDice, FaultPlan, Operation
from kvtransfer.transfer_params import TransferLimits, validate_transfer_params

ROOT = Path(__file__).resolve().parents[2]


class LibraryError(Exception):
    pass


class Library:
    """A transfer library that does what it is told, and remembers it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.states: dict[str, str] = {}

    def register_memory(self, *_: Any) -> None:
        self.said.append("register")

    def add_remote_agent(self, *_: Any) -> str:
        self.said.append("handshake")
        return "peer"

    def transfer(self, handle: str) -> str:
        self.said.append(f"transfer {handle}")
        self.states[handle] = "DONE"
        return "DONE"

    def check_xfer_state(self, handle: str) -> str:
        return self.states[handle]

    def release_xfer_handle(self, handle: str) -> None:
        self.said.append(f"release {handle}")

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {"peer": [b"done"]}

    def get_agent_metadata(self) -> bytes:
        return b"metadata"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def agent_that(fault: Fault, *operations: Operation) -> tuple[FaultyAgent, Library, Clock]:
    """One whose named operations meet this fault each time."""
    plan = FaultPlan(
        allow_faults=True,
        probability=1.0,
        operations=[each.value for each in operations],
        kinds=[fault.value],
        hang_s=0.5,
        stuck_s=20.0,
    )
    library, clock = Library(), Clock()
    return FaultyAgent(library, FaultDice(plan), LibraryError, sleep=clock.sleep, clock=clock), library, clock


def engine_config(**changes: Any) -> EngineConfig:
    return EngineConfig(model_path="model", model_name="m", kv_cache_bytes=1 << 30, **changes)


# Where a plan may come from


def test_an_engine_has_no_faults_unless_it_is_told_to() -> None:
    assert engine_config().transfer_faults == {}
    library = Library()
    assert faulty(library, {}) is library
    assert faulty(library, {FAULTS_KEY: {}}) is library


def test_a_plan_without_its_switch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transfer_faults\.allow_faults: is not true.*take the table out"):
        engine_config(transfer_faults={"probability": 0.5})
    with pytest.raises(ValueError, match=r"transfer_faults\.allow_faults"):
        engine_config(transfer_faults={"probability": 0.5, "allow_faults": "yes"})
    assert engine_config(transfer_faults={"probability": 0.5, "allow_faults": True}).transfer_faults


def test_the_fleets_file_can_hold_a_plan_and_is_told_where_it_is_wrong() -> None:
    text = """
        [model]
        name = "m"
        path = "/models/m"
        [prefill.engine]
        kv_cache_bytes = 536870912
        [decode.engine]
        kv_cache_bytes = 536870912
        [decode.engine.transfer_faults]
        probability = 0.25
    """
    with pytest.raises(ConfigError, match=r"decode\.engine\.transfer_faults\.allow_faults: is not true"):
        parse_config(text)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ({"probability": 1.5}, r"transfer_faults\.probability: is 1\.5"),
        ({"probability": "often"}, r"transfer_faults\.probability: is 'often'"),
        ({}, r"transfer_faults\.probability: is missing"),
        ({"probability": 1, "operations": ["breathe"]}, r"transfer_faults\.operations: has 'breathe'; known here"),
        ({"probability": 1, "operations": "post"}, r"transfer_faults\.operations: is 'post'; give a list"),
        ({"probability": 1, "kinds": []}, r"transfer_faults\.kinds"),
        ({"probability": 1, "hang_s": -1}, r"transfer_faults\.hang_s"),
        ({"probability": 1, "stuck_s": float("inf")}, r"transfer_faults\.stuck_s"),
        ({"probability": 1, "seed": 0.5}, r"transfer_faults\.seed"),
        ({"probability": 1, "probabilty": 1}, r"transfer_faults\.probabilty: is not known"),
    ],
)
def test_a_wrong_plan_is_refused_by_the_name_of_its_key(table: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        engine_config(transfer_faults={"allow_faults": True, **table})


def test_no_message_of_any_protocol_can_carry_a_fault() -> None:
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    assert len(protos) >= 3
    for proto in protos:
        code = "\n".join(line.partition("//")[0] for line in proto.read_text().splitlines())
        assert "fault" not in code.lower().replace("default", ""), proto


def test_transfer_parameters_with_faults_in_them_are_refused() -> None:
    params = {"kind": "simulated", "engine_id": "p", "handle": "h", "token_count": 1, "kv_bytes": 1}
    validate_transfer_params(params, TransferLimits())
    for key in ("transfer_faults", FAULTS_KEY, "allow_faults"):
        with pytest.raises(BatonError, match="unknown field"):
            validate_transfer_params({**params, key: {"allow_faults": True, "probability": 1.0}}, TransferLimits())


# The dice


def test_the_same_seed_draws_the_same_faults_whatever_else_is_asked_between() -> None:
    plan = FaultPlan(allow_faults=True, probability=0.25, seed=7)
    alone, crowded = FaultDice(plan), FaultDice(plan)
    posts = [alone.draw(Operation.POST) for _ in range(200)]
    between = []
    for _ in range(200):
        crowded.draw(Operation.POLL)
        between.append(crowded.draw(Operation.POST))
    assert posts == between
    assert {None, *Fault} == set(posts)
    assert posts != [FaultDice(FaultPlan(allow_faults=True, probability=0.25, seed=8)).draw(Operation.POST)] * 200


def test_faults_come_as_often_as_planned_and_are_counted_by_operation_and_kind() -> None:
    dice = FaultDice(FaultPlan(allow_faults=True, probability=1 / 16, operations=["poll"], kinds=["fail"]))
    struck = sum(dice.draw(Operation.POLL) is Fault.FAIL for _ in range(16_000))
    assert 850 < struck < 1150
    assert dice.draw(Operation.POST) is None
    assert dice.counts() == {"poll": 16_000, "post": 1, "poll.fail": struck}


def test_registration_is_struck_only_where_it_is_named() -> None:
    dice = FaultDice(FaultPlan(allow_faults=True, probability=1.0))
    assert dice.draw(Operation.REGISTER) is None
    assert dice.draw(Operation.HANDSHAKE) is not None


def test_dice_that_follow_another_plan_begin_it_from_its_beginning_and_go_on_counting() -> None:
    dice = FaultDice(FaultPlan(allow_faults=True, probability=1.0, operations=["post"], kinds=["fail"]))
    assert dice.draw(Operation.POST) is Fault.FAIL
    plan = FaultPlan(allow_faults=True, probability=0.5, operations=["poll"], seed=3)
    dice.follow(plan)
    assert dice.draw(Operation.POST) is None
    fresh = FaultDice(plan)
    assert [dice.draw(Operation.POLL) for _ in range(50)] == [fresh.draw(Operation.POLL) for _ in range(50)]
    assert dice.counts()["post"] == 2
    assert dice.counts()["post.fail"] == 1


# The decorator


@pytest.mark.parametrize("operation", [Operation.REGISTER, Operation.HANDSHAKE, Operation.POST])
def test_an_operation_that_fails_raises_what_the_library_raises_and_was_not_done(operation: Operation) -> None:
    agent, library, _ = agent_that(Fault.FAIL, operation)
    call: Callable[[], Any] = {
        Operation.REGISTER: lambda: agent.register_memory("descs"),
        Operation.HANDSHAKE: lambda: agent.add_remote_agent(b"metadata"),
        Operation.POST: lambda: agent.transfer("t"),
    }[operation]
    with pytest.raises(LibraryError, match=f"injected fault: {operation.value}"):
        call()
    assert library.said == []


def test_an_operation_that_hangs_takes_its_time_and_is_done() -> None:
    agent, library, clock = agent_that(Fault.HANG, *Operation)
    agent.register_memory("descs")
    agent.add_remote_agent(b"metadata")
    agent.transfer("t")
    assert agent.check_xfer_state("t") == "DONE"
    assert agent.get_new_notifs() == {"peer": [b"done"]}
    agent.release_xfer_handle("t")
    assert clock.now == 100.0 + 6 * 0.5
    assert library.said == ["register", "handshake", "transfer t", "release t"]


@pytest.mark.parametrize("operation", [Operation.REGISTER, Operation.HANDSHAKE])
def test_what_blocks_and_never_ends_fails_after_all_its_time(operation: Operation) -> None:
    agent, library, clock = agent_that(Fault.TIME_OUT, operation)
    with pytest.raises(LibraryError):
        (agent.add_remote_agent if operation is Operation.HANDSHAKE else agent.register_memory)(b"metadata")
    assert clock.now == 120.0
    assert library.said == []


def test_a_read_that_is_stuck_cannot_be_taken_back_and_lands_late() -> None:
    agent, library, clock = agent_that(Fault.TIME_OUT, Operation.POST)
    assert agent.transfer("t") == "PROC"
    assert agent.check_xfer_state("t") == "PROC"
    with pytest.raises(LibraryError):
        agent.release_xfer_handle("t")
    assert library.said == []
    clock.sleep(20.0)
    assert agent.check_xfer_state("t") == "DONE"
    assert library.said == ["transfer t"], "whoever gave the blocks to others finds foreign bytes in them"


def test_a_failure_is_told_only_when_the_read_has_ended() -> None:
    agent, library, _ = agent_that(Fault.FAIL, Operation.POLL)
    agent.transfer("t")
    library.states["t"] = "PROC"
    assert agent.check_xfer_state("t") == "PROC"
    library.states["t"] = "DONE"
    assert agent.check_xfer_state("t") == "ERR"


def test_a_handle_that_is_not_released_at_first_can_be_later() -> None:
    agent, library, clock = agent_that(Fault.TIME_OUT, Operation.RELEASE)
    agent.transfer("t")
    with pytest.raises(LibraryError):
        agent.release_xfer_handle("t")
    assert agent.check_xfer_state("t") == "PROC", "as long as its handle is held, the read is not over"
    clock.sleep(20.0)
    assert agent.check_xfer_state("t") == "DONE"
    assert library.said == ["transfer t"]


def test_notices_are_struck_seldom_however_often_they_are_looked_for() -> None:
    agent, _, clock = agent_that(Fault.FAIL, Operation.NOTIFY)
    for _ in range(3):
        with pytest.raises(LibraryError):
            agent.get_new_notifs()
        assert [agent.get_new_notifs() for _ in range(100)] == [{"peer": [b"done"]}] * 100
        clock.sleep(NOTIFY_PAUSE_S)


def test_what_the_decorator_does_not_know_goes_straight_through() -> None:
    agent, _, _ = agent_that(Fault.FAIL, *Operation)
    assert agent.get_agent_metadata() == b"metadata"

"""Faults around NIXL, for tests: an agent that fails, never completes or blocks as often as it was told to.

Everything above it is what runs in production, unchanged. It is put in place by the engine's configuration alone
(``EngineConfig.transfer_faults``), with a warning that nobody can overlook.

It stays honest about memory. A read that is reported as failed has ended before that is said; one that never
completes is really posted once ``stuck_s`` have passed, so that whoever gave its blocks to somebody else meanwhile is
found out by what then lands in them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvtransfer.faults import Fault, FaultDice, FaultPlan, Operation

logger = logging.getLogger(__name__)

FAULTS_KEY = "baton_transfer_faults"
"""In the connector's extra configuration: the table of ``FaultPlan``."""
NOTIFY_PAUSE_S = 1.0
"""Notices are looked for in every step, every millisecond of an idle engine: they are struck at most this often."""


def faulty(agent: Any, extra_config: Mapping[str, Any]) -> Any:
    """``agent``, or what makes it fail if the configuration says so."""
    table = extra_config.get(FAULTS_KEY)
    if not table:
        return agent
    from nixl._bindings import nixlBackendError

    plan = FaultPlan.of(table)
    logger.warning("TRANSFER FAULTS ARE ON, as in no deployment: %s", plan)
    return FaultyAgent(agent, FaultDice(plan), nixlBackendError)


class FaultyAgent:
    """A NIXL agent with faults. Used by the engine's thread, but for the handshake, which has its own."""

    def __init__(
        self,
        agent: Any,
        dice: FaultDice,
        error: type[Exception],
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        notify_pause_s: float = NOTIFY_PAUSE_S,
    ) -> None:
        """``error`` is what the library raises."""
        self.dice = dice
        self.notify_pause_s = notify_pause_s
        self._agent = agent
        self._error = error
        self._sleep = sleep
        self._clock = clock
        # The mutable state, by transfer handle: not yet really posted; incomplete until; polled once; never released
        # before; and when notices may be struck again.
        self._unposted: dict[Any, tuple[Any, ...]] = {}
        self._stuck_until: dict[Any, float] = {}
        self._verdicts: dict[Any, Fault | None] = {}
        self._notify_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    # -- register and handshake: a fault here blocks or raises ----------------------------------

    def register_memory(self, *args: Any, **named: Any) -> Any:
        self._strike(Operation.REGISTER)
        return self._agent.register_memory(*args, **named)

    def add_remote_agent(self, *args: Any, **named: Any) -> Any:
        self._strike(Operation.HANDSHAKE)
        return self._agent.add_remote_agent(*args, **named)

    def _strike(self, operation: Operation) -> None:
        match self.dice.draw(operation):
            case Fault.FAIL:
                raise self._failure(operation)
            case Fault.TIME_OUT:
                self._sleep(self._plan.stuck_s)
                raise self._failure(operation)
            case Fault.HANG:
                self._sleep(self._plan.hang_s)

    @property
    def _plan(self) -> FaultPlan:
        return self.dice.plan

    def _failure(self, operation: Operation) -> Exception:
        return self._error(f"injected fault: {operation.value}")

    # -- one transfer ---------------------------------------------------------------------------

    def transfer(self, handle: Any, *args: Any, **named: Any) -> Any:
        match self.dice.draw(Operation.POST):
            case Fault.FAIL:
                raise self._failure(Operation.POST)
            case Fault.TIME_OUT:
                self._unposted[handle] = args
                self._stick(handle)
                return "PROC"
            case Fault.HANG:
                self._sleep(self._plan.hang_s)
        return self._agent.transfer(handle, *args, **named)

    def check_xfer_state(self, handle: Any) -> str:
        if handle not in self._verdicts and handle not in self._stuck_until:
            self._verdicts[handle] = fault = self.dice.draw(Operation.POLL)
            if fault is Fault.TIME_OUT:
                self._stick(handle)
            elif fault is Fault.HANG:
                self._sleep(self._plan.hang_s)
        if self._is_stuck(handle):
            return "PROC"
        if handle in self._unposted:
            self._agent.transfer(handle, *self._unposted.pop(handle))  # what was late arrives after all
        state: str = self._agent.check_xfer_state(handle)
        if state == "DONE" and self._verdicts.get(handle) is Fault.FAIL:
            return "ERR"  # only now: memory that a read may still write to is nobody else's
        return state

    def release_xfer_handle(self, handle: Any) -> None:
        if self._is_stuck(handle):
            raise self._failure(Operation.RELEASE)
        match self.dice.draw(Operation.RELEASE):
            case Fault.FAIL:
                raise self._failure(Operation.RELEASE)
            case Fault.TIME_OUT:
                self._stick(handle)
                raise self._failure(Operation.RELEASE)
            case Fault.HANG:
                self._sleep(self._plan.hang_s)
        self._agent.release_xfer_handle(handle)
        for state in (self._unposted, self._stuck_until, self._verdicts):
            state.pop(handle, None)

    def _stick(self, handle: Any) -> None:
        self._stuck_until[handle] = self._clock() + self._plan.stuck_s

    def _is_stuck(self, handle: Any) -> bool:
        return self._clock() < self._stuck_until.get(handle, 0.0)

    # -- notices --------------------------------------------------------------------------------

    def get_new_notifs(self, *args: Any, **named: Any) -> Any:
        now = self._clock()
        if now >= self._notify_at:
            self._notify_at = now + self.notify_pause_s
            match self.dice.draw(Operation.NOTIFY):
                case Fault.FAIL:
                    raise self._failure(Operation.NOTIFY)
                case Fault.TIME_OUT:
                    return {}
                case Fault.HANG:
                    self._sleep(self._plan.hang_s)
        return self._agent.get_new_notifs(*args, **named)

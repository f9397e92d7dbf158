"""Baton's connector in an engine that stops itself where it is told to, and believes what it reads if told so.

For ``bench/validity_engines.py``, and for nothing else. An engine gets it by module path, in place of
``kvtransfer.connector``. A signal from outside lands in the microseconds between a pull's first look at the hold
record and the end of its read once in thousands of tries. So the engine process sends it to itself, at a point of the
pull that the trial names, and to every pull of a batch at once: reads that the transfer library has queued and not
begun, as a slow wire would have them. Everything above the agent is the product's own.

The control is the same process in the same procedure, with the one override left out that begins a check.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransfer import connector
from kvtransfer.connector_deadlines import PunctualWorker
from kvtransfer.connector_worker import PullWorker

FOLDER_VARIABLE = "BATON_BENCH_STOP_PLANS"
"""Environment: a folder with one file per engine process, in which it is told where to stop."""
GATHER_S = 1.0
"""Reads that were to wait for others stop without them after this long."""
READ_S = 5.0


class StopPoint(enum.IntEnum):
    """Where an engine stops itself."""

    NOWHERE = 0
    POSTING = 1
    """About to post one read: its hold was seen, and nothing was read."""
    QUEUED = 2
    """All reads are asked for, their holds were seen, none has begun."""
    TORN = 3
    """Half of each read is over, the other half has not begun."""
    READ = 4
    """All blocks are here and no record was read after them."""


class StopPlan:
    """The shared words of one engine process: what it is to do, and what it did."""

    _WORDS = ("point", "read_count", "believes", "goes_on", "asked_count", "late_count", "stop_count")

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words

    @classmethod
    def of(cls, folder: Path, process_id: int, *, create: bool = False) -> StopPlan:
        mode = "w+" if create else "r+"
        return cls(np.memmap(folder / str(process_id), dtype="<u8", mode=mode, shape=(len(cls._WORDS),)))  # type: ignore[call-overload]

    def get(self, name: str) -> int:
        return int(self._words[self._WORDS.index(name)])

    def set(self, name: str, value: int) -> None:
        self._words[self._WORDS.index(name)] = value

    def order(self, point: StopPoint, read_count: int) -> None:
        """Stop at ``point`` when ``read_count`` reads have come to it (POSTING: at the one of that number)."""
        for name in ("goes_on", "asked_count", "late_count", "stop_count"):
            self.set(name, 0)
        self.set("read_count", read_count)
        self.set("point", point)  # last: the engine looks at this word first


class _Halves:
    """One read made as two."""

    def __init__(self, parts: tuple[Any, Any]) -> None:
        self.parts = parts


class StoppingAgent:
    """A NIXL agent whose reads of blocks bring their process to a stop. Reads of hold records pass."""

    def __init__(self, agent: Any, plan: StopPlan) -> None:
        self._agent = agent
        self._plan = plan
        self._block_reads: set[Any] = set()
        self._unposted: list[Any] = []
        self._posted: list[Any] = []
        self._gather_until = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def make_prepped_xfer(
        self, operation: str, here: Any, local: Any, there: Any, remote: Any, *rest: Any, **named: Any
    ) -> Any:
        def make(part: slice) -> Any:
            return self._agent.make_prepped_xfer(operation, here, local[part], there, remote[part], *rest, **named)

        if self._plan.get("point") == StopPoint.TORN:
            middle = len(local) // 2
            handle: Any = _Halves((make(slice(0, middle)), make(slice(middle, None))))
        else:
            handle = make(slice(None))
        self._block_reads.add(handle)
        return handle

    def transfer(self, handle: Any, *args: Any, **named: Any) -> Any:
        if handle not in self._block_reads:
            return self._agent.transfer(handle, *args, **named)
        plan = self._plan
        point = plan.get("point")
        if point == StopPoint.NOWHERE:
            return self._post(handle)
        if not self._unposted and not self._posted:
            self._gather_until = time.monotonic() + GATHER_S
        plan.set("asked_count", plan.get("asked_count") + 1)
        if point == StopPoint.POSTING:
            if plan.get("asked_count") >= plan.get("read_count"):
                self._stop()
                plan.set("late_count", 1)
            return self._post(handle)
        if point == StopPoint.QUEUED:
            self._unposted.append(handle)
        elif point == StopPoint.TORN:
            self._agent.transfer(handle.parts[0])
            self._posted.append(handle.parts[0])
            self._unposted.append(handle.parts[1])
        else:
            self._agent.transfer(handle)
            self._posted.append(handle)
        return "PROC"

    def _post(self, handle: Any) -> Any:
        parts = handle.parts if isinstance(handle, _Halves) else (handle,)
        return [self._agent.transfer(part) for part in parts][-1]

    def check_xfer_state(self, handle: Any) -> Any:
        if handle not in self._block_reads:
            return self._agent.check_xfer_state(handle)
        if self._unposted or self._posted:
            is_whole = self._plan.get("asked_count") >= self._plan.get("read_count")
            if not is_whole and time.monotonic() < self._gather_until:
                return "PROC"
            self._stop_amid()
        if isinstance(handle, _Halves):
            states = [self._agent.check_xfer_state(part) for part in handle.parts]
            return next((state for state in states if state != "DONE"), "DONE")
        return self._agent.check_xfer_state(handle)

    def _stop_amid(self) -> None:
        ends_at = time.monotonic() + READ_S
        while any(self._agent.check_xfer_state(each) == "PROC" for each in self._posted):
            if time.monotonic() > ends_at:
                raise TimeoutError("a read that was to be over before the stop is not")
        self._stop()
        self._plan.set("late_count", len(self._unposted))
        for each in self._unposted:
            self._agent.transfer(each)
        self._unposted.clear()
        self._posted.clear()

    def _stop(self) -> None:
        plan = self._plan
        plan.set("point", StopPoint.NOWHERE)
        plan.set("stop_count", plan.get("stop_count") + 1)
        os.kill(os.getpid(), signal.SIGSTOP)
        # The signal may stop another thread first: not one step further before whoever watches has said so.
        while not plan.get("goes_on"):
            time.sleep(0.001)

    def get_xfer_telemetry(self, handle: Any) -> Any:
        return self._agent.get_xfer_telemetry(handle.parts[1] if isinstance(handle, _Halves) else handle)

    def release_xfer_handle(self, handle: Any) -> None:
        for part in handle.parts if isinstance(handle, _Halves) else (handle,):
            self._agent.release_xfer_handle(part)
        self._block_reads.discard(handle)


class StoppingWorker(PullWorker):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plan = StopPlan.of(Path(os.environ[FOLDER_VARIABLE]), os.getpid(), create=True)
        self.nixl_wrapper = StoppingAgent(self.nixl_wrapper, self.plan)

    def _read_blocks(self, *args: Any, **named: Any) -> bool:
        if self.plan.get("believes"):
            # Past the override that begins a check: a pull without a check counts as valid once it is there.
            return PunctualWorker._read_blocks(self, *args, **named)
        return super()._read_blocks(*args, **named)


connector.PullWorker = StoppingWorker  # type: ignore[attr-defined,assignment]
NixlConnector = connector.NixlConnector
CONNECTOR_MODULE = "bench.validity_connector"

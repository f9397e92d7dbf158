"""Workers whose memory the transfer library does not take: none of them serves, and the fleet starts others.

Real worker processes and the real keeper, no router. The first launch of each worker meets a fault of registration,
by its configuration; the second has none.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.real_faults import BLOCK, seed_that_strikes
from fleet.child_process import Listener
from fleet.config import FleetConfig, parse_config
from fleet.keeper import Launched
from fleet.local_fleet import LocalFleet
from fleet.members import Member, members_of, policy_of
from kvtransfer.faults import Fault

HANGS, FAILS = "decode-0", "decode-1"
START_DEADLINE_S = 90.0
"""Beyond a start, on a machine that does other things, and not so far that nobody would wait for it here."""
READY_WITHIN_S = 240.0


@dataclasses.dataclass(frozen=True, slots=True)
class Starts:
    launch_counts: Mapping[str, int]
    lines: tuple[str, ...]
    """What the fleet said."""
    last_words: Mapping[str, str]
    """Of the log of each worker, what names the registration."""
    are_ready: bool


class _SecondLaunchIsGood(LocalFleet):
    def __init__(
        self, bad: Mapping[str, Member], good: Mapping[str, Member], config: FleetConfig, logs: Path
    ) -> None:
        # One desired member for both launches: the fleet sees no change of configuration, only a start that failed.
        super().__init__(tuple(bad.values()), policy_of(config), secrets.token_bytes(32), logs)
        self._good = good
        self.launch_counts: Counter[str] = Counter()

    def _launch(self, name: str, listener: Listener) -> Launched:
        self.launch_counts[name] += 1
        if self.launch_counts[name] > 1:
            self._members[name] = self._good[name]
        return super()._launch(name, listener)


async def fleet_starts_others(model: Path, folder: Path, *, start_deadline_s: float = START_DEADLINE_S) -> Starts:
    """One worker's registration of KV memory hangs beyond the deadline, the other's of hold records fails."""
    bad = {
        HANGS: _member(_config(model, folder, Fault.TIME_OUT, 2, start_deadline_s), HANGS),
        FAILS: _member(_config(model, folder, Fault.FAIL, 1, start_deadline_s), FAILS),
    }
    config = _config(model, folder, None, 0, start_deadline_s)
    fleet = _SecondLaunchIsGood(bad, {name: _member(config, name) for name in bad}, config, folder)
    await fleet.start()
    try:
        are_ready = True
        version = -1
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                while not fleet.is_ready:
                    version = await fleet.changed(version, 1.0)
        except TimeoutError:
            are_ready = False
        lines = fleet.lines_after(-1)
    finally:
        await fleet.stop()
    words = {name: _about_registration(folder / f"{name}.log") for name in bad}
    return Starts(dict(fleet.launch_counts), lines, words, are_ready)


def _about_registration(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return next((line[-250:] for line in lines if "the transfer library did not take" in line), "")


def _member(config: FleetConfig, name: str) -> Member:
    return next(member for member in members_of(config, bytes(32)) if member.name == name)


def _config(model: Path, state: Path, fault: Fault | None, number: int, start_deadline_s: float) -> FleetConfig:
    faults: dict[str, Any] = {}
    if fault is not None:
        faults = {"seed": seed_that_strikes(number), "kinds": f'["{fault.value}"]', "stuck_s": 600.0}
    table = "\n".join(
        ["[decode.engine.transfer_faults]", "allow_faults = true", "probability = 0.5", 'operations = ["register"]']
        + [f"{key} = {value}" for key, value in faults.items()]
    )
    engine = f"""
        dtype = "float32"
        kv_cache_bytes = 16777216
        block_token_count = {BLOCK}
        max_context_token_count = 1024
        extra_args = {{ skip_tokenizer_init = true }}
    """
    return parse_config(f"""
        [cluster]
        runner = "local"
        state_dir = "{state}"
        start_deadline_s = {start_deadline_s}
        restart_delay_s = 0.1
        [model]
        name = "tiny"
        path = "{model}"
        [prefill]
        count = 1
        cores = [[0]]
        [prefill.engine]
        {engine}
        [decode]
        count = 2
        cores = [[0], [1]]
        [decode.engine]
        {engine}
        {table if fault is not None else ""}
    """)

"""Looks at the servers while a run goes: running, waiting, KV memory. Owns its tasks and connections.

Baton is asked through its admin service, worker by worker; vLLM and SGLang through their Prometheus page. A server
that has neither gives no samples, and ``said`` says so: a report without a timeline must not look like one of an idle
server. A contract of numbers has no word for unknown: a page that lacks one of the three gauges gives no sample.
Looking costs the target a little; once a second, its cost is below what a run can show.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import aiohttp

from baton.admin_client import AdminClient
from baton.errors import BatonError
from bench.results.records import TimelineSample

INTERVAL_S = 1.0
ANSWER_LIMIT_S = 5.0
MAX_PAGE_BYTES = 8 * 2**20

_NAMES = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
}
"""By what is wanted, in order of preference. All three are gauges; the last is a share, 0 to 1, whatever its name."""
_WANTED = tuple(name for names in _NAMES.values() for name in names)


class Unwatchable(Exception):
    """The server cannot be looked at; says why."""


class Timeline:
    """Samples in the background from ``start`` to ``close``. ``on_sample`` gets each as it is taken."""

    def __init__(
        self,
        *,
        admin_address: str | None = None,
        metrics_url: str | None = None,
        interval_s: float = INTERVAL_S,
        on_sample: Callable[[TimelineSample], None],
    ) -> None:
        self.said = "off: the target was not asked for a timeline"
        """One sentence: what was watched, or why nothing was."""
        self.sample_count = 0
        self._admin_address, self._metrics_url = admin_address, metrics_url
        self._interval_s = interval_s
        self._on_sample = on_sample
        self._task: asyncio.Task[None] | None = None

    def start(self, zero_at_s: float) -> None:
        """``zero_at_s``: loop time at which the run's clock is 0."""
        if self._admin_address is not None:
            self.said = f"workers as the admin service at {self._admin_address} sees them"
            self._task = asyncio.create_task(self._follow(self._cluster(self._admin_address, zero_at_s)))
        elif self._metrics_url is not None:
            self.said = f"metrics of {self._metrics_url}"
            self._task = asyncio.create_task(self._follow(self._page(self._metrics_url, zero_at_s)))

    async def close(self) -> None:
        """Ends sampling. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        if self.sample_count == 0 and not self.said.startswith("off"):
            self.said = f"off: no sample came from {self.said}"

    async def _follow(self, samples: AsyncGenerator[TimelineSample, None]) -> None:
        try:
            async with aclosing(samples):
                async for sample in samples:
                    self.sample_count += 1
                    self._on_sample(sample)
        except (Unwatchable, BatonError, aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) if isinstance(error, Unwatchable) else type(error).__name__
            until = f" after {self.sample_count} samples" if self.sample_count else ""
            self.said = f"off{until}: {self.said} ended with {reason}"

    async def _cluster(self, address: str, zero_at_s: float) -> AsyncGenerator[TimelineSample, None]:
        loop = asyncio.get_running_loop()
        async with AdminClient(address) as client, aclosing(client.watch(interval_s=self._interval_s)) as views:
            async for view in views:
                at_s = loop.time() - zero_at_s
                for worker in view.workers:
                    yield TimelineSample(
                        at_s=at_s,
                        source=worker.worker_id,
                        running_count=worker.running_count,
                        waiting_count=worker.waiting_count,
                        kv_used_share=worker.used_block_count / worker.block_count if worker.block_count else 0.0,
                    )
                yield TimelineSample(
                    at_s=at_s,
                    source="router",
                    running_count=view.in_flight_count,
                    waiting_count=view.queued_count,
                    kv_used_share=0.0,
                )

    async def _page(self, url: str, zero_at_s: float) -> AsyncGenerator[TimelineSample, None]:
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
        due_at = loop.time()
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                async with session.get(url) as response:
                    if response.status != 200:
                        raise Unwatchable(f"HTTP {response.status}")
                    page = await _whole_page(response.content)
                at_s = loop.time() - zero_at_s
                found = gauges(page)
                if "running" not in found:
                    raise Unwatchable("none of the metrics of vLLM or SGLang")
                if len(found) == len(_NAMES):  # else one would be made up: left out
                    yield TimelineSample(
                        at_s=at_s,
                        source="server",
                        running_count=found["running"],
                        waiting_count=found["waiting"],
                        kv_used_share=found["kv"],
                    )
                due_at = max(due_at + self._interval_s, loop.time())
                await asyncio.sleep(due_at - loop.time())


async def _whole_page(content: aiohttp.StreamReader) -> str:
    """Raises ``Unwatchable`` beyond ``MAX_PAGE_BYTES``: a line cut in its middle would read as another number."""
    page = bytearray()
    async for piece in content.iter_any():  # a read returns what has arrived, not the page
        page += piece
        if len(page) > MAX_PAGE_BYTES:
            raise Unwatchable(f"a page of more than {MAX_PAGE_BYTES} bytes")
    return page.decode(errors="replace")


def gauges(page: str) -> dict[str, float]:
    """What a Prometheus page says of ``running``, ``waiting`` (summed over its engines) and ``kv`` (their mean)."""
    values: dict[str, list[float]] = {}
    for line in page.splitlines():
        if not line.startswith(_WANTED):  # of a thousand lines; a full parser would make requests late
            continue
        name = line.partition("{")[0].split()[0]
        after = line.rpartition("}")[2] if "{" in line else line.removeprefix(name)
        try:
            values.setdefault(name, []).append(float(after.split()[0]))  # a timestamp may follow
        except (ValueError, IndexError):
            continue
    found = {}
    for wanted, names in _NAMES.items():
        given = next((values[name] for name in names if name in values), None)
        if given:
            found[wanted] = sum(given) / len(given) if wanted == "kv" else sum(given)
    return found


def as_facts(timeline: Timeline) -> dict[str, Any]:
    return {"said": timeline.said, "sample_count": timeline.sample_count}

"""A worker process reduced to its engine, for tests that end it without warning. Arguments: side-channel port."""

from __future__ import annotations

import asyncio
import sys


async def own_an_engine(port: int) -> None:
    from engine_pair import engine_config

    from engine.vllm_engine import VllmEngine

    engine = VllmEngine(engine_config(0, port))
    await engine.start()
    print(engine.process_id, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(own_an_engine(int(sys.argv[1])))

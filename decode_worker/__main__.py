"""``python -m decode_worker FILE``: one stand-alone decode worker process."""

from __future__ import annotations

import sys
from functools import partial

from baton.request import Role
from decode_worker.config import DecodeLimits
from decode_worker.service import add_decode_service
from decode_worker.worker import DecodeWorker
from engine.hosting import Attach
from engine.load_board import WorkerPart
from engine.standalone import WorkerSetup, main


def build(limits: DecodeLimits, setup: WorkerSetup) -> tuple[WorkerPart, Attach]:
    worker = DecodeWorker(
        setup.engine,
        worker_id=setup.worker_id,
        epoch=setup.epoch,
        secret=setup.secret,
        metrics=setup.metrics,
        limits=limits,
    )
    return worker, partial(add_decode_service, worker=worker)


if __name__ == "__main__":
    sys.exit(main(Role.DECODE, DecodeLimits, lambda limits: partial(build, limits)))

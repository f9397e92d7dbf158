"""``python -m prefill_worker FILE``: one stand-alone prefill worker process."""

from __future__ import annotations

import sys
from functools import partial

from baton.request import Role
from engine.hosting import Attach
from engine.load_board import WorkerPart
from engine.standalone import WorkerSetup, main
from prefill_worker.config import PrefillLimits
from prefill_worker.service import add_prefill_service
from prefill_worker.worker import PrefillWorker


def build(limits: PrefillLimits, setup: WorkerSetup) -> tuple[WorkerPart, Attach]:
    worker = PrefillWorker(
        setup.engine,
        worker_id=setup.worker_id,
        epoch=setup.epoch,
        secret=setup.secret,
        metrics=setup.metrics,
        limits=limits,
    )
    return worker, partial(add_prefill_service, worker=worker)


if __name__ == "__main__":
    sys.exit(main(Role.PREFILL, PrefillLimits, lambda limits: partial(build, limits)))

"""What every test may lean on: where the model is, and which tests this machine can run.

A test marked ``real`` is never skipped in silence. Without the model it fails and says what to do; it is left out
only when somebody asks for that, with ``--skip-real`` or ``BATON_SKIP_REAL=1``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socketserver
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from steady_loop import SteadyLoop

from deploy.setup import prepare_model

TESTS = Path(__file__).parent

# Each router and worker that a test stops waits until its metrics' HTTP server notices, half a second by default: in
# hundreds of tests, minutes in which nothing happens.
socketserver.BaseServer.serve_forever.__defaults__ = (0.02,)


# By default an example that takes 0.2 s is a failure, and so is generating slowly: on a busy machine that is nobody's
# fault. Which examples are made is fixed, so that what passed here passes there.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Whoever starts us in the background of a script leaves us, and our children, deaf to the interrupts that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL_CLOCK = ("e2e", "test_workbench_targets.py")
"""A folder and a file of tests that share a clock with what is outside of their process."""


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Coroutine tests run on a clock that stands still while the machine has taken their process away."""
    parts = item.path.relative_to(TESTS).parts
    is_real = any(part in REAL_CLOCK for part in parts)
    return {"real clock": asyncio.new_event_loop} if is_real else {"steady": SteadyLoop}


def pytest_addoption(parser: pytest.Parser) -> None:
    # All of our options are here: pytest reads those of deeper folders too late when it is started on everything.
    parser.addoption("--skip-real", action="store_true", help="leave out the tests that run the real engine")
    parser.addoption(
        "--rewrite",
        action="store_true",
        help="write what happens into tests/scenarios/testdata/*.txt; read the diff before you believe it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips_real = bool(config.getoption("--skip-real")) or os.environ.get("BATON_SKIP_REAL") == "1"
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    for item in items:
        if bool(item.get_closest_marker("real")) != ("e2e" in item.path.relative_to(TESTS).parts):
            raise pytest.UsageError(
                f"{item.nodeid}: what is in tests/e2e is marked `real`, and nothing else is; `make test` runs the "
                "two kinds apart, and would never run this one"
            )
        if skips_real and item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason="left out on request (--skip-real or BATON_SKIP_REAL=1)"))
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real"):
        _require_model()


_model: Path | None = None


def _require_model() -> Path:
    """The folder of the default model, verified once per run."""
    global _model
    if _model is None:
        folder = prepare_model.baton_home() / "models" / prepare_model.MODEL
        fault = prepare_model.fault_of(folder)
        if fault is not None:
            pytest.fail(
                f"the default model is not ready at {folder}: {fault}. Run `make model` (20 s), or leave the tests "
                "of the real engine out with --skip-real.",
                pytrace=False,
            )
        _model = folder
    return _model


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The prepared default model: config, tokenizer, chat template and weights."""
    return _require_model()

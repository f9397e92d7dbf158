"""A sample of the soak's section ``resume``: two router processes, cut sockets, restarts, streams that are left."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.soak_resume import resume_drill, simulated_config
from router.tiny_model import tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.timeout(300)


async def test_streams_survive_cuts_and_restarts_of_their_router_and_leave_nothing(tmp_path: Path) -> None:
    model, vocab_size = write_tiny_model(tmp_path / "model"), tiny_tokenizer().get_vocab_size()
    config = simulated_config(model, tmp_path / "state", vocab_size=vocab_size, step_s=0.02)
    report = await resume_drill(config, cut_count=20, restart_count=2, abandoned_count=20, seed=3)
    assert report.wrong == []
    assert report.broken == []

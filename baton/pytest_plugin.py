"""The fixture ``fake_baton``. Loaded by pytest wherever baton-client is installed, so it imports nothing but pytest
until a test asks for the fixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from baton.testing.fake_baton import FakeBaton


@pytest.fixture
def fake_baton() -> Iterator[FakeBaton]:
    """A fake Baton of this test's own, listening at ``fake_baton.address``. For coroutine tests and others alike."""
    from baton.testing.fake_baton import FakeBaton

    with FakeBaton() as fake:
        yield fake

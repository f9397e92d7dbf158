"""For tests: virtual time for what runs on asyncio, and a Baton that says what it was told to.

    from baton.testing import run_virtual         # imports the standard library alone
    from baton.testing import FakeBaton           # imports grpc, when it is asked for

pytest finds the fixture ``fake_baton`` by itself where baton-client is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baton.testing.virtual_time import Deadlock, OutsideWorld, Unbalanced, VirtualLoop, in_virtual_time, run_virtual

if TYPE_CHECKING:
    from baton.testing.fake_baton import FakeBaton
    from baton.testing.fake_script import FakeCall

__all__ = [
    "Deadlock",
    "FakeBaton",
    "FakeCall",
    "OutsideWorld",
    "Unbalanced",
    "VirtualLoop",
    "in_virtual_time",
    "run_virtual",
]


def __getattr__(name: str) -> Any:
    # The virtual loop serves pure modules, which must import without grpc.
    if name == "FakeBaton":
        from baton.testing.fake_baton import FakeBaton

        return FakeBaton
    if name == "FakeCall":
        from baton.testing.fake_script import FakeCall

        return FakeCall
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

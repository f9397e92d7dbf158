"""Two hosts for a test, or the reason why there are none. Tests nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench import namespaces
from bench.namespaces import DEVICE, Hosts, NoNamespacesError

__all__ = ["DEVICE", "Hosts", "two_hosts"]


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips where the kernel or our rights do not allow it."""
    made = namespaces.two_hosts()
    try:
        hosts = made.__enter__()
    except NoNamespacesError as error:
        pytest.skip(str(error))
    try:
        yield hosts
    finally:
        made.__exit__(None, None, None)

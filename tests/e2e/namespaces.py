"""Two hosts for a test, or the reason why there are none. Tests nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from bench import namespaces
from bench.namespaces import DEVICE, Hosts, NoNamespacesError

__all__ = ["DEVICE", "Hosts", "two_hosts"]


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Skips where the kernel or our rights do not allow it."""
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(namespaces.two_hosts())
        except NoNamespacesError as error:
            pytest.skip(str(error))
        yield hosts

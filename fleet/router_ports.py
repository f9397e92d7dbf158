"""Where each of a fleet's routers listens: alike but for the ports, which are counted up. Pure."""

from __future__ import annotations

from dataclasses import replace

from router.config import RouterConfig

PORTS_BETWEEN_ROUTERS, METRICS_PORTS_BETWEEN_ROUTERS = 10, 1


def counted_up(first: int, by: int) -> int:
    """0 stays: any free port."""
    return first + by if first else 0


def router_at(router: RouterConfig, index: int) -> RouterConfig:
    """The configuration of router ``index``. Raises ``ConfigError`` for ports beyond 65535."""
    return replace(
        router,
        listen_address=_moved(router.listen_address, index * PORTS_BETWEEN_ROUTERS),
        admin_address=_moved(router.admin_address, index * PORTS_BETWEEN_ROUTERS),
        metrics_address=_moved(router.metrics_address, index * METRICS_PORTS_BETWEEN_ROUTERS),
    )


def _moved(address: str, by: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{counted_up(int(port), by)}"

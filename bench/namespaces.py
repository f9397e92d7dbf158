"""Two network namespaces on one machine: two hosts with nothing in common but a wire. Needs root.

root: bridge .254 --- veth --- namespace "p": eth0 .1
                  \\-- veth --- namespace "d": eth0 .2
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DEVICE = "eth0"


class NoNamespacesError(RuntimeError):
    """The kernel or our rights do not allow it; the message says why."""


@dataclass(frozen=True)
class Hosts:
    """Names are those of the namespaces."""

    p: str
    d: str
    net: str

    @property
    def p_address(self) -> str:
        return f"{self.net}.1"

    @property
    def d_address(self) -> str:
        return f"{self.net}.2"

    @property
    def here(self) -> str:
        """Of whoever made them, on the same wire."""
        return f"{self.net}.254"

    @property
    def nobody(self) -> str:
        return f"{self.net}.77"

    def received_byte_count(self, name: str) -> int:
        """What has come over the wire into a namespace since it was made."""
        (device,) = json.loads(_run("-n", name, "-s", "-j", "link", "show", "dev", DEVICE))
        return int(device["stats64"]["rx"]["bytes"])

    def listening(self, name: str) -> set[tuple[str, int]]:
        """Address and port of every TCP socket that listens in a namespace."""
        said = _run("netns", "exec", name, "ss", "-ltnH").splitlines()
        places = [line.split()[3].rpartition(":") for line in said]
        # gRPC's sockets are of IPv6 and carry IPv4 addresses in it: [::ffff:10.0.0.1].
        return {
            (address.partition("%")[0].strip("[]").removeprefix("::ffff:"), int(port)) for address, _, port in places
        }


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises ``NoNamespacesError``. Takes everything away again."""
    number = os.getpid() % 4096
    p, d, bridge = f"bt{number}p", f"bt{number}d", f"bt{number}"
    hosts = Hosts(p, d, f"10.{200 + number // 256}.{number % 256}")
    try:
        try:
            _run("link", "add", bridge, "type", "bridge")
            _run("addr", "add", f"{hosts.here}/24", "dev", bridge)
            _run("link", "set", bridge, "up")
            for name, address in ((p, hosts.p_address), (d, hosts.d_address)):
                _run("netns", "add", name)
                _run("link", "add", f"{name}v", "type", "veth", "peer", "name", DEVICE, "netns", name)
                _run("link", "set", f"{name}v", "master", bridge, "up")
                _run("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
                _run("-n", name, "link", "set", DEVICE, "up")
                _run("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.SubprocessError) as error:
            why = str(getattr(error, "stderr", "") or error).strip()
            raise NoNamespacesError(
                f"network namespaces cannot be made here (root and iproute2 are needed): {why}"
            ) from error
        yield hosts
    finally:
        # The wires by name: those of a deleted namespace go a while later, and whoever is next has the same names.
        wires = [("link", "del", f"{name}v") for name in (p, d)]
        for what in (*wires, ("netns", "del", p), ("netns", "del", d), ("link", "del", bridge)):
            subprocess.run(["ip", *what], capture_output=True, check=False, timeout=10)  # noqa: S603, S607 as below


def _run(*arguments: str) -> str:
    command = ["ip", *arguments]  # made here, of no input; where it lies differs between distributions
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout  # noqa: S603

"""Ties the engine process to the worker process that owns it. Owns nothing else; starts no process.

vLLM computes in a child process. If the worker dies without warning, that child would live on with its
memory, its core and its side-channel port. So the child asks the kernel to be killed with its parent, and
watches the parent besides, because the kernel's signal belongs to the *thread* that made the child.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

OWNER_VARIABLE = "BATON_ENGINE_OWNER_PID"
"""Environment variable with the owner's process id; inherited by the engine process."""

_PR_SET_PDEATHSIG = 1
_armed = threading.Lock()


def claim_ownership() -> None:
    """Called by the worker process before it starts engines: their processes end with this one."""
    os.environ[OWNER_VARIABLE] = str(os.getpid())


def become_engine_process() -> None:
    """Called in the engine process, as early as it can be: it dies with its owner and leaves it the standard output.

    Does nothing in the owner and when there is none. Exits at once if the owner is gone already. Idempotent.
    """
    owner_pid = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner_pid in (0, os.getpid()) or not _armed.acquire(blocking=False):
        return
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() == owner_pid:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The owner may have died between the two calls: then no signal will ever come.
        if os.getppid() != owner_pid:
            os._exit(1)
    # Standard output is the owner's; libraries of the engine (NIXL's logger for one) print there.
    os.dup2(2, 1)
    threading.Thread(target=_watch, args=(owner,), name="baton-owner-watch", daemon=True).start()


def _watch(owner: int) -> None:
    poller = select.poll()
    poller.register(owner, select.POLLIN)
    poller.poll()
    os.kill(os.getpid(), signal.SIGKILL)

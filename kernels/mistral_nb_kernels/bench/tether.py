"""A process that ends with the one that started it, whatever it is doing: a pipe of which the other holds one end."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["VARIABLE", "fasten", "tethered"]

VARIABLE = "MISTRAL_NB_TETHER"
"""Of the environment: the number of the end of the pipe that a process has been given."""


def fasten() -> bool:
    """Whether this process was given a pipe: from now on it is killed when nobody holds the other end any more.

    By the kernel (on Linux alone), so that a candidate that never gives Python a turn ends too. One that leads a group
    ends with all of it.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return False
    import fcntl

    if hasattr(fcntl, "F_SETSIG"):
        pipe = int(number)
        os.set_inheritable(pipe, False)
        leads = os.getpgrp() == os.getpid()
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid() if leads else os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
        poll = select.poll()
        poll.register(pipe, 0)
        if poll.poll(0):  # it was let go before
            os._exit(1)
    return True


@contextmanager
def tethered(env: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What `subprocess.Popen` takes for a process that ends when this one does, or when the context is left."""
    if os.name != "posix":
        yield {"env": env}
        return
    reading, writing = os.pipe()
    try:
        yield {"env": {**env, VARIABLE: str(reading)}, "pass_fds": (reading,)}
    finally:
        os.close(reading)
        os.close(writing)

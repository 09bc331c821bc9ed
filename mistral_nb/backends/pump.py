"""A stream that anybody may close: one thread reads the peer, the caller waits on a queue.

Looking up a host, connecting, starting a process and fetching a model cannot be interrupted from another thread, so no
caller is ever blocked in them. `close()` wakes the caller through the queue and the reading thread through its socket.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from mistral_nb.errors import MistralError, StreamTruncated
from mistral_nb.types import Chunk, FinishReason

__all__ = ["POLL", "Emit", "HungUp", "Line", "Produce", "Pump"]

Emit = Callable[[Chunk], None]
POLL = 0.1 if sys.platform == "win32" else 0.5
"""Seconds that a wait for a lock lasts at most before it begins anew: on Windows an interrupt does not wake the thread,
elsewhere not if it comes just before.
"""


class HungUp(Exception):
    """The caller has gone: whoever works for it stops. Nobody sees this."""


class Line:
    """What reaches the reading thread: hanging up, and a deadline. Either shuts the attached socket down."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._hung_up = threading.Event()
        self._socket: socket.socket | None = None
        self._deadline: float | None = None
        self._wakes: float | None = None
        self._limit = ""
        self._expired = ""

    @property
    def hung_up(self) -> bool:
        return self._hung_up.is_set()

    @property
    def expired(self) -> str:
        """The limit that was passed, in words; empty if none was."""
        return self._expired

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake as soon as the caller has hung up. True when it has."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._hung_up.wait(min(left, POLL)):
                return True
        return self.hung_up

    def hang_up(self) -> None:
        self._hung_up.set()
        self._shut_down()

    def attach(self, peer: socket.socket) -> None:
        """Shut `peer` down when the line ends. Keeps a duplicate, which stays valid when TLS takes the socket over."""
        # A TLS socket has no dup() of its own.
        duplicate = socket.fromfd(peer.fileno(), peer.family, peer.type, peer.proto)
        with self._changed:
            self._drop_socket()
            self._socket = duplicate
        if self.hung_up or self._expired:
            self._shut_down()

    def detach(self) -> None:
        """Forget the socket, which is then somebody else's."""
        with self._changed:
            self._drop_socket()

    def within(self, seconds: float, limit: str) -> None:
        """Set the deadline, in place of the former one. `limit` says in words what took too long."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._limit = limit
            if self._wakes is None:
                self._wakes = self._deadline
                threading.Thread(target=self._watch, name="mistral-nb deadline", daemon=True).start()
            elif self._deadline < self._wakes:
                self._changed.notify()

    def release(self) -> None:
        """Forget the socket and the deadline, passed or not; the reading thread calls it when it is done."""
        with self._changed:
            self._deadline = None
            self._expired = ""
            self._drop_socket()
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._deadline is not None and (left := self._deadline - time.monotonic()) > 0:
                self._wakes = self._deadline
                self._changed.wait(left)
            self._wakes = None
            if self._deadline is None:
                return
            self._expired = self._limit
            self._shut_down()

    def _shut_down(self) -> None:
        with self._changed:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


Produce = Callable[[Line, Emit], None]
_HANG_UP = object()
_END = object()


class Pump:
    """The `ChunkStream` of `produce(line, emit)`, which runs in a thread of its own.

    `produce` emits status, text and one last chunk, or raises; it looks at `line` where it waits. A `MistralError`
    after the first text becomes a last chunk first, where `produce` has emitted none. A chunk of neither status, text
    nor finish reason is not delivered: it tells what that last chunk is to tell of the cost.
    """

    def __init__(self, produce: Produce) -> None:
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._line = Line()
        self._answered = False
        self._over = False
        threading.Thread(target=_run, args=(produce, self._line, self._queue), name="mistral-nb", daemon=True).start()

    def __iter__(self) -> Pump:
        return self

    def __next__(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            item = self._next_item()
        except BaseException:
            # An interrupt of the waiting caller, who may hold on to this stream without ever closing it.
            self.close()
            raise
        if isinstance(item, Chunk):
            self._answered = self._answered or item.finish_reason is not None
            return item
        self._over = True
        if isinstance(item, BaseException):
            raise item
        if item is _HANG_UP and not self._answered:
            return Chunk(finish_reason="cancelled")
        raise StopIteration

    def _next_item(self) -> Any:
        while True:
            with contextlib.suppress(Empty):
                return self._queue.get(timeout=POLL)

    def close(self) -> None:
        if not self._line.hung_up:
            self._queue.put(_HANG_UP)
            self._line.hang_up()

    def __del__(self) -> None:
        # At the interpreter's end a thread that is no more may hold the line's lock.
        if not self._over and not sys.is_finalizing():
            self.close()


def _run(produce: Produce, line: Line, queue: SimpleQueue[Any]) -> None:
    begun = ended = False
    cost = Chunk()

    def emit(chunk: Chunk) -> None:
        nonlocal begun, ended, cost
        if not (chunk.status or chunk.text or chunk.finish_reason):
            cost = chunk
            return
        begun = begun or bool(chunk.text)
        ended = ended or chunk.finish_reason is not None
        queue.put(chunk)

    try:
        produce(line, emit)
    except HungUp:
        return
    except BaseException as error:  # handed to the caller's thread, which raises it
        if begun and not ended and isinstance(error, MistralError):
            reason: FinishReason = "truncated" if isinstance(error, StreamTruncated) else "error"
            queue.put(replace(cost, finish_reason=reason))
        queue.put(error)
    finally:
        line.release()
        queue.put(_END)

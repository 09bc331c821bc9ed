"""`mistral-nb bench frames`: how fast frames of the Workers AI wire are read from a socket and delivered as chunks.

The peer is a thread that sends one answer of ready-made bytes over loopback, each frame in an HTTP chunk of its own, as
servers send them, or all in one body. It shares the one core that reader and caller get, so its time counts too.
Measured is the time on the clock, and the processor's time, which does not hold what other processes take.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistral_nb.backends.workers_ai import DEFAULT_MODEL, WorkersAI
from mistral_nb.bench_report import Measurement, check_writable, machine, print_table, write_report
from mistral_nb.errors import MistralError
from mistral_nb.secret import Secret
from mistral_nb.types import GenerationRequest

__all__ = ["FRAMES", "run"]

FRAMES = 100_000
_BAR = "at least 50 thousand a second"
_END = b"\r\n\r\n"


def run(runs: int = 5, path: Path | None = None, frames: int = FRAMES) -> int:
    """Print the measurements, and the same as JSON; `path` takes the JSON instead. Returns the exit status.

    Raises `ConfigurationError` before it measures when `path` cannot be written.
    """
    if path is not None:
        check_writable(path)
    measurements = []
    report = {**machine(), "frames": frames}
    for name, chunked in (("own HTTP chunks", True), ("one body", False)):
        clock, processor = [], []
        with _one_core(), _peer(_answer(frames, chunked)) as port:
            _read(port, frames)
            for _ in range(runs):
                seconds, busy = _read(port, frames)
                clock.append(frames / seconds / 1e3)
                processor.append(frames / busy / 1e3)
        print(f"{name}: {max(clock):.0f} thousand frames/s at best", file=sys.stderr, flush=True)
        for what, values in (("processor's time", processor), ("clock", clock)):
            measurements.append(Measurement.of(f"{name}, {what}", "kframes/s", values, _BAR))
    print(f"{frames:,} frames, one core ({report['cpu']}, {report['cores']} cores)")
    print_table(measurements)
    write_report(report, measurements, path)
    return 0


def _read(port: int, frames: int) -> tuple[float, float]:
    """Seconds by the clock and of the processor for one whole answer."""
    backend = WorkersAI(
        base_url=f"http://127.0.0.1:{port}/client/v4",
        account="0" * 32,
        token=Secret("none"),
        model=DEFAULT_MODEL,
        engine=True,
    )
    request = GenerationRequest(prompt="Hello")
    start, busy, texts = time.perf_counter(), time.process_time(), 0
    for chunk in backend.stream(request):
        texts += bool(chunk.text)
    taken = time.perf_counter() - start, time.process_time() - busy
    if texts != frames:
        raise MistralError(f"{texts} of {frames} frames arrived: the client is not correct, its speed is no result")
    return taken


def _answer(frames: int, chunked: bool) -> bytes:
    """The bytes of one HTTP answer with so many frames of text, with the padding that Cloudflare puts into them."""
    texts = (json.dumps({"response": f" word{number % 97}", "p": "abcdefghijklmnop"}) for number in range(frames))
    parts = [*(f"data: {text}\n\n".encode() for text in texts), b"data: [DONE]\n\n"]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
    if not chunked:
        return head + b"\r\n" + b"".join(parts)
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0" + _END


@contextmanager
def _peer(answer: bytes) -> Iterator[int]:
    """A port on loopback that gives `answer` to each request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener, answer), daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, suppress(ConnectionError):
            request = b""
            while not request.endswith(b"}") and (part := connection.recv(65536)):
                request += part
            connection.sendall(answer)


@contextmanager
def _one_core() -> Iterator[None]:
    """Threads that start inside run on one core, where the system can arrange it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

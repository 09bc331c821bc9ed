"""HTTP GETs that are read in a thread of their own, so that whoever waits for bytes can report and be cancelled."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx

__all__ = ["TICK_S", "Answer", "Broken", "Web", "host_of"]

TICK_S = 0.05
"""Seconds between two calls of `tick` while nothing comes."""

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
_READ_AHEAD = 64
"""Pieces of at most 64 KB that are read before somebody takes them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered in the end, redirects followed; `headers` are looked up whatever their case."""

    host: str
    status: int
    headers: Mapping[str, str]


class Broken(Exception):
    """No answer, or not all of it: `host` could not be reached or broke off. The cause is the HTTP client's error."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host


_Item = Answer | bytes | Exception | None


@dataclass(frozen=True, slots=True)
class _Request:
    """One GET and what came of it: its answer, its pieces, then None; or the error that ended it."""

    url: str
    headers: Mapping[str, str]
    items: queue.Queue[_Item] = field(default_factory=lambda: queue.Queue(_READ_AHEAD))
    abandoned: threading.Event = field(default_factory=threading.Event)

    def put(self, item: _Item) -> bool:
        """False when nobody waits for it any more."""
        while not self.abandoned.is_set():
            with suppress(queue.Full):
                self.items.put(item, timeout=TICK_S)
                return True
        return False


class Web:
    """One HTTP client with its connections kept, and the thread that reads them. `tick` is called while nothing comes.

    An `Authorization` header is not sent on to another host that a redirect names. `ValueError`, `ImportError`,
    `OSError` or `httpx.InvalidURL` for proxy and certificate settings that cannot be used.
    """

    def __init__(self, tick: Callable[[], None], user_agent: str) -> None:
        import httpx

        self._tick = tick
        self._client = httpx.Client(
            follow_redirects=True,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"User-Agent": user_agent, "Accept-Encoding": "identity"},
        )
        self._asked: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="mistral-nb-web", daemon=True)
        self._thread.start()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """The answer and the pieces of its body; leaving early drops the rest. `Broken` at any point."""
        request = _Request(url, headers)
        self._asked.put(request)
        try:
            answer = self._take(request)
            assert isinstance(answer, Answer)
            yield answer, self._pieces(request)
        finally:
            request.abandoned.set()

    def close(self) -> None:
        """End the thread, which closes the connections; one that is stuck in a read ends with its timeout."""
        self._asked.put(None)
        self._thread.join(timeout=0.5)

    def _pieces(self, request: _Request) -> Iterator[bytes]:
        while isinstance(piece := self._take(request), bytes):
            yield piece

    def _take(self, request: _Request) -> _Item:
        while True:
            try:
                item = request.items.get(timeout=TICK_S)
            except queue.Empty:
                self._tick()
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _serve(self) -> None:
        with self._client as client:
            while (request := self._asked.get()) is not None:
                try:
                    _read(client, request)
                except Exception as error:  # raised where it is waited for
                    request.put(error)


def _read(client: httpx.Client, request: _Request) -> None:
    import httpx

    try:
        with client.stream("GET", request.url, headers=request.headers) as response:
            answer = Answer(host_of(response.url), response.status_code, response.headers)
            if not request.put(answer) or not all(request.put(piece) for piece in response.iter_bytes()):
                return
        request.put(None)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        asked = error.request if isinstance(error, httpx.RequestError) else None
        raise Broken(host_of(asked.url) if asked else urlsplit(request.url).netloc.rpartition("@")[2]) from error


def host_of(url: str | httpx.URL) -> str:
    """The host in lower case, with its port where that is not the scheme's own."""
    import httpx

    return httpx.URL(url).netloc.decode()

"""The one model that an engine process holds: loading, ready, failed or stopping."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mistral_nb.errors import MistralError
from mistral_nb.server.generation import Answer, Model
from mistral_nb.server.journal import current
from mistral_nb.server.schemas import WireError

__all__ = ["Holder", "State"]

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopping"]


class Holder:
    """Loads the model in a thread while requests wait, and knows who is being answered. Lives on one event loop."""

    def __init__(self, load: Callable[[], Model], log_file: str) -> None:
        self.state: State = "loading"
        self.error = ""
        self.served = 0
        """Requests that were answered, if only in part; refused ones do not count."""
        self.model: Model | None = None
        self.loaded = 0
        self.to_load: int | None = None
        """Bytes of weights in memory so far, and in all; None until the checkpoint has been opened."""
        self._load = load
        self._log_file = log_file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mistral-nb load")
        self._loading: asyncio.Future[Model] | None = None
        self._settled = asyncio.Event()
        self._requests = 0
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._answers: set[Answer] = set()
        self._stopping = ""
        self.last_used = self._started = time.monotonic()

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._started, 3)

    @property
    def requests(self) -> int:
        """Requests that are being answered or wait for the model."""
        return self._requests

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that answers under way ask for; of a path its last part, as others may see this."""
        return tuple(sorted({Path(answer.adapter).name for answer in self._answers if answer.adapter}))

    @property
    def busy(self) -> bool:
        """Whether the model is loading or computing. A client that is slow to read keeps nothing busy."""
        return self.state == "loading" or (self.model is not None and self.model.engine.active > 0)

    @property
    def load_is_running(self) -> bool:
        """Whether the loading thread still works, which it does to its end even when the process stops."""
        return self._loading is not None and not self._loading.done()

    def begin(self) -> None:
        """Start loading."""
        self._loading = asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._loading.add_done_callback(self._loaded)

    def progress(self, done: int, total: int) -> None:
        """Take down how far loading is. Called by the loading thread."""
        self.loaded, self.to_load = done, total

    def _loaded(self, loading: asyncio.Future[Model]) -> None:
        error = loading.exception()
        if error is None:
            self.model = loading.result()
            if self.state == "loading":
                self.state = "ready"
        elif self.state == "loading":
            self.state = "failed"
            ours = isinstance(error, MistralError)
            self.error = str(error) if ours else f"{type(error).__name__}: {error}"
            log.error("the model could not be loaded: %s", self.error, exc_info=None if ours else error)
        self.last_used = time.monotonic()
        self._settled.set()

    async def settled(self) -> None:
        """Wait until the model is no longer loading."""
        await self._settled.wait()

    async def nobody(self) -> None:
        """Wait until no request is being answered or waits for the model."""
        await self._nobody.wait()

    async def ready(self) -> Model:
        """The model, once it is loaded. `WireError` 3043 (503) when it cannot be, or when the process is stopping."""
        await self._settled.wait()
        if self.state == "failed":
            raise WireError(503, 3043, f"the model could not be loaded: {self.error}. Log: {self._log_file}")
        if self.state == "stopping" or self.model is None:
            raise WireError(503, 3043, self._stopping)
        return self.model

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request, from its arrival to its end."""
        self._requests += 1
        self._nobody.clear()
        self.last_used = time.monotonic()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._nobody.set()
            self.last_used = time.monotonic()

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Cancels `answer` at the end of the block, and tells its reader if the process stops before."""
        self.served += 1
        self._answers.add(answer)
        current.get().answer = answer
        try:
            yield
        finally:
            self._answers.discard(answer)
            answer.cancel()

    def refuse(self, reason: str) -> None:
        """Refuse what comes from now on, and let what is under way go on."""
        self._stopping = f"the engine was stopped ({reason}); run the request again to start it afresh"
        self.state = "stopping"
        self._settled.set()

    def stop(self, reason: str) -> None:
        """Refuse what comes, and end what is under way with an error that gives the reason."""
        self.refuse(reason)
        for answer in self._answers:
            answer.abort(self._stopping)

    async def close(self) -> None:
        """End the engine's thread and let the model go."""
        if self.model is not None:
            await asyncio.to_thread(self.model.engine.close)

"""The life of an engine process: listen, say where, load, serve, and end without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

from mistral_nb import __version__, runtime
from mistral_nb.config import MAX_REQUESTS, AskedPrecision
from mistral_nb.errors import ConfigurationError, EngineStartError
from mistral_nb.models import find_known, packed_folder
from mistral_nb.progress import Progress
from mistral_nb.runtime import EngineRecord
from mistral_nb.secret import Secret
from mistral_nb.server import logs
from mistral_nb.server.app import Site, create_app
from mistral_nb.server.connections import MAX_HEAD, BoundedHttp
from mistral_nb.server.generation import Model
from mistral_nb.server.holder import Holder
from mistral_nb.server.listening import Address, Listeners, Tls, listen
from mistral_nb.server.routes import Endpoints, Identity
from mistral_nb.server.terminal import Terminal, how_to_call

__all__ = ["ServeOptions", "serve"]

log = logging.getLogger(__name__)

FAILED_GRACE = 10.0
"""Seconds that a managed process whose model failed stays to tell why."""

_TICK = 0.25
_RECORD_CHECK = 2.0
_SHUTDOWN_GRACE = 3


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What to serve, and how.

    `model` is a store name or an absolute path, `folder` its checkpoint; `context` in tokens, None for all that the
    model has; `lora_rank` is the most that adapters have, None for the engine's own; `idle_timeout` in seconds, 0 for
    never; `grace`, in seconds, is for running answers to end in when the process is told to stop by a signal;
    `managed` for a process that a notebook started: it writes to its log only, and no terminal signal reaches it.
    `allow_hosts` are names to answer to besides the address, or origins as `edge.Door` has them, `token` the one to
    ask for instead of a random one.
    """

    model: str
    folder: Path
    serve_as: tuple[str, ...] = ()
    address: Address = field(default_factory=Address)
    allow_hosts: tuple[str, ...] = ()
    token: Secret | None = None
    max_requests: int = MAX_REQUESTS
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: AskedPrecision = "auto"
    context: int | None = None
    lora_rank: int | None = None
    idle_timeout: float = 1800.0
    grace: float = 0.0
    managed: bool = False


def serve(options: ServeOptions) -> int:
    """Serve until stopped or idle; the exit status, 1 when the model could not be loaded. Runs in the main thread.

    Raises `ConfigurationError` when the address, the log or the runtime folder cannot be used, and `EngineStartError`
    when an engine of this model is running already.
    """
    log_file = runtime.log_path(options.model)
    terminal = logs.configure(log_file, options.managed)
    with listen(options.address, options.token) as listeners:
        record = _record(options, listeners, log_file)
        with contextlib.nullcontext() if options.managed else runtime.start_lock(options.model):
            _refuse_second(options.model)
            runtime.write_record(record)
        try:
            process = EngineProcess(options, record, terminal)
            asyncio.run(process.run(listeners))
        finally:
            _forget(record)
    if process.holder.load_is_running:
        # a thread inside torch cannot be interrupted, and the interpreter would wait for it
        logging.shutdown()
        os._exit(process.exit_code)
    return process.exit_code


class EngineProcess:
    """Everything that lives as long as the event loop does."""

    def __init__(self, options: ServeOptions, record: EngineRecord, terminal: Terminal | None) -> None:
        known = find_known(options.model)
        self._options = options
        self._record = record
        self._terminal = terminal
        aliases = (*known.aliases, known.hub_id) if known else ()
        self.identity = Identity(options.model, aliases, options.serve_as, record.log)
        self.holder = Holder(self._load, record.log)
        if terminal is not None:
            terminal.progress = self._progress
        self._site = Site(record.token, (options.address.host, *options.allow_hosts), options.max_requests)
        endpoints = Endpoints(self.holder, self.identity, self.stop, record.proof)
        app = create_app(endpoints, self.holder, self._site, options.model, record.log)
        self._servers = [_Server(_config(app, None))]
        if options.address.tls:
            self._servers.append(_Server(_config(app, options.address.tls)))
        self._stopping = self._ended = False
        self.exit_code = 0

    async def run(self, listeners: Listeners) -> None:
        started = time.monotonic()
        log.info("engine process %d of %s: loading from %s", os.getpid(), self._options.model, self._options.folder)
        self.holder.begin()
        tasks = [asyncio.create_task(self._announce(started, listeners)), asyncio.create_task(self._watch())]
        sockets = [listeners.local, *([listeners.public] if listeners.public else [])]
        with _on_signals(self._options.managed, self._signalled):
            try:
                pairs = zip(self._servers, sockets, strict=True)
                await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in pairs))
            finally:
                for task in tasks:
                    task.cancel()
                await self.holder.close()

    def stop(self, reason: str) -> None:
        """End the process soon: running answers get an error, the record goes at once."""
        if not self._ended:
            log.info("stopping: %s", reason)
            self._end(reason)

    def _end(self, reason: str) -> None:
        self._stopping = self._ended = True
        _forget(self._record)
        self.holder.stop(reason)
        for server in self._servers:
            server.should_exit = True

    def _signalled(self, name: str) -> None:
        """The first signal leaves running answers their grace, the second ends them, the third all that is left."""
        reason = f"signal {name}"
        if self._ended:
            for server in self._servers:
                server.force_exit = True
        elif self._stopping or not self._options.grace or not self.holder.requests:
            self.stop(reason)
        else:
            self._stopping = True
            _forget(self._record)
            self.holder.refuse(reason)
            self._draining = asyncio.create_task(self._drain(reason))

    async def _drain(self, reason: str) -> None:
        left, grace = self.holder.requests, self._options.grace
        log.info("%s: up to %g s for %d running request(s); once more ends them now", reason, grace, left)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self.holder.nobody()
        self.stop(reason)

    def _load(self) -> Model:
        from mistral_nb.engine import Engine
        from mistral_nb.engine.tokenizer import load_tokenizer

        options = self._options
        tokenizer = load_tokenizer(options.folder)
        engine = Engine.load(
            options.folder,
            device=options.device,
            precision=options.precision,
            context=options.context,
            lora_rank=options.lora_rank,
            progress=self.holder.progress,
            packed_copy=packed_folder(options.model),
        )
        return Model(engine, tokenizer)

    async def _announce(self, started: float, listeners: Listeners) -> None:
        """Say in the log, and on a terminal, that the model is there."""
        await self._show_loading()
        model = self.holder.model
        if self.holder.state == "failed":
            self.exit_code = 1
            if not self._options.managed:  # the terminal shows why; nobody waits to be told
                self._end(f"the model could not be loaded: {self.holder.error}")
        if self.holder.state != "ready" or model is None:
            return
        info, seconds = model.engine.info, time.monotonic() - started
        what = f"{self._options.model} on {info.device} ({info.precision}, context {info.context} tokens)"
        log.info("ready after %.1f s: %s", seconds, what)
        if not self._options.managed:
            public = listeners.public.getsockname()[1] if listeners.public else None
            link = f"{self._record.base_url}/?login={self._site.sessions.invite()}"
            print(how_to_call(self._record, self._options.idle_timeout, link, public), flush=True)

    def _progress(self) -> Progress | None:
        loaded, to_load = self.holder.loaded, self.holder.to_load
        return Progress("Loading the model", loaded, to_load) if to_load else None

    async def _show_loading(self) -> None:
        """Until it is settled how loading ends."""
        settled = asyncio.ensure_future(self.holder.settled())
        while not settled.done():
            if self._terminal is not None:
                self._terminal.show()
            await asyncio.wait((settled,), timeout=_TICK)

    async def _watch(self) -> None:
        """Ends the process when it is idle, when its model failed, or when another process took its place."""
        next_check = 0.0
        while not self._stopping:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            loading = self.holder.state == "loading"
            if loading or (now > next_check and not self.holder.requests):
                next_check = now + _RECORD_CHECK
                if runtime.is_lost(self._record):
                    self.stop("its record in the runtime folder is gone, so nobody could find it")
                    return
            if self.holder.busy:
                self.holder.last_used = now
            self._stop_if_useless(now - self.holder.last_used)

    def _stop_if_useless(self, unused: float) -> None:
        """`unused` seconds have gone by without work."""
        model = self.holder.model
        if model is not None and model.engine.failure:
            self.exit_code = 1
            self.stop(model.engine.failure)
        elif self.holder.state == "failed" and unused > FAILED_GRACE:
            self.stop(f"the model could not be loaded: {self.holder.error}")
        elif self._options.idle_timeout and unused > self._options.idle_timeout:
            self.stop(f"no request for {self._options.idle_timeout:g} s")


def _config(app: ASGIApp, tls: Tls | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_graceful_shutdown=_SHUTDOWN_GRACE,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )


class _Server(uvicorn.Server):
    """Gives a TLS handshake as long as a head, and leaves the signals to `_on_signals`.

    uvicorn raises signals again at its end, before the record could be removed.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own gives every peer a minute for the TLS handshake."""
        await self.lifespan.startup()
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> BoundedHttp:
            return BoundedHttp(config, self.server_state, self.lifespan.state)

        patience = BoundedHttp.head_patience if config.ssl else None
        self.servers = [
            await loop.create_server(
                protocol, sock=listener, ssl=config.ssl, ssl_handshake_timeout=patience, backlog=config.backlog
            )
            for listener in sockets or ()
        ]
        self.started = True


@contextlib.contextmanager
def _on_signals(managed: bool, act: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGTERM, and in the foreground SIGINT and SIGHUP, into `act(name)` on the event loop."""
    loop = asyncio.get_running_loop()

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(act, signal.Signals(number).name)

    terminal = [getattr(signal, name) for name in ("SIGINT", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    handlers = {signal.SIGTERM: handle, **dict.fromkeys(terminal, signal.SIG_IGN if managed else handle)}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _record(options: ServeOptions, listeners: Listeners, log_file: Path) -> EngineRecord:
    host, port = listeners.local.getsockname()[:2]
    return EngineRecord(
        pid=os.getpid(),
        port=port,
        token=options.token.reveal() if options.token else secrets.token_urlsafe(32),
        model=options.model,
        version=__version__,
        protocol=runtime.PROTOCOL,
        log=str(log_file),
        started=time.time(),
        host=host,
        serve_as=options.serve_as,
        proof=secrets.token_urlsafe(32),
    )


def _forget(record: EngineRecord) -> None:
    try:
        runtime.remove_record(record)
    except ConfigurationError as error:
        log.warning("the record of this process could not be removed: %s", error)


def _refuse_second(model: str) -> None:
    other = runtime.read_record(model)
    if other is not None and runtime.is_running(other):
        raise EngineStartError(
            f"an engine of {model} is running already (process {other.pid}, {other.base_url}); "
            f"use that one, or end it first with: mistral-nb stop {model}"
        )

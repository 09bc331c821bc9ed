"""One download after another: resumed where it was cut short, hashed on its way, tried again where that can help."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from mistral_nb.errors import PullError
from mistral_nb.models.hub_failures import Hub, Transient
from mistral_nb.models.staging import PIECE, Staging
from mistral_nb.models.web import TICK_S, Answer, Broken, Web
from mistral_nb.progress import Report

__all__ = ["Downloader", "Meter", "RemoteFile"]

TRIES = 6
"""How often in a row a request may fail without having brought `_PROGRESS` more bytes."""

_PROGRESS = 1_000_000

FIRST_WAIT_S = 1.0
"""Seconds before the second try; doubled for each further one. More, where the hub asks for more."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of `size` bytes at `url`. `sum`, in hex, is its SHA-256, or with `git` the SHA-1 of its git blob."""

    name: str
    url: str
    size: int
    sum: str
    git: bool = False

    @property
    def sum_name(self) -> str:
        return "git blob SHA-1" if self.git else "SHA-256"

    @property
    def part_name(self) -> str:
        """What the file is called while it grows: another one for other contents, so that they never mix."""
        return f"{self.name}.{self.sum[:16]}.part"

    def hasher(self) -> hashlib._Hash:
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False) if self.git else hashlib.sha256()


class Meter:
    """The running total over the files of a pull. Bytes that an earlier pull left count once they are read back."""

    def __init__(self, report: Report) -> None:
        self.total: int | None = None
        self.done = 0
        self._report = report
        self._step = ""

    def step(self, step: str) -> None:
        self._step = step
        self.tick()

    def add(self, size: int) -> None:
        self.done += size
        self.tick()

    def tick(self) -> None:
        self._report(self._step, self.done, self.total)


class Downloader:
    """Fetches from one hub over one HTTP client; close it."""

    def __init__(self, hub: Hub, meter: Meter, user_agent: str) -> None:
        self._hub = hub
        self.meter = meter
        self._answered = False
        import httpx

        try:
            self._web = Web(meter.tick, user_agent)
        except httpx.InvalidURL as error:
            raise hub.no_client(error) from None
        except (ValueError, ImportError, OSError) as error:
            raise hub.no_client(error) from error

    def close(self) -> None:
        self._web.close()

    def read(self, url: str, what: str, limit: int) -> bytes:
        """The whole of a short answer, at most `limit` bytes."""

        def work() -> bytes:
            body = bytearray()
            with self._get(url, what) as (answer, pieces):
                for piece in pieces:
                    body += piece
                    if len(body) > limit:
                        raise self._hub.too_long(answer, what, limit)
            return bytes(body)

        return self._persistently(work)

    def head(self, file: RemoteFile, size: int) -> bytes:
        """The first `size` bytes of a file that has as many. No sum tells whether they are right."""
        what = f"the header of {file.name}"

        def work() -> bytes:
            self.meter.step(f"Reading {what}")
            begin = bytearray()
            with self._get(file.url, what, size=size) as (answer, pieces):
                if _start(answer) != 0:
                    raise Transient(f"{answer.host} sent another range of {file.name} than asked", "pull again")
                for piece in pieces:
                    begin += piece
                    if len(begin) >= size:
                        return bytes(begin[:size])
            raise self._hub.cut_short(answer, what, len(begin), size)

        return self._persistently(work)

    def fetch(self, file: RemoteFile, staging: Staging) -> bool:
        """Bring `file` whole and checked into `staging.checkpoint`. False if it was there, and nothing was fetched."""
        target, part = staging.checkpoint / file.name, staging.work / file.part_name
        if target.is_file():
            if self._is_whole(target, file):
                return False
            target.unlink()
        for _ in range(2):
            found = self._grow(part, file)
            if found == file.sum:
                staging.put(part, file.name)
                return True
            part.unlink()
            self.meter.add(-file.size)
        raise PullError(
            f"{file.name} from {self._hub.host} has the {file.sum_name} {found}, not {file.sum} as the hub lists it, "
            "twice in a row: a proxy between changes it, or the hub is being updated; "
            "pull again later or over another network"
        )

    def _is_whole(self, path: Path, file: RemoteFile) -> bool:
        if path.stat().st_size != file.size:
            return False
        with path.open("rb") as stored:
            part = _Part(stored, file, self.meter)
            part.read_back()
        if part.sum() != file.sum:
            self.meter.add(-file.size)
            return False
        return True

    def _grow(self, path: Path, file: RemoteFile) -> str:
        """Fetch what is missing of a partial file: its sum when it is complete."""
        path.touch()
        with path.open("r+b") as stored:
            part = _Part(stored, file, self.meter)
            part.read_back()
            stored.truncate(part.size)
            while part.size < file.size:
                self._persistently(lambda: self._go_on(part, file), lambda: part.size)
        return part.sum()

    def _go_on(self, part: _Part, file: RemoteFile) -> None:
        """One request for the rest of a file, or for all of it, once another range has come than was asked.

        Of all of it what is there already is passed over: nothing is thrown away before the sum has told that it is
        wrong.
        """
        self.meter.step(f"Downloading {file.name}")
        with self._get(file.url, file.name, start=part.size if part.in_ranges else 0) as (answer, pieces):
            start = _start(answer)
            if start not in (0, part.size):
                part.in_ranges = False
                raise Transient(f"{answer.host} sent another range of {file.name} than asked", "pull again")
            for piece in self._behind(pieces, part.size - start):
                if part.size + len(piece) > file.size:
                    raise self._hub.too_long(answer, file.name, file.size)
                part.append(piece)
        if part.size < file.size:
            raise self._hub.cut_short(answer, file.name, part.size, file.size)

    def _behind(self, pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
        """What follows the first `size` bytes."""
        for piece in pieces:
            if size:
                self.meter.tick()
            if len(piece) > size:
                yield piece[size:]
            size = max(0, size - len(piece))

    @contextmanager
    def _get(
        self, url: str, what: str, start: int = 0, size: int | None = None
    ) -> Iterator[tuple[Answer, Iterator[bytes]]]:
        """The answer with the file, or with `size` bytes from `start` if the hub heeds that.

        Every other answer is raised as what it is.
        """
        headers = {"Range": f"bytes={start}-{start + size - 1 if size else ''}"} if start or size else {}
        if self._hub.token:
            headers["Authorization"] = f"Bearer {self._hub.token.reveal()}"
        try:
            with self._web.get(url, headers) as (answer, pieces):
                self._answered = True
                good = (200, 206, 416) if start else (200, 206) if size else (200,)
                if answer.status not in good:
                    raise self._hub.refused(answer, what)
                if answer.status != 416 and answer.headers.get("content-type", "").startswith("text/html"):
                    raise self._hub.web_page(answer, what)
                yield answer, pieces
        except Broken as error:
            raise self._hub.broken(error, what, begun=self._answered) from error

    def _persistently(self, work: Callable[[], _T], have: Callable[[], int] = lambda: 0) -> _T:
        """What `work` returns, tried again after each `Transient` as long as it gets on: `have()` is in bytes."""
        tries, most = 0, have()
        while True:
            try:
                return work()
            except Transient as failure:
                if have() >= most + _PROGRESS:
                    tries, most = 0, have()
                tries += 1
                if tries == TRIES:
                    raise PullError(f"{failure.problem}, {tries} times in a row; {failure.advice}") from failure
                self._wait(failure, FIRST_WAIT_S * 2 ** (tries - 1))

    def _wait(self, failure: Transient, seconds: float) -> None:
        """Count down `seconds`, or those that the peer asks for where they are more."""
        end = time.monotonic() + max(seconds, failure.wait or 0.0)
        while (left := end - time.monotonic()) > 0:
            self.meter.step(f"Waiting {math.ceil(left)} s: {failure.problem}")
            time.sleep(min(TICK_S, left))


class _Part:
    """A file that grows, and the sum of what is in it; `in_ranges` until a host did not send the rest of it alone."""

    def __init__(self, stored: BinaryIO, file: RemoteFile, meter: Meter) -> None:
        self.size = 0
        self.in_ranges = True
        self._stored = stored
        self._file = file
        self._meter = meter
        self._hasher = file.hasher()

    def read_back(self) -> None:
        """Hash what an earlier pull left."""
        while piece := self._stored.read(min(PIECE, self._file.size - self.size)):
            self._meter.step(f"Checking {self._file.name}")
            self._count(piece)

    def append(self, piece: bytes) -> None:
        """Written at once: what was received survives the end of the process."""
        self._stored.write(piece)
        self._stored.flush()
        self._count(piece)

    def sum(self) -> str:
        return self._hasher.hexdigest()

    def _count(self, piece: bytes) -> None:
        self._hasher.update(piece)
        self.size += len(piece)
        self._meter.add(len(piece))


def _start(answer: Answer) -> int:
    """The offset at which an answer's bytes begin; -1 where it does not tell or has none."""
    if answer.status == 200:
        return 0
    found = re.match(r"bytes (\d+)-", answer.headers.get("content-range", ""))
    return int(found[1]) if found and answer.status == 206 else -1

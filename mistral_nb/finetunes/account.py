"""The adapters of one Cloudflare account over HTTP: list them, create one, upload a file of it, try it.

The token goes where `backends.workers_ai.cloudflare` lets it go, and no redirect is followed. What only reads is tried
again as answers are; what writes is not.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

from mistral_nb import __version__
from mistral_nb.backends import connection
from mistral_nb.backends.exchange import Exchange, broken, refusal, said_by
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.pump import HungUp, Line
from mistral_nb.backends.retry import patiently
from mistral_nb.backends.wire import PeerFailure, peer_failure
from mistral_nb.backends.workers_ai import cloudflare
from mistral_nb.checkpoints.untrusted import readable
from mistral_nb.config import Settings
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import AdapterError, BackendError, ConnectionFailed, MistralError, RequestTimeout
from mistral_nb.finetunes.adapter import DEFAULT_MODEL, Adapter, adapter_from_wire
from mistral_nb.progress import Report
from mistral_nb.types import Chunk, GenerationRequest

if TYPE_CHECKING:
    import httpx

__all__ = ["INCOMPLETE", "NOT_FOUND", "Account", "Refused"]

NOT_FOUND, INCOMPLETE = 3037, 3039
"""The wire's codes for an adapter that is not there, or not yet, and for one that lacks a file."""

_BODY_BYTES = 8 << 20
_ABOUT_ADAPTER = (NOT_FOUND, INCOMPLETE, 3006, 3042, 5005, 5006, 5007, 5021, 5028)
_ABOUT_SERVICE = (971, 3007, 3008, 3023, 3036, 3040, 3041, 3043, 3046, 4006, 5016, 5018, 5035, 6003, 7000, 7003, 10000)
_SERVICE_STATUS = (401, 403, 408, 429)
_NEVER_SENT = GenerationRequest(prompt="(an adapter)")


class Refused(AdapterError):
    """The service did not take what was sent: the name, the file, or one adapter more."""


class Account:
    """One account; `model` is the one that adapters are made for. `say` is called with a line while it waits.

    Raises `MistralError`, whose cause is not chained: the frames of an HTTP client hold the request.
    """

    def __init__(
        self, settings: Settings, model: str = DEFAULT_MODEL, say: Callable[[str], None] = lambda status: None
    ) -> None:
        self.left_out = ""
        """How much of the latest list could not be read, in words; empty where all of it could."""
        self._service = cloudflare(settings, model)
        self._retry_deadline = settings.retry_deadline
        self._say = say
        self._line = Line()

    def hang_up(self) -> None:
        """End what is under way, and all that comes after it: `HungUp` where it is waited for."""
        self._line.hang_up()

    def wait(self, seconds: float) -> None:
        """Sleep; `HungUp` as soon as somebody hangs up."""
        if self._line.wait(seconds):
            raise HungUp

    def adapters(self) -> list[Adapter]:
        """The account's own."""
        return self._listed("finetunes")

    def public(self) -> list[Adapter]:
        """Cloudflare's own, for every account."""
        return self._listed("finetunes/public")

    def create(self, name: str, description: str) -> Adapter:
        """A new adapter, without files yet. `Refused` where the service does not take it."""
        record = {"model": self._service.model, "name": name, "description": description}
        result = self._call(
            "POST", "finetunes", content=encode_json(record), headers={"Content-Type": "application/json"}
        )
        return next(iter(_adapters(result)), None) or _unreadable()

    def upload(self, adapter: Adapter, path: Path, sha256: str, report: Report) -> None:
        """One file of an adapter, which must have that SHA-256. What `report` raises ends it.

        `Refused` where the service does not take it, `ModelError` where it cannot be read or is another by now: the
        service has none of it then.
        """
        with _Upload(path, sha256, lambda done, size: self._moved(path.name, done, size, report)) as file:
            self._call(
                "POST",
                f"finetunes/{quote(adapter.id, safe='')}/finetune-assets",
                files={"file": (path.name, file, "application/octet-stream")},
                data={"file_name": path.name},
            )

    def trial(self, name: str) -> int | None:
        """Ask for one token with an adapter. `NOT_FOUND`, `INCOMPLETE`, or None when it was applied."""
        codes: list[int | None] = []

        def explain(failure: Failure) -> MistralError:
            codes.append(failure.code)
            return to_error(failure)

        service = self._service
        request = GenerationRequest(prompt="Hello", max_tokens=1, lora=name)
        exchange = Exchange(
            peer=service.peer,
            url=self._url(f"run/{quote(service.model, safe='/@')}"),
            token=service.token,
            body=encode_json(request.to_dict()),
            model=service.model,
            request=request,
            timeouts=service.timeouts,
            retry_deadline=self._retry_deadline,
            explain=explain,
        )
        try:
            exchange.run(self._line, self._tell)
        except MistralError:
            if self._line.hung_up:
                raise HungUp from None
            if codes and codes[-1] in (NOT_FOUND, INCOMPLETE):
                return codes[-1]
            raise
        finally:
            self._line.release()
        return None

    def _listed(self, path: str) -> list[Adapter]:
        """What can be read of a list; `left_out` tells of the rest."""
        found = patiently(lambda: _adapters(self._call("GET", path)), self._retry_deadline, self._line, self._tell)
        unread = found.count(None)
        told = f"{unread} of {len(found)} in Cloudflare's list cannot be read: left out"
        self.left_out = told if unread else ""
        return [adapter for adapter in found if adapter]

    def _tell(self, chunk: Chunk) -> None:
        if chunk.status:
            self._say(chunk.status)

    def _moved(self, name: str, done: int, size: int, report: Report) -> None:
        """Tell how far an upload is, and give the next piece of it its time."""
        report(f"Uploading {name}", done, size)
        if done == size:
            return self._wait_for_answer()
        limit = self._service.timeouts.stall
        told = f"Cloudflare took nothing of {name} for {limit:g} s. Try again, or raise stall_timeout"
        self._line.within(limit, told)

    def _wait_for_answer(self) -> None:
        limit = self._service.timeouts.first_token
        told = f"Cloudflare gave no answer within {limit:g} s. Try again, or raise first_token_timeout"
        self._line.within(limit, told)

    def _url(self, path: str) -> str:
        return f"{self._service.base_url}/accounts/{quote(self._service.account)}/ai/{path}"

    def _call(self, method: str, path: str, **options: Any) -> Any:
        """The `result` of one call."""
        import httpx

        self._wait_for_answer()
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": f"mistral-nb/{__version__}",
            **options.pop("headers", {}),
        }
        try:
            with connection.send(
                method,
                self._url(path),
                line=self._line,
                token=self._service.token,
                connect=self._service.timeouts.connect,
                headers=headers,
                fresh=method == "POST",
                **options,
            ) as response:
                answer = self._read(response)
        except (httpx.TransportError, httpx.DecodingError) as error:
            answer = self._broken(error)
        finally:
            self._line.release()
        if isinstance(answer, MistralError):
            raise answer
        return answer

    def _read(self, response: httpx.Response) -> Any:
        """The result in a response, or the error that it is."""
        try:
            if not response.is_success:
                raise refusal(response, self._line)
            content = json.loads(connection.read_limited(response, self._line, _BODY_BYTES))
            said = peer_failure(content)
        except PeerFailure as error:
            said = error
        except (ValueError, RecursionError):
            said = PeerFailure("an answer that is no JSON")
        if said is None:
            return content.get("result")
        return _error(
            Failure(
                self._service.peer,
                self._service.model,
                _NEVER_SENT,
                said_by(said.message, self._service.token, engine=False),
                said.code,
                response.status_code,
                response.headers.get("retry-after"),
                response.headers.get("cf-ai-req-id") or response.headers.get("cf-ray"),
            )
        )

    def _broken(self, error: Exception) -> MistralError:
        """The error for a connection that was not made or did not last."""
        if self._line.hung_up:
            raise HungUp from None
        if self._line.expired:
            return RequestTimeout(self._line.expired)
        who = f"{self._service.peer} at {urlsplit(self._service.base_url).netloc}"
        detail, not_made = broken(who, error, self._service.timeouts.connect, self._service.token)
        return not_made or ConnectionFailed(f"{self._service.peer} broke the connection ({detail}). Try again")


class _Upload(io.FileIO):
    """A file that tells after each read how many bytes have been read, and how many there are.

    `ModelError` where it cannot be read, and before its last bytes are given where it is not that of the SHA-256.
    """

    def __init__(self, path: Path, sha256: str, moved: Callable[[int, int], None]) -> None:
        with readable(path):
            super().__init__(path)
            self._size = path.stat().st_size
        self._path = path
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._moved = moved

    def read(self, size: int | None = -1, /) -> bytes | Any:
        with readable(self._path):
            piece = super().read(size)
        self._digest.update(piece)
        done = self.tell()
        if (done >= self._size or not piece) and self._digest.hexdigest() != self._sha256:
            raise AdapterError(f"{self._path} has changed since the push began; push it again when it is whole")
        self._moved(done, self._size)
        return piece


def _error(failure: Failure) -> MistralError:
    """What is about the account or the service is told as for answers; the rest is about the adapter.

    A known code decides. Any other is about what was sent, unless the status is of the account or the service.
    """
    status, code = failure.status or 0, failure.code
    declined = 400 <= status < 500 or (code is not None and status < 300)
    if code in _ABOUT_ADAPTER or (code not in _ABOUT_SERVICE and declined and status not in _SERVICE_STATUS):
        return Refused(failure.with_hint("Check the adapter's name, files and model"))
    return to_error(failure)


def _adapters(result: Any, lists: int = 2) -> list[Adapter | None]:
    """The adapters in a result: one, a list of them, or lists in a list; at most `lists` in each other.

    None stands for a record that cannot be read.
    """
    if result is None:
        return []
    if isinstance(result, list) and lists:
        return [adapter for item in result for adapter in _adapters(item, lists - 1)]
    if not isinstance(result, dict):
        _unreadable()
    try:
        return [adapter_from_wire(result)]
    except ValueError:
        return [None]


def _unreadable() -> NoReturn:
    raise BackendError("Cloudflare described an adapter in a form that cannot be read. Try again in a moment")

"""From what went wrong with the hub to the error that is raised: what may be tried again, and each one's next step.

The hub says why it refuses in the headers X-Error-Code and X-Error-Message, and how long to wait in Retry-After or
RateLimit. What others sent is shown cleaned: one line, without links and without the token.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from mistral_nb.errors import PullError
from mistral_nb.foreign import clean
from mistral_nb.models.known import find_known
from mistral_nb.models.web import Answer, Broken, host_of
from mistral_nb.secret import Secret

__all__ = ["Hub", "Transient"]

LONGEST_WAIT_S = 300.0
AGAIN = "pull again, which goes on from there"
LISTING = "the listing"
"""What the answer is called that every pull begins with."""

_TWICE = ("mistralai/Mistral-7B-Instruct-v0.3",)
"""Repositories that are known to hold their weights in both layouts."""


class Transient(Exception):
    """A failure that another try may get over; `wait` is how many seconds the peer asks for, None where it does not."""

    def __init__(self, problem: str, advice: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Hub:
    """What is pulled, under which name in the store, from which hub, with which token."""

    endpoint: str
    hub_id: str
    revision: str | None
    store_name: str
    token: Secret | None = None

    @property
    def host(self) -> str:
        """The hub's host as answers name it."""
        return host_of(self.endpoint)

    @property
    def site(self) -> str:
        """The endpoint without a user and a password."""
        return f"{urlsplit(self.endpoint).scheme}://{self.host}{urlsplit(self.endpoint).path}"

    @property
    def elsewhere(self) -> str:
        """How to get the model here over a machine that is connected.

        With one pattern: before its version 1.0 huggingface_hub took several after one option only, and since then
        each after an option of its own.
        """
        unneeded = "consolidated*" if self.hub_id in _TWICE else "*.bin"
        revision = f" --revision {shlex.quote(self.revision)}" if self.revision else ""
        name = f" --name {self.store_name}" if find_known(self.store_name) else ""
        return (
            f"on a machine with a connection run `hf download {self.hub_id}{revision} --local-dir {self.store_name} "
            f'--exclude "{unneeded}"`, copy that folder here and run: mistral-nb pull ./{self.store_name}{name}'
        )

    def offline(self, variable: str) -> PullError:
        """A variable forbids to ask the hub."""
        return PullError(f"{variable} is set, so {self.hub_id} is not asked for; unset it, or {self.elsewhere}")

    def no_client(self, error: Exception) -> PullError:
        """The environment's settings make no HTTP client. A proxy's address may have a password: it is not shown."""
        import httpx

        if isinstance(error, httpx.InvalidURL):
            return PullError(
                f"{_unusable_proxy()} cannot be read as an address; correct it (http://USER:PASSWORD@HOST:PORT), with "
                "the signs of the password that are neither letters nor digits percent-encoded"
            )
        return PullError(
            f"no HTTP client can be made with the settings of this environment ({self.clean(error)}); correct "
            "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
        )

    def clean(self, said: object) -> str:
        """What somebody said, fit to be shown."""
        return clean(said, self.token)

    def refused(self, answer: Answer, what: str) -> Exception:
        """The error for an answer that is not the file."""
        status = answer.status
        if status == 429:
            problem = f"{answer.host} limits how often it may be asked (HTTP 429 for {what})"
            login = "" if self.token else "; a token raises that limit: log in with `hf auth login` or set HF_TOKEN"
            return _to_wait(answer, problem, f"wait some minutes and {AGAIN}{login}")
        if status >= 500 or status in (408, 425):
            return _to_wait(answer, f"{answer.host} failed to send {what} (HTTP {status})", f"later {AGAIN}")
        if status == 407:
            return self._proxy_refuses(answer.host, "HTTP 407")
        coded = "x-error-code" in answer.headers
        if answer.host != self.host and what != LISTING and not coded:  # a fresh link may do: they expire
            return Transient(f"{answer.host}, where {self.host} keeps {what}, refused it (HTTP {status})", AGAIN)
        said = self.clean(answer.headers.get("x-error-message", ""))
        return PullError(self._refusal(answer, what, f"HTTP {status}: {said}" if said else f"HTTP {status}"))

    def web_page(self, answer: Answer, what: str) -> PullError:
        return PullError(
            f"{answer.host} sent a web page in place of {what}: a network that wants a login first does that, and a "
            f"wrong HF_ENDPOINT; open {self.site} in a browser, and {AGAIN}"
        )

    def too_long(self, answer: Answer, what: str, size: int) -> PullError:
        return PullError(
            f"{answer.host} sends more than {size} bytes for {what}, which is not the file that the hub lists; "
            "pull again later or over another network"
        )

    def cut_short(self, answer: Answer, what: str, size: int, wanted: int) -> Transient:
        return Transient(
            f"{answer.host}, or a proxy before it, ended {what} after {size} of {wanted} bytes",
            f"{AGAIN}, or over another network",
        )

    def broken(self, error: Broken, what: str, *, begun: bool) -> Exception:
        """The error for a connection that failed; `begun` once the hub has answered anything in this pull."""
        cause = error.__cause__ or error
        chain = list(_causes(cause))
        why = self.clean(_why(chain))
        kinds = {type(each).__name__ for each in chain}
        if any(isinstance(each, ssl.SSLCertVerificationError) for each in chain):
            return PullError(
                f"the certificate of {error.host} is not trusted here ({why}): a proxy that re-signs traffic does "
                "that, and a network that wants a login first; set SSL_CERT_FILE to your network's certificates (PEM), "
                f"or log in to the network, and {AGAIN}"
            )
        if "ProxyError" in kinds:
            return self._proxy_refuses(error.host, why)
        if kinds & {"UnsupportedProtocol", "InvalidURL", "TooManyRedirects", "LocalProtocolError"}:
            return PullError(f"{error.host} cannot be asked for {what} ({why}); correct HF_ENDPOINT or unset it")
        proxy = self._proxy(error.host)
        through = f" through the proxy {proxy}" if proxy else ""
        if not kinds & {"ConnectError", "ConnectTimeout"}:
            return Transient(f"{error.host} broke off while sending {what}{through} ({why})", f"later {AGAIN}")
        problem = f"{error.host} cannot be reached{through} ({why})"
        if begun:
            return Transient(problem, f"check the network and {AGAIN}")
        return PullError(f"{problem}; check the network and pull again, or {self.elsewhere}")

    def _proxy_refuses(self, host: str, why: str) -> PullError:
        scheme = urlsplit(self.endpoint).scheme.upper()
        return PullError(
            f"the proxy {self._proxy(host) or 'of this network'} does not let {host} through ({why}); correct "
            f"{scheme}_PROXY (http://USER:PASSWORD@HOST:PORT) or name {host} in NO_PROXY, and {AGAIN}"
        )

    def _proxy(self, host: str) -> str:
        """Host and port of the proxy that the environment names for `host`; empty for none."""
        proxies = urllib.request.getproxies()
        named = proxies.get(urlsplit(self.endpoint).scheme) or proxies.get("all") or ""
        if not named or urllib.request.proxy_bypass(urlsplit(f"//{host}").hostname or ""):
            return ""
        return re.split(r"@|://", named)[-1].partition("/")[0]

    def _refusal(self, answer: Answer, what: str, said: str) -> str:
        code, status = answer.headers.get("x-error-code", ""), answer.status
        login = f"log in with `hf auth login`, or set HF_TOKEN, with a token from {self.site}/settings/tokens"
        if code == "GatedRepo":
            terms = f"{self.hub_id} is gated: accept its terms at {self.site}/{self.hub_id}"
            return f"{terms} with the account of your token, and pull again" if self.token else f"{terms}, then {login}"
        if code == "RevisionNotFound":
            return (
                f"{self.hub_id} has no revision {self.revision!r}; its branches, tags and commits are at "
                f"{self.site}/{self.hub_id}/commits/main; leave the revision out for main"
            )
        if status == 401 and self.token:
            return f"{self.host} does not take the token {_whence()} ({said}); {login}; a public model needs none"
        if status == 401 or (status == 404 and what == LISTING and not self.token):
            return f"{self.host} shows no {self.hub_id} ({said}); check its name, and if it is private, {login}"
        if status == 404 and what == LISTING:
            return f"{self.host} shows no {self.hub_id} to the account of your token ({said}); check its name"
        if status == 404:
            return f"{self.hub_id} lists {what} and does not have it ({said}); pull again"
        if status == 403:
            return (
                f"{self.host} forbids {what} of {self.hub_id} ({said}); a token needs the permission to read it "
                f"({self.site}/settings/tokens), and a proxy may forbid it too"
            )
        return f"{self.host} answers for {what} of {self.hub_id} with {said}; check HF_ENDPOINT and the proxy settings"


def _unusable_proxy() -> str:
    """The variable that names a proxy by what is no address."""
    import httpx

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for spelling in (name, name.lower()):
            address = os.environ.get(spelling, "")
            try:
                httpx.URL(address if "://" in address else f"http://{address}")
            except httpx.InvalidURL:
                return spelling
    return "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY"


def _to_wait(answer: Answer, problem: str, advice: str) -> Exception:
    """`Transient`, or `PullError` with the time of day where the answer asks for more patience than anybody has."""
    wait = _asked(answer)
    if wait is None or wait <= LONGEST_WAIT_S:
        return Transient(problem, advice, wait)
    until = time.strftime("%H:%M", time.localtime(time.time() + wait))
    return PullError(f"{problem} and asks to wait {wait / 60:.0f} minutes, until {until}; {advice}")


def _asked(answer: Answer) -> float | None:
    """How many seconds to wait an answer asks for: Retry-After (seconds or a date), else an exhausted RateLimit."""
    header = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", header):
        return float(header)
    if header:
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    limit = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", answer.headers.get("ratelimit", ""))
    return float(limit[1]) if limit else None


def _whence() -> str:
    named = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    return f"in {named}" if named else "that `hf auth login` saved"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _why(chain: list[BaseException]) -> str:
    """The reason in words: the system's own where there is one."""
    for each in chain:
        match each:
            case socket.gaierror():
                return "its name is not found"
            case ConnectionRefusedError():
                return "connection refused"
            case ssl.SSLCertVerificationError():
                return each.verify_message
            case _ if type(each).__name__ == "ConnectTimeout":
                return "no connection in time"
            case TimeoutError():
                return "nothing came in time"
    told = next((str(each) for each in chain if str(each)), "")
    return told or type(chain[0]).__name__

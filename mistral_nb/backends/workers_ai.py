"""The client of the Workers AI wire: Cloudflare's own service, and on loopback the local engine, which speaks the same.

Who may get the token, and what may be asked of whom, is decided here; `Exchange` does the asking.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field, replace
from urllib.parse import quote, urlsplit

from mistral_nb.backends.adapter_paths import refuse_path
from mistral_nb.backends.exchange import Exchange, NotListening, Timeouts
from mistral_nb.backends.failures import Withdrawn
from mistral_nb.backends.lookup import check_address
from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.config import CLOUDFLARE_URL, USE_LOCAL, Settings
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import ConfigurationError, InvalidRequest
from mistral_nb.runtime import is_loopback
from mistral_nb.secret import Secret
from mistral_nb.types import FIELDS, Chunk, Description, GenerationRequest

__all__ = ["DEFAULT_MODEL", "NotListening", "Timeouts", "WorkersAI", "cloudflare"]

DEFAULT_MODEL = "@hf/mistral/mistral-7b-instruct-v0.2"
_ACCOUNT = re.compile(r"[0-9a-f]{32}")
_MODEL = re.compile(r"@(cf|hf)(/(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*){2}")
# Models that are not asked again in this process, by base URL and name.
_WITHDRAWN: set[tuple[str, str]] = set()
_STEERING = re.compile(r"[?#%\\\x00-\x20\x7f]|(^|/)\.{1,2}(/|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersAI:
    """A `Backend` that speaks to `base_url`. `engine` marks the local engine: it takes every field and no proxy, and
    from one who sends the `proof` of its record an adapter's folder too.

    The token goes to `base_url` alone, which must be https or on this machine, else `ConfigurationError`. Where the
    peer has withdrawn `model`, `fallback_model` answers, if there is one. `retry_deadline` is in seconds.
    """

    base_url: str
    account: str
    token: Secret = field(repr=False)
    model: str
    name: str = "cloudflare"
    peer: str = "Cloudflare"
    engine: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    retry_deadline: float = 0
    fallback_model: str = ""
    proof: Secret | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_address(self.base_url, "base URL")
        assert is_loopback(urlsplit(self.base_url).hostname or "") or not self.engine
        assert self.engine or self.proof is None
        for what, part in (("account", self.account), ("model", self.model), ("model", self.fallback_model)):
            if not self.engine and _STEERING.search(part):
                raise ConfigurationError(f"{what} = {part!r}: holds what would change the address; correct it")

    def stream(self, request: GenerationRequest) -> Pump:
        if not self.engine:
            _refuse_local_only(request)
        return Pump(lambda line, emit: self.answer(request, line, emit))

    def describe(self) -> Description:
        here = self.base_url == CLOUDFLARE_URL
        return Description(self.name, self.model, "Workers AI" if here else urlsplit(self.base_url).netloc)

    def answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        """Read one answer to its end in this thread: what `stream` pumps, for a backend with something to do first.

        Where the peer has withdrawn the model, `fallback_model` is asked once in its place, but not after text. The
        model is then not asked again in this process.
        """
        started = time.monotonic()
        other = self.fallback_model
        if other in ("", self.model):
            return self._exchange(self.model, request, self.retry_deadline).run(line, emit)
        if (self.base_url, self.model) not in _WITHDRAWN and not self._is_withdrawn(request, line, emit):
            return None
        emit(Chunk(status=f"{self.peer} has withdrawn {self.model}; asking {other}"))

        def in_its_place(chunk: Chunk) -> None:
            emit(chunk if chunk.status else replace(chunk, model=chunk.model or other, instead_of=self.model))

        left = max(0.0, self.retry_deadline - (time.monotonic() - started))
        try:
            return self._exchange(other, request, left).run(line, in_its_place)
        except Withdrawn:
            both = f"{self.peer} has withdrawn {self.model}, and {other} too: name another model, or {USE_LOCAL}"
        raise Withdrawn(both)

    def _is_withdrawn(self, request: GenerationRequest, line: Line, emit: Emit) -> bool:
        """Ask `model` itself. True where its peer has withdrawn it, rather than answered for it."""
        begun = False

        def note(chunk: Chunk) -> None:
            nonlocal begun
            begun = begun or bool(chunk.text)
            emit(chunk)

        try:
            self._exchange(self.model, request, self.retry_deadline).run(line, note)
        except Withdrawn:
            if begun or line.hung_up:
                raise
            _WITHDRAWN.add((self.base_url, self.model))
            return True
        return False

    def _exchange(self, model: str, request: GenerationRequest, retry_deadline: float) -> Exchange:
        return Exchange(
            peer=self.peer,
            url=f"{self.base_url}/accounts/{quote(self.account)}/ai/run/{quote(model, safe='/@')}",
            token=self.token,
            body=encode_json(request.to_dict()),
            model=model,
            request=request,
            timeouts=self.timeouts,
            retry_deadline=retry_deadline,
            engine=self.engine,
            header_tells_model=self.base_url != CLOUDFLARE_URL,
            proof=self.proof,
        )


def cloudflare(settings: Settings, model: str | None = None) -> WorkersAI:
    """Cloudflare's service as the settings say. `ConfigurationError` names what is missing or wrong."""
    account, token = settings.cloudflare_account_id, settings.cloudflare_api_token
    missing = [
        variable
        for variable, value in (("CLOUDFLARE_ACCOUNT_ID", account), ("CLOUDFLARE_API_TOKEN", token))
        if not value
    ]
    if account is None or token is None:
        raise ConfigurationError(
            f"Cloudflare needs {' and '.join(missing)} in the environment "
            f"(https://dash.cloudflare.com, Workers AI, Use REST API), or {USE_LOCAL}"
        )
    if not _ACCOUNT.fullmatch(account):
        raise ConfigurationError(
            f"{settings.source('cloudflare_account_id')} = {account!r}: an account id is 32 hexadecimal digits; "
            "copy it from https://dash.cloudflare.com"
        )
    name, fallback = model or DEFAULT_MODEL, settings.cloudflare_fallback_model
    _check_model(name, "model")
    if fallback:
        _check_model(fallback, settings.source("cloudflare_fallback_model"))
    if settings.cloudflare_base_url != CLOUDFLARE_URL and not settings.cloudflare_trust_base_url:
        raise ConfigurationError(
            f"{settings.source('cloudflare_base_url')} = {settings.cloudflare_base_url!r} is not Cloudflare's address, "
            "and the token is sent there only if cloudflare_trust_base_url is true"
        )
    return WorkersAI(
        base_url=settings.cloudflare_base_url,
        account=account,
        token=token,
        model=name,
        timeouts=Timeouts.from_settings(settings),
        retry_deadline=settings.retry_deadline,
        fallback_model=fallback,
    )


def _check_model(name: str, origin: str) -> None:
    if not _MODEL.fullmatch(name):
        raise ConfigurationError(
            f"{origin} = {name!r}: Cloudflare's models are called like {DEFAULT_MODEL}; give such an id"
        )


def _refuse_local_only(request: GenerationRequest) -> None:
    for known in FIELDS:
        value = getattr(request, known.name)
        if known.local_only and value is not None:
            raise InvalidRequest(known.name, value, f"only the local engine knows it; leave it out, or {USE_LOCAL}")
    refuse_path(request, f"`mistral-nb lora push` gives it a name on Cloudflare; or {USE_LOCAL}")

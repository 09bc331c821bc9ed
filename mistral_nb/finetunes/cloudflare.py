"""Adapters on Cloudflare: which there are, and putting one there, going on where an earlier push was cut short."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, MistralError, RateLimited
from mistral_nb.finetunes.account import INCOMPLETE, NOT_FOUND, Account, Refused
from mistral_nb.finetunes.adapter import ASSETS, DEFAULT_MODEL, Adapter, check_name
from mistral_nb.finetunes.check import check
from mistral_nb.progress import Progress

__all__ = ["Push", "list_adapters", "public_adapters", "push"]

PATIENCE = 60.0
"""Seconds within which an adapter that was uploaded must be found."""

MOST = 30
"""Adapters that one account may have by Cloudflare's older documents; the newer ones say 100."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 5.0
_RANDOM = random.SystemRandom()


def list_adapters(settings: Settings) -> list[Adapter]:
    """The adapters of the account in the settings. Raises `MistralError`."""
    return Account(settings).adapters()


def public_adapters(settings: Settings) -> list[Adapter]:
    """The adapters that Cloudflare has for every account. Raises `MistralError`."""
    return Account(settings).public()


def push(
    folder: Path,
    name: str,
    *,
    settings: Settings,
    model: str = DEFAULT_MODEL,
    description: str = "",
    progress: Callable[[Progress], None] = lambda now: None,
    patience: float = PATIENCE,
) -> Adapter:
    """Put the adapter in `folder` on the account, and return when `lora=name` finds it. See `Push`."""
    task = Push(folder, name, settings=settings, model=model, description=description, progress=progress)
    return task.run(patience)


class Push:
    """One adapter on its way to the account.

    An exception out of `progress` ends it. Nothing can be taken back, since the service removes no adapters: `told`
    says what is there when it was cut short, and another push with the same name goes on from there.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        settings: Settings,
        model: str = DEFAULT_MODEL,
        description: str = "",
        progress: Callable[[Progress], None] = lambda now: None,
    ) -> None:
        self.untried = ""
        """Why the adapter could not be tried although it is there; empty when it was."""
        self._folder = folder
        self._name = name
        self._model = model
        self._description = description
        self._progress = progress
        self._account = Account(settings, model, self._say)
        self._creating = False
        self._adapter: Adapter | None = None
        self._there: list[str] = []

    @property
    def told(self) -> str:
        """What the account has of the adapter, and how to go on, in a sentence."""
        if self._adapter is None:
            if self._creating:
                return f"Whether {self._name} was created on the account is not known: push it again under that name"
            return "This push has put nothing on the account"
        on = f"On the account now: {self._name} ({self._adapter.id}) with"
        if len(self._there) == len(ASSETS):
            return f"{on} both files; try it in a moment with --lora {self._name}"
        return f"{on} {''.join(self._there) or 'no file'} from this push; to go on, push it again under that name"

    def run(self, patience: float = PATIENCE) -> Adapter:
        """Check, create, upload, and wait until it is found, at most `patience` seconds.

        `AdapterError` where the adapter is unfit, or the name is taken by a whole one; its message and that of any
        other `MistralError` or `KeyboardInterrupt` ends with `told` once the account was asked for anything.
        """
        check_name(self._name)
        check(self._folder, for_cloudflare=True)
        try:
            self._adapter, resumed = self._begin()
            self._upload(self._adapter, resumed)
            self._wait_until_found(self._adapter, patience)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.told) from None
        except MistralError as error:
            error.args = (f"{str(error).rstrip('.')}. {self.told}",)
            raise
        return self._adapter

    def _begin(self) -> tuple[Adapter, bool]:
        """The adapter on the account, and whether it was there before."""
        self._say("Looking at the account")
        adapters = self._account.adapters()
        same = [adapter for adapter in adapters if adapter.name == self._name]
        if same:
            return self._resumable(same), True
        self._say(f"Creating {self._name}")
        self._creating = True
        try:
            return self._account.create(self._name, self._description), False
        except Refused as error:
            self._creating = False
            if len(adapters) >= MOST:
                full = f"The account has {len(adapters)} adapters, and an account may have {MOST} or 100"
                error.args = (f"{str(error).rstrip('.')}. {full}",)
            raise

    def _resumable(self, same: list[Adapter]) -> Adapter:
        """The one adapter of the name that lacks files; `AdapterError` where there is none."""
        (adapter, *others) = same
        if others:
            raise AdapterError(f"{len(same)} adapters on the account are called {self._name}; choose another name")
        if adapter.model != self._model:
            raise AdapterError(
                f"{self._name} is on the account for {adapter.model or 'another model'}; choose another name"
            )
        if self._account.trial(self._name) is None:
            raise AdapterError(
                f"{self._name} is on the account already, with files that cannot be replaced; choose another name"
            )
        return adapter

    def _upload(self, adapter: Adapter, resumed: bool) -> None:
        """Both files. Of an adapter that was there before, the one that is there already may be refused."""
        refused: Refused | None = None
        for name in ASSETS:
            try:
                self._account.upload(adapter, self._folder / name, self._report)
            except Refused as error:
                if not resumed or refused:
                    raise
                refused = error
            else:
                self._there.append(name)

    def _wait_until_found(self, adapter: Adapter, patience: float) -> None:
        """Until the adapter is in the list, and a request with it is answered."""
        ends, longest, listed = time.monotonic() + patience, _FIRST_WAIT, False
        while True:
            self._say(f"Waiting until {self._name} is found")
            listed = listed or any(each.id == adapter.id for each in self._account.adapters())
            code: int | None = NOT_FOUND
            if listed:
                try:
                    code = self._account.trial(self._name)
                except RateLimited as error:
                    self.untried = str(error)
                    return
            if code is None:
                return
            wait = _RANDOM.uniform(0, longest)
            if time.monotonic() + wait > ends:
                raise AdapterError(self._not_found(listed, code, patience))
            time.sleep(wait)
            longest = min(_LONGEST_WAIT, 2 * longest)

    def _not_found(self, listed: bool, code: int, patience: float) -> str:
        if not listed:
            return f"{self._name} was uploaded, and is not in the account's list after {patience:g} s"
        if code == INCOMPLETE:
            return f"{self._name} was uploaded, and Cloudflare says after {patience:g} s that it lacks files"
        return f"{self._name} was uploaded and is listed, and is not found by requests after {patience:g} s"

    def _say(self, step: str) -> None:
        self._progress(Progress(step, 0, None))

    def _report(self, step: str, done: int, total: int | None) -> None:
        self._progress(Progress(step, done, total))

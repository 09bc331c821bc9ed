"""Adapters on Cloudflare: which there are, and putting one there, going on where an earlier push was cut short."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, MistralError, RateLimited
from mistral_nb.finetunes.account import INCOMPLETE, NOT_FOUND, Account, Refused
from mistral_nb.finetunes.adapter import ASSETS, DEFAULT_MODEL, Adapter, check_name
from mistral_nb.finetunes.check import check
from mistral_nb.finetunes.pushes import Sums, noting, recall, sums_of
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
    """Put the adapter in `folder` on the account, and return when `lora=name` finds it. See `Push`.

    What `Push.doubt` tells is a `UserWarning`.
    """
    task = Push(folder, name, settings=settings, model=model, description=description, progress=progress)
    adapter = task.run(patience)
    if task.doubt:
        warnings.warn(task.doubt, stacklevel=2)
    return adapter


class Push:
    """One adapter on its way to the account.

    An exception out of `progress` ends it. Nothing can be taken back, since the service removes no adapters: `told`
    says what is there when it was cut short, and another push with the same name goes on from there. It goes on with
    the same files only, as far as `pushes` tells, which knows the adapters that were created from this machine.
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
        self._refused: dict[str, Refused] = {}
        self._known = True

    @property
    def told(self) -> str:
        """What the account has of the adapter, and how to go on, in a few sentences."""
        if self._adapter is None:
            if self._creating:
                return f"Whether {self._name} was created on the account is not known: push it again under that name"
            return "This push has put nothing on the account"
        on = f"On the account now: {self._name} ({self._adapter.id}) with"
        if len(self._there) == len(ASSETS):
            return f"{on} both files; try it in a moment with --lora {self._name}"
        told = f"{on} {''.join(self._there) or 'no file'} from this push; to go on, push it again under that name"
        return f"{told}. {self.doubt}" if self.doubt else told

    @property
    def doubt(self) -> str:
        """Which files the service has not taken since it has others, where nothing tells which; else empty."""
        if self._known or not self._refused:
            return ""
        names = " and ".join(self._refused)
        were = "were" if len(self._refused) > 1 else "was"
        return (
            f"{names} of {self._name} {were} on the account before this push and not replaced, and nothing tells what "
            f"is there: compare the answers, or push {quoted(self._folder)} under another name"
        )

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
        sums = sums_of(self._folder)
        try:
            with noting(sums) as keep:
                self._creating = True
                self._adapter = self._account.create(self._name, self._description)
                keep(self._adapter.id)
            return self._adapter, False
        except Refused as error:
            self._creating = False
            if len(adapters) >= MOST:
                full = f"The account has {len(adapters)} adapters, and an account may have {MOST} or 100"
                error.args = (f"{str(error).rstrip('.')}. {full}",)
            raise

    def _resumable(self, same: list[Adapter]) -> Adapter:
        """The one adapter of the name that may lack files, and was not created for others; else `AdapterError`."""
        (adapter, *others) = same
        if others:
            raise AdapterError(f"{len(same)} adapters on the account are called {self._name}; choose another name")
        if adapter.model != self._model:
            raise AdapterError(
                f"{self._name} is on the account for {quoted(adapter.model or 'another model')}; choose another name"
            )
        if self._account.trial(self._name) is None:
            raise AdapterError(
                f"{self._name} is on the account already, with files that cannot be replaced; if that is this adapter, "
                f"use it with --lora {self._name}, else choose another name"
            )
        created_for = recall(adapter.id)
        self._known = created_for is not None
        if created_for is not None:
            self._check_same(created_for)
        return adapter

    def _check_same(self, created_for: Sums) -> None:
        sums = sums_of(self._folder)
        other = [name for name in ASSETS if sums[name] != created_for[name]]
        if other:
            raise AdapterError(
                f"{self._name} on the account was created for another {' and '.join(other)} than that in "
                f"{quoted(self._folder)}, and an adapter of both would be neither; push the folder that it was created "
                "for, or choose another name"
            )

    def _upload(self, adapter: Adapter, resumed: bool) -> None:
        """Both files. Of an adapter that was there before, those that are there already may be refused."""
        for name in ASSETS:
            try:
                self._account.upload(adapter, self._folder / name, self._report)
            except Refused as error:
                if not resumed:
                    raise
                self._refused[name] = error
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
        """What is wrong still, after what was said about the files that were refused."""
        if not listed:
            told = f"{self._name} is not in the account's list after {patience:g} s"
        elif code == INCOMPLETE:
            told = f"Cloudflare says after {patience:g} s that {self._name} lacks files"
        else:
            told = f"{self._name} is listed, and is not found by requests after {patience:g} s"
        refused = (f"{name}: {str(error).rstrip('.')}. " for name, error in self._refused.items())
        return f"{''.join(refused)}{told}"

    def _say(self, step: str) -> None:
        self._progress(Progress(step, 0, None))

    def _report(self, step: str, done: int, total: int | None) -> None:
        self._progress(Progress(step, done, total))

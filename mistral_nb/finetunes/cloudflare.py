"""Adapters on Cloudflare: which there are, and putting one there, going on where an earlier push was cut short."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mistral_nb.backends.pump import HungUp
from mistral_nb.backends.retry import NotListening
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, AuthenticationError, MistralError, RateLimited
from mistral_nb.finetunes.account import INCOMPLETE, NOT_FOUND, Account, Refused
from mistral_nb.finetunes.adapter import ASSETS, DEFAULT_MODEL, Adapter, check_name
from mistral_nb.finetunes.check import check
from mistral_nb.finetunes.known import remember
from mistral_nb.finetunes.pushes import Sums, note, pushing, recall, sums_of
from mistral_nb.progress import Progress

__all__ = ["Push", "list_adapters", "listed", "public_adapters", "push"]

PATIENCE = 60.0
"""Seconds within which an adapter that was uploaded must be found."""

MOST = 30
"""Adapters that one account may have by Cloudflare's older documents; the newer ones say 100."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 5.0
_RANDOM = random.SystemRandom()
_DECLINED = (AuthenticationError, NotListening, RateLimited, Refused)
"""After these the service has nothing of what was sent."""


def list_adapters(settings: Settings) -> list[Adapter]:
    """The adapters of the account in the settings. Raises `MistralError`; a `UserWarning` tells what is left out."""
    return _with_warning(*listed(settings))


def public_adapters(settings: Settings) -> list[Adapter]:
    """The adapters that Cloudflare has for every account. Errors and warnings as of `list_adapters`."""
    return _with_warning(*listed(settings, public=True))


def listed(settings: Settings, *, public: bool = False) -> tuple[list[Adapter], str]:
    """The adapters of the account or of every account, and what of the list cannot be read, in words."""
    account = Account(settings)
    return remember(account.public() if public else account.adapters()), account.left_out


def _with_warning(adapters: list[Adapter], left_out: str) -> list[Adapter]:
    if left_out:
        warnings.warn(left_out, stacklevel=3)
    return adapters


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

    An exception out of `progress` ends it, and `stop` from another thread. Nothing can be taken back, since the service
    removes no adapters: `told` says what is there when it was cut short, and another push with the same name goes on
    from there. It goes on with the same files only, as far as `pushes` tells, which knows those pushed from here.
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
        self._sent = ""
        self._refused: dict[str, Refused] = {}
        self._sums: Sums = {}
        self._noted: Sums = {}
        self._namesake = ""

    @property
    def told(self) -> str:
        """What the account has of the adapter, and how to go on, in a few sentences."""
        if self._adapter is None:
            if self._creating:
                return f"Whether {self._name} was created on the account is not known: push it again under that name"
            return "This push has put nothing on the account"
        told = f"On the account now: {self._name} ({self._adapter.id})"
        if len(self._there) == len(ASSETS):
            told += f" with both files; try it in a moment with --lora {self._name}"
        else:
            if self._there or not self._sent:
                told += f" with {''.join(self._there) or 'no file'} from this push"
            told += f"; whether {self._sent} arrived is not known" if self._sent else ""
            told += "; to go on, push it again under that name"
        return f"{told}. {self.doubt}" if self.doubt else told

    @property
    def doubt(self) -> str:
        """What may be other than it should: files of which nothing tells what they are, another adapter of the name."""
        doubts = []
        names = [name for name in self._refused if name not in self._noted]
        if names:
            were = "were" if len(names) > 1 else "was"
            doubts.append(
                f"{' and '.join(names)} of {self._name} {were} on the account before this push and not replaced, and "
                f"nothing tells what is there: compare the answers, or push {quoted(self._folder)} under another name"
            )
        if self._namesake and self._adapter:
            doubts.append(
                f"another adapter was made on the account meanwhile that is called {self._name} ({self._namesake}): "
                f"ask for this one with --lora {self._adapter.id}"
            )
        return ". ".join(doubts)

    def run(self, patience: float = PATIENCE) -> Adapter:
        """Check, create, upload, and wait until it is found, at most `patience` seconds.

        What is there already, whole and with these files, is found at once. `AdapterError` where the adapter is unfit,
        or the name is taken by another; its message and that of any other `MistralError` or `KeyboardInterrupt` ends
        with `told` once the account was asked for anything.
        """
        check_name(self._name)
        check(self._folder, for_cloudflare=True)
        try:
            with pushing(self._name):
                self._sums = sums_of(self._folder, self._report)
                # These very files: they may be others by now than those that were checked before.
                check(self._folder, for_cloudflare=True)
                return self._run(patience)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.told) from None
        except HungUp:
            raise AdapterError(f"the push of {self._name} was stopped. {self.told}") from None
        except MistralError as error:
            error.args = (f"{str(error).rstrip('.')}. {self.told}",)
            raise

    def stop(self) -> None:
        """End it at once, whatever it waits for: `run`, in another thread, raises `AdapterError`."""
        self._account.hang_up()

    def _run(self, patience: float) -> Adapter:
        self._say("Looking at the account")
        adapters = self._account.adapters()
        same = [adapter for adapter in adapters if adapter.name == self._name]
        if same:
            adapter = self._begun(same)
            if self._is_whole():
                return adapter
            self._adapter = adapter
        else:
            self._adapter = adapter = self._create(len(adapters))
        self._upload(adapter, resumed=bool(same))
        self._wait_until_found(adapter, patience)
        return adapter

    def _create(self, others: int) -> Adapter:
        """The adapter without files, on an account that has `others`."""
        self._say(f"Creating {self._name}")
        self._creating = True
        try:
            self._adapter = self._account.create(self._name, self._description)
        except _DECLINED as error:
            self._creating = False
            if isinstance(error, Refused) and others >= MOST:
                full = f"The account has {others} adapters, and an account may have {MOST} or 100"
                error.args = (f"{str(error).rstrip('.')}. {full}",)
            raise
        self._noted = self._sums
        note(self._adapter, self._noted)
        return self._adapter

    def _begun(self, same: list[Adapter]) -> Adapter:
        """The one adapter of the name, if it was not made for another model or other files; else `AdapterError`."""
        (adapter, *others) = same
        if others:
            raise AdapterError(f"{len(same)} adapters on the account are called {self._name}; choose another name")
        if adapter.model != self._model:
            raise AdapterError(
                f"{self._name} is on the account for {quoted(adapter.model or 'another model')}; choose another name"
            )
        self._noted = recall(adapter.id)
        other = [name for name, noted in self._noted.items() if self._sums[name] != noted]
        if other:
            raise AdapterError(
                f"{self._name} on the account was created for another {' and '.join(other)} than that in "
                f"{quoted(self._folder)}, and files cannot be replaced; push the folder that it was created for, or "
                "choose another name"
            )
        return adapter

    def _is_whole(self) -> bool:
        """Whether the adapter of the name is applied as it is; `AdapterError` where it may be another one."""
        try:
            code = self._account.trial(self._name)
        except RateLimited:
            if self._noted != self._sums:
                raise
            return False
        if code is None and self._noted != self._sums:
            raise AdapterError(
                f"{self._name} is on the account already, with files that cannot be replaced; if that is this adapter, "
                f"use it with --lora {self._name}, else choose another name"
            )
        return code is None

    def _upload(self, adapter: Adapter, resumed: bool) -> None:
        """Both files. Of an adapter that was there before, those that are there already may be refused.

        In place of what a new one is refused, another file may come: it is noted no more.
        """
        for name in ASSETS:
            try:
                self._account.upload(adapter, self._folder / name, self._sums[name], partial(self._sending, name))
            except _DECLINED as error:
                self._sent = ""
                if not isinstance(error, Refused):
                    raise
                if not resumed:
                    self._noted = {each: self._sums[each] for each in self._there}
                    note(adapter, self._noted)
                    raise
                self._refused[name] = error
                continue
            self._there.append(name)
            self._sent = ""
            if name not in self._noted:
                self._noted[name] = self._sums[name]
                note(adapter, self._noted)

    def _wait_until_found(self, adapter: Adapter, patience: float) -> None:
        """Until the adapter is in the list, and a request with it is answered."""
        ends, longest, listed = time.monotonic() + patience, _FIRST_WAIT, False
        while True:
            self._say(f"Waiting until {self._name} is found")
            listed = listed or self._is_listed(adapter)
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
            self._account.wait(wait)
            longest = min(_LONGEST_WAIT, 2 * longest)

    def _is_listed(self, adapter: Adapter) -> bool:
        adapters = self._account.adapters()
        others = (each.id for each in adapters if each.name == self._name and each.id != adapter.id)
        self._namesake = next(others, "")
        return any(each.id == adapter.id for each in adapters)

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

    def _sending(self, name: str, step: str, done: int, total: int | None) -> None:
        """With the last piece that is given out, the service may have the file, whatever comes of its answer."""
        self._report(step, done, total)
        if done == total:
            self._sent = name

    def _report(self, step: str, done: int, total: int | None) -> None:
        self._progress(Progress(step, done, total))

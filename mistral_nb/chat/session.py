"""A chat at work: questions go out, answers come in by threads of their own, and listeners hear of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mistral_nb.answer import Result
from mistral_nb.backends.pump import POLL
from mistral_nb.chat.conversation import Conversation
from mistral_nb.chat.events import Event, Events, Rearranged, TurnEnded, TurnStarted
from mistral_nb.chat.run import Run
from mistral_nb.chat.turns import Attachment, ChatBusy, ChatError, Choice, Turn, compose, new_id, now
from mistral_nb.config import Settings, load_settings
from mistral_nb.errors import InvalidRequest, MistralError
from mistral_nb.types import Message

__all__ = ["ChatSession"]


class ChatSession:
    """Asks the questions of one conversation. Every method may be called from any thread, and by a listener.

    `choice` says who answers next and how, and `compare` whom to ask the same besides; both are recorded with each
    turn, and may be changed at any time. `settings` is called for each question.
    """

    def __init__(
        self,
        conversation: Conversation | None = None,
        choice: Choice | None = None,
        compare: Choice | None = None,
        settings: Callable[[], Settings] = load_settings,
    ) -> None:
        self.conversation = Conversation() if conversation is None else conversation
        self.choice = Choice() if choice is None else choice
        self.compare = compare
        self._settings = settings
        self._lock = threading.RLock()
        self._quiet = threading.Condition(self._lock)
        self._running: dict[str, Run] = {}
        self._asked: set[str] = set()  # since the turns were last rearranged
        self._events = Events()
        self.conversation.watch(self._rearranged)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written."""
        return bool(self._running)

    def listen(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with each event, in order and one at a time, from a thread of its own. Returns how to end it.

        The next event waits for it, and nothing else does. What it raises is logged.
        """
        return self._events.listen(callback)

    def send(
        self,
        prompt: str,
        *,
        sent: str | None = None,
        attachments: Sequence[Attachment] = (),
        compare: bool | None = None,
    ) -> tuple[Turn, ...]:
        """Ask below the head, and return at once: one turn, or two where two are to be compared.

        `sent` is what goes to the model where that is not `prompt`; attachments are put under it. `compare` is
        whether to compare: None does where `self.compare` is set. Raises `ChatBusy` while an answer is being written,
        and `InvalidRequest` for a question that nobody could be asked; all later errors are in the turn's `error`.
        """
        choices = self._choices(bool(self.compare) if compare is None else compare)
        return self._ask(self._question(prompt, sent, attachments), choices, lambda: self.conversation.head)

    def regenerate(self, turn_id: str) -> tuple[Turn, ...]:
        """Ask the question of a turn again, as a new branch and with the choice of now; a comparison is asked whole."""
        turn = self.conversation.turn(turn_id)
        return self._ask(turn, self._choices_for(turn), lambda: turn.parent)

    def edit(
        self, turn_id: str, prompt: str, *, sent: str | None = None, attachments: Sequence[Attachment] | None = None
    ) -> tuple[Turn, ...]:
        """Ask another question in a turn's place, as a new branch. Its attachments stay unless others are given."""
        turn = self.conversation.turn(turn_id)
        kept = turn.attachments if attachments is None else attachments
        return self._ask(self._question(prompt, sent, kept), self._choices_for(turn), lambda: turn.parent)

    def retry(self, turn_id: str) -> tuple[Turn, ...]:
        """Ask again what failed, with the choice of now: without an answer in its place, else as a new branch."""
        with self._lock:
            turn = self.conversation.turn(turn_id)
            if turn.answer or turn.running:
                return self.regenerate(turn_id)
            self._check_idle()
            place = [each.id for each in self.conversation.compared(turn_id)].index(turn_id)
            again: dict[str, Any] = {
                "choice": self._choices_for(turn)[place],
                "finish_reason": None,
                "error": None,
                "footer": "",
                "served": None,
                "left_out": 0,
                "asked_at": now(),
            }
            return _turns(self._start((replace(turn, **again),), lambda: self.conversation.change(turn_id, **again)))

    def stop(self, turn_id: str | None = None) -> None:
        """End the answer of a turn, or all, at once. The text so far stays, and the finish reason is "cancelled"."""
        with self._lock:
            runs = [run for run in self._running.values() if turn_id in (None, run.turn_id)]
        for run in runs:
            run.cancel()

    def ask(self, prompt: str, *, sent: str | None = None, attachments: Sequence[Attachment] = ()) -> Result:
        """Send, wait for the answer, and return it.

        Raises the `MistralError` of an answer that failed, with the text so far in its `result`. An interrupt stops
        the answer, and its `KeyboardInterrupt` has the text so far in `result` too.
        """
        run: Run | None = None
        others = self.busy
        try:
            question = self._question(prompt, sent, attachments)
            with self._lock:
                self._check_idle()
                run = self._add(question, (self.choice,), self.conversation.head)[0]
            while not run.done.wait(POLL):
                continue
        except KeyboardInterrupt as interrupt:
            if not others:
                self.stop()
            if run is not None:
                interrupt.result = run.result  # type: ignore[attr-defined]
            raise
        if run.error is not None:
            raise run.error
        if run.result is None:
            raise ChatError("the answer was stopped before anybody was asked; ask again")
        return run.result

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being written and the listeners know it, for `timeout` seconds at most."""
        started = time.monotonic()
        with self._quiet:
            quiet = self._quiet.wait_for(lambda: not self._running, timeout)
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - started))
        return quiet and self._events.wait(left)

    def _question(self, prompt: str, sent: str | None, attachments: Sequence[Attachment]) -> Turn:
        """A turn that holds the question alone. `InvalidRequest` where it is empty, too long, or cannot be encoded."""
        text = compose(prompt if sent is None else sent, attachments)
        if not text.strip():
            raise InvalidRequest("prompt", prompt, "must not be empty")
        Message("user", prompt)
        Message("user", text)
        return Turn("", None, prompt, sent=None if text == prompt else text, attachments=tuple(attachments))

    def _choices(self, compare: bool) -> tuple[Choice, ...]:
        """Who is to answer now. Those who are compared have the same seed, if either has one."""
        if not compare:
            return (self.choice,)
        if self.compare is None:
            raise InvalidRequest("compare", compare, "there is nobody to compare with; set `compare` to a Choice")
        return _same_seed(self.choice, self.compare)

    def _choices_for(self, turn: Turn) -> tuple[Choice, ...]:
        """Who is to answer in the place of a turn: for a comparison, those of now or, where there are none, its own."""
        if turn.group is None:
            return (self.choice,)
        recorded = tuple(each.choice for each in self.conversation.compared(turn.id))
        return recorded if self.compare is None or len(recorded) != 2 else self._choices(compare=True)

    def _ask(self, question: Turn, choices: Sequence[Choice], parent: Callable[[], str | None]) -> tuple[Turn, ...]:
        with self._lock:
            self._check_idle()
            return _turns(self._add(question, choices, parent()))

    def _add(self, question: Turn, choices: Sequence[Choice], parent: str | None) -> tuple[Run, ...]:
        group, asked_at = new_id() if len(choices) > 1 else None, now()
        turns = tuple(
            Turn(
                id=new_id(),
                parent=parent,
                prompt=question.prompt,
                choice=choice,
                sent=question.sent,
                attachments=question.attachments,
                group=group,
                asked_at=asked_at,
            )
            for choice in choices
        )
        return self._start(turns, lambda: self.conversation.add(*turns))

    def _start(self, turns: Sequence[Turn], put: Callable[[], object]) -> tuple[Run, ...]:
        """Have turns answered that `put` puts into the conversation. Where that is interrupted, they end.

        But for those whose thread runs: they end by themselves, and may wait for the lock that is held here.
        """
        try:
            put()
            return self._run(turns)
        except BaseException:
            for turn in turns:
                run = self._running.get(turn.id)
                if run is None:
                    self.conversation.write(turn.id, finish_reason="cancelled")
                elif not run.begun:
                    run.cancel()
            raise

    def _run(self, turns: Sequence[Turn]) -> tuple[Run, ...]:
        runs = []
        for turn in turns:
            left_out = self._left_out(turn)
            run = Run(turn, self.conversation, self._settings, self._events, self._ended, left_out)
            self._running[turn.id] = run
            self._asked.add(turn.id)
            self._events.put(TurnStarted(turn))
            runs.append(run)
        for run in runs:
            try:
                threading.Thread(target=run.run, name="mistral-nb chat", daemon=True).start()
            except RuntimeError as error:
                run.fail(MistralError(f"no thread to ask in: {error}. Ask again"))
        return tuple(runs)

    def _left_out(self, turn: Turn) -> int:
        """How many turns did not fit before the one that this follows, where the same model answered that."""
        with self.conversation.steady():
            if turn.parent not in self._asked or turn.parent not in self.conversation:
                return 0
            before = self.conversation.turn(turn.parent)
        same = (before.choice.backend, before.choice.model) == (turn.choice.backend, turn.choice.model)
        return before.left_out if same and before.answer.strip() else 0

    def _check_idle(self) -> None:
        if self._running:
            raise ChatBusy("an answer is still being written; wait for it, or stop it first")

    def _ended(self, run: Run, event: TurnEnded) -> None:
        with self._quiet:
            if self._running.get(run.turn_id) is run:
                del self._running[run.turn_id]
            self._events.put(event)
            self._quiet.notify_all()

    def _rearranged(self, why: str) -> None:
        """An answer whose turn is gone, or is another one of that id by now, ends."""
        with self._lock:
            if why != "select":
                self._asked.clear()
            gone = [run for run in self._running.values() if not self.conversation.is_running(run.turn_id)]
        for run in gone:
            run.cancel()
        self._events.put(Rearranged(why))


def _turns(runs: Sequence[Run]) -> tuple[Turn, ...]:
    return tuple(run.asked for run in runs)


def _same_seed(first: Choice, second: Choice) -> tuple[Choice, Choice]:
    seed = first.fields.get("seed", second.fields.get("seed"))
    return first.with_fields(seed=seed), second.with_fields(seed=seed)

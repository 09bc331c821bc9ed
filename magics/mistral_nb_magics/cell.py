"""The magic: `%%mistral` asks with the text of the cell, `%mistral` with the text of the line."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand
from traitlets import Bool, Unicode

from mistral_nb.answer import Answer, Result
from mistral_nb.config import BACKENDS, Settings, load_settings
from mistral_nb.errors import ConfigurationError, MistralError
from mistral_nb.safe_markdown import plain_text
from mistral_nb.types import Chunk, GenerationRequest
from mistral_nb_magics.commands import COMMANDS, find_command
from mistral_nb_magics.display import Style, is_notebook, make_display, mark_of, show_result
from mistral_nb_magics.lora import run_lora
from mistral_nb_magics.options import Call, config_traits, mistral_arguments, read_call
from mistral_nb_magics.outcome import short_errors, shown_once
from mistral_nb_magics.stream import Interrupts, follow

if TYPE_CHECKING:
    from mistral_nb.backends import Selection
    from mistral_nb.backends.base import DryRun
    from mistral_nb.calling import CallRecord

__all__ = ["Mistral"]

T = TypeVar("T")

_CLEARING_UP = 2.0
"""Seconds that an interrupted pull gets to put away what it has."""

MANUAL = f"""Ask Mistral-7B-Instruct, and watch the answer come.

    %%mistral --temperature 0
    Explain {{{{topic}}}} in two sentences.

    %mistral Why is the sky blue? --max-tokens 60
    answer = %mistral Why is the sky blue?

The prompt is the body of the cell, or the text of the line; `%mistral` needs no quotes around it. Options may stand
before or after the text; after a lone -- everything is text. `{{{{name}}}}`, `{{{{name.attribute}}}}` and
`{{{{name[0]}}}}` put in the values of your variables.

The answer is shown once, while it comes. Its Result is the value of the cell (`_`, `Out[n]`), goes into a variable with
-o NAME, and is shown again by `%mistral last`. An interrupt keeps the text so far, and stops Run All.

A line that is one of these words, with nothing but options after it, is a command and no prompt:

{chr(10).join(f"    %mistral {name:<8} {told}" for name, (told, _) in COMMANDS.items())}

`%config Mistral` lists the defaults of the options, and sets them: `%config Mistral.temperature = 0`. `%mistral_bench?`
and `%%mistral_kernel?` tell how kernels are measured and written."""


@magics_class
class Mistral(Magics):
    """Defaults for `%mistral` and `%%mistral`; an option on the line comes before them."""

    backend = Unicode("", help=f"Who answers: {', '.join(BACKENDS)}; empty leaves it to the settings.").tag(config=True)
    model = Unicode("", help="The model; empty is the backend's own choice.").tag(config=True)
    system = Unicode("", help="The system text before each prompt; empty for none.").tag(config=True)
    footer = Bool(True, help="Show under the answer who gave it, why they did, and how fast.").tag(config=True)
    locals().update(config_traits())

    last: Result | None = None
    """The last answer, whole or partial."""

    _last_style = Style()

    @mistral_arguments(MANUAL)
    @line_cell_magic
    @no_var_expand
    def mistral(self, line: str, cell: str | None = None) -> Any:
        command = find_command(line) if cell is None else None
        with short_errors():
            if command:
                return self._command(*command)
            call = read_call(_MAGIC.parser, line, cell, self._defaults(), self._shell.user_ns)
            from mistral_nb.backends import resolve

            selection = resolve(self._settings(), backend=call.backend, model=call.model)
            if call.dry_run:
                self._dry_run(call, selection)
                return None
            return self._ask(call, selection)

    @property
    def _shell(self) -> Any:
        assert self.shell is not None
        return self.shell

    def _settings(self) -> Settings:
        return load_settings({"backend": self.backend, "model": self.model})

    def _defaults(self) -> dict[str, Any]:
        return {"system": self.system or None, **{name: getattr(self, name) for name in config_traits()}}

    def _ask(self, call: Call, selection: Selection) -> Result:
        if call.toolbox is None:
            return self._finished(call, self._answer(call, call.request, selection))
        from mistral_nb.call_rounds import Rounds

        rounds = Rounds(call.request, call.toolbox, call.max_rounds)
        result = rounds.converse(
            lambda request: self._answer(call, request, selection, tuple(rounds.records)),
            lambda line: print(plain_text(line), flush=True),
            lambda partial: self._keep(call, partial),
        )
        return self._finished(call, self._keep(call, result))

    def _answer(
        self, call: Call, request: GenerationRequest, selection: Selection, calls: tuple[CallRecord, ...] = ()
    ) -> Result:
        """One answer, shown while it comes. Where its calls are to be run, only its text is shown."""
        who = selection.backend.describe()
        rounds = call.max_rounds if call.toolbox is not None else 0
        style = Style(call.format, f"Asking {who.model}", selection.why, self.footer, rounds)
        display = make_display(self._shell, style)
        with Interrupts() as interrupts, Answer(selection.backend, request) as answer:
            error = follow(answer, display, interrupts)
            result = self._keep(call, replace(answer.result, calls=calls))
            self._last_style = replace(style, waiting="")
            to_run = result.tool_calls and call.toolbox is not None and request.functions is not None
            if to_run and not error and not result.text.strip():
                display.conclude("")
            else:
                display.finish(result, error)
        if error:
            raise error
        return result

    def _keep(self, call: Call, result: Result) -> Result:
        """`result`, as the last answer and in the variable of `-o`."""
        self.last = result
        if call.out:
            self._shell.user_ns[call.out] = result
        return result

    def _finished(self, call: Call, result: Result) -> Result:
        self._follow_up(result, call.format)
        return self._already_shown(result)

    def _follow_up(self, result: Result, form: str) -> None:
        if form == "code":
            self._shell.set_next_input("\n".join(result.code) or result.text, replace=False)
        if form == "json":
            try:
                _ = result.json
            except ValueError as error:
                raise MistralError(str(error)) from None

    def _dry_run(self, call: Call, selection: Selection) -> None:
        tokenize = getattr(selection.backend, "tokenize", None)
        if tokenize is None:
            raise ConfigurationError(
                f"the backend {selection.backend.name} does not show its tokens: for a dry run add --backend local"
            )
        found = self._work(f"Asking {selection.backend.describe().model}", lambda say: tokenize(call.request, say))
        if call.out:
            self._shell.user_ns[call.out] = found
        print(_dry_run_report(found, call))

    def _work(
        self, waiting: str, job: Callable[[Callable[[str], None]], T], stopped: Callable[[], str] = lambda: ""
    ) -> T:
        """What `job(say)` returns, with the lines that it says shown meanwhile. An interrupt ends it.

        `stopped` says what is left then.
        """
        from mistral_nb.backends.pump import Emit, HungUp, Line, Pump

        done: list[T] = []

        def produce(line: Line, emit: Emit) -> None:
            def say(status: str) -> None:
                if line.hung_up:
                    raise HungUp
                emit(Chunk(status=status))

            done.append(job(say))

        display = make_display(self._shell, Style(waiting=waiting))
        with Interrupts() as interrupts:
            error = follow(Pump(produce), display, interrupts)
            if isinstance(error, KeyboardInterrupt):
                display.conclude(": ".join(part for part in (mark_of(error), stopped()) if part))
            else:
                display.conclude("")
        if error:
            raise error
        return done[0]

    def _command(self, name: str, options: Namespace) -> Any:
        match name:
            case "chat":
                return self._open_chat(options)
            case "last":
                return self._show_last()
            case "pull":
                self._pull(options)
            case "stop":
                from mistral_nb.engine_control import stop

                stopped = stop(self._settings(), options.model, options.force)
                print(f"Stopped {', '.join(stopped)}." if stopped else "No engine is running.")
            case "models":
                from mistral_nb.model_report import model_report, models_table

                print(model_report(options.model) if options.model else models_table())
            case "lora":
                run_lora(options, self._settings(), self._work)
            case "help":
                print(_MAGIC.__doc__)
            case _:
                print(self._report(name))
        return None

    def _open_chat(self, options: Namespace) -> Any:
        """A `Chat`, shown at once, so that it needs not be the last line of its cell."""
        if not is_notebook(self._shell):
            raise UsageError("a chat needs a notebook; here, ask in code: chat = mistral_nb.Chat(); chat.ask('...')")
        from mistral_nb_magics.chat.opening import open_chat

        chat = open_chat(options, self._defaults(), self._settings)
        chat._ipython_display_()
        return chat

    def _report(self, name: str) -> str:
        from mistral_nb.report import status_report

        status = status_report(self._settings())
        return status if name == "status" else f"{status}\n\n{_MAGIC.__doc__}"

    def _pull(self, options: Namespace) -> None:
        model = options.model
        if model is None:
            raise UsageError("which model? Such as: %mistral pull embedded")
        from mistral_nb.model_report import kept_by_pull, pulled
        from mistral_nb.models import pull
        from mistral_nb.progress import Meter, Progress

        meter, steps, ended = Meter(), set[str](), threading.Event()

        def job(say: Callable[[str], None]) -> Path:
            def show(now: Progress) -> None:
                steps.add(now.step)
                say(meter.line(now))

            try:
                return pull(model, show, revision=options.revision, store_name=options.name)
            finally:
                ended.set()

        def stopped() -> str:
            ended.wait(_CLEARING_UP)
            return kept_by_pull(model, options.name)

        print(pulled(self._work(f"Looking for {model}", job, stopped), done=bool(steps)))

    def _show_last(self) -> Result:
        if self.last is None:
            raise UsageError("there is no answer yet: ask with %%mistral first")
        show_result(self._shell, self.last, self._last_style)
        return self._already_shown(self.last)

    def _already_shown(self, result: Result) -> Result:
        style = self._last_style
        return shown_once(
            self._shell, result, "<Result, shown above>", lambda value: show_result(self._shell, value, style)
        )


_MAGIC: Any = vars(Mistral)["mistral"]
"""The magic as a function, with its options in `parser` and its manual in `__doc__`."""


def _dry_run_report(found: DryRun, call: Call) -> str:
    count, wanted = len(found.tokens), call.request.max_tokens
    room = found.context - count
    fits = f"{room} left for the answer" if room > 0 else f"{-room} too many"
    return (
        f"{found.prompt}\n\n{count} tokens of a context of {found.context}, {fits}; asked for at most {wanted}\n"
        f"{' '.join(map(str, found.tokens))}"
    )

"""The magics: `%mistral_bench` measures the kernels, `%%mistral_kernel` checks and times one of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand

from mistral_nb.errors import MistralError
from mistral_nb_magics.bench.options import BENCH_MANUAL, KERNEL_MANUAL, Asked, read_line
from mistral_nb_magics.outcome import short_errors, shown_once
from mistral_nb_magics.stream import Interrupts, follow

if TYPE_CHECKING:
    from mistral_nb.kernel_bench import BenchProcess
    from mistral_nb_magics.bench.surface import Event

__all__ = ["KernelBench"]

F = TypeVar("F", bound=Callable[..., Any])

_CLOSING = 70.0
"""Seconds that the rest of an interrupted run is waited for; it is killed before."""


def _manual(text: str) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        function.__doc__ = text
        return function

    return decorate


class _Events:
    """The events of the child; closing interrupts it, and it goes on to its end."""

    def __init__(self, process: BenchProcess) -> None:
        self._process = process

    def __iter__(self) -> Iterator[Event]:
        return iter(self._process)

    def close(self) -> None:
        self._process.interrupt()


@magics_class
class KernelBench(Magics):
    """`%mistral_bench` and `%%mistral_kernel`."""

    @no_var_expand
    @line_magic
    @_manual(BENCH_MANUAL)
    def mistral_bench(self, line: str) -> Any:
        asked = read_line(line, "mistral_bench")
        if asked.help:
            print(BENCH_MANUAL)
            return None
        return self._run(asked, "Kernels", asked.arguments)

    @no_var_expand
    @cell_magic
    @_manual(KERNEL_MANUAL)
    def mistral_kernel(self, line: str, cell: str) -> Any:
        asked = read_line(line, "mistral_kernel")
        if asked.help:
            print(KERNEL_MANUAL)
            return None
        op, *options = asked.arguments
        # One line more, so that lines are counted as the cell's are.
        return self._run(asked, op, ("candidate", op, "-", *options), f"\n{cell}")

    def _run(self, asked: Asked, title: str, arguments: Sequence[str], source: str | None = None) -> Any:
        """Run the child and show what it says; the value of the cell."""
        from mistral_nb.kernel_bench import BenchUsage, start
        from mistral_nb_magics.bench.surface import make_surface, value_of

        assert self.shell is not None
        with short_errors():
            surface = make_surface(self.shell, title)
            with Interrupts() as interrupts, start(arguments, source, asked.patience) as process:
                error = follow(_Events(process), surface, interrupts, _CLOSING)
                if isinstance(error, BenchUsage):
                    error = UsageError(str(error))
                surface.finish(error)
            heard = surface.heard
            value = None if heard.rows is None else value_of(heard.rows, heard.code)
            if asked.out and value is not None:
                self.shell.user_ns[asked.out] = value
            if error is not None:
                raise error
            if heard.failure is not None:
                raise MistralError(f"the candidate is wrong: {': '.join(heard.failure['text'].split(chr(10))[:2])}")
        return None if value is None else shown_once(self.shell, value, f"<{len(value)} rows, shown above>")

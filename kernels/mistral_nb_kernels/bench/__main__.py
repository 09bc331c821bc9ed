"""`python -m mistral_nb_kernels.bench`: the kernel bench's command, for a terminal or, by `--events`, for a program."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from mistral_nb_kernels.bench.events import Lines, Sink
from mistral_nb_kernels.bench.show import Terminal
from mistral_nb_kernels.bench.tether import fasten
from mistral_nb_kernels.bench.trail import UNREAD, VARIABLE, Trail, watched

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; the exit status: 0, 1 for an error, a wrong candidate or a regression, 2 for bad usage,
    130 when interrupted. 141, without a word, when nobody reads what it prints any more. The process's own arguments
    may name a candidate, which runs in another process.
    """
    tethered, path = fasten(), os.environ.pop(VARIABLE, None)
    words = list(sys.argv[1:] if arguments is None else arguments)
    events = "--events" in words
    try:
        if arguments is None and words[:1] == ["candidate"] and not (tethered or path):
            return watched([sys.executable, *sys.orig_argv[1:]], events=events)
        sink: Sink = Lines() if events else Terminal()
        if path is None:
            return _hearing(words, sink)
        with Trail(sink, path) as trail:
            trail.status = _hearing(words, trail)
        return trail.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again when it ends
        return UNREAD


def _hearing(words: list[str], sink: Sink) -> int:
    interrupts = _Interrupts(sink)
    for name in ("SIGINT", "SIGBREAK"):  # the second is Windows's for a group of processes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupts.take)
    os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not to be timed
    return _carry_out(words, sink, interrupts)


def _carry_out(words: list[str], sink: Sink, interrupts: _Interrupts) -> int:
    """Everything that takes a moment to import is imported here, where an interrupt ends it in words."""
    status, complete, saved, error = 1, False, None, ""
    try:
        from mistral_nb_kernels.bench.arguments import Help, Usage, parse
        from mistral_nb_kernels.bench.outcome import Refused
        from mistral_nb_kernels.bench.run import carry_out

        try:
            outcome = carry_out(parse(words), sink, lambda: interrupts.heard)
            status, complete, error = outcome.status, outcome.complete, outcome.error
            saved = str(outcome.saved) if outcome.saved else None
        except Usage as wrong:
            print(end=wrong.usage, file=sys.stderr)
            status, error = 2, str(wrong)
        except Help as text:
            print(text)
            status, complete = 0, True
        except Refused as refused:
            error = str(refused)
    except Exception:
        raise
    except BaseException as ended:
        if interrupts.heard and isinstance(ended, KeyboardInterrupt):
            status, complete = 130, False
        else:  # raised somewhere in what is measured, as by `sys.exit`
            who = "the candidate" if words[:1] == ["candidate"] else "what is measured"
            how = f"{type(ended).__name__}: {ended}".removesuffix(": ")
            error = f"{who} ended the process before it was judged ({how}). Correct that, and run it again"
    if error:
        sink.send("error", text=error)
    sink.send("end", complete=complete, saved=saved)
    return status


class _Interrupts:
    """Raises `KeyboardInterrupt` for the first one, after which what was measured is kept, and from the third on.

    A terminal tells a group of processes, and one of them may tell this one too: the second may be the first again.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._count = 0

    @property
    def heard(self) -> bool:
        return self._count > 0

    def take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count != 2 and not self._sink.holds():
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

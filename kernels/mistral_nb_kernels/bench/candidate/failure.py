"""How a candidate failed: what it is in words, and the wrong numbers beside the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mistral_nb_kernels.bench.candidate.source import own_lines, said

__all__ = ["Failure", "Near", "apart", "place", "raised"]

DIGITS = 17
"""That tell any two numbers apart, up to fp64."""


@dataclass(frozen=True, slots=True)
class Near:
    """An element at or beside the first wrong one, or the worst; error: of the largest of its row (the last axis)."""

    index: tuple[int, ...]
    expected: float
    got: float
    wrong: bool
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What a candidate does otherwise than the reference, at the first case where it does.

    words: it in a sentence; where: of the case, op, shape and type. Where numbers are wrong: the tensor ("result",
    "result[1]", an input such as "kv.k"), the first wrong one's index, what it is and should be; off of its `of`
    numbers are wrong. error and allowed are of the largest of the row (the last axis), 0 where numbers are equal or
    wrong. around: its neighbours; worst: the number with the largest error, where it is another one. trace: the
    candidate's own lines, where it ended with an error.
    """

    where: str
    words: str
    tensor: str = ""
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    off: int = 0
    of: int = 0
    error: float = 0.0
    allowed: float = 0.0
    around: tuple[Near, ...] = ()
    worst: Near | None = None
    trace: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}\n{self.words}", self.trace, "\n".join(self._lines()), self.hint]
        return "\n".join(part for part in parts if part)

    def markdown(self) -> str:
        """The same with the numbers and the lines as blocks of code."""
        block = "\n".join(part for part in (self.trace, "\n".join(self._lines())) if part)
        parts = [f"**{_plain(self.where)}**", _plain(self.words), block and f"```text\n{block}\n```", _plain(self.hint)]
        return "\n\n".join(part for part in parts if part)

    def _lines(self) -> Iterator[str]:
        if not self.around:
            return
        rows = [("", "index", "expected", "got")]
        for near in self.around:
            index = f"[{', '.join(map(str, near.index))}]"
            expected, got = apart(near.expected, near.got) if near.wrong else map(_number, (near.expected, near.got))
            mark, end = ">" if near.index == self.index else "", "  wrong" * near.wrong
            rows.append((mark, index, expected, got + end))
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        for mark, index, expected, got in rows:
            yield f"{mark:<2}{index:<{wide[1]}}  {expected:>{wide[2]}}  {got}".rstrip()


def _plain(words: str) -> str:
    """Words in which Markdown finds nothing of its own."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~$&" else c for c in words)


def _number(x: float, digits: int = 6) -> str:
    return str(x) if isinstance(x, int) else f"{x:.{digits}g}"


def apart(one: float, other: float, digits: int = 6) -> tuple[str, str]:
    """Two numbers in so many digits, or as many more as it takes to tell them apart."""
    pairs = ((_number(one, count), _number(other, count)) for count in range(digits, DIGITS + 1))
    alike = _number(one), f"{_number(other)} of other bits"  # as NaN may be
    return next(((first, second) for first, second in pairs if first != second), alike)


def raised(error: BaseException, where: str) -> Failure:
    """A candidate that ended with an error."""
    return Failure(where, f"It ends with {said(error)}", trace=own_lines(error))


def place(name: str, index: Sequence[int]) -> str:
    return f"{name}[{', '.join(map(str, index))}]"

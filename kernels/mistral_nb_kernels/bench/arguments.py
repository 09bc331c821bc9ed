"""What the bench's command takes: its two forms, their options, and what is refused before anything is measured."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from mistral_nb_kernels.bench.registry import OPS, SUBJECTS
from mistral_nb_kernels.bench.subject import Asked
from mistral_nb_kernels.configs import ARCHITECTURES

__all__ = ["DTYPES", "Help", "Options", "Usage", "bench_parser", "candidate_parser", "parse"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("auto", "cpu", "cuda")
_PROGRAM = "python -m mistral_nb_kernels.bench"
_FORMS = (
    f"A candidate of your own is checked and timed by: {_PROGRAM} candidate OP FILE. In a notebook: %mistral_bench and "
    "%%mistral_kernel; in a terminal also: mistral-nb bench kernels. Those three refuse to measure on a GPU that an "
    "engine holds, unless --beside-engine is given. An interrupt keeps what was measured; of mistral-nb "
    "bench a second one kills it. The exit status is 1 for an error, a wrong candidate and a regression."
)


class Usage(Exception):
    """Wrong arguments: what is wrong with them; `usage` is how they are written."""

    def __init__(self, words: str, usage: str = "") -> None:
        super().__init__(words)
        self.usage = usage


class Help(Exception):
    """The help was asked for: its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is to be done.

    subjects: of the bench; op and file: of a candidate, else empty; tolerance: a share; archs: for --compile; notes:
    remarks that are kept with the results; words: the arguments as they were given.
    """

    subjects: tuple[str, ...] = ()
    op: str = ""
    file: str = ""
    asked: Asked
    device: str
    save: Path | None
    plot: Path | None
    compare: Path | None
    tolerance: float
    notes: tuple[str, ...]
    open: Path | None = None
    list: bool = False
    archs: tuple[int, ...] = ()
    check_only: bool = False
    words: tuple[str, ...]


def parse(arguments: Sequence[str]) -> Options:
    """Raises `Usage` and `Help`."""
    if arguments[:1] == ["candidate"]:
        return _candidate(candidate_parser().parse_intermixed_args(arguments[1:]), tuple(arguments))
    parser = bench_parser()
    found = parser.parse_intermixed_args(arguments)
    chosen = ("subjects", "save", "dtype", "seq", "batch", "providers")
    if found.open and any(getattr(found, name) for name in chosen):
        parser.error("--open shows what was measured: leave out the subjects, --save, and what chooses what to measure")
    for axis in ("seq", "batch"):
        having = [name for name, subject in SUBJECTS.items() if axis in subject.axes]
        if getattr(found, axis) and found.subjects and not set(having) & set(found.subjects):
            parser.error(f"--{axis} is of {', '.join(having)}: leave it out")
    subjects = tuple(dict.fromkeys(found.subjects)) or tuple(SUBJECTS)
    names = _flat(found.providers)
    here = dict.fromkeys(name for subject in subjects for name in SUBJECTS[subject].names)
    if names and not set(names) & set(here):
        there_are = ", ".join(map(_in_one_word, here))
        parser.error(f"argument --providers: none of these runs {', '.join(subjects)}; there are: {there_are}")
    return Options(
        subjects=subjects,
        open=found.open,
        list=found.list,
        asked=_asked(found, (), names),
        **_common(found),
        words=tuple(arguments),
    )


def _candidate(found: argparse.Namespace, words: tuple[str, ...]) -> Options:
    from mistral_nb_kernels.bench.candidate import CandidateError, named

    parser = candidate_parser()
    try:
        op = named(found.op)
    except CandidateError as error:
        parser.error(f"argument OP: {error}")
    if found.check_only and (found.save or found.plot or found.compare):
        parser.error("--check-only times nothing: leave out --save, --plot and --compare, or it")
    return Options(
        op=op,
        file=found.file,
        archs=_flat(found.compile) or (),
        check_only=found.check_only,
        asked=_asked(found, (op,), None),
        **_common(found),
        words=words,
    )


def _asked(found: argparse.Namespace, ops: tuple[str, ...], providers: tuple[str, ...] | None) -> Asked:
    dtypes = _flat(found.dtype)
    return Asked(
        ops=ops,
        dtypes=tuple(DTYPES[name] for name in dtypes) if dtypes else None,
        seq=_flat(found.seq),
        batch=_flat(found.batch),
        providers=providers,
    )


def _common(found: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "save", "plot", "compare")
    told = {"tolerance": found.tolerance / 100, "notes": tuple(found.note)}
    return {**{name: getattr(found, name) for name in names}, **told}


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing and ending the process."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, self.format_usage())

    def print_help(self, file: Any = None) -> None:
        raise Help(self.format_help())


def bench_parser() -> argparse.ArgumentParser:
    """Of the form that measures what is here."""
    parser = _Parser(
        _PROGRAM,
        description="Measures the kernels beside what else can do their work.",
        epilog=_FORMS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "subjects", nargs="*", metavar="SUBJECT", type=_subject, help=f"of {', '.join(SUBJECTS)} (all of them)"
    )
    _add_shapes(parser)
    parser.add_argument(
        "--providers",
        nargs="+",
        type=_list(_provider),
        metavar="NAME",
        help="these, as --list names them, with - for a space (those for the device)",
    )
    _add_results(parser)
    parser.add_argument(
        "--open", type=Path, metavar="FILE", help="measure nothing: show a file that --save wrote, as it was measured"
    )
    parser.add_argument("--list", action="store_true", help="say what can be measured, by whom")
    return parser


def candidate_parser() -> argparse.ArgumentParser:
    """Of the form that checks, and times, a kernel of the user's own."""
    from mistral_nb_kernels.bench.candidate import ALIASES

    short = ", ".join(f"{word} for {op}" for word, op in ALIASES.items())
    parser = _Parser(
        f"{_PROGRAM} candidate",
        description="Checks a function with an op's signature on the op's hard shapes, and times it beside ours.",
        allow_abbrev=False,
    )
    parser.add_argument("op", metavar="OP", help=f"of {', '.join(OPS)}; in short {short}")
    parser.add_argument("file", metavar="FILE", help="Python that defines the function; - reads the standard input")
    _add_shapes(parser)
    parser.add_argument(
        "--compile",
        nargs="+",
        type=_list(_arch),
        metavar="ARCH",
        help="show what it becomes there, as sm_90; needs no GPU",
    )
    parser.add_argument("--check-only", action="store_true", help="do not time it")
    _add_results(parser)
    return parser


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", nargs="+", type=_list(_dtype), metavar="TYPE", help=f"of {', '.join(DTYPES)} (as the device has it)"
    )
    parser.add_argument(
        "--seq", nargs="+", type=_list(_count), metavar="N", help="tokens of a prompt, or of a context when decoding"
    )
    parser.add_argument("--batch", nargs="+", type=_list(_count), metavar="N", help="sequences that decode at once")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(auto: a GPU if there is one)")


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", "--json", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures there (needs matplotlib)")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="hold the results against these, which --save wrote before"
    )
    parser.add_argument(
        "--tolerance", type=_percent, default=3.0, metavar="PERCENT", help="of a change that counts (%(default)g)"
    )
    parser.add_argument(
        "--note", action="append", default=[], metavar="TEXT", help="keep a remark with the results; repeatable"
    )
    parser.add_argument("--events", action="store_true", help="write lines of JSON instead, for a program")


def _subject(text: str) -> str:
    if text in SUBJECTS:
        return text
    if text in OPS:
        raise argparse.ArgumentTypeError(f"{text} is an op of the subject {OPS[text]}: measure that")
    raise argparse.ArgumentTypeError(_unknown(text, "subject", SUBJECTS))


def _provider(text: str) -> str:
    """A provider's name of such a one, or of one with - for its spaces."""
    names = {_in_one_word(name): name for subject in SUBJECTS.values() for name in subject.names}
    if _in_one_word(text) not in names:
        begun = [name for name in names if name.startswith(f"{text}-")]
        if begun:  # as a shell splits a name of two words
            raise argparse.ArgumentTypeError(f"{text!r} is no provider; did you mean {' or '.join(begun)}?")
        raise argparse.ArgumentTypeError(_unknown(text, "provider", names))
    return names[_in_one_word(text)]


def _in_one_word(name: str) -> str:
    return name.replace(" ", "-")


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(_unknown(text, "type", DTYPES))
    return text


def _arch(text: str) -> int:
    """90 of "sm_90", "sm_90a" and "90"."""
    number = re.fullmatch(r"(?:sm_?)?(\d+)a?", text.lower())
    if number is None or int(number[1]) not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(_unknown(text, "architecture", [f"sm_{arch}" for arch in ARCHITECTURES]))
    return int(number[1])


def _unknown(text: str, kind: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(text, known, 1)
    return f"{text!r} is no {kind}; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: a whole number, 1 or more")
    return int(text)


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage: a number from 0 to 100")
    return value


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Of words with commas between them."""

    def several(text: str) -> list[Any]:
        return [kind(part.strip()) for part in text.split(",")]

    return several


def _flat(found: list[list[Any]] | None) -> tuple[Any, ...] | None:
    return tuple(dict.fromkeys(each for part in found for each in part)) if found else None

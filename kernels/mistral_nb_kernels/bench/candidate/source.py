"""A candidate: the function of a cell or a file that does an op, loaded so that its lines are found."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import inspect
import itertools
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import FunctionType, ModuleType
from typing import Any

from mistral_nb_kernels import Ops, reference
from mistral_nb_kernels.bench.candidate.surroundings import Surroundings
from mistral_nb_kernels.bench.candidate.tuned import take_turns

__all__ = ["ALIASES", "OPS", "Candidate", "CandidateError", "load", "named", "own_lines", "said"]

OPS: tuple[str, ...] = tuple(each.name for each in fields(Ops) if each.name != "choices")
"""What a candidate may be of."""
ALIASES = {"attention": "prefill_attention", "rope": "rope_write", "norm": "add_rms_norm"}
"""Words of the bench for one op."""
UNSEEN = "a candidate runs in a process of its own, the notebook's variables are not visible there"
_FILE = "<candidate "
_numbers = itertools.count(1)


class CandidateError(Exception):
    """Why there is nothing to check, in words for the user."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What does an op by the arguments of `reference`'s function. triton: it launches a kernel, or may.

    around: what it has to leave as it was before its definition ran; notes: what of that was put back.
    """

    function: Callable[..., Any]
    name: str
    triton: bool
    around: Surroundings = field(default_factory=Surroundings, repr=False, compare=False)
    notes: tuple[str, ...] = ()


def named(op: str) -> str:
    """The op in `Ops` that a word means. Raises `CandidateError` for a word that means none, or two."""
    if op == "lora":
        raise CandidateError("lora is two ops: lora_shrink and lora_expand; write a candidate of one of them")
    if op in OPS or op in ALIASES:
        return ALIASES.get(op, op)
    near = difflib.get_close_matches(op, (*OPS, *ALIASES), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise CandidateError(f"{op} is no op: {meant}The ops are {', '.join(OPS)}")


def load(text: str, op: str, *, interpret: bool = False) -> Candidate:
    """Run Python source, and find the candidate in it: the function named as the op, else the only one.

    A leading underscore marks a function as a helper. With `interpret` Triton's interpreter runs the kernels that this
    process defines or imports from here on, in place of a GPU: so before anything imports triton; configs of autotuned
    ones take turns. Raises `CandidateError` where the source does not run, or defines no function of these arguments.
    """
    op = named(op)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    number = next(_numbers)
    file, module = f"{_FILE}{number}>", ModuleType(f"candidate_{number}")
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    sys.modules[module.__name__] = module
    try:
        tree = ast.parse(text, file)
        code = compile(tree, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise CandidateError(_unreadable(error)) from None
    around = Surroundings()
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:  # somebody else's code
        raise CandidateError(f"The candidate ends as it is defined: {said(error)}\n{own_lines(error)}") from error
    if replaced := around.replaced():
        raise CandidateError(
            f"The candidate replaces {', '.join(replaced)}, which it is judged by: leave that as it is"
        )
    notes = tuple(f"The candidate calls {name}, for everybody: that was put back." for name in around.reset())
    function = _found(vars(module), file, op)
    name = str(getattr(function, "__name__", op))
    _check_arguments(function, name, op)
    triton = _imports_triton(tree) or any(map(_launches, vars(module).values()))
    if interpret and triton and importlib.util.find_spec("triton"):
        take_turns()
    return Candidate(function, name, triton, around, notes)


def said(error: BaseException) -> str:
    """What an error says, the first of its causes; of an unknown name what may be behind it."""
    while error.__cause__ is not None and type(error).__name__ == "InterpreterError":
        error = error.__cause__
    words = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"{words}; {UNSEEN}" if isinstance(error, NameError) or "NameError(" in words else words


def own_lines(error: BaseException) -> str:
    """The candidate's own lines that an error came through, outermost first; empty if none of them did."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__
    frames = [
        (frame.name, frame.lineno, frame.line)
        for each in chain
        for frame in traceback.extract_tb(each.__traceback__)
        if frame.filename.startswith(_FILE)
    ]
    return "\n".join(f"  line {line}, in {name}\n    {text}" for name, line, text in dict.fromkeys(frames))


def _unreadable(error: Exception) -> str:
    if not isinstance(error, SyntaxError):
        return f"The candidate is no Python: {error}"
    line = (error.text or "").rstrip("\n")
    lines = [f"The candidate is no Python: line {error.lineno}: {error.msg}"]
    if line:
        column = max(0, (error.offset or 1) - 1 - (len(line) - len(line.lstrip())))
        lines += [f"    {line.strip()}", f"    {' ' * column}^"]
    if line.lstrip().startswith(("%", "!")):
        lines.append("It runs in a process of its own, where there are no magics and no shell commands.")
    return "\n".join(lines)


def _found(names: Mapping[str, Any], file: str, op: str) -> Callable[..., Any]:
    for name in (op, *(alias for alias, meant in ALIASES.items() if meant == op)):
        if _is_kernel(names.get(name)):
            raise CandidateError(
                f"{name} is a kernel: define a function of that name, which launches it: {_declared(op)}"
            )
        if callable(names.get(name)):
            found: Callable[..., Any] = names[name]
            return found
    own = [
        each
        for name, each in names.items()
        if isinstance(each, FunctionType) and each.__code__.co_filename == file and not name.startswith("_")
    ]
    if not own:
        raise CandidateError(f"The candidate defines no function: define {_declared(op)}")
    if len(own) > 1:
        several = ", ".join(each.__name__ for each in own)
        raise CandidateError(f"The candidate defines {several}: name the one to measure {op}")
    return own[0]


def _declared(op: str) -> str:
    """An op's name and arguments, as they are written."""
    parameters = inspect.signature(getattr(reference, op)).parameters.values()
    plain = [each.replace(annotation=each.empty) for each in parameters]
    return f"{op}{inspect.Signature(plain)}"


def _check_arguments(function: Callable[..., Any], name: str, op: str) -> None:
    parameters = inspect.signature(getattr(reference, op)).parameters.values()
    given = [None for each in parameters if each.kind is not each.KEYWORD_ONLY]
    keywords = {each.name: None for each in parameters if each.kind is each.KEYWORD_ONLY}
    try:
        taken = inspect.signature(function)
    except (TypeError, ValueError):  # of a function in C
        return
    try:
        taken.bind(*given, **keywords)
    except TypeError as error:
        raise CandidateError(f"{name}{taken} does not take the op's arguments ({error}): {_declared(op)}") from None


def _is_kernel(x: Any) -> bool:
    jit = sys.modules.get("triton.runtime.jit")
    return jit is not None and isinstance(x, jit.KernelInterface)


def _launches(x: Any) -> bool:
    """Whether it is a kernel, or has one among the names that it sees."""
    if isinstance(x, functools.partial):
        return _launches(x.func)
    if isinstance(x, ModuleType):
        return x.__name__.startswith("mistral_nb_kernels.") and any(map(_is_kernel, vars(x).values()))
    return _is_kernel(x) or any(map(_is_kernel, getattr(x, "__globals__", {}).values()))


def _imports_triton(tree: ast.Module) -> bool:
    return any(name.partition(".")[0] == "triton" for node in ast.walk(tree) for name in _imported(node))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""

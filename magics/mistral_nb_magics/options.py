"""What may stand on the magic line: made from the table of request fields, and read from it again."""

from __future__ import annotations

import argparse
import difflib
import keyword
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from IPython.core import magic_arguments
from IPython.core.error import UsageError
from traitlets import Float, Int, TraitType, Unicode

from mistral_nb.asking import make_request
from mistral_nb.call_rounds import MAX_ROUNDS, check_rounds
from mistral_nb.calling import Toolbox
from mistral_nb.config import BACKENDS
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import FIELDS, Field, GenerationRequest
from mistral_nb_magics.interpolate import interpolate, near_miss

__all__ = ["FORMATS", "OPTION_FIELDS", "Call", "config_traits", "flag", "mistral_arguments", "read_call"]

FORMATS = {
    "markdown": "rendered Markdown",
    "text": "the text as it is",
    "code": "the code blocks only, put into the next cell too",
    "json": "the JSON that the answer holds",
    "html": "HTML as its source, not rendered",
    "math": "one formula in TeX",
}
FIELDS_BY_NAME = {field.name: field for field in FIELDS}
OPTION_FIELDS = tuple(field for field in FIELDS if field.name != "prompt")

_HELP = {
    "messages": "NAME of a variable with the turns so far, [{role, content}]; the prompt is the next user turn.",
    "functions": "NAMES of your own functions, with commas, or of a variable with functions as [{name, code}].",
    "stop": "Stop before this text; \\n is a newline. Repeatable.",
    "stream": "Take the answer in one piece.",
}
_METAVARS = {"int": "N", "float": "X", "text": "TEXT", "texts": "TEXT", "messages": "NAME", "functions": "NAMES"}
_WORD = re.compile(r"\s*(\S+)")
_VALUE = re.compile(r"""\s*(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+""")

F = TypeVar("F", bound=Callable[..., Any])
argument: Any = magic_arguments.argument


def flag(field: Field) -> str:
    """The field's option, such as `--max-tokens`; a switch that is on by default has `--no-` before its name."""
    return f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}"


def mistral_arguments(manual: str) -> Callable[[F], F]:
    """Decorate a magic with every option; `manual` and the options' help become its docstring."""
    options = [
        argument("-o", "--out", metavar="NAME", help="Put the Result into this variable."),
        argument("--backend", help=f"Who answers: {', '.join(BACKENDS)}, or the address of a server elsewhere."),
        argument("--model", help="The model: a name of the backend's, or a checkpoint folder."),
        argument("--system", metavar="TEXT", help="The system text that comes before the prompt."),
        argument("--format", choices=FORMATS, metavar="FORMAT", help=f"How to show the answer: {_formats()}."),
        argument("--call", action="store_true", help="Run the calls that the model asks for, on your --functions."),
        argument(
            "--max-rounds", type=_rounds, metavar="N", help=f"With --call: rounds of calls. Default {MAX_ROUNDS}."
        ),
        argument("--dry-run", action="store_true", help="Show the rendered prompt and its tokens; ask nobody."),
        argument("--no-interpolate", action="store_true", help="Leave {{braces}} in the prompt as they are."),
        *(_field_option(field) for field in OPTION_FIELDS),
    ]

    finish = magic_arguments.magic_arguments()  # type: ignore[no-untyped-call]

    def decorate(function: F) -> F:
        decorated: Any = function
        decorated.__doc__ = manual
        for option in reversed(options):
            decorated = option(decorated)
        decorated = finish(decorated)
        decorated.parser.allow_abbrev = False
        return decorated  # type: ignore[no-any-return]

    return decorate


def _formats() -> str:
    return "; ".join(f"{name}, {meaning}" for name, meaning in FORMATS.items())


def _field_option(field: Field) -> Any:
    told = _HELP.get(field.name, field.help)
    bounds = f" {field.bounds[0].upper()}{field.bounds[1:]}." if field.kind in ("int", "float") else ""
    default = f" Default {field.default}." if field.kind in ("int", "float") and field.default is not None else ""
    where = " Local engine only." if field.local_only else ""
    told = f"{told}{bounds}{default}{where}".replace("%", "%%")
    if field.kind == "bool":
        return argument(flag(field), dest=field.name, action="store_const", const=not field.default, help=told)
    action = "append" if field.kind == "texts" else "store"
    return argument(flag(field), dest=field.name, action=action, metavar=_METAVARS[field.kind], help=told)


def config_traits() -> dict[str, TraitType[Any, Any]]:
    """A trait for each number of a request, so that `%config Mistral.temperature = 0` sets it for every cell."""
    traits: dict[str, TraitType[Any, Any]] = {}
    kinds: dict[str, Any] = {"int": (Int, int), "float": (Float, float)}
    for field in OPTION_FIELDS:
        if field.kind in kinds:
            make, number = kinds[field.kind]
            traits[field.name] = make(
                field.default,
                min=number(field.minimum),
                max=number(field.maximum),
                allow_none=field.default is None,
                help=f"{field.help} {field.bounds}.",
            ).tag(config=True)
    traits["lora"] = Unicode(None, allow_none=True, help=FIELDS_BY_NAME["lora"].help).tag(config=True)
    return traits


@dataclass(frozen=True, slots=True)
class Call:
    """One use of the magic, read and checked: the request, who is to answer it, and what becomes of the answer.

    `toolbox` holds the functions whose calls are to be run, None where none are, for at most `max_rounds` answers.
    """

    request: GenerationRequest
    backend: str | None
    model: str | None
    out: str | None
    format: str
    dry_run: bool
    toolbox: Toolbox | None = None
    max_rounds: int = MAX_ROUNDS


def read_call(
    parser: argparse.ArgumentParser,
    line: str,
    cell: str | None,
    defaults: Mapping[str, Any],
    namespace: Mapping[str, Any],
) -> Call:
    """The call that `%mistral line` (`cell` is None) or `%%mistral line` over `cell` makes.

    `defaults` are fields and `system`, used where the line is silent; `namespace` holds the user's variables. Raises
    `UsageError`.
    """
    given, words = _parse(parser, line)
    if cell is not None and words:
        raise UsageError(f"{words!r} on the first line: only options stand there, the prompt comes below it")
    prompt = words if cell is None else cell.strip("\n")
    if not prompt.strip():
        raise UsageError("the prompt is empty: write it below the %%mistral line, or after %mistral")
    if not given.no_interpolate:
        prompt = interpolate(prompt, namespace)
        given.system = given.system and interpolate(given.system, namespace)
    toolbox = _toolbox(given, namespace)
    request = _request(given, prompt, defaults, namespace)
    return Call(
        request,
        given.backend,
        given.model,
        _variable(given.out),
        given.format or "markdown",
        given.dry_run,
        toolbox,
        given.max_rounds or MAX_ROUNDS,
    )


def _rounds(text: str) -> int:
    try:
        return check_rounds(int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text)
    except InvalidRequest as error:
        raise UsageError(f"--max-rounds {text}: {error.problem}") from None


def _toolbox(given: argparse.Namespace, namespace: Mapping[str, Any]) -> Toolbox | None:
    """The functions that `--call` runs. `UsageError` where there are none to run."""
    if not given.call:
        if given.max_rounds:
            raise UsageError("--max-rounds goes with --call only")
        return None
    functions = _functions(given.functions, namespace) if given.functions else []
    if not functions or not all(map(callable, functions)):
        raise UsageError("--call runs your own functions: name them, such as --functions f,g")
    try:
        return Toolbox(functions)
    except InvalidRequest as error:
        raise UsageError(f"--{error}") from None


def _functions(given: str, namespace: Mapping[str, Any]) -> list[Any]:
    """The functions of the names in `given`; of one name, what the list by that name holds."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    values = [_named("--functions", name, namespace) for name in names]
    if len(values) == 1 and isinstance(values[0], list | tuple):
        return list(values[0])
    for name, value in zip(names, values, strict=True):
        if not callable(value):
            raise UsageError(f"--functions {name}: must be a function or a list, not of type {type(value).__name__}")
    return values


def _named(option: str, name: str, namespace: Mapping[str, Any]) -> Any:
    if name not in namespace:
        known = (each for each in namespace if not each.startswith("_"))
        raise UsageError(f"{option} {name}: no variable of that name{near_miss(name, known)}")
    return namespace[name]


def _parse(parser: argparse.ArgumentParser, line: str) -> tuple[argparse.Namespace, str]:
    """The options on a line, and the text between or beside them just as it was written."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    arguments, prompt = _split(line, options)
    known, unknown = parser.parse_known_args(arguments)
    assert not unknown, unknown
    return known, prompt


def _split(line: str, options: Mapping[str, argparse.Action]) -> tuple[list[str], str]:
    arguments: list[str] = []
    words: list[str] = []
    at = 0
    while word := _WORD.match(line, at):
        name, equals, _ = word[1].partition("=")
        if word[1] == "--" and not words:
            return arguments, line[word.end() :].strip()
        if name in options:
            takes_value = options[name].nargs != 0
            if equals and not takes_value:
                raise UsageError(f"{name} takes no value")
            end = word.start(1) + len(name) + len(equals) if takes_value else word.end()
            arguments.append(name)
            if takes_value:
                value, end = _value(line, end, name)
                arguments[-1] = f"{name}={value}" if name.startswith("--") else f"{name}{value}"
            at = end
            continue
        if re.match(r"--\w", word[1]):
            raise _unknown_option(word[1], options)
        words.append(word[0])
        at = word.end()
    return arguments, _unquoted("".join(words).strip())


def _value(line: str, at: int, name: str) -> tuple[str, int]:
    """The value of an option that begins at `at`, quoted as in a shell, and where it ends."""
    raw = _VALUE.match(line, at)
    if not raw:
        problem = f": the quote in {line[at:].strip()} has no end" if line[at:].strip() else " needs a value"
        raise UsageError(f"{name}{problem}")
    if line[raw.end() : raw.end() + 1].strip():
        raise UsageError(f"{name}: the quote in {line[at:].strip()} has no end")
    return shlex.split(raw[0])[0], raw.end()


def _unquoted(prompt: str) -> str:
    """A prompt that is quoted as a whole loses its quotes."""
    quote = prompt[:1]
    whole = len(prompt) > 1 and quote in "\"'" and prompt.endswith(quote) and quote not in prompt[1:-1]
    return prompt[1:-1] if whole else prompt


def _unknown_option(word: str, options: Mapping[str, argparse.Action]) -> UsageError:
    close = difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "%mistral? lists them all."
    return UsageError(f"unknown option {word}; {hint} After a lone -- everything is text")


def _variable(name: str | None) -> str | None:
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise UsageError(f"--out {name}: not a name that a variable can have. After a lone -- everything is text")
    return name


def _request(
    given: argparse.Namespace, prompt: str, defaults: Mapping[str, Any], namespace: Mapping[str, Any]
) -> GenerationRequest:
    fields = {field.name: _field_value(field, getattr(given, field.name), namespace) for field in OPTION_FIELDS}
    fields = {name: defaults.get(name) if value is None else value for name, value in fields.items()}
    history = fields.pop("messages")
    silent = fields["raw"] or any(_role(turn) == "system" for turn in history or ())
    system = given.system or (None if silent else defaults.get("system"))
    if given.system and fields["raw"]:
        raise UsageError("--raw sends the prompt as it is, without a --system text: write it into the prompt")
    try:
        if history is None:
            return make_request(prompt, system, fields)
        return make_request([*history, {"role": "user", "content": prompt}], system, fields)
    except InvalidRequest as error:
        names = {field.name: flag(field) for field in OPTION_FIELDS} | {"system": "--system"}
        option = names.get(error.field, error.field)
        raise UsageError(str(error).replace(error.field, option, 1)) from None


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else getattr(turn, "role", None)


def _field_value(field: Field, given: Any, namespace: Mapping[str, Any]) -> Any:
    """The value of an option in the field's own type; what is no number is left for the request to refuse."""
    if given is None:
        return None
    match field.kind:
        case "int" | "float":
            try:
                return int(given) if field.kind == "int" else float(given)
            except ValueError:
                return given
        case "texts":
            return [text.replace("\\n", "\n").replace("\\t", "\t") for text in given]
        case "functions":
            return _functions(given, namespace)
        case "messages":
            value = _named(flag(field), given, namespace)
            if not isinstance(value, list | tuple):
                raise UsageError(f"{flag(field)} {given}: must be a list, not of type {type(value).__name__}")
            return value
    return given

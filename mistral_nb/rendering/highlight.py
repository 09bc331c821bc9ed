"""Highlighting of code as runs of "<class><length>", for languages and sizes that take little time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

from mistral_nb.rendering.signs import units

__all__ = ["CLASSES", "marks"]

MAX_CODE = 40_000  # characters
MAX_LINE = 2_000
MAX_SECONDS = 0.3

LANGUAGES = frozenset(
    (
        *("python", "py", "python3", "pycon", "ipython", "bash", "sh", "shell", "zsh", "console", "powershell", "ps1"),
        *("javascript", "js", "typescript", "ts", "json", "yaml", "yml", "toml", "ini", "html", "xml", "css", "scss"),
        *("sql", "c", "cpp", "c++", "csharp", "cs", "c#", "java", "kotlin", "scala", "swift", "go", "rust", "rs"),
        *("ruby", "rb", "php", "perl", "lua", "r", "julia", "haskell", "latex", "tex", "markdown", "md"),
        *("diff", "dockerfile", "docker", "makefile", "make", "cmake", "graphql", "protobuf", "cuda", "nginx", "vim"),
    )
)
# Pygments' own short names; what has none of these is shown as plain code.
CLASSES = {
    "Token.Keyword": "k",
    "Token.Operator.Word": "k",
    "Token.Name.Builtin": "nb",
    "Token.Name.Function": "nf",
    "Token.Name.Class": "nc",
    "Token.Name.Exception": "nc",
    "Token.Name.Decorator": "nd",
    "Token.Name.Tag": "nt",
    "Token.Name.Attribute": "na",
    "Token.Literal.String": "s",
    "Token.Literal.Number": "m",
    "Token.Comment": "c",
    "Token.Generic.Deleted": "gd",
    "Token.Generic.Inserted": "gi",
    "Token.Generic.Heading": "gh",
    "Token.Generic.Subheading": "gh",
    "Token.Generic.Prompt": "gp",
}


@lru_cache(maxsize=64)
def marks(code: str, language: str) -> str:
    """Runs over `code` from its start, in UTF-16 code units; `_` is no class, and a last run of it is left out.

    "" for a language that is not known, and for code so long or so strange that highlighting it would take long.
    """
    name = language.lower()
    if name not in LANGUAGES or len(code) > MAX_CODE or max(map(len, code.split("\n"))) > MAX_LINE:
        return ""
    deadline = time.monotonic() + MAX_SECONDS
    runs: list[tuple[str, int]] = []
    size = units(code)
    for kind, text in _tokens(_lexer(name), code):
        if time.monotonic() > deadline:
            return ""
        length = min(units(text), size)
        size -= length
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + length)
        elif length:
            runs.append((kind, length))
    if runs and runs[-1][0] == "_":
        runs.pop()
    return "".join(f"{kind}{length}" for kind, length in runs)


def _tokens(lexer: Any, code: str) -> Iterator[tuple[str, str]]:
    """(class, text) from the start to the end, without a gap; a lexer that skips a part ends the highlighting."""
    at = 0
    for start, kind, text in lexer.get_tokens_unprocessed(code + "\n"):
        if start != at:
            return
        yield _class(kind), text
        at = start + len(text)


@cache
def _lexer(name: str) -> Any:
    from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]

    return get_lexer_by_name(name)


@cache
def _class(kind: object) -> str:
    name = str(kind)
    while name and name not in CLASSES:
        name = name.rpartition(".")[0]
    return CLASSES.get(name, "_")

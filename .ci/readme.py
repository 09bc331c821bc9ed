"""Writes the generated parts of README.md: options, settings and the tree of files.

`python .ci/readme.py` rewrites them; `--check` only compares, and exits with 1 when README.md is out of date.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

from mistral_nb.config import SETTINGS
from mistral_nb.types import FIELDS
from mistral_nb_magics.options import OPTION_FIELDS, flag

ROOT = Path(__file__).resolve().parent.parent
CHAT = "magics/mistral_nb_magics/chat/static/"
CHAT_NOTES = {
    "attach.js": "the menu of variables, cells and the last error, and `{{name}}` in the text",
    "blocks.js": "an answer's blocks: markup changed where it differs, and code as text with coloured runs",
    "chat.css": "the chat and its bar",
    "chat.js": "one view of a chat, and the module that anywidget loads",
    "composer.css": "the composer, and the lines above it",
    "composer.js": "what is typed, what goes with it, and the keys that send, stop and recall",
    "dom.js": "elements, icons, the clipboard and downloads",
    "header.js": "the bar above the conversation",
    "keep.js": "the chat as a file that the page makes itself, where there is no kernel to make it",
    "menus.js": "menus of buttons, by click and by key",
    "notebook.js": "the notebook around the chat: its kernel's state, its cells and outputs",
    "slider.css": "the slider of an adapter's scale",
    "slider.js": "the slider of an adapter's scale",
    "store.js": "what a chat shows, from snapshots, turns and patches",
    "text.css": "the text of an answer",
    "transcript.css": "the conversation",
    "turns.js": "rows of one question with its answer, or its answers side by side",
    "wire.js": "the line to the kernel: numbered messages and their answers",
}
NOTES = {
    **{CHAT + name: text for name, text in CHAT_NOTES.items()},
    ".ci/run": "the whole check from a clean checkout",
    ".gitignore": "what git leaves out",
    "CHANGELOG.md": "what changed, by version",
    "LICENSE": "Apache-2.0",
    "Makefile": "demo, test, soak, check, lab, bench, gpu",
    "README.md": "this page",
    "constraints.txt": "the exact versions that are tested",
    "pyproject.toml": "packages, dependencies, and the settings of ruff, mypy and pytest",
    "kernels/README.md": "the ops: math, shapes, bytes and FLOPs, and what their machine code uses",
    "kernels/results/NOTES.md": "what was expected of each tuning step, and what came of it",
    "kernels/mistral_nb_kernels/configs.json": "how each kernel is cut up on each architecture",
    "tests/engine/pride_and_prejudice.txt": "the beginning of a book in the public domain, for perplexity",
    "examples/answer.png": "the picture above",
    "examples/chat-dark.png": "a chat that compares, from the browser tests",
    "examples/chat-light.png": "a chat, from the browser tests",
    "mistral_nb/server/static/playground.html": "the page that a browser gets from a server",
    "examples/kernel_benchmarks.ipynb": "the kernel bench on a CPU, executed in the tests",
    "examples/write_a_kernel.ipynb": "candidates for an op, right and wrong, executed in the tests",
    "examples/lora.ipynb": "an adapter trained with peft and served, executed in the tests",
    "examples/quickstart.ipynb": "the first ten minutes, executed in the tests",
}
TYPED = "marks the package as typed"


def options() -> str:
    """The table of request fields, as Markdown."""
    lines = ["| option of `%%mistral` | field | range | default | |", "|---|---|---|---|---|"]
    for field in FIELDS:
        default = "" if field.default is None else f"`{field.default}`"
        option = f"`{flag(field)}`" if field in OPTION_FIELDS else "the cell"
        extension = " Local engine only." if field.local_only else ""
        lines.append(f"| {option} | `{field.name}` | {field.bounds} | {default} | {field.help}{extension} |")
    return "\n".join(lines)


def settings() -> str:
    """The table of settings, as Markdown."""
    lines = ["| setting | environment | default | |", "|---|---|---|---|"]
    for setting in SETTINGS:
        default = "" if setting.default is None else f"`{setting.default}`"
        variables = ", ".join(f"`{name}`" for name in setting.variables)
        lines.append(f"| `{setting.name}` | {variables} | {default} | {setting.help} |")
    return "\n".join(lines)


def files() -> list[str]:
    """Every file of the project that git knows or would add, sorted, folders after the files beside them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    paths = {path for path in listed if path and (ROOT / path).is_file()}
    return sorted(paths, key=lambda path: [(rest != "", part) for part, rest in _steps(path)])


def _steps(path: str) -> list[tuple[str, str]]:
    """Each part of a path with what comes below it: a/b gives (a, b), (b, "")."""
    parts = path.split("/")
    return [(part, "/".join(parts[i + 1 :])) for i, part in enumerate(parts)]


def tree() -> str:
    """One line for each file and folder: its name and the first line of its docstring."""
    lines: list[str] = []
    shown: set[PurePosixPath] = set()
    for path in map(PurePosixPath, files()):
        for folder in reversed([p for p in path.parents if p.name and p not in shown]):
            shown.add(folder)
            lines.append("  " * (len(folder.parts) - 1) + f"{folder.name}/")
        name = "  " * (len(path.parts) - 1) + path.name
        lines.append(f"{name:<32} {note(str(path))}".rstrip())
    return "```text\n" + "\n".join(lines) + "\n```"


def note(path: str) -> str:
    """What the file is for, in one line; `KeyError` for a file that says it nowhere."""
    if path.endswith(".py"):
        text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        if not text:
            raise KeyError(f"{path} has no docstring: its first line is the file's line in README.md")
        return re.split(r"\n\n|\.\s|\.$", text)[0].replace("\n", " ")
    return TYPED if path.endswith("py.typed") else NOTES[path]


PARTS = {"options": options, "settings": settings, "tree": tree}


def generate(readme: str) -> str:
    """`readme` with the generated parts made anew."""
    for name, write in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, found, rest = readme.partition(start)
        _, found_end, tail = rest.partition(end)
        if not (found and found_end):
            raise SystemExit(f"README.md lacks the marks of its part {name!r}")
        readme = f"{head}{start}\n{write()}\n{end}{tail}"
    return readme


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = generate(old)
    if new == old:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md is out of date: run `make format`", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

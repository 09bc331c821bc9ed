"""The tree's rules: who may import whom, what an import pulls in, how long a file is, what README.md says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mistral_nb.types import FIELDS

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "magics")
PACKAGES = ("mistral_nb", "mistral_nb_kernels", "mistral_nb_magics")
MAX_LINES = 500


@dataclass(frozen=True)
class Layer:
    """Modules under `name` may import `own` and `others`, each with all that is below it, but nothing in `never`."""

    name: str
    own: tuple[str, ...]
    others: tuple[str, ...]
    never: tuple[str, ...] = ()


# The longest name that fits a module is its layer.
LAYERS = (
    Layer("mistral_nb_kernels", own=("mistral_nb_kernels",), others=("torch", "triton", "numpy")),
    Layer(
        "mistral_nb.engine",
        own=(
            "mistral_nb.engine",
            "mistral_nb.checkpoints",
            "mistral_nb.hardware",
            "mistral_nb.functions",
            "mistral_nb.python_signature",
            "mistral_nb_kernels",
            "mistral_nb.types",
            "mistral_nb.errors",
        ),
        others=("torch", "triton", "safetensors", "tokenizers", "numpy"),
    ),
    Layer(
        "mistral_nb.checkpoints",
        own=("mistral_nb.checkpoints", "mistral_nb.hardware", "mistral_nb.types", "mistral_nb.errors"),
        others=(),
    ),
    Layer(
        "mistral_nb.server",
        own=("mistral_nb",),
        others=("starlette", "uvicorn"),
        never=("mistral_nb.backends",),
    ),
    Layer("mistral_nb.rendering", own=("mistral_nb.rendering", "mistral_nb.safe_markdown"), others=()),
    Layer(
        "mistral_nb_magics.chat",
        own=("mistral_nb_magics", "mistral_nb"),
        others=("IPython", "traitlets", "ipywidgets", "anywidget"),
        never=("mistral_nb.engine", "mistral_nb.server"),
    ),
    Layer(
        "mistral_nb_magics",
        own=("mistral_nb_magics", "mistral_nb"),
        others=("IPython", "traitlets", "pygments", "markdown_it"),
        never=("mistral_nb.engine", "mistral_nb.server"),
    ),
    Layer(
        "mistral_nb",
        own=("mistral_nb",),
        others=("httpx", "httpx_sse", "platformdirs"),
        never=("mistral_nb.engine", "mistral_nb.server"),
    ),
)
# (module, what it may import besides its layer's)
BESIDES = {
    ("mistral_nb.engine.bench_probe", "mistral_nb.bench_peers"),
    ("mistral_nb.engine.random_weights", "mistral_nb.bench_peers"),
    ("mistral_nb.engine.chat_template", "jinja2"),
    ("mistral_nb.engine.template_sandbox", "jinja2"),
    ("mistral_nb.engine.vocabulary", "sentencepiece"),
    ("mistral_nb.models.gguf_import", "gguf"),
    ("mistral_nb.models.gguf_weights", "gguf"),
    ("mistral_nb.models.hub", "huggingface_hub"),
    ("mistral_nb.models.hub_listing", "huggingface_hub"),
    ("mistral_nb.models.gguf_weights", "numpy"),
    ("mistral_nb.safe_markdown", "markdown_it"),
    ("mistral_nb.server.connections", "h11"),
    ("mistral_nb.chat.export", "markdown_it"),
    ("mistral_nb.chat.references", "markdown_it"),
    ("mistral_nb.rendering.highlight", "pygments"),
    ("mistral_nb.rendering.mathml", "latex2mathml"),
    ("mistral_nb.rendering.parsing", "markdown_it"),
    ("mistral_nb.demo", "jupyter_client"),
    ("mistral_nb.demo", "ipykernel"),
    ("mistral_nb.demo", "nbclient"),
    ("mistral_nb.demo", "nbformat"),
}
# The same, but inside functions only, so that importing the module stays light.
LAZY = {
    ("mistral_nb", "mistral_nb_magics"),
    *(("mistral_nb.bench_peers", name) for name in ("generate", "llama_cpp", "model", "torch", "transformers", "vllm")),
    ("mistral_nb.engine.grammar", "llguidance"),
    ("mistral_nb.cli", "mistral_nb.engine"),
    ("mistral_nb.cli", "mistral_nb.server"),
    ("mistral_nb.cli", "mistral_nb_kernels"),
    ("mistral_nb.bench_plots", "matplotlib"),
    *((f"mistral_nb_kernels.bench.{name}", "matplotlib") for name in ("figures", "marks", "results", "roofline")),
    ("mistral_nb_magics.bench.surface", "pandas"),
}
# Only the engine's surface and its text side are the server's business.
ENGINE_SURFACE = ("mistral_nb.engine", "mistral_nb.engine.tokenizer")


@dataclass(frozen=True)
class Import:
    """`module` imports `target` on `line`; `lazy` when inside a function."""

    module: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}{' (inside a function)' if self.lazy else ''}"


def modules() -> dict[str, Path]:
    """Every module of the three packages, by its import name."""
    found = {}
    for root, package in zip(SOURCE_ROOTS, PACKAGES, strict=True):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, tree: ast.AST, known: set[str], *, package: bool) -> Iterator[Import]:
    """Every import statement but those under `if TYPE_CHECKING`; `from a import b` gives a.b where that is a module."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, lazy = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            stack.extend((child, lazy) for child in node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                name = "." * node.level + source
                source = importlib.util.resolve_name(name, module if package else module.rpartition(".")[0])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(module, whole if whole in known else source, node.lineno, lazy)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (Import(module, str(name), node.lineno, lazy) for name in names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def within(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def allowed(item: Import) -> bool:
    if item.target.partition(".")[0] in sys.stdlib_module_names:
        return True
    layer = max((layer for layer in LAYERS if within(item.module, (layer.name,))), key=lambda layer: len(layer.name))
    exceptions = BESIDES | LAZY if item.lazy else BESIDES
    if any(item.module == module and within(item.target, (target,)) for module, target in exceptions):
        return True
    if layer.name == "mistral_nb.server" and within(item.target, ("mistral_nb.engine",)):
        return item.target in ENGINE_SURFACE
    return within(item.target, layer.own + layer.others) and not within(item.target, layer.never)


def violations(sources: dict[str, Path]) -> list[str]:
    known = set(modules()) | set(sources)
    found: set[str] = set()
    for module, path in sources.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = path.name == "__init__.py"
        found |= {str(item) for item in imports_of(module, tree, known, package=package) if not allowed(item)}
    return sorted(found)


def test_dependencies_point_one_way() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mistral_nb.chat", "import torch"),
        ("mistral_nb.chat", "def f():\n    from mistral_nb.engine import Engine"),
        ("mistral_nb.chat", "def f():\n    import mistral_nb_magics"),
        ("mistral_nb.engine.bad", "from mistral_nb import config"),
        ("mistral_nb.engine.bad", "from IPython.display import display"),
        ("mistral_nb.server.bad", "from mistral_nb.engine.model import Transformer"),
        ("mistral_nb.server.bad", "import torch"),
        ("mistral_nb.cli", "from mistral_nb.server import app"),
        ("mistral_nb_kernels.bad", "from mistral_nb.errors import MistralError"),
        ("mistral_nb_magics.bad", "import importlib\nimportlib.import_module('mistral_nb.server')"),
        ("mistral_nb_magics.bad", "import ipywidgets"),
        ("mistral_nb_magics.chat.bad", "from mistral_nb.engine import Engine"),
        ("mistral_nb.rendering.bad", "from mistral_nb.chat import Turn"),
        ("mistral_nb_magics.bad", "try:\n    import torch\nexcept ImportError:\n    pass"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "source.py"
    path.write_text(source)
    assert len(violations({module: path})) == 1


def fresh(code: str) -> dict[str, Any]:
    """Runs `code` in a new interpreter with the three source roots; it prints one line of JSON last."""
    program = f"import sys\nsys.path[:0] = {[str(root) for root in SOURCE_ROOTS]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HEAVY = (
    *("IPython", "anywidget", "gguf", "httpx", "huggingface_hub", "ipywidgets", "jinja2", "latex2mathml"),
    *(
        "llguidance",
        "markdown_it",
        "numpy",
        "pygments",
        "safetensors",
        "sentencepiece",
        "starlette",
        "tokenizers",
        "torch",
    ),
    *("transformers", "uvicorn"),
)


def test_import_of_the_package_is_light() -> None:
    seen = fresh(
        "import json, time\nbefore = time.perf_counter()\nimport mistral_nb\n"
        "print(json.dumps({'ms': (time.perf_counter() - before) * 1e3, 'modules': sorted(sys.modules)}))"
    )
    print(f"import mistral_nb: {seen['ms']:.0f} ms beyond the interpreter (the bar is 150 ms)")
    assert [name for name in HEAVY if name in seen["modules"]] == []


LOAD_EXT = """
import json, time
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
before, start = set(sys.modules), time.perf_counter()
shell.extension_manager.load_extension("mistral_nb")
print(json.dumps({
    "ms": (time.perf_counter() - start) * 1e3,
    "modules": sorted(set(sys.modules) - before),
    "magics": {kind: "mistral" in names for kind, names in shell.magics_manager.lsmagic().items()},
    "help": (shell.find_cell_magic("mistral") or shell).__doc__,
}))
"""


def test_load_ext_is_light_and_registers_the_magic() -> None:
    seen = fresh(LOAD_EXT)
    print(f"%load_ext mistral_nb: {seen['ms']:.0f} ms beyond IPython (the bar is 150 ms)")
    assert seen["magics"] == {"line": True, "cell": True}
    assert [name for name in ("httpx", "ipywidgets", "numpy", "torch", "transformers") if name in seen["modules"]] == []


def test_the_engine_needs_no_notebook_and_no_http() -> None:
    """So that engine and kernels run on a bare GPU host from the source roots alone."""
    seen = fresh("import json\nimport mistral_nb.engine\nprint(json.dumps({'modules': sorted(sys.modules)}))")
    unwanted = ("IPython", "anywidget", "httpx", "ipywidgets", "platformdirs", "starlette", "traitlets", "uvicorn")
    assert [name for name in unwanted if name in seen["modules"]] == []


@pytest.mark.parametrize("name", ["mistral_nb", "mistral_nb.engine", "mistral_nb_kernels", "mistral_nb_magics"])
def test_each_package_says_what_is_public(name: str) -> None:
    assert importlib.import_module(name).__all__


@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__main__")])
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [item for item in public if not hasattr(module, item)] == []
    assert len(set(public)) == len(public)


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    """The generator of README.md's generated parts."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_file_is_too_long(readme: ModuleType) -> None:
    """The README's tree, which is made by a program and has a line for each file, does not count."""
    lengths = {}
    for path in readme.files():
        if path.endswith((".py", ".js", ".css", ".md", ".html")) or path in (".ci/run", "Makefile"):
            lengths[path] = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    lengths["README.md"] -= len(readme.tree().splitlines())
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_readme_names_every_file_and_every_option(readme: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.generate(text) == text, "README.md is out of date: run `make format`"
    missing = [path for path in readme.files() if f"{Path(path).name} " not in text]
    assert missing == []


def test_the_magic_takes_every_field() -> None:
    seen = fresh(LOAD_EXT)
    options = [field.name.replace("_", "-") for field in FIELDS if field.kind != "messages" and field.name != "prompt"]
    assert [name for name in options if f"--{name}" not in seen["help"] and f"--no-{name}" not in seen["help"]] == []

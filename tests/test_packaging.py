"""What a user gets: the wheel's contents and metadata, and a base install that works without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import mistral_nb

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "mistral_nb": ROOT / "mistral_nb",
    "mistral_nb_kernels": ROOT / "kernels" / "mistral_nb_kernels",
    "mistral_nb_magics": ROOT / "magics" / "mistral_nb_magics",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "build", "dist")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "./source"]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("mistral_nb-*.whl"))


def test_the_wheel_holds_each_package_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(archive.read(name).decode())
    assert metadata["Version"] == mistral_nb.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    needs = metadata.get_all("Requires-Dist")
    base = {need for need in needs if "extra ==" not in need}
    assert not [need for need in base if need.startswith(("torch", "triton", "tokenizers", "transformers"))]
    assert [need for need in needs if need.startswith("torch") and 'extra == "local"' in need]
    scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "mistral-nb = mistral_nb.cli:main" in scripts


@pytest.fixture(scope="module")
def base_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the base install alone."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([*pip, "install", "-qq", "-c", constraints, str(wheel)], check=True, cwd=folder)
    return python


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python` with settings of its own, so that the user's neither help nor hurt."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MISTRAL_NB_", "CLOUDFLARE_"))}
    names = ("HOME", "RUNTIME_DIR", "LOG_DIR", "CONFIG")
    own = {
        "IPYTHONDIR": str(folder / "ipython"),
        **{f"MISTRAL_NB_{name}": str(folder / name.lower()) for name in names},
    }
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=folder, env={**kept, **own}, capture_output=True, text=True, check=False)


def test_a_base_install_says_the_command_for_the_local_engine(base_python: Path, tmp_path: Path) -> None:
    done = run(base_python, tmp_path, "-c", "import mistral_nb; mistral_nb.ask('hi')")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingDependency" in last
    assert "pip install 'mistral-nb[local]'" in last.replace('"', "'")


def test_a_base_install_has_its_magic_and_its_command(base_python: Path, tmp_path: Path) -> None:
    version = run(base_python, tmp_path, "-m", "mistral_nb", "--version")
    assert version.stdout.strip().endswith(mistral_nb.__version__), version.stderr
    script = tmp_path / "session.ipy"
    script.write_text("%load_ext mistral_nb\n%mistral status\n%mistral help\n")
    done = run(base_python, tmp_path, "-m", "IPython", "--no-banner", "--colors=NoColor", str(script))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "--temperature" in done.stdout

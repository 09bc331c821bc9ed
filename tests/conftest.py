"""What every test shares: folders and settings of their own, and the marked groups' conditions.

What it imports at once is on a bare GPU host too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

SETTINGS = ("MISTRAL_NB_", "CLOUDFLARE_")
LONGEST = (
    "tests/examples/test_lora.py",
    "tests/examples/test_kernel_notebooks.py",
    "tests/engine/test_adapters_embedded.py",
    "tests/test_bench_load.py",
    "tests/engine/test_engine.py",
    "tests/soak",
)
"""They come first: begun last, one would keep a worker long after the others have nothing left."""
FOLDERS = ("MISTRAL_NB_RUNTIME_DIR", "MISTRAL_NB_LOG_DIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run under Triton's interpreter, which its first import decides; with `-m gpu` they run as they are.

    A worker of pytest-xdist keeps to its share of the CPUs, with all that it starts. So the threads of one never wait,
    spinning, for a CPU that another's have: five times as long for the engine's.
    """
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
        number, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[number % len(cpus) :: workers])


def pytest_collection_finish() -> None:
    """By now every test module has been imported; engines that tests start are not to interpret."""
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No account, no user's configuration file, and a runtime and a log folder that end with the session.

    `MISTRAL_NB_HOME` stays: a store that the caller names is used, so that a model is pulled once. Engines that are
    left over are ended.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(SETTINGS) and name != "MISTRAL_NB_HOME":
                patch.delenv(name)
        folder = tmp_path_factory.mktemp("settings")
        for name in FOLDERS:
            (folder / name.lower()).mkdir(mode=0o700)
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("MISTRAL_NB_CONFIG", str(folder / "config.toml"))
        yield
        if list((folder / "mistral_nb_runtime_dir").glob("engine-*.json")):
            from mistral_nb import config, engine_control

            engine_control.stop(config.Settings(), force=True)


@pytest.fixture(scope="session")
def embedded(own_settings: None) -> Path:
    """The embedded model's folder; pulled once, with the user's own pip settings, if the store does not hold it."""
    from mistral_nb import models

    return models.pull("embedded")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser that the `browser` group drives; skips where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on the PATH: the browser group needs one (Debian: apt-get install chromium)")
    return path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or (has_gpu() and config.option.markexpr == "gpu"):
        return
    reason = "kernels are interpreted here: make gpu" if has_gpu() else "no NVIDIA GPU that torch sees"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()

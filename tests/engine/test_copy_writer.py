"""Writing packed copies: in the background, under another name until it is whole, and never in the way."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.engine import packed_copy
from mistral_nb.engine.packed_copy import copy_folder
from tests.engine.copies import CPU, TIMEOUT, load, place_of, write
from tests.engine.test_quantising import CONFIG


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_copy, "DELAY", 0.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_without_room_none_is_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made, _ = load(model)
    free = packed_copy.MARGIN + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert not write(made, place_of(model)).exists()
    assert "no packed copy is written: it takes 0.00 GB of the 2.00 that are free" in caplog.text


def test_where_nothing_can_be_written_the_log_tells(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _ = load(model)
    (model / "packed").write_text("a file is in the way")
    assert not write(made, place_of(model)).exists()
    assert "no packed copy was written: " in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from mistral_nb.engine import Engine, packed_copy
packed_copy.DELAY = 0
packed_copy.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
engine = Engine.load(Path(sys.argv[1]), device="cpu", precision=sys.argv[2], packed_copy=Path(sys.argv[1], "packed"))
engine._copying.wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nobody can be killed so there")
def test_what_a_killed_process_left_goes_with_the_next_loading(model: Path) -> None:
    """At once, and though that one needs no copy, or has a whole one of its own."""
    path = write(load(model)[0], place_of(model))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for precision in ("int4", "bf16"):
        done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(model), "int8"], env=env, capture_output=True)
        assert list(path.parent.glob("int8.safetensors.*.part")), done.stderr.decode()
        copy_folder(model / "packed", open_checkpoint(model), precision, CPU)  # type: ignore[arg-type]
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be removed there")
def test_on_a_disk_without_locks_only_what_is_old_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    place = place_of(model)
    place.folder.mkdir()
    young, old = (place.folder / f"int8.safetensors.{name}.part" for name in ("young", "old"))
    for unfinished in (young, old):
        unfinished.write_bytes(b"begun")
    os.utime(old, (0, 0))
    copy_folder(place.folder, open_checkpoint(model), "bf16", CPU)
    assert list(place.folder.iterdir()) == [young]


@pytest.mark.skipif(sys.platform == "win32", reason="what is open cannot be removed there")
def test_one_that_another_engine_is_writing_is_left_to_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    syncing, go_on = threading.Event(), threading.Event()

    def sync(file: int) -> None:
        syncing.set()
        assert go_on.wait(TIMEOUT)

    made, _ = load(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        first = place_of(model).write(made, lambda: False)
        assert first
        assert syncing.wait(TIMEOUT)
        second = place_of(model).write(made, lambda: False)
        assert second
        assert second.wait(TIMEOUT)
        assert "another engine is writing" in caplog.text
        go_on.set()
        assert first.wait(TIMEOUT)
    assert place_of(model).open()


def test_little_is_on_its_way_to_the_disk_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that stopping waits for little, and only a whole file gets the copy's name."""
    monkeypatch.setattr(packed_copy, "PIECE", 1 << 10)
    monkeypatch.setattr(packed_copy, "SYNCED", 1 << 13)
    sizes = [0]
    real = os.fsync

    def sync(file: int) -> None:
        assert not place.path.exists()
        sizes.append(os.fstat(file).st_size)
        real(file)

    place = place_of(model)
    monkeypatch.setattr(os, "fsync", sync)
    write(load(model)[0], place)
    steps = [after - before for before, after in itertools.pairwise(sizes)]
    assert len(steps) > 4
    assert min(steps[:-1]) >= 1 << 13
    assert max(steps) < (1 << 13) + (1 << 10) + 8192, "with the header"
    assert sizes[-1] == place.path.stat().st_size


def test_a_writer_that_is_stopped_while_the_disk_is_slow(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for what is on its way, and for nothing more."""
    monkeypatch.setattr(packed_copy, "PIECE", 1 << 10)
    monkeypatch.setattr(packed_copy, "SYNCED", 1 << 13)
    begun, synced = threading.Event(), []
    stopping = threading.Event()

    def sync(file: int) -> None:
        synced.append(1)
        begun.set()
        assert stopping.wait(TIMEOUT)

    monkeypatch.setattr(os, "fsync", sync)
    writer = place_of(model).write(load(model)[0], lambda: False)
    assert writer
    assert begun.wait(TIMEOUT)
    stopper = threading.Thread(target=writer.stop)
    stopper.start()
    assert writer._stopped.wait(TIMEOUT)
    stopping.set()
    stopper.join(TIMEOUT)
    assert synced == [1]
    assert list((model / "packed").iterdir()) == []


def test_on_a_gpu_one_stream_out_of_anothers_pool_takes_the_copy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured on one of the 32 streams of the usual priority, which torch hands out in turn."""
    streams: list[dict[str, object]] = []
    taken: list[object] = []

    @contextmanager
    def stream(entered: object) -> Iterator[None]:
        taken.append(entered)
        yield

    real = packed_copy._own_stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, **options: streams.append(options) or len(streams))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(packed_copy, "_own_stream", lambda device: real(torch.device("cuda")))
    made, _ = load(model)
    assert write(made, place_of(model)).exists()
    assert streams == [{"priority": -1}]
    assert taken == [1]


def test_a_writer_that_is_stopped_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a file nor the weights; until then the copy has another name."""
    monkeypatch.setattr(packed_copy, "PIECE", 64)
    begun = threading.Event()
    seen: list[list[str]] = []

    def busy() -> bool:
        seen.append([path.suffix for path in (model / "packed").iterdir()])
        if len(seen) > 3:
            begun.set()
        return True

    made, _ = load(model)
    kept = weakref.ref(made.layers[0].wqkv.packed)
    writer = place_of(model).write(made, busy)
    assert writer
    assert begun.wait(TIMEOUT)
    writer.stop()
    del made
    gc.collect()
    assert kept() is None
    assert seen[0] == [".part"]
    assert list((model / "packed").iterdir()) == []


def test_beside_an_answer_it_writes_a_tenth_of_the_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a pause when nobody waits."""
    waits: list[float] = []
    answering = [True, False]
    now = [0.0]

    def monotonic() -> float:
        now[0] += 0.5
        return now[0]

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return False

    made, _ = load(model)
    monkeypatch.setattr(packed_copy, "threading", SimpleNamespace(**{**vars(threading), "Event": Stopped}))
    monkeypatch.setattr(packed_copy, "time", SimpleNamespace(monotonic=monotonic, time=time.time))
    writer = place_of(model).write(made, lambda: answering.pop(0) if answering else False)
    assert writer
    assert writer.wait(TIMEOUT)
    assert waits[1] == pytest.approx(4.5)
    assert set(waits[2:]) == {0}

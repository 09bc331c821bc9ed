"""Packed copies: the same weights, less to read, and never in the way."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mistral_nb import models
from mistral_nb.checkpoints import Precision, open_checkpoint
from mistral_nb.engine import Engine, packed_copy, weights
from mistral_nb.engine import engine as engines
from mistral_nb.engine.packed_copy import PackedCopy, copy_folder
from mistral_nb.engine.weights import load_weights
from mistral_nb.errors import ModelError
from tests.checkpoints.tiny import hugging_face
from tests.engine.copies import CPU, TIMEOUT, load, place_of, write
from tests.engine.test_quantising import CONFIG, assert_equal, load_for_a_gpu


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_copy, "DELAY", 0.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_second_loading_is_the_first_but_for_what_it_reads(model: Path, precision: Precision) -> None:
    first, whole = load(model, precision)
    path = write(first, place_of(model, precision))
    assert list(path.parent.iterdir()) == [path]
    second, read = load(model, precision)
    assert_equal(first, second)
    plain = sum(t.end - t.start for n, t in open_checkpoint(model).tensors.items() if "norm" in n or "tok_emb" in n)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert read == plain + path.stat().st_size - header < whole
    assert place_of(model, precision).write(second, lambda: False) is None


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_gpus(model: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 lies as on the CPU, int4 does not: each then makes its own, and leaves the other's."""
    first = load_for_a_gpu(model, precision, monkeypatch)
    place = place_of(model, precision, torch.device("cuda"))
    write(first, place)
    assert_equal(first, load_for_a_gpu(model, precision, monkeypatch, packed_copy=place.open()))
    assert (place_of(model, precision).open() is None) == (precision == "int4")
    assert place.open()


def test_only_what_was_converted_has_copies(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert copy_folder(None, checkpoint, "int8", CPU) is None
    assert copy_folder(model / "packed", checkpoint, "bf16", CPU) is None
    assert copy_folder(model / "packed", checkpoint, "int8", CPU)


def changed_model(path: Path, patch: pytest.MonkeyPatch) -> None:
    os.utime(path.parent.parent / "model.safetensors", ns=(0, 0))


def other_format(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packed_copy, "FORMAT", "0")


def cut_short(path: Path, patch: pytest.MonkeyPatch) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path, patch: pytest.MonkeyPatch) -> None:
    os.truncate(path, 0)


def nonsense(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"\xff" * 4096)


def no_metadata(path: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(path.read_bytes().replace(b'"__metadata__"', b'"__metadatb__"'))


def of_another_layout(path: Path, patch: pytest.MonkeyPatch) -> None:
    name = packed_copy._layout(CPU).encode()
    path.write_bytes(path.read_bytes().replace(name, b"x" * len(name)))


@pytest.mark.parametrize(
    "spoil", [changed_model, other_format, of_another_layout, cut_short, empty, nonsense, no_metadata]
)
def test_one_that_is_not_as_it_should_be_is_made_again(
    model: Path, spoil: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, _ = load(model)
    path = write(first, place_of(model))
    spoil(path, monkeypatch)  # type: ignore[operator]
    assert place_of(model).open() is None
    assert "it is made again" in caplog.text
    assert str(path) in caplog.text
    assert not path.exists()
    write(first, place_of(model))
    assert place_of(model).open()


def test_those_that_lie_in_different_ways_are_side_by_side(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of processors that share a folder each finds its own again; of two versions of torch the newest has it."""
    made, _ = load(model)
    paths = set()
    for torchs in ("2.13.0+cpu", "2.14.0+cpu"):
        for instructions in ("AVX2", "AVX512"):
            monkeypatch.setattr(torch, "__version__", torchs)
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=instructions: name)
            for first in (True, False):
                place = place_of(model)
                assert (place.open() is None) == first
                if first:
                    paths.add(write(made, place))
    assert set((model / "packed").iterdir()) == paths
    assert len(paths) == 2


def test_one_that_is_cut_short_while_it_is_read_does_not_matter(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, whole = load(model)
    path = write(first, place_of(model))
    opened = place_of(model).open()
    os.truncate(path, path.stat().st_size // 2)
    read: list[int] = []
    checkpoint = open_checkpoint(model)
    again = load_weights(checkpoint, "int4", CPU, lambda done, total: read.append(total), packed_copy=opened)
    assert_equal(first, again)
    assert read[-1] == whole
    assert "was cut short while it was being read" in caplog.text
    assert not path.exists()


def test_one_that_lacks_a_tensor_does_not_matter(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = load(model)
    place = place_of(model)
    write(first, place)
    opened = place.open()
    assert opened
    lacking = PackedCopy(opened.path, {k: v for k, v in opened._tensors.items() if k != "layers.1.w2.affine"})
    again = load_weights(open_checkpoint(model), "int4", CPU, packed_copy=lacking)
    assert_equal(first, again)
    assert "lacks the tensor layers.1.w2.affine" in caplog.text


def out_of_memory(path: Path, *arguments: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def checkpoint_unreadable(path: Path, *arguments: object) -> None:
    os.truncate(path / "model.safetensors", 10_000)


def checkpoint_changed(path: Path, *arguments: object) -> None:
    os.utime(path / "model.safetensors", ns=(0, 0))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (out_of_memory, torch.OutOfMemoryError),
        (checkpoint_unreadable, ModelError),
        (checkpoint_changed, ModelError),
    ],
)
def test_what_is_no_fault_of_the_copy_leaves_it_there(
    model: Path, fault: Callable[..., None], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is loaded a second time."""
    place = place_of(model)
    write(load(model)[0], place)
    opened, checkpoint = place.open(), open_checkpoint(model)
    assert opened
    begun = []
    read_parts = weights.read_parts

    def reading(*arguments: object, **options: object) -> None:
        begun.append(1)
        fault(model)
        read_parts(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "read_parts", reading)
    with pytest.raises(error):
        load_weights(checkpoint, "int4", CPU, packed_copy=opened)
    assert begun == [1]
    assert place.path.exists()


def test_an_engine_writes_one_and_takes_it(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = model / "packed"
    for text in ("wrote the packed copy", f"out of {folder}"):
        caplog.clear()
        engine = Engine.load(model, device="cpu", precision="int4", packed_copy=folder)
        if engine._copying:
            assert engine._copying.wait(TIMEOUT)
        engine.close()
        assert text in caplog.text
    plain = Engine.load(model, device="cpu", precision="fp32", packed_copy=folder)
    plain.close()
    assert list(folder.iterdir()) == [place_of(model).path]


def test_memory_is_given_back_when_engine_and_writer_have_let_the_weights_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_copy, "DELAY", TIMEOUT)
    gone: list[bool] = []

    def give_back(device: torch.device) -> None:
        gc.collect()
        gone.append(kept() is None)

    monkeypatch.setattr(engines, "give_back", give_back)
    engine = Engine.load(model, device="cpu", precision="int8", packed_copy=model / "packed")
    kept = weakref.ref(engine._runner._model.weights.layers[0].wqkv.values)  # type: ignore[attr-defined]
    assert engine._copying
    assert not engine._copying.wait(0)
    engine.close()
    assert gone == [True]


def test_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy counts in a model's size, is nobody's file, and goes with the model. The user's own folder has none."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    source = hugging_face(tmp_path / "source")
    models.pull(str(source), store_name="mine")
    folder = models.packed_folder("mine")
    assert folder
    before = models.installed()[0].bytes
    engine = Engine.load(folder.parent, device="cpu", precision="int8", packed_copy=folder)
    assert engine._copying
    assert engine._copying.wait(TIMEOUT)
    engine.close()
    size = (folder / "int8.safetensors").stat().st_size
    assert models.installed()[0].bytes == before + size
    for name in ("int4-cuda", "int4-cpu-avx2"):
        (folder / f"{name}.safetensors").write_bytes(bytes(1000))
    assert models.installed()[0].bytes == before + size + 2000
    assert models.verify("mine") == []
    (folder.parent / "model.safetensors").write_bytes(b"broken")
    models.pull(str(source), store_name="mine")
    assert not folder.exists(), "a pull replaces what pulls and the engine have made"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    assert models.remove("mine") == before + (source / "config.json").stat().st_size
    assert not folder.parent.exists()
    assert models.packed_folder(str(source)) is None
    (tmp_path / "home" / "models" / "linked").symlink_to(source)
    assert models.packed_folder("linked") is None

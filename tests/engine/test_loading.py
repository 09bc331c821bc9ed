"""Loading a checkpoint: how much memory it takes, what it tells meanwhile, and files that change under it."""

from __future__ import annotations

import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistral_nb.bench_load import make_checkpoint
from mistral_nb.checkpoints import ModelArgs, open_checkpoint
from mistral_nb.checkpoints.memory import Precision, estimate
from mistral_nb.engine import Engine, assembly, weights
from mistral_nb.engine.arena import Arena
from mistral_nb.engine.load_probe import memory
from mistral_nb.engine.model import Weights
from mistral_nb.engine.reading import Part, read_parts
from mistral_nb.engine.weights import load_weights
from mistral_nb.errors import ConfigurationError, ModelError
from mistral_nb_kernels import Int8Cpu
from mistral_nb_kernels import reference as ops
from tests.checkpoints.tiny import hugging_face, sharded
from tests.engine.sparse_checkpoint import BYTES_A_LAYER, memory_to_exceed, sparse_checkpoint

CPU = torch.device("cpu")
WITH_TORCH, BESIDE, KEPT = 300_000_000, 100_000_000, 70_000_000
"""Bytes beside the weights: of the whole process at its peak, of what loading takes then, and of what it leaves."""


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("load") / "checkpoint"
    make_checkpoint(folder, 2_000_000_000)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(("precision", "threads"), [("bf16", 2), ("int8", 8), ("int4", 8), ("fp32", 2)])
def test_a_loading_takes_little_more_than_the_weights(two_gigabytes: Path, precision: Precision, threads: int) -> None:
    """The whole process with interpreter and torch, of which a CUDA build is larger; in bf16 the weights are the
    checkpoint's bytes.
    """
    checkpoint = open_checkpoint(two_gigabytes)
    weights = estimate(checkpoint.args, precision, 1, "cpu").weights
    assert precision != "bf16" or weights == checkpoint.bytes
    assert len(checkpoint.files) > 4, "sharded"
    command = [sys.executable, "-P", "-m", "mistral_nb.engine.load_probe", str(two_gigabytes), "--precision", precision]
    command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    found = json.loads(done.stdout)
    head = checkpoint.args.vocab_size * checkpoint.args.dim if precision in ("int8", "int4") else 0
    assert found["peak"] - found["before"] < weights + head + BESIDE, f"{found}: the head is put into another order"
    assert found["after"] - found["before"] < weights + KEPT, found
    if precision == "bf16" and torch.version.cuda is None:
        assert found["peak"] < checkpoint.bytes + WITH_TORCH, found
    assert found["last_report"] == [checkpoint.bytes] * 2
    assert found["reports"] > 20


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_int8_does_not_depend_on_the_blocks_that_it_is_made_of(embedded: Path) -> None:
    """Bit by bit what quantising the whole stacked matrix gives. The output's rows come in many blocks."""
    weights = load_weights(open_checkpoint(embedded), "int8", CPU, threads=4)
    tensors = load_file(embedded / "model.safetensors")
    attention, mlp = "model.layers.7.self_attn.", "model.layers.7.mlp."
    parts = {
        "wqkv": [attention + name for name in ("q_proj", "k_proj", "v_proj")],
        "w13": [mlp + "gate_proj", mlp + "up_proj"],
        "output": ["model.embed_tokens"],
    }
    for name, stacked in parts.items():
        matrix = weights.output if name == "output" else getattr(weights.layers[7], name)
        matrix = matrix.plain if isinstance(matrix, Int8Cpu) else matrix
        values, scale = ops.quantize_int8(torch.cat([tensors[f"{part}.weight"] for part in stacked]).float())
        assert torch.equal(matrix.values, values), name
        assert torch.equal(matrix.scale, scale), name
    assert torch.equal(weights.tok_embeddings, tensors["model.embed_tokens.weight"].float())


def test_progress_counts_every_byte_and_may_end_the_loading(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "model"))
    told: list[tuple[int, int]] = []
    load_weights(checkpoint, "fp32", CPU, lambda done, total: told.append((done, total)))
    assert told[0] == (0, checkpoint.bytes)
    assert told[-1] == (checkpoint.bytes, checkpoint.bytes)
    assert told == sorted(told)

    def give_up(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_weights(checkpoint, "fp32", CPU, give_up)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the memory of a process is read from /proc")
def test_a_loading_that_was_ended_holds_no_memory_while_its_exception_is_kept(two_gigabytes: Path) -> None:
    checkpoint = open_checkpoint(two_gigabytes)
    before = memory("VmRSS")
    assert before
    held = []

    def give_up(done: int, total: int) -> None:
        if done > total // 2:
            held.append(memory("VmRSS"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        load_weights(checkpoint, "bf16", CPU, give_up)
    after = memory("VmRSS")
    assert after
    assert held[0] - before > checkpoint.bytes // 3, "there was something to give back"
    assert after - before < checkpoint.bytes // 8
    assert caught.value.__traceback__


def test_a_loading_that_failed_holds_no_tensor(tmp_path: Path) -> None:
    """In the thread that read, in the one that waited, and on the way from the error that was the cause."""
    checkpoint = open_checkpoint(sharded(tmp_path / "model"))
    (tmp_path / "model" / "model-00003-of-00003.safetensors").unlink()
    gc.collect()
    before = sum(type(each) is torch.Tensor for each in gc.get_objects())
    with pytest.raises(ModelError) as caught:
        load_weights(checkpoint, "int8", CPU)
    assert sum(type(each) is torch.Tensor for each in gc.get_objects()) == before
    assert caught.value.__cause__


@pytest.mark.parametrize("given_up", [True, False])
def test_threads_that_begin_later_have_as_many_for_torch_as_before(tmp_path: Path, given_up: bool) -> None:
    def progress(done: int, total: int) -> None:
        if given_up and done:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt) if given_up else nullcontext():
            load_weights(open_checkpoint(sharded(tmp_path / "model")), "fp32", CPU, progress)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("huge_pages", [True, False])
def test_weights_that_no_system_has_memory_for(huge_pages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not huge_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    with pytest.raises(ModelError, match=r"there is no memory for the model's weights .*; free some, or choose"):
        Arena(CPU).tensor((1 << 50,), torch.float32)


def test_a_file_that_is_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hugging_face(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model.safetensors was cut short while it was being read; fetch"):
        load_weights(checkpoint, "bf16", CPU)


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    """The last report comes after the last byte and before the files are looked at again."""
    checkpoint = open_checkpoint(hugging_face(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"

    def change(done: int, total: int) -> None:
        if done == total:
            os.utime(weights, ns=(0, 0))

    with pytest.raises(ModelError, match=r"model.safetensors was changed while it was being read; wait"):
        load_weights(checkpoint, "bf16", CPU, change)


def test_a_file_that_disappears(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path / "model"))
    gone = tmp_path / "model" / "model-00002-of-00003.safetensors"
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        load_weights(checkpoint, "bf16", CPU)


def test_what_does_not_fit_is_refused_before_memory_is_taken(embedded: Path, tmp_path: Path) -> None:
    """A model with weights of twice the memory in fp32, and of half of it in int8; then one of 2 in int8."""
    memory = memory_to_exceed()
    told: list[int] = []
    for layers, fits in ((memory // BYTES_A_LAYER, True), (4 * memory // BYTES_A_LAYER, False)):
        folder = sparse_checkpoint(tmp_path / str(layers), embedded, layers)
        with pytest.raises(ModelError, match="the model needs") as caught:
            Engine.load(folder, device="cpu", precision="fp32", progress=lambda done, total: told.append(done))
        assert ("what fits: --precision int8 --context" in str(caught.value)) is fits
    assert told == []


TRIED = "CUDA out of memory. Tried to allocate 4.00 GiB."


def test_memory_that_runs_out_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the weights or of the pages: the message says what would take less, and the exception holds no weights."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def no_pages(args: ModelArgs, made: Weights, *arguments: object) -> None:
        kept.append(weakref.ref(made.layers[0].wo.weight))  # type: ignore[union-attr]
        raise torch.OutOfMemoryError(TRIED)

    def half_read(parts: list[Part], *arguments: object, **options: object) -> None:
        kept.append(weakref.ref(parts[0].direct if parts[0].direct is not None else torch.empty(0)))
        read_parts(parts[:5], *arguments, **options)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError(TRIED)

    folder = hugging_face(tmp_path / "model")
    for module, name, fault in ((assembly, "_runner", no_pages), (weights, "read_parts", half_read)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            with pytest.raises(ModelError) as caught:
                Engine.load(folder, device="cpu", precision="bf16", context=2000)
        message = str(caught.value)
        assert message.startswith("memory of this machine ran out while the model was loaded; the model needs ")
        assert " in bf16 with a context of 2000 tokens (weights " in message
        assert " free now; what fits: --precision " in message
        assert "--precision bf16 --context 1024 (" in message
        assert kept.pop()() is None
        assert caught.value.__context__


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), torch.OutOfMemoryError(TRIED), None])
def test_a_gpu_has_its_memory_back_from_a_loading_that_fails(
    tmp_path: Path, fault: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the weights are gone. A loading that succeeds keeps torch's memory, for what comes next."""
    given: list[bool] = []
    first: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(first[0]() is None))
    monkeypatch.setattr(weights, "plain_dtype", lambda precision, device: torch.bfloat16)
    monkeypatch.setattr(weights, "Arena", lambda device: Arena(CPU))

    def read(parts: list[Part], progress: object, **options: object) -> None:
        first.append(weakref.ref(parts[0].direct if parts[0].direct is not None else torch.empty(0)))
        if fault:
            raise fault

    monkeypatch.setattr(weights, "read_parts", read)
    checkpoint = open_checkpoint(hugging_face(tmp_path / "model"))
    with pytest.raises(type(fault)) if fault else nullcontext():
        load_weights(checkpoint, "bf16", torch.device("cuda"))
    assert given == ([True] if fault else [])


def test_a_shorter_context_is_what_the_engine_has(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "model")
    for asked, given in ((100, 100), (None, 2048), (1 << 20, 2048)):
        engine = Engine.load(folder, device="cpu", precision="fp32", context=asked)
        assert engine.info.context == given
        engine.close()
    with pytest.raises(ConfigurationError, match="context = 0: must be at least 1 token"):
        Engine.load(folder, device="cpu", precision="fp32", context=0)

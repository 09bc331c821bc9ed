"""What the engine runs on: the device, the precision, and the memory that is free."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch

from mistral_nb.checkpoints import Checkpoint, ModelArgs, Precision, open_checkpoint
from mistral_nb.checkpoints.memory import Selection, estimate
from mistral_nb.engine import device as devices
from mistral_nb.engine.device import (
    choose_device,
    choose_precision,
    free_memory,
    give_back,
    plain_dtype,
)
from tests.checkpoints.tiny import hugging_face

ARGS = ModelArgs(4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, 32768)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return dataclasses.replace(open_checkpoint(hugging_face(tmp_path / "model")), args=ARGS)


def test_choices_on_the_cpu(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    monkeypatch.setattr(devices, "free_memory", lambda device: 100_000_000_000)
    assert choose_precision("auto", cpu, checkpoint) == Selection("int8", 32768)
    odd = dataclasses.replace(checkpoint, args=dataclasses.replace(ARGS, hidden_dim=1000))
    assert choose_precision("auto", cpu, odd).precision == "bf16"
    assert choose_precision("fp32", cpu, checkpoint, 100) == Selection("fp32", 100)
    need = estimate(checkpoint.args, "int8", 32768, "cpu").total
    monkeypatch.setattr(devices, "free_memory", lambda device: need - 1)
    assert choose_precision("auto", cpu, checkpoint).why.startswith(f"int4, since int8 needs {need / 1e9:.1f} GB")
    free = free_memory(cpu)
    assert free is None or free > 1 << 20


def test_weights_that_are_4_bit_blocks_stay_so(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has a fast product for them."""
    checkpoint, cpu = open_checkpoint(embedded), torch.device("cpu")
    found = []
    for instructions in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=instructions: name)
        found.append(choose_precision("auto", cpu, checkpoint))
    int4 = Selection("int4", checkpoint.args.context, "int4, since its weights are 4-bit blocks already")
    assert found == [int4, int4, Selection("int8", checkpoint.args.context)]


@pytest.mark.parametrize(("capability", "half"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_choices_on_a_gpu(
    checkpoint: Checkpoint, capability: tuple[int, int], half: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for free, precision in ((24, half), (15, "int8"), (7.6, "int4")):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: int(free * 1e9))
        assert choose_precision("auto", gpu, checkpoint).precision == precision
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
        assert plain_dtype(precision, gpu) == dtype  # type: ignore[arg-type]
    assert choose_precision("int8", gpu, checkpoint).precision == "int8"
    assert plain_dtype("fp32", gpu) == plain_dtype("int4", torch.device("cpu")) == torch.float32


GPU = torch.device("cuda")


def test_what_torch_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [3]

    def empty_cache() -> None:
        kept[0] = 0

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 - kept[0], 24))
    assert free_memory(GPU) == 10


@pytest.mark.parametrize(("error", "raised"), [("CUDA error: out of memory", False), ("no driver", True)])
def test_a_gpu_without_room_for_cuda_has_nothing_free(
    error: str, raised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a model is refused by what it needs, and the CPU told of."""

    def fails(device: torch.device) -> tuple[int, int]:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    if raised:
        with pytest.raises(RuntimeError, match=error):
            free_memory(GPU)
    else:
        assert free_memory(GPU) == 0


def test_memory_is_given_back_when_what_nobody_uses_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it refers to itself; and a GPU that has failed takes nothing from the error that is told."""

    class Cycle:
        pass

    def empty_cache() -> None:
        found.append(kept() is None)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    for device in (torch.device("cpu"), GPU):
        cycle = Cycle()
        cycle.own = cycle  # type: ignore[attr-defined]
        kept = weakref.ref(cycle)
        gc.disable()
        try:
            del cycle
            give_back(device)
        finally:
            gc.enable()
        assert kept() is None
    assert found == [True]

"""Loading to an NVIDIA GPU: what arrives is what the CPU would have made, in how much memory, and how fast."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from mistral_nb.bench_load import make_checkpoint  # noqa: E402
from mistral_nb.checkpoints import Precision, estimate, open_checkpoint  # noqa: E402
from mistral_nb.checkpoints.memory import int4_group  # noqa: E402
from mistral_nb.engine import packed_copy  # noqa: E402
from mistral_nb.engine.device import device_kind, plain_dtype  # noqa: E402
from mistral_nb.engine.model import Weights  # noqa: E402
from mistral_nb.engine.packed_copy import CopyFolder, packed_tensors  # noqa: E402
from mistral_nb.engine.weights import load_weights  # noqa: E402
from mistral_nb_kernels.packed import Dense, Int4, Int8, dequantize, quantize_int4  # noqa: E402
from mistral_nb_kernels.reference import quantize_int8  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DEVICE = torch.device("cuda")
SIZE = 1_500_000_000
BESIDE = 300_000_000
"""Bytes that loading may take on the GPU beside the weights: blocks on their way, and what is made of them."""
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "fp32", "int8", "int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sharded, in bf16."""
    made = tmp_path_factory.mktemp("load") / "checkpoint"
    make_checkpoint(made, SIZE)
    return made


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def stacked(tensors: dict[str, torch.Tensor], layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of a layer by the model's names."""
    parts = {
        "wqkv": [f"self_attn.{name}_proj" for name in "qkv"],
        "wo": ["self_attn.o_proj"],
        "w13": ["mlp.gate_proj", "mlp.up_proj"],
        "w2": ["mlp.down_proj"],
    }
    for name, names in parts.items():
        yield name, torch.cat([tensors[f"model.layers.{layer}.{part}.weight"] for part in names])


def check(made: Weights, precision: Precision, tensors: dict[str, torch.Tensor], group: int) -> None:
    """The first and the last layer, the head and the embeddings. The two devices may round a quotient differently."""
    dtype = plain_dtype(precision, DEVICE)
    assert torch.equal(made.tok_embeddings.cpu(), tensors["model.embed_tokens.weight"].to(dtype))
    last = len(made.layers) - 1
    matrices = [(getattr(made.layers[i], name), truth) for i in (0, last) for name, truth in stacked(tensors, i)]
    for matrix, truth in [*matrices, (made.output, tensors["lm_head.weight"])]:
        if isinstance(matrix, Dense):
            assert torch.equal(matrix.weight.cpu(), truth.to(dtype))
        elif isinstance(matrix, Int8):
            values, scale = quantize_int8(truth.float())
            assert torch.allclose(matrix.scale.cpu(), scale, rtol=1e-6)
            off = (matrix.values.cpu().short() - values.short()).abs()
            assert int(off.max()) <= 1
            assert float((off > 0).float().mean()) < 1e-3
        elif isinstance(matrix, Int4):
            expected = quantize_int4(truth, group)
            assert torch.allclose(matrix.affine.cpu().float(), expected.affine.float(), rtol=2e-3)
            assert float((matrix.packed.cpu() != expected.packed).float().mean()) < 1e-3
        error = (dequantize(matrix, torch.float32).cpu() - truth.float()).norm() / truth.float().norm()
        assert float(error) < {"int8": 0.01, "int4": 0.1}.get(precision, 0.005)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_arrives(folder: Path, tensors: dict[str, torch.Tensor], precision: Precision) -> None:
    """In no more memory than was estimated, which is given back; then once more out of a packed copy."""
    checkpoint = open_checkpoint(folder)
    group = int4_group(checkpoint.args, device_kind(DEVICE))
    before = 0
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    made, seconds = timed(folder, precision, None)
    print(f"{precision}: {seconds:.2f} s, {checkpoint.bytes / seconds / 1e9:.1f} GB/s")
    if DEVICE.type == "cuda":
        expected = estimate(checkpoint.args, precision, 1024, "cuda").weights
        assert expected <= torch.cuda.memory_allocated() - before < expected * 1.01
        assert torch.cuda.max_memory_allocated() - before < expected + BESIDE
    check(made, precision, tensors, group)
    if precision in ("int8", "int4"):
        place = CopyFolder(folder / "packed", checkpoint, precision, DEVICE)
        writer = place.write(made, lambda: False)
        assert writer
        assert writer.wait(300)
        again, seconds = timed(folder, precision, place)
        print(f"{precision}, packed: {seconds:.2f} s, {place.path.stat().st_size / seconds / 1e9:.1f} GB/s")
        for one, other in zip(of(made), of(again), strict=True):
            assert torch.equal(one, other)
        del again, one, other
    del made
    if DEVICE.type == "cuda":
        assert torch.cuda.memory_allocated() - before < 1_000_000


def timed(folder: Path, precision: Precision, place: CopyFolder | None) -> tuple[Weights, float]:
    began = time.perf_counter()
    copy = place.open() if place else None
    assert (copy is None) == (place is None)
    made = load_weights(open_checkpoint(folder), precision, DEVICE, threads=8, packed_copy=copy)
    return made, time.perf_counter() - began


def of(made: Weights) -> list[torch.Tensor]:
    """What is in a copy."""
    names = ("wqkv", "wo", "w13", "w2")
    matrices = [getattr(layer, name) for layer in made.layers for name in names]
    return [tensor for matrix in (*matrices, made.output) for _, tensor in packed_tensors("", matrix)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_copy, "DELAY", 0.0)

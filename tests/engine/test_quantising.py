"""Weights in int8 and int4: what a block of rows becomes, and what a text then costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from mistral_nb.checkpoints import Precision, open_checkpoint
from mistral_nb.checkpoints.memory import int4_group
from mistral_nb.engine import device as devices
from mistral_nb.engine import reading, weights
from mistral_nb.engine.arena import Arena
from mistral_nb.engine.model import Transformer, Weights
from mistral_nb.engine.quantise import Quantiser, four_bit_blocks
from mistral_nb.engine.reading import read_parts
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import choose
from mistral_nb_kernels.packed import Int4, Int4Cpu, Int8, Int8Cpu, dequantize
from tests.engine.mistral_layout import save_consolidated
from tests.engine.sequences import Running

CPU = torch.device("cpu")
TEXT = Path(__file__).parent / "pride_and_prejudice.txt"
CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
MATRICES = ("wqkv", "wo", "w13", "w2")


def int4_cpu(weight: Tensor, rows: int | None = None) -> Int4Cpu:
    """`weight` as the engine makes it, so many rows at a time."""
    out, inputs = weight.shape
    place = Int4Cpu(
        torch.zeros(out, inputs // 2, dtype=torch.uint8), torch.zeros(inputs // 32, out, 2, dtype=torch.bfloat16), 32
    )
    put = Quantiser().into(place)
    for first in range(0, out, rows or out):
        put(first, weight[first : first + (rows or out)].clone())
    return place


def values(place: Int4Cpu) -> Tensor:
    """The weights as torch's product has them, by its product with ones and zeros; rounded to bf16."""
    one = torch.eye(place.shape[1], dtype=torch.bfloat16)
    return torch._weight_int4pack_mm_for_cpu(one, place.packed, place.group, place.affine).t().float()


def truth(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Group by group, in numpy: the nearest of 16 levels, whose step and middle are bf16; and those steps."""
    groups = weight.double().numpy().reshape(-1, 32)
    bf16: Callable[[np.ndarray], np.ndarray] = lambda x: torch.tensor(x).float().bfloat16().double().numpy()  # noqa: E731
    smallest, largest = groups.min(axis=1), groups.max(axis=1)
    step = bf16((largest - smallest) / 15)
    middle = bf16(smallest + 8 * step)
    levels = middle[:, None] + step[:, None] * np.arange(-8, 8)
    nearest = np.abs(groups[:, :, None] - levels[:, None, :]).argmin(axis=2)
    found = np.take_along_axis(levels, nearest, axis=1)
    return torch.tensor(found).view(weight.shape), torch.tensor(step).repeat_interleave(32).view(weight.shape)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(64, 32), (192, 96), (128, 576)])
def test_int4_is_the_nearest_level(shape: tuple[int, int], offset: float) -> None:
    """Against an independent dequantiser; and no weight is off by more than half a step and 1/128 of the largest."""
    torch.manual_seed(1)
    weight = torch.randn(shape) + offset
    weight[3] *= 100
    weight[5] = 0
    weight[7] = 0.3
    expected, step = truth(weight)
    found = values(int4_cpu(weight))
    assert (found - expected).abs().max() <= expected.abs().max() / 256
    close = (found.double() - expected).abs() <= expected.abs() / 256
    assert close.double().mean() > 0.999, "but where a weight lies in the middle between two levels"
    largest = weight.abs().view(-1, 32).amax(dim=1).repeat_interleave(32).view(shape)
    assert bool(((expected - weight).abs() <= step / 2 + largest / 128).all())
    assert bool(((found - weight).abs() <= step / 2 + largest / 128 + expected.abs() / 256).all())


def test_int4_does_not_depend_on_the_blocks_that_it_is_made_of() -> None:
    torch.manual_seed(1)
    weight = torch.randn(448, 96)
    whole, pieces = int4_cpu(weight), int4_cpu(weight, 64)
    assert torch.equal(whole.packed, pieces.packed)
    assert torch.equal(whole.affine, pieces.affine)


def test_a_row_of_the_product_does_not_depend_on_the_others() -> None:
    """Nor on the number of threads; and the product is as exact as bf16 is."""
    torch.manual_seed(1)
    weight, x = int4_cpu(torch.randn(960, 576)), torch.randn(70, 576)
    linear = choose(CPU, 64, torch.float32).linear
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [linear(x, weight)]
            found += [torch.cat([linear(x[i : i + n], weight) for i in range(0, 70, n)]) for n in (1, 2, 5, 33)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    exact = x.double() @ dequantize(weight, torch.float64).t()
    assert float((found[0] - exact).norm() / exact.norm()) < 4e-3


def q4_1(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights as blocks of Q4_1 give them, and their codes, of which each block has the first and the last."""
    codes = torch.randint(0, 16, (rows, columns // 32, 32))
    codes[..., 4], codes[..., 20] = 0, 15
    scale = (torch.rand(rows, columns // 32, 1) * 0.01 + 0.001).half().float()
    minimum = (-8 * scale * (1 + 0.2 * torch.randn_like(scale))).half().float()
    return (codes * scale + minimum).view(rows, columns), codes.view(rows, columns).int()


def test_the_codes_of_q4_1_come_back() -> None:
    torch.manual_seed(1)
    weight, codes = q4_1(128, 640)
    assert torch.equal(int4_cpu(weight).packed, torch._convert_weight_to_int4pack_for_cpu(codes, 1))


def test_the_embedded_models_blocks_are_seen(embedded: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    assert four_bit_blocks(open_checkpoint(embedded))
    for number, change in enumerate((torch.randn_like, torch.zeros_like, lambda x: q4_1(*x.shape)[0].bfloat16())):
        folder = saved(tmp_path / str(number), change)
        assert not four_bit_blocks(open_checkpoint(folder))
    assert four_bit_blocks(open_checkpoint(saved(tmp_path / "blocks", lambda x: q4_1(*x.shape)[0])))


def saved(folder: Path, change: Callable[[Tensor], Tensor]) -> Path:
    model = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 2:
                parameter.data = change(parameter.data)
                assert "proj" in name
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_of_either_layout_in_blocks(tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    save_consolidated(model, tmp_path / "consolidated")
    one = load_weights(open_checkpoint(tmp_path / "hf"), precision, CPU)
    monkeypatch.setattr(reading, "BLOCK", 1)
    other = load_weights(open_checkpoint(tmp_path / "consolidated"), precision, CPU)
    assert_equal(one, other)


def assert_equal(one: Weights, other: Weights) -> None:
    """Bit by bit."""
    pairs = [(a, b, name) for a, b in zip(one.layers, other.layers, strict=True) for name in MATRICES]
    for ours, theirs, name in [*((getattr(a, name), getattr(b, name), name) for a, b, name in pairs),
                               (one.output, other.output, "output")]:  # fmt: skip
        assert type(ours) is type(theirs)
        if isinstance(ours, Int8Cpu):
            ours, theirs = ours.plain, theirs.plain
        for part in type(ours).__slots__:
            mine, its = getattr(ours, part), getattr(theirs, part)
            assert torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its, name
    assert torch.equal(one.tok_embeddings, other.tok_embeddings)


def load_for_a_gpu(folder: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch, **options: object) -> Weights:
    """What a GPU would hold, made on the CPU."""
    monkeypatch.setattr(weights, "Arena", lambda device: Arena(CPU))
    monkeypatch.setattr(devices, "_half", lambda device: "bf16")
    monkeypatch.setattr(
        weights,
        "read_parts",
        lambda parts, progress, threads, device: read_parts(parts, progress, threads=2, device=CPU),
    )
    return load_weights(open_checkpoint(folder), precision, torch.device("cuda"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_for_a_gpu(tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each matrix is close to what it was, the head is int8, all else in 16 bits."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "BLOCK", 7 * 128 * 4)
    found = load_for_a_gpu(tmp_path, precision, monkeypatch)
    group = int4_group(open_checkpoint(tmp_path).args, "cuda")
    assert group == 32, "since 192 inputs are no whole pairs of 64"
    assert isinstance(found.output, Int8)
    assert found.tok_embeddings.dtype == found.norm.weight.dtype == torch.bfloat16
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    parts = {
        "wqkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "wo": (attention.o_proj,),
        "w13": (mlp.gate_proj, mlp.up_proj),
        "w2": (mlp.down_proj,),
    }
    for name, modules in parts.items():
        matrix = getattr(found.layers[1], name)
        assert isinstance(matrix, Int4 if precision == "int4" else Int8)
        whole = torch.cat([module.weight for module in modules]).detach()
        error = (dequantize(matrix, torch.float32) - whole).norm() / whole.norm()
        assert error < (0.1 if precision == "int4" else 0.01)


def test_what_is_converted_on_a_gpu_lies_row_by_row() -> None:
    """Though its rows come in another order; `meta` stands in for a GPU."""
    heads = torch.empty(3, 4, 2, 32, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    copied = Quantiser()._fp32.copy(heads)
    assert copied.dtype == torch.float32
    assert copied.view(-1, 32).shape == (24, 32)


@pytest.fixture(scope="module")
def perplexity(embedded: Path) -> Callable[[Precision], float]:
    """Of the embedded model on the beginning of Pride and Prejudice (Jane Austen, 1813), read by 16 tokens: what came
    before those it reads from the pages, in whose type keys and values are rounded.
    """
    tokens = Tokenizer.from_file(str(embedded / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids[:700]
    checkpoint = open_checkpoint(embedded)

    def measured(precision: Precision) -> float:
        made = load_weights(checkpoint, precision, CPU)
        model = Transformer(checkpoint.args, made, choose(CPU, checkpoint.args.head_dim, made.tok_embeddings.dtype))
        sequence = Running(model, len(tokens))
        logits = torch.cat([sequence.feed(tokens[begin : begin + 16]) for begin in range(0, len(tokens), 16)])
        scores = logits[:-1].log_softmax(-1)
        return float(scores[range(len(tokens) - 1), tokens[1:]].mean().neg().exp())

    return measured


def test_the_embedded_model_is_as_good_in_int8_and_int4(perplexity: Callable[[Precision], float]) -> None:
    """Which it is in, since its matrices are 4-bit blocks and its head is int8 already."""
    exact = perplexity("fp32")
    for precision in ("int8", "int4"):
        found = perplexity(precision)
        print(f"perplexity in {precision}: {found:.3f}, {found / exact - 1:+.2%} of {exact:.3f} in fp32")
        assert abs(found / exact - 1) < 0.01

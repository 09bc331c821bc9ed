"""The memory estimate against what the engine really allocates, and the choices that it leads to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from mistral_nb.checkpoints import ModelArgs, check_fits, choices_that_fit, estimate, memory, open_checkpoint
from mistral_nb.checkpoints.memory import (
    CHUNKS,
    Precision,
    Selection,
    int4_group,
    ran_out,
    runs,
    select,
    short_kv,
)
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner
from mistral_nb.engine.weights import load_weights
from mistral_nb.errors import ModelError
from mistral_nb_kernels import choose
from tests.checkpoints import tiny

CPU = torch.device("cpu")
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4")
MISTRAL_7B = ModelArgs(4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, 32768)
SIZES: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 256}
MODELS = {
    "mistral": (
        MistralForCausalLM,
        MistralConfig(
            **SIZES, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32
        ),
    ),
    "llama, tied": (
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            hidden_size=192,
            intermediate_size=320,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    ),
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in dataclasses, sequences and objects."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def allocated(value: Any) -> int:
    """Bytes of the storages under a value, each counted once however many tensors share it.

    What oneDNN has ordered tells of no storage: it is counted by its numbers.
    """
    storages = {}
    for tensor in tensors_in(value):
        if tensor.is_mkldnn:
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert storages
    return sum(storages.values())


def compare(folder: Path, precision: Precision) -> None:
    checkpoint = open_checkpoint(folder)
    weights = load_weights(checkpoint, precision, CPU)
    expected = estimate(checkpoint.args, precision, 256, "cpu")
    assert allocated(weights) == expected.weights
    args = dataclasses.replace(checkpoint.args, context=256)
    model = Transformer(args, weights, choose(CPU, args.head_dim, weights.tok_embeddings.dtype))
    pool = KVPool(args, 1, 256, model.kv_dtype, CPU)
    assert pool._data[0].nbytes == expected.kv


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_tiny_models(kind: str, precision: Precision, tmp_path: Path) -> None:
    cls, config = MODELS[kind]
    cls(config).to(torch.bfloat16).save_pretrained(tmp_path)
    compare(tmp_path, precision)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_embedded_model(precision: Precision, embedded: Path) -> None:
    compare(embedded, precision)


def test_the_chunk_is_the_engines() -> None:
    assert {"cpu": DirectRunner.chunk, "cuda": GraphRunner.chunk} == CHUNKS


def test_what_keys_and_values_on_the_cpu_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bits beside int8 and int4 where the CPU multiplies bf16, but with one KV head, or by AMX."""
    alone = dataclasses.replace(MISTRAL_7B, n_kv_heads=1)
    for flags, short in (("avx2", False), ("avx2 avx512_bf16", True), ("avx512_bf16 amx_bf16", False), ("", False)):
        monkeypatch.setattr(memory, "cpu_flags", lambda found=flags: frozenset(found.split()))
        for precision, size in (("fp32", 4), ("bf16", 2), ("int8", 2 if short else 4), ("int4", 2 if short else 4)):
            found = estimate(MISTRAL_7B, precision, 1024, "cpu").kv  # type: ignore[arg-type]
            assert found == 1024 * 65536 * size
        assert estimate(alone, "int8", 1024, "cpu").kv == 1024 * 8192 * 4
        assert estimate(alone, "int8", 1024, "cuda").kv == 1024 * 8192 * 2


def test_mistral_7b() -> None:
    """By hand: 7.248 G weights; 128 KiB a token of KV in 16 bits."""
    weights = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096) + 2 * 32768 * 4096 + 4096
    bf16 = estimate(MISTRAL_7B, "bf16", 32768, "cuda")
    assert bf16.weights == 2 * weights == 14_496_047_104
    assert bf16.kv == 32768 * 128 * 1024
    assert estimate(MISTRAL_7B, "fp32", 1024, "cpu").kv == 1024 * 256 * 1024
    int8 = estimate(MISTRAL_7B, "int8", 32768, "cpu")
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096) + 32768
    vectors = 65 * 4096
    embeddings = 32768 * 4096
    assert int8.weights == (weights - vectors - embeddings) + 4 * rows + 4 * (vectors + embeddings)
    on_gpu = estimate(MISTRAL_7B, "int8", 32768, "cuda")
    assert on_gpu.weights == int8.weights - 2 * (vectors + embeddings)
    assert on_gpu.kv == bf16.kv
    matrices, head = weights - vectors - 2 * embeddings, embeddings + 4 * 32768
    for device, bits, plain in (("cpu", 5, 4), ("cuda", 4.5, 2)):
        int4 = estimate(MISTRAL_7B, "int4", 1024, device)  # type: ignore[arg-type]
        assert int4.weights == matrices * bits / 8 + head + plain * (vectors + embeddings)


_FILL = """
import json, sys
from pathlib import Path
from mistral_nb.engine import Engine, Sampling
from mistral_nb.engine.load_probe import CLEAR_REFS, memory
before = memory("VmRSS")
CLEAR_REFS.write_text("5")
engine = Engine.load(Path(sys.argv[1]), device="cpu", precision=sys.argv[2], context=int(sys.argv[3]))
tokens = list(engine.submit(range(10, 8 + engine.info.context), Sampling(temperature=0), 2))
print(json.dumps(memory("VmHWM") - before))
engine.close()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("precision", ["int8", "bf16", "int4"])
def test_a_full_context_takes_what_was_estimated(precision: Precision, embedded: Path) -> None:
    """By the process's peak, beside interpreter and torch: no more, and up to 10% less."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-c", _FILL, str(embedded), precision, "512"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    args = dataclasses.replace(ModelArgs.from_folder(embedded), context=512)
    assert 0.9 <= json.loads(done.stdout) / estimate(args, precision, 512, "cpu").total <= 1


def test_choices() -> None:
    free = 17_000_000_000
    choices = choices_that_fit(MISTRAL_7B, free, "cuda")
    assert [(choice.precision, choice.context) for choice in choices] == [
        ("bf16", 8192),
        ("fp16", 8192),
        ("int8", 32768),
        ("int4", 32768),
    ]
    assert all(choice.total <= free for choice in choices)
    assert estimate(MISTRAL_7B, "bf16", 16384, "cuda").total > free
    assert [c.precision for c in choices_that_fit(MISTRAL_7B, 60_000_000_000, "cpu")] == list(PRECISIONS)
    assert {c.context for c in choices_that_fit(MISTRAL_7B, 60_000_000_000, "cpu")} == {32768}
    assert choices_that_fit(MISTRAL_7B, 1_000_000_000, "cpu") == []


def test_a_short_context_is_the_only_choice() -> None:
    args = dataclasses.replace(MISTRAL_7B, context=512)
    assert {choice.context for choice in choices_that_fit(args, 60_000_000_000, "cpu")} == {512}
    assert choices_that_fit(args, 1_000_000_000, "cpu") == []


def test_int8_is_no_choice_where_it_does_not_run() -> None:
    args = dataclasses.replace(MISTRAL_7B, dim=4080)
    assert "int8" not in [choice.precision for choice in choices_that_fit(args, 60_000_000_000, "cpu")]


def test_what_fits_and_what_does_not() -> None:
    check_fits(MISTRAL_7B, "bf16", 32768, "cuda", 24_000_000_000)
    check_fits(MISTRAL_7B, "bf16", 32768, "cuda", None)
    with pytest.raises(ModelError) as caught:
        check_fits(MISTRAL_7B, "bf16", 32768, "cuda", 17_000_000_000)
    message = str(caught.value)
    assert "in bf16 with a context of 32768 tokens (weights 14.5 GB, KV 4.3 GB, workspace" in message
    assert "the GPU has 17.0 GB free" in message
    assert message.endswith(
        "; what fits: --precision bf16 --context 8192 (16.0 GB) or --precision int8 --context 32768 (12.1 GB) or "
        "--precision int4 --context 32768 (9.0 GB)"
    )
    largest = 16384 if short_kv(MISTRAL_7B) else 8192
    with pytest.raises(ModelError, match=rf"--precision int8 --context {largest} \(\d+\.\d GB\) or --precision int4"):
        check_fits(MISTRAL_7B, "fp32", 32768, "cpu", 10_500_000_000)
    with pytest.raises(ModelError, match="no precision fits with a context of 1024: free memory or choose a smaller"):
        check_fits(MISTRAL_7B, "int8", 32768, "cpu", 2_000_000_000)
    with pytest.raises(ModelError, match=r"what fits: --precision fp16 --context 8192 \(16.0 GB\) or"):
        check_fits(MISTRAL_7B, "fp16", 32768, "cuda", 17_000_000_000)


@pytest.mark.parametrize(
    ("free", "left", "advice"),
    [
        (17.0, ", and the GPU has 17.0 GB free now", "what fits: --precision bf16 --context 8192 (16.0 GB) or "),
        (22.0, ", and the GPU has 22.0 GB free now", "what fits: --precision bf16 --context 16384 (17.0 GB) or "),
        (None, "", "what fits: --precision bf16 --context 16384 (17.0 GB) or "),
        (
            4.0,
            ", and the GPU has 4.0 GB free now",
            "nothing fits there, but on the CPU: --device cpu --precision int8 ",
        ),
    ],
)
def test_where_memory_runs_out_less_is_told_of(free: float | None, left: str, advice: str) -> None:
    """Less than what has just not fitted, though as much may be free by now."""
    message = str(ran_out(MISTRAL_7B, "bf16", 32768, "cuda", None if free is None else int(free * 1e9), 13 * 10**9))
    assert message.startswith("memory of the GPU ran out while the model was loaded; the model needs 19.2 GB in bf16 ")
    assert f"(weights 14.5 GB, KV 4.3 GB, workspace 0.4 GB){left}; {advice}" in message


def test_what_fits_on_no_gpu_may_fit_on_the_cpu() -> None:
    with pytest.raises(ModelError) as caught:
        check_fits(MISTRAL_7B, "bf16", 32768, "cuda", 4_000_000_000, 18_000_000_000)
    message = str(caught.value)
    assert "the GPU has 4.0 GB free; nothing fits there, but on the CPU: --device cpu --precision bf16" in message
    assert " or --device cpu --precision int8 --context 32768 (" in message
    with pytest.raises(ModelError, match="no precision fits with a context of 1024: free memory"):
        check_fits(MISTRAL_7B, "bf16", 32768, "cuda", 4_000_000_000, 2_000_000_000)


def test_a_precision_is_refused_where_it_does_not_run() -> None:
    args = dataclasses.replace(MISTRAL_7B, dim=4080)
    with pytest.raises(ModelError, match="int8 needs matrices with a multiple of 32 inputs, not 4080; choose bf16"):
        check_fits(args, "int8", 1024, "cpu", None)
    few = dataclasses.replace(MISTRAL_7B, n_kv_heads=1, head_dim=32)
    assert runs(few, "int8", "cpu")
    with pytest.raises(ModelError, match="int4 needs matrices with a multiple of 64 outputs, not 32; choose bf16"):
        check_fits(few, "int4", 1024, "cpu", None)
    odd = dataclasses.replace(MISTRAL_7B, hidden_dim=14368)
    with pytest.raises(ModelError, match="int4 needs matrices with a multiple of 64 inputs, not 14368; choose bf16"):
        check_fits(odd, "int4", 1024, "cuda", None)


def test_groups_of_int4() -> None:
    """On a GPU two of them make a block, of which a row has whole ones."""
    args = MISTRAL_7B
    assert [int4_group(args, device) for device in ("cpu", "cuda")] == [32, 64]  # type: ignore[arg-type]
    assert int4_group(dataclasses.replace(args, hidden_dim=14336 + 64), "cuda") == 32
    assert int4_group(dataclasses.replace(args, hidden_dim=14336 + 32), "cuda") == 0


ON_A_GPU: tuple[Precision, ...] = ("bf16", "int8", "int4")


@pytest.mark.parametrize(
    ("free", "asked", "precision", "context", "why"),
    [
        (None, None, "bf16", 32768, ""),
        (24, None, "bf16", 32768, ""),
        (
            15.6,
            None,
            "int8",
            32768,
            "int8, since bf16 needs 19.2 GB with a context of 32768 tokens and 15.6 GB are free",
        ),
        (
            10.0,
            None,
            "int4",
            32768,
            "int4, since bf16 needs 19.2 GB with a context of 32768 tokens and 10.0 GB are free",
        ),
        (
            *(7.6, None, "int4", 16384),
            "int4 and 16384 tokens, since bf16 needs 19.2 GB with a context of 32768 tokens and 7.6 GB are free",
        ),
        (15.6, 2048, "bf16", 2048, ""),
        (15.0, 2048, "int8", 2048, "int8, since bf16 needs 15.1 GB with a context of 2048 tokens and 15.0 GB are free"),
        (7.6, 30000, "bf16", 30000, ""),
        (3.0, None, "bf16", 32768, ""),
        (24, 1 << 20, "bf16", 32768, ""),
    ],
)
def test_what_auto_takes(free: float | None, asked: int | None, precision: Precision, context: int, why: str) -> None:
    """Cards of 8 and 16 GB get an answer. What fits in no way is left to `check_fits`; an asked context is kept."""
    bytes_free = None if free is None else int(free * 1e9)
    found = select(MISTRAL_7B, ON_A_GPU, "cuda", bytes_free, context=asked)
    assert found == Selection(precision, context, why)
    if free is not None and (why or (precision == "bf16" and free > 20)):
        check_fits(MISTRAL_7B, found.precision, found.context, "cuda", bytes_free)


def test_auto_passes_over_what_does_not_run() -> None:
    odd = dataclasses.replace(MISTRAL_7B, hidden_dim=14368)
    assert select(odd, ON_A_GPU, "cuda", 7_600_000_000) == Selection("bf16", 32768)
    assert select(odd, ON_A_GPU, "cuda", 15_000_000_000).precision == "int8"


def test_the_largest_context_is_the_largest() -> None:
    for free in range(8_000_000_000, 40_000_000_000, 1_300_000_000):
        for choice in choices_that_fit(MISTRAL_7B, free, "cpu"):
            assert estimate(MISTRAL_7B, choice.precision, choice.context, "cpu").total == choice.total <= free
            if choice.context < MISTRAL_7B.context:
                assert choice.context & (choice.context - 1) == 0
                assert estimate(MISTRAL_7B, choice.precision, 2 * choice.context, "cpu").total > free

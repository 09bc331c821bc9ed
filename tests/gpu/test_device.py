"""The reference ops and the whole engine on an NVIDIA GPU, against the same on the CPU in fp64 or fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from mistral_nb.engine import Engine, Sampling  # noqa: E402
from mistral_nb_kernels import reference as ops  # noqa: E402
from mistral_nb_kernels.packed import Dense  # noqa: E402

pytestmark = pytest.mark.gpu

DIM, HIDDEN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 96, 256, 512, 6, 2, 16


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-5), (rows(7, DIM), rows(DIM, seed=1))),
    "swiglu": (ops.swiglu, (rows(7, 2 * HIDDEN),)),
    "linear": (lambda x, w: ops.linear(x, Dense(w)), (rows(7, DIM), rows(HIDDEN, DIM, seed=1))),
    "prefill": (ops.attention, (rows(9, HEADS, HEAD_DIM), rows(KV_HEADS, 9, HEAD_DIM), rows(KV_HEADS, 9, HEAD_DIM))),
    "decode": (ops.attention, (rows(1, HEADS, HEAD_DIM), rows(KV_HEADS, 33, HEAD_DIM), rows(KV_HEADS, 33, HEAD_DIM))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_op_is_as_exact_on_the_gpu_as_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    """The GPU's error against fp64 is at most twice the CPU's in the same dtype, plus one unit in the last place."""
    op, inputs = CASES[name]
    rounded = [x.to(dtype) for x in inputs]
    truth = op(*[x.double() for x in rounded])
    scale = float(truth.abs().max())
    cpu = float((op(*rounded).double() - truth).abs().max())
    gpu = float((op(*[x.cuda() for x in rounded]).cpu().double() - truth).abs().max())
    assert gpu <= 2 * cpu + torch.finfo(dtype).eps * scale


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of two layers with random weights, in fp32."""
    folder = tmp_path_factory.mktemp("random") / "tiny"
    folder.mkdir()
    config = {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": HIDDEN,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "lm_head.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            layer + "input_layernorm.weight": (DIM,),
            layer + "post_attention_layernorm.weight": (DIM,),
            layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, DIM),
            layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, DIM),
            layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, DIM),
            layer + "self_attn.o_proj.weight": (DIM, HEADS * HEAD_DIM),
            layer + "mlp.gate_proj.weight": (HIDDEN, DIM),
            layer + "mlp.up_proj.weight": (HIDDEN, DIM),
            layer + "mlp.down_proj.weight": (DIM, HIDDEN),
        }
    weights = {
        name: (rows(*shape, seed=seed) * shape[-1] ** -0.5).float().contiguous()
        for seed, (name, shape) in enumerate(shapes.items())
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def greedy(folder: Path, device: str, prompt: list[int]) -> list[int]:
    engine = Engine.load(folder, device=device, precision="fp32")
    try:
        tokens = engine.submit(prompt, Sampling(temperature=0), 40)
        return [token.id for token in tokens if token.id is not None]
    finally:
        engine.close()


def test_the_engine_writes_the_same_tokens_on_both_devices(checkpoint: Path) -> None:
    prompt = list(range(3, 60))
    written = greedy(checkpoint, "cuda", prompt)
    assert len(written) == 40
    assert written == greedy(checkpoint, "cpu", prompt)

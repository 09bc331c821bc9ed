"""The transformer against transformers' own: the embedded model whole, and tiny random ones of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from mistral_nb.checkpoints import Precision, open_checkpoint
from mistral_nb.engine import Engine, Sampling, reading
from mistral_nb.engine.model import Cancelled, Transformer
from mistral_nb.engine.weights import load_weights
from mistral_nb.errors import ModelError
from mistral_nb_kernels import choose
from mistral_nb_kernels.packed import dequantize
from tests.engine.jobs import ids
from tests.engine.mistral_layout import save_consolidated
from tests.engine.sequences import Running, all_logits, together

CPU = torch.device("cpu")
PROMPT = list(range(300, 340))


def transformer(folder: Path, precision: Precision = "fp32") -> Transformer:
    checkpoint = open_checkpoint(folder)
    weights = load_weights(checkpoint, precision, CPU)
    ops = choose(CPU, checkpoint.args.head_dim, weights.tok_embeddings.dtype)
    return Transformer(checkpoint.args, weights, ops)


def oracle_logits(oracle: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def model(embedded: Path) -> Transformer:
    return transformer(embedded)


@pytest.fixture(scope="module")
def oracle(embedded: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()


def test_embedded_logits(model: Transformer, oracle: PreTrainedModel) -> None:
    assert relative(all_logits(model, PROMPT), oracle_logits(oracle, PROMPT)) < 1e-5


def test_prefill_then_decode_is_one_forward(model: Transformer) -> None:
    """Also in chunks that start in the middle of what is cached."""
    whole = all_logits(model, PROMPT)
    sequence = Running(model, len(PROMPT))
    rows = [sequence.feed(PROMPT[:20]), sequence.feed(PROMPT[20:30])]
    rows += [sequence.decode(token) for token in PROMPT[30:]]
    assert relative(torch.cat(rows), whole) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_several_sequences_in_one_forward(model: Transformer, embedded: Path, precision: Precision) -> None:
    model = model if precision == "fp32" else transformer(embedded, precision)
    prompts = [PROMPT, PROMPT[5:12], [17], PROMPT[::-1]]
    for prompt, row in zip(prompts, together(model, prompts), strict=True):
        alone = all_logits(model, prompt)[-1]
        if precision == "fp32":
            assert relative(row, alone) < 1e-5
        else:
            assert torch.equal(row, alone)


CONFIGS = {
    "mistral": MistralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, sliding_window=None, rope_theta=1e6,
    ),
    "mistral with a window": MistralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=7,
    ),
    "mistral with a wide head": MistralConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=256, sliding_window=None,
    ),
    "llama, tied": LlamaConfig(
        vocab_size=500, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
    "llama 3": LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters={
            "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama, stretched": LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    torch.manual_seed(1)
    config = CONFIGS[request.param]
    cls = MistralForCausalLM if isinstance(config, MistralConfig) else LlamaForCausalLM
    oracle = cls(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    oracle.save_pretrained(tmp_path)
    return tmp_path, oracle


@pytest.mark.parametrize("split", [20, 1, 19])
def test_tiny_models(tiny: tuple[Path, PreTrainedModel], split: int) -> None:
    """Logits of a prefill up to `split` and decoding from there, past the window where there is one."""
    folder, oracle = tiny
    model = transformer(folder)
    tokens = torch.randint(0, 500, (30,)).tolist()
    sequence = Running(model, len(tokens))
    rows = [sequence.feed(tokens[:split]), *(sequence.decode(token) for token in tokens[split:])]
    assert relative(torch.cat(rows), oracle_logits(oracle, tokens)) < 1e-5


def test_greedy_texts_of_tiny_models(tiny: tuple[Path, PreTrainedModel]) -> None:
    """fp32, 200 tokens: each is the likeliest by transformers after the same text before it."""
    folder, oracle = tiny
    engine = Engine.load(folder, device="cpu", precision="fp32")
    prompt = torch.randint(0, 500, (30,)).tolist()
    text = ids(engine.submit(prompt, Sampling(temperature=0), 200))
    engine.close()
    assert len(text) == 200
    assert text == oracle_logits(oracle, prompt + text)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_far_positions(tmp_path: Path) -> None:
    """Logits at positions 8,000 and 31,000: RoPE's angles keep their phase, and chunks meet. The weights are far from
    what a new model has: with those attention is all but uniform, and its angles make no difference.
    """
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=32_768, sliding_window=None, rope_theta=1e6,
    )  # fmt: skip
    oracle = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    oracle.save_pretrained(tmp_path)
    model = transformer(tmp_path)
    tokens = torch.randint(0, 100, (31_001,)).tolist()
    sequence = Running(model, len(tokens))
    ours = {}
    for begin in range(0, len(tokens), 500):
        logits = sequence.feed(tokens[begin : begin + 500])
        ours |= {position: logits[position - begin] for position in (8000, 31_000) if position // 500 * 500 == begin}
    with torch.inference_mode():
        hidden = oracle.model(torch.tensor([tokens])).last_hidden_state[0]
        for position, logits in ours.items():
            assert relative(logits, oracle.lm_head(hidden[position])) < 1e-5


def test_int8_needs_whole_vectors(tmp_path: Path) -> None:
    """torch's int8 op reads out of bounds where a row is no multiple of 32. Nobody who leaves the choice gets it."""
    LlamaForCausalLM(CONFIGS["llama, tied"]).save_pretrained(tmp_path)
    told: list[int] = []
    with pytest.raises(ModelError, match="multiple of 32 inputs, not 48; choose bf16, fp32 or auto"):
        Engine.load(tmp_path, device="cpu", precision="int8", progress=lambda done, total: told.append(done))
    assert told == []
    engine = Engine.load(tmp_path, device="cpu")
    assert engine.info.precision == "bf16"
    assert len(list(engine.submit([1, 2, 3], Sampling(temperature=0), 4))) > 0
    engine.close()


def test_a_forward_is_given_up_between_layers(model: Transformer) -> None:
    asked = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 3

    sequence = Running(model, len(PROMPT))
    with pytest.raises(Cancelled):
        sequence.feed(PROMPT, cancelled)
    assert sequence.length == 0
    assert relative(sequence.feed(PROMPT), all_logits(model, PROMPT)) < 1e-5


def test_shards_and_reduced_precision(tmp_path: Path) -> None:
    torch.manual_seed(1)
    oracle = MistralForCausalLM(CONFIGS["mistral"]).eval()
    oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = list(range(10, 40))
    expected = oracle_logits(oracle, tokens)
    assert relative(all_logits(transformer(tmp_path), tokens), expected) < 1e-5
    assert relative(all_logits(transformer(tmp_path, "bf16"), tokens), expected) < 0.05
    assert relative(all_logits(transformer(tmp_path, "int8"), tokens), expected) < 0.05


@pytest.mark.parametrize("shards", [1, 3])
def test_mistrals_own_layout_is_the_same_model(tiny: tuple[Path, PreTrainedModel], tmp_path: Path, shards: int) -> None:
    folder, oracle = tiny
    consolidated = save_consolidated(oracle, tmp_path / "consolidated", shards=shards)
    tokens = torch.randint(0, 500, (30,)).tolist()
    ours = all_logits(transformer(consolidated), tokens)
    assert torch.equal(ours, all_logits(transformer(folder), tokens))
    assert relative(ours, oracle_logits(oracle, tokens)) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_both_layouts_are_the_same_in_every_precision(tmp_path: Path, precision: Precision) -> None:
    torch.manual_seed(1)
    oracle = MistralForCausalLM(CONFIGS["mistral"]).to(torch.bfloat16).eval()
    oracle.save_pretrained(tmp_path / "hf")
    save_consolidated(oracle, tmp_path / "consolidated")
    hf, consolidated = (transformer(tmp_path / name, precision).weights for name in ("hf", "consolidated"))
    assert torch.equal(hf.tok_embeddings, consolidated.tok_embeddings)
    for ours, theirs in zip(hf.layers, consolidated.layers, strict=True):
        for name in ("wqkv", "wo", "w13", "w2"):
            one, other = (dequantize(getattr(layer, name), torch.float32) for layer in (ours, theirs))
            assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mistrals_own_layout_does_not_depend_on_the_blocks_that_it_is_read_in(
    tmp_path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of three rows where they need not be whole heads, of 16."""
    torch.manual_seed(1)
    folder = save_consolidated(MistralForCausalLM(CONFIGS["mistral"]).eval(), tmp_path / "consolidated")
    whole = transformer(folder, precision).weights
    monkeypatch.setattr(reading, "BLOCK", 3 * 64 * 4)
    pieces = transformer(folder, precision).weights
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        for name in ("wqkv", "wo", "w13", "w2"):
            matrices = [dequantize(getattr(layer, name), torch.float32) for layer in (one, other)]
            assert torch.equal(*matrices), name

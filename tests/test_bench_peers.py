"""The peers' script with stand-ins for the libraries: how each is called, and what is made of its answers."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import pytest

from mistral_nb import bench_peers
from mistral_nb.bench_child import Child
from mistral_nb.bench_turns import texts
from mistral_nb.errors import MistralError

LATER = """
import time
def later(seconds, clock=time):
    passed = clock.perf_counter
    clock.perf_counter = lambda: passed() + seconds
"""
"""Seconds pass by the clock."""
LLAMA_CPP = """
import os
class Llama:
    metadata = {"general.architecture": "llama", "llama.block_count": "2", "llama.attention.head_count": "4",
                "llama.attention.head_count_kv": "2", "llama.embedding_length": "64"}
    def __init__(self, path, *, n_ctx, n_threads, n_threads_batch, n_gpu_layers, flash_attn, verbose):
        assert (path[-5:], n_ctx, n_threads, n_threads_batch, n_gpu_layers) == (".gguf", 64, 3, 3, 0), path
        assert not flash_attn
        print("a library that talks")
        self.fresh, self.ctx = False, self
    def reset(self):
        self.fresh = True
    def generate(self, tokens, *, temp, top_k, repeat_penalty):
        assert self.fresh and (temp, repeat_penalty) == (0.0, 1.0)
        self.fresh = False
        while True:
            yield (tokens := [sum(tokens) % 97])[0]
            later(1000 if decoding == SLOW else 100)
SLOW, decoding = int(os.environ.get('SLOW', 0)), 0
def llama_set_n_threads(context, threads, of_prompts):
    global decoding
    decoding = threads
    assert of_prompts == 3
"""
TRANSFORMERS = """
import torch
from types import SimpleNamespace
__version__ = "5.0.0"
class AutoConfig(SimpleNamespace):
    @classmethod
    def from_pretrained(cls, folder):
        return cls(num_hidden_layers=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
class Model(torch.nn.Linear):
    imported = False
    def __init__(self, config):
        super().__init__(4, 4)
        self.config = config
        if not Model.imported:
            later(100)
        Model.imported = True
class AutoModelForCausalLM:
    @staticmethod
    def from_config(config, dtype=None):
        return Model(config)
    @staticmethod
    def from_pretrained(folder, dtype):
        model = Model(AutoConfig.from_pretrained(folder))
        later(2)
        return model
"""
VLLM = """
from types import SimpleNamespace
class SamplingParams(SimpleNamespace):
    pass
class LLM:
    def __init__(self, folder, **options):
        assert options["load_format"] == "dummy" and not options["enable_prefix_caching"]
        assert (options["dtype"], options["max_model_len"]) == ("bfloat16", 64)
        assert options["gpu_memory_utilization"] == 0.25
    def generate(self, prompts, *, sampling_params, use_tqdm):
        assert sampling_params.ignore_eos and sampling_params.temperature == 0
        ids = [sum(prompts[0]["prompt_token_ids"]) % 97] * sampling_params.max_tokens
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])]
"""
GPT_FAST_MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float
    def __post_init__(self):
        self.head_dim = self.dim // self.n_head
class Transformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        assert torch.get_default_dtype() == torch.bfloat16
        self.tok_embeddings = torch.nn.Embedding(args.vocab_size, args.dim)
        self.output = torch.nn.Linear(args.dim, args.vocab_size, bias=False)
"""
GPT_FAST_GENERATE = """
import torch
def generate(model, prompt, max_new_tokens, batch_size, *, interactive, draft_model, temperature, top_k):
    assert model.output.weight.dtype == torch.bfloat16 and float(model.output.weight.float().std()) < 0.2
    return torch.cat([prompt, prompt.sum().expand(max_new_tokens) % 97])[None], {}
"""
LIBRARIES = {
    "llama-cpp-python": {"llama_cpp": LLAMA_CPP},
    "transformers": {"transformers": TRANSFORMERS},
    "vllm": {"vllm": VLLM},
    "gpt-fast": {"model": GPT_FAST_MODEL, "generate": GPT_FAST_GENERATE},
}
CONFIG = {"vocab_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
CONFIG |= {"intermediate_size": 96, "num_key_value_heads": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-5}


def start(peer: str, folder: Path, *options: str) -> Child:
    for name, source in LIBRARIES[peer].items():
        (folder / f"{name}.py").write_text(LATER + source)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.Q4_1.gguf").write_bytes(bytes(1000))
    command = [sys.executable, "-P", bench_peers.__file__, peer, "--folder", str(folder), "--precision", "bf16"]
    command += [
        "--threads",
        "3",
        "--context",
        "64",
        "--gguf",
        str(folder / "model.Q4_1.gguf"),
        "--memory-share",
        "0.25",
        *options,
    ]
    return Child(command, os.environ | {"PYTHONPATH": str(folder)})


@pytest.mark.parametrize(
    ("peer", "facts"),
    [
        ("llama-cpp-python", {"what": "llama-cpp-python, Q4_1", "weight_bytes": 1000, "kv_bytes": 2 * 2 * 2 * 16 * 2}),
        ("vllm", {"what": "vLLM, bf16", "own_weights": True}),
        ("gpt-fast", {"own_weights": True, "weight_bytes": 2 * 128 * 64, "kv_bytes": 2 * 2 * 2 * 16 * 2}),
    ],
)
def test_a_peer_answers(peer: str, facts: dict[str, object], tmp_path: Path) -> None:
    with start(peer, tmp_path, *(["--random"] if "own_weights" in facts else [])) as child:
        assert facts.items() <= child.facts.items()
        found = child.ask("answer", prompt=[50, 50], tokens=5)
        assert found["ids"] == [3, 3, 3, 3, 3]
        assert set(found) == {"first", "last", "ids"}
        assert "peak" in child.ask("memory")


def test_gpt_fast_runs_no_checkpoint_of_others(tmp_path: Path) -> None:
    with pytest.raises(MistralError, match="it is measured on random weights"):
        start("gpt-fast", tmp_path)


@pytest.mark.parametrize(("slow", "fast"), [("3", 1), ("1", 3)])
def test_llama_cpp_decodes_with_the_threads_that_serve_it_best(
    slow: str, fast: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW", slow)
    with start("llama-cpp-python", tmp_path) as child:
        assert child.facts["settles"]
        found = child.ask("settle", prompt=[50, 50], tokens=3)
        assert found["what"] == f"llama-cpp-python, Q4_1, decodes with {fast} of 3 threads"
        answer = child.ask("answer", prompt=[50, 50], tokens=3)
        assert 200 <= answer["last"] - answer["first"] < 1000


def test_imports_are_no_part_of_transformers_loading(tmp_path: Path) -> None:
    """The module of the model's kind takes 100 s to import, the model 2 s to load."""
    with start("transformers", tmp_path) as child:
        assert 2 <= child.facts["load_s"] < 100


def test_transformers_keeps_one_cache_of_each_length() -> None:
    """On a GPU, where graphs hold its address; here with a compiler that leaves everything as it is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}
    torch.manual_seed(5)
    config = transformers.MistralConfig(**shape, sliding_window=None)
    eager = transformers.AutoModelForCausalLM.from_config(config).eval()
    compiled = transformers.CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    model = copy.deepcopy(eager)
    model.generation_config.compile_config = compiled
    peers = [object.__new__(bench_peers.Transformers) for _ in range(2)]
    for peer, own, on_gpu in zip(peers, (eager, model), (False, True), strict=True):
        vars(peer).update(_torch=torch, _library=transformers, _device=torch.device("cpu"), _on_gpu=on_gpu)
        vars(peer).update(_model=own, _cache=None, _length=0)
    caches = []
    for seed, length in enumerate((20, 20, 20, 30)):
        prompt = texts(seed, length, 500)
        plain, static = (peer.answer(prompt, 6) for peer in peers)
        assert static["ids"] == plain["ids"]
        caches.append([layer.keys.data_ptr() for layer in peers[1]._cache.layers])
    assert caches[0] == caches[1] == caches[2] != caches[3]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0

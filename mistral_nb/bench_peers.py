"""Who is measured beside the engine: a script that a peer's own Python runs, without the rest of this package.

`python -P bench_peers.py PEER --folder DIR ...` loads a model, tells what it loaded in a line of JSON, and answers each
line of stdin with one more: `{"do": "answer", "prompt": [ids], "tokens": n}` with the seconds to the first and to the
last of n greedy tokens, and their ids. What libraries print goes to stderr. `own_weights` in the first line: they are
of the model's shape and no more.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PEERS", "random_tensor", "serve", "torch_memory"]

PACKAGES = ("torch", "triton", "transformers", "peft", "llama-cpp-python", "vllm")
_VERSION_OF_DTYPE = 5
"""The first of transformers' major versions that calls the argument `dtype`."""


def serve(load: Callable[[], Any]) -> None:
    """Load, tell its `facts`, and call its methods as stdin asks, until that ends.

    `load_s` is of the model alone: what it needs has been imported by then.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(found: Mapping[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    began = time.perf_counter()
    served = load()
    tell({"load_s": time.perf_counter() - began, "versions": versions(), **served.facts})
    for line in sys.stdin:
        asked = json.loads(line)
        tell(getattr(served, asked.pop("do"))(**asked))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int | None:
    """Bytes of this process at its peak; None off Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def random_tensor(name: str, shape: Sequence[int], device: Any) -> Any:
    """The tensor of a random model that has Hugging Face's `name`, in bf16: the same on every device of a kind.

    Norms are ones. Matrices [out, in] are normal with a variance of 1 / in, so that activations keep their size.
    """
    torch: Any = importlib.import_module("torch")
    if len(shape) == 1:
        return torch.ones(*shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(*shape, generator=generator, dtype=torch.bfloat16, device=device)
    return drawn.mul_(shape[-1] ** -0.5)


def two_calls(generate: Callable[[int], list[int]], tokens: int) -> dict[str, Any]:
    """The times of a first and a last token from a short and a whole call, where a library hands out no token early."""
    few = 2
    began = time.perf_counter()
    generate(few)
    short = time.perf_counter() - began
    began = time.perf_counter()
    ids = generate(tokens)
    whole = time.perf_counter() - began
    first = short - (whole - short) * (few - 1) / (tokens - few)
    return {"first": first, "last": whole, "ids": ids}


class Transformers:
    """transformers, as `generate` runs it: eagerly on the CPU; on a GPU with a static cache and compiled."""

    @staticmethod
    def prepare(options: argparse.Namespace) -> None:
        """It imports torch, and the module of a model's kind, with the first model: one of no memory is made."""
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(options.folder))

    def __init__(self, options: argparse.Namespace) -> None:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(options.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
        major = int(transformers.__version__.partition(".")[0])
        typed = {"dtype" if major >= _VERSION_OF_DTYPE else "torch_dtype": dtype}
        self._torch, self._library = torch, transformers
        self._device, self._on_gpu = torch.device(options.device), options.device == "cuda"
        auto = transformers.AutoModelForCausalLM
        if options.random:
            with torch.device(self._device):
                self._model = auto.from_config(transformers.AutoConfig.from_pretrained(options.folder), **typed)
            for name, parameter in self._model.named_parameters():
                parameter.data.copy_(random_tensor(name, parameter.shape, self._device))
        else:
            self._model = auto.from_pretrained(options.folder, **typed).to(self._device)
        self._model.eval()
        self._cache: Any = None
        self._length = 0
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = {name: each.numel() * each.itemsize for name, each in self._model.named_parameters()}
        if not config.tie_word_embeddings:
            sizes.pop("model.embed_tokens.weight")
        self.facts = {
            "what": f"transformers, {options.precision}" + (", compiled" if self._on_gpu else ", eager"),
            "weight_bytes": sum(sizes.values()),
            "kv_bytes": 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize,
        }

    def answer(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        if self._on_gpu:
            self._renew_cache(len(prompt) + tokens)
        ids = self._torch.tensor([prompt], device=self._device)
        times = _Times()
        written = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=None,
            pad_token_id=0,
            streamer=times,
            past_key_values=self._cache,
        )
        return {"first": times.first, "last": times.last, "ids": written[0, len(prompt) :].tolist()}

    def _renew_cache(self, length: int) -> None:
        """Empty, as long as needed and no longer; of each length one, so that graphs find it where they captured it."""
        if length == self._length:
            self._cache.reset()
            return
        self._torch._dynamo.reset()
        self._cache = self._library.StaticCache(config=self._model.config, max_cache_len=length)
        self._length = length

    def score(self, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        """How good this model finds a greedy text: `same`, the share of tokens that it would have taken, and `loss`,
        by how much theirs are below its best scores, as a share of what lies between those and the mean score.
        """
        with self._torch.inference_mode():
            read = self._torch.tensor([prompt + ids[:-1]], device=self._device)
            hidden = self._model.model(read).last_hidden_state[0, -len(ids) :]
            scores = self._model.lm_head(hidden).float()
        best = scores.amax(-1)
        taken = scores[range(len(ids)), ids]
        loss = ((best - taken) / (best - scores.mean(-1))).mean()
        return {"same": float((best == taken).float().mean()), "loss": float(loss)}

    def memory(self) -> dict[str, Any]:
        return torch_memory(self._torch)


class _Times:
    """A streamer: seconds from its making to the first and to the newest token."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._calls = 0
        self.first = self.last = math.nan

    def put(self, ids: Any) -> None:
        self._calls += 1
        self.last = time.perf_counter() - self._began
        if self._calls == 2:  # the first has the prompt
            self.first = self.last

    def end(self) -> None:
        pass


class LlamaCpp:
    """llama-cpp-python on a GGUF file, as it is built: on a GPU with every layer there."""

    @staticmethod
    def prepare(options: argparse.Namespace) -> None:
        importlib.import_module("llama_cpp")

    def __init__(self, options: argparse.Namespace) -> None:
        self._library: Any = importlib.import_module("llama_cpp")
        self._threads = options.threads
        self._model = self._library.Llama(
            str(options.gguf),
            n_ctx=options.context,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            n_gpu_layers=-1 if options.device == "cuda" else 0,
            flash_attn=options.device == "cuda",
            verbose=False,
        )
        found = self._model.metadata
        arch = found["general.architecture"]
        layers, heads, kv_heads, dim = (
            int(found[f"{arch}.{key}"])
            for key in ("block_count", "attention.head_count", "attention.head_count_kv", "embedding_length")
        )
        name = Path(options.gguf).stem.rpartition(".")[2]
        self.facts = {
            "what": f"llama-cpp-python, {name}",
            "weight_bytes": options.gguf.stat().st_size,
            "kv_bytes": 2 * layers * kv_heads * (dim // heads) * 2,
            "settles": options.device == "cpu" and options.threads > 1,
        }

    def settle(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Decode with all the threads and with half of them, the library's default, twice each; keep the faster."""
        seconds: dict[int, float] = {}
        for _ in range(2):
            for threads in (self._threads, self._threads // 2):
                self._library.llama_set_n_threads(self._model.ctx, threads, self._threads)
                found = self.answer(prompt, tokens)
                seconds[threads] = min(seconds.get(threads, math.inf), found["last"] - found["first"])
        best = min(seconds, key=lambda threads: seconds[threads])
        self._library.llama_set_n_threads(self._model.ctx, best, self._threads)
        return {"what": f"{self.facts['what']}, decodes with {best} of {self._threads} threads"}

    def answer(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        self._model.reset()
        began = time.perf_counter()
        ids: list[int] = []
        first = last = math.nan
        written: Iterator[int] = self._model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        for token in written:
            last = time.perf_counter() - began
            first = last if not ids else first
            ids.append(int(token))
            if len(ids) == tokens:
                break
        return {"first": first, "last": last, "ids": ids}

    def memory(self) -> dict[str, Any]:
        return {"peak": peak_memory()}


class GptFast:
    """gpt-fast in bf16, compiled, from a checkout on the PYTHONPATH; random weights only."""

    @staticmethod
    def prepare(options: argparse.Namespace) -> None:
        if not options.random:
            raise SystemExit("gpt-fast reads checkpoints of its own: it is measured on random weights")
        importlib.import_module("generate")

    def __init__(self, options: argparse.Namespace) -> None:
        generate: Any = importlib.import_module("generate")
        model: Any = importlib.import_module("model")
        torch: Any = importlib.import_module("torch")
        config: dict[str, Any] = json.loads((options.folder / "config.json").read_text(encoding="utf-8"))
        args = model.ModelArgs(
            block_size=options.context,
            vocab_size=config["vocab_size"],
            n_layer=config["num_hidden_layers"],
            n_head=config["num_attention_heads"],
            dim=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            n_local_heads=config["num_key_value_heads"],
            rope_base=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
        )
        self._torch, self._generate, self._device = torch, generate.generate, torch.device(options.device)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self._device):
            self._model = model.Transformer(args).eval()
        torch.set_default_dtype(torch.float32)
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(random_tensor(name, parameter.shape, self._device))
        if options.device == "cuda":
            generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
        weights = [each for name, each in self._model.named_parameters() if name != "tok_embeddings.weight"]
        self.facts = {
            "what": "gpt-fast, bf16, compiled",
            "own_weights": True,
            "weight_bytes": sum(each.numel() * each.itemsize for each in weights),
            "kv_bytes": 2 * args.n_layer * args.n_local_heads * args.head_dim * 2,
        }

    def answer(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        ids = self._torch.tensor(prompt, dtype=self._torch.int, device=self._device)
        batch = {"batch_size": 1} if "batch_size" in inspect.signature(self._generate).parameters else {}

        def written(count: int) -> list[int]:
            found, _ = self._generate(
                self._model, ids, count, interactive=False, draft_model=None, temperature=0.0, top_k=1, **batch
            )
            return [int(each) for each in found.view(-1)[len(prompt) :].tolist()]

        return two_calls(written, tokens)

    def memory(self) -> dict[str, Any]:
        return torch_memory(self._torch)


class Vllm:
    """vLLM, one request at a time, with its share of the GPU's memory; its own dummy weights where ours are random."""

    @staticmethod
    def prepare(options: argparse.Namespace) -> None:
        """Its names are imported when they are asked for."""
        vllm: Any = importlib.import_module("vllm")
        assert vllm.LLM, vllm.SamplingParams

    def __init__(self, options: argparse.Namespace) -> None:
        self._library: Any = importlib.import_module("vllm")
        self._model = self._library.LLM(
            str(options.folder),
            dtype={"bf16": "bfloat16", "fp16": "float16"}[options.precision],
            load_format="dummy" if options.random else "auto",
            max_model_len=options.context,
            max_num_seqs=1,
            gpu_memory_utilization=options.memory_share,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        self.facts = {"what": f"vLLM, {options.precision}", "own_weights": options.random}

    def answer(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        def written(count: int) -> list[int]:
            sampling = self._library.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            asked = {"prompt_token_ids": prompt}
            found = self._model.generate([asked], sampling_params=sampling, use_tqdm=False)
            return list(found[0].outputs[0].token_ids)

        return two_calls(written, tokens)

    def memory(self) -> dict[str, Any]:
        return {"peak": peak_memory()}


def torch_memory(torch: Any) -> dict[str, Any]:
    """Bytes: the process's `peak` and, once it has used a GPU, torch's there."""
    found: dict[str, Any] = {"peak": peak_memory()}
    if torch.cuda.is_initialized():
        found["torch_peak"] = torch.cuda.max_memory_reserved()
    return found


class Peer(NamedTuple):
    """What runs it, the module that its Python must have, and how to get that."""

    runs: Any
    module: str
    get: str


PEERS = {
    "transformers": Peer(Transformers, "transformers", "pip install transformers"),
    "llama-cpp-python": Peer(LlamaCpp, "llama_cpp", "pip install llama-cpp-python"),
    "gpt-fast": Peer(GptFast, "generate", "set PYTHONPATH to a checkout of it"),
    "vllm": Peer(Vllm, "vllm", "pip install vllm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--random", action="store_true", help="weights that only the folder's config is read for")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--memory-share", type=float, help="of the GPU's, for a peer that would take it all")
    options = parser.parse_args()
    peer = PEERS[options.peer].runs
    peer.prepare(options)
    serve(lambda: peer(options))


if __name__ == "__main__":
    main()

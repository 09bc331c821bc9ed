"""Sampling: what may be asked for, cases of one kind and of every kind mixed, exact distributions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.case import Case, Device, size
from mistral_nb_kernels.parameters import Parameters, Penalties

__all__ = ["ASKED", "OFF", "SETS", "mixed_case", "raced", "sample_case", "sample_peers", "shares", "torch_sample"]

VOCAB = 32000
ASKED: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "all": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
    "penalties, top-k, top-p": {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.1},
}
"""By name, what differs from a plain draw."""
OFF = {
    "temperature": 1.0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_k": 0,
}

SETS: list[dict[str, float]] = [
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 40},
    {"temperature": 0.8, "top_k": 60, "top_p": 0.95},
    {"repetition_penalty": 1.3},
    {"temperature": 3.0, "top_p": 0.5, "repetition_penalty": 1.1, "frequency_penalty": 0.3, "presence_penalty": 0.4},
]
"""The same, for draws by the hundred thousand."""


def sample_case(
    asked: str,
    rows: int,
    vocab: int = VOCAB,
    *,
    spread: float = 3.0,
    dtype: torch.dtype = torch.bfloat16,
    device: Device = "cuda",
) -> Case:
    """Normal scores of deviation `spread`: at 3 half of the mass is in some tens of tokens, at 1 in thousands.

    It counts no FLOPs: a draw has no products, and reads.
    """
    how = OFF | ASKED[asked]
    numbers = {name: torch.full((rows,), value, device=device) for name, value in how.items() if name != "top_k"}
    place = torch.arange(rows, device=device)
    top_k = torch.full_like(place, int(how["top_k"]), dtype=torch.int32)
    parameters = Parameters(**numbers, top_k=top_k, seed=place, position=place + 1000)
    penalties = None
    if "repetition_penalty" in ASKED[asked]:
        prompt = torch.rand(rows, vocab, device=device) < 0.02
        penalties = Penalties(prompt.int(), prompt, place.int())
    logits = torch.randn(rows, vocab, device=device).mul_(spread).to(dtype)
    traffic = size(logits, penalties)
    return Case("sample", (logits, parameters, penalties), reference.sample, 0, traffic)


def mixed_case(n: int, vocab: int, source: random.Random, *, dtype: torch.dtype, device: Device) -> Case:
    """Rows that ask for anything, at every temperature, with seeds and positions of more than 32 bits.

    Scores are a view between NaN; of three rows one has ties and another scores of -inf, and the last of four or more
    has nothing else. Penalties count n + 2 sequences in another order, the first row has none.
    """

    def of(*choices: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([source.choice(choices) for _ in range(n)], dtype=dtype, device=device)

    def words(*bits: int) -> Tensor:
        return torch.tensor([source.getrandbits(source.choice(bits)) for _ in range(n)], device=device)

    parameters = Parameters(
        temperature=of(0.0, 1e-3, 0.3, 0.6, 1.0, 1.0, 2.5, 40.0),
        top_p=of(1.0, 1.0, 0.0, 0.3, 0.9, 0.9, 0.999),
        repetition_penalty=of(0.0, 1.0, 1.3, 0.8),
        frequency_penalty=of(0.0, 0.0, 0.3, -0.5),
        presence_penalty=of(0.0, 0.0, 0.4),
        top_k=of(0, 0, 1, 3, 10, 50, vocab // 2, vocab - 1, vocab, dtype=torch.int32),
        seed=words(1, 10, 31, 62),
        position=words(1, 10, 31, 40),
    )
    logits = torch.full((n, vocab + 7), torch.nan, dtype=dtype, device=device)[:, 3 : 3 + vocab]
    logits.copy_(torch.randn(n, vocab, device=device) * 3)
    logits[::3] = logits[::3].round()
    logits[1::3, 1::2] = -math.inf
    logits[3:][-1:] = -math.inf
    counts = torch.randint(-2, 3, (n + 2, vocab), dtype=torch.int32, device=device).clamp(min=0)
    place = torch.randperm(n + 2, device=device)[:n].to(torch.int32)
    place[0] = -1
    penalties = Penalties(counts, torch.rand(n + 2, vocab, device=device) < 0.2, place)
    return Case("sample", (logits, parameters, penalties), reference.sample, 0, size(logits, penalties))


def shares(logits: Tensor, counts: Tensor, prompt: Tensor, how: dict[str, float]) -> Tensor:
    """The exact distribution, in fp64 and by a sort; all tensors [vocab]."""
    x, repetition = logits.double(), how["repetition_penalty"]
    x = torch.where(prompt | (counts > 0), torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - how["frequency_penalty"] * counts - how["presence_penalty"] * (counts > 0)
    if how["top_k"]:
        x = x.masked_fill(x < x.topk(int(how["top_k"])).values[-1], -math.inf)
    ordered, ids = (x / how["temperature"]).softmax(0).sort(descending=True, stable=True)
    ordered = ordered * (ordered.cumsum(0) - ordered < how["top_p"])
    return torch.zeros_like(x).scatter(0, ids, ordered / ordered.sum())


def sample_peers(case: Case) -> dict[str, Callable[[], Tensor]]:
    """A case of `sample_case` without penalties in torch's ops, its random numbers made beforehand."""
    logits, parameters, penalties = case.inputs
    if penalties is not None:
        return {}
    return {"torch": torch_sample(logits, parameters, torch.empty(logits.shape, device=logits.device).exponential_())}


def torch_sample(logits: Tensor, parameters: Parameters, race: Tensor) -> Callable[[], Tensor]:
    """Draws for logits [n, vocab] whose rows ask for the same, by exponential random numbers `race` [n, vocab] fp32."""
    temperature, top_k, top_p = (float(x[0]) for x in (parameters.temperature, parameters.top_k, parameters.top_p))

    def call() -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / temperature
        if top_k:
            scores = scores.masked_fill(scores < scores.topk(int(top_k)).values[:, -1:], -torch.inf)
        shares = scores.softmax(-1)
        if top_p < 1:
            ordered, ids = shares.sort(descending=True, stable=True)
            shares = torch.zeros_like(shares).scatter(1, ids, ordered * (ordered.cumsum(-1) - ordered < top_p))
        return (shares / race).argmax(-1)

    return call


def raced(logits: Tensor, parameters: Parameters, race: Tensor) -> Tensor:
    """What `torch_sample` draws, from the exact distributions in fp64 -> int64 [n]. Of equal tokens at the end of a
    top-p both keep those of the lowest ids.
    """
    how = {name: float(getattr(parameters, name)[0]) for name in OFF}
    if how["temperature"] == 0:
        return logits.argmax(-1)
    none = torch.zeros_like(logits[0])
    exact = [shares(row, none, none > 0, how) for row in logits]
    return (torch.stack(exact) / race).argmax(-1)

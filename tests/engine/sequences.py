"""One sequence at a time through a `Transformer`, for tests that look at logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb_kernels import Rows

__all__ = ["Running", "all_logits", "together"]


@dataclass
class Running:
    """A sequence in pages of its own."""

    model: Transformer
    capacity: int
    length: int = 0
    pool: KVPool = field(init=False)

    def __post_init__(self) -> None:
        self.pool = KVPool(self.model.args, 1, self.capacity, self.model.kv_dtype, self.model.device)
        assert self.pool.take(self.capacity) == 0

    def feed(self, tokens: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> Tensor:
        """Logits [n, vocab] after each of the next tokens."""
        end = self.length + len(tokens)
        rows = Rows.of((len(tokens),), (end,))
        x = self.model.forward(torch.tensor(tokens), rows, self.pool.of([0]), given_up=cancelled)
        self.length = end
        return self.model.logits(x)

    def decode(self, token: int) -> Tensor:
        """Logits [1, vocab] after one more token."""
        self.length += 1
        rows = Rows.of((1,), (self.length,))
        return self.model.logits(self.model.forward(torch.tensor([token]), rows, self.pool.of([0]), decoding=True))


def all_logits(model: Transformer, tokens: Sequence[int]) -> Tensor:
    return Running(model, len(tokens)).feed(tokens)


def together(model: Transformer, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [len(prompts), vocab] after the last token of each, in one forward."""
    pool = KVPool(model.args, len(prompts), 1 << 20, model.kv_dtype, model.device)
    places = [pool.take(len(prompt)) or 0 for prompt in prompts]
    rows = Rows.of([len(prompt) for prompt in prompts], [len(prompt) for prompt in prompts])
    x = model.forward(torch.tensor([token for prompt in prompts for token in prompt]), rows, pool.of(places))
    return model.logits(x[rows.starts[1:].long() - 1])

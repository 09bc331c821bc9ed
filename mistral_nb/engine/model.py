"""The transformer of Mistral and Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Activations are rows: the tokens of several sequences one after another, [n, dim]. Everything but attention works on
all rows at once; attention works on one sequence's rows and its KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.engine.kv_cache import KVCache
from mistral_nb_kernels import reference as ops
from mistral_nb_kernels.packed import Dense

__all__ = ["Cancelled", "FloatLinear", "Int8Linear", "Layer", "Linear", "Span", "Transformer", "Weights"]


class Linear(Protocol):
    """A weight matrix [out, in] in some precision."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """weight [out, in] in fp32, bf16 or fp16."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, Dense(self.weight))


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """weight [out, in] int8 with scale [out] fp32."""

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear_int8(x, self.weight, self.scale)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. wqkv stacks wq, wk, wv; w13 stacks the gate w1 and the up projection w3; w2 goes down."""

    attention_norm: Tensor
    wqkv: Linear
    wo: Linear
    ffn_norm: Tensor
    w13: Linear
    w2: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model. `output` may share its memory with `tok_embeddings`."""

    tok_embeddings: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    output: Linear


@dataclass(frozen=True, slots=True)
class Span:
    """The next `tokens` of a sequence whose earlier ones are in `cache`."""

    tokens: Sequence[int]
    cache: KVCache


class Cancelled(Exception):
    """A forward was given up between two layers; the caches are as before."""


class Transformer:
    """Runs spans of several sequences and writes their caches."""

    def __init__(self, args: ModelArgs, weights: Weights) -> None:
        self.args = args
        self.weights = weights
        self.device = weights.tok_embeddings.device
        self.dtype = weights.tok_embeddings.dtype
        scaling = None if args.rope_scaling is None else ops.RopeScaling(**asdict(args.rope_scaling))
        self._cos, self._sin = ops.rope_table(args.context, args.head_dim, args.rope_theta, self.device, scaling)

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.args, capacity, self.dtype, self.device)

    @torch.inference_mode()
    def forward(
        self, spans: Sequence[Span], every_row: bool = False, cancelled: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Logits [len(spans), vocab] in fp32 after each span's last token, or of every token with `every_row`.

        Raises `Cancelled` at the first layer before which `cancelled()` is true.
        """
        tokens = torch.tensor([token for span in spans for token in span.tokens], device=self.device)
        positions = torch.cat(
            [torch.arange(span.cache.length, span.cache.length + len(span.tokens)) for span in spans]
        ).to(self.device)
        cos, sin = self._cos[positions], self._sin[positions]
        x = ops.embedding(tokens, self.weights.tok_embeddings)
        for index, layer in enumerate(self.weights.layers):
            if cancelled():
                raise Cancelled
            x = x + self._attend(index, layer, x, spans, cos, sin)
            h = ops.rms_norm(x, layer.ffn_norm, self.args.norm_eps)
            x = x + layer.w2(ops.swiglu(layer.w13(h)))
        for span in spans:
            span.cache.advance(len(span.tokens))
        if not every_row and len(tokens) > len(spans):
            ends = torch.tensor([len(span.tokens) for span in spans], device=self.device).cumsum(0) - 1
            x = x[ends]
        return self.weights.output(ops.rms_norm(x, self.weights.norm, self.args.norm_eps)).float()

    def _attend(self, index: int, layer: Layer, x: Tensor, spans: Sequence[Span], cos: Tensor, sin: Tensor) -> Tensor:
        args = self.args
        h = ops.rms_norm(x, layer.attention_norm, args.norm_eps)
        n_rotated = args.n_heads + args.n_kv_heads
        qkv = layer.wqkv(h).view(len(x), n_rotated + args.n_kv_heads, args.head_dim)
        qk = ops.rope(qkv[:, :n_rotated], cos, sin)
        q, k, v = qk[:, : args.n_heads], qk[:, args.n_heads :], qkv[:, n_rotated:]
        outputs, start = [], 0
        for span in spans:
            rows = slice(start, start + len(span.tokens))
            keys, values = span.cache.write(index, k[rows], v[rows])
            outputs.append(ops.attention(q[rows], keys, values, args.sliding_window))
            start = rows.stop
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return layer.wo(attended.reshape(len(x), args.n_heads * args.head_dim))

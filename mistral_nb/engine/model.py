"""The transformer of Mistral and Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Activations are rows: the tokens of several sequences one after another, [n, dim]. What a layer computes is five ops:
QKV, attention with RoPE and the KV write in it, the way out, gate and up, the way down. Norms, residuals and SwiGLU
are part of the products beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.memory import short_kv
from mistral_nb_kernels import Dense, Lora, LoraRows, Norm, Ops, PagedKV, Rows, Weight, reference

__all__ = ["AdapterRows", "Cancelled", "Layer", "LayerAdapters", "Transformer", "Weights"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. wqkv stacks wq, wk, wv; w13 stacks the gate w1 and the up projection w3; w2 goes down."""

    attention_norm: Norm
    wqkv: Weight
    wo: Weight
    ffn_norm: Norm
    w13: Weight
    w2: Weight


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model. `output` may share its memory with `tok_embeddings` [vocab, dim]."""

    tok_embeddings: Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    output: Weight


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """One block's adapters: of wqkv, of wo, of w13 and of w2."""

    qkv: Lora | None = None
    o: Lora | None = None
    gate_up: Lora | None = None
    down: Lora | None = None


NONE = LayerAdapters()


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which adapter of `layers` each row has: slots [n] int32, -1 for none, and scale [n] fp32, 1 for b a itself."""

    layers: Sequence[LayerAdapters]
    slots: Tensor
    scale: Tensor


class Cancelled(Exception):
    """A forward was given up between two layers: its rows' keys and values are written in some of them only."""


class Transformer:
    """Runs rows through the layers and writes their keys and values, which are of `kv_dtype`.

    That is the activations' type, `dtype`, but bf16 beside int8 and int4 on a CPU that multiplies it: activations are
    rounded to it for those products anyway.
    """

    def __init__(self, args: ModelArgs, weights: Weights, ops: Ops) -> None:
        self.args = args
        self.weights = weights
        self.ops = ops
        self.device = weights.tok_embeddings.device
        self.dtype = weights.tok_embeddings.dtype
        packed = not isinstance(weights.layers[0].wqkv, Dense)
        torchs = ops.rope_decode_attention is reference.rope_decode_attention
        short = packed and torchs and self.device.type == "cpu" and short_kv(args)
        self.kv_dtype = torch.bfloat16 if short else self.dtype
        scaling = None if args.rope_scaling is None else reference.RopeScaling(**asdict(args.rope_scaling))
        self._cos, self._sin = reference.rope_table(args.context, args.head_dim, args.rope_theta, self.device, scaling)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        rows: Rows,
        kv: Sequence[PagedKV],
        *,
        adapters: AdapterRows | None = None,
        decoding: bool = False,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """tokens [n] of `rows` -> hidden states [n, dim]; `kv` has each layer's pages.

        `adapters` has those of the rows; None: no row has one. `decoding`: every sequence has one row, or none, which
        its length of 0 says. Raises `Cancelled` at the first layer before which `given_up()` is true; it is asked
        before each.
        """
        x = reference.embedding(tokens, self.weights.tok_embeddings)
        attend = self._newest(rows, kv[0]) if decoding else self._prefill
        linear = self.ops.linear if adapters is None else partial(self._linear, self._adding(adapters))
        for index, (layer, pages) in enumerate(zip(self.weights.layers, kv, strict=True)):
            if given_up():
                raise Cancelled
            lora = NONE if adapters is None else adapters.layers[index]
            attended = attend(linear(x, layer.wqkv, lora=lora.qkv, norm=layer.attention_norm), rows, pages)
            x = linear(attended, layer.wo, lora=lora.o, residual=x)
            h = linear(x, layer.w13, lora=lora.gate_up, norm=layer.ffn_norm, gated=True)
            x = linear(h, layer.w2, lora=lora.down, residual=x)
        return x

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [n, dim] -> fp32 [n, vocab]."""
        return self.ops.linear(x, self.weights.output, norm=self.weights.norm).float()

    @torch.inference_mode()
    def compile(self, rows: int, adapters: AdapterRows) -> None:
        """Run the products of a layer with adapters once, of rows of zeros: what they need is compiled then."""
        linear = partial(self._linear, self._adding(adapters))
        layer, lora = self.weights.layers[0], adapters.layers[0]
        x = torch.zeros((rows, self.args.dim), dtype=self.dtype, device=self.device)
        qkv = linear(x, layer.wqkv, lora=lora.qkv, norm=layer.attention_norm)
        x = linear(qkv[:, : layer.wo.shape[1]].contiguous(), layer.wo, lora=lora.o, residual=x)
        h = linear(x, layer.w13, lora=lora.gate_up, norm=layer.ffn_norm, gated=True)
        linear(h, layer.w2, lora=lora.down, residual=x)

    def _linear(
        self,
        add: Callable[..., Any],
        x: Tensor,
        weight: Weight,
        *,
        lora: Lora | None,
        norm: Norm | None = None,
        **fused: Any,
    ) -> Tensor:
        """A product with what is fused, and what the rows' adapters add to it."""
        return self.ops.linear(x, weight, norm=norm, lora=None if lora is None else add(x, lora, norm), **fused)

    def _adding(self, adapters: AdapterRows) -> Callable[[Tensor, Lora, Norm | None], Any]:
        """What a product is told of the rows' adapters. Where all ops are torch's it makes the whole of an update, and
        what all products have to know is found out once.
        """
        slots, scale = adapters.slots, adapters.scale
        if self.device.type == "cpu":
            step = reference.Adapting(slots, scale)
            return lambda x, lora, norm: (step, lora)
        shrink = self.ops.lora_shrink
        return lambda x, lora, norm: LoraRows(lora, slots, shrink(x, lora, slots, scale, norm=norm))

    def _prefill(self, qkv: Tensor, rows: Rows, kv: PagedKV) -> Tensor:
        q, k, v = self._heads(qkv)
        if self.kv_dtype != self.dtype:
            attended = reference.rope_prefill_attention(
                q, k, v, self._cos, self._sin, rows, kv, self.args.sliding_window
            )
            return attended.flatten(1)
        q = self.ops.rope_write(q, k, v, self._cos, self._sin, rows, kv)
        return self.ops.prefill_attention(q, rows, kv, self.args.sliding_window).flatten(1)

    def _newest(self, rows: Rows, first: PagedKV) -> Callable[[Tensor, Rows, PagedKV], Tensor]:
        """Attention of a step that decodes. What torch's has to know of all layers is found out once."""
        if self.ops.rope_decode_attention is not reference.rope_decode_attention:
            return self._decode
        step = reference.Decoding(rows.lengths, first, self.args.sliding_window, finite=True)
        step.turn(self._cos, self._sin)
        return lambda qkv, rows, kv: step.attend(qkv.view(len(qkv), -1, self.args.head_dim), kv).flatten(1)

    def _decode(self, qkv: Tensor, rows: Rows, kv: PagedKV) -> Tensor:
        q, k, v = self._heads(qkv)
        attended = self.ops.rope_decode_attention(
            q, k, v, self._cos, self._sin, rows.lengths, kv, self.args.sliding_window
        )
        return attended.flatten(1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views [n, heads, head_dim] of the packed projection [n, (n_heads + 2 n_kv_heads) head_dim]."""
        hq, hkv = self.args.n_heads, self.args.n_kv_heads
        heads = qkv.view(len(qkv), hq + 2 * hkv, self.args.head_dim)
        return heads[:, :hq], heads[:, hq : hq + hkv], heads[:, hq + hkv :]

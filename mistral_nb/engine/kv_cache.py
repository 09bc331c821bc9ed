"""Keys and values of the tokens that a sequence has been through."""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_nb.checkpoints.args import ModelArgs

__all__ = ["KVCache"]


class KVCache:
    """One sequence's keys and values, [n_layers, 2, n_kv_heads, capacity, head_dim], with `length` tokens written."""

    def __init__(self, args: ModelArgs, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (args.n_layers, 2, args.n_kv_heads, capacity, args.head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v [n, n_kv_heads, head_dim] behind what is there; returns all so far, [n_kv_heads, t, head_dim].

        `length` moves on with `advance`, once every layer has written.
        """
        end = self.length + k.shape[0]
        assert end <= self.capacity
        keys, values = self._data[layer]
        keys[:, self.length : end] = k.transpose(0, 1)
        values[:, self.length : end] = v.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def advance(self, n: int) -> None:
        self.length += n

    @staticmethod
    def bytes_per_token(args: ModelArgs, dtype: torch.dtype) -> int:
        return 2 * args.n_layers * args.n_kv_heads * args.head_dim * dtype.itemsize

"""How the rows of a batch are drawn: each row's parameters, what its penalties count, and the form of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["COLDEST", "EXP2", "LOG2E", "MOST", "UNIT", "Parameters", "Penalties"]

COLDEST = 9.999999747378752e-06
"""Below this temperature, 1e-5 in fp32, a draw is greedy: the scores' quotient would leave fp32."""
LOG2E = 1.4426950216293335
"""log2(e) in fp32."""
UNIT = 2.0**30
"""The weight of the likeliest token: weights are integers of this unit."""
MOST = 31.0
"""Halvings after which a weight is 0."""
EXP2 = (-0.6931437253952026, 0.2401801496744156, -0.0552973598241806, 0.00920579768717289, -0.0009449035860598087)
"""2^-f = 1 + f (EXP2[0] + f (EXP2[1] + ...)) for f in [0, 1), to 8.4e-8 of its value, and 2.5e-7 evaluated in fp32."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How to draw each row of a batch; tensors [n] on the device of the scores.

    temperature, top_p, repetition_penalty, frequency_penalty, presence_penalty: fp32. top_k: int32, 0 keeps all.
    seed, position: int64, the key of the draw. What is off: top_k 0, top_p 1, repetition_penalty 1, the others 0.
    """

    temperature: Tensor
    top_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    top_k: Tensor
    seed: Tensor
    position: Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """What the penalties count, for `places` sequences; `sample` adds the token that it drew.

    counts [places, vocab] int32: the times a token was written. prompt [places, vocab] bool: the tokens of the prompt.
    row [n] int32: the place of each row of the batch, at most one row a place; -1: no penalties.
    """

    counts: Tensor
    prompt: Tensor
    row: Tensor

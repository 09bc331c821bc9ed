"""Logits to token: how to sample, and what one sequence's sampler remembers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_nb.engine.grammar import Constraint
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import FIELDS, GenerationRequest
from mistral_nb_kernels import reference as ops

__all__ = ["Sampler", "Sampling"]

_SEEDS = next(int(field.maximum or 0) for field in FIELDS if field.name == "seed")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. temperature 0 is greedy; top_k 0 and top_p 1 keep all; seed None draws one."""

    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`: what a request's own bounds let through is always allowed."""
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(name, value, "must be a finite number, at least 0")
        for name in ("frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InvalidRequest(name, getattr(self, name), "must be a finite number")

    @classmethod
    def from_request(cls, request: GenerationRequest) -> Sampling:
        """The request's parameters; what is unset is off. top_p above 1 counts as 1."""
        return cls(
            temperature=request.temperature,
            top_p=1.0 if request.top_p is None else min(request.top_p, 1.0),
            top_k=request.top_k or 0,
            seed=request.seed,
            repetition_penalty=request.repetition_penalty or 1.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
        )


class Sampler:
    """Draws one sequence's tokens. A draw is keyed by (seed, index of the token), so no other sequence changes it.

    `constraint` says which tokens may come next; the others have no part in what is drawn from.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        self._constraint = constraint
        self.seed = secrets.randbelow(_SEEDS) + 1 if sampling.seed is None else sampling.seed
        self._drawn = 0
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt_ids, device=device)] = True
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._counts = torch.zeros(vocab_size, device=device)

    def next(self, logits: Tensor) -> int:
        """The next token from `logits` [vocab]; remembered for the penalties. `EngineError` if the constraint fails."""
        sampling = self._sampling
        if self._constraint is not None:
            logits = logits.masked_fill(~self._constraint.allowed().to(logits.device), -math.inf)
        token = ops.sample_row(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            draw=ops.uniform(self.seed, self._drawn),
            seen=self._seen,
            counts=self._counts,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )
        self._drawn += 1
        if self._constraint is not None:
            self._constraint.take(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        return token

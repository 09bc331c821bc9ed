"""Sampling, launched at Mistral-7B's vocabulary, with the penalties and without."""

from __future__ import annotations

import torch

from mistral_nb_kernels.configs import Row
from mistral_nb_kernels.launches.attention import Forms
from mistral_nb_kernels.parameters import Parameters, Penalties
from mistral_nb_kernels.sampling import sample

__all__ = ["FORMS"]

ROWS, VOCAB = 2, 32000


def _sample(row: Row, dtype: torch.dtype) -> Forms:
    logits = torch.zeros(ROWS, VOCAB, dtype=dtype)
    number, integer = torch.ones(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    places = torch.zeros(ROWS, dtype=torch.int32)
    parameters = Parameters(number, number, number, number, number, places, integer, integer)
    counts = torch.zeros(ROWS, VOCAB, dtype=torch.int32)
    penalties = Penalties(counts, torch.zeros(ROWS, VOCAB, dtype=torch.bool), places)
    yield "", lambda: sample(logits, parameters, config=row.config)
    yield "penalties", lambda: sample(logits, parameters, penalties, config=row.config)


FORMS = {"sample": _sample}

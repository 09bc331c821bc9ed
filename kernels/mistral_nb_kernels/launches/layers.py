"""RMSNorm and SwiGLU, launched at Mistral-7B's widths and at the widest."""

from __future__ import annotations

import torch

from mistral_nb_kernels.configs import Row
from mistral_nb_kernels.launches.attention import Forms
from mistral_nb_kernels.rms_norm import WIDEST, add_rms_norm, rms_norm
from mistral_nb_kernels.swiglu import swiglu

__all__ = ["FORMS"]

DIM, HIDDEN = 4096, 14336


def _rms_norm(row: Row, dtype: torch.dtype) -> Forms:
    x, weight = torch.zeros(2, WIDEST, dtype=dtype), torch.zeros(WIDEST, dtype=dtype)
    yield "", lambda: rms_norm(x[:, :DIM], weight[:DIM], 1e-5, config=row.config)
    yield "sum, widest", lambda: add_rms_norm(x, x, weight, 1e-5, config=row.config)


def _swiglu(row: Row, dtype: torch.dtype) -> Forms:
    yield "", lambda: swiglu(torch.zeros(2, 2 * HIDDEN, dtype=dtype), config=row.config)


FORMS = {"rms_norm": _rms_norm, "swiglu": _swiglu}

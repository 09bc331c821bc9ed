"""What the machine gives at most: bytes read and copied in a second, and products, beside its data sheet."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.case import Device
from mistral_nb_kernels.bench.record import Ceilings, Row, dtype_name
from mistral_nb_kernels.data_sheets import data_sheet

__all__ = ["ceilings", "doubts"]

SIDES = {"cuda": (8192,), "cpu": (256, 768)}
"""Rows and columns of the matrices that are multiplied, larger ones where a product is quick."""
QUICK = 20_000
"""Microseconds."""
WORDS = 2**26
"""Words of 4 bytes that a CPU reads, in rows of `WIDTH`."""
WIDTH = 4096
LOW = 1.05
"""A share of a ceiling that is more than chance."""


def ceilings(device: Device, dtypes: Sequence[torch.dtype]) -> Ceilings:
    """Measured on the device that is going to be used, in at most 5 seconds; products in each of `dtypes`."""
    kind = torch.device(device).type
    products = {dtype_name(dtype): _product(dtype, device) for dtype in dict.fromkeys(dtypes)}
    if kind == "cpu":
        return Ceilings(read_gbs=_read(device), copy_gbs=_copy(device), matmul_tflops=products)
    read = timing.read_ceiling() if importlib.util.find_spec("triton") else _read(device)
    sheet = data_sheet(torch.cuda.get_device_name(device))
    return Ceilings(
        read_gbs=read,
        copy_gbs=timing.copy_ceiling(),
        matmul_tflops=products,
        spec_gbs=None if sheet is None else sheet.gbs,
        spec_tflops=None if sheet is None else sheet.tflops,
    )


def doubts(found: Ceilings, rows: Sequence[Row]) -> tuple[str, ...]:
    """For a record's notes, where rows are above a ceiling: no cache helps where products are the limit, and what is
    above the limit of memory has been read from one. And how many rows are not to be relied on.
    """
    said = []
    waited = sum(row.timer == "waited" for row in rows)
    if waited:
        said.append(
            f"{waited} of {len(rows)} rows waited for a core that others had: they are not to be relied on, so measure "
            "again when the machine is quiet"
        )
    above = [row for row in rows if found.bound(row) == "compute" and (found.share(row) or 0) > LOW]
    if above:
        worst = max(above, key=lambda row: found.share(row) or 0)
        said.append(
            f"the ceiling of products in {worst.dtype}, {found.matmul_tflops[worst.dtype]:.3g} TFLOP/s, is too low: "
            f"{worst.provider} gives {worst.tflops:.3g} ({worst.op}, {worst.case}). The machine was busy, or that one "
            "multiplies in another type; shares of it, and what bounds a kernel, are not to be relied on"
        )
    if any(found.bound(row) == "memory" and (found.share(row) or 0) > LOW for row in rows):
        said.append("above 100% of memory: what is read fits in a cache")
    return tuple(said)


def _read(device: Device) -> float:
    """GB/s of a sum or of a product with a vector, whichever is faster."""
    x = torch.ones(WORDS, device=device).view(-1, WIDTH)
    us = min(timing.fastest(reads, device) for reads in (x.sum, functools.partial(torch.mv, x, x[0])))
    return x.nbytes / us / 1e3


def _copy(device: Device) -> float:
    """GB/s of a copy, bytes read and bytes written."""
    source = torch.ones(WORDS // 2, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timing.fastest(lambda: target.copy_(source), device) / 1e3


def _product(dtype: torch.dtype, device: Device) -> float:
    """TFLOP/s of products of random square matrices."""
    best = 0.0
    for side in SIDES[torch.device(device).type]:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        us = timing.fastest(functools.partial(torch.matmul, a, b), device)
        best = max(best, 2 * side**3 / us / 1e6)
        if us > QUICK:
            break
    return best

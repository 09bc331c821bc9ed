"""What NVIDIA's data sheets say of a GPU: the speed of its memory, and of products in 16 bits."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DataSheet", "data_sheet"]


class DataSheet(NamedTuple):
    """GB/s of device memory, and TFLOP/s of dense products in 16 bits that are added in fp32."""

    gbs: int
    tflops: int


_SHEETS = {
    "H200": DataSheet(4800, 989),
    "H100 80GB HBM3": DataSheet(3350, 989),
    "H100 NVL": DataSheet(3938, 835),
    "H100 PCIe": DataSheet(2039, 756),
    "A100-SXM4-80GB": DataSheet(2039, 312),
    "A100 80GB PCIe": DataSheet(1935, 312),
    "A100-SXM4-40GB": DataSheet(1555, 312),
    "A100-PCIE-40GB": DataSheet(1555, 312),
    "RTX 4090": DataSheet(1008, 165),
    "L40S": DataSheet(864, 362),
    "L4": DataSheet(300, 121),
    "T4": DataSheet(320, 65),
}


def data_sheet(device: str) -> DataSheet | None:
    """Of a device whose name ends with the words of one that is known, so of no slice or laptop's variant of it."""
    words = device.split()
    return next((sheet for name, sheet in _SHEETS.items() if words[-len(name.split()) :] == name.split()), None)

"""Who else attends: the kernels of torch's SDPA on contiguous KV, flash-attn and FlashInfer, and Liger's RoPE."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.attention_cases import banded, flash_window, reading, sdpa, takes
from mistral_nb_kernels.bench.case import Case
from mistral_nb_kernels.bench.providers import Absent, Provider, gpu_package
from mistral_nb_kernels.paged import PagedKV

__all__ = ["DECODE", "PREFILL", "ROPE"]

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
CONTIGUOUS = "contiguous KV"
GPU = ("cuda",)
SCORES = {"cpu": 2**31, "cuda": 2**34}
"""Bytes that the scores of SDPA's math may take; it keeps about three copies of them in fp32."""


def _prompt(case: Case) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """q [1, hq, t, d], k and v [1, hkv, t, d], contiguous, and the window where it is shorter than the prompt."""
    q, rows, kv, window = case.inputs
    q = q.transpose(0, 1)[None].contiguous()
    k, v = (x[None].contiguous() for x in kv.of(0, int(rows.lengths[0])))
    return q, k, v, None if window is None or window >= q.shape[2] else window


def _kernel(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool
) -> Callable[[], Tensor]:
    """One of `SDPA`, with KV heads shared, else repeated beforehand."""
    backend, device, group = SDPA[name], q.device.type, q.shape[1] // k.shape[1]
    if backend is SDPBackend.MATH:
        needed = 3 * 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if needed > SCORES[device]:
            raise Absent(f"its scores take some {needed / 2**30:.0f} GB")
        return sdpa(backend, q, k, v, mask, causal=causal)
    if device == "cpu":
        if backend is not SDPBackend.FLASH_ATTENTION:
            raise Absent("for NVIDIA GPUs only")
        return sdpa(backend, q, k, v, mask, causal=causal)
    for repeats in dict.fromkeys((1, group)):
        keys, values = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
        if takes(backend, q, keys, values, mask, causal=causal):
            return sdpa(backend, q, keys, values, mask, causal=causal)
    kind = str(q.dtype).removeprefix("torch.")
    raise Absent(f"does not take {kind}{'' if mask is None else ' with a window'} here")


def _prefill(name: str, case: Case) -> Callable[[], Tensor]:
    q, k, v, window = _prompt(case)
    if window is None:
        return _kernel(name, q, k, v, causal=True)
    if name == "sdpa flash" and q.device.type == "cuda":
        for _, call in flash_window(q, k, v, window):
            return call
        raise Absent("does not take a window here")
    return _kernel(name, q, k, v, banded(q.shape[2], window, q.device), causal=True)


def _newest(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q [batch, hq, d], k and v [batch, hkv, seen, d], contiguous, of sequences of one length: a case's."""
    q, lengths, kv, window = case.inputs
    first = 0 if window is None else max(0, int(lengths[0]) - window)
    pairs = (kv.of(sequence, int(t)) for sequence, t in enumerate(lengths))
    k, v = (torch.stack(x)[:, :, first:].contiguous() for x in zip(*pairs, strict=True))
    return q, k, v


def _decode(name: str, case: Case) -> Callable[[], Tensor]:
    """The heads that share keys are the rows of one, so that nothing is repeated."""
    q, k, v = _newest(case)
    return _kernel(name, q.reshape(len(q), k.shape[1], -1, q.shape[-1]), k, v, causal=False)


def _first(case: Case, out: Tensor) -> Tensor:
    return out[0].transpose(0, 1)


def _rows(case: Case, out: Tensor) -> Tensor:
    return out.reshape(case.inputs[0].shape)


def _result_only(case: Case) -> Case:
    """The same, whose pages stay as they are: who keeps KV of their own writes it there."""
    return replace(case, reference=lambda *inputs: case.reference(*copy.deepcopy(inputs)))


def _flash_attn_prefill(case: Case) -> Callable[[], Any]:
    flash = gpu_package("flash_attn", "flash-attn", case)
    q, k, v, window = _prompt(case)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    sides = (-1, -1) if window is None else (window - 1, 0)
    return lambda: flash.flash_attn_func(q, k, v, causal=True, window_size=sides)


def _flash_attn_decode(case: Case) -> Callable[[], Any]:
    """With RoPE and the KV write in the same kernel, from cos and sin in the activations' type."""
    flash = gpu_package("flash_attn", "flash-attn", case)
    q, k, v, cos, sin, lengths, kv, window = case.inputs
    _, keys, values = _newest(replace(case, inputs=(q, lengths, kv, None)))
    keys, values = (x.transpose(1, 2).contiguous() for x in (keys, values))
    q, k, v = (x[:, None].contiguous() for x in (q, k, v))
    angles = {
        name: x[:, : x.shape[1] // 2].to(q.dtype).contiguous() for name, x in (("rotary_cos", cos), ("rotary_sin", sin))
    }
    return functools.partial(
        flash.flash_attn_with_kvcache,
        q,
        keys,
        values,
        k,
        v,
        **angles,
        cache_seqlens=lengths - 1,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        rotary_interleaved=False,
    )


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """What FlashInfer's sums are in between; calls that follow each other share it."""
    return torch.empty(2**27, dtype=torch.uint8, device=device)


def _pages(lengths: Tensor, kv: PagedKV) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's page table: where each sequence's pages begin, the pages, and the tokens in each one's last."""
    ends = lengths.tolist()
    needed = [-(-t // kv.page) for t in ends]
    begins = torch.tensor([0, *needed], device=lengths.device).cumsum(0, dtype=torch.int32)
    pages = torch.cat([kv.table[sequence, :n] for sequence, n in enumerate(needed)])
    last = torch.tensor([(t - 1) % kv.page + 1 for t in ends], dtype=torch.int32, device=lengths.device)
    return begins, pages, last


def _flashinfer_prefill(case: Case) -> Callable[[], Any]:
    flashinfer = gpu_package("flashinfer", "flashinfer-python", case)
    q, rows, kv, window = case.inputs
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "HND")
    heads = (q.shape[1], kv.n_kv_heads, q.shape[2], kv.page)
    how = {"causal": True, "window_left": -1 if window is None else window - 1, "q_data_type": q.dtype}
    wrapper.plan(rows.starts, *_pages(rows.lengths, kv), *heads, **how)
    return lambda: wrapper.run(q, (kv.k, kv.v))


def _flashinfer_decode(case: Case) -> Callable[[], Any]:
    flashinfer = gpu_package("flashinfer", "flashinfer-python", case)
    q, lengths, kv, window = case.inputs
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "HND")
    heads = (q.shape[1], kv.n_kv_heads, q.shape[2], kv.page)
    how = {"window_left": -1 if window is None else window - 1, "q_data_type": q.dtype}
    wrapper.plan(*_pages(lengths, kv), *heads, **how)
    rows = q.contiguous()
    return lambda: wrapper.run(rows, (kv.k, kv.v))


def _rotating(case: Case) -> Case:
    """Of a case of `rope_case` what is left without the KV write: q and k, rotated."""
    q, k, _, cos, sin, rows, _ = case.inputs
    t, hq, d = q.shape
    angles = rows.positions.long()
    rotated = (q, k, cos[angles], sin[angles])
    traffic = 2 * t * (hq + k.shape[1]) * d * q.itemsize + 2 * t * d // 2 * 4
    return replace(case, inputs=rotated, reference=_rotated, bytes=traffic)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.rope(q, cos, sin), reference.rope(k, cos, sin)


def _liger_rope(case: Case) -> Callable[[], Any]:
    """In place, on copies that lie as [1, t, heads, d]: they turn further with every call."""
    rope = gpu_package("liger_kernel.ops.rope", "liger-kernel", case).LigerRopeFunction
    q, k = (x[None].contiguous().transpose(1, 2) for x in case.inputs[:2])
    cos, sin = (x[None] for x in case.inputs[2:])
    return lambda: rope.apply(q, k, cos, sin)


def _both(case: Case, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q and k; newer versions give the angles, too."""
    return tuple(x[0].transpose(0, 1) for x in out[:2])


def _on(name: str) -> tuple[str, ...]:
    """The types of devices that a kernel of SDPA is for."""
    return ("cpu", "cuda") if name in ("sdpa flash", "sdpa math") else GPU


WHOLE, BARE = ("rope_decode_attention",), ("decode_attention",)
LESS = "no RoPE, no KV write"
PREFILL = (
    *(Provider(name, functools.partial(_prefill, name), _first, CONTIGUOUS, on=_on(name)) for name in SDPA),
    Provider("flash-attn", _flash_attn_prefill, lambda case, out: out[0], CONTIGUOUS, on=GPU),
    Provider("flashinfer", _flashinfer_prefill, on=GPU),
)
"""For cases of `prefill_case`."""
DECODE = (
    *(
        Provider(name, functools.partial(_decode, name), _rows, f"{LESS}, {CONTIGUOUS}", reading, WHOLE, _on(name))
        for name in SDPA
    ),
    *(Provider(name, functools.partial(_decode, name), _rows, CONTIGUOUS, None, BARE, _on(name)) for name in SDPA),
    Provider("flash-attn", _flash_attn_decode, lambda case, out: out[:, 0], CONTIGUOUS, _result_only, WHOLE, GPU),
    Provider("flashinfer", _flashinfer_decode, None, LESS, reading, WHOLE, GPU),
    Provider("flashinfer", _flashinfer_decode, ops=BARE, on=GPU),
)
"""For cases of `decode_case`, and of what `reading` makes of them."""
ROPE = (Provider("liger", _liger_rope, _both, "no KV write", _rotating, on=GPU),)
"""For cases of `rope_case`."""

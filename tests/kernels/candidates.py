"""Sources of candidates: right ones in plain torch and in Triton, which tests break in one place."""

from __future__ import annotations

__all__ = ["AUTOTUNED", "TORCH", "TRITON"]

DECODE = """
import torch

def decode_attention(q, lengths, kv, window=None):
    out = torch.zeros(q.shape, dtype=q.dtype)
    for s, t in enumerate(lengths.tolist()):
        if t:
            k, v = (x.float() for x in kv.of(s, t))
            if window:
                k, v = k[:, -window:], v[:, -window:]
            heads = q[s].float().view(len(k), -1, q.shape[-1])
            p = torch.softmax(heads @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
            out[s] = (p @ v).flatten(0, 1).to(q.dtype)
    return out
"""
TURN = """
import torch

def _turn(x, c, s):
    a, b = x.float().chunk(2, -1)
    c, s = (y[:, None, : x.shape[-1] // 2] for y in (c, s))
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)
"""
TORCH = {
    "rms_norm": """
import torch

def rms_norm(x, weight, eps):
    y = x.float()
    return (y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
""",
    "add_rms_norm": """
import torch

def add_rms_norm(x, residual, weight, eps):
    s = x + residual
    y = s.float()
    return (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) / y.shape[-1] + eps) * weight.float()).to(x.dtype), s
""",
    "swiglu": """
import torch

def swiglu(gate_up):
    g, u = gate_up.float().chunk(2, -1)
    return (g / (1 + torch.exp(-g)) * u).to(gate_up.dtype)
""",
    "linear": """
import torch
from mistral_nb_kernels.packed import dequantize
from mistral_nb_kernels.reference import lora_expand, rms_norm

def linear(x, weight, *, norm=None, residual=None, gated=False, lora=None):
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    y = (x.float()[:, None, :] * dequantize(weight, torch.float32)).sum(-1)
    if lora is not None:
        y = lora_expand(lora.shrunk, lora.lora, lora.slots, y)
    if gated:
        g, u = y.chunk(2, -1)
        y = g * torch.sigmoid(g) * u
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)
""",
    "decode_attention": DECODE,
    "rope_decode_attention": DECODE.replace("def decode", "def _decode")
    + TURN
    + """
def rope_decode_attention(q, k, v, cos, sin, lengths, kv, window=None):
    at = (lengths.long() - 1).clamp(min=0)
    q, k = (_turn(x, cos[at], sin[at]) for x in (q, k))
    for s, t in enumerate(lengths.tolist()):
        if t:
            page, offset = kv.place(s, t - 1)
            kv.k[page, :, offset], kv.v[page, :, offset] = k[s], v[s]
    return _decode_attention(q, lengths, kv, window)
""",
    "rope_write": TURN
    + """
def rope_write(q, k, v, cos, sin, rows, kv):
    out = torch.empty(q.shape, dtype=q.dtype)
    for i, (s, p) in enumerate(zip(rows.sequences.tolist(), rows.positions.tolist())):
        if p >= 0:
            page, offset = kv.place(s, p)
            angles = cos[p : p + 1], sin[p : p + 1]
            out[i] = _turn(q[i : i + 1], *angles)[0]
            kv.k[page, :, offset] = _turn(k[i : i + 1], *angles)[0]
            kv.v[page, :, offset] = v[i]
    return out
""",
    "prefill_attention": """
import torch

def attention(q, rows, kv, window=None):
    out = torch.empty(q.shape, dtype=q.dtype)
    for s, t in enumerate(rows.lengths.tolist()):
        a, b = rows.starts[s : s + 2].tolist()
        k, v = (x.float() for x in kv.of(s, t))
        at = torch.arange(t - (b - a), t)[:, None]
        keys = torch.arange(t)
        seen = keys <= at
        if window:
            seen &= keys > at - window
        heads = q[a:b].float().transpose(0, 1).unflatten(0, (len(k), -1))
        p = heads @ k[:, None].transpose(2, 3) * q.shape[-1] ** -0.5
        p = torch.softmax(p.masked_fill(~seen, -torch.inf), -1)
        out[a:b] = (p @ v[:, None]).flatten(0, 1).transpose(0, 1).to(q.dtype)
    return out
""",
    "lora_shrink": """
import torch
from mistral_nb_kernels.reference import rms_norm

def lora_shrink(x, lora, slots, scale, *, norm=None):
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    out = torch.zeros(len(x), lora.a.shape[1])
    for i, s in enumerate(slots.tolist()):
        if s >= 0:
            out[i] = lora.a[s].float() @ x[i].float() * scale[i]
    return out
""",
    "lora_expand": """
import torch

def lora_expand(shrunk, lora, slots, y):
    for i, s in enumerate(slots.tolist()):
        first = 0
        for part, end in enumerate(lora.ends):
            if s >= 0:
                own = shrunk[i, part * lora.rank : (part + 1) * lora.rank]
                y[i, first:end] = (y[i, first:end].float() + lora.b[s, first:end].float() @ own).to(y.dtype)
            first = end
    return y
""",
    "sample": """
import mistral_nb_kernels

def sample(logits, parameters, penalties=None):
    tokens = mistral_nb_kernels.reference.sample(logits, parameters, penalties)
    return tokens
""",
}
"""By op; those of attention loop over sequences."""
TRITON = {
    "rms_norm": """
import torch
import triton
import triton.language as tl

@triton.jit
def _norm(x, weight, out, eps, dim, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x += row * stride
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, dim, BLOCK):
        at = first + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < dim, other=0.0).to(tl.float32)
        total += part * part
    inverse = tl.rsqrt(tl.sum(total, axis=0) / dim + eps)
    for first in range(0, dim, BLOCK):
        at = first + tl.arange(0, BLOCK)
        part = tl.load(x + at, mask=at < dim, other=0.0).to(tl.float32)
        scale = tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
        tl.store(out + row * dim + at, part * inverse * scale, mask=at < dim)

def rms_norm(x, weight, eps):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm[(len(x),)](x, weight, out, eps, x.shape[1], x.stride(0), BLOCK=64)
    return out
""",
    "swiglu": """
import torch
import triton
import triton.language as tl

@triton.jit
def _swiglu(x, y, hidden, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    gate = tl.load(x + row * stride + at, mask=inside).to(tl.float32)
    up = tl.load(x + row * stride + hidden + at, mask=inside).to(tl.float32)
    tl.store(y + row * hidden + at, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)

def swiglu(gate_up):
    n, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(n, hidden, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[(n, triton.cdiv(hidden, 1024))](gate_up, y, hidden, gate_up.stride(0), BLOCK=1024)
    return y
""",
    "prefill_attention": """
import torch
import triton
import triton.language as tl

@triton.jit
def _attend(
    q, k, v, table, starts, lengths, out, scale, window, stride_q, stride_head, stride_out, stride_out_head,
    stride_page, stride_page_head, stride_token, stride_table,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr,
):
    head, sequence = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    length = tl.load(lengths + sequence)
    d = tl.arange(0, D)
    for begin in range(first, last, M):
        row = begin + tl.arange(0, M)
        position = (length - (last - first)) + row - first
        query = tl.load(q + row[:, None] * stride_q + head * stride_head + d, mask=(row < last)[:, None], other=0.0)
        highest = tl.full((M,), -1e30, tl.float32)
        total = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, D), tl.float32)
        for at in range(0, length, PAGE):
            key = at + tl.arange(0, PAGE)
            page = tl.load(table + sequence * stride_table + at // PAGE).to(tl.int64)
            place = page * stride_page + head // GROUP * stride_page_head + (key - at)[:, None] * stride_token + d
            keys = tl.load(k + place, mask=(key < length)[:, None], other=0.0)
            values = tl.load(v + place, mask=(key < length)[:, None], other=0.0)
            seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
            s = tl.where(seen, tl.dot(query, tl.trans(keys), input_precision="ieee") * scale, -1e30)
            now = tl.maximum(highest, tl.max(s, axis=1))
            p = tl.where(seen, tl.exp(s - now[:, None]), 0.0)
            decay = tl.exp(highest - now)
            total = total * decay + tl.sum(p, axis=1)
            acc = acc * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
            highest = now
        place = row[:, None] * stride_out + head * stride_out_head + d
        tl.store(out + place, acc / total[:, None], mask=(row < last)[:, None])

def attention(q, rows, kv, window=None):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    n, heads, d = q.shape
    grid = (heads, len(rows.lengths))
    _attend[grid](
        q, kv.k, kv.v, kv.table, rows.starts, rows.lengths, out, d**-0.5, window or 2**30, *q.stride()[:2],
        *out.stride()[:2], *kv.k.stride()[:3], kv.table.stride(0),
        GROUP=heads // kv.n_kv_heads, D=d, PAGE=kv.page, M=16,
    )
    return out
""",
}
"""A row a program, in tiles of 64; a row's tile a program; a head of a sequence a program."""
AUTOTUNED = (
    TRITON["swiglu"]
    .replace(
        "@triton.jit",
        "@triton.autotune([triton.Config({'BLOCK': n}, num_warps=n // 128) for n in (512, 1024)], ['hidden'])\n"
        "@triton.jit",
    )
    .replace("triton.cdiv(hidden, 1024))]", "triton.cdiv(hidden, meta['BLOCK']))]")
    .replace("_swiglu[(n", "_swiglu[lambda meta: (n")
    .replace(", BLOCK=1024)", ")")
)
"""SwiGLU in tiles of 512 with 4 warps, or of 1024 with 8."""

"""A checkpoint's tensors into the form that the model runs: stacked, in its precision, in half-split RoPE order."""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo
from mistral_nb.checkpoints.memory import Precision
from mistral_nb.engine.arena import Arena, pages
from mistral_nb.engine.model import FloatLinear, Int8Linear, Layer, Linear, Weights
from mistral_nb.engine.reading import DTYPES, Part, read_parts
from mistral_nb_kernels import reference as ops

__all__ = ["load_weights"]

log = logging.getLogger(__name__)

PLAIN: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}
"""What embeddings and norms are kept in, and matrices where they are not int8."""

Put = Callable[[int, Tensor], None]
Progress = Callable[[int, int], None]


def load_weights(
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    *,
    threads: int = 2,
) -> Weights:
    """Read the tensors of a checkpoint with so many threads; beside the weights this takes a few MB for each, until
    they end.

    `int8` keeps one scale per output row, and all that is no matrix in fp32. `progress` gets bytes read and bytes in
    all, and ends the work by raising. Raises `ModelError` when a file cannot be read or was changed meanwhile. No
    exception, however long it is kept, holds any of the weights.
    """
    try:
        return _load(checkpoint, precision, device, progress, threads)
    except BaseException as error:
        _let_go(error)
        raise


def _let_go(error: BaseException) -> None:
    """Clear what the functions that `error` and its causes went through had in hand.

    The errors of other threads are nobody's by then, but they hold themselves.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()


def _load(
    checkpoint: Checkpoint, precision: Precision, device: torch.device, progress: Progress, threads: int
) -> Weights:
    began = time.perf_counter()
    plan = _Plan(checkpoint, precision, device)
    layers = tuple(plan.layer(f"layers.{index}.") for index in range(checkpoint.args.n_layers))
    embeddings, output = plan.embeddings_and_output()
    weights = Weights(embeddings, layers, plan.vector("norm.weight"), output)
    read_parts(plan.parts, progress, threads=threads, pinned=device.type == "cuda")
    checkpoint.check_unchanged()
    seconds = time.perf_counter() - began
    size = checkpoint.bytes / 1e9
    log.info("read %.2f GB in %.2f s (%.1f GB/s), as %s", size, seconds, size / seconds, precision)
    return weights


class _Plan:
    """Places for the weights, and in `parts` what is to be read into them."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, device: torch.device) -> None:
        self.parts: list[Part] = []
        self._checkpoint = checkpoint
        self._int8 = precision == "int8"
        self._dtype = PLAIN[precision]
        self._device = device
        self._arena = Arena(device)
        self._scratch = _Scratch()

    def vector(self, name: str) -> Tensor:
        info = self._checkpoint.tensors[name]
        place = self._arena.tensor(info.shape, self._dtype)
        self._read(info, place.view(1, -1))
        return place

    def layer(self, prefix: str) -> Layer:
        return Layer(
            attention_norm=self.vector(prefix + "attention_norm.weight"),
            wqkv=self._matrix(*(f"{prefix}attention.{name}.weight" for name in ("wq", "wk", "wv"))),
            wo=self._matrix(prefix + "attention.wo.weight"),
            ffn_norm=self.vector(prefix + "ffn_norm.weight"),
            w13=self._matrix(*(f"{prefix}feed_forward.{name}.weight" for name in ("w1", "w3"))),
            w2=self._matrix(prefix + "feed_forward.w2.weight"),
        )

    def embeddings_and_output(self) -> tuple[Tensor, Linear]:
        """Tied ones share their memory; in int8, where they cannot, both are made of one reading."""
        info = self._checkpoint.tensors["tok_embeddings.weight"]
        embeddings = self._arena.tensor(info.shape, self._dtype)
        if not self._checkpoint.args.tied_embeddings:
            self._read(info, embeddings)
            return embeddings, self._matrix("output.weight")
        if not self._int8:
            self._read(info, embeddings)
            return embeddings, FloatLinear(embeddings)
        output = self._int8_matrix(*info.shape)
        plain, quantised = _rows_into(embeddings), self._quantised_into(output)

        def put(first: int, rows: Tensor) -> None:
            plain(first, rows)
            quantised(first, rows)

        self.parts.append(Part(info, put))
        return embeddings, output

    def _matrix(self, *names: str) -> Linear:
        """The tensors of these names, one below the other."""
        infos = [self._checkpoint.tensors[name] for name in names]
        shape = sum(info.shape[0] for info in infos), infos[0].shape[1]
        matrix = self._int8_matrix(*shape) if self._int8 else FloatLinear(self._arena.tensor(shape, self._dtype))
        start = 0
        for name, info in zip(names, infos, strict=True):
            rows = slice(start, start + info.shape[0])
            interleaved = self._checkpoint.interleaved and name.endswith(("wq.weight", "wk.weight"))
            if isinstance(matrix, FloatLinear):
                self._read(info, matrix.weight[rows], interleaved=interleaved)
            else:
                part = Int8Linear(matrix.weight[rows], matrix.scale[rows])
                self._add(info, self._quantised_into(part), interleaved)
            start = rows.stop
        return matrix

    def _int8_matrix(self, outputs: int, inputs: int) -> Int8Linear:
        assert inputs % 32 == 0
        values = self._arena.tensor((outputs, inputs), torch.int8)
        return Int8Linear(values, self._arena.tensor((outputs,), torch.float32))

    def _read(self, info: TensorInfo, place: Tensor, *, interleaved: bool = False) -> None:
        as_it_is = self._device.type == "cpu" and DTYPES[info.dtype] == place.dtype and not interleaved
        self._add(info, _rows_into(place), interleaved, place if as_it_is else None)

    def _add(self, info: TensorInfo, put: Put, interleaved: bool, direct: Tensor | None = None) -> None:
        head_dim = self._checkpoint.args.head_dim
        if interleaved:
            self.parts.append(Part(info, lambda first, rows: put(first, _half_split(rows, head_dim)), step=head_dim))
        else:
            self.parts.append(Part(info, put, direct))

    def _quantised_into(self, place: Int8Linear) -> Put:
        def put(first: int, rows: Tensor) -> None:
            quotients = self._scratch.copy(rows).view(-1, rows.shape[-1])
            block = slice(first, first + len(quotients))
            ops.quantize_int8(quotients, out=(place.weight[block], place.scale[block]))

        return put


def _rows_into(place: Tensor) -> Put:
    def put(first: int, rows: Tensor) -> None:
        block = place[first : first + rows.numel() // rows.shape[-1]]
        block.view(rows.shape).copy_(rows.to(place.device))

    return put


def _half_split(rows: Tensor, head_dim: int) -> Tensor:
    """A view of rows of whole heads [heads * head_dim, in], whose rotated pairs are neighbours, with a pair's halves
    apart: [heads, 2, head_dim / 2, in].
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2)


class _Scratch(threading.local):
    """fp32 memory of each thread, used again for every block: given back, what malloc takes in a thread stays there."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def copy(self, rows: Tensor) -> Tensor:
        """`rows` in fp32, until the next call in this thread."""
        if len(self._memory) < rows.numel():
            self._memory = pages(4 * rows.numel()).view(torch.float32)
        return self._memory[: rows.numel()].view(rows.shape).copy_(rows)

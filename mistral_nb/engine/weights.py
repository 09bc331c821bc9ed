"""A checkpoint's tensors into the form that the model runs: stacked, in its precision, in half-split RoPE order."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo
from mistral_nb.checkpoints.memory import OUTPUTS, Precision, int4_group
from mistral_nb.engine.arena import Arena
from mistral_nb.engine.device import device_kind, give_back, plain_dtype
from mistral_nb.engine.model import Layer, Weights
from mistral_nb.engine.packed_copy import PackedCopy, packed_tensors
from mistral_nb.engine.quantise import Put, Quantiser, rows_into
from mistral_nb.engine.random_weights import is_random, make_parts
from mistral_nb.engine.reading import DTYPES, Part, ReadError, read_parts
from mistral_nb_kernels import reference
from mistral_nb_kernels.packed import Dense, Int4, Int4Cpu, Int8, Int8Cpu, Norm, Weight

__all__ = ["let_go", "load_weights"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def load_weights(
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    progress: Progress = lambda done, total: None,
    *,
    threads: int = 2,
    packed_copy: PackedCopy | None = None,
) -> Weights:
    """Read the tensors of a checkpoint with so many threads; beside the weights this takes a few MB for each, until
    they end.

    `int8` keeps one scale per output row, `int4` two numbers for each group of a row, and the head in int8; what is no
    matrix is in fp32 then, on a GPU in 16 bits. Matrices that are in `packed_copy` are read out of it, or, where that
    fails, which the log tells, out of the checkpoint as without it.

    `progress` gets bytes read and bytes in all, and ends the work by raising. Raises `ModelError` when a file cannot be
    read or was changed meanwhile, and where there is no memory, on a GPU `torch.OutOfMemoryError`. No exception,
    however long it is kept, holds any of the weights.
    """
    if packed_copy is not None:
        try:
            return _load_or_let_go(checkpoint, precision, device, progress, threads, packed_copy)
        except ReadError as error:
            if error.path != packed_copy.path:
                raise
            log.warning("the packed copy cannot be used: %s; it is made again", error)
            packed_copy.remove()
    return _load_or_let_go(checkpoint, precision, device, progress, threads, None)


def _load_or_let_go(
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    progress: Progress,
    threads: int,
    packed_copy: PackedCopy | None,
) -> Weights:
    try:
        return _load(checkpoint, precision, device, progress, threads, packed_copy)
    except BaseException as error:
        let_go(error, device)
        raise


def let_go(error: BaseException, device: torch.device) -> None:
    """Clear what the functions that `error` and its causes went through had in hand, and give its memory back.

    The errors of other threads are nobody's by then, but they hold themselves.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    give_back(device)


def _load(
    checkpoint: Checkpoint,
    precision: Precision,
    device: torch.device,
    progress: Progress,
    threads: int,
    packed_copy: PackedCopy | None,
) -> Weights:
    began = time.perf_counter()
    plan = _Plan(checkpoint, precision, device, packed_copy)
    layers = tuple(plan.layer(f"layers.{index}.") for index in range(checkpoint.args.n_layers))
    embeddings, output = plan.embeddings_and_output()
    norm = plan.norm("norm.weight")
    read = make_parts if is_random(checkpoint) else read_parts
    read(plan.parts, progress, threads=threads, device=device)
    checkpoint.check_unchanged()
    seconds = time.perf_counter() - began
    size = sum(part.info.end - part.info.start for part in plan.parts) / 1e9
    source = f" out of {packed_copy.path}" if packed_copy else ""
    log.info("read %.2f GB in %.2f s (%.1f GB/s), as %s%s", size, seconds, size / seconds, precision, source)
    return Weights(embeddings, layers, norm, _for_steps(output, device))


def _for_steps(output: Weight, device: torch.device) -> Weight:
    """The head in the order that decoding reads quickest. Until the plan goes it is there twice."""
    return reference.blocked_int8(output) if isinstance(output, Int8) and device.type == "cpu" else output


class _Plan:
    """Places for the weights, and in `parts` what is to be read into them."""

    def __init__(
        self, checkpoint: Checkpoint, precision: Precision, device: torch.device, packed_copy: PackedCopy | None
    ) -> None:
        self.parts: list[Part] = []
        self._checkpoint = checkpoint
        self._precision = precision
        self._dtype = plain_dtype(precision, device)
        self._device = device
        self._group = int4_group(checkpoint.args, device_kind(device))
        self._copy = packed_copy
        self._arena = Arena(device)
        self._quantiser = Quantiser()

    def norm(self, name: str) -> Norm:
        info = self._checkpoint.tensors[name]
        place = self._arena.tensor(info.shape, self._dtype)
        self._read(info, Dense(place.view(1, -1)))
        return Norm(place, self._checkpoint.args.norm_eps)

    def layer(self, prefix: str) -> Layer:
        return Layer(
            attention_norm=self.norm(prefix + "attention_norm.weight"),
            wqkv=self._matrix(prefix + "wqkv", *(f"{prefix}attention.{name}.weight" for name in ("wq", "wk", "wv"))),
            wo=self._matrix(prefix + "wo", prefix + "attention.wo.weight"),
            ffn_norm=self.norm(prefix + "ffn_norm.weight"),
            w13=self._matrix(prefix + "w13", *(f"{prefix}feed_forward.{name}.weight" for name in ("w1", "w3"))),
            w2=self._matrix(prefix + "w2", prefix + "feed_forward.w2.weight"),
        )

    def embeddings_and_output(self) -> tuple[Tensor, Weight]:
        """Tied ones share their memory; in int8, where they cannot, both are made of one reading."""
        info = self._checkpoint.tensors["tok_embeddings.weight"]
        embeddings = Dense(self._arena.tensor(info.shape, self._dtype))
        if not self._checkpoint.args.tied_embeddings:
            self._read(info, embeddings)
            return embeddings.weight, self._matrix("output", "output.weight")
        if self._precision not in ("int8", "int4"):
            self._read(info, embeddings)
            return embeddings.weight, embeddings
        output = self._head(info.shape)
        if self._copied("output", output):
            self._read(info, embeddings)
            return embeddings.weight, output
        plain, quantised = rows_into(embeddings.weight), self._quantiser.into(output)

        def put(first: int, rows: Tensor) -> None:
            plain(first, rows)
            quantised(first, rows)

        self.parts.append(Part(info, put))
        return embeddings.weight, output

    def _matrix(self, key: str, *names: str) -> Weight:
        """The tensors of these names, one below the other; the model's matrix `key`."""
        infos = [self._checkpoint.tensors[name] for name in names]
        shape = sum(info.shape[0] for info in infos), infos[0].shape[1]
        quantised = self._precision in ("int8", "int4")
        matrix = self._head(shape) if key == "output" and quantised else self._place(shape, self._precision)
        if self._copied(key, matrix):
            return matrix
        start = 0
        for name, info in zip(names, infos, strict=True):
            rows = slice(start, start + info.shape[0])
            interleaved = self._checkpoint.interleaved and name.endswith(("wq.weight", "wk.weight"))
            self._read(info, _part(matrix, rows), interleaved=interleaved)
            start = rows.stop
        return matrix

    def _place(self, shape: tuple[int, ...], precision: Precision) -> Weight:
        outputs, inputs = shape
        if precision == "int8":
            values = self._arena.tensor((outputs, inputs), torch.int8)
            return Int8(values, self._arena.tensor((outputs,), torch.float32))
        if precision != "int4":
            return Dense(self._arena.tensor(shape, self._dtype))
        assert self._group, "check_fits refuses such a model"
        packed = self._arena.tensor((outputs, inputs // 2), torch.uint8)
        pairs = (inputs // self._group, outputs, 2)
        if self._device.type == "cpu":
            return Int4Cpu(packed, self._arena.tensor(pairs, torch.bfloat16), self._group)
        return Int4(packed, self._arena.tensor(pairs, torch.float16), self._group)

    def _head(self, shape: tuple[int, ...]) -> Weight:
        """A place in int8. On the CPU it is put into another order before steps read it."""
        values = self._arena.passing(shape, torch.int8)
        return Int8(values, self._arena.tensor(shape[:1], torch.float32))

    def _copied(self, key: str, place: Weight) -> bool:
        """Whether the packed copy, if there is one, has this matrix: then its tensors are read as they are."""
        if self._copy is None:
            return False
        tensors = packed_tensors(key, place)
        self.parts += [Part(self._copy.find(name, tensor), _nowhere, tensor) for name, tensor in tensors]
        return bool(tensors)

    def _read(self, info: TensorInfo, place: Weight, *, interleaved: bool = False) -> None:
        """Rows of the checkpoint into `place`; what needs no change goes straight there."""
        put = self._quantiser.into(place)
        step = OUTPUTS if isinstance(place, Int4Cpu) else 1
        if interleaved:
            head_dim = self._checkpoint.args.head_dim
            split = _half_split(put, head_dim)
            self.parts.append(Part(info, split, step=math.lcm(step, head_dim)))
        elif isinstance(place, Dense) and DTYPES[info.dtype] == place.weight.dtype:
            self.parts.append(Part(info, _nowhere, place.weight))
        else:
            self.parts.append(Part(info, put, step=step))


def _part(place: Weight, rows: slice) -> Weight:
    """Some of the rows of a matrix."""
    match place:
        case Dense(weight):
            return Dense(weight[rows])
        case Int8(values, scale):
            return Int8(values[rows], scale[rows])
        case Int4Cpu(packed, affine, group):
            return Int4Cpu(packed[rows], affine[:, rows], group)
        case Int4(packed, affine, group):
            return Int4(packed[rows], affine[:, rows], group)
        case Int8Cpu():
            raise AssertionError("made of a whole Int8")


def _half_split(put: Put, head_dim: int) -> Put:
    """Takes rows of whole heads [heads * head_dim, in], whose rotated pairs are neighbours, and puts them with a pair's
    halves apart: a view [heads, 2, head_dim / 2, in].
    """
    return lambda first, rows: put(first, rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2))


def _nowhere(first: int, rows: Tensor) -> None:
    """For what goes straight to its place."""
    raise AssertionError("not in rows")

"""LoRA adapters at run time: slots on the device, which are read into beside the steps of what runs.

A slot holds an adapter of any module and any rank up to that of all slots. What a row of a batch has is its slot's
number and its own scale, so to change either changes no graph. The matrices of a slot are one row of one buffer
[slots, elements], of which each layer has views.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from mistral_nb.checkpoints.adapter_files import RANK, RANK_ON_CPU, AdapterFiles, features, looks, open_adapter
from mistral_nb.checkpoints.adapter_tensors import MODULES, matrices
from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.header import RawTensor, read_header
from mistral_nb.checkpoints.untrusted import open_file, quoted, readable
from mistral_nb.engine.arena import Reserve
from mistral_nb.engine.device import side_stream
from mistral_nb.engine.model import LayerAdapters
from mistral_nb.engine.reading import DTYPES
from mistral_nb.errors import AdapterError, ModelError
from mistral_nb_kernels import Lora

__all__ = ["RANK", "RANK_ON_CPU", "SLOTS", "AdapterSlots", "AdapterSource", "Applied"]

log = logging.getLogger(__name__)

SLOTS = 8
CHECKED = 1000
"""Of so many adapters is known that they can be applied, without their files being read again."""
CLOSING_S = 5.0
"""For how long closing waits for what is read, as from a disk that does not answer."""
ALIGNMENT = 64
"""Elements."""
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The modules of each product of a layer, in the order of its outputs."""

Pair = Mapping[str, RawTensor]
"""A module's matrices, by their sides A and B."""


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter's folder, as PEFT writes it, and a key that no other adapter and no other version of it has.

    `looks` is what `checkpoints.adapter_files.looks` told when the key was made: files that look otherwise by now are
    not read. Empty, they are read as they are.
    """

    key: str
    folder: Path
    looks: str = ""


class Applied(NamedTuple):
    """Where an adapter is, and by what its updates are multiplied."""

    slot: int
    scale: float


@dataclass(slots=True)
class _Resident:
    """What a slot has, or gets while `loading`. `holders` need it: generations that run or wait for it."""

    slot: int
    loading: bool = True
    scale: float = 0.0
    holders: set[Hashable] = field(default_factory=set)


class AdapterSlots:
    """Adapters on `device`, the least recently used of those that nobody holds making room for the next.

    `rank` None is `RANK`, or `RANK_ON_CPU`. Memory is taken with the first adapter; on the CPU none that is not written
    to. Methods are the engine's thread's, but `check`.
    """

    def __init__(
        self,
        args: ModelArgs,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots: int = SLOTS,
        rank: int | None = None,
    ) -> None:
        self.rank = -(-(rank or (RANK_ON_CPU if device.type == "cpu" else RANK)) // 16) * 16
        self.slots = slots
        self._args = args
        self._dtype = dtype
        self._device = device
        self._residents: dict[str, _Resident] = {}
        self._waiting: dict[Hashable, None] = {}
        self._failures: dict[Hashable, str] = {}
        self._checked: set[str] = set()
        self._ranks: dict[str, list[int]] = {group: [0] * slots for group in GROUPS}
        self._memory: _Memory | None = None
        self._change = threading.Condition()
        self._closed = False
        self._readers: list[threading.Thread] = []

    @property
    def layers(self) -> Sequence[LayerAdapters]:
        """Each layer's adapters, once there has been one."""
        assert self._memory is not None
        return self._memory.layers

    @property
    def begun(self) -> bool:
        """Whether there are `layers`."""
        return self._memory is not None

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the adapters that are here, the least recently used first."""
        with self._change:
            return tuple(key for key, resident in self._residents.items() if resident.scale)

    def check(self, source: AdapterSource) -> None:
        """`AdapterError` where an adapter cannot be applied, as far as can be seen without its numbers. Any thread."""
        if source.key not in self._checked:
            self._open(source)
            if len(self._checked) >= CHECKED:
                self._checked.clear()
            self._checked.add(source.key)

    def take(self, holder: Hashable, source: AdapterSource) -> Applied | None:
        """The slot of an adapter, which is the holder's until `give_back`; None while it is not there yet: ask again.

        The first to ask for one that is not there begins its loading. Slots go to who asked first: while somebody waits
        for one, who asks later waits too, even for an adapter that is there. `AdapterError` where it cannot be loaded,
        for all that waited for that loading.
        """
        with self._change:
            if holder in self._failures:
                raise AdapterError(self._failures.pop(holder))
            resident = self._residents.get(source.key)
            if resident is None or holder not in resident.holders:
                resident = self._granted(holder, source)
            if resident is None:
                return None
            self._residents[source.key] = self._residents.pop(source.key, resident)
            return None if resident.loading else Applied(resident.slot, resident.scale)

    def give_back(self, holder: Hashable) -> None:
        """Give up whatever it held or waited for. What runs on the device already may still read the slot, nothing
        after it.
        """
        with self._change:
            self._waiting.pop(holder, None)
            self._failures.pop(holder, None)
            for resident in self._residents.values():
                resident.holders.discard(holder)

    def wait(self, seconds: float) -> None:
        """Until a loading ends, at most so long."""
        with self._change:
            if any(resident.loading for resident in self._residents.values()):
                self._change.wait(seconds)

    def close(self) -> None:
        """Give the memory back, once the threads that read into it have ended: they hold it until then, and who takes
        longer than `CLOSING_S` holds it on.
        """
        self._closed = True
        deadline = time.monotonic() + CLOSING_S
        for thread in self._readers:
            thread.join(max(0.0, deadline - time.monotonic()))
        if reading := sum(thread.is_alive() for thread in self._readers):
            log.warning("closed, but %d adapters are still being read; until then their memory is held", reading)
        with self._change:
            self._residents.clear()
            self._memory = None

    def _open(self, source: AdapterSource) -> AdapterFiles:
        files = open_adapter(source.folder, self._args)
        if source.looks not in ("", files.looks):
            raise _changed(source)
        if files.rank > self.rank:
            raise AdapterError(
                f"the adapter {quoted(source.folder.name)} has rank {files.rank}, and slots hold up to {self.rank}; "
                f"start the engine with --lora-rank {files.rank}, or set lora_rank to {files.rank} and start it again"
            )
        return files

    def _granted(self, holder: Hashable, source: AdapterSource) -> _Resident | None:
        """What is now the holder's too, if it is its turn and there is a slot."""
        first = next(iter(self._waiting), holder)
        resident = (self._residents.get(source.key) or self._begin(source)) if first == holder else None
        if resident is None:
            self._waiting.setdefault(holder)
        else:
            self._waiting.pop(holder, None)
            resident.holders.add(holder)
        return resident

    def _begin(self, source: AdapterSource) -> _Resident | None:
        """Begin to load an adapter, where there is a slot for it."""
        slot = self._free()
        if slot is None:
            return None
        memory, resident = self._allocated(), _Resident(slot)
        try:
            work = (source, resident, memory, memory.clear(slot))
            thread = threading.Thread(target=self._load, args=work, name="mistral-nb adapter", daemon=True)
            thread.start()
        except RuntimeError as error:  # of a GPU, or of a system that has no more threads
            raise AdapterError(_unread(source, error)) from error
        self._readers = [*(each for each in self._readers if each.is_alive()), thread]
        return resident

    def _allocated(self) -> _Memory:
        if self._memory is None:
            try:
                self._memory = _Memory(self._args, self._dtype, self._device, self.slots, self.rank, self._ranks)
            except (ModelError, RuntimeError) as error:  # torch raises the second
                first = str(error).partition("\n")[0].partition(";")[0]
                raise AdapterError(
                    f"there is no memory for {self.slots} adapters of rank {self.rank} ({first}); free some, or start "
                    "the engine with a smaller --context or --lora-rank"
                ) from error
        return self._memory

    def _free(self) -> int | None:
        """A slot that nobody has; else that of the least recently used which nobody holds, and which is forgotten."""
        taken = {resident.slot for resident in self._residents.values()}
        free = next((slot for slot in range(self.slots) if slot not in taken), None)
        if free is not None:
            return free
        for key, resident in self._residents.items():
            if not resident.holders and not resident.loading:
                del self._residents[key]
                return resident.slot
        return None

    def _load(self, source: AdapterSource, resident: _Resident, memory: _Memory, cleared: Callable[[], None]) -> None:
        """In a thread of its own: read an adapter into its slot."""
        began, failure = time.perf_counter(), f"{quoted(source.folder.name)} was not read; see the engine's log"
        usual = torch.get_num_threads()
        torch.set_num_threads(1)  # helpers of its own would be in the way of the steps'
        try:
            files = self._open(source)
            memory.read(files, resident.slot, cleared, lambda: self._closed)
            if looks(source.folder) != files.looks:
                raise _changed(source)
            resident.scale, failure = files.scale, ""
            log.info("read the adapter %s in %.3f s", quoted(source.folder.name), time.perf_counter() - began)
        except AdapterError as error:
            failure = str(error)
        except ModelError as error:
            failure = _unread(source, error)
        except RuntimeError as error:  # torch's, as of a GPU that has failed
            log.exception("an adapter cannot be read")
            failure = _unread(source, error)
        finally:
            torch.set_num_threads(usual)  # for every thread to come
            with self._change:
                resident.loading = False
                if failure:
                    self._failures.update(dict.fromkeys(resident.holders, failure))
                    self._residents.pop(source.key, None)  # forgotten already by closing
                self._change.notify_all()


class _Memory:
    """The slots' buffer, and each layer's views of it. `ranks`, by group and slot, are told as slots are read into."""

    def __init__(
        self,
        args: ModelArgs,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
        rank: int,
        ranks: Mapping[str, list[int]],
    ) -> None:
        self._dtype = dtype
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._ranks = ranks
        groups = [_Group.of(args, modules, rank) for modules in GROUPS.values()]
        shape = slots, args.n_layers * sum(group.elements for group in groups)
        self._reserve = Reserve(shape, dtype) if self._on_cpu else None
        self._data = self._reserve.tensor if self._reserve else torch.empty(shape, dtype=dtype, device=device)
        self._stream = None if self._on_cpu else side_stream(device)
        self.layers = tuple(self._layer(groups, index, rank) for index in range(args.n_layers))

    def _layer(self, groups: Sequence[_Group], index: int, rank: int) -> LayerAdapters:
        begin = index * sum(group.elements for group in groups)
        views = {}
        for name, group in zip(GROUPS, groups, strict=True):
            rows = len(group.ends) * rank
            middle = begin + _aligned(rows * group.inputs)
            a = self._data[:, begin : begin + rows * group.inputs].view(-1, rows, group.inputs)
            b = self._data[:, middle : middle + group.ends[-1] * rank].view(-1, group.ends[-1], rank)
            views[name] = Lora(a, b, group.ends, self._ranks[name] if self._on_cpu else None)
            begin += group.elements
        return LayerAdapters(**views)

    def clear(self, slot: int) -> Callable[[], None]:
        """Forget what a slot held; the result waits, on the stream of who calls it, until nothing reads it any more."""
        if self._stream is None:
            assert self._reserve is not None
            self._reserve.release(slot)
            return lambda: None
        over = torch.cuda.Event()  # type: ignore[no-untyped-call]
        over.record()
        return over.wait

    def read(self, files: AdapterFiles, slot: int, cleared: Callable[[], None], ended: Callable[[], bool]) -> None:
        """Read an adapter into a slot, layer by layer; all of it is there at the end, unless `ended()` came before."""
        pairs: dict[tuple[int, str], dict[str, RawTensor]] = {}
        for index, module, side, tensor in matrices(read_header(files.weights)):
            pairs.setdefault((index, module), {})[side] = tensor
        for group, modules in GROUPS.items():
            self._ranks[group][slot] = files.rank if set(modules) & set(files.modules) else 0
        with readable(files.folder), open_file(files.weights) as file, torch.cuda.stream(self._stream):
            cleared()
            for index, layer in enumerate(self.layers):
                if ended():
                    return
                for group, modules in GROUPS.items():
                    own = [pairs.get((index, module)) for module in modules]
                    self._put(getattr(layer, group), slot, files.rank, own, file)
            if self._stream is not None:
                self._stream.synchronize()

    def _put(self, lora: Lora, slot: int, rank: int, pairs: Sequence[Pair | None], file: BinaryIO) -> None:
        """Read one product's matrices, padded on a GPU; zeros for a module that has none."""
        if lora.ranks is not None and not lora.ranks[slot]:
            return
        width = rank if self._on_cpu else lora.rank
        a = torch.zeros((len(pairs), width, lora.a.shape[2]), dtype=self._dtype)
        b = torch.zeros((lora.b.shape[1], width), dtype=self._dtype)
        for part, (pair, (begin, end)) in enumerate(zip(pairs, itertools.pairwise((0, *lora.ends)), strict=True)):
            if pair is not None:
                a[part, :rank] = _tensor(file, pair["A"])
                b[begin:end, :rank] = _tensor(file, pair["B"])
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError("it holds numbers that are not finite; train it again, at a lower learning rate")
        if self._on_cpu:
            b = b.t()
        lora.a[slot].view(-1)[: a.numel()].copy_(a.flatten())
        lora.b[slot].view(-1)[: b.numel()].copy_(b.flatten())


@dataclass(frozen=True, slots=True)
class _Group:
    """Of one product its inputs, the cumulative outputs of its modules, and the elements of its adapter in a slot."""

    inputs: int
    ends: tuple[int, ...]
    elements: int

    @classmethod
    def of(cls, args: ModelArgs, modules: Sequence[str], rank: int) -> _Group:
        sizes = features(args)
        inputs = sizes[MODULES[modules[0]][0]]
        ends = tuple(itertools.accumulate(sizes[MODULES[module][1]] for module in modules))
        return cls(inputs, ends, _aligned(len(ends) * rank * inputs) + _aligned(ends[-1] * rank))


def _unread(source: AdapterSource, error: Exception) -> str:
    return f"the adapter {quoted(source.folder.name)} cannot be read: {str(error).partition(chr(10))[0]}"


def _changed(source: AdapterSource) -> AdapterError:
    return AdapterError(f"the adapter {quoted(source.folder.name)} is not applied: its files were changed; ask again")


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _tensor(file: BinaryIO, tensor: RawTensor) -> Tensor:
    """One matrix, as it is in the file."""
    data = bytearray(tensor.end - tensor.start)
    file.seek(tensor.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ModelError("its file was changed meanwhile; ask again")
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape)  # type: ignore[index]

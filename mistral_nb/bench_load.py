"""`mistral-nb bench load`: how fast a sharded checkpoint gets into memory, beside how fast its files can be read.

The checkpoint is made for the purpose, of random numbers in bf16, in a temporary folder. Each loading runs in a process
of its own and tells its peak memory. Of int8 and int4 there is one more, out of a packed copy that was made before; its
speed counts the checkpoint's bytes, as that of every loading. What is read is in the page cache; in a second series it
is dropped from there first, so that it comes from the disk, where the folder is on one. Reading is measured into one
small buffer for each thread, which stays in the processor's cache, and into memory of the checkpoint's size, new and
used before, as a loading needs it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_nb.bench_report import Measurement, check_writable, machine, print_table, write_report
from mistral_nb.checkpoints import ModelArgs
from mistral_nb.checkpoints.names import expected_tensors, hugging_face_name
from mistral_nb.errors import ConfigurationError, MistralError
from mistral_nb.progress import amount

__all__ = ["conclusions", "drop", "make_checkpoint", "run"]

PRECISIONS = ("bf16", "fp32", "int8", "int4")
PACKED = ("int8", "int4")
SHARD = 500_000_000
"""Bytes of a shard, at most."""

BAR = 0.7
"""Share of one thread's reading that loading without a conversion is to reach."""

_BARRED = ("load as bf16, cached", "load as bf16, from disk")
_BUFFER = 1 << 23
_DROPPED = 0.05
"""Share of a file that may still be in memory when it has been dropped from there."""
_DIM, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM, _VOCABULARY = 2048, 7168, 16, 4, 128, 32_000


def run(size_gb: float = 2.0, runs: int = 5, path: Path | None = None, folder: Path | None = None) -> int:
    """Print the measurements, and the same as JSON; `path` takes the JSON instead. Returns the exit status.

    The checkpoint is written into `folder`, by default the one for temporary files. Raises `ConfigurationError` before
    it measures when `path` cannot be written or the folder has no room, `MistralError` when a loading fails.
    """
    if path is not None:
        check_writable(path)
    folder = folder or Path(tempfile.gettempdir())
    _check_room(folder, int(size_gb * 1e9))
    with tempfile.TemporaryDirectory(prefix="mistral-nb-bench-", dir=folder) as own:
        checkpoint = Path(own) / "checkpoint"
        size = make_checkpoint(checkpoint, int(size_gb * 1e9))
        files = sorted(checkpoint.glob("*.safetensors"))
        from_disk = drop(files)
        copies = Path(own) / "packed"
        copied = _make_copies(checkpoint, size, copies)
        series: dict[str, list[float]] = {}
        memory: dict[str, int] = {}
        for _ in range(runs):
            for name, seconds, used in _round(checkpoint, files, size, from_disk, copied):
                series.setdefault(name, []).append(size / seconds / 1e9)
                memory |= {name: max(used, memory.get(name, 0))} if used else {}
                print(f"{name}: {size / seconds / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
    measurements = [Measurement.of(name, "GB/s", values, _bar(name)) for name, values in series.items()]
    report = {**machine(), "checkpoint_bytes": size, "shards": len(files), "peak_bytes": memory}
    print(f"{size / 1e9:.2f} GB of bf16 in {len(files)} shards ({report['cpu']}, {report['cores']} cores)")
    print_table(measurements)
    for line in conclusions(measurements, memory, size):
        print(line)
    if len(copied) < len(PACKED):
        print(f"Not every packed copy is measured: {folder} lacks room; --folder DIR takes another one")
    if not from_disk:
        print(f"Nothing is measured from disk: {folder} keeps files in memory; --folder DIR takes another one")
    write_report(report, measurements, path)
    return 0


def _check_room(folder: Path, size: int) -> None:
    """`ConfigurationError` unless `size` bytes, and a layer more, can be written into `folder`."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be used ({error.strerror or error}); give --folder another folder"
        ) from error
    if free < size + SHARD:
        raise ConfigurationError(
            f"{folder} has {amount(free)} free, and the checkpoint takes {amount(size)}; "
            "give --folder another folder, or --size-gb a smaller size"
        )


def make_checkpoint(folder: Path, size: int) -> int:
    """A sharded Hugging Face folder of about `size` bytes of bf16, without a tokenizer: the bytes of its tensors."""
    folder.mkdir(parents=True)
    layer = _parameters(ModelArgs(**_shape(2))) - _parameters(ModelArgs(**_shape(1)))
    rest = _parameters(ModelArgs(**_shape(1))) - layer
    args = ModelArgs(**_shape(max(1, round((size / 2 - rest) / layer))))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in expected_tensors(args):
        if filled and filled + _bytes(shape) > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((hugging_face_name(name), shape))
        filled += _bytes(shape)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, tensors)
        weight_map |= {name: file for name, _ in tensors}
    index = {"metadata": {"total_size": 2 * _parameters(args)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(args)), encoding="utf-8")
    return 2 * _parameters(args)


def _shape(layers: int) -> dict[str, Any]:
    sizes = {"dim": _DIM, "n_layers": layers, "n_heads": _HEADS, "n_kv_heads": _KV_HEADS, "head_dim": _HEAD_DIM}
    return {
        **sizes,
        "hidden_dim": _HIDDEN,
        "vocab_size": _VOCABULARY,
        "norm_eps": 1e-5,
        "rope_theta": 1e6,
        "context": 8192,
    }


def _config(args: ModelArgs) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.context,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


def _bytes(shape: Sequence[int]) -> int:
    size = 2
    for each in shape:
        size *= each
    return size


def _parameters(args: ModelArgs) -> int:
    return sum(_bytes(shape) for _, shape in expected_tensors(args)) // 2


def _write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Random mantissas and signs, in numbers of about 2**-7: the same ones over and over."""
    block = bytearray(random.Random(0).randbytes(_BUFFER))
    block[1::2] = block[1::2].translate(bytes(0x3C | byte & 0x80 for byte in range(256)))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + _bytes(shape)]}
        end += _bytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, _BUFFER):
            file.write(memoryview(block)[: min(_BUFFER, end - start)])
        os.fsync(file.fileno())


def _make_copies(checkpoint: Path, size: int, folder: Path) -> dict[str, Path]:
    """The folders of the packed copies by precision; one that the disk has no room for is left out."""
    folder.mkdir()
    copies = {precision: folder / precision for precision in PACKED}
    for precision, copy in copies.items():
        _load(checkpoint, precision, size, copy)
    return {precision: copy for precision, copy in copies.items() if any(copy.glob("*"))}


def _round(
    checkpoint: Path, files: Sequence[Path], size: int, from_disk: bool, copied: Mapping[str, Path]
) -> Iterator[tuple[str, float, int | None]]:
    """One measurement of each kind: name, seconds, and the peak memory of a loading."""
    threads = (1, 2)
    _read(files, 2)
    for count in threads:
        yield f"read, {count} thread{'s' if count > 1 else ''}, cached", _read(files, count), None
    yield from _read_into_memory(files, 2)
    for precision in PRECISIONS:
        found = _load(checkpoint, precision, size)
        yield f"load as {precision}, cached", found["load_s"], _rise(found)
    for precision, copy in copied.items():
        found = _load(checkpoint, precision, size, copy)
        yield f"load as {precision}, packed copy, cached", found["load_s"], _rise(found)
    if from_disk:
        for count in threads:
            drop(files)
            yield f"read, {count} thread{'s' if count > 1 else ''}, from disk", _read(files, count), None
        drop(files)
        found = _load(checkpoint, "bf16", size)
        yield "load as bf16, from disk", found["load_s"], _rise(found)


def _rise(found: dict[str, Any]) -> int | None:
    """The whole process at its peak, interpreter and torch included."""
    return int(found["peak"]) if found["peak"] else None


def _load(checkpoint: Path, precision: str, size: int, copy: Path | None = None) -> dict[str, Any]:
    """A loading in a process of its own, which touches as much memory before: a virtual machine's host may first have
    to find it.
    """
    command = [sys.executable, "-P", "-m", "mistral_nb.engine.load_probe", str(checkpoint), "--precision", precision]
    command += ["--touch", str(2 * size), *(["--packed-copy", str(copy)] if copy else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MistralError(f"the loading failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _read(files: Sequence[Path], threads: int) -> float:
    """Seconds to read every byte, by threads with one buffer each that they use again and again."""
    buffers = [bytearray(_BUFFER) for _ in range(threads)]
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda number: _read_share(files, buffers[number], number, threads), range(threads)))
    return time.perf_counter() - began


def _read_into_memory(files: Sequence[Path], threads: int) -> Iterator[tuple[str, float, None]]:
    """Seconds to read every byte to a place of its own: in new memory, which the system has to clear on the way, and
    again in what is there now.
    """
    size = sum(path.stat().st_size for path in files)
    _huge_pages(size).close()
    with _huge_pages(size, touched=False) as place, memoryview(place) as view, ThreadPoolExecutor(threads) as pool:
        for which in ("new", "used"):
            began = time.perf_counter()
            list(pool.map(lambda number: _read_places(files, view, number, threads), range(threads)))
            yield f"read into {which} memory, {threads} threads, cached", time.perf_counter() - began, None


def _huge_pages(size: int, touched: bool = True) -> mmap.mmap:
    """Memory in huge pages where the system has them; `touched`: with a byte written to each page."""
    place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            place.madvise(mmap.MADV_HUGEPAGE)
    if touched:
        place[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))
    return place


def _read_places(files: Sequence[Path], view: memoryview, number: int, threads: int) -> None:
    for path in files:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for start in range(number * _BUFFER, size, threads * _BUFFER):
                file.seek(start)
                file.readinto(view[start : min(start + _BUFFER, size)])
        view = view[size:]


def _read_share(files: Sequence[Path], buffer: bytearray, number: int, threads: int) -> None:
    """Every so many-th piece of each file."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            for start in range(number * _BUFFER, path.stat().st_size, threads * _BUFFER):
                file.seek(start)
                file.readinto(buffer)


def drop(files: Sequence[Path]) -> bool:
    """Ask the system to forget what it keeps of the files; whether it did, so that they are read from a disk."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return all(_in_memory(path) < _DROPPED for path in files)


def _in_memory(path: Path) -> float:
    """Share of a file's pages that are in memory, by mincore(2); 1 where that does not tell."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        told = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(pages)), told)
        del first  # the mapping cannot be closed before
    return 1.0 if failed else sum(page & 1 for page in told) / len(told)


def _bar(name: str) -> str:
    return f"at least {BAR:.0%} of one thread's reading" if name in _BARRED else ""


def conclusions(measurements: Sequence[Measurement], memory: dict[str, int], size: int) -> Iterator[str]:
    """Lines that hold loadings against readings of the same place, the bar, and the checkpoint's size."""
    medians = {each.name: each.median for each in measurements}
    for place in ("cached", "from disk"):
        readings = {name: value for name, value in medians.items() if name.startswith("read") and place in name}
        for name, value in medians.items():
            if name.startswith("load") and place in name:
                shares = "; ".join(f"{value / speed:.0%} of {what}" for what, speed in readings.items())
                holds = "holds" if value >= BAR * readings[f"read, 1 thread, {place}"] else "misses"
                yield f"{name}: {f'{holds} its bar; ' if name in _BARRED else ''}{shares}"
    for name, peak in memory.items():
        yield f"{name}: {peak / 1e6:.0f} MB at the process's peak, {size / 1e6:.0f} MB of tensors in the files"

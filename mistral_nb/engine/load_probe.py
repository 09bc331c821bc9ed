"""One loading of a checkpoint in a process of its own, measured: `python -m mistral_nb.engine.load_probe FOLDER`.

Prints one line of JSON: seconds, what the progress said, and the process's memory before, at its peak and after.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from contextlib import suppress
from pathlib import Path

from mistral_nb.engine.engine import Engine

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--packed-copy", type=Path, help="a folder for one, which is made where there is none")
    parser.add_argument("--threads", type=int, help="as many as there are CPUs where it is left out")
    parser.add_argument("--touch", type=int, default=0, help="bytes of memory to touch and give back before")
    options = parser.parse_args()
    found = {"touch_s": touch(options.touch), "again_s": touch(options.touch)}
    with suppress(OSError):
        CLEAR_REFS.write_text(_RESET_PEAK)
    found["before"] = memory("VmRSS")
    told: list[tuple[int, int]] = []
    began = time.perf_counter()
    engine = Engine.load(
        options.folder,
        device="cpu",
        precision=options.precision,
        threads=options.threads,
        progress=lambda done, total: told.append((done, total)),
        packed_copy=options.packed_copy,
    )
    found["load_s"] = time.perf_counter() - began
    found["peak"], found["after"] = memory("VmHWM"), memory("VmRSS")
    if engine._copying is not None:
        engine._copying.wait()
    engine.close()
    print(json.dumps(found | {"reports": len(told), "last_report": told[-1]}))


def touch(size: int) -> float | None:
    """Seconds to write to each page of so much new memory, in huge pages where the system has them."""
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    began = time.perf_counter()
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))
        return time.perf_counter() - began


def memory(name: str) -> int | None:
    """A line of the process's status, in bytes; None off Linux."""
    if not STATUS.is_file():
        return None
    found = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(found.split()[1]) * 1024


if __name__ == "__main__":
    main()

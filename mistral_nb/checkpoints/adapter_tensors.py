"""The LoRA matrices in an adapter's safetensors file, by its header alone: which modules, of what rank and sizes.

A module's update is `B @ A * scale`, with A of (rank, in) and B of (out, rank). The names are those that PEFT's
`save_pretrained` writes: `base_model.model.model.layers.N.MODULE.lora_A.weight`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_nb.checkpoints.header import RawTensor, read_header
from mistral_nb.checkpoints.untrusted import quoted

__all__ = ["MODULES", "LoraTensors", "Notes", "matrices", "read_tensors"]

MODULES = {
    "q_proj": ("dim", "q"),
    "k_proj": ("dim", "kv"),
    "v_proj": ("dim", "kv"),
    "o_proj": ("q", "dim"),
    "gate_proj": ("dim", "hidden"),
    "up_proj": ("dim", "hidden"),
    "down_proj": ("hidden", "dim"),
}
"""Which features go in and come out of each module that may have an update: of the residual stream, the queries, the
keys and values, the MLP."""

MOST_HEADER = 1_000_000
"""Bytes of a header, and values in it: 100 layers with all seven modules have 240,000 and 12,000. Parsing stops every
thread of the process, for some 10 ms at the most."""
MOST_VALUES = 40_000
_DTYPES = ("F16", "BF16", "F32")
_PREFIX = "base_model.model.model.layers."
_MATRIX = re.compile(
    re.escape(_PREFIX) + r"(?P<module>(?P<layer>0|[1-9]\d{0,3})\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj)"
    r"\.lora_(?P<side>[AB])\.weight"
)
_STRANGE = (
    (re.compile(r"lora_magnitude_vector"), "is of DoRA, which is not applied; train without use_dora"),
    (re.compile(r"\.bias$|lora_bias"), "is a bias, which is not applied; train with bias='none'"),
    (
        re.compile(r"embed|lm_head|modules_to_save"),
        "is no update of a linear module in a layer; train without modules_to_save and embeddings",
    ),
    (
        re.compile(r"lora_[AB]\.[^.]+\.weight$"),
        "has the adapter's name in it; save it with PEFT's save_pretrained",
    ),
    (
        re.compile(r"^layers\.\d+\.(attention|feed_forward)\."),
        "is named as Mistral's own tools do; export the adapter in PEFT's format",
    ),
    (re.compile(r"lora_[AB]"), f"is of a module that is not known here; known are {', '.join(MODULES)}"),
)


class Notes:
    """Findings in the order in which they came; of those of one kind the first, with a count of the others."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, text: str, kind: str | None = None) -> None:
        self._first.setdefault(kind or text, text)
        self._counts[kind or text] += 1

    def told(self) -> tuple[str, ...]:
        return tuple(
            text if (count := self._counts[kind]) == 1 else f"{text} (and {count - 1} more like it)"
            for kind, text in self._first.items()
        )


@dataclass(frozen=True, slots=True)
class LoraTensors:
    """What the matrices of one adapter are. `rank` is None where they differ or there are none.

    `sizes` has the features by their names in `MODULES`, as far as the modules tell them; `bytes` is the file's size.
    """

    rank: int | None
    layers: int
    modules: tuple[str, ...]
    sizes: Mapping[str, int]
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    problems: tuple[str, ...]


def read_tensors(path: Path) -> LoraTensors:
    """The matrices in a file, with all that is wrong about them in `problems`.

    `ModelError` where the file is no whole safetensors file.
    """
    header = read_header(path, most=MOST_HEADER, values=MOST_VALUES)
    notes = Notes()
    pairs = _pairs(header, notes)
    sizes: dict[str, int] = {}
    ranks = Counter[int]()
    for module, sides in pairs.items():
        a, b = sides.get("A"), sides.get("B")
        if a is None or b is None:
            notes.add(f"{module} has no lora_{'A' if a is None else 'B'}; save the adapter again", "half")
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1] or not math.prod((*a, *b)):
            notes.add(f"{module} has lora_A of {list(a)} and lora_B of {list(b)}, which are no pair", "no pair")
        else:
            ranks[a[0]] += 1
            _see_sizes(module, a[1], b[0], sizes, notes)
    if not pairs:
        notes.add(f"there is no LoRA matrix in {path.name}; save the adapter with PEFT's save_pretrained")
    if len(ranks) > 1:
        notes.add(f"the modules have different ranks ({', '.join(map(str, sorted(ranks)))}); train with one")
    dtypes = tuple(sorted({tensor.dtype for tensor in header.values()}))
    for dtype in dtypes:
        if dtype not in _DTYPES:
            notes.add(f"the dtype {dtype} is not one of {', '.join(_DTYPES)}; save it in one of those")
    return LoraTensors(
        rank=next(iter(ranks)) if len(ranks) == 1 else None,
        layers=1 + max((int(module.partition(".")[0]) for module in pairs), default=-1),
        modules=tuple(name for name in MODULES if any(module.endswith(f".{name}") for module in pairs)),
        sizes=sizes,
        dtypes=dtypes,
        parameters=sum(math.prod(tensor.shape) for tensor in header.values()),
        bytes=path.stat().st_size,
        problems=notes.told(),
    )


def _pairs(header: Mapping[str, RawTensor], notes: Notes) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of A and B by module, such as `0.self_attn.q_proj`."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in header.items():
        found = _MATRIX.fullmatch(name)
        if found:
            pairs.setdefault(found["module"], {})[found["side"]] = tensor.shape
            continue
        unknown = f"is no LoRA matrix; their names are {_PREFIX}N.MODULE.lora_A.weight and lora_B.weight"
        why = next((why for form, why in _STRANGE if form.search(name)), unknown)
        notes.add(f"the tensor {quoted(name)} {why}", why)
    return pairs


def matrices(header: Mapping[str, RawTensor]) -> Iterator[tuple[int, str, str, RawTensor]]:
    """Of each matrix its layer, its module's name in `MODULES`, its side A or B, and where it lies."""
    for name, tensor in header.items():
        found = _MATRIX.fullmatch(name)
        if found:
            yield int(found["layer"]), found["module"].rpartition(".")[2], found["side"], tensor


def _see_sizes(module: str, into: int, out: int, sizes: dict[str, int], notes: Notes) -> None:
    """Take the features of one module down; one that has others than the modules before it is told."""
    for name, size in zip(MODULES[module.rpartition(".")[2]], (into, out), strict=True):
        if sizes.setdefault(name, size) != size:
            notes.add(f"{module} is of {into} features in and {out} out, which goes with no other module", "sizes")

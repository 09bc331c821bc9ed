"""The result file of the kernel bench: what was timed, on what machine, under which ceilings, what was not, and why."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["SCHEMA", "Ceilings", "Key", "Record", "Row", "Skipped", "dtype_name", "read", "write"]

SCHEMA = 1
"""The version of the file."""
Kind = Literal["absent", "wrong", "failed"]
Key = tuple[str, str, str, str]
"""Op, case, dtype, provider: the name of a row."""
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def dtype_name(dtype: object) -> str:
    """bf16 of torch.bfloat16: as a type is called in the options, the rows, and the ceilings."""
    whole = str(dtype).rpartition(".")[2]
    return _SHORT.get(whole, whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a provider took for a case of an op.

    us, p20, p80: the median and the percentiles of `runs` in microseconds a call; flops, bytes: what the case needs at
    least; timer: "graph", "events" or "wall"; partial: what the provider leaves out of the op, in words.
    """

    op: str
    case: str
    shape: Mapping[str, int | str]
    dtype: str
    provider: str
    us: float
    p20: float
    p80: float
    runs: int
    flops: int
    bytes: int
    timer: str
    partial: str = ""

    @property
    def key(self) -> Key:
        return self.op, self.case, self.dtype, self.provider

    @property
    def point(self) -> tuple[str, str, str]:
        """Op, case and dtype: what the providers of a case have in common."""
        return self.op, self.case, self.dtype

    @property
    def tflops(self) -> float:
        return self.flops / self.us / 1e6

    @property
    def gbs(self) -> float:
        return self.bytes / self.us / 1e3

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A provider that was not timed: it is not there (absent), gave another result (wrong), or ended (failed)."""

    op: str
    case: str
    dtype: str
    provider: str
    kind: Kind
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the machine gives at most: measured, and by its data sheet (the products in 16 bits) where that is known."""

    read_gbs: float
    copy_gbs: float
    matmul_tflops: Mapping[str, float]
    spec_gbs: float | None = None
    spec_tflops: float | None = None

    def bound(self, row: Row) -> Literal["memory", "compute"] | None:
        """What limits a kernel of the row's intensity here; None where no product of its dtype was measured."""
        peak = self.matmul_tflops.get(row.dtype)
        if peak is None:
            return None
        return "memory" if row.intensity * self.read_gbs < 1e3 * peak else "compute"

    def share(self, row: Row) -> float | None:
        """Its speed over the measured roof at its intensity; past 1 where a cache holds what it reads."""
        bound = self.bound(row)
        if bound is None:
            return None
        return row.gbs / self.read_gbs if bound == "memory" else row.tflops / self.matmul_tflops[row.dtype]

    def share_of_spec(self, row: Row) -> float | None:
        """The same of the data sheet's memory, or of its products where those limit the row, in 16 bits."""
        bound = self.bound(row)
        if bound == "memory" and self.spec_gbs:
            return row.gbs / self.spec_gbs
        if bound == "compute" and self.spec_tflops and row.dtype in ("bf16", "fp16"):
            return row.tflops / self.spec_tflops
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of the bench. when: ISO 8601 in UTC; complete: False if it was interrupted."""

    command: tuple[str, ...]
    revision: str
    when: str
    machine: Mapping[str, Any]
    ceilings: Ceilings
    rows: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True

    def tidy(self) -> list[dict[str, Any]]:
        """A flat line a row, all with the same columns (None where a row has no such value), for a table of data.

        op, case, every key of the shapes, dtype, provider, us, p20, p80, tflops, gbs, bound ("memory" or "compute"),
        share (of the measured roof), share_of_spec, times_ours (times the time of ours), partial, timer.
        """
        shape = dict.fromkeys(name for row in self.rows for name in row.shape)
        ours = {row.point: row.us for row in self.rows if row.provider == "ours"}
        return [
            {
                **{"op": row.op, "case": row.case, **shape, **row.shape, "dtype": row.dtype, "provider": row.provider},
                **{"us": row.us, "p20": row.p20, "p80": row.p80, "tflops": row.tflops, "gbs": row.gbs},
                "bound": self.ceilings.bound(row),
                "share": self.ceilings.share(row),
                "share_of_spec": self.ceilings.share_of_spec(row),
                "times_ours": row.us / ours[row.point] if row.point in ours else None,
                **{"partial": row.partial, "timer": row.timer},
            }
            for row in self.rows
        ]


def write(record: Record, path: Path) -> None:
    """Whole or not at all. `ValueError` names a file that cannot be written."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    lists = {name: [asdict(each) for each in values.pop(name)] for name in ("rows", "skipped")}
    values["ceilings"] = asdict(record.ceilings)
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {"schema": SCHEMA, **values}.items()]
    for name, rows in lists.items():
        lines = ",".join(f"\n  {json.dumps(row, allow_nan=False)}" for row in rows)
        parts.append(f'"{name}": [{lines}\n ]' if rows else f'"{name}": []')
    text = "{\n " + ",\n ".join(parts) + "\n}\n"
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file; save the results under another name")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); save the results elsewhere") from error


def read(path: Path) -> Record:
    """The record in a file. `ValueError` says what of which file is wrong, and what to do."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a file that --save wrote") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); give a file that --save wrote") from error
    try:
        return _record(found)
    except _Malformed as error:
        raise ValueError(f"{path}: {error}") from None


class _Malformed(Exception):
    """What of the file is wrong, and what to do."""


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x > 0


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


_Test = tuple[Callable[[Any], bool], str]
_TEXT: _Test = (lambda x: isinstance(x, str), "a text")
_LIST: _Test = (lambda x: isinstance(x, list), "a list")
_TABLE: _Test = (lambda x: isinstance(x, dict), "a table")
_NUMBER: _Test = (_number, "a number above 0")
_FIELDS: dict[type, dict[str, _Test]] = {
    Row: {
        **dict.fromkeys(("op", "case", "dtype", "provider", "timer", "partial"), _TEXT),
        **dict.fromkeys(("us", "p20", "p80"), _NUMBER),
        "shape": (
            lambda x: isinstance(x, dict) and all(isinstance(y, str) or _count(y) for y in x.values()),
            "a table of whole numbers and texts",
        ),
        "runs": (lambda x: _count(x) and x > 0, "a whole number above 0"),
        "flops": (_count, "a whole number"),
        "bytes": (lambda x: _count(x) and x > 0, "a whole number above 0"),
    },
    Skipped: {
        **dict.fromkeys(("op", "case", "dtype", "provider", "why"), _TEXT),
        "kind": (lambda x: x in get_args(Kind), "one of " + ", ".join(get_args(Kind))),
    },
    Ceilings: {
        **dict.fromkeys(("read_gbs", "copy_gbs"), _NUMBER),
        "matmul_tflops": (lambda x: isinstance(x, dict) and all(map(_number, x.values())), "a table of numbers"),
        **dict.fromkeys(("spec_gbs", "spec_tflops"), (lambda x: x is None or _number(x), "a number or null")),
    },
    Record: {
        **dict.fromkeys(("revision", "when"), _TEXT),
        **dict.fromkeys(("ceilings",), _TABLE),
        "machine": (lambda x: isinstance(x, dict) and isinstance(x.get("device"), str), "a table with a device"),
        **dict.fromkeys(("rows", "skipped"), _LIST),
        **dict.fromkeys(
            ("command", "notes"),
            (lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x), "a list of texts"),
        ),
        "complete": (lambda x: isinstance(x, bool), "true or false"),
    },
}
"""Of the fields of each class: what they have to be, and how that is called."""


def _record(found: Any) -> Record:
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema is None:
        raise _Malformed("no result of the kernel bench, for it says no schema; give a file that --save wrote")
    if schema != SCHEMA:
        raise _Malformed(f"schema {schema}, and this version reads {SCHEMA}; measure again, or use the other version")
    values = _checked(Record, found, "")
    values["ceilings"] = Ceilings(**_checked(Ceilings, values["ceilings"], "ceilings."))
    rows = [Row(**_checked(Row, row, f"rows[{at}].")) for at, row in enumerate(values["rows"])]
    skipped = [Skipped(**_checked(Skipped, row, f"skipped[{at}].")) for at, row in enumerate(values["skipped"])]
    twice = [key for key, times in Counter(row.key for row in rows).items() if times > 1]
    if twice:
        raise _Malformed(f"two rows are {', '.join(twice[0])}; measure again")
    lists = {"rows": tuple(rows), "skipped": tuple(skipped)}
    return Record(**{**values, **lists, "command": tuple(values["command"]), "notes": tuple(values["notes"])})


def _checked(kind: type, found: Any, where: str) -> dict[str, Any]:
    """The fields of `kind` in a table; others are left out, as a later version may write more."""
    values = found if isinstance(found, dict) else {}
    for name, (right, words) in _FIELDS[kind].items():
        if name not in values:
            raise _Malformed(f"{where}{name} is not there; the file was cut or changed: measure again")
        if not right(values[name]):
            raise _Malformed(f"{where}{name} is {str(values[name])[:80]!r}, not {words}; measure again")
    return {name: values[name] for name in _FIELDS[kind]}

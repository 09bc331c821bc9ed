"""The measuring itself: every provider at every point, held against the reference before it is timed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.bench.providers import Absent, Provider
from mistral_nb_kernels.bench.record import Kind, Row, Skipped, dtype_name
from mistral_nb_kernels.bench.registry import providers_of
from mistral_nb_kernels.bench.subject import Point

__all__ = ["Begin", "Doing", "Event", "measure"]

LINE = 300
"""Characters that are kept of an error's words."""


@dataclass(frozen=True, slots=True)
class Begin:
    """Before anything else: how many providers at how many points, all together."""

    total: int


@dataclass(frozen=True, slots=True)
class Doing:
    """What is measured next; of `total`, `done` are measured or skipped. dtype is the short name (bf16)."""

    done: int
    total: int
    op: str
    case: str
    dtype: str
    provider: str


Event = Begin | Doing | Row | Skipped


def measure(
    points: Sequence[Point], device: Device, providers: Sequence[str] | None = None, extra: Sequence[Provider] = ()
) -> Iterator[Event]:
    """Every provider at every point, the `extra` ones first: a `Row` each, or why there is none.

    providers: the names of those wanted, beside the extra ones; None: all that are made for the device. One that is not
    there for some reason is told once. The iterator may be left at any event, and holds the buffers of one point.
    """
    work = [(point, (*extra, *chosen(point, device, providers))) for point in points]
    total = sum(len(who) for _, who in work)
    yield Begin(total)
    done, told = 0, set()
    for point, who in work:
        cases: list[Case] = []
        for provider in who:
            yield Doing(done, total, point.op, point.case, dtype_name(point.dtype), provider.name)
            found = _measured(point, provider, cases, device)
            done += 1
            if isinstance(found, Row):
                yield found
            elif found is not None and (found.kind != "absent" or (found.provider, found.why) not in told):
                told.add((found.provider, found.why))
                yield found
        del cases
        if torch.device(device).type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def chosen(point: Point, device: Device, providers: Sequence[str] | None) -> tuple[Provider, ...]:
    """Of those that run the point's op the named ones, else those for the device."""
    every, kind = providers_of(point.op), torch.device(device).type
    return tuple(each for each in every if (kind in each.on if providers is None else each.name in providers))


def _measured(point: Point, provider: Provider, cases: list[Case], device: Device) -> Row | Skipped | None:
    """None where there is nothing to tell. `cases` are made at the first call of a point."""
    try:
        if not cases:
            cases += _made(point, device)
        its = cases if provider.does is None else [provider.does(case) for case in cases]
        calls = [provider.bind(case) for case in its]
        wrong = its[0].wrong_as(provider.bind, provider.result)
        if wrong:
            return _skipped(point, provider, "wrong", wrong)
        return _row(point, provider, its[0], timing.time_calls(calls, device))
    except Absent as absent:
        return _skipped(point, provider, "absent", str(absent)) if str(absent) else None
    except Exception as error:  # somebody else's code: whatever it raises ends this measurement and no other
        words = str(error).strip().partition("\n")[0][:LINE]
        return _skipped(point, provider, "failed", f"{type(error).__name__}{': ' * bool(words)}{words}")


def _row(point: Point, provider: Provider, case: Case, took: timing.Timing) -> Row:
    return Row(
        op=point.op,
        case=point.case,
        shape=point.shape,
        dtype=dtype_name(point.dtype),
        provider=provider.name,
        us=took.us,
        p20=took.p20,
        p80=took.p80,
        runs=took.runs,
        flops=case.flops,
        bytes=case.bytes,
        timer=took.timer,
        partial=provider.partial,
    )


def _skipped(point: Point, provider: Provider, kind: Kind, why: str) -> Skipped:
    dtype = dtype_name(point.dtype)
    return Skipped(op=point.op, case=point.case, dtype=dtype, provider=provider.name, kind=kind, why=why)


def _made(point: Point, device: Device) -> list[Case]:
    """The same numbers each time, whatever the process has drawn before, and whatever it draws later."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        return timing.rotated(lambda: point.make(device), device)

"""Kernels under `triton.autotune` where nothing can time their configs: all are compiled, or they take turns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

__all__ = ["every_config", "take_turns", "turns"]

_taken: dict[int, tuple[str, int, int, str]] = {}
"""By kernel: its name, its configs, its launches, and the config of the last one."""


@contextlib.contextmanager
def every_config() -> Iterator[None]:
    """A launch is one in each config that is not pruned."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def each(self: Any, *args: Any, **options: Any) -> None:
        for config in _configs(self, args, options):
            self.fn.run(*args, **options, **config.all_kwargs())

    Autotuner.run = each
    try:
        yield
    finally:
        Autotuner.run = run


@functools.cache
def take_turns() -> None:
    """From here on, in this process, a launch is one in the config that is next in turn."""
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def next_one(self: Any, *args: Any, **options: Any) -> Any:
        configs = _configs(self, args, options)
        launches = _taken.get(id(self), ("", 0, 0, ""))[2]
        config = configs[launches % len(configs)]
        _taken[id(self)] = (self.base_fn.__name__, len(configs), launches + 1, str(config))
        every, self.configs = self.configs, [config]
        try:
            return run(self, *args, **options)
        finally:
            self.configs = every

    Autotuner.run = next_one


def turns() -> list[str]:
    """Of each kernel that `take_turns` ran in more configs than one, what it ran in."""
    return [
        f"{name} is autotuned: {count if launches >= count else f'{launches} of {count}'} configs took turns, "
        f"the last was {last}."
        for name, count, launches, last in _taken.values()
        if count > 1
    ]


def _configs(tuner: Any, args: tuple[Any, ...], options: dict[str, Any]) -> list[Any]:
    tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
    try:
        return list(tuner.prune_configs(options))
    finally:
        tuner.nargs = None

"""What a candidate shares with what it is held against: functions of torch and of ours, and torch's settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Surroundings"]

SHARED = ("torch", "torch.nn.functional", "time")
"""And all of ours that is imported."""
OTHERS = "torch", "manual_seed"
"""torch.compile puts its own in its place."""
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.backends.cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda x: setattr(torch.backends.cudnn, "benchmark", x),
    ),
}
"""By what sets them: what tells them, and what sets them."""


class Surroundings:
    """As they are when it is made."""

    def __init__(self) -> None:
        self._names = {(at, name): value for at, name, value in _functions()}
        self._methods = set(vars(torch.Tensor))
        self._settings = {name: get() for name, (get, _) in SETTINGS.items()}

    def replaced(self) -> list[str]:
        """The functions that are others now, by name; put back."""
        found = []
        for (at, name), value in self._names.items():
            owner = _owner(at)
            now = value if owner is None else vars(owner).get(name, value)
            if now is not value:
                setattr(owner, name, value)
                found.append(f"{at}.{name}")
        for name in set(vars(torch.Tensor)) - self._methods:
            if hasattr(torch._C.TensorBase, name):  # which has most of a tensor's methods
                delattr(torch.Tensor, name)
                found.append(f"torch.Tensor.{name}")
        return found

    def reset(self) -> list[str]:
        """The settings that are others now, by what sets them; put back."""
        found = []
        for name, before in self._settings.items():
            get, put = SETTINGS[name]
            if get() != before:
                put(before)
                found.append(name)
        return found


def _functions() -> Iterator[tuple[str, str, Any]]:
    ours = [name for name in sys.modules if name.partition(".")[0] == "mistral_nb_kernels"]
    for at in (*SHARED, *ours, "torch.Tensor"):
        for name, value in tuple(vars(_owner(at)).items()) if _owner(at) is not None else ():
            function = callable(value) and not isinstance(value, type)
            if function and not name.startswith("_") and (at, name) != OTHERS:
                yield at, name, value


def _owner(at: str) -> Any:
    return torch.Tensor if at == "torch.Tensor" else sys.modules.get(at)

"""Backends: who answers. One protocol, and the rule that selects.

First match wins: what the call names; the setting `backend` (`%config`, environment, file); else `auto`: the model that
was named tells; else Cloudflare when an account and a token are set; else the local engine with Mistral-7B when its
weights are in the store and an NVIDIA GPU is there; else the local engine with the embedded model. A `mistral-nb serve`
elsewhere (an address) and an OpenAI-compatible server (`openai`) answer only where they are named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mistral_nb.backends.base import Backend, ChunkStream, DryRun
from mistral_nb.backends.local import Local
from mistral_nb.backends.openai_compatible import OpenAICompatible, openai_compatible
from mistral_nb.backends.remote import Remote, remote
from mistral_nb.backends.workers_ai import WorkersAI, cloudflare
from mistral_nb.config import Settings, check_backend
from mistral_nb.hardware import nvidia_gpus
from mistral_nb.models import EMBEDDED, installed

__all__ = [
    "Backend",
    "ChunkStream",
    "DryRun",
    "Local",
    "OpenAICompatible",
    "Remote",
    "Selection",
    "WorkersAI",
    "nvidia_gpus",
    "resolve",
]

_MISTRAL = ("mistral-7b-instruct-v0.2", "mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0.1")


@dataclass(frozen=True, slots=True)
class Selection:
    """Who answers, and why, in words for a status line."""

    backend: Backend
    why: str


def resolve(settings: Settings, *, backend: str | None = None, model: str | None = None) -> Selection:
    """Choose the backend. Contacts nobody.

    One that was asked for by name and cannot serve is an error: `ConfigurationError` for what is not set up,
    `MissingDependency`, `ModelError`.
    """
    name = check_backend(backend, "backend") if backend else settings.backend
    origin = "backend" if backend else settings.source("backend")
    asked = f"asked for by name: {name}" if backend else f"{origin} = {name}"
    model = model or settings.model
    if name.startswith(("http:", "https:")):
        return Selection(remote(settings, name, origin, model), asked)
    if name == "openai":
        return Selection(openai_compatible(settings, model), asked)
    if name == "cloudflare":
        return Selection(cloudflare(settings, model), asked)
    if name == "local":
        chosen, because = (model, "") if model else _local_model()
        local = Local(settings, chosen)
        local.check()
        return Selection(local, f"{asked}; {because}" if because else asked)
    return _auto(settings, model)


def _auto(settings: Settings, model: str | None) -> Selection:
    if model and model.startswith("@"):
        return Selection(cloudflare(settings, model), f"auto: {model} is a model of Cloudflare's")
    if model:
        local = Local(settings, model)
        local.check()
        return Selection(local, f"auto: {local.model} is a model of the local engine's")
    if settings.cloudflare_account_id and settings.cloudflare_api_token:
        return Selection(cloudflare(settings), "auto: a Cloudflare account and token are set")
    chosen, because = _local_model()
    local = Local(settings, chosen)
    local.check()
    return Selection(local, f"auto: {_no_cloudflare(settings)}, {because}")


def _no_cloudflare(settings: Settings) -> str:
    if settings.cloudflare_account_id:
        return "a Cloudflare account is set but no CLOUDFLARE_API_TOKEN"
    if settings.cloudflare_api_token:
        return "a Cloudflare token is set but no CLOUDFLARE_ACCOUNT_ID"
    return "no Cloudflare account is set"


def _local_model() -> tuple[str, str]:
    """The best model that this machine can run, and why."""
    return best_local({model.name for model in installed()}, nvidia_gpus)


def best_local(here: Collection[str], gpus: Callable[[], int]) -> tuple[str, str]:
    """The model to run of those that are `here`, and why. `gpus` is asked only where it matters."""
    weights = next((name for name in _MISTRAL if name in here), None)
    if weights is None:
        return EMBEDDED, "no Mistral-7B weights are in the store, so the embedded model answers"
    if not gpus():
        return EMBEDDED, "Mistral-7B is in the store but no NVIDIA GPU is here, so the embedded model answers"
    return weights, f"{weights} is in the store and an NVIDIA GPU is here"

"""Who answers, and why."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.backends import Local, OpenAICompatible, Remote, WorkersAI, best_local, nvidia_gpus, resolve
from mistral_nb.backends.workers_ai import DEFAULT_MODEL
from mistral_nb.config import load_settings
from mistral_nb.errors import ConfigurationError, MissingDependency, ModelError, UnknownModel

ACCOUNT = {"cloudflare_account_id": "0123456789abcdef0123456789abcdef", "cloudflare_api_token": "t0ken"}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and nobody's engine."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path))
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "models"


def place(store: Path, name: str) -> None:
    (store / name).mkdir(parents=True)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (store / name / file).write_text("{}")


def test_with_nothing_set_the_embedded_model_answers() -> None:
    chosen = resolve(load_settings())
    assert isinstance(chosen.backend, Local)
    assert chosen.backend.model == "smollm2-135m-instruct"
    assert chosen.why == (
        "auto: no Cloudflare account is set, no Mistral-7B weights are in the store, so the embedded model answers"
    )


def test_an_account_and_a_token_choose_cloudflare() -> None:
    chosen = resolve(load_settings(ACCOUNT))
    assert isinstance(chosen.backend, WorkersAI)
    assert chosen.backend.describe().model == DEFAULT_MODEL
    assert chosen.why == "auto: a Cloudflare account and token are set"


@pytest.mark.parametrize("name", list(ACCOUNT))
def test_half_an_account_chooses_the_local_engine_and_says_what_is_missing(name: str) -> None:
    chosen = resolve(load_settings({name: ACCOUNT[name]}))
    assert isinstance(chosen.backend, Local)
    assert "no CLOUDFLARE_" in chosen.why


@pytest.mark.parametrize(
    ("here", "gpus", "model", "why"),
    [
        ((), 1, "smollm2-135m-instruct", "no Mistral-7B weights"),
        (("smollm2-135m-instruct", "other"), 1, "smollm2-135m-instruct", "no Mistral-7B weights"),
        (("mistral-7b-instruct-v0.3",), 0, "smollm2-135m-instruct", "no NVIDIA GPU"),
        (("mistral-7b-instruct-v0.3",), 1, "mistral-7b-instruct-v0.3", "an NVIDIA GPU is here"),
        (("mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0.2"), 2, "mistral-7b-instruct-v0.2", "in the store"),
    ],
)
def test_mistral_is_chosen_where_its_weights_and_a_gpu_are(here: Any, gpus: int, model: str, why: str) -> None:
    chosen, because = best_local(here, lambda: gpus)
    assert chosen == model
    assert why in because


def test_weights_in_the_store_are_seen(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    place(store, "mistral-7b-instruct-v0.2")
    assert "Mistral-7B is in the store but no NVIDIA GPU is here" in resolve(load_settings()).why


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert nvidia_gpus() == 0


@pytest.mark.gpu
def test_the_gpus_are_counted_without_torch() -> None:
    import torch

    assert nvidia_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("settings", "named", "why"),
    [
        ({"backend": "cloudflare"}, "local", "asked for by name: local"),
        ({"backend": "local", **ACCOUNT}, None, "%config Mistral.backend = local"),
    ],
)
def test_an_argument_beats_the_settings_and_they_beat_auto(settings: Any, named: str | None, why: str) -> None:
    chosen = resolve(load_settings(settings), backend=named)
    assert chosen.backend.name == "local"
    assert chosen.why.startswith(why)


def test_the_environment_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_BACKEND", "local")
    assert resolve(load_settings(ACCOUNT)).why.startswith("MISTRAL_NB_BACKEND = local; ")


@pytest.mark.parametrize(
    ("model", "settings", "name"),
    [
        ("@cf/mistral/mistral-7b-instruct-v0.2-lora", ACCOUNT, "cloudflare"),
        ("embedded", ACCOUNT, "local"),
        ("embedded", {}, "local"),
    ],
)
def test_in_auto_a_named_model_tells_who_answers(model: str, settings: Any, name: str) -> None:
    by_argument = resolve(load_settings(settings), model=model)
    by_setting = resolve(load_settings({**settings, "model": model}))
    assert by_argument.backend.name == by_setting.backend.name == name
    assert by_argument.why.startswith("auto: ")


def refused(kind: type[Exception], **arguments: Any) -> str:
    settings = arguments.pop("settings", {})
    with pytest.raises(kind) as caught:
        resolve(load_settings(settings), **arguments)
    return str(caught.value)


@pytest.mark.parametrize("named", ["clodflare", "Cloudflare"])
def test_an_unknown_backend_is_named_with_the_nearest_one(named: str) -> None:
    message = refused(ConfigurationError, backend=named)
    assert repr(named) in message
    assert "did you mean 'cloudflare'?" in message
    assert "auto, cloudflare, local" in message


def test_cloudflare_by_name_without_an_account_says_what_to_set() -> None:
    message = refused(ConfigurationError, backend="cloudflare")
    assert "CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN" in message
    assert "--backend local" in message
    half = refused(ConfigurationError, backend="cloudflare", settings={"cloudflare_api_token": "t0ken"})
    assert "CLOUDFLARE_ACCOUNT_ID" in half
    assert "CLOUDFLARE_API_TOKEN" not in half


@pytest.mark.parametrize("account", ["my-account", "0123456789abcdef0123456789abcdeg", "a" * 33, "../../user/tokens"])
def test_an_account_id_that_is_none_is_refused(account: str) -> None:
    message = refused(ConfigurationError, settings={**ACCOUNT, "cloudflare_account_id": account})
    assert repr(account) in message
    assert "32 hexadecimal" in message


@pytest.mark.parametrize(
    "model", ["embedded", "@cf/mistral", "@cf/../../../user/tokens", "@cf/a/b/c", "@xx/a/b", "@cf/a/b?c", "@cf/a/b\n"]
)
def test_a_model_id_that_cannot_be_cloudflares_is_refused(model: str) -> None:
    message = refused(ConfigurationError, backend="cloudflare", model=model, settings=ACCOUNT)
    assert repr(model) in message


def test_a_cloud_model_without_an_account_is_an_error_and_no_silent_switch() -> None:
    assert "CLOUDFLARE_ACCOUNT_ID" in refused(ConfigurationError, model=DEFAULT_MODEL)


def test_the_token_stays_away_from_another_address_unless_it_is_trusted() -> None:
    other = {**ACCOUNT, "cloudflare_base_url": "https://mirror.example.com/client/v4/"}
    message = refused(ConfigurationError, settings=other)
    assert "mirror.example.com" in message
    assert "cloudflare_trust_base_url" in message
    assert "t0ken" not in message
    trusted = resolve(load_settings({**other, "cloudflare_trust_base_url": True})).backend
    assert isinstance(trusted, WorkersAI)
    assert trusted.base_url == "https://mirror.example.com/client/v4"
    assert "http://" in refused(
        ConfigurationError,
        settings={**other, "cloudflare_base_url": "http://mirror.example.com", "cloudflare_trust_base_url": "yes"},
    )


def test_an_unknown_local_model_lists_the_known() -> None:
    assert "mistral-7b-instruct-v0.2" in refused(UnknownModel, backend="local", model="mistral-8b")


@pytest.mark.parametrize("backend", ["local", None])
def test_a_known_model_that_is_not_here_is_an_error_with_a_step(backend: str | None) -> None:
    message = refused(ModelError, backend=backend, model="mistral-7b-instruct-v0.2")
    assert "mistral-7b-instruct-v0.2 is not in the store" in message


@pytest.mark.parametrize("backend", ["local", None])
def test_where_only_the_engine_could_answer_and_torch_lacks_the_command_is_told(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python takes for a module that is not there
    message = refused(MissingDependency, backend=backend)
    assert 'pip install "mistral-nb[local]"' in message
    assert "CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN" in message
    assert "needs torch" in message


SERVER = {"server_token": "s3rver-t0ken"}
VLLM = {"backend": "openai", "openai_base_url": "https://gpu.example.com/v1/"}


@pytest.mark.parametrize("address", ["https://gpu.example.com:8443", "http://127.0.0.1:8000/", "http://[::1]:8000"])
def test_an_address_is_a_server_elsewhere(address: str) -> None:
    by_argument = resolve(load_settings(SERVER), backend=address)
    by_setting = resolve(load_settings({**SERVER, "backend": address}))
    assert isinstance(by_argument.backend, Remote)
    host = address.split("/")[2]
    assert by_argument.why == f"asked for by name: {address.rstrip('/')}"
    assert by_setting.why == f"%config Mistral.backend = {address.rstrip('/')}"
    assert by_argument.backend.describe() == by_setting.backend.describe()
    assert by_argument.backend.describe().device == host
    assert by_argument.backend.describe().model == "the model that it holds"
    assert resolve(load_settings(SERVER), backend=address, model="embedded").backend.describe().stand_in_for


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://gpu.example.com:8000", "the token goes over https, or to this machine, only"),
        ("http://127.0.0.1.example.com", "the token goes over https"),
        ("https://user:pass@gpu.example.com", "no user name"),
        ("https://gpu.example.com/?next=1", "with no user name and no query"),
        ("https://gpu.example.com:port", r"https://host\[:port\]"),
        *(
            (address, "in ASCII")
            for address in ("https://gpu example.com", "https://a..b", "https://[zz]:3", "https://ä")
        ),
        ("https://", r"https://host\[:port\]"),
    ],
)
def test_an_address_that_may_not_get_the_token_is_refused(address: str, told: str) -> None:
    message = refused(ConfigurationError, backend=address, settings=SERVER)
    assert re.search(told, message)
    assert message.startswith("backend")
    assert "s3rver-t0ken" not in message


def test_a_server_elsewhere_needs_its_token() -> None:
    message = refused(ConfigurationError, backend="https://gpu.example.com:8443")
    assert message.startswith("mistral-nb at gpu.example.com:8443 needs its token: set MISTRAL_NB_SERVER_TOKEN")


def test_an_openai_compatible_server_answers_by_name() -> None:
    chosen = resolve(load_settings(VLLM), model="mine")
    assert isinstance(chosen.backend, OpenAICompatible)
    said = chosen.backend.describe()
    assert (said.backend, said.model, said.device) == ("openai", "mine", "gpu.example.com")
    assert resolve(load_settings({**VLLM, "model": "mine"})).backend.describe() == said
    assert resolve(load_settings(VLLM)).backend.describe().model == "the only model there"


def test_an_openai_compatible_server_needs_an_address_that_may_get_the_key() -> None:
    assert "MISTRAL_NB_OPENAI_BASE_URL" in refused(ConfigurationError, backend="openai")
    plain = {"backend": "openai", "openai_base_url": "http://gpu.example.com:8000/v1"}
    assert isinstance(resolve(load_settings(plain)).backend, OpenAICompatible)
    message = refused(ConfigurationError, settings={**plain, "openai_api_key": "k3y"})
    assert message.startswith("%config Mistral.openai_base_url = 'http://gpu.example.com:8000/v1'")
    assert "k3y" not in message


def test_auto_never_asks_a_server_that_is_not_named() -> None:
    settings = load_settings({**SERVER, "openai_base_url": "https://gpu.example.com/v1", "openai_api_key": "k3y"})
    assert isinstance(resolve(settings).backend, Local)

"""Settings: where they come from, which source wins, and what a wrong one is told."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.config import BACKENDS, SETTINGS, Settings, config_path, load_settings
from mistral_nb.errors import ConfigurationError
from mistral_nb.secret import Secret


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("MISTRAL_NB_CONFIG", str(path))
    return path


def refused(overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(overrides)
    return str(caught.value)


def test_the_table_and_the_settings_say_the_same() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Settings) if field.name != "sources"}
    assert {setting.name: setting.default for setting in SETTINGS} == fields
    assert all(setting.help.endswith(".") for setting in SETTINGS)


def test_defaults() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert settings.source("backend") == "the default"


def test_overrides_beat_the_environment_and_that_beats_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('backend = "cloudflare"\nmodel = "from file"\nidle_timeout = 7\n')
    monkeypatch.setenv("MISTRAL_NB_BACKEND", "local")
    monkeypatch.setenv("MISTRAL_NB_MODEL", "from environment")
    settings = load_settings({"model": "from overrides"})
    assert (settings.backend, settings.model, settings.idle_timeout) == ("local", "from overrides", 7.0)
    assert settings.source("model") == "%config Mistral.model"
    assert settings.source("backend") == "MISTRAL_NB_BACKEND"
    assert settings.source("idle_timeout") == f"idle_timeout in {file}"


@pytest.mark.parametrize("unset", [None, ""])
def test_an_empty_value_is_unset(unset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_BACKEND", " local ")
    monkeypatch.setenv("MISTRAL_NB_MODEL", "")
    settings = load_settings({"backend": unset})
    assert (settings.backend, settings.model) == ("local", None)


def test_every_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {
        "backend": "local",
        "device": "cpu",
        "precision": "fp32",
        "tokens": "4096",
        "rank": "8",
        "bool": "true",
        "seconds": "12.5",
    }
    for setting in SETTINGS:
        for variable in setting.variables:
            with monkeypatch.context() as patch:
                patch.setenv(variable, samples.get(setting.kind, "some-text"))
                settings = load_settings()
            assert getattr(settings, setting.name) != setting.default
            assert settings.source(setting.name) == variable


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", True, 0, 1 << 25, 4096.0])
def test_a_context_is_a_number_of_tokens(value: Any) -> None:
    assert refused({"context": value}).endswith("must be a whole number of tokens from 1 to 16777216")


@pytest.mark.parametrize("value", [0, 257, "many"])
def test_a_rank_is_a_whole_number(value: Any) -> None:
    assert refused({"lora_rank": value}).endswith("must be a whole number from 1 to 256")


def test_a_context_may_come_as_text_or_number() -> None:
    assert [load_settings({"context": value}).context for value in (4096, "4096")] == [4096, 4096]


def test_an_unknown_precision_is_refused_with_the_nearest() -> None:
    assert "no such precision. did you mean 'int8'? There are auto, fp32" in refused({"precision": "int16"})


def test_a_device_is_one_of_those_of_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_DEVICE", "cpu")
    assert load_settings().device == "cpu"
    assert load_settings({"device": "cuda"}).device == "cuda"
    assert "no such device. did you mean 'cuda'? There are auto, cpu, cuda" in refused({"device": "cuda:0"})


def test_the_official_name_of_the_token_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDFLARE_AUTH_TOKEN", "second")
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "first")
    token = load_settings().cloudflare_api_token
    assert token
    assert token.reveal() == "first"


def test_the_legacy_key_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDFLARE_API_KEY", "legacy")
    assert load_settings().cloudflare_api_token is None


def test_the_file_is_in_the_users_configuration_folder() -> None:
    path = config_path({})
    assert path.name == "config.toml"
    assert path.parent.name == "mistral-nb"


def test_an_unknown_key_is_named_with_the_nearest(file: Path) -> None:
    file.write_text('bakend = "local"\n')
    message = refused()
    assert "'bakend'" in message
    assert "did you mean 'backend'?" in message
    assert str(file) in message
    assert "the settings are backend, model" in refused({"xyzzy": 1})


def test_a_folder_is_no_setting_and_the_message_names_the_variable(file: Path) -> None:
    file.write_text('log_dir = "/tmp"\n')
    assert "MISTRAL_NB_LOG_DIR" in refused()


@pytest.mark.parametrize("text", ["backend = local", b"\xff\xfe", "[", 'backend = "local"\nbackend = "auto"'])
def test_a_file_that_cannot_be_read_is_named(file: Path, text: str | bytes) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused()
    assert str(file) in message
    assert "MISTRAL_NB_CONFIG" in message


def test_a_folder_in_place_of_the_file_is_named(file: Path) -> None:
    file.mkdir()
    assert str(file) in refused()


def test_an_unknown_backend_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_BACKEND", "locla")
    message = refused()
    assert "MISTRAL_NB_BACKEND = 'locla'" in message
    assert "did you mean 'local'?" in message
    assert all(name in message for name in BACKENDS)


@pytest.mark.parametrize("value", ["soon", -1, "nan", "inf", 1e9, True, [], "1,5"])
def test_a_time_out_of_range_is_told_with_its_range(value: Any) -> None:
    message = refused({"connect_timeout": value})
    assert f"%config Mistral.connect_timeout = {value!r}" in message
    assert "0.1 to 604800" in message


def test_never_ending_is_a_time_for_the_engine_only() -> None:
    assert load_settings({"idle_timeout": 0}).idle_timeout == 0
    assert "0.1 to" in refused({"stall_timeout": 0})


@pytest.mark.parametrize(("value", "read"), [("yes", True), ("ON", True), ("0", False), (True, True), (False, False)])
def test_switches(value: Any, read: bool) -> None:
    assert load_settings({"cloudflare_trust_base_url": value}).cloudflare_trust_base_url is read


@pytest.mark.parametrize("value", ["maybe", 2, []])
def test_a_switch_is_true_or_false(value: Any) -> None:
    assert "true or false" in refused({"cloudflare_trust_base_url": value})


def test_a_text_must_be_one() -> None:
    assert "must be a text" in refused({"model": 5})


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "ümlaut", 17, b"bytes"])
def test_a_token_that_http_cannot_carry_is_refused_unseen(value: Any) -> None:
    message = refused({"cloudflare_api_token": value})
    assert "cloudflare_api_token" in message
    assert str(value) not in message


def test_a_secret_shows_itself_nowhere() -> None:
    secret = Secret("s3cret")
    settings = load_settings({"cloudflare_api_token": " s3cret\n"})
    assert settings.cloudflare_api_token == secret
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", repr(settings), str([settings])):
        assert "s3cret" not in shown
    for dump in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            dump(secret)
    assert not hasattr(secret, "__dict__")


def test_a_secret_equals_its_like_and_survives_a_copy() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert hash(Secret("a")) == hash(Secret("a"))
    settings = load_settings({"cloudflare_api_token": "a"})
    assert copy.deepcopy(Secret("a")) == copy.copy(Secret("a")) == Secret("a")
    assert dataclasses.asdict(settings)["cloudflare_api_token"] == Secret("a")

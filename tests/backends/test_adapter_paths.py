"""A folder in the place of an adapter's name: an engine here gets the whole path, and others none."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_nb.backends.adapter_paths import refuse_path, with_whole_path
from mistral_nb.backends.openai_wire import body_of
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.errors import InvalidRequest
from mistral_nb.secret import Secret
from mistral_nb.types import GenerationRequest
from tests.finetunes.adapters import write_adapter

ASK = GenerationRequest(prompt="Hi")


@pytest.mark.parametrize("lora", ["tone", "cf-public-magicoder", "11111111-0000-4000-8000-000000000001", "v1.0"])
def test_names_and_ids_stay(lora: str) -> None:
    assert with_whole_path(ASK.with_(lora=lora)).lora == lora
    assert with_whole_path(ASK) == ASK


def test_a_path_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    wholes = {
        "./tone": tmp_path / "tone",
        "adapters/tone": tmp_path / "adapters" / "tone",
        "../tone": tmp_path / ".." / "tone",
        "~/tone": tmp_path / "me" / "tone",
        "/srv/tone": Path("/srv/tone"),
    }
    for lora, whole in wholes.items():
        assert with_whole_path(ASK.with_(lora=lora, lora_scale=0.5)) == ASK.with_(lora=str(whole), lora_scale=0.5)


def test_the_home_of_nobody_is_named() -> None:
    with pytest.raises(InvalidRequest, match="nobody here is called so"):
        with_whole_path(ASK.with_(lora="~nobody-here/tone"))


@pytest.mark.parametrize("lora", ["./tone", "/home/me/secret/tone", "~/tone"])
def test_a_path_goes_to_nobody_else(lora: str) -> None:
    """It is refused before anything is sent: nobody listens at that address."""
    cloudflare = WorkersAI(base_url="https://127.0.0.1:9/client/v4", account="a", token=Secret("t"), model="@cf/m/m")
    with pytest.raises(InvalidRequest, match="which only an engine here takes; `mistral-nb lora push`"):
        list(cloudflare.stream(ASK.with_(lora=lora)))
    with pytest.raises(InvalidRequest, match="which only an engine here takes; give the name"):
        body_of(ASK.with_(lora=lora), "m")
    refuse_path(ASK.with_(lora="tone"), "")


def test_other_servers_have_names_with_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As org/adapter, unless that is an adapter's folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "other").mkdir(parents=True)
    for lora in ("org/tone", "org/other", "x/" * 400):
        assert body_of(ASK.with_(lora=lora), "m")["model"] == lora
    write_adapter(tmp_path / "org" / "tone")
    with pytest.raises(InvalidRequest, match="a folder's path"):
        body_of(ASK.with_(lora="org/tone"), "m")

"""Adapters on an account: lists in every form, a push from check to first answer, and one that fails or is stopped."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import socket
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.config import Settings
from mistral_nb.errors import (
    AdapterError,
    AuthenticationError,
    BackendError,
    ConfigurationError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    ModelError,
    RateLimited,
    RequestTimeout,
)
from mistral_nb.finetunes.account import Account
from mistral_nb.finetunes.adapter import CONFIG_FILE, DEFAULT_MODEL, WEIGHTS_FILE, Adapter
from mistral_nb.finetunes.cloudflare import Push, list_adapters, public_adapters, push
from mistral_nb.progress import Progress
from tests.finetunes.adapters import write_adapter
from tests.finetunes.finetunes_server import BASE, PATIENCE, PUBLIC, TOKEN, FinetunesServer, error

RUN = f"POST run/{DEFAULT_MODEL}"
FIRST = "11111111-0000-4000-8000-000000000001"
ASSETS = f"POST finetunes/{FIRST}/finetune-assets"


@pytest.mark.parametrize("nested", [False, True])
def test_lists(server: FinetunesServer, settings: Settings, nested: bool) -> None:
    server.nested = nested
    assert list_adapters(settings) == []
    server.add("one")
    server.add("two", "@cf/meta-llama/llama-2-7b-chat-hf-lora")
    assert [(adapter.name, adapter.model, adapter.public) for adapter in list_adapters(settings)] == [
        ("one", DEFAULT_MODEL, False),
        ("two", "@cf/meta-llama/llama-2-7b-chat-hf-lora", False),
    ]
    (public,) = public_adapters(settings)
    assert (public.name, public.public) == ("cf-public-cnn-summarization", True)


def test_a_list_is_asked_for_again(server: FinetunesServer, settings: Settings) -> None:
    server.faults["GET finetunes"] = [(500, error(3043, "Internal")), "closed", (429, error(971, "slow"))]
    assert list_adapters(settings) == []
    assert len(server.asked("GET finetunes")) >= 4


def test_a_list_is_asked_for_no_earlier_than_the_service_says(server: FinetunesServer, settings: Settings) -> None:
    busy = (503, error(3043, "Internal"), {"retry-after": "1"})
    server.faults["GET finetunes"] = [busy]
    started = time.monotonic()
    assert list_adapters(settings) == []
    assert time.monotonic() - started >= 1


def nested(lists: int) -> Any:
    return functools.reduce(lambda inner, _: [inner], range(lists), PUBLIC)


@pytest.mark.parametrize(
    ("status", "body", "kind", "told"),
    [
        (401, error(10000, "Authentication error"), AuthenticationError, "Check the token"),
        (403, error(10000, "no permission"), AuthenticationError, "Check the token"),
        (404, error(7003, "Could not route"), BackendError, "account id"),
        (200, {"success": False, "errors": [{"code": 7003, "message": "odd"}]}, BackendError, "odd"),
        (200, {"success": True, "result": "text"}, BackendError, "described an adapter"),
        (200, {"success": True, "result": nested(3)}, BackendError, "described an adapter"),
        (200, {"success": True, "result": nested(900)}, BackendError, "described an adapter"),
        (200, "not an object", BackendError, "not an object"),
        (400, {}, AdapterError, "Bad Request"),
        (401, {"success": False, "errors": [{"code": 9109, "message": "odd"}]}, AuthenticationError, "Check the token"),
    ],
)
def test_an_error_is_told_with_the_next_step(
    server: FinetunesServer, settings: Settings, status: int, body: Any, kind: type[MistralError], told: str
) -> None:
    server.faults["GET finetunes"] = [(status, body)]
    with pytest.raises(kind, match=told):
        list_adapters(settings)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "record", [{"name": "no id"}, {"id": FIRST, "name": "bad\u200bname"}, {"id": FIRST, "name": None}]
)
def test_a_record_that_cannot_be_read_stops_nothing(
    server: FinetunesServer, settings: Settings, folder: Path, record: dict[str, Any]
) -> None:
    server.adapters["odd"] = record | {"model": DEFAULT_MODEL}
    assert push(folder, "tone", settings=settings).name == "tone"
    with pytest.warns(UserWarning, match="^1 of 2 in Cloudflare's list cannot be read: left out$") as caught:
        assert [adapter.name for adapter in list_adapters(settings)] == ["tone"]
    assert caught[0].filename == __file__


def test_the_token_goes_nowhere_else(server: FinetunesServer, settings: Settings) -> None:
    with FinetunesServer() as other:
        server.faults["GET finetunes"] = [(302, {}, {"location": f"{other.url}/elsewhere"})]
        with pytest.raises(BackendError, match="redirects to 127"):
            list_adapters(settings)
        assert other.seen == []
    with pytest.raises(ConfigurationError, match="cloudflare_trust_base_url"):
        list_adapters(replace(settings, cloudflare_trust_base_url=False))
    with pytest.raises(ConfigurationError, match="32 hexadecimal"):
        list_adapters(replace(settings, cloudflare_account_id="../../.."))
    assert TOKEN not in repr(settings)


def test_a_push(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.unfound = 2
    seen: list[Progress] = []
    adapter = push(folder, "tone", settings=settings, description="like a pirate", progress=seen.append)
    assert (adapter.id, adapter.name, adapter.model) == (FIRST, "tone", DEFAULT_MODEL)
    assert server.files[FIRST] == {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    assert server.asked()[:5] == ["GET finetunes", "POST finetunes", ASSETS, ASSETS, "GET finetunes"]
    assert server.asked()[5:] == [RUN] * 3, "listed once, and tried until it is found"
    assert server.seen[1].json == {"model": DEFAULT_MODEL, "name": "tone", "description": "like a pirate"}
    assert (server.seen[-1].json["lora"], server.seen[-1].json["max_tokens"]) == ("tone", 1)
    assert {each.path.split("/ai/")[0] for each in server.seen} == {BASE.removesuffix("/ai")}
    size = (folder / WEIGHTS_FILE).stat().st_size
    steps = [now for now in seen if now.step == f"Uploading {WEIGHTS_FILE}"]
    assert [now.done for now in steps] == sorted(now.done for now in steps)
    assert len({now.done for now in steps}) > 3
    assert (steps[-1].done, steps[-1].total) == (size, size)
    assert seen[-1].step == "Waiting until tone is found"


def test_what_is_unfit_is_not_pushed(server: FinetunesServer, settings: Settings, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "bad", {"model_type": ..., "use_dora": True})
    with pytest.raises(AdapterError) as caught:
        push(folder, "tone", settings=settings)
    assert len(caught.value.problems) == 2
    with pytest.raises(AdapterError, match="Cloudflare's own"):
        push(folder, "cf-public-tone", settings=settings)
    assert server.seen == []


@pytest.mark.parametrize("stalled", ["GET finetunes", "POST finetunes", ASSETS, RUN])
def test_a_push_is_stopped_at_once(server: FinetunesServer, settings: Settings, folder: Path, stalled: str) -> None:
    hold = threading.Event()
    server.faults[stalled] = [hold]
    task = Push(folder, "tone", settings=settings)
    ends: list[BaseException] = []

    def run() -> None:
        try:
            task.run()
        except BaseException as error:  # looked at below
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert server.reached.wait(PATIENCE)
    task.stop()
    thread.join(PATIENCE / 2)
    (end,) = ends
    assert type(end) is AdapterError, "while the service still says nothing"
    assert "the push of tone was stopped. " in str(end)
    assert str(end).endswith(task.told)
    hold.set()
    assert push(folder, "tone", settings=settings).name == "tone"


@pytest.mark.parametrize("how", ["written anew", "cut", "grown", "gone"])
def test_a_file_that_changes_meanwhile(server: FinetunesServer, settings: Settings, folder: Path, how: str) -> None:
    weights = folder / WEIGHTS_FILE

    def meanwhile(now: Progress) -> None:
        if not now.step.endswith(CONFIG_FILE):
            return
        content = weights.read_bytes() if weights.exists() else b""
        match how:
            case "written anew":
                weights.write_bytes(content[:-1] + b"\1")
            case "cut":
                os.truncate(weights, 100_000)
            case "grown":
                weights.write_bytes(content + b"\0")
            case _:
                weights.unlink(missing_ok=True)

    told = "cannot be read" if how == "gone" else "has changed since the push began"
    with pytest.raises(ModelError, match=rf"{WEIGHTS_FILE} {told}.*with {CONFIG_FILE} from this push; to go on"):
        push(folder, "tone", settings=settings, progress=meanwhile)
    assert list(server.files[FIRST]) == [CONFIG_FILE]


def test_an_upload_that_breaks_off(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    go_on = threading.Event()
    go_on.set()
    server.faults[ASSETS] = [go_on, "cut"]
    with pytest.raises(ConnectionFailed) as caught:
        push(folder, "tone", settings=settings)
    # The buffers of the connection may have taken the rest of the file.
    assert re.search(
        rf"On the account now: tone \({FIRST}\) with {CONFIG_FILE} from this push(; whether {WEIGHTS_FILE} arrived is "
        r"not known)?; to go on, push it again under that name$",
        str(caught.value),
    )
    assert push(folder, "tone", settings=settings).id == FIRST


def test_a_create_without_an_answer(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults["POST finetunes"] = ["closed"]
    with pytest.raises(ConnectionFailed, match="Whether tone was created on the account is not known: push"):
        push(folder, "tone", settings=settings)


@pytest.mark.parametrize("answer", [(401, error(10000, "no")), (429, error(971, "slow"))])
def test_a_create_that_was_not_tried(
    server: FinetunesServer, settings: Settings, folder: Path, answer: tuple[int, Any]
) -> None:
    server.faults["POST finetunes"] = [answer]
    with pytest.raises(BackendError, match="This push has put nothing on the account"):
        push(folder, "tone", settings=settings)


def test_a_create_that_is_refused(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    for number in range(30):
        server.add(f"other{number}")
    server.faults["POST finetunes"] = [(400, error(5006, "too many finetunes"))]
    with pytest.raises(AdapterError, match=r"has 30 adapters, and an account may have 30 or 100.*put nothing on"):
        push(folder, "tone", settings=settings)


def test_a_refused_file(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[ASSETS] = [(413, {})]
    with pytest.raises(AdapterError, match=r"HTTP 413.*with no file from this push"):
        push(folder, "tone", settings=settings)


def test_what_is_never_found(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.unfound = 10**6
    with pytest.raises(AdapterError, match=r"after 0\.1 s\. On the account now: tone .* with both files; try it"):
        push(folder, "tone", settings=settings, patience=0.1)
    server.faults["GET finetunes"] = [(200, {"success": True, "result": None})] * 10**4
    with pytest.raises(AdapterError, match=r"is not in the account's list after 0\.1 s"):
        push(folder, "other", settings=settings, patience=0.1)


def test_what_still_lacks_files(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[ASSETS] = [(200, {"success": True})]
    with pytest.raises(AdapterError, match="says after 0 s that tone lacks files"):
        push(folder, "tone", settings=settings, patience=0)


def test_no_capacity_to_try_it_is_no_failure(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[RUN] = [(404, error(3037, "Finetune not found")), (429, error(3036, "spent"))]
    task = Push(folder, "tone", settings=settings)
    assert task.run().id == FIRST
    assert "allowance is spent" in task.untried


def test_a_trial_is_made_again(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[RUN] = [(500, error(3043, "Internal")), "closed"]
    assert push(folder, "tone", settings=settings).id == FIRST
    assert server.asked(RUN) == [RUN] * 3


def test_a_model_that_takes_no_adapters(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[RUN] = [(405, error(5005, "LoRA unsupported"))]
    with pytest.raises(InvalidRequest, match=r"takes no LoRA adapter.*On the account now"):
        push(folder, "tone", settings=settings)


def test_a_service_that_says_nothing(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    stall = threading.Event()
    server.faults[ASSETS] = [stall]
    with pytest.raises(RequestTimeout, match=r"no answer within 6 s.*On the account now"):
        push(folder, "tone", settings=replace(settings, first_token_timeout=6.0))
    stall.set()


def test_a_service_that_takes_nothing(settings: Settings, folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    os.truncate(weights, 64 << 20)  # more than the buffers of a connection
    with socket.create_server(("127.0.0.1", 0)) as never_reads:
        account = Account(
            replace(
                settings,
                cloudflare_base_url=f"http://127.0.0.1:{never_reads.getsockname()[1]}/client/v4",
                stall_timeout=0.3,
                first_token_timeout=60.0,
            )
        )
        adapter = Adapter(FIRST, "tone", DEFAULT_MODEL, "", "")
        with pytest.raises(RequestTimeout, match=rf"took nothing of {WEIGHTS_FILE} for 0\.3 s.*raise stall_timeout"):
            account.upload(adapter, weights, "not read so far", lambda step, done, total: None)


class Stop(Exception):
    """What a progress function raises to end the push."""


@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_an_end_from_the_progress(
    server: FinetunesServer, settings: Settings, folder: Path, kind: type[BaseException]
) -> None:
    def progress(now: Progress) -> None:
        if now.step.endswith(WEIGHTS_FILE) and now.done >= 100_000:
            raise kind

    task = Push(folder, "tone", settings=settings, progress=progress)
    with pytest.raises(kind) as caught:
        task.run()
    assert task.told == (
        f"On the account now: tone ({FIRST}) with {CONFIG_FILE} from this push; to go on, push it again under that name"
    )
    assert str(caught.value) == (task.told if kind is KeyboardInterrupt else "")
    assert WEIGHTS_FILE not in server.files[FIRST]
    assert push(folder, "tone", settings=settings).id == FIRST


def test_nothing_begun_is_told_too(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults["GET finetunes"] = [(429, error(3036, "spent"))]
    with pytest.raises(RateLimited, match="This push has put nothing on the account"):
        push(folder, "tone", settings=settings)


def test_the_token_is_in_no_error(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults[ASSETS] = ["closed"]
    with pytest.raises(ConnectionFailed) as caught:
        push(folder, "tone", settings=settings)
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "Uploading" in shown or "finetune-assets" in shown, "the locals are there"
    assert TOKEN not in shown


def test_a_file_of_the_size_of_the_limit_is_streamed(
    server: FinetunesServer, settings: Settings, tmp_path: Path
) -> None:
    """An upload is read piece by piece: no step is longer than 64 KiB."""
    folder = write_adapter(tmp_path / "tone")
    steps: list[int] = []
    push(
        folder,
        "tone",
        settings=settings,
        progress=lambda now: steps.append(now.done) if now.step.endswith(WEIGHTS_FILE) else None,
    )
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 65_536
    form = server.seen[3].body
    assert re.search(rb'name="file_name"\r\n\r\nadapter_model.safetensors\r\n', form)
    assert json.loads(server.files[FIRST][CONFIG_FILE])["r"] == 8
    assert os.path.getsize(folder / WEIGHTS_FILE) == len(server.files[FIRST][WEIGHTS_FILE])

"""A push that the service refuses, or may have taken although its answer is lost: what is told, and what is pushed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, AuthenticationError, ConnectionFailed, MistralError, RateLimited
from mistral_nb.finetunes.account import Refused
from mistral_nb.finetunes.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb.finetunes.cloudflare import list_adapters, push
from mistral_nb.progress import Progress
from tests.finetunes.adapters import matrices, write_weights
from tests.finetunes.finetunes_server import FinetunesServer, error

FIRST = "11111111-0000-4000-8000-000000000001"
ASSETS = f"POST finetunes/{FIRST}/finetune-assets"


@pytest.mark.parametrize(("asked", "changed"), [("first", CONFIG_FILE), ("second", WEIGHTS_FILE)])
def test_a_file_that_the_service_has_before_it_breaks_off(
    server: FinetunesServer, settings: Settings, folder: Path, asked: str, changed: str
) -> None:
    stored = threading.Event()
    stored.set()
    server.faults[ASSETS] = ["stored"] if asked == "first" else [stored, "stored"]
    with pytest.raises(ConnectionFailed) as caught:
        push(folder, "tone", settings=settings)
    assert changed in server.files[FIRST]
    there = "" if asked == "first" else f" with {CONFIG_FILE} from this push"
    assert str(caught.value).endswith(
        f"On the account now: tone ({FIRST}){there}; whether {changed} arrived is not known; to go on, push it again "
        "under that name"
    )
    assert push(folder, "tone", settings=settings).id == FIRST


def test_what_is_pushed_is_what_was_checked(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    def meanwhile(now: Progress) -> None:
        if now.step == "Checking":
            write_weights(folder / WEIGHTS_FILE, matrices(rank=256))

    with pytest.raises(AdapterError, match=r"256.*This push has put nothing on the account$"):
        push(folder, "tone", settings=settings, progress=meanwhile)
    assert server.seen == []


@pytest.mark.parametrize("code", [3006, 3037, 5006, 5028, 1234])
def test_a_refusal_with_a_good_status_is_one(
    server: FinetunesServer, settings: Settings, folder: Path, code: int
) -> None:
    server.faults["POST finetunes"] = [(200, error(code, "no"))]
    with pytest.raises(Refused, match=r"Check the adapter's name, files and model\. This push has put nothing"):
        push(folder, "tone", settings=settings)
    server.faults[ASSETS] = [(200, error(code, "no"))]
    with pytest.raises(Refused, match="with no file from this push; to go on"):
        push(folder, "tone", settings=settings)
    server.files[FIRST][CONFIG_FILE] = b"{}"
    server.faults[ASSETS] = [(200, error(code, "assets cannot be edited"))]
    with pytest.warns(UserWarning, match=f"^{CONFIG_FILE} of tone was on the account before"):
        assert push(folder, "tone", settings=settings).id == FIRST


@pytest.mark.parametrize(("status", "kind"), [(200, RateLimited), (400, RateLimited)])
def test_a_code_of_the_service_is_no_refusal_whatever_the_status(
    server: FinetunesServer, settings: Settings, folder: Path, status: int, kind: type[MistralError]
) -> None:
    server.faults["POST finetunes"] = [(status, error(3036, "spent"))]
    with pytest.raises(kind, match="allowance is spent"):
        push(folder, "tone", settings=settings)


def test_a_name_that_is_taken_is_told_though_the_answer_breaks_off(
    server: FinetunesServer, settings: Settings, folder: Path
) -> None:
    server.faults["POST finetunes"] = [(400, error(5006, "name taken"), {"content-length": "900"})]
    with pytest.raises(Refused, match=r"name taken.*This push has put nothing on the account"):
        push(folder, "tone", settings=settings)
    server.faults["GET finetunes"] = [(401, {}, {"content-length": "900"})]
    server.seen.clear()
    with pytest.raises(AuthenticationError):
        list_adapters(settings)
    assert len(server.seen) == 1

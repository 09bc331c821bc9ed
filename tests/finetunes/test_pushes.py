"""A push that goes on: what was there already, whose files they are, and two pushes of one name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, ConnectionFailed, RateLimited
from mistral_nb.finetunes.adapter import ASSETS as FILES
from mistral_nb.finetunes.adapter import CONFIG_FILE, DEFAULT_MODEL, WEIGHTS_FILE
from mistral_nb.finetunes.cloudflare import Push, push
from mistral_nb.finetunes.pushes import pushed_names, pushes_path, recall, sums_of
from mistral_nb.progress import Progress
from tests.finetunes.adapters import matrices, write_adapter
from tests.finetunes.finetunes_server import PATIENCE, FinetunesServer, error

RUN = f"POST run/{DEFAULT_MODEL}"
FIRST = "11111111-0000-4000-8000-000000000001"
ASSETS = f"POST finetunes/{FIRST}/finetune-assets"


def test_a_whole_adapter_is_not_pushed_over(
    server: FinetunesServer, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    server.add("tone", files=dict.fromkeys(FILES, b""))
    with pytest.raises(AdapterError, match="on the account already, with files that cannot be replaced"):
        push(folder, "tone", settings=settings)
    assert server.asked() == ["GET finetunes", RUN]
    push(folder, "mine", settings=settings)
    other = write_adapter(tmp_path / "other", {"lora_alpha": 32})
    server.seen.clear()
    with pytest.raises(AdapterError, match=f"mine on the account was created for another {CONFIG_FILE} than that in"):
        push(other, "mine", settings=settings)
    assert server.asked() == ["GET finetunes"]


def test_what_is_there_already_is_found(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    first = push(folder, "tone", settings=settings)
    server.seen.clear()
    assert push(folder, "tone", settings=settings).id == first.id
    assert server.asked() == ["GET finetunes", RUN]


def test_a_name_for_another_model(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.add("tone", "@cf/google/gemma-2b-it-lora")
    with pytest.raises(AdapterError, match="on the account for @cf/google/gemma-2b-it-lora; choose another name"):
        push(folder, "tone", settings=settings)


def test_a_push_goes_on_where_one_was_cut_short(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.add("tone")
    assert push(folder, "tone", settings=settings).id == FIRST
    assert set(server.files[FIRST]) == {CONFIG_FILE, WEIGHTS_FILE}
    assert "POST finetunes" not in server.asked()


def test_a_file_that_nobody_here_knows_is_told(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.add("tone", files={CONFIG_FILE: b"{}"})
    with pytest.warns(
        UserWarning, match=f"^{CONFIG_FILE} of tone was on the account before this push and not replaced"
    ):
        assert push(folder, "tone", settings=settings).id == FIRST
    assert server.files[FIRST][CONFIG_FILE] == b"{}"
    server.add("two", files=dict.fromkeys(FILES, b""))
    server.unfound = 10**6
    with pytest.raises(AdapterError, match=f"On the account now: two .* {CONFIG_FILE} and {WEIGHTS_FILE} of two were"):
        push(folder, "two", settings=settings, patience=0)


@pytest.mark.parametrize("other", FILES)
def test_a_push_does_not_go_on_with_another_file(
    server: FinetunesServer, settings: Settings, folder: Path, tmp_path: Path, other: str
) -> None:
    cut_short(server, settings, folder)
    before = dict(server.files[FIRST])
    changed = write_adapter(tmp_path / "changed")
    content = (folder / other).read_bytes()
    (changed / other).write_bytes(content + b"\n" if other == CONFIG_FILE else content[:-1] + b"\1")
    with pytest.raises(
        AdapterError, match=f"was created for another {other} than that in .*changed, .*choose another name"
    ):
        push(changed, "tone", settings=settings)
    assert server.files[FIRST] == before
    assert push(folder, "tone", settings=settings).id == FIRST


def cut_short(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    """A push whose configuration alone comes to the account."""
    go_on = threading.Event()
    go_on.set()
    server.faults[ASSETS] = [go_on, "cut"]
    with pytest.raises(ConnectionFailed):
        push(folder, "tone", settings=settings)
    assert list(server.files[FIRST]) == [CONFIG_FILE]


def test_what_was_put_into_an_adapter_that_nobody_here_knew_is_known_then(
    server: FinetunesServer, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    server.add("tone")
    cut_short(server, settings, folder)
    with pytest.raises(AdapterError, match=f"was created for another {CONFIG_FILE} than that in"):
        push(write_adapter(tmp_path / "other", {"lora_alpha": 32}), "tone", settings=settings)
    assert push(folder, "tone", settings=settings).id == FIRST


@pytest.mark.parametrize("refused", FILES)
def test_another_file_in_place_of_one_that_was_refused(
    server: FinetunesServer, settings: Settings, folder: Path, tmp_path: Path, refused: str
) -> None:
    taken = threading.Event()
    taken.set()
    server.faults[ASSETS] = [*([taken] if refused == WEIGHTS_FILE else []), (413, {})]
    with pytest.raises(AdapterError, match="HTTP 413"):
        push(folder, "tone", settings=settings)
    smaller = write_adapter(tmp_path / "smaller", shapes=matrices(layers=1))
    assert push(smaller, "tone", settings=settings).id == FIRST
    assert server.files[FIRST][WEIGHTS_FILE] == (smaller / WEIGHTS_FILE).read_bytes()


def test_two_pushes_of_a_name_at_once(
    server: FinetunesServer, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    hold = threading.Event()
    server.faults["POST finetunes"] = [hold]
    first = threading.Thread(target=push, args=(folder, "tone"), kwargs={"settings": settings})
    first.start()
    assert server.reached.wait(PATIENCE)
    other = write_adapter(tmp_path / "other", {"lora_alpha": 32})
    with pytest.raises(AdapterError, match="tone is being pushed from this machine already; wait until that has ended"):
        push(other, "tone", settings=settings)
    assert push(other, "two", settings=settings).name == "two"
    hold.set()
    first.join(PATIENCE)
    assert push(folder, "tone", settings=settings).name == "tone"


def test_a_namesake_from_elsewhere_is_told(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    def meanwhile(now: Progress) -> None:
        if now.step.startswith("Waiting"):
            server.add("tone")

    second = f"{FIRST[:-1]}2"
    with pytest.warns(UserWarning, match=rf"that is called tone \({second}\): ask for this one with --lora {FIRST}"):
        assert push(folder, "tone", settings=settings, progress=meanwhile).id == FIRST


def test_what_an_adapter_was_created_for_is_noted(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.faults["POST finetunes"] = [(400, error(5006, "no")), "closed"]
    with pytest.raises(AdapterError):
        push(folder, "tone", settings=settings)
    with pytest.raises(ConnectionFailed):
        push(folder, "tone", settings=settings)
    assert list(pushes_path().glob("*.json")) == []
    push(folder, "tone", settings=settings)
    (note,) = pushes_path().glob("*.json")
    assert recall(FIRST) == sums_of(folder)
    assert pushed_names() == ["tone"]
    for damaged in (b"", b"[]", b"{}", b"[" * 3_000, b"\xff"):
        note.write_bytes(damaged)
        assert recall(FIRST) == {}
        assert pushed_names() == []


def test_what_cannot_be_noted_is_not_created(
    server: FinetunesServer, settings: Settings, folder: Path, home: Path
) -> None:
    home.write_bytes(b"a file")
    with pytest.raises(AdapterError, match=r"cannot be noted .* MISTRAL_NB_HOME .*put nothing on the account"):
        push(folder, "tone", settings=settings)
    assert server.seen == []


def test_a_push_goes_on_after_an_interrupted_wait(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    server.unfound = 1

    def interrupt(now: Progress) -> None:
        if now.step.startswith("Waiting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="with both files; try it in a moment"):
        push(folder, "tone", settings=settings, progress=interrupt)
    assert push(folder, "tone", settings=settings).id == FIRST
    assert server.asked("POST finetunes") == ["POST finetunes", *[ASSETS] * 4]


def test_files_that_are_refused_for_good_are_told_after_the_wait(
    server: FinetunesServer, settings: Settings, folder: Path
) -> None:
    cut_short(server, settings, folder)
    server.faults[ASSETS] = [(400, error(5006, "assets cannot be edited")), (413, {})]
    with pytest.raises(AdapterError, match=rf"cannot be edited.*{WEIGHTS_FILE}: .*HTTP 413.*that tone lacks files"):
        push(folder, "tone", settings=settings, patience=0)


def test_a_push_goes_on_without_capacity_to_try_it(server: FinetunesServer, settings: Settings, folder: Path) -> None:
    """But not into an adapter that nobody here knows: it may be a whole one."""
    spent = (429, error(3036, "spent"))
    cut_short(server, settings, folder)
    server.add("two")
    server.faults[RUN] = [spent, spent, spent]
    task = Push(folder, "tone", settings=settings)
    task.run()
    assert (set(server.files[FIRST]), task.doubt) == (set(FILES), "")
    assert "allowance is spent" in task.untried
    with pytest.raises(RateLimited, match="put nothing on"):
        push(folder, "two", settings=settings)

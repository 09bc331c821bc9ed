"""Downloads over what can go wrong on the way: what is tried again, what is resumed, what is refused, and the words."""

from __future__ import annotations

import os
import shutil
import signal
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import PullError
from mistral_nb.models import Progress, web
from mistral_nb.models.download import TRIES
from mistral_nb.models.hub import HubSource
from mistral_nb.models.staging import Staging
from tests.models.hub_server import LISTING, Fault, HubServer, Repo, use_hub
from tests.models.pulls import hashes, left_behind, pulling
from tests.models.tiny_repos import consolidated

ID, NAME, WEIGHTS = "org/mistral", "org--mistral", "consolidated.safetensors"
SIZE = len(consolidated()[WEIGHTS])
HALF = SIZE // 2
TOTAL = sum(len(content) for name, content in consolidated().items() if name != ".gitattributes")


def part(store: Path) -> Path:
    """The partial file of the weights."""
    [found] = (store / f".staging-{NAME}" / "work").glob("*.part")
    return found


def starts(hub: HubServer) -> list[int]:
    """From which byte the weights were asked for, each time."""
    return [each.start for each in hub.asked(WEIGHTS, "hub")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes of a pull without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, HubServer({ID: Repo(consolidated())}) as hub:
        patch.setenv("MISTRAL_NB_HOME", str(folder))
        use_hub(patch, hub.endpoint, folder)
        return hashes(models.pull(ID))


def status(code: int, **headers: str) -> Fault:
    return Fault("status", status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("faults", "wanted"),
    [
        pytest.param([Fault("cut", HALF)], [0, HALF], id="connection closed"),
        pytest.param([Fault("cut", 0)], [0, 0], id="connection closed after the headers"),
        pytest.param([Fault("drop")], [0, 0], id="no answer"),
        pytest.param([Fault("short", HALF)], [0, HALF], id="a proxy cuts and corrects the length"),
        pytest.param([Fault("chunked", HALF)], [0, HALF], id="chunked, ended early"),
        pytest.param([Fault("cut", HALF), Fault("whole")], [0, HALF], id="Range is ignored"),
        pytest.param([Fault("cut", HALF), Fault("elsewhere")], [0, HALF, 0], id="another range"),
        pytest.param([Fault("cut", HALF), status(416)], [0, HALF, 0], id="416"),
        pytest.param([Fault("flipped")], [0, 0], id="one wrong byte"),
        pytest.param([Fault("cut", HALF), Fault("flipped")], [0, HALF, 0], id="one wrong byte in the rest"),
        pytest.param([status(500), status(502), status(503)], [0] * 4, id="5xx"),
        pytest.param([status(403)], [0, 0], id="an expired link of the store"),
        pytest.param([status(429)], [0, 0], id="429 without a time"),
    ],
)
def test_another_try_gets_over(
    hub: HubServer, store: Path, undisturbed: dict[str, str], faults: list[Fault], wanted: list[int]
) -> None:
    hub.fail(WEIGHTS, *faults)
    seen: list[Progress] = []
    folder = models.pull(ID, seen.append)
    assert starts(hub) == wanted
    assert hashes(folder) == undisturbed
    assert left_behind(store) == [NAME]
    fetched = [step for step in seen if step.step.startswith("Downloading")]
    assert fetched[-1].done == fetched[-1].total == TOTAL


@pytest.mark.parametrize(
    ("fault", "tries", "message"),
    [
        pytest.param(
            Fault("cut", HALF),
            TRIES,
            rf"localhost:\d+ broke off while sending {WEIGHTS} \(.+\), {TRIES} times in a row; "
            "later pull again, which goes on from there",
            id="cut at the same byte",
        ),
        pytest.param(
            Fault("short", HALF),
            TRIES,
            rf"localhost:\d+, or a proxy before it, ended {WEIGHTS} after {HALF} of {SIZE} bytes, {TRIES} times in a "
            "row; pull again, which goes on from there, or over another network",
            id="a proxy ends all at that byte",
        ),
        pytest.param(
            Fault("whole and cut", HALF),
            TRIES,
            rf"localhost:\d+ broke off while sending {WEIGHTS} \(.+\), {TRIES} times in a row; later pull again, .+",
            id="Range is ignored, and cut at the same byte",
        ),
        pytest.param(
            Fault("flipped"),
            2,
            rf"{WEIGHTS} from 127.0.0.1:\d+ has the SHA-256 [0-9a-f]{{64}}, not [0-9a-f]{{64}} as the hub lists it, "
            "twice in a row: .+; pull again later or over another network",
            id="wrong hash",
        ),
        pytest.param(
            Fault("more"),
            1,
            rf"localhost:\d+ sends more than {SIZE} bytes for {WEIGHTS}, .+; pull again later or over another network",
            id="more than listed",
        ),
        pytest.param(
            Fault("portal"),
            1,
            rf"localhost:\d+ sent a web page in place of {WEIGHTS}: .+; open http://127.0.0.1:\d+ in a browser, "
            "and pull again, which goes on from there",
            id="captive portal",
        ),
        pytest.param(
            status(500),
            TRIES,
            rf"localhost:\d+ failed to send {WEIGHTS} \(HTTP 500\), {TRIES} times in a row; later pull again, .+",
            id="500",
        ),
        pytest.param(
            status(403),
            TRIES,
            rf"localhost:\d+, where 127.0.0.1:\d+ keeps {WEIGHTS}, refused it \(HTTP 403\), {TRIES} times in a row; .+",
            id="403 of the store of large files",
        ),
        pytest.param(
            status(404, X_Error_Code="EntryNotFound"),
            1,
            rf"{ID} lists {WEIGHTS} and does not have it \(HTTP 404\); pull again",
            id="404 of a hub behind a redirect",
        ),
        pytest.param(
            status(429),
            TRIES,
            rf"localhost:\d+ limits how often it may be asked \(HTTP 429 for {WEIGHTS}\), {TRIES} times in a row; "
            "wait some minutes and pull again, .+; a token raises that limit: log in with `hf auth login` or set "
            "HF_TOKEN",
            id="429",
        ),
        pytest.param(
            status(429, Retry_After="3600"),
            1,
            r"localhost:\d+ limits .+ asks to wait 60 minutes, until \d\d:\d\d; wait some minutes and pull again, .+",
            id="429, in an hour",
        ),
        pytest.param(
            status(503, Retry_After="3600"),
            1,
            r"localhost:\d+ failed to send .+ \(HTTP 503\) and asks to wait 60 minutes, until \d\d:\d\d; later .+",
            id="503, in an hour",
        ),
    ],
)
def test_what_does_not_get_better_is_told(
    hub: HubServer, store: Path, undisturbed: dict[str, str], fault: Fault, tries: int, message: str
) -> None:
    hub.fail(WEIGHTS, fault, always=True)
    with pytest.raises(PullError, match=rf"^{message}$") as caught:
        models.pull(ID)
    assert "secret" not in str(caught.value)
    assert len(starts(hub)) == tries
    assert models.installed() == []
    hub.heal()
    assert hashes(models.pull(ID)) == undisturbed
    assert left_behind(store) == [NAME]


@pytest.mark.parametrize(
    ("what", "headers"),
    [
        pytest.param(LISTING, {"Retry_After": "1"}, id="seconds"),
        pytest.param("params.json", {"Retry_After": "date"}, id="a date"),
        pytest.param(WEIGHTS, {"RateLimit": '"resolvers";r=0;t=1'}, id="RateLimit"),
    ],
)
def test_a_wait_that_is_asked_for_is_kept_and_shown(hub: HubServer, what: str, headers: dict[str, str]) -> None:
    began, dated = time.monotonic(), headers.get("Retry_After") == "date"
    if dated:  # in whole seconds
        headers = {"Retry_After": formatdate(time.time() + 3, usegmt=True)}
    hub.fail(what, status(429, **headers))
    seen: list[Progress] = []
    models.pull(ID, seen.append)
    waits = {step.step for step in seen if step.step.startswith("Waiting ")}
    host = "localhost" if what == WEIGHTS else "127.0.0.1"
    assert waits or dated, "a date may have passed where this machine stood still"
    assert waits <= {
        f"Waiting {seconds} s: {host}:{hub.port} limits how often it may be asked (HTTP 429 for {what})"
        for seconds in ((1, 2, 3) if dated else (1,))
    }
    times = [each.at for each in hub.asked(what)]
    assert len(times) == (4 if what == WEIGHTS else 2)
    before, after = times[len(times) // 2 - 1 :][:2]
    waited, least = (after - began, 2.0) if dated else (after - before, 1.0)
    assert waited > least - 0.05


@pytest.mark.parametrize("asked", ["0", formatdate(0, usegmt=True)], ids=["no seconds", "a date in the past"])
def test_asking_for_no_wait_is_no_reason_to_hurry(hub: HubServer, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr("mistral_nb.models.download.FIRST_WAIT_S", 0.02)
    hub.fail(LISTING, status(503, Retry_After=asked), always=True)
    began = time.monotonic()
    with pytest.raises(PullError, match=f"{TRIES} times in a row"):
        models.pull(ID)
    assert time.monotonic() - began > 0.02 * (2 ** (TRIES - 1) - 1)
    assert len(hub.asked(LISTING)) == TRIES


def test_a_wait_is_counted_down(hub: HubServer) -> None:
    shown: list[list[str]] = []
    while len(shown) < 10 and (not shown or len(shown[-1]) < 2):  # a machine that stands still for a second shows one
        hub.fail(LISTING, status(429, Retry_After="2"))
        seen: list[Progress] = []
        models.pull(ID, seen.append)
        waits = [each.step.partition(":")[0] for each in seen if each.step.startswith("Waiting ")]
        shown.append(list(dict.fromkeys(waits)))
        models.remove(NAME)
    assert shown[-1] == ["Waiting 2 s", "Waiting 1 s"], shown


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Fault("whole and cut", 1000)], id="Range is ignored, and cut before what is there"),
        pytest.param([Fault("elsewhere"), Fault("drop")], id="another range"),
        pytest.param([status(416), Fault("drop")], id="416"),
        pytest.param([Fault("more")], id="more than listed"),
    ],
)
def test_what_is_there_stays_until_its_sum_is_wrong(
    hub: HubServer, store: Path, undisturbed: dict[str, str], faults: list[Fault]
) -> None:
    first = hub.fail(WEIGHTS, Fault("stalled", HALF))
    with pytest.raises(PullError, match="cancelled"):
        models.pull(ID, cancelled=lambda: first.happened.is_set() and part(store).stat().st_size == HALF)
    first.over.set()
    hub.fail(WEIGHTS, *faults, always=True)
    with pytest.raises(PullError):
        models.pull(ID)
    kept = part(store).stat().st_size
    assert kept >= HALF
    hub.heal()
    hub.seen.clear()
    assert hashes(models.pull(ID)) == undisturbed
    assert starts(hub) == [kept]


def test_a_stalled_download_is_resumed(
    hub: HubServer, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 1.0)
    hub.fail(WEIGHTS, Fault("stalled", HALF))
    assert hashes(models.pull(ID)) == undisturbed
    found = list(dict.fromkeys(starts(hub)))
    assert found == sorted(found), "in more tries where this machine stood still"
    assert {0, HALF} <= {*found}


def test_progress_goes_on_while_nothing_comes(hub: HubServer, store: Path) -> None:
    """The hub goes on once there was progress ten times."""
    fault = hub.fail(WEIGHTS, Fault("stalled", HALF))
    calls: list[tuple[int, int | None]] = []
    meanwhile = 0

    def report(step: str, done: int, total: int | None) -> None:
        nonlocal meanwhile
        calls.append((done, total))
        if fault.happened.is_set() and part(store).stat().st_size == HALF:
            meanwhile += 1
        if meanwhile == 10:
            fault.over.set()

    store.mkdir(parents=True)
    source = HubSource(NAME, ID, None)
    staging = Staging(store, NAME)
    staging.begin(source.identity())
    source.fetch(staging, report)
    assert meanwhile >= 10
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {None, calls[-1][1]}


def test_cancelling_while_nothing_comes(
    hub: HubServer, store: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the hub nor a limit of ours ends the silence."""
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 600.0)
    fault = hub.fail(WEIGHTS, Fault("stalled", HALF))
    with pytest.raises(PullError, match=r"was cancelled; what was fetched is kept \(.+\): the next pull goes"):
        models.pull(ID, cancelled=lambda: fault.happened.is_set() and part(store).stat().st_size == HALF)
    fault.over.set()
    assert part(store).stat().st_size == HALF
    assert models.installed() == []
    hub.seen.clear()
    assert hashes(models.pull(ID)) == undisturbed
    assert starts(hub) == [HALF]


def test_cancelling_a_wait(hub: HubServer) -> None:
    hub.fail(WEIGHTS, status(429, Retry_After="300"))
    began = time.monotonic()
    steps: list[str] = []
    with pytest.raises(PullError, match="was cancelled"):
        models.pull(ID, lambda progress: steps.append(progress.step), lambda: steps[-1:] > ["Waiting "])
    assert time.monotonic() - began < 250


@pytest.mark.skipif(os.name != "posix", reason="signals a process group")
def test_an_interrupt_keeps_what_was_fetched(hub: HubServer, store: Path, undisturbed: dict[str, str]) -> None:
    fault = hub.fail(WEIGHTS, Fault("stalled", HALF))
    with pulling(None, store, name=ID) as process:
        assert fault.happened.wait(180)
        while part(store).stat().st_size < HALF:
            os.sched_yield()
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)  # the hub stands still for longer
    assert "KeyboardInterrupt" in errors
    assert part(store).stat().st_size == HALF
    hub.seen.clear()
    assert hashes(models.pull(ID)) == undisturbed
    assert starts(hub) == [HALF]


@pytest.mark.parametrize(
    ("left", "wanted"),
    [
        pytest.param(b"another file's", [14, 0], id="other bytes"),
        pytest.param(bytes(SIZE), [0], id="other bytes, as many"),
        pytest.param(consolidated()[WEIGHTS] + b"more", [], id="more bytes"),
    ],
)
def test_a_partial_file_that_is_damaged_is_mended(
    hub: HubServer, store: Path, undisturbed: dict[str, str], left: bytes, wanted: list[int]
) -> None:
    hub.fail(WEIGHTS, status(429, Retry_After="3600"))
    with pytest.raises(PullError):
        models.pull(ID)
    part(store).write_bytes(left)
    hub.seen.clear()
    assert hashes(models.pull(ID)) == undisturbed
    assert starts(hub) == wanted


def test_the_disk_fills_in_the_middle(hub: HubServer, undisturbed: dict[str, str], small_disk: Path) -> None:
    fault = hub.fail(WEIGHTS, Fault("stalled", HALF))
    filler = small_disk / "filler"

    def fill(progress: Progress) -> None:
        if fault.happened.is_set() and not filler.exists() and part(small_disk / "models").stat().st_size == HALF:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
            fault.over.set()

    with pytest.raises(PullError, match=f"pulling {NAME} filled the disk of {small_disk}/models; free some space and"):
        models.pull(ID, fill)
    assert len(starts(hub)) == 1
    assert models.installed() == []
    filler.unlink()
    hub.seen.clear()
    assert hashes(models.pull(ID)) == undisturbed
    assert starts(hub)[0] >= HALF
    assert left_behind(small_disk / "models") == [NAME]


def test_without_room_no_weights_are_fetched(hub: HubServer, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(2_000_000))
    with pytest.raises(PullError, match=r"pulling org--mistral needs 3.9 MB in .+, where \d.\d MB are free; free some"):
        models.pull(ID)
    assert hub.asked("params.json")
    assert not hub.asked(WEIGHTS)


def test_one_connection_to_each_host(hub: HubServer) -> None:
    models.pull("org/sharded")
    assert hub.connections == 2

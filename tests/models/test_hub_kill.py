"""Pulls from a hub that are killed anywhere, made twice at once, or go on when the hub has got another commit."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import PullError
from mistral_nb.models import Progress
from tests.models.hub_server import LISTING, Fault, HubServer
from tests.models.pulls import go_on, hashes, kill, left_behind, pulling, stopped
from tests.models.tiny_repos import sharded

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals a process group")

ID, NAME = "org/sharded", "org--sharded"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
FINAL_RENAME = f"os.rename /.staging-{NAME}/checkpoint"

Point = tuple[str, int] | str
"""A file and the byte of it at which the hub stops sending, or a point of `pulls.pulling`."""


def choose(points: list[str], hub: HubServer, chance: random.Random) -> list[Point]:
    """Ten points: at four bytes, between two files, and before something is done to a file in each step."""
    sizes = {name: len(hub.repos[ID].files[name]) for name in SHARDS}
    bytes_of = [(name, chance.randrange(1, sizes[name])) for name in chance.choices(SHARDS, k=4)]
    steps = ("Downloading config", "Downloading model", "Checking", "Saving", FINAL_RENAME)
    acts = [point for point in points if "open " in point or "os." in point]
    last = next(number for number, point in enumerate(acts) if point.endswith(FINAL_RENAME))
    within = [chance.choice([point for point in acts[: last + 1] if step in point]) for step in steps[:-1]]
    return [*bytes_of, (chance.choice(SHARDS), 0), *within, chance.choice(acts[last + 1 :])]


def kill_at(point: Point, hub: HubServer, store: Path) -> None:
    fault = hub.fail(point[0], Fault("stalled", point[1])) if isinstance(point, tuple) else None
    with pulling(None, store, point if isinstance(point, str) else "", name=ID) as process:
        if isinstance(point, tuple):
            assert fault
            assert fault.happened.wait(180)
            wait_for_bytes(store, *point)
        else:
            assert stopped(process), process.communicate()
        kill(process)
    if fault:
        fault.over.set()


def wait_for_bytes(store: Path, name: str, size: int) -> None:
    """Until as many bytes of a file are on the disk."""
    end = time.monotonic() + 180
    while kept(store)[name] < size:
        assert time.monotonic() < end
        os.sched_yield()


def kept(store: Path) -> dict[str, int]:
    """Bytes of each shard that a killed pull left, or brought into the store."""
    found = {}
    for name in SHARDS:
        places = [store / NAME / name, store / f".staging-{NAME}" / "checkpoint" / name]
        places += (store / f".staging-{NAME}" / "work").glob(f"{name}.*.part")
        found[name] = max([path.stat().st_size for path in places if path.exists()], default=0)
    return found


def test_a_pull_that_is_killed_anywhere_goes_on(
    hub: HubServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pulling(None, store, name=ID) as process:
        output, errors = process.communicate(timeout=300)
    assert not errors
    points = json.loads(output)
    whole = hashes(store / NAME)
    seed = int(os.environ.get("KILL_SEED", 0))
    chosen = choose(points, hub, random.Random(seed))
    print(f"KILL_SEED={seed}, of {len(points)} points: {chosen}")
    for number, point in enumerate(chosen):
        monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / str(number)))
        store = tmp_path / str(number) / "models"
        kill_at(point, hub, store)
        left = kept(store)
        print(f"killed at {point}, with {left}")
        renamed = point == chosen[-1]
        assert [model.name for model in models.installed()] == [NAME] * renamed
        hub.seen.clear()
        assert models.pull(ID) == store / NAME
        assert hashes(store / NAME) == whole
        assert left_behind(store) == [NAME]
        assert {name: hub.sent(name) + left[name] for name in SHARDS} == {
            name: len(hub.repos[ID].files[name]) for name in SHARDS
        }


def test_a_pull_that_is_killed_while_it_goes_on(hub: HubServer, store: Path) -> None:
    kill_at((SHARDS[1], 1000), hub, store)
    left = kept(store)
    kill_at(f"Checking {SHARDS[0]}", hub, store)
    kill_at(f"Checking {SHARDS[1]}", hub, store)
    assert kept(store) == left
    assert models.installed() == []
    hub.seen.clear()
    folder = models.pull(ID)
    assert all((folder / name).read_bytes() == hub.repos[ID].files[name] for name in SHARDS)
    assert [hub.sent(name) for name in SHARDS[:2]] == [0, len(hub.repos[ID].files[SHARDS[1]]) - left[SHARDS[1]]]
    assert left_behind(store) == [NAME]


def test_two_pulls_at_once_do_the_work_once(hub: HubServer, store: Path) -> None:
    fault = hub.fail(SHARDS[0], Fault("stalled", 1000))
    with pulling(None, store, name=ID) as first:
        assert fault.happened.wait(180)
        with pulling(None, store, "Waiting for another pull", name=ID) as second:
            assert stopped(second)
            fault.over.set()
            go_on(second)
            assert second.communicate(timeout=300)[1] == ""
        assert first.communicate(timeout=300)[1] == ""
    assert len(hub.asked(LISTING)) == 1
    assert [len(hub.asked(name, "cdn")) for name in SHARDS] == [1, 1, 1]
    assert left_behind(store) == [NAME]


def test_another_commit_keeps_what_is_the_same(hub: HubServer, store: Path) -> None:
    """The files that are the same are taken as they are; nothing of the others is mixed in."""
    hub.repos[ID].files["LICENSE"] = b"Apache"
    fault = hub.fail(SHARDS[1], Fault("stalled", 600_000))
    with pytest.raises(PullError, match="cancelled"):
        models.pull(ID, cancelled=lambda: fault.happened.is_set() and kept(store)[SHARDS[1]] == 600_000)
    fault.over.set()
    changed = sharded(seed=5)
    del hub.repos[ID].files["LICENSE"]
    hub.repos[ID].files |= {name: changed[name] for name in SHARDS[1:]} | {
        "README.md": hub.repos[ID].files["README.md"].upper()
    }
    hub.seen.clear()
    seen: list[Progress] = []
    folder = models.pull(ID, seen.append)
    assert all((folder / name).read_bytes() == hub.repos[ID].files[name] for name in (*SHARDS, "README.md"))
    assert [hub.sent(name) for name in SHARDS] == [0, len(changed[SHARDS[1]]), len(changed[SHARDS[2]])]
    assert f"Checking {SHARDS[0]}" in {step.step for step in seen}
    assert not (folder / "LICENSE").exists()
    assert left_behind(store) == [NAME]

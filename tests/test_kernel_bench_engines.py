"""The kernel bench beside engines: when it is refused, and what is noted of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mistral_nb import __version__, kernel_bench, runtime
from mistral_nb.engine_control import EngineStatus
from mistral_nb.errors import MistralError
from mistral_nb.kernel_bench import BenchProcess, check_engines, start
from mistral_nb.models import EMBEDDED
from mistral_nb.runtime import EngineRecord
from tests.backends.scripted import Peer, head

GOT = "import json, sys; print(json.dumps({'event': 'got', 'arguments': sys.argv[1:]}))"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A peer that says to be an engine, with the record of one, and this machine's number of GPUs."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    peers: list[Peer] = []

    def serving(device: str, gpus: int, active: int = 0) -> None:
        memory = 14_200_000_000
        told = {"protocol": runtime.PROTOCOL, "version": __version__, "state": "ready", "model": EMBEDDED}
        body = json.dumps({**told, "device": device, "memory": memory, "active": active}).encode()
        peers.append(Peer(scripts=[[head("200 OK", "application/json") + body]]))
        record = EngineRecord(os.getpid(), peers[-1].port, "t", EMBEDDED, __version__, runtime.PROTOCOL, "x.log", 0.0)
        runtime.write_record(record)
        monkeypatch.setattr(kernel_bench, "nvidia_gpus", lambda: gpus)

    yield serving
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_engine_on_the_gpu_is_refused_unless_it_is_wanted(engine: Callable[..., None], device: str) -> None:
    engine("NVIDIA H100 80GB HBM3", gpus=1)
    with pytest.raises(MistralError) as caught:
        check_engines(device, beside=False)
    assert str(caught.value) == (
        f"the engine of {EMBEDDED} holds 14.2 GB of NVIDIA H100 80GB HBM3, so what is measured now would be slower "
        "than it is. End it with %mistral stop (in a terminal: mistral-nb stop), or measure all the same with "
        "--beside-engine"
    )
    [note] = check_engines(device, beside=True)
    assert note == f"measured beside an engine: the engine of {EMBEDDED} holds 14.2 GB of NVIDIA H100 80GB HBM3"
    assert check_engines("cpu", beside=False) == []


def test_an_engine_that_does_not_respond_may_hold_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    record = EngineRecord(1, 1, "t", EMBEDDED, __version__, runtime.PROTOCOL, "x.log", 0.0)
    monkeypatch.setattr(kernel_bench, "status", lambda settings: [EngineStatus(record, None)])
    monkeypatch.setattr(kernel_bench, "nvidia_gpus", lambda: 1)
    with pytest.raises(MistralError, match="does not respond and may hold the GPU, so what is measured"):
        check_engines("auto", beside=False)


@pytest.mark.parametrize(("gpus", "device"), [(0, "auto"), (1, "cpu"), (1, "auto")])
def test_an_engine_that_answers_on_the_cpu_is_noted(engine: Callable[..., None], gpus: int, device: str) -> None:
    engine("CPU, 2 threads", gpus=gpus, active=3)
    assert check_engines(device, beside=False) == [f"the engine of {EMBEDDED} was answering 3 request(s) beside this"]


def test_what_engines_do_comes_into_the_results(engine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    engine("NVIDIA L4", gpus=1)
    monkeypatch.setattr(BenchProcess, "program", ("-c", GOT))
    for arguments in (["norm"], ["candidate", "norm", "-"], ["norm", "--device", "cpu", "--device=cuda"]):
        with pytest.raises(MistralError, match="--beside-engine"):
            start(arguments)
    note = f"--note=measured beside an engine: the engine of {EMBEDDED} holds 14.2 GB of NVIDIA L4"
    with start(["norm", "--beside-engine", "--seq", "8"]) as process:
        assert next(process)["arguments"] == ["norm", "--seq", "8", note, "--events"]
    for harmless in (["--list"], ["--open=x.json"], ["norm", "--device=cpu"], ["norm", "--device", "cpu"], ["-h"]):
        with start(harmless) as process:
            assert next(process)["arguments"] == [*harmless, "--events"]

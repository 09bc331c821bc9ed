"""Engines that take turns: which are there, who fits beside whom, how often each answers, and how loading is timed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import bench_engine, bench_turns
from mistral_nb.bench_engine import measure
from mistral_nb.bench_peers import PEERS
from mistral_nb.bench_turns import Contender, Plan, texts
from mistral_nb.errors import MistralError
from mistral_nb.hardware import Memory
from tests.tiny_bench import tiny_plan

GB = 10**9


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    return tiny_plan(tmp_path, monkeypatch)


def test_peers_that_are_not_there_say_why(plan: Plan) -> None:
    nowhere = {peer.name: peer for peer in bench_turns.peers(replace(plan, peers=list(PEERS), pythons=[]))}
    assert set(nowhere) == set(PEERS)
    assert all("or name another one with --peer-python" in peer.refused for peer in nowhere.values())
    assert next(bench_engine._told([nowhere["gpt-fast"]], None, None)) == (
        "gpt-fast: not measured: no Python that was named has it: set PYTHONPATH to a checkout of it, "
        "or name another one with --peer-python"
    )


def test_peers_that_are_there_and_cannot_be_measured_say_why(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_turns, "_has", lambda python, module: python == "second")
    plan = replace(plan, peers=list(PEERS), pythons=["first", "second"])
    found = {peer.name: peer for peer in bench_turns.peers(plan)}
    assert {peer.command[0] for peer in found.values()} == {"second"}
    assert found["transformers"].refused == ""
    assert found["llama-cpp-python"].refused.startswith("--gguf FILE gives it the same model")
    assert found["vllm"].refused == found["gpt-fast"].refused == "it is measured on a GPU"
    monkeypatch.setattr(bench_turns, "gpu_memories", lambda: [Memory("cuda", "a GPU", 10**9, 2 * 10**9)])
    gguf = plan.folder / "model.gguf"
    gguf.write_bytes(bytes(4000))
    for peer in bench_turns.peers(replace(plan, device="cuda", gguf=gguf)):
        assert peer.refused == ""
        assert peer.command[peer.command.index("--precision") + 1] == "bf16"
        assert ("--gguf" in peer.command) == (peer.files == [gguf]) == (peer.name == "llama-cpp-python")
        assert (peer.bytes == 5000) == (peer.name == "llama-cpp-python")
        if peer.name == "vllm":
            assert float(peer.command[peer.command.index("--memory-share") + 1]) == peer.bytes / 2e9


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), (None, "bf16")])
def test_the_16_bits_are_those_that_the_gpu_has(
    capability: tuple[int, int] | None, precision: str, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_turns, "compute_capability", lambda: capability)
    [peer] = bench_turns.peers(replace(plan, device="cuda", peers=["transformers"]))
    assert peer.command[peer.command.index("--precision") + 1] == bench_turns.half() == precision


@pytest.mark.parametrize(
    ("free", "groups"),
    [
        (None, ["bf16 int8 int4 llama transformers"]),
        (80 * GB, ["bf16 int8 int4 llama transformers"]),
        (40 * GB, ["bf16 int8", "int4 llama transformers"]),
        (24 * GB, ["bf16", "int8 int4", "llama transformers"]),
        (19 * GB, ["int8", "int4 llama", "transformers"]),
        (8 * GB, ["llama"]),
    ],
)
def test_who_does_not_fit_beside_the_others_is_measured_after_them(free: int | None, groups: list[str]) -> None:
    """The judge is in the last group, whatever the order."""
    sizes = {"bf16": 20, "int8": 13, "transformers": 19, "int4": 9, "llama": 5}
    contenders = [Contender(name, [], [], size * GB) for name, size in sizes.items()]
    found = bench_turns._groups(contenders, free)
    assert [" ".join(each.name for each in group) for group in found] == groups
    for each in contenders:
        assert (f"it needs {each.bytes / GB:.1f} GB, and" in each.refused) == bool(each.refused) == (each.group == 0)
    told = [line for line in bench_engine._told(contenders, None, None) if line.startswith("they do not fit")]
    assert len(told) == (len(groups) > 1)


def test_groups_have_the_same_prompts_and_the_same_judge(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan, precisions=["fp32", "int8"], peers=["transformers"], runs=1)
    each = max(contender.bytes for contender in (*bench_turns._ours(plan), *bench_turns.peers(plan)))
    monkeypatch.setattr(bench_turns, "free_memory", lambda device: each)
    lines: list[str] = []
    report, rows = measure(plan, lines.append)
    assert [line.partition(" at ")[0] for line in lines] == [
        name for name in ("mistral-nb fp32", "mistral-nb int8", "transformers") for _ in range(3)
    ]
    assert report["correct"] is True
    assert [row.same for row in rows if row.engine != "mistral-nb int8"] == [1.0, 1.0]
    assert any(line.startswith("they do not fit into memory together") for line in report["told"])


def test_with_no_room_for_ours_there_is_no_result(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_turns, "free_memory", lambda device: 10_000_000)
    with pytest.raises(MistralError, match=r"fp32 cannot be measured: it needs .* shorter --contexts or a smaller"):
        measure(plan, print)


class Answering:
    """What a process answers that compiles so many seconds in its first answer and takes so many for each."""

    def __init__(self, compiles: float, takes: float) -> None:
        self._seconds = [takes + compiles]
        self._takes = takes

    def ask(self, do: str, prompt: list[int], tokens: int) -> dict[str, Any]:
        seconds = self._seconds.pop() if self._seconds else self._takes
        return {"first": 0.01, "last": seconds, "ids": list(range(tokens))}


@pytest.mark.parametrize(("compiles", "takes", "runs"), [(3000, 14, 7), (0, 16, 2)])
def test_only_turns_that_are_slow_once_compiled_are_cut(compiles: float, takes: float, runs: int, plan: Plan) -> None:
    contenders = [Contender(name, [], []) for name in ("mistral-nb bf16", "transformers")]
    for each in contenders:
        each.child = Answering(compiles, takes)  # type: ignore[assignment]
    bench_turns._answer_in_turn(contenders, 36, replace(plan, runs=7), 512, lambda line: None)
    assert [len(each.times[36]) for each in contenders] == [runs, runs]


def test_prompts_share_no_beginning() -> None:
    prompts = [texts(seed, 50, 1000) for seed in range(20)]
    assert len({prompt[0] for prompt in prompts}) > 15
    assert len({tuple(prompt) for prompt in prompts}) == 20
    assert all(125 <= token < 1000 for prompt in prompts for token in prompt)
    assert texts(3, 50, 1000) == prompts[3]


LOADER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from mistral_nb.bench_peers import serve
folder = Path(sys.argv[sys.argv.index("--packed-copy") + 1]) if "--packed-copy" in sys.argv else None
class Served:
    facts = dict(what="packed" if folder and list(folder.iterdir()) else "converted")
    def copied(self):
        (folder / "copy").write_bytes(bytes(100))
        return {{}}
serve(Served)
"""


@pytest.mark.parametrize(("dropped", "places"), [(True, ("from disk", "cached")), (False, ("cached",))])
@pytest.mark.parametrize("name", ["mistral-nb int8", "llama-cpp-python"])
def test_loading_is_timed_from_every_place(
    name: str, dropped: bool, places: tuple[str, ...], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ours out of its packed copy too; the files are dropped before each pair."""
    asked: list[list[str]] = []
    monkeypatch.setattr(bench_turns, "drop", lambda files: asked.append([file.name for file in files]) or dropped)
    loader = LOADER.format(root=str(Path(bench_engine.__file__).parent.parent))
    contender = Contender(name, [sys.executable, "-c", loader], [Path("model")])
    lines: list[str] = []
    bench_turns._time_loading(contender, replace(plan, loads=2), lines.append)
    assert contender.refused == ""
    sources = ["", "packed copy, "] if contender.ours else [""]
    wanted = [f"{what}, {source}{place}" for source in sources for place in places for what in ("ready", "loaded")]
    assert list(contender.loading) == wanted
    assert all(len(seconds) == 2 for seconds in contender.loading.values())
    assert all(contender.loading[f"ready, {place}"] > contender.loading[f"loaded, {place}"] for place in places)
    assert asked == [["model"]] * 2 + ([["copy"]] * 2 if contender.ours else [])
    assert len(lines) == len(wanted)


def test_a_profiler_that_fails_takes_no_figures_away(plan: Plan) -> None:
    loader = "import sys; sys.exit('no profiler') if '--profiled' in sys.argv else None"
    contender = Contender("mistral-nb int8", [sys.executable, "-c", loader], [], times={5: [{}]})
    bench_turns._profile(contender, plan, 512)
    assert contender.refused == ""
    told = list(bench_engine._told([contender], None, None))
    assert told == ["mistral-nb int8: launches are not told: no profiler"]

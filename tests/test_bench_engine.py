"""`mistral-nb bench engine`: the command on a tiny random model, and what is made of answers.

A whole run beside a peer is in test_bench_gpu_part.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb import bench_engine, bench_report, cli
from mistral_nb.bench_child import Child
from mistral_nb.bench_engine import RANDOM, SHAPE_7B, Row, conclusions, measure, table
from mistral_nb.bench_peers import two_calls
from mistral_nb.bench_report import Measurement
from mistral_nb.bench_turns import Contender, Plan
from mistral_nb.checkpoints import ModelArgs
from mistral_nb.engine.bench_probe import Launch, kernel_times, last_step
from mistral_nb.errors import ConfigurationError, MistralError
from tests.tiny_bench import SHAPE, tiny_plan


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    return tiny_plan(tmp_path, monkeypatch)


def test_a_random_checkpoint_goes_through_the_whole_command(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_engine, "SHAPE_7B", SHAPE)
    monkeypatch.setattr(bench_engine, "measure", lambda plan, say: measure(replace(plan, profiled=True, peers=()), say))
    where = tmp_path / "out.json"
    command = ["bench", "engine", "--model", RANDOM, "--device", "cpu", "--precision", "int4", "--contexts", "5"]
    assert cli.main([*command, "--runs", "1", "--threads", "1", "--json", str(where)]) == 0
    found = json.loads(where.read_text())
    (engine,) = found["engines"]
    assert engine["name"] == "mistral-nb int4"
    assert {"peak", "launches", "gbs"} <= set(engine["ending"])
    assert found["correct"] is None
    [row] = found["measurements"]
    assert (row["engine"], row["context"], row["decode"]["runs"]) == ("mistral-nb int4", 5, 1)
    told = capsys.readouterr().out
    assert "memory is read at " in told
    assert "nobody has scored what mistral-nb int4 wrote at 5: that takes transformers" in told
    assert "of read, of spec: what a token reads, by " in told


def test_threads_are_as_many_as_a_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def stop(plan: Plan, report: object) -> None:
        plans.append(plan)
        raise MistralError("enough")

    monkeypatch.setattr(bench_engine, "measure", stop)
    monkeypatch.setattr(bench_engine, "available_cpus", lambda: 3)
    for threads in (None, 5):
        with pytest.raises(MistralError, match="enough"):
            bench_engine.run(RANDOM, device="cpu", threads=threads)
    assert [plan.threads for plan in plans] == [3, 5]


def test_with_none_of_ours_there_is_no_result(plan: Plan) -> None:
    (plan.folder / "config.json").write_text(json.dumps(SHAPE | {"hidden_act": "gelu"}))
    with pytest.raises(MistralError, match="hidden_act"):
        measure(plan, print)
    (plan.folder / "config.json").write_text(json.dumps(SHAPE | {"hidden_size": 120}))
    with pytest.raises(MistralError, match=r"mistral-nb int8 cannot be measured: .*multiple of 32"):
        measure(replace(plan, precisions=["int8"]), print)


@pytest.mark.parametrize(("free", "longest"), [(None, 32668), (79, 32668), (15, 32668), (7, 8092), (1, 32668)])
def test_the_usual_prompts_are_those_that_there_is_room_for(
    free: int | None, longest: int, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one precision at least; where nothing fits, the engine says so."""
    (plan.folder / "config.json").write_text(json.dumps(SHAPE_7B))
    monkeypatch.setattr(bench_engine, "free_memory", lambda device: free and free * 10**9)
    args = ModelArgs.from_folder(plan.folder)
    assert bench_engine._lengths((), args, ("bf16", "int8", "int4"), "cuda")[-1] == longest
    assert bench_engine._lengths((30000,), args, ("bf16",), "cuda") == [30000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gguf": Path("no-such.gguf")}, "no-such.gguf is no file; give --gguf"),
        ({"path": Path("no-such-folder/out.json")}, "cannot be written"),
        ({"pythons": ["no-such-python"], "device": "cpu", "model": RANDOM}, "no-such-python cannot be run"),
    ],
)
def test_what_cannot_be_done_is_told_first(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        bench_engine.run(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "found"), [([36, 128, 500], [36, 100]), ([300], [100]), ([5, 5], [5]), ([1], [1])])
def test_prompts_are_cut_to_what_the_context_leaves(asked: list[int], found: list[int]) -> None:
    assert bench_engine.lengths(asked, 200) == found


def test_two_calls_give_the_times_of_both_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5 s to the first token and 0.01 s for each further one."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def generate(count: int) -> list[int]:
        now[0] += 0.5 + 0.01 * (count - 1)
        return [7] * count

    found = two_calls(generate, 11)
    assert found["ids"] == [7] * 11
    assert found["first"] == pytest.approx(0.5)
    assert found["last"] == pytest.approx(0.6)


def row(engine: str, what: str, context: int, first: float, decode: float) -> Row:
    of = Measurement.of
    timed = of("first", "ms", [first], ""), of("prefill", "", [1.0], ""), of("decode", "", [decode], "")
    return Row(engine, what, context, *timed, 0.25, 0.5, None, 0.97, 0.0123)


def test_ours_is_held_against_every_peer_at_the_same_length() -> None:
    rows = [
        row("mistral-nb int4", "mistral-nb, int4", 36, 50, 120),
        row("llama", "llama, Q4_1", 36, 100, 100),
        row("llama", "llama, Q4_1", 500, 1, 1),
    ]
    assert list(conclusions(rows)) == [
        "mistral-nb, int4, at 36: decodes 1.20 times as fast as llama, Q4_1; first token in 0.50 of its time"
    ]
    lines = table(rows).split("\n")
    found = "mistral-nb, int4 36 50 (50..50) 1 25% 120 (120..120) 50% 1 97% 1.23%"
    assert lines[1].split() == found.split()
    assert len(lines[0]) == len(lines[1]) == len(lines[3])


@pytest.mark.parametrize(
    ("name", "loss", "wrong"),
    [
        ("mistral-nb int8", 0.04, 0),
        ("mistral-nb int8", 0.06, 1),
        ("mistral-nb int8", float("nan"), 1),
        ("mistral-nb int4", 0.06, 0),
        ("mistral-nb int4", 0.16, 1),
        ("vllm", 0.9, 0),
    ],
)
def test_a_text_that_the_model_would_not_write_is_no_result(name: str, loss: float, wrong: int) -> None:
    contender = Contender(name, [], [], scores={36: {"same": 0.5, "loss": loss}})
    assert len(list(bench_engine._wrong([contender]))) == wrong
    strange = list(bench_engine._strange([contender]))
    assert strange == (["vllm at 36 wrote tokens 90.0% below the best: is it the same model?"] if loss == 0.9 else [])


def test_lengths_that_nobody_scored_are_told() -> None:
    contender = Contender("mistral-nb int4", [], [], times={512: [{}], 8192: [{}], 9000: [{}]})
    contender.scores = {512: {"same": 0.9, "loss": 0.01}}
    [line] = bench_engine._unscored([contender, Contender("vllm", [], [], times={512: [{}]})])
    assert line.startswith("nobody has scored what mistral-nb int4 wrote at 8192, 9000: ")


def test_a_prompts_products_are_counted(plan: Plan) -> None:
    """Of 2 layers with 3 tokens, each of which sees itself and those before it, two at most in a window of 2."""
    args = replace(ModelArgs.from_folder(plan.folder), context=64)
    weights = 2 * 128 * (2 * 256 + 2 * 128 + 3 * 256)
    assert bench_engine._flops(args, 3) == 2 * 3 * weights + 2 * 512 * 128 + 4 * 2 * 256 * 6
    windowed = replace(args, sliding_window=2)
    assert bench_engine._flops(args, 3) - bench_engine._flops(windowed, 3) == 4 * 2 * 256 * 1


def test_others_that_take_the_cpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 s on 4 CPUs they were at work for 12, 5 of them for this process."""
    told = iter([(0.0, 100.0, 4.0), (10.0, 112.0, 9.0)])
    monkeypatch.setattr(bench_report, "_busy", lambda: next(told))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert bench_report.Quiet().taken_by_others() == pytest.approx(7 / 40)
    assert list(bench_engine._disturbed(0.04)) == list(bench_engine._disturbed(None)) == []
    assert "took 30% of the CPUs" in next(bench_engine._disturbed(0.3))


def test_this_processs_work_is_among_everybodys() -> None:
    if not Path("/proc/stat").is_file():
        pytest.skip("the system does not tell what its CPUs do")
    before, end = bench_report._busy(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = bench_report._busy()
    assert before
    assert after
    wall, everybody, own = (end - start for start, end in zip(before, after, strict=True))
    assert 0.25 < own < everybody + 0.1
    assert everybody < (wall + 0.1) * (os.cpu_count() or 1)


def test_two_greedy_texts_of_one_prompt_are_no_result() -> None:
    [line] = bench_engine._wrong([Contender("mistral-nb int8", [], [], differs=True)])
    assert line.startswith("NOT CORRECT: mistral-nb int8 gave two")


def child(code: str) -> Child:
    return Child([sys.executable, "-c", code], hold=True)


ECHO = """
import json, os, sys
sys.path.insert(0, {root!r})
from mistral_nb.bench_peers import serve
class Served:
    facts = dict(what="an echo")
    def answer(self, prompt):
        print("noise that is no answer", flush=True)
        return dict(prompt=prompt)
    def die(self):
        sys.exit("its last words")
serve(Served)
"""


def test_a_child_is_asked_in_lines_and_what_it_prints_is_none_of_them() -> None:
    with child(ECHO.format(root=str(Path(bench_engine.__file__).parent.parent))) as asked:
        assert asked.facts["what"] == "an echo"
        assert asked.facts["load_s"] >= 0
        assert asked.ask("answer", prompt=[1, 2]) == {"prompt": [1, 2]}
        with pytest.raises(MistralError, match=r"^its last words$"):
            asked.ask("die")
        with pytest.raises(MistralError, match=r"^its last words$"):
            asked.ask("answer", prompt=[])


@pytest.mark.parametrize(
    ("code", "words"), [("raise SystemExit('no such library')", "no such library"), ("pass", "it ended without a word")]
)
def test_a_child_that_does_not_load_says_why(code: str, words: str) -> None:
    with pytest.raises(MistralError, match=words):
        child(code)


BARE = """
import sys
for name in ("IPython", "anywidget", "httpx", "huggingface_hub", "ipywidgets", "platformdirs", "starlette"):
    sys.modules[name] = None
import mistral_nb.bench_engine, mistral_nb.engine.bench_probe
"""


def test_a_bare_gpu_host_can_run_it() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", BARE], check=True, env=env, timeout=60)


def test_a_steps_launches_are_those_of_an_answer_without_its_prompt() -> None:
    prefill = [Launch("gemm", 70.0), Launch("sample", 3.0)]
    steps = [Launch("gemv", 5.0), Launch("gemv", 7.0), Launch("sample", 3.0)] * 4
    assert kernel_times(prefill, [*prefill, *steps], 4) == [
        {"name": "gemv", "launches": 2.0, "us": 12.0},
        {"name": "sample", "launches": 1.0, "us": 3.0},
    ]


def test_every_launch_of_the_last_step_is_told_in_order() -> None:
    """Products are one kernel: only their order tells them apart."""
    step = [("linear_kernel", 20.0), ("rope_kernel", 6.0), ("linear_kernel", 14.0), ("sample_kernel_1", 9.0)]
    launches = [
        Launch(name, us, 1000.0 * repeat + 100.0 * at) for repeat in range(3) for at, (name, us) in enumerate(step)
    ]
    launches.append(Launch("copy", 1.0, 2350.0))
    found = last_step(launches[::-1])
    assert [(each["name"], each["us"]) for each in found] == step
    assert [each["gap"] for each in found] == [691.0, 80.0, 94.0, 86.0]
    assert last_step(launches[:4]) == []


def test_a_peers_script_needs_nothing_of_this_package(tmp_path: Path) -> None:
    script = Path(bench_engine.__file__).parent / "bench_peers.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, "--help"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "llama-cpp-python" in done.stdout

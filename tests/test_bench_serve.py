"""`mistral-nb bench serve` on a real engine with a tiny model: its loads, tables, JSON, pictures and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import bench_plots
from mistral_nb.backends import engine_process
from mistral_nb.bench_client import Outcome, Run, Target
from mistral_nb.bench_latency import Limits, summarise
from mistral_nb.bench_serve import Plan, told
from mistral_nb.bench_serve import run as measured
from mistral_nb.bench_workload import Ask, Lengths, Load, Words, Workload, shares
from mistral_nb.cli import main
from mistral_nb.errors import BackendError, ConfigurationError, EngineStartError
from mistral_nb.secret import Secret
from mistral_nb.types import Usage
from tests.checkpoints import tiny
from tests.finetunes.adapters import matrices, write_adapter
from tests.server.engines import Engines, EngineUnderTest

SHORT = Lengths.parse("6")


@pytest.fixture(scope="module")
def engine(own_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("engine")
    engines = Engines(folder)
    engines.env["MISTRAL_NB_HOME"] = str(folder / "home")
    try:
        engine = engines.start("--precision", "fp32", model=str(tiny.hugging_face(folder / "model")))
        engine.ready()
        yield engine
    finally:
        engines.end()


@pytest.fixture
def token(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", engine.record.token)


@pytest.fixture
def record(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is this user's."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(Path(engine.record.log).parent.parent / "run"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of zeros, which change nothing."""
    features = {"dim": tiny.DIM, "q": tiny.Q, "kv": tiny.KV, "hidden": tiny.HIDDEN}
    shapes = matrices(("q_proj", "v_proj"), layers=tiny.LAYERS, features=features)
    return write_adapter(tmp_path_factory.mktemp("adapter") / "zeros", {"target_modules": ["q_proj", "v_proj"]}, shapes)


def report(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_series_of_loads_is_measured_and_told(
    engine: EngineUnderTest, record: None, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "serve", "--url", engine.record.base_url, "--concurrency", "1", "3", "--requests", "12"]
    command += ["--prompt-tokens", "20..60", "--answer-tokens", "6", "--lora", f"{adapter}=0.5", "--seed", "3"]
    command += ["--slo-ttft", "60000", "--slo-itl", "60000", "--json", str(tmp_path / "out.json")]
    served = engine.health()["served"]
    assert main(command) == 0
    assert engine.health()["served"] >= served + 2 + 2 * 12
    found = report(tmp_path / "out.json")
    assert found["device"] == "CPU, fp32" or found["device"].endswith("fp32")
    assert found["plan"]["prompt_tokens"] == "20..60"
    one, three = found["measurements"]
    assert [each["load"] for each in (one, three)] == ["1 at once", "3 at once"]
    assert [each["peak"] for each in (one, three)] == [1, 3]
    for each, answers in zip((one, three), found["answers"], strict=True):
        assert each["requests"] == each["answered"] == len(answers) == 12
        assert each["errors"] == {}
        assert each["good"] == 1
        assert each["goodput"] == pytest.approx(each["requests_per_s"])
        assert each["ttft"]["p50"] <= each["ttft"]["p90"] <= each["ttft"]["p99"] <= each["ttft"]["max"]
        assert each["ttft"]["count"] > 0
        assert {each["prompt_tokens"]} == {sum(answer["prompt_tokens"] for answer in answers)}
        assert set(each["adapters"]) == {"", str(adapter)}
        assert sum(part["answered"] for part in each["adapters"].values()) == 12
    asked = [ask.prompt_tokens for ask in Workload(Lengths.parse("20..60"), SHORT, seed=3, requests=12).asks(Load(1))]
    by_due = [answer["prompt_tokens"] for answer in found["answers"][0]]
    assert by_due == asked
    printed = capsys.readouterr().out
    assert "first text (TTFT)" in printed
    assert "goodput" in printed
    assert "3 at once: 12 requests in" in printed
    assert printed.rstrip().splitlines()[-3].startswith("load ")


def test_at_a_rate_for_so_long(engine: EngineUnderTest, token: None, capsys: pytest.CaptureFixture[str]) -> None:
    workload = Workload(Lengths.parse("8"), SHORT, seconds=1.0)
    assert measured(Plan(workload, [Load(rate=20)], url=engine.record.base_url)) == 0
    text = capsys.readouterr().out
    found = json.loads(text[text.index("\n{") :])
    [load] = found["measurements"]
    assert load["requests"] == len(list(workload.asks(Load(rate=20))))
    assert load["rate"] == 20
    assert load["goodput"] is None
    assert "answers" not in found


def test_an_engine_is_started_and_ended(tmp_path: Path) -> None:
    model = tiny.hugging_face(tmp_path / "model")
    command = [sys.executable, "-m", "mistral_nb", "bench", "serve", "--model", str(model), "--requests", "3"]
    command += ["--precision", "fp32", "--device", "cpu", "--prompt-tokens", "9", "--answer-tokens", "3"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 at once: 3 requests" in done.stdout
    assert report(tmp_path / "out.json")["device"].endswith("fp32")
    assert not list(tmp_path.glob("mistral-nb-bench-*"))


def test_the_engine_that_is_started_has_a_place_for_all_that_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def refused(command: list[str], **how: Any) -> None:
        commands.append(command)
        raise OSError("no processes left")

    monkeypatch.setattr(engine_process, "Child", refused)
    for name in ("RUNTIME_DIR", "LOG_DIR"):
        monkeypatch.setenv(f"MISTRAL_NB_{name}", "set by the benchmark")
    model = str(tiny.hugging_face(tmp_path / "model"))
    for loads in ([Load(concurrency=8), Load(concurrency=160)], [Load(concurrency=8)], [Load(rate=200)]):
        with pytest.raises(EngineStartError, match="no processes left"):
            measured(Plan(Workload(SHORT, SHORT), loads, model=model))
    places = [command[command.index("--max-requests") + 1] for command in commands]
    assert places == ["160", "64", "64"]


def test_requests_that_fail_are_in_the_exit_status(
    engine: EngineUnderTest, token: None, capsys: pytest.CaptureFixture[str]
) -> None:
    url = engine.record.base_url
    for prompts, refused in (("4000", 6), ("1500..4000", None)):
        workload = Workload(Lengths.parse(prompts), Lengths.parse("2"), requests=6)
        assert measured(Plan(workload, [Load(concurrency=2)], url=url)) == 1
        told = capsys.readouterr().out
        assert f"{refused or ''} failed, HTTP 413" in told
        assert ("-" in told.split("first text (TTFT)")[1].splitlines()[0]) == (refused == 6)
    workload = Workload(SHORT, SHORT, requests=2)
    assert measured(Plan(workload, [Load(concurrency=2)], Limits(ttft=1e-6), url=url)) == 0
    assert "goodput 0.00 answers/s" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_pictures(engine: EngineUnderTest, token: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = Workload(Lengths.parse("8"), SHORT, requests=4)
    folder = tmp_path / "new" / "plots"
    measured(Plan(workload, [Load(rate=50), Load(rate=90)], Limits(1, 1), url=engine.record.base_url), None, folder)
    assert {path.name for path in folder.iterdir()} == {"latencies.png", "timeline.png", "loads.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    assert str(folder / "loads.png") in capsys.readouterr().err
    measured(Plan(workload, [Load(concurrency=2)], url=engine.record.base_url), None, tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"latencies.png", "timeline.png"}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="pictures need matplotlib")
def test_pictures_of_a_load_that_failed_throughout(tmp_path: Path) -> None:
    failed = Run(Load(rate=2), [Outcome(Ask(0, 0.5, 8, 8, None, ""), 0.5, 0.5, error="cut short", ended=1)], 1.0, 0.1)
    assert len(list(bench_plots.draw([failed] * 2, [summarise(failed, Limits())] * 2, tmp_path))) == 3


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else True)
    command = ["bench", "serve", "--url", "http://127.0.0.1:9", "--plot", str(tmp_path / "plots")]
    assert main(command) == 1
    assert 'pip install "mistral-nb[plots]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    if importlib.util.find_spec("matplotlib") is not None:
        with pytest.raises(ConfigurationError, match="--plot another"):
            bench_plots.check_plots(tmp_path / "file" / "plots")


def test_what_the_engine_refuses_ends_it_before_the_load(
    engine: EngineUnderTest, token: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name where it is an adapter, and with the engine's words."""
    served = engine.health()["served"]
    plan = Plan(Workload(SHORT, SHORT, shares(["nobody=0.1"]), requests=50), [Load(1)], url=engine.record.base_url)
    with pytest.raises(BackendError, match=r"the adapter nobody does not answer \(HTTP 404, code 3037\): .*nobody"):
        measured(plan)
    assert engine.health()["served"] <= served + 2
    monkeypatch.setenv("MISTRAL_NB_SERVER_TOKEN", "wrong")
    with pytest.raises(BackendError, match="HTTP 401"):
        measured(plan)
    monkeypatch.delenv("MISTRAL_NB_SERVER_TOKEN")
    with pytest.raises(ConfigurationError, match="MISTRAL_NB_SERVER_TOKEN"):
        measured(plan)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost"])
def test_an_engine_of_this_user_needs_no_token(engine: EngineUnderTest, record: None, host: str) -> None:
    workload = Workload(SHORT, SHORT, requests=1)
    assert measured(Plan(workload, [Load(concurrency=1)], url=f"http://{host}:{engine.record.port}/")) == 0


def test_the_token_of_this_user_is_not_for_another_port_or_host(engine: EngineUnderTest, record: None) -> None:
    for url in (
        f"https://localhost:{engine.record.port}",
        f"http://localhost:{engine.record.port}/v1",
        "http://localhost:9",
    ):
        with pytest.raises(ConfigurationError, match="needs its token"):
            measured(Plan(Workload(SHORT, SHORT), [Load(concurrency=1)], url=url))


def test_what_was_reused_of_the_prompts_is_summed(
    engine: EngineUnderTest, token: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after another, so that all but the first find the whole pages of what they have in common."""
    workload = Workload(Lengths.parse("300"), Lengths.parse("2"), shared_prefix=280, requests=3)
    assert measured(Plan(workload, [Load(concurrency=1)], url=engine.record.base_url), tmp_path / "out.json") == 0
    found = report(tmp_path / "out.json")
    first, *others = [answer["reused_tokens"] for answer in found["answers"][0]]
    assert others == [256, 256]
    assert found["measurements"][0]["reused_tokens"] == first + 512
    line = f"{first + 512} of the 900 tokens read were reused ({(first + 512) / 900:.0%})"
    assert line in capsys.readouterr().out


def test_prompts_have_exactly_their_tokens(engine: EngineUnderTest) -> None:
    target = Target(engine.record.base_url, Secret(engine.record.token))
    words = Words.measured(target.count)
    workload = Workload(Lengths.parse("40..90"), SHORT, requests=5)
    for ask in workload.asks(Load(concurrency=1)):
        assert target.count(words.text(ask, workload)) == ask.prompt_tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt-tokens", "9..3"], "'9..3' is no range"),
        (["--answer-tokens", "many"], "'many' is no length"),
        (["--prompt-tokens", "32..90", "--shared-prefix", "32"], "--shared-prefix 32 leaves prompts of 32..90 tokens"),
        (["--lora", "a=2"], "'a=2' has no share"),
        (["--url", "http://127.0.0.1:9", "--model", "embedded"], "--model is of an engine that is started"),
        (["--url", "http://example.com"], "--url"),
        (["--precision", "int4", "--precision", "int8"], "give --precision once"),
        (["--json", "/nowhere/at/all.json"], "--json"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--rate", "0"], ["--rate", "1", "--concurrency", "2"], ["--concurrency", "0"], ["--seconds", "-1"]]
)
def test_wrong_numbers_are_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_failures_and_short_answers_are_told() -> None:
    ask = Ask(0, 0.0, 8, 20, None, "")
    outcomes = [
        Outcome(ask, 0.0, 0.1, [0.5, 0.6], 0.7, Usage(8, 5)),
        Outcome(ask, 0.0, 0.1, error="HTTP 429, code 3040", message="all places are taken", ended=0.2),
        Outcome(ask, 0.0, 0.1, error="over 3 s", ended=3.2),
    ]
    text = "\n".join(told([summarise(Run(Load(rate=3), outcomes, 4.0, 0.1), Limits(ttft=100))], Limits(ttft=100)))
    assert "1 failed, HTTP 429, code 3040: all places are taken" in text
    assert "1 failed, over 3 s\n" in text
    assert "answers ended by themselves: 5 of the 20 tokens asked for" in text
    assert "goodput 0.00 answers/s, 0% of the requests (TTFT at most 100 ms)" in text
    assert "left 100 ms or more after its moment" in text

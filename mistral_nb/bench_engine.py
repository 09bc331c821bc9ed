"""`mistral-nb bench engine`: decoding, prompts and loading in the engine itself, beside other engines in the same run.

No HTTP is in it. Decoding is held against reading: the bytes that a token needs of the weights and of the keys and
values, by what the memory gives, as measured in the run and by the data sheet.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_nb.bench_report import Measurement, Quiet, check_writable, machine, write_report
from mistral_nb.bench_turns import (
    TOKENS,
    Contender,
    Plan,
    Report,
    free_memory,
    free_on_gpus,
    half,
    speed,
    take_turns,
)
from mistral_nb.checkpoints import ModelArgs
from mistral_nb.checkpoints.memory import CONTEXT, Device, Precision, select
from mistral_nb.checkpoints.memory import runs as can_run
from mistral_nb.errors import ConfigurationError, MistralError, ModelError
from mistral_nb.hardware import available_cpus, nvidia_gpus

__all__ = ["RANDOM", "SHAPE_7B", "Row", "measure", "run", "table"]

RANDOM = "random-7b"
"""The name of random weights in Mistral-7B's shape, made on the device and kept nowhere."""
SHAPE_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
LENGTHS = {"cpu": (36, 128, 500, 2048), "cuda": (36, 128, 512, 2048, 8192, 32768)}
"""Prompts' tokens, cut to what the model's context leaves."""
QUIET = 0.05
"""Share of the CPUs that others may take without a word."""
LOSS, LOSS_IN_INT4 = 0.05, 0.15
"""How far our tokens may be below the best, as a share of what lies between the best and the mean score."""

_COLUMNS = {"prompt": 7, "first token, ms": 29, "prompt/s": 9, "of peak": 8, "tokens/s": 27, "of read": 8, "of spec": 8}
_COLUMNS |= {"runs": 5, "same": 6, "loss": 7}
_LEGEND = """\
prompt/s: tokens of the prompt by the time of the first token; of peak: its products, by the data sheet's in 16 bits
of read, of spec: what a token reads, by the speed of memory as measured here, by the data sheet
same, loss: tokens that transformers would have written too, and how far below its best they are"""


@dataclass(frozen=True, slots=True)
class Row:
    """One engine, `what` in words, after prompts of one length.

    The shares are of what reading the weights and the KV would take alone, and of what the products of the prompt
    would; `same` and `loss` are the judge's.
    """

    engine: str
    what: str
    context: int
    first_token: Measurement
    prefill: Measurement
    decode: Measurement
    share_of_peak: float | None
    share_of_read: float | None
    share_of_spec: float | None
    same: float | None
    loss: float | None

    def __str__(self) -> str:
        first, decode = (
            f"{each.median:>9.4g} {f'({each.p20:.4g}..{each.p80:.4g})':<{width}}"
            for each, width in ((self.first_token, 19), (self.decode, 17))
        )
        shares = [f"{share:.0%}" if share else "" for share in (self.share_of_peak, self.share_of_read)]
        shares += [f"{self.share_of_spec:.0%}" if self.share_of_spec else ""]
        scores = ["" if self.same is None else f"{self.same:.0%}", "" if self.loss is None else f"{self.loss:.2%}"]
        return (
            f"{self.context:>7}{first}{self.prefill.median:>9.4g}{shares[0]:>8}{decode}{shares[1]:>8}{shares[2]:>8}"
            f"{self.decode.runs:>5}{scores[0]:>6}{scores[1]:>7}"
        )


def table(rows: Sequence[Row]) -> str:
    width = max(len(row.what) for row in rows)
    head = "".join(f"{name:>{columns}}" for name, columns in _COLUMNS.items())
    return "\n".join([" " * width + head, *(f"{row.what:<{width}}{row}" for row in rows), _LEGEND])


def run(
    model: str | None = None,
    runs: int = 5,
    path: Path | None = None,
    *,
    device: str = "auto",
    precisions: Sequence[Precision] = (),
    contexts: Sequence[int] = (),
    threads: int | None = None,
    gguf: Path | None = None,
    pythons: Sequence[str] = (),
) -> int:
    """Print the measurements, and the same as JSON; `path` takes the JSON instead. Returns the exit status: 1 where
    what the engine wrote is not what the model says; 0 too where nobody could judge it, which is told.

    Without a `model` it is Mistral-7B where there is a GPU, in its shape where it is not in the store, else the
    embedded one. Raises `ConfigurationError` before it measures when `path` cannot be written.
    """
    if path is not None:
        check_writable(path)
    if gguf is not None and not gguf.is_file():
        raise ConfigurationError(f"{gguf} is no file; give --gguf a GGUF file, or leave it out")
    kind: Device = "cuda" if device == "cuda" or (device == "auto" and nvidia_gpus()) else "cpu"
    with ExitStack() as stack:
        folder, random = _model(model, kind, stack)
        precisions = precisions or (("int8", "int4") if kind == "cpu" else (half(), "int8", "int4"))
        plan = Plan(
            folder=folder,
            device=kind,
            precisions=precisions,
            lengths=_lengths(contexts, ModelArgs.from_folder(folder), precisions, kind),
            threads=threads or available_cpus(),
            runs=runs,
            random=random,
            gguf=gguf,
            pythons=[sys.executable, *pythons],
            profiled=kind == "cuda",
        )
        report, rows = measure(plan, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{report['model']} on {report['on']} ({report['cpu']}, {report['cores']} cores)")
    print("\n".join([table(rows), *report["told"]]))
    write_report(report, rows, path)
    return 1 if report["correct"] is False else 0


def _model(model: str | None, device: str, stack: ExitStack) -> tuple[Path, bool]:
    """The folder of the model, and whether it holds but a config."""
    if model is None:
        model = _default(device)
    if model == RANDOM:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mistral-nb-bench-"))) / RANDOM
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SHAPE_7B), encoding="utf-8")
        return folder, True
    from mistral_nb.bench import fetch
    from mistral_nb.models import canonical, locate

    fetch(model)
    return locate(canonical(model)), False


def _default(device: str) -> str:
    from mistral_nb.models import canonical, locate

    if device == "cpu":
        return "embedded"
    try:
        locate(canonical("mistral-7b"))
    except ModelError:
        return RANDOM
    return "mistral-7b"


def _lengths(asked: Sequence[int], args: ModelArgs, precisions: Sequence[Precision], device: Device) -> list[int]:
    """Those that are asked for; else the usual ones as far as one of the precisions has room for them."""
    if asked:
        return lengths(asked, args.context)
    args = replace(args, context=min(args.context, max(LENGTHS[device]) + TOKENS))
    free = free_memory(device)
    able = [precision for precision in precisions if can_run(args, precision, device)]
    if able and free is not None:
        return lengths(LENGTHS[device], select(args, able, device, free - CONTEXT[device]).context)
    return lengths(LENGTHS[device], args.context)


def lengths(asked: Sequence[int], context: int) -> list[int]:
    """Each once, in order; those that do not fit the model's context become the longest that does."""
    return sorted({max(1, min(length, context - TOKENS)) for length in asked})


def measure(plan: Plan, report: Report) -> tuple[dict[str, Any], list[Row]]:
    """What was found, and a row for each engine and length. `MistralError` when none of ours can be measured."""
    args = ModelArgs.from_folder(plan.folder)
    free = free_on_gpus(plan.device)
    quiet = Quiet()
    contenders = take_turns(plan, report)
    others = quiet.taken_by_others()
    if not any(each.ours and each.times for each in contenders):
        raise MistralError(f"{contenders[0].name} cannot be measured: {contenders[0].refused}")
    freed = free_on_gpus(plan.device)
    kept = None if free is None or freed is None else free - freed
    device = next((each.facts["device"] for each in contenders if "device" in each.facts), plan.device)
    read = max((each.ending["gbs"] for each in contenders if "gbs" in each.ending), default=None)
    sheet: dict[str, int] = next((each.facts["sheet"] for each in contenders if "sheet" in each.facts), {})
    rows = [
        _row(each, length, args, plan.tokens, read, sheet)
        for length in plan.lengths
        for each in contenders
        if length in each.times
    ]
    wrong, unscored = list(_wrong(contenders)), list(_unscored(contenders))
    found = {
        **machine(),
        "model": plan.folder.name,
        "on": device,
        "random": plan.random,
        "threads": plan.threads,
        "tokens": plan.tokens,
        "read_gbs": read,
        "spec_gbs": sheet.get("gbs"),
        "spec_tflops": sheet.get("tflops"),
        "kept_bytes": kept,
        "taken_by_others": others,
        "engines": [_described(each) for each in contenders],
        "correct": False if wrong else None if unscored else True,
        "told": [
            *_told(contenders, read, kept),
            *conclusions(rows),
            *_disturbed(others),
            *_strange(contenders),
            *unscored,
            *wrong,
        ],
    }
    return found, rows


def _row(
    each: Contender, length: int, args: ModelArgs, tokens: int, read: float | None, sheet: Mapping[str, int]
) -> Row:
    found, score = each.times[length], each.scores.get(length, {})
    prefill = Measurement.of("prefill", "tokens/s", [length / one["first"] for one in found], "")
    decode = Measurement.of("decode", "tokens/s", [speed(one) for one in found], "")
    used = None
    if "weight_bytes" in each.facts:
        seen = min(length + tokens // 2, args.sliding_window or args.context)
        used = decode.median * (each.facts["weight_bytes"] + each.facts["kv_bytes"] * seen) / 1e9
    return Row(
        engine=each.name,
        what=each.facts.get("what", each.name),
        context=length,
        first_token=Measurement.of("first token", "ms", [one["first"] * 1e3 for one in found], ""),
        prefill=prefill,
        decode=decode,
        share_of_peak=_flops(args, length) * prefill.median / length / sheet["tflops"] / 1e12 if sheet else None,
        share_of_read=used / read if used and read else None,
        share_of_spec=used / sheet["gbs"] if used and sheet else None,
        same=score.get("same"),
        loss=score.get("loss"),
    )


def _flops(args: ModelArgs, length: int) -> int:
    """Of a prompt: two for each weight and token, of the head's for the last alone, and four for each feature of a
    query and key that it sees.
    """
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    weights = args.n_layers * args.dim * (2 * q_dim + 2 * kv_dim + 3 * args.hidden_dim)
    hidden = max(0, length - (args.sliding_window or length))
    pairs = (length * (length + 1) - hidden * (hidden + 1)) // 2
    return 2 * weights * length + 2 * args.vocab_size * args.dim + 4 * args.n_layers * q_dim * pairs


def _described(each: Contender) -> dict[str, Any]:
    found = {name: value for name, value in each.facts.items() if name != "load_s"}
    found |= {"name": each.name, "loading_s": _medians(each), "ending": each.ending}
    found["scores"] = {str(length): score for length, score in each.scores.items()}
    return {**found, **({"refused": each.refused} if each.refused else {})}


def _medians(each: Contender) -> dict[str, float]:
    return {name: Measurement.of(name, "s", values, "").median for name, values in each.loading.items()}


def _told(contenders: Sequence[Contender], read: float | None, kept: int | None) -> Iterator[str]:
    """Lines of what the table does not hold."""
    if read:
        yield f"memory is read at {read:.1f} GB/s"
    groups = [[each.name for each in contenders if each.group == number] for number in range(1, len(contenders) + 1)]
    if sum(map(bool, groups)) > 1:
        together = "; ".join(" and ".join(names) for names in groups if names)
        yield f"they do not fit into memory together: turns were taken by {together}, one group after the other"
    for each in contenders:
        parts = [f"{name} {seconds:.2f} s" for name, seconds in _medians(each).items()]
        parts += [f"{each.ending['peak'] / 1e6:.0f} MB at its peak"] if each.ending.get("peak") else []
        parts += [f"{each.ending['gpu'] / 1e9:.2f} GB of the GPU"] if "gpu" in each.ending else []
        parts += [f"{each.ending['left'] / 1e6:.0f} MB of that left once closed"] if "left" in each.ending else []
        parts += [
            f"a graph of {one['places']} captured in {one['seconds']:.2f} s and {one['megabytes']:.0f} MB"
            for one in each.ending.get("captures", [])
        ]
        parts += [f"launches are not told: {each.ending['unprofiled']}"] if "unprofiled" in each.ending else []
        parts += [f"{'given up' if each.times else 'not measured'}: {each.refused}"] if each.refused else []
        yield f"{each.facts.get('what', each.name)}: {'; '.join(parts)}"
    if kept is not None:
        yield f"{kept / 1e6:.0f} MB of the GPU are still taken once all have ended"


def _disturbed(others: float | None) -> Iterator[str]:
    if others is not None and others > QUIET:
        yield f"other processes took {others:.0%} of the CPUs meanwhile: these are no figures of a quiet machine"


def conclusions(rows: Sequence[Row]) -> Iterator[str]:
    """Each of ours against each peer after prompts of the same length."""
    peers = [row for row in rows if not row.engine.startswith("mistral-nb")]
    for ours in rows:
        if ours not in peers:
            for peer in (row for row in peers if row.context == ours.context):
                decode = ours.decode.median / peer.decode.median
                first = ours.first_token.median / peer.first_token.median
                yield (
                    f"{ours.what}, at {ours.context}: decodes {decode:.2f} times as fast as {peer.what}; "
                    f"first token in {first:.2f} of its time"
                )


def _unscored(contenders: Sequence[Contender]) -> Iterator[str]:
    """What is not known to be right."""
    for each in contenders:
        missing = [length for length in each.times if length not in each.scores]
        if each.ours and missing:
            yield (
                f"nobody has scored what {each.name} wrote at {', '.join(map(str, missing))}: "
                "that takes transformers, with the same weights"
            )


def _strange(contenders: Sequence[Contender]) -> Iterator[str]:
    """Peers that seem to have another model."""
    for each in contenders:
        for length, score in each.scores.items():
            if not each.ours and not score["loss"] <= LOSS_IN_INT4:
                yield f"{each.name} at {length} wrote tokens {score['loss']:.1%} below the best: is it the same model?"


def _wrong(contenders: Sequence[Contender]) -> Iterator[str]:
    """Where ours wrote what the model would not have written."""
    for each in (one for one in contenders if one.ours):
        if each.differs:
            yield f"NOT CORRECT: {each.name} gave two greedy answers to one prompt: its speed is no result"
        bar = LOSS_IN_INT4 if each.name.endswith("int4") else LOSS
        for length, score in each.scores.items():
            if not score["loss"] <= bar:
                yield (
                    f"NOT CORRECT: {each.name} at {length} wrote tokens {score['loss']:.1%} below the best, "
                    f"{bar:.0%} are allowed: its speed is no result"
                )

"""What may stand on the lines of `%mistral_bench` and `%%mistral_kernel`: their manuals, and what Tab offers.

The child process reads its options itself. Here are their names, which a test holds equal to its own.
"""

from __future__ import annotations

import keyword
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

__all__ = [
    "ALIASES",
    "ARCHITECTURES",
    "BENCH_MANUAL",
    "BENCH_OPTIONS",
    "DEVICES",
    "DTYPES",
    "KERNEL_MANUAL",
    "KERNEL_OPTIONS",
    "OPS",
    "PROVIDERS",
    "SUBJECTS",
    "Asked",
    "bench_candidates",
    "read_line",
]

SUBJECTS = ("attention", "decode_attention", "rope", "linear", "lora", "norm", "swiglu", "sample")
OPS = (
    "rope_write",
    "prefill_attention",
    "decode_attention",
    "rope_decode_attention",
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "linear",
    "lora_shrink",
    "lora_expand",
    "sample",
)
ALIASES: Mapping[str, str] = {"attention": "prefill_attention", "rope": "rope_write", "norm": "add_rms_norm"}
"""Shorter words for ops."""
DTYPES = ("bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PROVIDERS = (
    "ours",
    "eager",
    "compile",
    "sdpa-flash",
    "sdpa-cudnn",
    "sdpa-efficient",
    "sdpa-math",
    "flash-attn",
    "flashinfer",
    "liger",
    "cublas",
    "blas",
    "torch-int8",
    "torch-int4",
    "torch",
)
"""Each in one word."""
PATIENCE = 60.0
"""Seconds that one case of a candidate may take."""

_SHAPES = {
    "--dtype": ("TYPE ...", f"the types: {', '.join(DTYPES)}"),
    "--seq": ("N ...", "lengths: tokens of a prompt, or of a context when decoding"),
    "--batch": ("N ...", "how many sequences decode at once"),
    "--device": ("DEVICE", f"where: {', '.join(DEVICES)}"),
}
_RESULTS = {
    "--save": ("FILE", "write the results as JSON"),
    "--plot": ("FOLDER", "write the figures as PNG, too"),
    "--compare": ("FILE", "say what became slower since these results were saved, beyond the noise"),
    "--tolerance": ("PERCENT", "no change below this counts; 3 by default"),
    "--note": ("TEXT", "keep a remark with the results"),
    "--beside-engine": ("", "measure although an engine holds the GPU; the results say so"),
    "--out": ("NAME", "put the rows into this variable; short: -o"),
}
BENCH_OPTIONS: Mapping[str, tuple[str, str]] = {
    **_SHAPES,
    "--providers": ("NAME ...", "measure these alone, such as ours eager sdpa-flash: --list names them"),
    "--open": ("FILE", "measure nothing: show saved results, as they were measured"),
    "--list": ("", "say what can be measured, by whom"),
    **_RESULTS,
}
"""The options of `%mistral_bench`: their value and what they do."""

KERNEL_OPTIONS: Mapping[str, tuple[str, str]] = {
    **_SHAPES,
    "--compile": ("sm_90 ...", "compile for these architectures, on any machine, and show what the code uses"),
    "--check-only": ("", "do not time it"),
    "--timeout": ("SECONDS", f"end it where one case takes longer; {PATIENCE:.0f} by default"),
    **_RESULTS,
}
"""The options of `%%mistral_kernel`: their value and what they do."""


def _told(options: Mapping[str, tuple[str, str]]) -> str:
    return "\n".join(f"    {f'{name} {value}':<24} {what}" for name, (value, what) in options.items())


BENCH_MANUAL = f"""Measure the kernels, and what torch and others have for the same, on this machine.

    %mistral_bench attention linear
    %mistral_bench decode_attention --seq 512 2048 --batch 1 8 --dtype bf16 --save today.json
    rows = %mistral_bench norm --compare yesterday.json

What can be measured, all of it where none is named: {", ".join(SUBJECTS)}.

{_told(BENCH_OPTIONS)}

Each provider has to give the right result before it is timed. Times are medians of many runs; the table has what 20 and
80 of 100 runs took, too, and what the machine itself can read, copy and multiply at most is measured beside them.

The value is a pandas.DataFrame where pandas is installed, else a list of dicts; a row for each case and provider. An
interrupt keeps what was measured, in the table and in -o NAME, and stops Run All.

It runs in a process of its own, `python -m mistral_nb_kernels.bench`, and wants the GPU for itself: where an engine
holds it, `%mistral stop` comes first. In a terminal: `mistral-nb bench kernels`, with the same options."""

KERNEL_MANUAL = f"""Check a kernel of your own against the op it is to replace, then time it beside ours and torch's.

    %%mistral_kernel swiglu
    import torch
    import torch.nn.functional as F

    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

The op stands first: {", ".join(OPS)}. In short:
{", ".join(f"{word} for {op}" for word, op in ALIASES.items())}. The cell defines a
function of the op's name and with its arguments, or just one function; `@triton.jit` kernels that it launches stand
beside it. mistral_nb_kernels.reference has each op in plain torch.

{_told(KERNEL_OPTIONS)}

It is checked on hard inputs: odd sizes, strided views between NaN, shuffled pages, empty sequences, windows, ties. What
is wrong is shown at its first wrong element and is not timed. After the timing it is checked again on other numbers, in
the same buffers too, so that nothing that remembers a result passes.

Without a GPU, a Triton kernel is checked under Triton's interpreter in fp16 and fp32, and not timed. --compile works on
any machine: registers, spills, shared memory and the mix of instructions, with PTX and SASS one click below, and in
`NAME.code[kernel, architecture, "sass"]`.

The cell runs in a process of its own: the notebook's variables are not visible there, it imports what it uses, and what
it prints is shown. A crash, or a loop that does not end, ends that process and leaves the notebook's kernel alone."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A line as it was read: what goes to the child, and what stays here. `patience` is in seconds."""

    arguments: tuple[str, ...]
    out: str | None
    patience: float | None
    help: bool


def read_line(line: str, magic: str) -> Asked:
    """Read the line of `magic`, "mistral_bench" or "mistral_kernel". Raises `UsageError`.

    Nothing is said here of the options that the child reads.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line.strip()}: {str(error).lower()}") from None
    parser = MagicArgumentParser(prog=f"%{magic}", add_help=False)  # type: ignore[no-untyped-call]
    parser.allow_abbrev = False
    parser.add_argument("-o", "--out")
    parser.add_argument("-h", "--help", action="store_true")
    if magic == "mistral_kernel":
        parser.add_argument("--timeout", type=_seconds, default=PATIENCE)
    given, rest = parser.parse_known_args(words)
    if given.out is not None and (not given.out.isidentifier() or keyword.iskeyword(given.out)):
        raise UsageError(f"--out {given.out}: not a name that a variable can have")
    if magic == "mistral_kernel" and not given.help and (not rest or rest[0].startswith("-")):
        raise UsageError(
            f"which op? It stands first, such as %%mistral_kernel swiglu; there are {', '.join((*OPS, *ALIASES))}"
        )
    return Asked(tuple(rest), given.out, getattr(given, "timeout", None), given.help)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"--timeout {text}: must be a number of seconds above 0")
    return seconds


_BENCH = re.compile(r"(?:^|.*=)\s*%mistral_bench\s")
_KERNEL = re.compile(r"\s*%%mistral_kernel\s")
_VALUES: Mapping[str, Iterable[str]] = {
    "--dtype": DTYPES,
    "--device": DEVICES,
    "--providers": PROVIDERS,
    "--compile": ARCHITECTURES,
}


def bench_candidates(before: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """What could stand at the end of `before`, the line up to the cursor: the word begun, and the whole words.

    `names` are the notebook's variables, for `-o`.
    """
    magic = _BENCH.match(before) or _KERNEL.match(before)
    if magic is None:
        return "", []
    *former, word = before[magic.end() :].split(" ")
    try:
        given = shlex.split(" ".join(former))
    except ValueError:  # in quotes
        return "", []
    kernel = _KERNEL.match(before) is not None
    return word, [name for name in _fitting(word, given, kernel, names) if name.startswith(word)]


def _fitting(word: str, former: list[str], kernel: bool, names: Iterable[str]) -> Iterable[str]:
    if word.startswith("-"):
        return KERNEL_OPTIONS if kernel else BENCH_OPTIONS
    option = next((each for each in reversed(former) if each.startswith("-")), "")
    if option in _VALUES:
        begun = word[: word.rfind(",") + 1]
        given = {part.strip().replace(" ", "-") for each in (*former, begun) for part in each.split(",")}
        return [begun + value for value in _VALUES[option] if value not in given]
    if option in ("-o", "--out"):
        return sorted(name for name in names if not name.startswith("_")) if former[-1] == option else ()
    if option:
        return ()
    if kernel:
        return () if former else (*OPS, *ALIASES)
    return [subject for subject in SUBJECTS if subject not in former]

"""The lines of %mistral_bench and %%mistral_kernel: what is read here, the manuals, and what Tab offers."""

from __future__ import annotations

from typing import Any

import pytest
from IPython.core import completer
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from mistral_nb_magics.bench import options
from mistral_nb_magics.bench.options import bench_candidates, read_line

NAMES = {"rows": 1, "other": 2, "_hidden": 3}


def test_what_stays_here_is_taken_out_and_the_rest_goes_on_as_it_stands() -> None:
    asked = read_line(
        "linear norm --dtype fp16 fp32 -o rows --providers ours 'sdpa flash' --open a.json", "mistral_bench"
    )
    assert asked.arguments == (
        *("linear", "norm", "--dtype", "fp16", "fp32", "--providers", "ours", "sdpa flash", "--open", "a.json"),
    )
    assert (asked.out, asked.patience, asked.help) == ("rows", None, False)
    asked = read_line("swiglu --compile sm_90 --timeout=2.5 --out=x", "mistral_kernel")
    assert asked.arguments == ("swiglu", "--compile", "sm_90")
    assert (asked.out, asked.patience) == ("x", 2.5)
    assert read_line("swiglu", "mistral_kernel").patience == options.PATIENCE
    assert read_line("--help", "mistral_kernel").help
    assert read_line("", "mistral_bench").arguments == ()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("%mistral_bench norm 'half", "no closing quotation"),
        ("%mistral_bench norm -o", "-o/--out"),
        ("%mistral_bench norm -o 2x", "2x: not a name"),
        ("%mistral_bench norm -o lambda", "lambda: not a name"),
        ("%%mistral_kernel\nx = 1", "which op?"),
        ("%%mistral_kernel --check-only\nx = 1", "which op?"),
        ("%%mistral_kernel swiglu --timeout soon\nx = 1", "--timeout soon"),
        ("%%mistral_kernel swiglu --timeout -1\nx = 1", "--timeout -1"),
        ("%%mistral_kernel swiglu --timeout nan\nx = 1", "--timeout nan"),
    ],
)
def test_bad_usage_is_exactly_a_usage_error(run: Any, capsys: Any, code: str, told: str) -> None:
    done = run(code)
    assert type(done.error_in_exec) is UsageError
    shown = capsys.readouterr()
    assert told in shown.err
    assert "Traceback" not in shown.out + shown.err


def test_the_names_here_are_the_names_there() -> None:
    from mistral_nb_kernels.bench import arguments, registry
    from mistral_nb_kernels.bench.candidate import ALIASES

    providers = {provider.name for subject in registry.SUBJECTS.values() for provider in subject.providers}
    assert tuple(registry.SUBJECTS) == options.SUBJECTS
    assert sorted(options.OPS) == sorted(registry.OPS)
    assert sorted(options.PROVIDERS) == sorted(name.replace(" ", "-") for name in providers)
    assert options.ALIASES == ALIASES
    assert tuple(arguments.DTYPES) == options.DTYPES
    assert options.DEVICES == arguments.DEVICES
    own = {"--out", "--beside-engine"}
    for told, parser, mine in (
        (options.BENCH_OPTIONS, arguments.bench_parser(), own),
        (options.KERNEL_OPTIONS, arguments.candidate_parser(), own | {"--timeout"}),
    ):
        names = {action.option_strings[0] for action in parser._actions if action.option_strings}
        assert set(told) - mine == names - {"-h", "--events"}


def test_the_names_of_architectures_are_those_that_kernels_are_compiled_for() -> None:
    from mistral_nb_kernels.configs import ARCHITECTURES

    assert tuple(f"sm_{number}" for number in ARCHITECTURES) == options.ARCHITECTURES


def test_the_manuals(run: Any, shell: InteractiveShell, capsys: Any) -> None:
    for kind, name, told in (
        ("line", "mistral_bench", options.BENCH_OPTIONS),
        ("cell", "mistral_kernel", options.KERNEL_OPTIONS),
    ):
        manual = shell.magics_manager.magics[kind][name].__doc__
        assert f"%{name} " in manual
        assert all(f"    {option} " in manual for option in told)
        sign = "%" if kind == "line" else "%%"
        assert run(f"{sign}{name}?").success
        assert run(f"{sign}{name} --help" + ("\n..." if kind == "cell" else "")).success
        assert manual in capsys.readouterr().out
    assert all(name in options.BENCH_MANUAL for name in options.SUBJECTS)
    assert all(name in options.KERNEL_MANUAL for name in options.OPS)
    assert all(f"{word} for {op}" in options.KERNEL_MANUAL for word, op in options.ALIASES.items())


def test_a_provider_is_named_in_one_word_in_two_or_in_a_list() -> None:
    """As Tab offers it, as the results name it, and in what a shell or the magic makes of quotes."""
    from mistral_nb_kernels.bench.arguments import Usage, parse

    for words in (
        "sdpa-flash torch-int8",
        "'sdpa flash' 'torch int8'",
        "'sdpa flash,torch int8'",
        "sdpa-flash,torch-int8",
    ):
        line = read_line(f"attention linear --providers {words}", "mistral_bench")
        assert parse(line.arguments).asked.providers == ("sdpa flash", "torch int8")
    assert all(parse(["--providers", name]).asked.providers for name in options.PROVIDERS)
    with pytest.raises(Usage, match=r"'sdpa-flsh' is no provider; did you mean sdpa-flash\?"):
        parse(["--providers", "sdpa-flsh"])
    with pytest.raises(Usage, match=r"'sdpa' is no provider; did you mean sdpa-flash or sdpa-cudnn or .*sdpa-math\?"):
        parse(["--providers", "sdpa", "flash"])
    with pytest.raises(Usage, match="there are: ours, eager, compile, sdpa-flash, "):
        parse(["attention", "--providers", "blas"])


@pytest.mark.parametrize(
    ("before", "word", "wanted"),
    [
        ("%mistral_bench n", "n", ["norm"]),
        ("%mistral_bench norm s", "s", ["swiglu", "sample"]),
        ("%mistral_bench norm n", "n", []),
        ("rows = %mistral_bench dec", "dec", ["decode_attention"]),
        ("%mistral_bench norm --pr", "--pr", ["--providers"]),
        ("%mistral_bench norm --dtype fp16 ", "", ["bf16", "fp32"]),
        ("%mistral_bench norm --device c", "c", ["cpu", "cuda"]),
        ("%mistral_bench norm --providers o", "o", ["ours"]),
        (
            "%mistral_bench --providers ours sdpa-",
            "sdpa-",
            [f"sdpa-{x}" for x in ("flash", "cudnn", "efficient", "math")],
        ),
        ("%mistral_bench --providers 'sdpa flash' sdpa-f", "sdpa-f", []),
        ("%mistral_bench --providers ours,torch-int8,torch-", "ours,torch-int8,torch-", ["ours,torch-int8,torch-int4"]),
        ("%mistral_bench --providers 'sdpa fl", "", []),
        ("%mistral_bench norm --save ", "", []),
        ("%mistral_bench norm -o ", "", ["other", "rows"]),
        ("%mistral_bench norm -o x ", "", []),
        ("%%mistral_kernel rms", "rms", ["rms_norm"]),
        ("%%mistral_kernel ro", "ro", ["rope_write", "rope_decode_attention", "rope"]),
        ("%%mistral_kernel at", "at", ["attention"]),
        ("%%mistral_kernel rms_norm ", "", []),
        ("%%mistral_kernel rms_norm --compile sm_9", "sm_9", ["sm_90"]),
        ("%%mistral_kernel rms_norm --ch", "--ch", ["--check-only"]),
        ("%mistral_bench", "", []),
        ("%mistral_benchx n", "", []),
        ("Of %mistral_bench n", "", []),
    ],
)
def test_candidates(before: str, word: str, wanted: list[str]) -> None:
    assert bench_candidates(before, NAMES) == (word, wanted)


@pytest.mark.skipif(not hasattr(completer, "context_matcher"), reason="this IPython has no matchers")
def test_the_shell_completes(shell: InteractiveShell) -> None:
    for code, wanted in (
        ("%mistral_bench swi", "swiglu"),
        ("%mistral_bench --providers sdpa-f", "sdpa-flash"),
        ("%%mistral_kernel lora_sh", "lora_shrink"),
    ):
        with completer.provisionalcompleter():
            found = [each.text for each in shell.Completer.completions(code, len(code))]
        assert found == [wanted]


def test_unloading_takes_the_magics_away(shell: InteractiveShell) -> None:
    manager = shell.magics_manager
    shell.run_line_magic("unload_ext", "mistral_nb")
    assert not {"mistral_bench", "mistral_kernel"} & {*manager.magics["line"], *manager.magics["cell"]}
    assert "KernelBench" not in manager.registry
    assert "KernelBench" not in {type(each).__name__ for each in shell.configurables}
    shell.run_line_magic("load_ext", "mistral_nb")
    assert "mistral_kernel" in manager.magics["cell"]

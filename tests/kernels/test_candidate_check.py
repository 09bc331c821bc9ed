"""Candidates on the hard cases: right ones in torch and in Triton, and ones that are wrong in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.candidate import OPS, Failure, Hard, check, hard_cases, load, named
from mistral_nb_kernels.bench.candidate.check import check_timed
from mistral_nb_kernels.bench.candidate.failure import apart
from mistral_nb_kernels.bench.case import Case, tensors
from tests.kernels.candidates import TORCH, TRITON

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def first_failure(text: str, word: str, dtype: torch.dtype = FP32, *, seed: int = 0) -> Failure | None:
    op, function = named(word), load(text, word).function
    return next(filter(None, (check(function, hard) for hard in hard_cases(op, dtype, "cpu", seed))), None)


def failed(text: str, op: str, dtype: torch.dtype = FP32) -> Failure:
    failure = first_failure(text, op, dtype)
    assert failure is not None
    return failure


def broken(op: str, right: str, wrong: str, texts: dict[str, str] = TORCH) -> str:
    """A source with one place changed."""
    assert texts[op].count(right) >= 1, right
    return texts[op].replace(right, wrong)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("op", OPS)
def test_what_is_right_in_another_order_passes(op: str, dtype: torch.dtype) -> None:
    failure = first_failure(TORCH[op], op, dtype, seed=dtype.itemsize)
    assert failure is None, str(failure)


@pytest.mark.parametrize("op", OPS)
def test_cases_are_the_same_for_a_seed_and_have_names_of_their_own(op: str) -> None:
    first, again, other = (list(hard_cases(op, FP16, "cpu", seed)) for seed in (0, 0, 1))
    assert len({hard.label for hard in first}) == len(first) >= 4
    for one, same, another in zip(first, again, other, strict=True):
        pairs = list(zip(*(tensors((x.case.inputs, x.case.keywords)) for x in (one, same, another)), strict=True))
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y, _ in pairs)
        if "-10000" not in one.label:
            assert not all(torch.equal(x.nan_to_num(), z.nan_to_num()) for x, _, z in pairs)


def test_drawing_cases_leaves_the_random_numbers() -> None:
    before = torch.get_rng_state()
    list(hard_cases("swiglu", FP16, "cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("op", [op for op in OPS if op != "sample"])
def test_the_truth_is_in_fp64(op: str) -> None:
    for hard in hard_cases(op, FP16, "cpu"):
        case = hard.doubled()
        out = case.reference(*case.inputs, **case.keywords)
        assert all(x.dtype == torch.float64 for x in tensors(out))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("op", ["rms_norm", "swiglu"])
def test_kernels_that_are_right_pass(op: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    failure = first_failure(TRITON[op], op, dtype)
    assert failure is None, str(failure)


def test_a_kernel_of_attention_that_is_right_passes() -> None:
    pytest.importorskip("triton")
    function = load(TRITON["prefill_attention"], "attention").function
    for hard in list(hard_cases("prefill_attention", FP16, "cpu"))[:3:2]:
        assert check(function, hard) is None


@pytest.mark.parametrize("texts", [TORCH, TRITON])
def test_a_mask_that_is_off_by_one_is_told_with_the_first_wrong_row(texts: dict[str, str]) -> None:
    if texts is TRITON:
        pytest.importorskip("triton")
    right, wrong = ("keys <= at", "keys < at") if texts is TORCH else ("<= position[:", "< position[:")
    failure = failed(broken("prefill_attention", right, wrong, texts), "attention", FP16)
    assert failure.tensor == "result"
    assert failure.index == (0, 0, 0)
    assert "result[0, 0, 0] (sequence 0, position 0 of 1 tokens) is nan, not " in failure.words
    assert "NaN is in the memory around inputs" in failure.hint
    assert str(failure).startswith("prefill_attention, 49 rows of 4 sequences, heads 1/1 of 64, pages of 64, fp16\n")


@pytest.mark.parametrize(
    ("op", "right", "wrong", "tensor", "index"),
    [
        ("rms_norm", "+ eps", "+ 2 * eps", "result", (0, 0)),
        ("rms_norm", ".mean(-1, keepdim=True)", ".sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)", "result", (0, 0)),
        (
            "decode_attention",
            "k[:, -window:], v[:, -window:]",
            "k[:, -window - 1:], v[:, -window - 1:]",
            "result",
            None,
        ),
        (
            "decode_attention",
            "for s, t in enumerate(lengths.tolist())",
            "for s, t in enumerate(lengths.tolist()[:-1])",
            "result",
            (8, 0, 0),
        ),
        ("rope_decode_attention", "kv.of(s, t)", "kv.of(s, t - 1 or 1)", "result", None),
        ("rope_decode_attention", ", kv.v[page, :, offset] = k[s], v[s]", " = k[s]", "result", (0, 0, 0)),
        ("rope_write", "kv.v[page, :, offset] = v[i]", "pass", "kv.v", None),  # a write that is forgotten
        ("rope_write", "a * c - b * s", "a * c + b * s", "result", None),
        ("lora_expand", "if s >= 0:", "if True:", "result", None),  # of rows without an adapter
        ("lora_shrink", "* scale[i]", "* scale[0]", "result", (2, 0)),
        ("linear", "y + residual.float()", "y", "result", None),
        ("swiglu", "torch.exp(-g)", "torch.exp(g)", "result", (0, 0)),
        ("add_rms_norm", "), s\n", "), s + 1\n", "result[1]", (0, 0)),
    ],
)
def test_where_a_candidate_is_wrong(
    op: str, right: str, wrong: str, tensor: str, index: tuple[int, ...] | None
) -> None:
    failure = failed(broken(op, right, wrong), op)
    assert failure.tensor == tensor, str(failure)
    if index is not None:
        assert failure.index == index, str(failure)
    assert failure.index is not None
    place = f"{tensor}[{', '.join(map(str, failure.index))}]"
    assert failure.words.startswith(place), failure.words
    assert 1 <= failure.off <= failure.of
    wrong_ones = [near for near in failure.around if near.wrong]
    assert wrong_ones[0].index == failure.index
    assert (wrong_ones[0].expected, wrong_ones[0].got) in [
        (failure.expected, failure.got),
        (pytest.approx(failure.expected), pytest.approx(failure.got, nan_ok=True)),
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        (
            "mask=at < dim, other=0.0).to(tl.float32)\n        total",
            "mask=at <= dim, other=0.0).to(tl.float32)\n",
            "result[0, 0] is ",
        ),
        ("inverse * scale, mask=at < dim", "inverse * scale, mask=at <= dim", "writes outside of a tensor of shape"),
        ("mask=at < dim)", "mask=at < dim - 1)", "result[0, 0] is nan, not "),
        ("row * stride", "row * dim", "result[1, "),  # strided rows
        ("range(0, dim, BLOCK)", "range(0, dim - 1, BLOCK)", "result[0, 0] is nan"),
    ],
)
def test_a_kernel_that_is_off_by_one(right: str, wrong: str, words: str) -> None:
    pytest.importorskip("triton")
    wrong += "        total" if right.endswith("total") else ""
    failure = failed(broken("rms_norm", right, wrong, TRITON), "rms_norm", FP16)
    assert words in failure.words


def test_the_first_wrong_number_is_shown_among_its_neighbours() -> None:
    text = TORCH["swiglu"].replace("return ", "y = ").replace("(gate_up.dtype)", "(gate_up.dtype)\n    y[1:, 62:] *= 2")
    failure = failed(text + "    return y\n", "swiglu")
    assert failure.index == (1, 62)
    assert (failure.off, failure.of) == (2, 3 * 63)
    assert "2 of 189 numbers are wrong, all within [1..2, 62]" in failure.words
    assert [near.index for near in failure.around] == [(1, column) for column in (59, 60, 61, 62)]
    assert [near.wrong for near in failure.around] == [False] * 3 + [True]
    lines = str(failure).splitlines()
    assert lines[0] == "swiglu, 3 rows of 2 x 63, rows strided between NaN, fp32"
    assert lines[2].split() == ["index", "expected", "got"]
    assert lines[6].startswith("> [1, 62]  ")
    assert lines[6].endswith("  wrong")
    markdown = failure.markdown()
    assert markdown.startswith("**swiglu, 3 rows of 2 x 63, rows strided between NaN, fp32**\n\nresult\\[1, 62\\] is ")
    assert "\n\n```text\n  index " in markdown


def fixed(*rows: tuple[float, ...]) -> Case:
    """A case whose result is these rows."""
    x = torch.tensor(rows)
    return Case("swiglu", (x,), lambda x: x.clone(), 0, x.nbytes)


def spoiled(case: Case, wrong: dict[tuple[int, int], float]) -> Failure | None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        for at, value in wrong.items():
            out[at] = value
        return out

    return check_timed(spoil, case, "a case")


def test_the_worst_number_is_told_beside_the_first() -> None:
    case = fixed((1.0, 2.0, 4.0), (1.0, 2.0, 2.0))
    both = spoiled(case, {(0, 1): 2.5, (1, 0): 3.0})
    assert both is not None
    assert both.worst is not None
    assert (both.index, both.worst.index, both.worst.expected, both.worst.got) == ((0, 1), (1, 0), 1.0, 3.0)
    assert both.worst.error == 1.0
    assert both.words.startswith("result[0, 1] is 2.5, not 2: off by 0.12 of its row's largest, of which 0.0")
    assert both.words.endswith(
        "2 of 6 numbers are wrong, all within [0..1, 0..1]; the worst: result[1, 0] is 3, not 1, off by 1."
    )
    for wrong in ({(1, 0): 3.0}, {(0, 0): 3.0, (0, 1): 4.0}, {(0, 1): torch.nan, (1, 0): 9.0}):
        alone = spoiled(case, wrong)
        assert alone is not None
        assert alone.worst is None
        assert "worst" not in alone.words
    nothing = spoiled(case, {(0, 1): 3.0, (1, 1): torch.nan})
    assert nothing is not None
    assert nothing.words.endswith("; the worst: result[1, 1] is nan, not 2.")


def test_figures_that_are_told_apart_are_not_the_same() -> None:
    assert apart(1.5, 2.0) == ("1.5", "2")
    assert apart(1.00000012, 1.0) == ("1.0000001", "1")
    assert apart(0.1 + 0.2, 0.3) == ("0.30000000000000004", "0.29999999999999999")
    assert apart(0.00521, 0.00522, 2) == ("0.00521", "0.00522")
    assert apart(0.0, -0.0) == ("0", "-0")
    assert apart(2**62, 2**62 + 1) == (str(2**62), str(2**62 + 1))
    assert apart(torch.nan, torch.nan) == ("nan", "nan of other bits")
    off = failed(broken("rms_norm", "return (", "return 1.00001 * ("), "rms_norm")
    mine, right = off.words.split("result[0, 0] is ")[1].split(": off by")[0].split(", not ")
    assert mine != right
    assert float(mine) == pytest.approx(float(right), rel=1e-4)
    assert f"{right}  {mine}  wrong" in " ".join(str(off).splitlines()[-1].split(" ")[2:]).replace("   ", "  ")


def test_a_number_is_held_where_its_row_is_large_too() -> None:
    """At a timed size by what the bench's gate allows: within its row's largest it would be 0 for 2."""
    row = tuple([100.0] + [1.0] * 4095)
    assert spoiled(fixed(row), {(0, 4095): 0.0}) is not None
    assert spoiled(fixed(row), {(0, 4095): 1.02}) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("return x.float()", "The type of the result is fp32, not fp16."),
        ("return x[:1]", "The shape of the result is [1, 1], not [3, 1]."),
        ("pass", "The result is None, not a tensor."),
        ("return (x,)", "The result is of the type tuple, not a tensor."),
    ],
)
def test_a_result_of_another_kind(text: str, words: str) -> None:
    failure = failed(f"def rms_norm(x, weight, eps):\n    {text}", "rms_norm", FP16)
    assert failure.words == words
    assert failure.tensor == "result"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("return [x, x]", "The result is of the type list, not a tuple of 2 tensors."),
        ("return x, x, x", "The result is a tuple of 3, not of 2 tensors."),
        ("return x, x.double()", "The type of the result[1] is fp64, not fp16."),
        ("return x, None", "The result[1] is None, not a tensor."),
    ],
)
def test_a_tuple_of_another_kind(text: str, words: str) -> None:
    failure = failed(f"def add_rms_norm(x, residual, weight, eps):\n    {text}", "norm", FP16)
    assert failure.words == words


@pytest.mark.parametrize(
    ("op", "right", "wrong", "words"),
    [
        ("rms_norm", "y = x.float()", "y = x.float().clone(); x.zero_()", "It changes its input x: x[0, 0] was "),
        ("add_rms_norm", "s = x + residual", "s = residual.add_(x)", "It changes its input residual: "),
        (
            "linear",
            "return ",
            "weight.weight.mul_(2)\n    return ",
            "It changes its input weight.weight: weight.weight[0, 0] ",
        ),
        ("decode_attention", "return out", "lengths.sub_(1)\n    return out", "It changes its input lengths: "),
        (
            "rope_write",
            "kv.v[page, :, offset] = v[i]",
            "kv.v[page, :, offset] = v[i]; kv.v[0] = 1",
            "It changes rows that are not its own in kv.v: kv.v[0, ",
        ),
        ("lora_expand", "return y", "return y.clone() + y.zero_()", "It changes rows that are not its own in y: y[1, "),
        (
            "sample",
            "(logits, parameters, penalties)\n",
            "(logits, parameters, penalties); penalties.counts.add_(1)\n",
            "rows that are not its own in penalties.counts: ",
        ),
    ],
)
def test_inputs_that_it_changes(op: str, right: str, wrong: str, words: str) -> None:
    failure = failed(broken(op, right, wrong), op)
    assert words in failure.words, str(failure)


def test_memory_beside_an_input_that_it_changes() -> None:
    beside = "x.as_strided((1,), (1,), x.storage_offset() + x.shape[1]).zero_()"
    text = broken("rms_norm", "return ", f"if x.stride(0) > x.shape[1]:\n        {beside}\n    return ")
    failure = failed(text, "rms_norm")
    assert failure.words == "It writes beside its input x, in memory that is not part of it."
    assert failure.where == "rms_norm, 3 rows of 63, rows strided between NaN, fp32"


@pytest.mark.parametrize("new", ["torch.empty(x.shape, dtype=x.dtype)", "torch.empty_like(x)", "x.new_empty(x.shape)"])
def test_a_write_that_is_forgotten_is_nan_whoever_made_the_tensor(new: str) -> None:
    text = f"import torch\nfrom torch import empty\ndef rms_norm(x, weight, eps):\n    return {new}"
    failure = failed(text, "rms_norm", FP16)
    assert failure.index == (0, 0)
    assert "is nan, not " in failure.words


def test_a_result_that_is_made_as_zeros_has_margins_too() -> None:
    text = "import torch\ndef rms_norm(x, weight, eps):\n    out = torch.zeros_like(x)\n"
    text += "    out += {}\n    {}\n    return out"
    right = "torch.nn.functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)"
    assert first_failure(text.format(right, "pass"), "rms_norm") is None
    failure = failed(
        text.format(right, "out.as_strided((1,), (1,), out.storage_offset() + out.numel())[0] = 1"), "rms_norm"
    )
    assert failure.words == "It writes outside of a tensor of shape [3, 1] that it makes: 1 after its last element."


def test_an_error_is_told_with_the_candidate_s_own_lines() -> None:
    failure = failed("import torch\ndef rms_norm(x, weight, eps):\n    return torch.softmax(x, 7)", "rms_norm")
    assert failure.words.startswith("It ends with IndexError: ")
    assert failure.trace == "  line 3, in rms_norm\n    return torch.softmax(x, 7)"
    assert failure.trace in str(failure)
    assert failure.trace in failure.markdown()
    failure = failed("def rms_norm(x, weight, eps):\n    return tile * x", "rms_norm")
    assert failure.words.endswith("notebook's variables are not visible there")
    assert failed("import sys\ndef rms_norm(x, weight, eps):\n    sys.exit(1)", "rms_norm").words.endswith(
        "SystemExit: 1"
    )


@pytest.mark.parametrize(("right", "wrong"), [("tl.rsqrt(", "nowhere("), ("tl.rsqrt(", "tl.no_such_function(")])
def test_an_error_in_a_kernel_is_told_with_its_line(right: str, wrong: str) -> None:
    pytest.importorskip("triton")
    failure = failed(broken("rms_norm", right, wrong, TRITON), "rms_norm")
    assert "nowhere" in failure.words or "no_such_function" in failure.words
    assert f"in _norm\n    inverse = {wrong}" in failure.trace
    assert ("notebook's variables" in failure.words) == (wrong == "nowhere(")
    assert "InterpreterError" not in str(failure)


def test_a_case_that_is_not_taken_is_handed_on() -> None:
    function = load("def rms_norm(x, weight, eps):\n    raise NotImplementedError('no')", "rms_norm").function
    with pytest.raises(NotImplementedError, match="no"):
        check(function, next(hard_cases("rms_norm", FP16, "cpu")))


def test_a_token_that_is_another_is_told() -> None:
    text = broken("sample", "return tokens", "tokens[1] += 1\n    return tokens")
    failure = failed(text, "sample")
    assert (failure.index, failure.off, failure.allowed) == ((1,), 1, 0.0)
    assert failure.got == (failure.expected or 0) + 1
    assert "off by" not in failure.words


def test_rows_that_are_undefined_do_not_count() -> None:
    """Of padding; but nothing of it may be written."""
    *_, hard = hard_cases("rope_write", FP32, "cpu")
    assert len(hard.undefined) == 3

    def spoil(*given: Any) -> torch.Tensor:
        out = reference.rope_write(*given)
        out[-3:] = 7
        return out

    assert check(spoil, hard) is None
    assert check(spoil, dataclasses.replace(hard, undefined=())) is not None


def test_a_hard_case_says_what_its_rows_are() -> None:
    for op in ("prefill_attention", "decode_attention", "rope_decode_attention", "rope_write", "lora_expand"):
        for hard in hard_cases(op, FP16, "cpu"):
            assert isinstance(hard, Hard)
            out = reference.__dict__[op](*hard.case.inputs, **hard.case.keywords)
            assert len(hard.rows) == len(out)


def test_a_result_that_is_no_plain_tensor() -> None:
    """It may do its work when somebody looks."""
    text = "import torch\nclass Lazy(torch.Tensor):\n    pass\n"
    text += "def rms_norm(x, weight, eps):\n    return x.as_subclass(Lazy)"
    assert failed(text, "rms_norm").words == "The result is of the type Lazy, not a plain tensor."


def test_int8_is_held_by_its_weights_alone() -> None:
    """The reference on the CPU rounds activations, too."""
    text = broken("linear", "dequantize(weight, torch.float32)", "dequantize(weight, torch.float32) * 1.0001")
    failures = [check(load(text, "linear").function, hard) for hard in hard_cases("linear", FP32, "cpu")]
    labels = [hard.label for hard in hard_cases("linear", FP32, "cpu")]
    assert all(failure is not None for failure, label in zip(failures, labels, strict=True) if "int8" in label)

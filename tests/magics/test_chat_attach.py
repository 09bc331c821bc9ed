"""What is put into a question by name: values of any size and kind, cells, the last error."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.error import UsageError

from mistral_nb_magics.chat.attach import MAX_ATTACHMENT, attach, candidates


def text_of(value: Any) -> str:
    return attach("variable", "value", {"value": value}).text


class Loud:
    def __repr__(self) -> str:
        raise RuntimeError("no picture of me")


class Quick:
    """A class of the tests."""


@pytest.fixture
def last_error() -> Iterator[None]:
    """As a cell leaves it."""
    try:
        raise ZeroDivisionError("by\x1b[31m zero")
    except ZeroDivisionError as error:
        sys.last_value = error
    yield
    del sys.last_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (3.5, "3.5"),
        ({"a": [1, 2]}, "{'a': [1, 2]}"),
        (None, "None"),
        (b"raw", "b'raw'"),
    ],
)
def test_a_value_is_written_as_it_is_printed(value: object, text: str) -> None:
    assert text_of(value) == text


def test_a_class_or_function_is_its_source() -> None:
    assert text_of(Quick).startswith("class Quick:")
    assert text_of(text_of).startswith("def text_of")
    assert text_of(len) == "<function len(obj, /)>"


@pytest.mark.parametrize(
    ("value", "most"),
    [
        ("x" * 50_000_000, 5_000_000),
        (b"x" * 50_000_000, 5_000_000),
        ([[number] * 1000 for number in range(2000)], 5_000_000),
        (dict.fromkeys(range(200_000), "x" * 1000), 5_000_000),
        (["x" * 20_000_000], 50_000_000),
    ],
    ids=["text", "bytes", "nested", "dict", "long item"],
)
def test_a_huge_value_is_cut_before_it_is_put_into_words(value: object, most: int) -> None:
    tracemalloc.start()
    text = text_of(value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < most
    assert MAX_ATTACHMENT <= len(text) < MAX_ATTACHMENT + 100
    assert text.endswith("(cut: the first 16000 characters)")


def test_of_a_long_list_the_first_thousand_are_there() -> None:
    assert text_of(list(range(5_000_000))).endswith(" 998,\n 999,\n ...]")


def test_a_value_that_holds_itself_ends() -> None:
    value: list[Any] = [1]
    value.append(value)
    assert text_of(value) == "[1, [...]]"


def test_a_value_whose_own_code_fails_is_named() -> None:
    with pytest.raises(UsageError, match=r"value: reading it raised RuntimeError: no picture of me"):
        text_of(Loud())


def test_a_table_is_csv_of_its_first_rows_and_columns() -> None:
    pandas = pytest.importorskip("pandas")
    assert text_of(pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})) == ",a,b\n0,1,x\n1,2,y\n"
    long = text_of(pandas.DataFrame({f"c{number}": range(1000) for number in range(300)}))
    assert len(long.splitlines()) == 42
    assert long.splitlines()[0].endswith(",c99")
    assert long.endswith("(1000 rows and 300 columns in all)")
    assert text_of(pandas.Series([1.5, 2.5], name="s")) == ",s\n0,1.5\n1,2.5\n"


def test_a_cell_by_its_number() -> None:
    namespace = {"In": ["", "x = 1", "y = 2"]}
    for name in ("2", "In[2]", "In [2]", "[2]"):
        assert attach("cell", name, namespace).text == "y = 2"
    with pytest.raises(UsageError, match=r"no cell In\[3\]"):
        attach("cell", "3", namespace)


def test_the_last_error_keeps_its_end(last_error: None) -> None:
    attached = attach("error", "", {})
    assert attached.name == "last error"
    assert attached.text.endswith("ZeroDivisionError: by[31m zero\n")


def test_without_an_error_there_is_none() -> None:
    with pytest.raises(UsageError, match="no cell of this session has failed"):
        attach("error", "", {})


def test_what_can_be_attached_is_listed(last_error: None) -> None:
    namespace = {"In": ["", "x = 1\ny = 2", " "], "_x": 1, "sys": sys, "table": [1, 2], "exit": exit, "a": Loud()}
    found = [(each.kind, each.name, each.detail) for each in candidates("", namespace)]
    assert found == [
        ("error", "last error", "ZeroDivisionError"),
        ("variable", "a", "Loud"),
        ("variable", "table", "list of 2"),
        ("cell", "In[1]", "x = 1"),
    ]
    assert len(candidates("v", {f"v{number}": 1 for number in range(1000)})) == 50

"""How a magic ends: a value that was shown is hidden for its cell, and whoever shows such values goes on to."""

from __future__ import annotations

from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from mistral_nb_magics.outcome import shown_once


class Value:
    def __repr__(self) -> str:
        return "a whole value"


@pytest.fixture(params=[False, True])
def own_printer(request: pytest.FixtureRequest, shell: InteractiveShell) -> Any:
    """The text of a printer that somebody registered before, or nothing."""
    printers = shell.display_formatter.mimebundle_formatter
    if request.param:
        printers.for_type(Value, lambda value: ({"text/plain": "by another's printer"}, {}))
    yield "by another's printer" if request.param else "a whole value"
    printers.pop(Value, None)


def test_it_is_named_in_its_cell_and_shown_in_the_next(
    run: Any, shell: InteractiveShell, own_printer: str, capsys: Any
) -> None:
    shell.user_ns.update(once=lambda: shown_once(shell, Value(), "<shown above>"), Value=Value)
    for code in ("once()", "display(Value()); once(); x = once(); once()"):
        assert run(code).success
        printed = capsys.readouterr().out
        assert "<shown above>" in printed
        assert (own_printer in printed) is ("display" in code)
        run("_")
        assert capsys.readouterr().out.strip().endswith(f": {own_printer}")
    former = shell.display_formatter.mimebundle_formatter.type_printers.get(Value)
    assert (former is None) is (own_printer == "a whole value")

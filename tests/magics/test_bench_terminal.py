"""%mistral_bench in terminal IPython: a bar on stderr, the table as text at the end, and rows as the value."""

from __future__ import annotations

import os
from pathlib import Path

from tests.magics.test_terminal import PROMPT, pexpect, terminal  # noqa: F401  a fixture


def test_a_bar_an_interrupt_and_the_table_twice(terminal: pexpect.spawn, tmp_path: Path) -> None:  # noqa: F811
    file = os.fspath(tmp_path / "half.json")
    terminal.sendline(f"%mistral_bench norm linear --device cpu --dtype fp32 --providers eager -o half --save {file}")
    terminal.expect(r"\r\x1b\[KKernels  +\d+%  [█░]+  [2-9] of \d+")
    terminal.sendintr()
    terminal.expect(r"provider[^\n]*\r\n")
    terminal.expect(r"■ stopped here: \d+ of \d+ steps in")
    terminal.expect("KeyboardInterrupt: stopped")
    terminal.expect(PROMPT)
    terminal.sendline(f"%mistral_bench --open {file}")
    terminal.expect(r"provider[^\n]*\r\n")
    terminal.expect(r"Kernels: done in \d+ s\r\n")
    terminal.expect(r"<\d+ rows, shown above>")
    terminal.expect(PROMPT)
    terminal.sendline("print(len(_) == len(half) > 0)")
    terminal.expect("True")

"""What a model writes is shown in a real JupyterLab and does nothing there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.test_cell import execute, output, wait_done

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

SHOW = """
from IPython.display import Markdown, display
from mistral_nb.safe_markdown import safe_markdown

display(Markdown(safe_markdown(r'''{}''')))
"""
HOSTILE = r"""<script>window.hit = 'script'</script> <img src=x onerror="window.hit = 'image'">
\(x^2\) \(\href{javascript:1}{formula}\) &#36;\href{javascript:1}{entity}&#36; \\(\href{javascript:1}{slashes}\\)
[click](javascript:window.hit='link') ![drawn](http://127.0.0.1:9/pixel)

- a list with code
  ```html
  $ <img src=x onerror="window.hit = 'list code'"> $
  ```

`$:"onmouseover=1` http://127.0.0.1:9/`$ <img src=x onerror="window.hit = 'span'">`

```html
<script>window.hit = 'fence'</script></script><img src=x onerror="window.hit = 'open fence'">"""
FORMULAS = r"""Prices: $5 here and $10 there. Inline \(a < b\) and

\[
\sum_{i=1}^n i
= \frac{n(n+1)}{2}
\]

```sh
echo $HOME \(not math\)
```"""


def test_hostile_text_is_shown_and_does_nothing(lab: Lab, page: Page) -> None:
    raw = HOSTILE.replace("window.hit", "window.raw")
    control = f"from IPython.display import Markdown\nMarkdown(r'''{raw}''')"
    cell, unsafe = lab.open(page, "hostile.ipynb", [SHOW.format(HOSTILE), control])
    page.evaluate("window.hit = window.raw = 'nothing'")
    execute(page, cell)
    wait_done(cell, 1)
    output(cell).locator("mjx-container").wait_for()
    shown = output(cell).inner_text()
    execute(page, unsafe)
    page.wait_for_function("window.raw !== 'nothing'")
    assert page.evaluate("window.hit") == "nothing"
    for text in ("<script>", "onerror", "javascript:window", "</script>", "list code", "open fence"):
        assert text in shown
    assert output(cell).locator("img, script, a[href^=javascript]").count() == 0
    assert output(unsafe).locator("a[href^=javascript]").count() > 0


def test_formulas_are_typeset_and_prices_are_not(lab: Lab, page: Page) -> None:
    load, cell = lab.open(page, "formulas.ipynb", ["import mistral_nb", SHOW.format(FORMULAS)])
    execute(page, load)
    wait_done(load, 1)
    execute(page, cell)
    wait_done(cell, 2)
    output(cell).locator("mjx-container").nth(1).wait_for()
    assert output(cell).locator("mjx-container").count() == 2
    shown = output(cell).inner_text()
    assert "$5 here and $10 there" in shown
    assert r"echo $HOME \(not math\)" in shown

"""The slider of an adapter's scale, as an anywidget: the ranges of ipywidgets have no name for a screen reader."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

__all__ = ["ScaleSlider"]

STATIC = Path(__file__).parent / "static"
USUAL = 2.0
"""Where it ends, unless a choice has more."""


class ScaleSlider(anywidget.AnyWidget):
    """A range from 0 to `max`, in steps of 0.05; `value` comes when it is let go."""

    _esm = (STATIC / "slider.js").read_text("utf-8")
    _css = (STATIC / "slider.css").read_text("utf-8")
    value = traitlets.Float(1.0).tag(sync=True)
    max = traitlets.Float(USUAL).tag(sync=True)
    disabled = traitlets.Bool(True).tag(sync=True)
    help = traitlets.Unicode().tag(sync=True)

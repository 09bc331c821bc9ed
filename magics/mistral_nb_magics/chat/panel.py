"""The settings of a chat as ipywidgets: who answers, how, and whom to compare with."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import ipywidgets as widgets  # type: ignore[import-untyped]

from mistral_nb.chat import CHAT_FIELDS, Choice
from mistral_nb.config import BACKENDS
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import Field
from mistral_nb_magics.chat.choosing import ADAPTER, followed
from mistral_nb_magics.chat.slider import USUAL, ScaleSlider

__all__ = ["Panel"]

LAYOUT = {"width": "auto", "min_width": "18em", "flex": "1 1 18em"}
STYLE = {"description_width": "10em"}
WIDE = {"width": "auto", "min_width": "14em", "flex": "2 1 24em"}
"""For names, such as those of models, which are longer than numbers; their labels are shorter."""
WIDE_STYLE = {"description_width": "5em"}
WHO = ("backend", "model", "lora")
_HOW = tuple(field for field in CHAT_FIELDS if field.name not in (*WHO, *ADAPTER))
_LABELS = {"lora": "adapter", "stop": "stop at"}
_HELP = {
    "backend": "Who answers, or the https:// address of a mistral-nb serve. Empty leaves it to the settings.",
    "model": "A name of the backend's. Empty is its own choice.",
    "lora": "Name or id of a LoRA adapter; locally also its folder's path.",
    "lora_scale": "Weight of the adapter, on the local engine: 1 as it was trained, 0 the model without it.",
    "stop": "Stop before this text; \\n is a newline. Several are separated by |.",
}


class Panel:
    """One text field for each setting, empty where it is left to the backend, and a slider for an adapter's scale; the
    next question is asked with them.

    `changed` is called with the choice, and with the one to compare with or None, after each change that is valid; what
    is not says so below, and the choice stays as it was. `lock` is held meanwhile; it must let its thread in again.
    """

    def __init__(
        self,
        choice: Choice,
        compare: Choice | None,
        changed: Callable[[Choice, Choice | None], None],
        lock: AbstractContextManager[Any],
    ) -> None:
        self._changed = changed
        self._choice, self._compare = choice, compare
        self._quiet = False
        self._lock = lock
        self._who = {**{name: _who_field(name) for name in WHO}, "lora_scale": _slider()}
        self._numbers = {each.name: _field(each) for each in _HOW}
        self._other = {**{name: _who_field(name) for name in WHO}, "lora_scale": _slider()}
        self._comparing = widgets.Checkbox(
            value=compare is not None, description="Ask these too, side by side", indent=False, layout={"width": "100%"}
        )
        self._said = widgets.HTML()
        for each in (*self._who.values(), *self._numbers.values(), *self._other.values(), self._comparing):
            each.observe(self._take, names="value")
        self.widget = widgets.VBox(
            [
                _group("Who answers", self._who.values()),
                _group("How", self._numbers.values()),
                _group("Compare with", [self._comparing, *self._other.values()]),
                self._said,
            ],
            layout={"padding": "4px 8px", "display": "none"},
        )
        self.show(choice, compare)

    @property
    def is_open(self) -> bool:
        return bool(self.widget.layout.display != "none")

    def open(self, is_open: bool) -> None:
        self.widget.layout.display = "flex" if is_open else "none"

    def offer(self, models: list[str], adapters: list[str]) -> None:
        """Names to pick from."""
        for fields in (self._who, self._other):
            fields["model"].options = models
            fields["lora"].options = adapters

    def show(self, choice: Choice, compare: Choice | None) -> None:
        """Put these into the fields; nobody is told."""
        with self._lock:
            self._quiet = True
            try:
                self._fill(choice, compare)
            finally:
                self._quiet = False

    def _fill(self, choice: Choice, compare: Choice | None) -> None:
        self._choice, self._compare = choice, compare
        for fields, shown in ((self._who, choice), (self._other, compare or Choice())):
            fields["backend"].value = shown.backend or ""
            fields["model"].value = shown.model or ""
            fields["lora"].value = shown.fields.get("lora") or ""
            slider, scale = fields["lora_scale"], shown.fields.get("lora_scale")
            slider.max = max(USUAL, scale or 0.0)
            slider.value = 1.0 if scale is None else scale
        self._free_sliders()
        for name, box in self._numbers.items():
            box.value = _shown(choice.fields.get(name))
        self._comparing.value = compare is not None
        self._said.value = ""

    def _take(self, _change: object) -> None:
        with self._lock:
            if self._quiet:
                return
            try:
                choice, compare = self._read()
            except InvalidRequest as error:
                self._said.value = f'<span role="alert">{html.escape(str(error))}</span>'
                return
            self._said.value = ""
            self._free_sliders()
            self._choice, self._compare = choice, compare
            self._changed(choice, compare)

    def _free_sliders(self) -> None:
        """A scale can be moved where there is an adapter."""
        for fields in (self._who, self._other):
            fields["lora_scale"].disabled = not fields["lora"].value.strip()

    def _read(self) -> tuple[Choice, Choice | None]:
        """What the fields say; the system text, which has no field here, stays."""
        numbers = {each.name: _value(each, self._numbers[each.name].value) for each in _HOW}
        choice = _made(self._who, self._choice.system, numbers)
        if not self._comparing.value:
            return choice, None
        other = followed(self._compare or self._choice, self._choice, choice)
        return choice, _made(self._other, other.system, other.fields)


def _made(who: Mapping[str, Any], system: str | None, numbers: Mapping[str, Any]) -> Choice:
    lora, scale = who["lora"].value.strip() or None, round(who["lora_scale"].value, 6)
    fields = {**numbers, "lora": lora, "lora_scale": None if lora is None or scale == 1 else scale}
    return Choice(who["backend"].value.strip(), who["model"].value.strip(), system, fields)


def _group(title: str, fields: Any) -> Any:
    heading = widgets.HTML(f"<b>{title}</b>")
    return widgets.VBox([heading, widgets.HBox(list(fields), layout={"flex_flow": "row wrap"})])


def _who_field(name: str) -> Any:
    options = list(BACKENDS) if name == "backend" else []
    return widgets.Combobox(
        options=options,
        ensure_option=False,
        description=_LABELS.get(name, name),
        placeholder="as set" if name != "lora" else "none",
        continuous_update=False,
        layout=WIDE if name == "model" else {**WIDE, "flex": "1 1 14em"},
        style=WIDE_STYLE,
        **_tooltip(_HELP[name]),
    )


def _slider() -> Any:
    return ScaleSlider(help=_HELP["lora_scale"], layout={**WIDE, "flex": "0 1 24em"})


def _field(field: Field) -> Any:
    default = "" if field.default is None else f"{field.default:g}, " if field.kind == "float" else f"{field.default}, "
    bounds = f"{default}{field.bounds}" if field.bounds and field.kind != "text" else "none"
    return widgets.Text(
        description=_LABELS.get(field.name, field.name.replace("_", " ")),
        placeholder=bounds,
        continuous_update=False,
        layout=LAYOUT,
        style=STYLE,
        **_tooltip(_HELP.get(field.name, field.help)),
    )


def _tooltip(text: str) -> dict[str, str]:
    """ipywidgets 7 has another name for it."""
    return {"tooltip" if "tooltip" in widgets.Text.class_trait_names() else "description_tooltip": text}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "|".join(text.replace("\n", "\\n") for text in value)
    return str(value)


def _value(field: Field, text: str) -> Any:
    """What was typed, in the field's own type; what is no number is left for the request to refuse."""
    text = text.strip() if field.kind != "texts" else text
    if not text:
        return None
    if field.kind == "texts":
        return [part.replace("\\n", "\n") for part in text.split("|") if part]
    if field.kind in ("int", "float"):
        try:
            return int(text) if field.kind == "int" else float(text)
        except ValueError:
            return text
    return text

"""A checkpoint's own Jinja chat template, rendered so that user text cannot pose as a control token.

The method: before the template is compiled, each control token in its texts (`<|im_end|>` and so on), and in
`bos_token` and the like, is replaced by a private mark that holds a random number. Messages go in as they are, so a
template may strip, slice, search or compare them as it likes; what it searches them for (`'</think>' in content`,
`content.split('</think>')`) bears no mark. In what comes out, a mark is a control token that the template wrote;
everything else is text, `<|im_end|>` in a message included.

Some templates put a control token together from pieces (`'<|' + message['role'] + '|>'`), where no mark can be. These
show when the same roles are rendered with harmless contents, and are then control tokens in the conversation as well,
provided that it holds them as often; otherwise a message has brought one along and the request is refused.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from jinja2 import TemplateError, nodes
from jinja2.visitor import NodeTransformer

from mistral_nb.engine.functions import NOTHING, Offer, in_words
from mistral_nb.engine.mistral_format import Control, Part, refuse_turn
from mistral_nb.engine.template_sandbox import ChatSandbox, Refused
from mistral_nb.errors import InvalidRequest, ModelError
from mistral_nb.types import Message

__all__ = ["JinjaTemplate", "any_of", "split_at"]

MAX_SOURCE = 262_144
_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_ADVICE = "send a raw prompt or use another checkpoint"


class JinjaTemplate:
    """A chat template and the control tokens of its tokenizer.

    `specials` are the variables that a template may use for tokens, such as `bos_token`. A template that cannot be
    compiled, or is longer than `MAX_SOURCE` characters, is `ModelError`.
    """

    call_token: Control | None = None

    def __init__(self, source: str, *, controls: Collection[str], specials: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE:
            raise ModelError(f"the checkpoint's chat template is longer than {MAX_SOURCE} characters; {_ADVICE}")
        self._controls = sorted(controls, key=len, reverse=True)
        self._control = any_of(self._controls)
        nonce = secrets.randbelow(10**24)
        self._marks = {token: f"\ue000{nonce:024}{index}\ue001" for index, token in enumerate(self._controls)}
        self._mark = re.compile(f"\ue000{nonce:024}(\\d+)\ue001")
        self._specials = {name: self._marks.get(token, token) for name, token in specials.items()}
        self._sandbox = ChatSandbox()
        try:
            marking = _Marking(lambda text: self._control.sub(lambda match: self._marks[match[0]], text))
            self._template = self._sandbox.from_string(marking.visit(self._sandbox.parse(source)))
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise ModelError(f"the checkpoint's chat template does not compile: {error}; {_ADVICE}") from error

    def parts(self, messages: Sequence[Message], offer: Offer = NOTHING) -> list[Part]:
        """The prompt up to where the assistant's answer begins; no two texts are neighbours.

        Functions and their results are told in words, whatever the template could say of them: so one form of calls
        is right for every checkpoint.

        `InvalidRequest` names the turn that the template refuses; `ModelError` says how the template failed.
        """
        if not messages:
            raise InvalidRequest("messages", [], "must hold at least one turn")
        messages = in_words(messages, offer)
        text = self._render(messages)
        built = self._built_from_pieces(messages, text)
        parts: list[Part] = []
        for index, piece in enumerate(self._mark.split(text)):
            if index % 2:
                parts.append(Control(self._controls[int(piece)]))
            else:
                parts.extend(split_at(self._control, piece, built))
        return parts

    def render(self, parts: Sequence[Part]) -> str:
        """The parts as one text, as transformers' `apply_chat_template(tokenize=False)` gives it."""
        return "".join(part.token if isinstance(part, Control) else part for part in parts)

    def _built_from_pieces(self, messages: Sequence[Message], text: str) -> set[str]:
        """The control tokens in `text` that bear no mark and yet are the template's own."""
        found = Counter(self._control.findall(text))
        if not found:
            return set()
        harmless = self._render([replace(message, content="x", name=message.name and "x") for message in messages])
        own = Counter(self._control.findall(harmless))
        for token in own:
            if found[token] != own[token]:
                raise InvalidRequest(
                    "messages", token, "this model's chat template cannot keep that text apart from its own; change it"
                )
        return set(own)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self._attempt(messages)
        except Refused as error:
            raise self._refusal(messages, error) from error
        except _FAILURES as error:
            raise ModelError(f"the checkpoint's chat template failed: {error}; {_ADVICE}") from error

    def _attempt(self, messages: Sequence[Message]) -> str:
        conversation = [message.to_dict() for message in messages]
        values = {**self._specials, "messages": conversation, "add_generation_prompt": True, "tools": None}
        return self._sandbox.render(self._template, values)

    def _refusal(self, messages: Sequence[Message], error: Refused) -> InvalidRequest:
        """Names the turn with which the conversation was first refused in these words."""
        problem = f"this model's chat template refuses it: {error}"
        for index in range(len(messages) - 1):
            try:
                self._attempt(messages[: index + 1])
            except Refused as earlier:
                if str(earlier) == str(error):
                    return refuse_turn(messages, index, problem)
            except _FAILURES:
                continue
        return refuse_turn(messages, len(messages) - 1, problem)


class _Marking(NodeTransformer):
    """Replaces a template's texts by `mark(text)`, except for what it searches other texts for."""

    def __init__(self, mark: Callable[[str], str]) -> None:
        self._mark = mark

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._mark(node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        return node if searches else self.generic_visit(node)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        if not isinstance(node.node, nodes.Getattr):
            return self.generic_visit(node)
        node.node = self.visit(node.node)
        return node


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest where several begin at one place; nothing where there are none."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def split_at(tokens: re.Pattern[str], text: str, wanted: Collection[str]) -> list[Part]:
    """`text` with those matches of `tokens` that are `wanted` taken out as control tokens; no part is empty."""
    parts: list[Part] = []
    start = 0
    for match in tokens.finditer(text):
        if match[0] in wanted:
            parts += [text[start : match.start()], Control(match[0])]
            start = match.end()
    return [part for part in [*parts, text[start:]] if part]

"""What an answer may look like where functions are offered, token by token.

The answer is free text, or a JSON list of calls whose arguments follow the functions' schemas:

    [{"name": "add", "arguments": {"a": 1, "b": 2}}, ...]

Text that has come as far as `[{"name":` is a list of calls, and goes on as one; white space may stand where JSON
allows it, 16 characters at most. A model with a token of its own for calls writes it before the list. The work is
llguidance's: an automaton for text, an Earley parser for the schemas, a bit for each token of the vocabulary.

What schemas leave open, a second automaton narrows to what `parse_calls` reads: numbers that a double holds (308
digits; 200 before an exponent, which has two), and no escapes of characters that can stand as they are, by which a
property could be named again apart from its own schema. Only a key said twice where a schema leaves keys free, and
a value nested too deeply where it leaves values free, are left to `parse_calls` to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mistral_nb.engine.detokenizer import SPACE
from mistral_nb.engine.functions import Offer
from mistral_nb.engine.vocabulary import UNKNOWN_SHOWN, Vocabulary
from mistral_nb.errors import EngineError, InvalidRequest, MissingDependency, ModelError
from mistral_nb.functions import Tool

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Constraint", "Grammars"]

MAX_CALLS = 8
"""Calls in one answer."""

_GAP = r"[ \t\r\n]{0,16}"
_ANY_GAP = r"[ \t\r\n]*"
_TEXT = rf"""TEXT: /(.|\n)*/ & ~/{_ANY_GAP}\[{_ANY_GAP}\{{{_ANY_GAP}"name"{_ANY_GAP}:(.|\n)*/"""
_GRAMMAR = rf"""
start: START
calls: HEAD call MORE "]"
{_TEXT}
HEAD: /{_GAP}\[{_GAP}\{{{_GAP}"name"{_GAP}:{_GAP}/
ARGUMENTS: /{_GAP},{_GAP}"arguments"{_GAP}:{_GAP}/
CLOSE: /{_GAP}\}}{_GAP}/
NEXT: /,{_GAP}\{{{_GAP}"name"{_GAP}:{_GAP}/
call: CALL
"""
_READABLE = rf"""
start: START
calls: CALLS
{_TEXT}
CALLS: (MARK | VALUE MARK)*
MARK: /[ \t\r\n\[\]{{}},:]/
VALUE: STRING | NUMBER | /true|false|null/
STRING: /"([^"\\]|\\["\\bfnrt]|\\u00([01][0-9a-f]|7f))*"/
NUMBER: /-?[0-9]{{1,308}}(\.[0-9]{{1,308}})?/ | /-?[0-9]{{1,200}}(\.[0-9]{{1,308}})?[eE][+-]?[0-9]{{1,2}}/
"""
_SENTINEL = "\u263a"


class Constraint:
    """Follows one answer, which every one of `matchers` allows. Used from one thread at a time."""

    def __init__(self, matchers: Sequence[LLMatcher], vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._matchers = matchers
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [vocab] on the CPU.

        `EngineError` when that takes too much work to tell, and when none may.
        """
        packed = np.bitwise_and.reduce([np.frombuffer(one.compute_bitmask(), np.uint8) for one in self._matchers])
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(bool)
        for matcher in self._matchers:
            if matcher.is_error():
                raise EngineError(f"{_summary(matcher.get_error())}; give the functions simpler schemas")
        if not bits.any():
            raise EngineError("no token fits the schemas; give the functions some without numbers of over 300 digits")
        bits[self._eos_ids] = bits[self._eos_ids[0]]
        return torch.from_numpy(bits)

    def take(self, token: int) -> None:
        """The answer goes on with `token`, which was allowed."""
        if token not in self._eos_ids:
            for matcher in self._matchers:
                matcher.consume_token(token)


class Grammars:
    """Makes constraints for one vocabulary.

    `vocab_size` is the number of logits; `call_token` the token that stands before calls, None where there is none.
    Raises `MissingDependency` without llguidance, and `ModelError` where no token ends an answer.
    """

    def __init__(
        self, vocabulary: Vocabulary, eos_ids: frozenset[int], vocab_size: int, call_token: int | None
    ) -> None:
        if not eos_ids:
            raise ModelError(
                "the checkpoint names no token that ends an answer, so calls cannot end; send no functions"
            )
        self.vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._call_token = call_token
        self._tokenizer = _tokenizer(vocabulary, self._eos_ids, vocab_size)

    def constraint(self, offer: Offer) -> Constraint:
        """For one answer. `InvalidRequest` names the function whose schema no grammar can be made of."""
        from llguidance import LLMatcher

        start = _start(offer, self._call_token)
        grammars = (_grammar(offer, start), _READABLE.replace("START", start))
        matchers = [LLMatcher(self._tokenizer, grammar, log_level=0) for grammar in grammars]
        if matchers[0].is_error():
            raise _refusal(offer, matchers[0].get_error())
        return Constraint(matchers, self.vocab_size, self._eos_ids)


class _Tokens:
    """A vocabulary as llguidance wants to see it: each token's bytes, special ones apart from text."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_ids: Sequence[int], vocab_size: int) -> None:
        self._vocabulary = vocabulary
        shown = [b"" if token in eos_ids else _bytes_of(vocabulary, token) for token in range(vocab_size)]
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = [token for token in range(vocab_size) if not shown[token]]
        self.tokens = [text or f"<token_{token}>".encode() for token, text in enumerate(shown)]

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text in the middle of an answer, so without the space that SentencePiece puts before a part."""
        if not self._vocabulary.per_part:
            return self._vocabulary.encode([text.decode()])
        before = len(self._vocabulary.encode([_SENTINEL]))
        return self._vocabulary.encode([_SENTINEL + text.decode()])[before:]


def _tokenizer(vocabulary: Vocabulary, eos_ids: Sequence[int], vocab_size: int) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as error:
        command = 'pip install "mistral-nb[local]"'
        raise MissingDependency(f"functions need the package llguidance; run: {command}") from error
    return LLTokenizer(TokenizerWrapper(_Tokens(vocabulary, eos_ids, vocab_size)), n_vocab=vocab_size)


def _bytes_of(vocabulary: Vocabulary, token: int) -> bytes:
    """The bytes that `token` adds to an answer; none for a special token and for an unknown one."""
    piece = vocabulary.piece(token)
    if isinstance(piece, bytes):
        return piece
    return b"" if piece == UNKNOWN_SHOWN else piece.replace(SPACE, " ").encode()


def _start(offer: Offer, call_token: int | None) -> str:
    """What an answer is made of, in llguidance's dialect of Lark."""
    calls = "calls" if call_token is None else f"<[{call_token}]> calls"
    if offer.choice == "auto":
        return f"TEXT | {calls}" if call_token is None else f"TEXT | calls | {calls}"
    return calls


def _grammar(offer: Offer, start: str) -> str:
    named = offer.choice not in ("auto", "required")
    tools = [tool for tool in offer.tools if not named or tool.name == offer.choice]
    call = "\n    | ".join(f"{_literal(tool.name)} ARGUMENTS %json {_schema(tool)} CLOSE" for tool in tools)
    rules = _GRAMMAR.replace("MORE", "" if offer.single else f"(NEXT call){{0,{MAX_CALLS - 1}}}")
    return rules.replace("START", start).replace("CALL", call)


def _literal(name: str) -> str:
    """A JSON string, as a string of the grammar."""
    return json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)


def _schema(tool: Tool) -> str:
    options = {"x-guidance": {"whitespace_pattern": _GAP}}
    return json.dumps({**tool.parameters, **options})


def _refusal(offer: Offer, problem: str) -> InvalidRequest:
    """Names the first function that is refused by itself; all of them where each would do."""
    from llguidance import LLMatcher

    for index, tool in enumerate(offer.tools):
        failed, messages = LLMatcher.validate_grammar_with_warnings(f"start: %json {_schema(tool)}")
        if failed:
            return InvalidRequest(
                f"functions[{index}]", tool.name, f"no grammar for its schema: {_summary(messages[0])}; change it"
            )
    return InvalidRequest("functions", [tool.name for tool in offer.tools], f"{_summary(problem)}; offer fewer")


def _summary(problem: str) -> str:
    """llguidance's words, without its excerpts of the grammar and of the answer."""
    text = problem.partition("\n   1 |")[0].partition("<state>")[0].rpartition("failed to compile JSON schema: ")[2]
    return " ".join(text.split())[:200]

"""What a constraint lets an answer be, and answers that are held to it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from mistral_nb.engine import Constraint, Engine, Generation, Sampling
from mistral_nb.engine.grammar import MAX_CALLS
from mistral_nb.engine.sampling import Sampler
from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from mistral_nb.errors import EngineError, InvalidRequest, MissingDependency, ModelError
from mistral_nb.functions import parse_calls
from mistral_nb.types import Function, Message

FORECAST: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit", "größe 😀"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "who": {"$ref": "#/$defs/person"},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "maxItems": 2},
        "weight": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    },
    "required": ["who", "tags", "weight"],
    "additionalProperties": False,
    "$defs": {
        "person": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "boss": {"type": "boolean"}},
            "required": ["name", "boss"],
            "additionalProperties": False,
        }
    },
}
ADD = Function("add", 'def add(a: int, b: int = 1):\n    "Adds."')
FUNCTIONS = [
    Function("forecast", json.dumps({"description": "The weather.", "parameters": FORECAST})),
    Function("größe", json.dumps(NESTED)),
    ADD,
]
SCHEMAS = {"forecast": FORECAST, "größe": NESTED, "add": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}}
CALL = '[{"name": "add", "arguments": {"a": 1}}]'


def constraint(tokenizer: Tokenizer, choice: str = "auto", functions: list[Function] | None = None) -> Constraint:
    found = tokenizer.constraint(functions or FUNCTIONS, choice, tokenizer.vocab_size)
    assert found is not None
    return found


def taken(
    tokenizer: Tokenizer,
    choice: str,
    text: str,
    first: tuple[int, ...] = (),
    functions: list[Function] | None = None,
) -> tuple[bool, bool]:
    """Whether an answer may be `text`, and whether it may end there."""
    follows = constraint(tokenizer, choice, functions)
    for token in (*first, *tokenizer._encode([text])):
        if not follows.allowed()[token]:
            return False, False
        follows.take(token)
    return True, bool(follows.allowed()[list(tokenizer.eos_ids)].all())


WHOLE = [
    CALL,
    '[{"name": "forecast", "arguments": {"city": "Köln 😀 \\"x\\" \\n 日本", "days": 14, "unit": "größe 😀"}}]',
    '\n[\n  {"name" : "größe",\n "arguments": {"who": {"name": "", "boss": true}, "tags": ["ab"], "weight": null}}\n]',
    '[{"name": "add", "arguments": {"a": -5, "b": 2}}, {"name": "add", "arguments": {"a": 0}}]',
]
WRONG = [
    '[{"name": "sub", "arguments": {}}]',
    '[{"name": "add", "arguments": {"a": 1.5}}]',
    '[{"name": "add", "arguments": {"a": 1, "c": 2}}]',
    '[{"name": "add", "arguments": {}}]',
    '[{"name": "forecast", "arguments": {"city": "Rome", "days": 15, "unit": "celsius"}}]',
    '[{"name": "forecast", "arguments": {"city": "Rome", "days": 1, "unit": "kelvin"}}]',
    CALL + " And so on",
    '[{"name": "add"}]',
    "[" + ", ".join(['{"name": "add", "arguments": {"a": 1}}'] * (MAX_CALLS + 1)) + "]",
]
FREE = [
    "Hello [1] {x}",
    "[]",
    '[{"nam": 1}]',
    '["name"]',
    '{"name": "add", "arguments": {}}',
    '[{"name" is',
    "日本 😀\n",
]


@pytest.mark.parametrize("kind", ["smol", "v1", "v1-json"])
def test_what_an_answer_may_be(smol: Tokenizer, mistral: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = smol if kind == "smol" else mistral[kind]
    for choice in ("auto", "required"):
        assert [taken(tokenizer, choice, text) for text in WHOLE] == [(True, True)] * len(WHOLE)
        assert [taken(tokenizer, choice, text) for text in WRONG] == [(False, False)] * len(WRONG)
        assert taken(tokenizer, choice, CALL[:-1]) == (True, False)
    assert [taken(tokenizer, "auto", text) for text in FREE] == [(True, True)] * len(FREE)
    assert not any(taken(tokenizer, "required", text)[1] for text in (*FREE, ""))
    assert taken(tokenizer, "add", WHOLE[0]) == (True, True)
    assert not any(taken(tokenizer, "add", text)[0] for text in WHOLE[1:])


OPEN: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "n": {"type": "number"}, "any": {}},
    "patternProperties": {"^p": {"type": "string"}},
}
READABLE = [
    '{"a": -' + "9" * 308 + "}",
    '{"n": -1.5e-99, "any": [9E+99, "1e999 \\\\ \\"999\\" \\u001b\\u007f\\n", {"": null, "e": [true, -0.0]}]}',
    '{"a": 1, "A": 2, "é\\t": "x", "p": "\\\\u0061"}',
    '{"n": ' + "9" * 200 + '.5e99, "more": {"a": {"a": "a"}}}',
]
UNREADABLE = [
    '{"n": 1e999',
    '{"any": [1e100',
    '{"more": 1' + "0" * 308,
    '{"n": 1' + "0" * 200 + "e1",
    '{"a": ' + "9" * 309,
    '{"a": 1, "\\u0061": "x"}',
    '{"\\u0070": 1}',
    '{"any": "\\u0061"}',
]


@pytest.mark.parametrize("kind", ["smol", "v1", "v3"])
def test_what_may_be_said_can_be_read(smol: Tokenizer, mistral: dict[str, Tokenizer], kind: str) -> None:
    """Numbers that a double holds, and each property by its own name, where the schema says nothing of either."""
    tokenizer, first = (smol, ()) if kind == "smol" else (mistral[kind], (5,) * (kind == "v3"))
    functions = [Function("f", json.dumps(OPEN))]
    head = '[{"name": "f", "arguments": '
    for arguments in READABLE:
        text = f"{head}{arguments}}}]"
        assert parse_calls(text) == ({"name": "f", "arguments": json.loads(arguments)},)
        for choice in ("auto", "required", "f"):
            assert taken(tokenizer, choice, text, first, functions) == (True, True), (choice, text)
    for text in UNREADABLE:
        for choice in ("auto", "required", "f"):
            assert taken(tokenizer, choice, head + text, first, functions) == (False, False), (choice, text)


def test_a_schema_that_no_readable_number_fits(smol: Tokenizer) -> None:
    tiny = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e-320}
    schema = {"type": "object", "properties": {"a": tiny}, "required": ["a"]}
    follows = constraint(smol, "required", [Function("f", json.dumps(schema))])
    read_out(smol, follows, '[{"name": "f", "arguments": {"a": 0.' + "0" * 308)
    with pytest.raises(EngineError, match="no token fits the schemas; give the functions some without numbers"):
        follows.allowed()


@pytest.mark.parametrize("kind", ["v3", "v3-json"])
def test_v3_writes_its_token_before_calls(mistral: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = mistral[kind]
    token = (5,)
    assert tokenizer.encode_raw("[TOOL_CALLS]")[1:] == [*token]
    assert taken(tokenizer, "required", CALL, token) == taken(tokenizer, "auto", CALL, token) == (True, True)
    assert taken(tokenizer, "required", CALL) == (False, False)
    assert taken(tokenizer, "auto", CALL) == (True, True)
    assert taken(tokenizer, "auto", "Hello", token) == (False, False)
    assert taken(tokenizer, "auto", "Hello [1]") == (True, True)
    assert tokenizer.decode([*token, *tokenizer._encode([CALL])]).lstrip() == CALL


@pytest.mark.parametrize("kind", ["smol", "v1", "v3-json"])
def test_no_control_token_and_no_token_beyond_the_vocabulary(
    smol: Tokenizer, mistral: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer = smol if kind == "smol" else mistral[kind]
    size = tokenizer.vocab_size + 40
    follows = tokenizer.constraint([ADD], "auto", size)
    assert follows is not None
    allowed = follows.allowed()
    assert allowed.shape == (size,)
    assert not allowed[tokenizer.vocab_size :].any()
    shown = {token for token in allowed.nonzero().flatten().tolist() if tokenizer.decode([token, token])}
    assert set(allowed.nonzero().flatten().tolist()) - shown <= tokenizer.eos_ids | {5}
    assert tokenizer.eos_ids <= set(allowed.nonzero().flatten().tolist())


DEEP: dict[str, Any] = {}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "Invalid type: strin"),
        ({"properties": []}, "properties must be an object"),
        ({"properties": {"a": {"not": {}}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}}, "does not fetch"),
        ({"properties": {"a": {"enum": []}}, "required": ["a"]}, "[Uu]nsatisfiable"),
        ({"properties": {"a": {"pattern": "(", "type": "string"}}}, "unclosed group"),
        ({"properties": {"a": DEEP}}, "recursion limit"),
    ],
)
def test_a_schema_that_no_grammar_can_be_made_of(smol: Tokenizer, schema: dict[str, Any], problem: str) -> None:
    functions = [ADD, Function("f", json.dumps({"parameters": schema, "description": "x"}))]
    with pytest.raises(InvalidRequest, match=rf"functions\[1\] = 'f'.*{problem}.*change it") as caught:
        smol.constraint(functions, "auto", smol.vocab_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("choice", ["auto", "required", "add"])
def test_a_single_call_may_be_asked_for(smol: Tokenizer, choice: str) -> None:
    follows = smol.constraint(FUNCTIONS, choice, smol.vocab_size, single=True)
    assert follows is not None
    read_out(smol, follows, CALL.removesuffix("]"))
    then = {text: bool(follows.allowed()[smol._encode([text])[0]]) for text in ("]", ",")}
    assert then == {"]": True, ",": False}


def read_out(tokenizer: Tokenizer, follows: Constraint, text: str) -> None:
    for token in tokenizer._encode([text]):
        assert follows.allowed()[token]
        follows.take(token)


def test_a_schema_that_takes_too_much_work_on_the_way(smol: Tokenizer) -> None:
    """The work of a step is bounded, by a count: 1600 kinds of number are too many."""
    kinds = [[{"type": "integer", "minimum": n, "maximum": n + m * 7} for m in range(40)] for n in range(40)]
    lists = [{"type": "array", "items": {"anyOf": [{"type": "array", "items": kind} for kind in row]}} for row in kinds]
    schema = {"type": "object", "properties": {"a": {"anyOf": lists}}, "required": ["a"]}
    follows = constraint(smol, "required", [Function("f", json.dumps(schema))])
    with pytest.raises(EngineError, match=r"max is 2000.*; give the functions simpler schemas$") as caught:
        read_out(smol, follows, '[{"name": "f", "arguments": {"a": [[1')
    assert "arguments" not in str(caught.value)


def test_without_llguidance(embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match=r'pip install "mistral-nb\[local\]"'):
        load_tokenizer(embedded).constraint([ADD], "auto", 49152)


def test_the_sampler_draws_from_what_is_allowed(smol: Tokenizer) -> None:
    """Greedy, hot, penalised and filtered: logits that want something else, and every token a legal one."""
    source = torch.Generator().manual_seed(3)
    for index, sampling in enumerate(
        [
            Sampling(temperature=0),
            Sampling(temperature=5, seed=1),
            Sampling(temperature=1, top_k=50, top_p=0.5, seed=2),
            Sampling(temperature=0, repetition_penalty=2, frequency_penalty=2, presence_penalty=2),
        ]
    ):
        follows = constraint(smol, "required", FUNCTIONS[:1])
        check = constraint(smol, "required", FUNCTIONS[:1])
        sampler = Sampler(sampling, [1, 2, 3], smol.vocab_size, torch.device("cpu"), follows)
        for _ in range(30):
            logits = torch.randn(smol.vocab_size, generator=source) * 10
            token = sampler.next(logits)
            assert check.allowed()[token], index
            check.take(token)
            if token in smol.eos_ids:
                break


@pytest.fixture(scope="module")
def engine(embedded: Path) -> Iterator[Engine]:
    engine = Engine.load(embedded)
    yield engine
    engine.close()


def generate(engine: Engine, smol: Tokenizer, choice: str, functions: list[Function], beside: int = 0) -> str:
    """An answer that must be calls, with `beside` free answers in the same batch."""
    question = [Message("user", "Weather in Köln for 3 days?")]
    others = [engine.submit(smol.encode_chat(question), Sampling(seed=n + 1), 60) for n in range(beside)]
    follows = constraint(smol, choice, functions)
    ids = smol.encode_chat(question, functions, choice)
    generation = engine.submit(ids, Sampling(temperature=1, seed=1), 400, smol.eos_ids, constraint=follows)
    text = smol.decode([token.id for token in generation if token.id is not None])
    for other in others:
        other.cancel()
    assert generation.finish_reason == "stop"
    return text


@pytest.mark.parametrize("choice", ["required", "forecast", "größe"])
def test_required_calls_fit_their_schemas(engine: Engine, smol: Tokenizer, choice: str) -> None:
    offered = [function for function in FUNCTIONS if choice in ("required", function.name)]
    calls = parse_calls(generate(engine, smol, choice, offered))
    assert calls
    assert len(calls) == 1 or choice == "required"
    for call in calls:
        jsonschema.validate(call["arguments"], SCHEMAS[call["name"]])
        assert choice in ("required", call["name"])


def test_no_text_depends_on_what_runs_beside_it(engine: Engine, smol: Tokenizer) -> None:
    """Neither a call on free answers, nor a free answer on a call."""
    alone = generate(engine, smol, "add", [ADD])
    assert generate(engine, smol, "add", [ADD], beside=3) == alone
    question = smol.encode_chat([Message("user", "Name three colours.")])
    free = [token.id for token in engine.submit(question, Sampling(seed=1), 16)]
    follows = constraint(smol, "add", [ADD])
    call = engine.submit(question, Sampling(seed=1), 40, smol.eos_ids, constraint=follows)
    assert [token.id for token in engine.submit(question, Sampling(seed=1), 16)] == free
    assert [token.id for token in call] != free


def test_two_calls_at_once_each_follow_their_own_schema(engine: Engine, smol: Tokenizer) -> None:
    question = smol.encode_chat([Message("user", "Weather in Köln for 3 days?")])

    def submit(function: Function) -> Generation:
        follows = constraint(smol, function.name, [function])
        return engine.submit(question, Sampling(temperature=1, seed=1), 400, smol.eos_ids, constraint=follows)

    def said(generation: Generation) -> str:
        return smol.decode([token.id for token in generation if token.id is not None])

    offered = [FUNCTIONS[0], ADD]
    alone = [said(submit(function)) for function in offered]
    together = [said(generation) for generation in [submit(function) for function in offered]]
    assert together == alone
    for function, text in zip(offered, together, strict=True):
        (call,) = parse_calls(text) or ()
        assert call["name"] == function.name
        jsonschema.validate(call["arguments"], SCHEMAS[function.name])


def test_a_constraint_that_fails_ends_its_generation(engine: Engine, smol: Tokenizer) -> None:
    follows = constraint(smol, "required")
    follows.take(smol.vocab_size - 1)
    generation = engine.submit(smol.encode_chat([Message("user", "x")]), Sampling(), 5, constraint=follows)
    (last,) = list(generation)
    assert (last.finish_reason, last.id) == ("error", None)
    assert "simpler schemas" in last.error
    assert [token.finish_reason for token in engine.submit([1], Sampling(), 1)] == ["length"]


def test_an_end_token_that_is_shown_as_text_ends_an_answer_nevertheless(embedded: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(embedded / name, tmp_path / name)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"] = [token | {"special": False} for token in data["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([2]) == "<|im_end|>"
    assert taken(tokenizer, "required", CALL) == (True, True)
    assert taken(tokenizer, "required", '[{"name": "forecast", "arguments": {"city": "Ro') == (True, False)


def test_a_checkpoint_without_an_end_token(smol: Tokenizer) -> None:
    endless = Tokenizer(smol._vocabulary, smol._chat, begins_with=None, eos_ids=frozenset())
    with pytest.raises(ModelError, match="no token that ends an answer"):
        endless.constraint([ADD], "auto", smol.vocab_size)

"""Chat templates: what a template may do, what user text may not, and which format a folder takes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mistral_nb.engine.chat_template import JinjaTemplate
from mistral_nb.engine.mistral_format import Control, Part
from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from mistral_nb.engine.vocabulary import JsonVocabulary, Vocabulary
from mistral_nb.errors import InvalidRequest, ModelError
from mistral_nb.types import Message
from tests.engine.mistral_checkpoints import DATA
from tests.engine.test_tokenizer import text_ids

CONTROLS = ("<|im_start|>", "<|im_end|>", "<|s|>", "<|e|>", "<|user|>", "<|system|>", "<|assistant|>")
CHAT = [Message("system", "  S "), Message("user", " a\n"), Message("assistant", "b<e>c"), Message("user", "\n d ")]

# How real templates treat contents; all write `<|im_end|>` and `<|im_start|>` themselves.
LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TEMPLATES = {
    "trim": LOOP.replace("%s", "{{ m.content | trim }}"),
    "strip": LOOP.replace("%s", "{{ m['content'].strip() }}"),
    "slice": LOOP.replace("%s", "{{ m.content[1:] }}"),
    "split": LOOP.replace("%s", "{{ m.content.split('<e>')[-1].lstrip('\n') }}"),
    "replace": LOOP.replace("%s", "{{ m.content | replace('a', '<|im_end|>') }}"),
    "conditional": LOOP.replace("%s", "{% if 'd' in m.content %}{{ m.content | length }}{% else %}no{% endif %}"),
    "json": LOOP.replace("%s", "{{ m | tojson }}"),
    "first message taken out": "{% set s = messages[0].content %}" + LOOP.replace("%s", "{{ s ~ m.content }}"),
    "namespace": "{% set ns = namespace(n=0) %}"
    + LOOP.replace("%s", "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}"),
    "macro": "{% macro turn(c) %}[{{ c }}]{% endmacro %}" + LOOP.replace("%s", "{{ turn(m.content) }}"),
    "tokens by name": LOOP.replace("<|im_end|>", "{{ eos_token }}").replace("%s", "{{ m.content }}{{ bos_token }}"),
    "tokens from pieces": LOOP.replace("<|im_end|>", "{{ '<|im_' + 'end|>' }}").replace("%s", "{{ m.content }}"),
    "searched for": LOOP.replace("%s", "{{ m.content.split('<|im_end|>')[0] }}{{ '<|im_end|>' in m.content }}")
    + "{{ '<|im_start|>'.strip() }}{{ bos_token == '<|im_start|>' }}",
    "token in its syntax": LOOP.replace("%s", "{{ {'a': '<|im_end|>'}['a'] }}{#<|im_end|>#}"),
    "white space": "{%- for m in messages -%}\n  {{- m.content }}\n  {% if loop.last %}\n  x\n {% endif %}\n{%endfor%}",
    "loop controls": LOOP.replace("%s", "{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}",
}


@pytest.fixture
def with_template(embedded: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with the embedded model's tokenizer and another chat template."""

    def make(source: str | list[dict[str, str]] | None, **changes: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            shutil.copy(embedded / name, folder / name)
        settings = json.loads((embedded / "tokenizer_config.json").read_text()) | changes
        del settings["chat_template"]
        if source is not None:
            settings["chat_template"] = source
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def template(source: str) -> JinjaTemplate:
    return JinjaTemplate(source, controls=CONTROLS, specials={"bos_token": "<|s|>", "eos_token": "<|e|>"})


def parts(source: str, *turns: tuple[str, str]) -> list[Part]:
    return template(source).parts([Message(role, content) for role, content in turns or [("user", "u")]])


@pytest.fixture(scope="module")
def oracle(embedded: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded)


@pytest.fixture(scope="module")
def vocabulary(embedded: Path) -> Vocabulary:
    return JsonVocabulary(embedded / "tokenizer.json", per_part=False)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_ids_equal_transformers(oracle: PreTrainedTokenizerBase, vocabulary: Vocabulary, source: str) -> None:
    specials = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    chat = JinjaTemplate(source, controls=vocabulary.controls, specials=specials)
    tokenizer = Tokenizer(vocabulary, chat, begins_with=None, eos_ids=frozenset())
    options = {"chat_template": source, "add_generation_prompt": True, "return_dict": False}
    conversation = [message.to_dict() for message in CHAT]
    assert tokenizer.encode_chat(CHAT) == oracle.apply_chat_template(conversation, **options)
    assert tokenizer.render_chat(CHAT) == oracle.apply_chat_template(conversation, tokenize=False, **options)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"tokens from pieces", "replace", "conditional"}))
@pytest.mark.parametrize("text", ["x<|im_end|>y", "<|im_start|>system\n", " <|im_start|><|im_end|> ", "<|im_", "end|>"])
def test_no_template_makes_user_text_a_control_token(name: str, text: str) -> None:
    harmless = parts(TEMPLATES[name], *((message.role, "xyz") for message in CHAT))
    found = parts(TEMPLATES[name], *((message.role, text) for message in CHAT))
    assert [part for part in found if isinstance(part, Control)] == [
        part for part in harmless if isinstance(part, Control)
    ]
    assert not any(isinstance(part, str) and isinstance(after, str) for part, after in itertools.pairwise(found))


@pytest.mark.parametrize("texts", [["x<|im_end|>y"], ["a<|im_", "end|>"], ["<|im_end|>", "<|im_end|>"]])
def test_a_template_that_builds_its_tokens(texts: list[str]) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im_' + 'end|>' }}"
    assert parts(source, ("user", "<|im_start|>")) == ["<|im_start|>", Control("<|im_end|>")]
    with pytest.raises(InvalidRequest, match=r"<\|im_end\|>.*cannot keep that text apart"):
        parts(source, *(("user", text) for text in texts))


def test_a_name_is_user_text_too() -> None:
    source = "{% for m in messages %}{{ m.name }}{{ '<' + '|e|>' }}{% endfor %}"
    assert template(source).parts([Message("user", "u", name="n")]) == ["n", Control("<|e|>")]
    with pytest.raises(InvalidRequest, match="cannot keep that text apart"):
        template(source).parts([Message("user", "u", name="<|e|>")])


def test_parts() -> None:
    source = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|e|>{% endfor %}"
    assert parts(source, ("system", "a<|s|>"), ("user", "")) == [
        *(Control("<|s|>"), Control("<|system|>"), "a<|s|>", Control("<|e|>"), Control("<|user|>"), Control("<|e|>")),
    ]


REFUSING = """{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{{ m.content }}{% endfor %}"""


@pytest.mark.parametrize(
    ("roles", "error"),
    [
        (["system", "user"], r"turn 1 of 2 \(system\).*no system turns"),
        (["user", "assistant", "assistant", "user"], r"turn 3 of 4 \(assistant\).*roles must alternate"),
        (["user", "user"], r"turn 2 of 2 \(user\).*roles must alternate"),
        ([], "at least one turn"),
    ],
)
def test_a_turn_that_the_template_refuses_is_named(roles: list[str], error: str) -> None:
    with pytest.raises(InvalidRequest, match=error):
        template(REFUSING).parts([Message(role, "x") for role in roles])


def test_a_template_is_told_of_results_in_words() -> None:
    """One that knows of tools as well, so that there is one form of calls."""
    source = "{% if tools %}tools{% endif %}{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    assert parts(source, ("user", "a"), ("assistant", "b"), ("tool", "c")) == [
        'user aassistant buser Results of the functions:\n{"name": null, "content": "c"}'
    ]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "longer"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "longer"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x %}{{ n.x * 2 }}{% endset %}{% endfor %}",
            "longer",
        ),
        ("{{ 'a' * 10**9 }}", "longer"),
        ("{{ [1] * 999999999 }}", "longer"),
        ("{{ 9 ** 999999999 }}", "number"),
        ("{{ 'a'.ljust(999999999) }}", "number"),
        ("{{ [1] | tojson(indent=999999999) }}", "number"),
        ("{{ '%999999999d' % 1 }}", "%"),
        ("{{ '{:999999999}'.format(1) }}", "format"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "may not store"),
        ("{{ messages[0].content.nothing.more }}", "no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_is_bounded_and_sandboxed(source: str, error: str) -> None:
    with pytest.raises(ModelError, match=error) as caught:
        parts(source)
    assert "send a raw prompt or use another checkpoint" in str(caught.value)


DEEP = "{% for i in 'a' %}" * 30 + "{% endfor %}" * 30


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | center(9) }}", "{% nothing %}", "x" * 300_000, DEEP])
def test_a_template_that_cannot_be_compiled(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        template(source)


def test_a_long_conversation_stays_within_the_bounds() -> None:
    turns = [("user", "x" * 2000), ("assistant", "y" * 2000)] * 1000
    assert (
        sum(len(part) for part in parts(LOOP.replace("%s", "{{ m.content | trim }}"), *turns) if isinstance(part, str))
        > 4e6
    )


def test_the_template_may_lie_in_a_file_of_its_own(with_template: Callable[..., Path]) -> None:
    folder = with_template("not this")
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    assert load_tokenizer(folder).encode_chat([Message("user", "Hi")])[0] == 1


def test_the_default_of_several_templates(with_template: Callable[..., Path]) -> None:
    folder = with_template([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}])
    assert load_tokenizer(folder).render_chat([Message("user", "Hi")]) == "yes"


def test_without_a_template_there_is_no_chat(with_template: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(with_template(None))
    with pytest.raises(InvalidRequest, match="no chat template; send a raw prompt"):
        tokenizer.encode_chat([Message("user", "Hi")])
    assert tokenizer.decode(tokenizer.encode_raw("Hi")) == "Hi"


def test_end_ids_come_from_every_file(with_template: Callable[..., Path]) -> None:
    folder = with_template(None, eos_token={"content": "<|endoftext|>", "special": True})
    assert load_tokenizer(folder).eos_ids == {0, 2}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert load_tokenizer(folder).eos_ids == {0, 2, 5}


def added_tokens(folder: Path, *new: str, **changes: Any) -> None:
    """Changes every added token in tokenizer.json, and adds ones that are not special."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [token | changes for token in data["added_tokens"]]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True}
    first = len(data["model"]["vocab"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": first + len(new)}))
    data["added_tokens"] += [{"id": first + index, "content": text} | plain for index, text in enumerate(new)]
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("normalizer", [None, {"type": "Prepend", "prepend": "x"}])
def test_an_added_token_that_is_not_special_is_no_text_either(
    with_template: Callable[..., Path], normalizer: dict[str, str] | None
) -> None:
    folder = with_template(LOOP.replace("%s", "{{ m.content }}"))
    harmless = load_tokenizer(folder).encode_chat([Message("user", "a")])
    added_tokens(folder, special=False, normalized=True)
    data = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(folder)
    controls = [token for token in harmless if token < 17]
    assert [t for t in tokenizer.encode_chat([Message("user", "a<|im_start|>b<|im_end|>")]) if t < 17] == controls
    assert tokenizer.encode_raw("a<|im_start|>b").count(1) == 1
    assert tokenizer.decode([1, *text_ids(tokenizer, "<|im_end|>"), 2]).replace("x", "") == (
        "<|im_start|><|im_end|><|im_end|>"
    )
    assert tokenizer.eos_ids == {2}


def test_added_tokens_that_any_text_may_hold(with_template: Callable[..., Path]) -> None:
    folder = with_template(
        LOOP.replace(
            "%s",
            "{{ m.content.split('</think>')[-1] }}{{ '</think>' in m.content }}{{ '<think>' if m.content != 'xyzzy' }}",
        )
    )
    added_tokens(folder, "<think>", "</think>", "xyzzy", "   ", "हिन्दी")
    tokenizer, oracle = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    turns = [Message("assistant", "so</think>xyzzy   x"), Message("user", "   if xyzzy हिन्दी")]
    expected = oracle.apply_chat_template(
        [turn.to_dict() for turn in turns], add_generation_prompt=True, return_dict=False
    )
    assert {49152, 49154, 49155, 49156} < set(expected)
    assert tokenizer.encode_chat(turns) == expected
    assert tokenizer.decode(expected) == oracle.decode(expected, skip_special_tokens=True)
    ids = tokenizer.encode_chat([Message("user", "<think></think><think>")])
    assert (ids.count(49152), ids.count(49153)) == (1, 0)


def test_tokens_without_an_embedding_are_text(with_template: Callable[..., Path]) -> None:
    """As the [PAD] of a training whose embeddings were not resized: its id would lie beyond them."""
    folder = with_template("{{ messages[0].content }}<|pad|>")
    added_tokens(folder, "<|pad|>", "xyzzy", "<think>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 49152}))
    tokenizer = load_tokenizer(folder)
    text = "<|pad|> xyzzy <think>"
    chat = tokenizer.encode_chat([Message("user", text)])
    assert max(chat) < 49152
    assert tokenizer.decode(chat) == f"{text}<|pad|>"
    assert tokenizer.decode(tokenizer.encode_raw(text)) == text
    assert max(tokenizer.encode_raw(text)) < 49152


def test_bos_is_added_where_the_tokenizer_adds_it(with_template: Callable[..., Path]) -> None:
    folder = with_template(None)
    assert load_tokenizer(folder).bos_id is None
    data = json.loads((folder / "tokenizer.json").read_text())
    first = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    data["post_processor"] = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.encode_raw("Hi") == tokenizer.encode_raw("<|im_start|>Hi") == [1, *text_ids(tokenizer, "Hi")]
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).bos_id is None


ODD_IDS = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [
            {"id": 7, "content": "<s>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
)


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json and no tokenizer.model"),
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "[]", "no JSON object"),
        ("tokenizer.json", "{}", "no tokenizer file"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "merges": ["a"]}, "decoder": {"type": "ByteLevel"}}',
            "no tokenizer file",
        ),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "Unigram model; supported is BPE"),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "decoder": {"type": "WordPiece"}}', "a decoder that is not"),
        ("tokenizer.json", ODD_IDS, "gives <s> an id that"),
        ("tekken.json", "{}", "only a tekken tokenizer"),
        ("tokenizer.model", "nonsense", "is no SentencePiece model"),
    ],
)
def test_a_folder_whose_tokenizer_cannot_be_used(tmp_path: Path, file: str, content: str | None, error: str) -> None:
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=error):
        load_tokenizer(tmp_path)


def test_later_mistral_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    shutil.copy(DATA / "mistral_instruct_tokenizer_241114.model.v7", tmp_path / "tokenizer.model")
    with pytest.raises(ModelError, match="none of v1 to v3"):
        load_tokenizer(tmp_path)


def test_mistral_with_a_byte_level_vocabulary_keeps_its_own_template(embedded: Path, tmp_path: Path) -> None:
    """As Mistral Nemo has: its parts do not begin with a space, so neither v1's nor v3's rules would give its ids."""
    data = json.loads((embedded / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(data)
        .replace("<|im_start|>", "[INST]")
        .replace("<|im_end|>", "</s>")
        .replace("<|endoftext|>", "<s>"),
        encoding="utf-8",
    )
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    template = "{{ bos_token }}{% for m in messages %}[INST]{{ m['content'] }}[INST]{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    ours = load_tokenizer(tmp_path).encode_chat([Message("user", "Hi, what is 2 + 2?")])
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "Hi, what is 2 + 2?"}], return_dict=False
    )
    assert ours == theirs

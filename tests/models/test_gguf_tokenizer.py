"""Tokenizers that went into a GGUF file and out again, against mistral-common's own files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from gguf import GGUFWriter
from gguf.vocab import MistralVocab
from sentencepiece import SentencePieceProcessor

from mistral_nb.checkpoints import describe
from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_import import convert
from mistral_nb.types import Message
from tests.engine.mistral_checkpoints import checkpoint, processor
from tests.models.tiny_gguf import CHATML, add_sentencepiece, add_vocabulary, tiny_gguf

TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
LISTED = {"v1": ["<unk>", "<s>", "</s>"], "v3": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]}
"""The tokens in the tokenizer_config.json of the models on the hub, or some of them."""
WINDOW = "llama.attention.sliding_window"
FRAGMENTS = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "\u2581", "\u3000", "\xa0", "\u200b", "\ufeff", "\u2028", "\x00"),
    *("def f(x):\n    return x", "for (int i = 0; i < n; ++i) {", "=> ", "<!-- -->", "import numpy as np", "_" * 9),
    *("Größe", "日本語", "עברית", "👩‍👩‍👧", "e\u0301", "ﷺ", "नमस्ते", "Здравствуйте", "\U0001f600", "한국어", "ไทย"),
    *(
        "[REFERENCE_DOC_3]",
        "[REFERENCE_DOC_19]",
        "[REFERENCE_DOC_",
        "[INST]",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "[control_8]",
    ),
    *("12345", "3.14159", "a" * 40, "the", " the", "The quick brown fox", "don't", "HTTPServer", "\ud7ff", "\ue000"),
]


def some_text(source: random.Random, pieces: list[str]) -> str:
    """Words of the vocabulary, fragments, and characters from anywhere."""
    kind = source.randrange(4)
    if kind == 0:
        return "".join(source.choices(FRAGMENTS, k=source.randint(1, 8)))
    if kind == 1:
        return "".join(source.choices(pieces, k=source.randint(1, 20))).replace("\u2581", " ")
    if kind == 2:
        planes = [(32, 127), (160, 0x3000), (0x3000, 0xD800), (0xE000, 0x11000), (0x1F000, 0x1FB00)]
        return "".join(chr(source.randrange(*source.choice(planes))) for _ in range(source.randint(1, 40)))
    return "".join(chr(source.randrange(32, 127)) for _ in range(source.randint(1, 60)))


def made(folder: Path, vocabulary: Callable[[GGUFWriter], int], **options: Any) -> Path:
    """The checkpoint made of a tiny model with that vocabulary."""
    folder.mkdir(parents=True)
    convert(tiny_gguf(folder.parent / f"{folder.name}.gguf", vocabulary=vocabulary, **options), folder, lambda *_: None)
    return folder


def sentencepiece(version: str, **options: Any) -> Callable[[GGUFWriter], int]:
    return lambda writer: add_sentencepiece(writer, processor(version), **options)


@pytest.mark.parametrize("listed", [False, True], ids=["by the file", "by the settings"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_a_sentencepiece_vocabulary_gives_the_same_ids(tmp_path: Path, version: str, listed: bool) -> None:
    settings = LISTED[version] if listed else []
    folder = made(tmp_path / "made", sentencepiece(version, settings=settings, template=TEMPLATE))
    original, ours = processor(version), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    every = range(original.vocab_size())
    assert ours.vocab_size() == original.vocab_size()
    assert [ours.id_to_piece(token) for token in every] == [original.id_to_piece(token) for token in every]
    for kind in ("is_control", "is_unknown", "is_byte", "is_unused"):
        assert [getattr(ours, kind)(t) for t in every] == [getattr(original, kind)(t) for t in every], kind
    ids = ("unk_id", "bos_id", "eos_id", "pad_id")
    assert [getattr(ours, name)() for name in ids] == [getattr(original, name)() for name in ids]
    source = random.Random(4)
    pieces = [original.id_to_piece(token) for token in every if not original.is_control(token)]
    texts = ["", *FRAGMENTS, *(some_text(source, pieces) for _ in range(2500))]
    for text in texts:
        assert ours.encode(text) == original.encode(text), text
    for _ in range(500):
        tokens = [source.randrange(len(every)) for _ in range(source.randint(1, 12))]
        assert ours.decode(tokens) == original.decode(tokens), tokens


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_engine_takes_it_as_mistrals(tmp_path: Path, version: str) -> None:
    folder = made(tmp_path / "made", sentencepiece(version, settings=LISTED[version], template=TEMPLATE))
    described = describe(folder)
    assert described.template == f"Mistral {version}"
    assert described.architecture == "Mistral"
    ours, original = load_tokenizer(folder), load_tokenizer(checkpoint(tmp_path / "original", version, as_json=False))
    chat = [
        Message("system", "Be kind."),
        Message("user", "Hi\n"),
        Message("assistant", "Hello!"),
        Message("user", "日"),
    ]
    assert ours.encode_chat(chat) == original.encode_chat(chat)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (original.bos_id, original.eos_ids, original.vocab_size)
    for text in ("Hi", "<s>[INST] Hi [/INST]", " </s>a"):
        assert ours.encode_raw(text) == original.encode_raw(text)


def chat_of(folder: Path) -> str:
    return describe(folder).template


def test_whose_chat_format_a_model_has(tmp_path: Path) -> None:
    plain = sentencepiece("v1")
    assert chat_of(made(tmp_path / "no-name", plain)) == "none: raw prompts only"
    named = {"general.name": "mistralai_mistral-7b-instruct-v0.1"}
    assert chat_of(made(tmp_path / "name", plain, metadata=named)) == "Mistral v1"
    assert chat_of(made(tmp_path / "base", plain, metadata={"general.name": "Mistral 7B"})) == "none: raw prompts only"
    origin = {"general.base_model.0.repo_url": "https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2"}
    assert chat_of(made(tmp_path / "base-model", plain, metadata=origin)) == "Mistral v1"
    llama = "[INST] <<SYS>> {{ messages }}"
    for name, template in (("llama-2", llama), ("chatml", CHATML)):
        folder = made(tmp_path / name, sentencepiece("v1", template=template), metadata=named)
        assert chat_of(folder) == f"chat template (Jinja), {len(template)} characters"
        assert describe(folder).architecture == "Llama"
    window = made(tmp_path / "window", sentencepiece("v1", template=CHATML), metadata={WINDOW: 64})
    assert (describe(window).args.sliding_window, describe(window).architecture) == (64, "Mistral")
    assert chat_of(window).startswith("chat template")
    for name, template in (("thinks", TEMPLATE + "<think>"), ("turns", TEMPLATE + "<|im_end|>")):
        assert chat_of(made(tmp_path / name, sentencepiece("v1", template=template))).startswith("chat template")


V01 = {"llama.rope.freq_base": 10000.0, "llama.context_length": 32768}


@pytest.mark.parametrize(
    ("metadata", "template", "window"),
    [
        (V01, TEMPLATE, 4096),
        ({**V01, WINDOW: 512}, TEMPLATE, 512),
        ({**V01, WINDOW: 0}, TEMPLATE, None),
        ({**V01, "llama.rope.freq_base": 1e6}, TEMPLATE, None),
        ({**V01, "llama.context_length": 4096}, TEMPLATE, None),
        (V01, CHATML, None),
    ],
)
def test_the_window_of_v01(tmp_path: Path, metadata: dict[str, Any], template: str, window: int | None) -> None:
    folder = made(tmp_path / "made", sentencepiece("v1", template=template), metadata=metadata)
    assert describe(folder).args.sliding_window == window


MARKS = "{% for m in messages %}<|im_start|>{{ m.content }}<think></s>{% endfor %}{#=!=#}"


@pytest.mark.parametrize("kind", [1, 4], ids=["as the converter writes it", "user-defined"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_text_cannot_become_a_token_that_the_template_writes(tmp_path: Path, kind: int, version: str) -> None:
    first = 31000
    by_hand = ["<|im_start|>", "<think>", "<|not_named|>", "<tag>", "=!="]

    def vocabulary(writer: GGUFWriter) -> int:
        size = add_sentencepiece(writer, processor(version), template=MARKS)
        for token, text in enumerate(by_hand, first):
            for name, value in (("tokens", text.encode()), ("scores", 0.0), ("token_type", kind)):
                writer.kv_data[0][f"tokenizer.ggml.{name}"].value[token] = value
        return size

    ours = load_tokenizer(made(tmp_path / "made", vocabulary))
    marks = {first, first + 1, first + 2}
    ids = ours.encode_chat([Message("user", "a <|im_start|> <think> <|not_named|> <tag> =!= b")])
    assert [token for token in ids if token in marks | {2}] == [first, first + 1, 2]
    if kind == 4:
        assert {first + 3, first + 4} <= set(ids)


def test_a_byte_level_token_that_the_template_writes(tmp_path: Path) -> None:
    def vocabulary(writer: GGUFWriter) -> int:
        size = add_vocabulary(writer, "smollm")
        fields = writer.kv_data[0]
        fields["tokenizer.ggml.tokens"].value.append("<think>")
        fields["tokenizer.ggml.token_type"].value.append(4)
        fields["tokenizer.chat_template"].value = "{% for m in messages %}{{ m.content }}<think>{% endfor %}"
        return size + 1

    ours = load_tokenizer(made(tmp_path / "made", vocabulary))
    assert ours.encode_chat([Message("user", "<think>")]).count(ours.vocab_size - 1) == 1


def test_no_space_goes_before_a_text_where_the_file_says_so(tmp_path: Path) -> None:
    original = processor("v1")
    folder = made(tmp_path / "made", sentencepiece("v1"), metadata={"tokenizer.ggml.add_space_prefix": False})
    ours = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("Hi there", "日本", "x"):
        assert ours.encode(" " + text) == original.encode(text) != ours.encode(text)


def test_no_bos_goes_before_a_raw_prompt_where_the_file_says_so(tmp_path: Path) -> None:
    folder = made(tmp_path / "made", sentencepiece("v1"), metadata={"tokenizer.ggml.add_bos_token": False})
    assert load_tokenizer(folder).bos_id is None


@pytest.mark.parametrize(
    ("key", "changed", "problem"),
    [
        ("scores", lambda values: [-1000.0] * len(values), "has the same score for all tokens, so that the order"),
        ("scores", lambda values: [float("nan"), *values[1:]], "has a score that is no number"),
        ("scores", lambda values: values[1:], "has 31999 scores for 32000 tokens"),
        ("tokens", lambda values: [*values[:-1], values[-2]], "has two tokens of one text"),
        ("tokens", lambda values: [*values[:-1], ""], "has tokens without a text"),
        ("tokens", lambda values: [*values[:-1], "a\0"], "has a token with a null character"),
        ("tokens", lambda values: [*values[:3], "<0xZZ>", *values[4:]], "has other byte tokens than"),
        ("token_type", lambda values: [3, *values[1:]], "has 0 unknown tokens"),
        ("token_type", lambda values: [2, 3, 3, *[2] * (len(values) - 3)], "has 31998 unknown tokens"),
        ("token_type", lambda values: [7, *values[1:]], "no type for each of its 32000 tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(
    tmp_path: Path, key: str, changed: Callable[[list[Any]], list[Any]], problem: str
) -> None:
    def vocabulary(writer: GGUFWriter) -> int:
        size = add_sentencepiece(writer, processor("v1"))
        if problem == "has 0 unknown tokens":
            del writer.kv_data[0]["tokenizer.ggml.unknown_token_id"]
        field = writer.kv_data[0][f"tokenizer.ggml.{key}"]
        field.value = changed([value.decode() if isinstance(value, bytes) else value for value in field.value])
        return size

    with pytest.raises(ModelError, match=problem):
        made(tmp_path / "made", vocabulary)
    assert not any((tmp_path / "made").iterdir())


def test_a_charsmap_is_refused(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.precompiled_charsmap": [1, 2]}
    with pytest.raises(ModelError, match=r"precompiled_charsmap = .*does not apply"):
        made(tmp_path / "made", sentencepiece("v1"), metadata=metadata)


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """mistral-common's tokenizer, and ours from a GGUF file that gguf's own code wrote it to."""
    root = tmp_path_factory.mktemp("tekken")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", root / "tekken.json")
    vocabulary = MistralVocab(root)

    def write(writer: GGUFWriter) -> int:
        texts, _, kinds = zip(*vocabulary.all_tokens(), strict=True)
        writer.add_tokenizer_model(vocabulary.gguf_tokenizer_model)
        writer.add_tokenizer_pre("tekken")
        writer.add_token_list(texts)
        writer.add_token_types([int(kind) for kind in kinds])
        writer.add_token_merges(vocabulary.extract_vocab_merges_from_model())
        writer.add_bos_token_id(vocabulary.bos_id)
        writer.add_eos_token_id(vocabulary.eos_id)
        writer.add_add_bos_token(True)
        writer.add_chat_template(TEMPLATE)
        return len(texts)

    folder = made(root / "made", write)
    assert describe(folder).architecture == "Llama"
    return vocabulary.tokenizer, load_tokenizer(folder)


def test_a_tekken_vocabulary_gives_the_same_ids(tekken: tuple[Any, Tokenizer]) -> None:
    original, ours = tekken
    source = random.Random(8)
    pieces = [original.id_to_piece(token) for token in range(1000, original.n_words, 7)]
    texts = [*FRAGMENTS, *(some_text(source, pieces) for _ in range(3000))]
    for text in texts:
        assert ours._encode([text]) == original.encode(text, bos=False, eos=False), text
    for token in np.random.default_rng(1).integers(1000, original.n_words, 3000):
        piece = original.id_to_byte_piece(int(token))
        assert ours.decode([int(token)]) == piece.decode(errors="replace")


def test_a_tekken_prompt_begins_with_bos(tekken: tuple[Any, Tokenizer]) -> None:
    original, ours = tekken
    assert ours.encode_raw("Hi 日本") == original.encode("Hi 日本", bos=True, eos=False)
    ids = ours.encode_chat([Message("user", "Hi")])
    assert ids == [1, 3, *original.encode(" Hi ", bos=False, eos=False), 4]

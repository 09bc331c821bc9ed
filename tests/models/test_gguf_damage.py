"""Damaged and hostile GGUF files: each is refused as such, at once and without memory."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter

from mistral_nb.checkpoints import describe
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_import import convert, needed_bytes
from tests.engine.mistral_checkpoints import processor
from tests.models.tiny_gguf import add_sentencepiece, tiny_gguf

KEY = b"llama.block_count"
TOKENS = b"tokenizer.ggml.tokens"
TENSOR = b"blk.1.attn_v.weight"
LAST = b"output_norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def put(data: bytes, at: int, code: str, value: int) -> bytes:
    packed = struct.pack(f"<{code}", value)
    return data[:at] + packed + data[at + len(packed) :]


def after(data: bytes, name: bytes) -> int:
    assert data.count(name) == 1
    return data.index(name) + len(name)


def twice(data: bytes, name: bytes, other: bytes) -> bytes:
    """With `name` where `other` was, which is as long."""
    assert len(name) == len(other)
    assert data.count(other) == 1
    return data.replace(other, name)


def renamed(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is no GGUF file .it is empty"),
    "short magic": (lambda data: b"GG", "is no GGUF file .it begins with b'GG'"),
    "safetensors": (lambda data: b"\x40\0\0\0\0\0\0\0{}", "is no GGUF file .it begins with"),
    "a web page": (lambda data: b"<!DOCTYPE html>", "is no GGUF file .it begins with b'<!DO'"),
    "magic alone": (lambda data: data[:4], "its header goes on at its end"),
    "counts cut": (lambda data: data[:20], "its header goes on at its end"),
    "metadata cut": (lambda data: data[: after(data, TOKENS) + 2000], "its header goes on at its end"),
    "tensors cut": (lambda data: data[: after(data, TENSOR) + 3], "its header goes on at its end"),
    "data cut": (lambda data: data[:-4097], "is damaged: its tensor .* ends at"),
    "one byte cut": (lambda data: data[:-1], "is damaged: its tensor output_norm.weight ends at"),
    "no data": (lambda data: data[: after(data, LAST) + 24], "is damaged: its tensor token_embd.weight ends at"),
    "version 1": (lambda data: put(data, 4, "I", 1), "of GGUF version 1, and 2 and 3"),
    "version 9": (lambda data: put(data, 4, "I", 9), "of GGUF version 9, and"),
    "big-endian": (lambda data: put(data, 4, "I", 3 << 24), "GGUF file for big-endian machines"),
    "many tensors": (lambda data: put(data, 8, "Q", 1 << 63), r"claims \d+ tensors, more than its \d+ bytes"),
    "minus one tensor": (lambda data: put(data, 8, "q", -1), r"claims \d+ tensors, more than"),
    "a tensor more": (lambda data: put(data, 8, "Q", 21), "is damaged"),
    "a tensor less": (lambda data: put(data, 8, "Q", 19), "lacks the tensor output_norm.weight"),
    "many entries": (lambda data: put(data, 16, "Q", 1 << 40), r"claims \d+ metadata entries, more than"),
    "long key": (lambda data: put(data, 24, "Q", 1 << 50), "its header goes on at its end"),
    "long list": (
        lambda data: put(data, after(data, TOKENS) + 8, "Q", 1 << 61),
        "a list of 2305843009213693952 values",
    ),
    "longer list": (lambda data: put(data, after(data, TOKENS) + 8, "Q", 1 << 20), "is damaged"),
    "list of lists": (lambda data: put(data, after(data, TOKENS) + 4, "I", 9), "a list of the unknown type 9"),
    "value of no type": (lambda data: put(data, after(data, KEY), "I", 13), "a value of the unknown type 13"),
    "value of another type": (lambda data: put(data, after(data, KEY), "I", 6), "for llama.block_count, which must be"),
    "no text": (lambda data: data.replace(KEY, b"\xff" * len(KEY)), "a text that is not UTF-8"),
    "no dimensions": (lambda data: put(data, after(data, TENSOR), "I", 0), "attn_v.weight' has 0 dimensions"),
    "many dimensions": (lambda data: put(data, after(data, TENSOR), "I", 1 << 31), "has 2147483648 dimensions"),
    "size zero": (lambda data: put(data, after(data, TENSOR) + 4, "Q", 0), "attn_v.weight' has the sizes .0, 32"),
    "huge size": (
        lambda data: put(data, after(data, TENSOR) + 4, "q", -1),
        "has the shape .32, 18446744073709551615., where",
    ),
    "huge offset": (lambda data: put(data, after(data, TENSOR) + 24, "q", -32), "lies at 18446744073709551584, not at"),
    "shared data": (lambda data: put(data, after(data, TENSOR) + 24, "Q", 0), "attn_v.weight lies at 0, not at"),
    "a tensor twice": (lambda data: twice(data, b"blk.0.attn_v.weight", TENSOR), "blk.0.attn_v.weight, which"),
    "a name that a terminal obeys": (
        lambda data: data.replace(TENSOR, b"\x1b]0;title\x07\x1b[2Jx"[:19].ljust(19)),
        r"a tensor \\x1b\]0;title",
    ),
    "hostile name": (lambda data: data.replace(TENSOR, b"../../../etc/passwd"), "a tensor ../../../etc/passwd, which"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, whole: bytes, kind: str) -> None:
    change, problem = BROKEN[kind]
    source, folder = renamed(tmp_path / "tiny.gguf", change(whole)), tmp_path / "checkpoint"
    folder.mkdir()
    with pytest.raises(ModelError, match=problem) as caught:
        convert(source, folder, lambda *_: None)
    assert "tiny.gguf" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert not any(folder.iterdir())
    with pytest.raises(ModelError, match=problem):
        needed_bytes(source)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf", metadata={"llama.block_counx": 1})
    renamed(source, source.read_bytes().replace(b"llama.block_counx", KEY))
    with pytest.raises(ModelError, match=r"it has 'llama\.block_count' twice"):
        needed_bytes(source)


@pytest.mark.parametrize("alignment", [0, 24, 1 << 31])
def test_an_alignment_that_cannot_be_is_refused(tmp_path: Path, alignment: int) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf", metadata={"general.alignment": 32})
    data = source.read_bytes()
    renamed(source, put(data, after(data, b"general.alignment") + 4, "I", alignment))
    with pytest.raises(ModelError, match=r"no power of two|ends at|lies at"):
        needed_bytes(source)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(ModelError, match=rf"{source.name} cannot be read \(.*\); give a GGUF file"):
            needed_bytes(source)


def test_counts_take_neither_time_nor_memory(tmp_path: Path, whole: bytes) -> None:
    """Of texts, metadata entries and tensors, in a sparse file that could hold so many."""
    source = tmp_path / "tiny.gguf"
    lists = b"".join(struct.pack("<Q1sIIQ", 1, bytes([65 + n]), 9, 8, 1 << 20) + bytes(8 << 20) for n in range(5))
    empty_texts = put(whole[:24] + lists, 16, "Q", 5)
    numbers = b"".join(struct.pack("<Q1sIIQ", 1, bytes([65 + n]), 9, 1, 1 << 20) + bytes(1 << 20) for n in range(33))
    bytes_only = put(whole[:24] + numbers, 16, "Q", 40)
    for data in (empty_texts, bytes_only, put(whole, 8, "Q", 100_000_000), put(whole, 16, "Q", 100_000_000)):
        source.write_bytes(data)
        os.truncate(source, 4_000_000_000)
        begun = time.process_time()
        with pytest.raises(ModelError, match=r"goes on after 32 MiB|make sense"):
            needed_bytes(source)
        assert time.process_time() - begun < 60
    source.write_bytes(bytes_only)
    tracemalloc.start()
    with pytest.raises(ModelError, match="goes on after 32 MiB"):
        needed_bytes(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{peak / 1e6:.0f} MB")
    assert peak < 100e6


def test_long_tokens_take_no_time(tmp_path: Path) -> None:
    def vocabulary(token: str, count: int) -> Callable[[GGUFWriter], int]:
        def write(writer: GGUFWriter) -> int:
            size = add_sentencepiece(writer, processor("v1"))
            fields = writer.kv_data[0]
            for index in range(count):
                fields["tokenizer.ggml.tokens"].value[300 + index] = f"{index}{token}".encode()
                fields["tokenizer.ggml.scores"].value[300 + index] = 0.0
            return size

        return write

    for token, count, problem in (("x" * 200_000, 1, "token of over 512 characters"), ("x" * 480, 9000, "of score 0")):
        source = tiny_gguf(tmp_path / "tiny.gguf", vocabulary=vocabulary(token, count))
        begun = time.process_time()
        with pytest.raises(ModelError, match=problem):
            needed_bytes(source)
        assert time.process_time() - begun < 60


def sentencepiece(writer: GGUFWriter) -> int:
    return add_sentencepiece(writer, processor("v1"))


@pytest.mark.parametrize("vocabulary", [None, sentencepiece], ids=["byte-level", "sentencepiece"])
def test_flipped_bytes_raise_nothing_else(tmp_path: Path, vocabulary: Callable[[GGUFWriter], int] | None) -> None:
    """Most flips in the header are refused; one in the weights gives other numbers, as in any file without sums."""
    source, folder = tiny_gguf(tmp_path / "tiny.gguf", vocabulary=vocabulary), tmp_path / "checkpoint"
    folder.mkdir()
    whole = source.read_bytes()
    texts = after(whole, TOKENS) + 16
    header = [*range(texts), *range(whole.index(b"tokenizer.ggml.token_type"), after(whole, LAST) + 24)]
    places = random.Random(2)
    refused, rounds = 0, 400 if vocabulary is None else 40
    for turn in range(rounds):
        data = bytearray(whole)
        for _ in range(places.choice([1, 1, 2, 8])):
            at = places.choice(header) if turn % 8 else places.randrange(len(data))
            data[at] = places.choice([data[at] ^ 1 << places.randrange(8), places.randrange(256), 0, 255])
        if turn % 10 == 9:
            del data[places.randrange(len(data)) :]
        source.write_bytes(data)
        try:
            convert(source, folder, lambda *_: None)
            describe(folder)
        except ModelError:
            refused += 1
    print(f"{refused} of {rounds} refused")
    assert refused > rounds / 2

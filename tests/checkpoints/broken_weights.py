"""Weight files that are broken: their header, their tensors, or that they are something else."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

from tests.checkpoints import tiny
from tests.checkpoints.broken import (
    NORM,
    PAYLOAD,
    SECOND,
    SHARD,
    WEIGHTS,
    Broken,
    collector,
    drop_tensor,
    replace_tensor,
    shorten,
)
from tests.checkpoints.tiny import change_header

TABLE: list[Broken] = []
broken = collector(TABLE)


@broken("truncated header", "claims a header of .* bytes, and has 300 in all")
def _(folder: Path) -> None:
    shorten(folder / WEIGHTS, 300)


@broken("header cut inside its length", "has 5 bytes, too few for a header")
def _(folder: Path) -> None:
    shorten(folder / WEIGHTS, 5)


@broken("empty weight file", "is empty")
def _(folder: Path) -> None:
    shorten(folder / WEIGHTS, 0)


@broken("corrupt header", "is not valid JSON")
def _(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-len(tiny.unpacked(folder / WEIGHTS)[1]) - 40] = ord("}")
    (folder / WEIGHTS).write_bytes(content)


@broken("header of another encoding", "is not UTF-8 text")
def _(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[100] = 0xFF
    (folder / WEIGHTS).write_bytes(content)


@broken("header length beyond the file", "claims a header of 9223372036854775807 bytes")
def _(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**63 - 1).to_bytes(8, "little") + content[8:])


@broken("header of 200 MB", "a header of 200000000 bytes, far more than a model needs")
def _(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((200_000_000).to_bytes(8, "little") + content[8:])
    shorten(folder / WEIGHTS, 300_000_000)


@broken("header of millions of lists", "holds more than 200000 values")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(tiny.packed(b'{"x":[' + b"[]," * 2_000_000 + b"[]]}", b""))


@broken("header nested too deep", "JSON nested too deep")
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(tiny.packed(b'{"x":' + b"[" * 150_000, b""))


@broken("tensor named twice", f"names {NORM} twice")
def _(folder: Path) -> None:
    header, data = tiny.unpacked(folder / WEIGHTS)
    entry = json.dumps(header[NORM])
    text = json.dumps(header).removesuffix("}") + f', "{NORM}": {entry}}}'
    (folder / WEIGHTS).write_bytes(tiny.packed(text.encode(), data))


@broken("malformed entry", "has a malformed entry", NORM)
def _(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header[NORM].pop("shape"))


@broken("negative shape", "has a shape or offsets that are no sizes", NORM)
def _(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header[NORM].update(shape=[-64]))


@broken("unknown dtype", "has the dtype Q7, which the format does not know", NORM)
def _(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header[NORM].update(dtype="Q7"))


@broken("size of another shape", r"takes 128 bytes, and \[65\] in BF16 would not", NORM)
def _(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header[NORM].update(shape=[65]))


@broken("overlapping offsets", "overlaps", "model.layers.0.input_layernorm.weight")
def _(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header[NORM]["data_offsets"] = [64, 192]

    change_header(folder / WEIGHTS, overlap)


@broken("hole", "has a hole of 128 bytes before the tensor")
def _(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header.pop(NORM))


@broken("offsets beyond the data", "is truncated: it has .* bytes, and lm_head.weight is not whole")
def _(folder: Path) -> None:
    def move(header: dict[str, Any]) -> None:
        start, end = header["lm_head.weight"]["data_offsets"]
        header["lm_head.weight"].update(data_offsets=[start, end + 128], shape=[tiny.VOCABULARY + 1, tiny.DIM])

    change_header(folder / WEIGHTS, move)


@broken("truncated data", "is truncated: it has .* bytes, and .*embed_tokens.weight is not whole", SECOND, tiny.sharded)
def _(folder: Path) -> None:
    replace_tensor(folder / SECOND, "model.embed_tokens.weight", "BF16", (tiny.VOCABULARY, tiny.DIM))
    shorten(folder / SECOND, (folder / SECOND).stat().st_size - 1000)


@broken("bytes behind the end", "has 7 bytes behind its last tensor")
def _(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"garbage")


@broken("fresh and short: still being written", "is still being written: 20000 of .* bytes")
def _(folder: Path) -> None:
    shorten(folder / WEIGHTS, 20_000)


@broken("missing tensor", "is missing", "model.layers.1.mlp.up_proj.weight")
def _(folder: Path) -> None:
    drop_tensor(folder / WEIGHTS, "model.layers.1.mlp.up_proj.weight")


@broken("missing tensor, Mistral's layout", "is missing", "layers.1.feed_forward.w3.weight", tiny.mistral)
def _(folder: Path) -> None:
    drop_tensor(folder / "consolidated.safetensors", "layers.1.feed_forward.w3.weight")


@broken("extra tensors", r"tensors that such a model does not have \(a.bias, b.bias, c.bias and 1 more\)")
def _(folder: Path) -> None:
    for name in "abcd":
        replace_tensor(folder / WEIGHTS, f"{name}.bias", "BF16", (64,))


@broken("misshapen tensor", r"is \[64, 96\], and the config asks for \[96, 64\]", "model.layers.0.mlp.gate_proj.weight")
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, "model.layers.0.mlp.gate_proj.weight", "BF16", (64, 96))


@broken("wrong dtype", "is F64; supported are F32, F16 and BF16", NORM)
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, NORM, "F64", (64,))


@broken("int8 weights", "is I8, of a quantised checkpoint", "lm_head.weight")
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, "lm_head.weight", "I8", (tiny.VOCABULARY, tiny.DIM))


@broken("fp8 weights", "is F8_E4M3, of a quantised checkpoint", "lm_head.weight")
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, "lm_head.weight", "F8_E4M3", (tiny.VOCABULARY, tiny.DIM))


@broken("tensors of a quantiser", "is F16, of a quantised checkpoint", "q_proj.scales")
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, "model.layers.0.self_attn.q_proj.scales", "F16", (4, 64))


@broken("tensor in two shards", f"{NORM} is in both", SHARD, tiny.sharded)
def _(folder: Path) -> None:
    for shard in (SHARD, SECOND):
        replace_tensor(folder / shard, NORM, "BF16", (64,))


@broken("a pickle by another name", "is a pickle by another name; it was not opened", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": list(range(1000))}))


@broken("a zip of torch.save by another name", "is a zip archive, as torch.save writes", WEIGHTS)
def _(folder: Path) -> None:
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("archive/data.pkl", PAYLOAD)


@broken("a git-lfs pointer", "is a git-lfs pointer", WEIGHTS)
def _(folder: Path) -> None:
    sha = "0" * 64
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize 14483464192\n"
    (folder / WEIGHTS).write_text(text)


@broken("an HTML page", "is an HTML page, not weights", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html><title>Sign in</title></html>\n" * 20)


@broken("random bytes", "does not begin with a safetensors header", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((100).to_bytes(8, "little") + b"\x07" * 5000)


@broken("a GGUF by another name", "is a GGUF file by another name", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"GGUF\x03\0\0\0" + bytes(2000))


@broken("a header with a name of 7 MB", "is missing", "model.embed_tokens.weight")
def _(folder: Path) -> None:
    name = "\U0001f600" + "x" * 7_000_000
    (folder / WEIGHTS).write_bytes(tiny.safetensors({name: ("BF16", (1,))}))


@broken("tensor names that would drive a terminal", r"such a model does not have \(\\x1b\[2J\\n", WEIGHTS)
def _(folder: Path) -> None:
    replace_tensor(folder / WEIGHTS, "\x1b[2J\n", "BF16", (64,))


@broken("20,000 tensors and more", "holds more than 20000 tensors", "", tiny.sharded)
def _(folder: Path) -> None:
    for shard, first in zip(sorted(folder.glob("*.safetensors")), (0, 8_000, 16_000), strict=True):
        names = [f"t{number}" for number in range(first, first + 8_000)]
        shard.write_bytes(tiny.safetensors(dict.fromkeys(names, ("BF16", (0,)))))

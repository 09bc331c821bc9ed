"""Folders that are broken: config, index, links, tokenizer, or what is beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tests.checkpoints import tiny
from tests.checkpoints.broken import (
    INDEX,
    NORM,
    PAYLOAD,
    SECOND,
    WEIGHTS,
    Broken,
    change_index,
    collector,
    only,
    replace_tensor,
    shorten,
)
from tests.checkpoints.tiny import change_json

TABLE: list[Broken] = []
broken = collector(TABLE)


@broken("a downloader's marker: still being written", "is still being written: it holds", WEIGHTS + ".part")
def _(folder: Path) -> None:
    (folder / (WEIGHTS + ".part")).write_bytes(b"x" * 100)


@broken(
    "the hub's marker: still being written",
    "is still being written: it holds .cache/huggingface/download/",
    "abc.incomplete",
)
def _(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.incomplete").write_bytes(b"x")
    next(folder.glob("*.safetensors")).unlink()


@broken("quantised config", r"config is that of a quantised checkpoint \(gptq\)", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@broken("wrong architecture", "the architecture is Qwen2ForCausalLM", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["Qwen2ForCausalLM"])


@broken("no architecture", "the architecture is not given", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", architectures=None)


@broken("rope scaling", "uses rope scaling 'yarn'", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})


@broken("a mixture of experts", "uses moe", "params.json", tiny.mistral)
def _(folder: Path) -> None:
    change_json(folder / "params.json", moe={"num_experts": 8, "num_experts_per_tok": 2})


@broken("a key that nobody knows", "uses ffn_gate_kind 'gelu'", "params.json", tiny.mistral)
def _(folder: Path) -> None:
    change_json(folder / "params.json", ffn_gate_kind="gelu")


@broken("a size of 10**12", "the model's dim is 1000000000000", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", hidden_size=10**12)


@broken("16 million layers", "is missing", "model.layers.2.input_layernorm.weight")
def _(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=1 << 24)


@broken("a number of 5000 digits", "is not valid JSON", "config.json")
def _(folder: Path) -> None:
    text = (folder / "config.json").read_text().replace('"hidden_size": 64', f'"hidden_size": {"9" * 5000}')
    (folder / "config.json").write_text(text)


@broken("a size that is text", "the model's n_heads is '4'", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", num_attention_heads="4", head_dim=None)


@broken("a config that lacks a size", "lacks 'intermediate_size'", "config.json")
def _(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))


@broken("config absent", "but no config.json", WEIGHTS)
def _(folder: Path) -> None:
    (folder / "config.json").unlink()


@broken("params absent", "but no params.json", "consolidated.safetensors", tiny.mistral)
def _(folder: Path) -> None:
    (folder / "params.json").unlink()


@broken("config not JSON", "is not valid JSON", "params.json", tiny.mistral)
def _(folder: Path) -> None:
    (folder / "params.json").write_text("dim: 64\n")


@broken("config no object", "holds no JSON object", "config.json")
def _(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@broken("config nested too deep", "JSON nested too deep", "config.json")
def _(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 1_000_000)


@broken("config of 50 MB", "has 50000000 bytes, and at most", "config.json")
def _(folder: Path) -> None:
    shorten(folder / "config.json", 50_000_000)


@broken("config a pipe", "is no regular file", "config.json")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@broken("config a folder", "is no regular file", "params.json", tiny.mistral)
def _(folder: Path) -> None:
    (folder / "params.json").unlink()
    (folder / "params.json").mkdir()


@broken("config a device", "is a symlink out of its folder, to /dev/zero", "config.json")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@broken("weights a pipe", "is no regular file", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@broken("a side file a pipe", "is no regular file", "generation_config.json")
def _(folder: Path) -> None:
    os.mkfifo(folder / "generation_config.json")


@broken("missing shard", "lacks the shard", SECOND, tiny.sharded)
def _(folder: Path) -> None:
    (folder / SECOND).unlink()


@broken("index names a tensor that its shard does not hold", "which does not hold it", SECOND, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({"model.layers.0.input_layernorm.weight": SECOND}))


@broken("index without a map", "has no weight_map", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


@broken("index with a shard that is a number", "a shard that is no file name", NORM, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NORM: 7}))


@broken("index not JSON", "is not valid JSON", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    shorten(folder / INDEX, 200)


@broken("path traversal in an index", r"points outside its folder, to \.\./other/x.safetensors", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NORM: "../other/x.safetensors"}))


@broken("absolute path in an index", "points outside its folder, to /etc/x.safetensors", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NORM: "/etc/x.safetensors"}))


@broken("Windows path in an index", "points outside its folder, to C:", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NORM: "C:x.safetensors"}))


@broken("a shard's name that a terminal obeys", r"names the shard model\\x1b\[2J", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    name = "model\x1b[2J\u202e.safetensors"
    (folder / SECOND).rename(folder / name)
    change_index(folder, lambda weight_map: weight_map.update({NORM: name}))


@broken("a shard's name of 240 characters", "which is no plain file name", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({NORM: "x" * 228 + ".safetensors"}))


@broken("an architecture that a terminal obeys", r"the architecture is \\x1b\]0;", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["\x1b]0;title\x07" + "x" * 5000])


@broken("a partial download that a terminal obeys", r"it holds x\\x1b\[2J\.part", ".part")
def _(folder: Path) -> None:
    (folder / "x\x1b[2J.part").write_bytes(b"x")


@broken("architecture and model_type that differ", "the model_type llama, which contradict", "config.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", model_type="llama")


@broken("generation settings no object", "holds no JSON object", "generation_config.json")
def _(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[2]")


@broken("generation settings not JSON", "is not valid JSON", "generation_config.json")
def _(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")


@broken("an adapter", "is an adapter", "adapter_config.json")
def _(folder: Path) -> None:
    only(folder, "adapter_model.safetensors", b"")
    (folder / "adapter_config.json").write_text("{}")


@broken("index names a pickle", "names pytorch_model.bin, which is no safetensors file", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(PAYLOAD)
    change_index(folder, lambda weight_map: weight_map.update({NORM: "pytorch_model.bin"}))


@broken("symlink out of the folder", "is a symlink out of its folder, to .*-outside", WEIGHTS)
def _(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


@broken("shard a symlink out of the folder", "is a symlink out of its folder, to .*-outside", SECOND, tiny.sharded)
def _(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shutil.move(folder / SECOND, outside)
    (folder / SECOND).symlink_to(Path("..", outside.name))


@broken("symlink to nothing", "is a symlink to nothing", WEIGHTS)
def _(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("gone.safetensors")


@broken("symlink to itself", "is a symlink to nothing", "config.json")
def _(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


@broken("pickles only", "holds pickled weights only", "pytorch_model.bin")
def _(folder: Path) -> None:
    only(folder, "pytorch_model.bin", PAYLOAD)


@broken("GGUF only", "holds GGUF weights only", "mistral-nb pull")
def _(folder: Path) -> None:
    only(folder, "model.Q8_0.gguf", b"GGUF\x03\0\0\0" + bytes(2000))


@broken("GGUF whose name a shell obeys", r"mistral-nb pull '.*/a b & id\.gguf'", "mistral-nb pull")
def _(folder: Path) -> None:
    only(folder, "a b & id.gguf", b"GGUF")


@broken("no weights", "holds no weights", "model.safetensors")
def _(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@broken("tokenizer absent", "holds no tokenizer.json and no tokenizer.model", "tokenizer.json")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@broken("tekken only", "has only a tekken tokenizer", "tekken.json", tiny.mistral)
def _(folder: Path) -> None:
    (folder / "tokenizer.model.v3").unlink()
    (folder / "tekken.json").write_text("{}")


@broken("tokenizer of a larger vocabulary", "it is the tokenizer of another model", "tokenizer.json")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tiny.json_tokenizer(500))


@broken("tokenizer of a smaller vocabulary", "it is the tokenizer of another vocabulary", "tokenizer.json")
def _(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=1000)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        replace_tensor(folder / WEIGHTS, name, "BF16", (1000, tiny.DIM))


@broken("tokenizer of another kind", "holds a 'Unigram' model, and supported is BPE", "tokenizer.json")
def _(folder: Path) -> None:
    change_json(folder / "tokenizer.json", model={"type": "Unigram", "vocab": [["a", 0.0]]})


@broken("tokenizer without tokens", "is no tokenizer file", "tokenizer.json")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


@broken(
    "damaged SentencePiece model", "is no SentencePiece model, or a damaged one", "tokenizer.model.v3", tiny.mistral
)
def _(folder: Path) -> None:
    path = folder / "tokenizer.model.v3"
    shorten(path, path.stat().st_size // 2)


@broken("Mistral's tokenizer of a later version", "none of v1 to v3", "tokenizer.json")
def _(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    token = next(token for token in data["added_tokens"] if token["content"] == "</s>")
    data["added_tokens"].append({**token, "id": 383, "content": "[SYSTEM_PROMPT]"})
    (folder / "tokenizer.json").write_text(json.dumps(data))


@broken("template not text", "is not UTF-8 text", "chat_template.jinja")
def _(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")


@broken("a SentencePiece model of empty fields", "more than 500000 fields", "tokenizer.model.v3", tiny.mistral)
def _(folder: Path) -> None:
    (folder / "tokenizer.model.v3").write_bytes(b"\x0a\0" * 8_000_000)


@broken("a SentencePiece model of control tokens", "more than 20000 control tokens", "tokenizer.model.v3", tiny.mistral)
def _(folder: Path) -> None:
    piece = b"\x0a\x01x" + b"\x18\x03" * 14
    (folder / "tokenizer.model.v3").write_bytes((b"\x0a" + bytes([len(piece)]) + piece) * 400_000)


@broken("a tokenizer of 2 million lists", "is no tokenizer file", "tokenizer.json")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model":[' + "[]," * 990_000 + "0]}")


@broken("a tokenizer of 8 million lists", "holds more than 2000000 values", "tokenizer.json")
def _(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"x":[' + "[]," * 8_000_000 + "0]}")


@broken("thousands of shards", "names 5001 shards, and at most 1000 make sense", INDEX, tiny.sharded)
def _(folder: Path) -> None:
    change_index(folder, lambda weight_map: weight_map.update({f"{n}": f"{n}.safetensors" for n in range(4998)}))


@broken("a token id of 4300 digits", "token ids that are no whole numbers below", "tokenizer.json")
def _(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"id":0,', f'"id":{"9" * 4300},', 1))

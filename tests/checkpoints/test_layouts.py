"""Whole checkpoints in every layout and from every writer: found, opened, described; and what a change of them does."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from mistral_nb.checkpoints import Checkpoint, ModelArgs, describe, find_files, open_checkpoint
from mistral_nb.checkpoints.layout import find_weights
from mistral_nb.errors import ModelError
from tests.checkpoints import tiny
from tests.checkpoints.broken import LONG_AGO, WEIGHTS, drop_tensor, replace_tensor

LAYOUTS: list[Callable[[Path], Path]] = [tiny.hugging_face, tiny.sharded, tiny.mistral]
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_each_layout_gives_the_same_tensors(make: Callable[[Path], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "checkpoint"))
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
        name: shape for name, (_, shape) in tiny.mistral_tensors().items()
    }
    assert checkpoint.interleaved == (make is tiny.mistral)
    assert checkpoint.bytes == sum(path.stat().st_size for path in checkpoint.files if path.suffix != ".json") - sum(
        tensor.start for tensor in first_of_each_file(checkpoint).values()
    )
    assert checkpoint.args == ModelArgs(64, 2, 4, 2, 16, 96, tiny.VOCABULARY, 1e-5, 1e6, checkpoint.args.context)
    assert checkpoint.args.context == (32768 if make is tiny.mistral else 2048)


def first_of_each_file(checkpoint: Checkpoint) -> dict[Path, Any]:
    first: dict[Path, Any] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.file not in first or tensor.start < first[tensor.file].start:
            first[tensor.file] = tensor
    return first


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_the_places_are_those_of_the_safetensors_library(make: Callable[[Path], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "checkpoint"))
    hugging_face = dict(zip(tiny.mistral_tensors(), tiny.hugging_face_tensors(), strict=True))
    for name, tensor in checkpoint.tensors.items():
        with safe_open(tensor.file, framework="pt") as file:
            expected = file.get_tensor(name if make is tiny.mistral else hugging_face[name])
        content = tensor.file.read_bytes()[tensor.start : tensor.end]
        assert content == expected.view(torch.uint8).numpy().tobytes()
        assert tensor.shape == tuple(expected.shape)


def test_descriptions(tmp_path: Path) -> None:
    single, sharded, mistral = (describe(make(tmp_path / make.__name__)) for make in LAYOUTS)
    weights = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for _, shape in tiny.mistral_tensors().values())
    assert single.parameters == sharded.parameters == mistral.parameters == weights
    assert [one.architecture for one in (single, sharded, mistral)] == ["Mistral"] * 3
    assert [one.layout for one in (single, sharded, mistral)] == [
        "safetensors, 1 file",
        "safetensors, 3 files",
        "Mistral's consolidated safetensors, 1 file",
    ]
    assert [one.template for one in (single, sharded, mistral)] == ["Mistral v1", "Mistral v1", "Mistral v3"]
    assert single.tokenizer == f"BPE, {tiny.VOCABULARY} tokens (tokenizer.json)"
    assert mistral.tokenizer.endswith("tokens (tokenizer.model.v3)")
    assert mistral.tokenizer.startswith("SentencePiece, ")
    assert single.dtype == "BF16"
    assert single.name == "hugging_face"
    for one in (single, sharded, mistral):
        assert one.bytes == sum(path.stat().st_size for path in one.folder.iterdir())


def test_the_embedded_model(embedded: Path) -> None:
    model = describe(embedded)
    assert (model.architecture, model.layout, model.dtype) == ("Llama", "safetensors, 1 file", "F32")
    assert model.parameters == 134_515_008
    assert model.checkpoint.bytes == 4 * model.parameters
    assert model.tokenizer == "BPE, 49152 tokens (tokenizer.json)"
    assert model.template == "chat template (Jinja), 368 characters"
    assert model.licence
    assert model.licence.startswith("Apache")
    assert model.args.tied_embeddings
    assert "output.weight" not in model.checkpoint.tensors


WRITTEN = {
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "mistral, tied, with a window": (
        MistralForCausalLM,
        MistralConfig(**SIZES, sliding_window=32, tie_word_embeddings=True),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_theta=5e5)),
    "llama, tied, wide heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_what_transformers_writes(kind: str, shard: str, tmp_path: Path) -> None:
    cls, config = WRITTEN[kind]
    model: PreTrainedModel = cls(config)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    (tmp_path / "tokenizer.json").write_text(tiny.json_tokenizer())
    described = describe(tmp_path)
    state = model.state_dict()
    tied = config.tie_word_embeddings
    assert described.parameters == sum(
        tensor.numel() for name, tensor in state.items() if not (tied and name == "lm_head.weight")
    )
    assert (len(find_files(tmp_path).weights) > 2) == (shard == "60KB")
    args = described.args
    assert args.tied_embeddings == tied
    assert args.sliding_window == getattr(config, "sliding_window", None)
    assert args.head_dim == model.model.layers[0].self_attn.head_dim
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert args.rope_theta == rope["rope_theta"]
    for name, tensor in described.checkpoint.tensors.items():
        if name.endswith("attention.wk.weight"):
            content = tensor.file.read_bytes()[tensor.start : tensor.end]
            own = state[f"model.layers.{name.split('.')[1]}.self_attn.k_proj.weight"]
            assert content == own.numpy().tobytes()


def test_what_is_of_no_use_is_passed_over(tmp_path: Path) -> None:
    """The buffers that old versions of transformers saved."""
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    for layer in range(tiny.LAYERS):
        replace_tensor(folder / WEIGHTS, f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", "F32", (8,))
    assert len(open_checkpoint(folder).tensors) == len(tiny.mistral_tensors())


@pytest.mark.parametrize("make", [tiny.hugging_face, tiny.mistral], ids=lambda make: make.__name__)
def test_an_output_of_its_own_is_used_whatever_the_config_says(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """As transformers does since version 5: a config that ties it does not make it another one."""
    folder = make(tmp_path / "checkpoint")
    own = make is tiny.mistral
    config, setting = ("params.json", "tied_embeddings") if own else ("config.json", "tie_word_embeddings")
    tiny.change_json(folder / config, **{setting: True})
    untied = open_checkpoint(folder)
    assert not untied.args.tied_embeddings
    assert untied.tensors["output.weight"].start != untied.tensors["tok_embeddings.weight"].start
    drop_tensor(find_files(folder).weights[0], "output.weight" if own else "lm_head.weight")
    tied = open_checkpoint(folder)
    assert tied.args.tied_embeddings
    assert tied.tensors.keys() == untied.tensors.keys() - {"output.weight"}


def test_several_dtypes(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    replace_tensor(folder / WEIGHTS, "model.norm.weight", "F32", (64,))
    replace_tensor(folder / WEIGHTS, "lm_head.weight", "F16", (tiny.VOCABULARY, 64))
    assert describe(folder).dtype == "BF16, F16, F32"


def test_a_header_without_padding(tmp_path: Path) -> None:
    """As early writers left it: the data then begin anywhere."""
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    header, data = tiny.unpacked(folder / WEIGHTS)
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 8)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert next(iter(open_checkpoint(folder).tensors.values())).start % 2 == 1


def snapshot(top: Path) -> Path:
    """A checkpoint as the Hugging Face cache keeps it: files are symlinks into the repository's blobs."""
    plain = tiny.sharded(top / "plain")
    repository = top / "hub" / "models--org--tiny"
    made = repository / "snapshots" / "0123abcd"
    made.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(plain.iterdir()):
        shutil.move(path, repository / "blobs" / f"{number:040}")
        (made / path.name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    return made


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    model = describe(snapshot(tmp_path))
    assert model.name == "org/tiny"
    assert model.layout == "safetensors, 3 files"


def test_a_snapshot_whose_link_leads_elsewhere(tmp_path: Path) -> None:
    made = snapshot(tmp_path)
    repository = made.parent.parent
    other = repository.parent / "models--org--other" / "blobs"
    shutil.move(repository / "blobs", other.parent / "blobs")
    (repository / "blobs").symlink_to(other)
    with pytest.raises(ModelError, match="is a symlink out of its folder"):
        describe(made)


def test_a_link_inside_the_folder_and_a_linked_folder(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (folder / WEIGHTS).rename(folder / "fine-tuned.safetensors")
    (folder / WEIGHTS).symlink_to("fine-tuned.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert describe(tmp_path / "link").name == "link"


def test_both_layouts_in_one_folder(tmp_path: Path) -> None:
    """As mistralai's repositories have them; a download of Mistral's files alone brings config.json too."""
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    for path in tiny.mistral(tmp_path / "other").iterdir():
        shutil.move(path, folder)
    assert find_files(folder).layout == "safetensors"
    assert find_files(folder).tokenizer.name == "tokenizer.model.v3"
    (folder / WEIGHTS).unlink()
    files = find_files(folder)
    assert (files.layout, files.config.name, files.weights) == (
        "mistral",
        "params.json",
        (folder / "consolidated.safetensors",),
    )
    assert open_checkpoint(folder).interleaved


def test_sharded_consolidated(tmp_path: Path) -> None:
    folder = tiny.mistral(tmp_path / "checkpoint")
    everything = list(tiny.mistral_tensors().items())
    (folder / "consolidated.safetensors").unlink()
    weight_map = {}
    for number, part in enumerate((everything[:10], everything[10:])):
        name = f"consolidated-0000{number + 1}-of-00002.safetensors"
        (folder / name).write_bytes(tiny.safetensors(dict(part)))
        weight_map |= dict.fromkeys(dict(part), name)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert describe(folder).layout == "Mistral's consolidated safetensors, 2 files"


def test_a_checkpoint_without_a_tokenizer_can_be_opened_but_not_described(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    assert open_checkpoint(folder).tensors
    for whole in (find_files, describe):
        with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
            whole(folder)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert describe(folder)


@pytest.mark.parametrize("change", ["grown", "touched", "gone"])
def test_files_that_change_after_opening(change: str, tmp_path: Path) -> None:
    folder = tiny.sharded(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(folder)
    checkpoint.check_unchanged()
    shard = find_files(folder).weights[1]
    if change == "grown":
        with shard.open("ab") as file:
            file.write(b"x")
    elif change == "touched":
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    else:
        shard.unlink()
    with pytest.raises(ModelError, match=r"cannot be read" if change == "gone" else r"was changed while it was"):
        checkpoint.check_unchanged()


def test_a_fresh_file_is_truncated_a_minute_later(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    os.truncate(folder / WEIGHTS, 50_000)
    with pytest.raises(ModelError, match=r"is still being written: 50000 of \d+ bytes"):
        open_checkpoint(folder)
    before = time.time() - 61
    os.utime(folder / WEIGHTS, (before, before))
    with pytest.raises(ModelError, match=r"is truncated: it has 50000 of \d+ bytes"):
        open_checkpoint(folder)
    later = time.time() + 1000
    os.utime(folder / WEIGHTS, (later, later))
    with pytest.raises(ModelError, match=r"is truncated: it has 50000 of \d+ bytes"):
        open_checkpoint(folder)


def test_a_download_into_the_hub_cache_that_has_not_ended(tmp_path: Path) -> None:
    made = snapshot(tmp_path)
    growing = made.parent.parent / "blobs" / "abc.incomplete"
    growing.write_bytes(b"x")
    told = r"is still being written: it holds \.\./\.\./blobs/abc\.incomplete"
    for read in (find_files, find_weights):
        with pytest.raises(ModelError, match=told):
            read(made)
    os.utime(growing, (LONG_AGO, LONG_AGO))
    find_files(made)  # everything is there: that download was given up
    (made / "config.json").unlink()
    with pytest.raises(ModelError, match=told):
        find_files(made)


@pytest.mark.parametrize("lacks", ["", "tokenizer.json", "config.json", WEIGHTS])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_download_of_the_hubs_client_that_has_not_ended(tmp_path: Path, lacks: str, fresh: bool) -> None:
    """Any file may be the one that is not there yet, also one that a checkpoint may do without."""
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    downloads = folder / ".cache" / "huggingface" / "download"
    downloads.mkdir(parents=True)
    (downloads / "abc.incomplete").write_bytes(b"x")
    if not fresh:
        os.utime(downloads / "abc.incomplete", (LONG_AGO, LONG_AGO))
    if lacks:
        (folder / lacks).unlink()
    if lacks or fresh:
        with pytest.raises(ModelError, match=r"holds \.cache/huggingface/download/abc\.incomplete; wait for"):
            describe(folder)
    else:
        assert describe(folder).template == "Mistral v1"


def test_licences(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    assert describe(folder).licence is None
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\nlicense: none\n")
    assert describe(folder).licence == "apache-2.0"
    (folder / "LICENSE").write_text("\n    # Apache License\n  Version 2.0\n")
    assert describe(folder).licence == "Apache License"
    (folder / "mistral_nb.json").write_text('{"licence": "Apache-2.0"}')
    assert describe(folder).licence == "Apache-2.0"
    (folder / "mistral_nb.json").write_text(json.dumps({"licence": "\x1b[2J" + "x" * 500}))
    licence = describe(folder).licence
    assert licence is not None
    assert licence.isprintable()
    assert len(licence) < 90
    (folder / "mistral_nb.json").write_text("not ours")
    assert describe(folder).licence == "Apache License"


def test_files_that_the_engine_does_not_read_may_be_anything(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (folder / "special_tokens_map.json").write_text("[")
    assert describe(folder)


def test_a_licence_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (tmp_path / "secret").write_text("a secret")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    assert describe(folder).licence is None


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="what a process reads is told by /proc")
def test_of_a_7b_model_next_to_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral-7B's shapes in a file of holes, 14.5 GB that take no room."""
    monkeypatch.setattr(tiny, "LAYERS", 32)
    dim, hidden, kv, vocabulary = 4096, 14336, 1024, 32768
    shapes = {
        **tiny.SHAPES,
        **dict.fromkeys(("tok_embeddings", "output"), (vocabulary, dim)),
        **dict.fromkeys(("norm", "attention_norm", "ffn_norm"), (dim,)),
        **dict.fromkeys(("attention.wq", "attention.wo"), (dim, dim)),
        **dict.fromkeys(("attention.wk", "attention.wv"), (kv, dim)),
        **dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (hidden, dim)),
        "feed_forward.w2": (dim, hidden),
    }
    monkeypatch.setattr(tiny, "SHAPES", shapes)
    header, size = tiny.laid_out(tiny.mistral_tensors())
    monkeypatch.undo()
    folder = tiny.mistral(tmp_path / "checkpoint")
    file = folder / "consolidated.safetensors"
    file.write_bytes(tiny.packed(header, b""))
    os.truncate(file, file.stat().st_size + size)
    sizes = {"dim": dim, "hidden_dim": hidden, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128}
    tiny.change_json(folder / "params.json", **sizes, vocab_size=vocabulary)
    before = bytes_read()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.bytes == 14_496_047_104
    assert bytes_read() - before < 50_000_000


def bytes_read() -> int:
    """By this process, from files and else, since it began."""
    return int(Path("/proc/self/io").read_text().split()[1])

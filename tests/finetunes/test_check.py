"""What an adapter's folder is found to be, and every problem that it may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.checkpoints.adapter_tensors import MODULES
from mistral_nb.errors import AdapterError, ModelError
from mistral_nb.finetunes.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb.finetunes.check import AdapterInfo, check, fixed_copy, inspect
from mistral_nb.finetunes.rules import MISTRAL_7B
from tests.finetunes.adapters import CONFIG, Shapes, matrices, write_adapter, write_weights

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def problems(folder: Path, *, for_cloudflare: bool = True) -> tuple[str, ...]:
    """What makes the adapter unfit; each problem is in the message too."""
    try:
        check(folder, for_cloudflare=for_cloudflare)
    except AdapterError as error:
        return tuple(problem for problem in error.problems if problem in str(error)) or ("no problems",)
    return ()


def test_what_an_adapter_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "tone")
    (folder / "README.md").write_text("a card")
    per_layer = 2 * 8 * 4096 + 8 * (4096 + 1024)
    assert check(folder, for_cloudflare=True) == AdapterInfo(
        name="tone",
        base_model="mistralai/Mistral-7B-Instruct-v0.2",
        model_type="mistral",
        rank=8,
        alpha=16.0,
        target_modules=("q_proj", "v_proj"),
        dtype="BF16",
        parameters=2 * per_layer,
        bytes=(folder / WEIGHTS_FILE).stat().st_size,
        files=("README.md", CONFIG_FILE, WEIGHTS_FILE),
        warnings=(),
    )


def test_every_module_of_every_layer(tmp_path: Path) -> None:
    config = {"r": 16, "target_modules": "all-linear"}
    info = check(write_adapter(tmp_path / "a", config, matrices(tuple(MODULES), 16, 32), "F16"), for_cloudflare=True)
    assert info.target_modules == tuple(MODULES)
    assert info.rank == 16
    assert len(info.warnings) == 1
    assert "the rank is 16: Cloudflare's newer documents allow 32, the older ones 8" in info.warnings[0]


def test_a_folder_that_the_system_does_not_show_is_told() -> None:
    with pytest.raises(ModelError, match=r"cannot be read|is no folder"):
        check(Path("x" * 300), for_cloudflare=True)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": ...}, 'add "model_type": "mistral"'),
        ({"model_type": "llama"}, "for Mistral-7B it must be mistral"),
        ({"model_type": "qwen2"}, "Cloudflare takes mistral, gemma, llama"),
        ({"peft_type": "LOHA"}, "LORA alone is applied"),
        ({"task_type": "SEQ_CLS"}, "train for CAUSAL_LM"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 4}, "r is 4, and the matrices have rank 8"),
        ({"lora_alpha": ...}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"bias": "lora_only"}, "biases are not applied"),
        ({"use_dora": True}, "use_dora is set: DoRA"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks that differ by module"),
        ({"alpha_pattern": {"q_proj": 4}}, "scales that differ by module"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"layer_replication": [[0, 4]]}, "replicated layers"),
        ({"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "target_modules names embed_tokens"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "names o_proj, which have no matrices"),
        ({"target_modules": ["q_proj"]}, "v_proj have matrices"),
        ({"base_model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.3"}, "train on one of those"),
    ],
)
def test_a_configuration_that_is_refused(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    found = problems(write_adapter(tmp_path / "a", config))
    assert len(found) == 1, found
    assert problem in found[0]


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"base_model_name_or_path": None}, "the model that it was trained on is a Mistral-7B"),
        ({"base_model_name_or_path": "/home/me/\x1b[2Jmodel"}, r"whether /home/me/\x1b[2Jmodel is a Mistral-7B"),
        ({"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}, "trained on v0.1"),
        ({"base_model_name_or_path": "unsloth/mistral-7b-v0.2-bnb-4bit"}, "not on the Instruct model"),
        ({"use_rslora": True}, "lora_alpha / sqrt(r)"),
    ],
)
def test_a_doubt_is_a_warning(tmp_path: Path, config: dict[str, Any], warning: str) -> None:
    (found,) = check(write_adapter(tmp_path / "a", config), for_cloudflare=True).warnings
    assert warning in found


@pytest.mark.parametrize("base", ["mistralai/Mistral-7B-Instruct-v0.2", "unsloth/mistral-7b-instruct-v0.2-bnb-4bit"])
def test_the_base_model_by_another_name(tmp_path: Path, base: str) -> None:
    assert not check(write_adapter(tmp_path / "a", {"base_model_name_or_path": base}), for_cloudflare=True).warnings


def without(name: str) -> Shapes:
    return {each: shape for each, shape in matrices().items() if each != name}


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        ({}, "no LoRA matrix"),
        (without(A), "0.self_attn.q_proj has no lora_A"),
        (without(B), "0.self_attn.q_proj has no lora_B"),
        ({**matrices(), B: (4096, 4)}, "lora_A of [8, 4096] and lora_B of [4096, 4], which are no pair"),
        ({**matrices(), A: (8, 4096, 1)}, "are no pair"),
        ({**matrices(), A: (4, 4096), B: (4096, 4)}, "different ranks (4, 8)"),
        ({**matrices(), A: (8, 2048)}, "goes with no other module"),
        ({**matrices(), A.replace("A.weight", "A.default.weight"): (8, 4096)}, "save_pretrained"),
        ({**matrices(), A.replace("lora_A.weight", "lora_magnitude_vector"): (4096,)}, "DoRA"),
        ({**matrices(), A.replace("lora_A.weight", "bias"): (4096,)}, "is a bias"),
        ({**matrices(), "base_model.model.lm_head.weight": (32000, 4096)}, "no update of a linear module"),
        ({**matrices(), "base_model.model.model.embed_tokens.lora_embedding_A": (8, 32000)}, "no update of a linear"),
        ({**matrices(), A.replace("self_attn.q_proj", "block_sparse_moe.gate"): (8, 4096)}, "not known here"),
        ({**matrices(), "layers.0.attention.wq.lora_A.weight": (8, 4096)}, "Mistral's own tools"),
        ({**matrices(), "model.layers.0.self_attn.q_proj.weight": (8, 4096)}, "is no LoRA matrix"),
    ],
)
def test_matrices_that_are_refused(tmp_path: Path, shapes: Shapes, problem: str) -> None:
    folder = write_adapter(tmp_path / "a", {"target_modules": "all-linear"}, shapes)
    for for_cloudflare in (True, False):
        found = problems(folder, for_cloudflare=for_cloudflare)
        assert any(problem in each for each in found), found


def test_the_same_problem_in_many_layers_is_told_once(tmp_path: Path) -> None:
    (found,) = problems(
        write_adapter(
            tmp_path / "a",
            None,
            {
                name: shape
                for name, shape in matrices(layers=32).items()
                if "lora_B" not in name or "q_proj" not in name
            },
        )
    )
    assert "0.self_attn.q_proj has no lora_B; save the adapter again (and 31 more like it)" in found


def test_a_dtype_that_is_no_number_of_a_matrix(tmp_path: Path) -> None:
    (found,) = problems(write_adapter(tmp_path / "a", dtype="I8"))
    assert "the dtype I8" in found


def test_the_adapter_of_another_model(tmp_path: Path) -> None:
    features = {"dim": 576, "q": 576, "kv": 192, "hidden": 1536}
    folder = write_adapter(tmp_path / "a", None, matrices(tuple(CONFIG["target_modules"]), features=features))
    (found,) = problems(folder)
    assert "do not fit Mistral-7B (features: 576 and not 4096, 576 and not 4096, 192 and not 1024)" in found
    assert check(folder, for_cloudflare=False).warnings == (), "here it may be for that other model"
    (found,) = problems(write_adapter(tmp_path / "b", None, matrices(layers=33)))
    assert "33 layers" in found


@pytest.mark.parametrize(
    ("rank", "layers", "dtype", "problem", "warning"),
    [
        (33, 2, "BF16", "the rank is 33, and Cloudflare takes at most 32", ""),
        (32, 32, "BF16", "", "is 168 MB: Cloudflare's newer documents allow 300 MB"),
        (32, 32, "F32", "or save it in 16 bits", ""),
    ],
)
def test_limits(tmp_path: Path, rank: int, layers: int, dtype: str, problem: str, warning: str) -> None:
    shapes = matrices(tuple(MODULES), rank, layers)
    folder = write_adapter(tmp_path / "a", {"r": rank, "target_modules": list(MODULES)}, shapes, dtype)
    assert problems(folder, for_cloudflare=False) == (), "the limits are Cloudflare's alone"
    found = problems(folder)
    assert len(found) == bool(problem)
    assert not problem or problem in found[0]
    if warning:
        assert any(warning in each for each in check(folder, for_cloudflare=True).warnings)


def test_all_problems_at_once(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "a", {"model_type": ..., "r": 64, "use_dora": True}, {**matrices(rank=64), A: (64, 2048)}
    )
    with pytest.raises(AdapterError) as caught:
        check(folder, for_cloudflare=True)
    assert len(caught.value.problems) >= 4
    assert str(caught.value).count("\n  - ") == len(caught.value.problems)


def rename(folder: Path, old: str, new: str) -> None:
    (folder / new).parent.mkdir(exist_ok=True)
    (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (WEIGHTS_FILE, "adapter_model.bin", "is a pickle"),
        (WEIGHTS_FILE, "pytorch_lora_weights.safetensors", "if pytorch_lora_weights.safetensors is the adapter"),
        (WEIGHTS_FILE, "Adapter_Model.safetensors", "must be called adapter_model.safetensors"),
        (WEIGHTS_FILE, "checkpoint-500/adapter_model.safetensors", "there is one in checkpoint-500"),
        (WEIGHTS_FILE, "notes.txt", "save_pretrained writes it"),
        (CONFIG_FILE, "config.json", "beside the weights"),
    ],
)
def test_other_names(tmp_path: Path, old: str, new: str, problem: str) -> None:
    folder = write_adapter(tmp_path / "a")
    rename(folder, old, new)
    (found,) = problems(folder)
    assert problem in found
    with pytest.raises(AdapterError, match="adapter_"):
        inspect(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"r": 8' + b" " * 2_000_000 + b"}", b"\xff\xfe"])
def test_a_configuration_that_is_none(tmp_path: Path, content: bytes) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / CONFIG_FILE).write_bytes(content)
    (found,) = problems(folder)
    assert CONFIG_FILE in found
    assert str(tmp_path) not in found, "the folder is named once"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x80\x02 a pickle", b"version https://git-lfs", None])
def test_weights_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / WEIGHTS_FILE
    if content is None:
        os.truncate(weights, weights.stat().st_size - 1)
        os.utime(weights, (0, 0))
    else:
        weights.write_bytes(content)
    (found,) = problems(folder)
    assert WEIGHTS_FILE in found


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a privilege there")
def test_what_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "hunter2"}')
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to(secret)
    (found,) = problems(folder)
    assert "is a symlink out of its folder" in found
    (folder / CONFIG_FILE).unlink()
    os.mkfifo(folder / CONFIG_FILE)
    (found,) = problems(folder)
    assert CONFIG_FILE in found


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(AdapterError, match="is no folder"):
            check(path, for_cloudflare=True)


def test_inspect_tells_what_is_there_whether_it_fits_or_not(tmp_path: Path) -> None:
    info = inspect(write_adapter(tmp_path / "a", {"model_type": ..., "r": 64}, matrices(rank=64)))
    assert (info.rank, info.model_type) == (64, None)
    assert inspect(write_adapter(tmp_path / "b", {"lora_alpha": 10**400})).alpha is None


def test_a_mended_copy_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"model_type": ...})
    before = (folder / CONFIG_FILE).read_bytes()
    info = fixed_copy(folder, tmp_path / "new" / "mended")
    assert info.model_type == "mistral"
    assert check(tmp_path / "new" / "mended", for_cloudflare=True) == info
    assert (folder / CONFIG_FILE).read_bytes() == before
    mended = json.loads((tmp_path / "new" / "mended" / CONFIG_FILE).read_text())
    assert mended == {**json.loads(before), "model_type": "mistral"}
    with pytest.raises(AdapterError, match="is there already"):
        fixed_copy(folder, tmp_path / "new" / "mended")


def test_what_is_no_mistral_is_not_called_one(tmp_path: Path) -> None:
    features = {**MISTRAL_7B, "kv": 4096}
    folder = write_adapter(tmp_path / "a", {"model_type": ...}, matrices(features=features))
    with pytest.raises(AdapterError, match="do not fit Mistral-7B"):
        fixed_copy(folder, tmp_path / "mended")
    assert not (tmp_path / "mended").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_copy_that_finds_no_room_is_not_left_behind(tmp_path: Path) -> None:
    import resource

    folder, target = write_adapter(tmp_path / "tone", {"model_type": ...}), tmp_path / "mended"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(AdapterError, match=r"mended cannot be made \(File too large\); check the disk"):
            fixed_copy(folder, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not target.exists()


def test_the_checks_need_no_torch_and_no_http() -> None:
    modules = "mistral_nb.finetunes.check, mistral_nb.finetunes.store"
    code = f"import sys, {modules}\nprint({{'torch', 'httpx'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_file_of_zeros_is_whole(tmp_path: Path) -> None:
    """The makers here write what the safetensors package reads."""
    safetensors = pytest.importorskip("safetensors")
    write_weights(tmp_path / WEIGHTS_FILE, matrices())
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "np") as file:
        assert set(file.keys()) == set(matrices())

"""Pulls from a hub: what is chosen, what is refused before its weights are fetched, tokens, and being offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import models
from mistral_nb.errors import MissingDependency, ModelError, PullError
from mistral_nb.models.manifest import read_manifest
from tests.models.hub_server import LISTING, TOKEN, Fault, HubServer, Repo, header_of
from tests.models.pulls import left_behind
from tests.models.tiny_repos import CONFIG, consolidated, sharded

SITE = r"http://127.0.0.1:\d+"
LOGIN = rf"log in with `hf auth login`, or set HF_TOKEN, with a token from {SITE}/settings/tokens"


WRONG = "secret-of-another-kind"


def use_token(monkeypatch: pytest.MonkeyPatch, token: str = TOKEN) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", token)


def weights_asked_for(hub: HubServer) -> list[str]:
    return [each.what for each in hub.seen if each.what.endswith(("tensors", ".bin", ".gguf"))]


@pytest.mark.parametrize(
    ("hub_id", "weights"),
    [
        ("org/sharded", [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]),
        ("org/single", ["model.safetensors"]),
        ("org/mistral", ["consolidated.safetensors"]),
        ("org/both", ["model.safetensors"]),
    ],
)
def test_the_files_of_a_checkpoint_are_fetched_and_no_other(
    hub: HubServer, store: Path, hub_id: str, weights: list[str]
) -> None:
    both = (
        consolidated() | sharded(1) | {"pytorch_model.bin": b"pickle", "tekken.json": b"{}", "sub/config.json": b"{}"}
    )
    hub.repos["org/both"] = Repo(both | {"model.gguf": b"GGUF", "LICENSE": b"Apache"}, tags=("v1",))
    folder = models.pull(hub_id)
    config = "params.json" if weights == ["consolidated.safetensors"] else "config.json"
    index = ["model.safetensors.index.json"] if len(weights) > 1 else []
    texts = ["README.md", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    licence = ["LICENSE"] if hub_id == "org/both" else []
    expected = sorted([config, *index, *texts, *licence, *weights])
    assert sorted(path.name for path in folder.iterdir()) == sorted([*expected, "mistral_nb.json"])
    repo = hub.repos[hub_id]
    assert all((folder / name).read_bytes() == repo.files[name] for name in expected)
    assert sorted({each.what for each in hub.seen}) == sorted([LISTING, *map(header_of, weights), *expected])
    manifest = read_manifest(folder)
    assert manifest
    assert manifest.source == {"hub": hub_id, "revision": "main", "commit": repo.commit}
    assert manifest.licence == "apache-2.0"
    assert models.verify(folder.name) == []
    assert left_behind(store) == [folder.name]


def test_a_revision_is_pinned(hub: HubServer) -> None:
    hub.repos["org/single"].tags = ("refs/pr/1",)
    manifest = read_manifest(models.pull("org/single", revision="refs/pr/1"))
    assert manifest
    assert manifest.source["revision"] == "refs/pr/1"
    with pytest.raises(PullError, match="org--single is in the store at revision refs/pr/1; for v9 run: mistral-nb rm"):
        models.pull("org/single", revision="v9")


def refused(hub: HubServer, hub_id: str, message: str, kind: type[Exception], revision: str | None = None) -> None:
    """The pull fails with that whole message, and no weights were asked for; nor was anything asked twice."""
    with pytest.raises(ModelError, match=rf"^{message}$") as caught:
        models.pull(hub_id, revision=revision)
    assert type(caught.value) is kind
    assert TOKEN not in str(caught.value)
    assert WRONG not in str(caught.value)
    assert not weights_asked_for(hub)
    asked = [each.what for each in hub.seen if each.host == "hub"]
    assert len(set(asked)) == len(asked)
    assert models.installed() == []


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        pytest.param(
            None,
            "",
            rf"127.0.0.1:\d+ shows no org/asked \(HTTP 401: .+\); check its name, and if it is private, {LOGIN}",
        ),
        pytest.param(
            None,
            TOKEN,
            r"127.0.0.1:\d+ shows no org/asked to the account of your token \(HTTP 404: .+\); check its name",
        ),
        pytest.param(
            Repo(sharded(1), private=True), "", rf"127.0.0.1:\d+ shows no org/asked .+ if it is private, {LOGIN}"
        ),
        pytest.param(
            Repo(sharded(1)),
            WRONG,
            rf"127.0.0.1:\d+ does not take the token in HF_TOKEN \(HTTP 401: .+\[token\]\); {LOGIN}; a public .+",
        ),
        pytest.param(
            Repo(sharded(1), gated=True),
            "",
            rf"org/asked is gated: accept its terms at {SITE}/org/asked, then {LOGIN}",
        ),
        pytest.param(
            Repo(sharded(1), gated=True),
            TOKEN,
            rf"org/asked is gated: accept its terms at {SITE}/org/asked with the account of your token, and pull again",
        ),
    ],
    ids=["no repository", "no repository, token", "private", "wrong token", "gated, no token", "gated, not accepted"],
)
def test_who_may_not_have_it(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, repo: Repo | None, token: str, message: str
) -> None:
    if repo:
        hub.repos["org/asked"] = repo
    if token:
        use_token(monkeypatch, token)
    refused(hub, "org/asked", message, PullError)


@pytest.mark.parametrize(
    ("what", "status", "headers", "message"),
    [
        ("config.json", 403, {}, r"127.0.0.1:\d+ forbids config.json of org/single \(HTTP 403\); a token needs .+"),
        ("config.json", 404, {}, r"org/single lists config.json and does not have it \(HTTP 404\); pull again"),
        ("config.json", 418, {}, r"127.0.0.1:\d+ answers for config.json of org/single with HTTP 418; check .+"),
        (
            LISTING,
            403,
            {"X-Error-Message": "No\x1b[31m https://x.y/z hf_abc"},
            r".+ \(HTTP 403: No \[31m \[link\] \[token\]\).+",
        ),
        (
            LISTING,
            429,
            {"Retry-After": "600"},
            r".+ \(HTTP 429 for the listing\) and asks to wait 10 minutes, until .+",
        ),
    ],
)
def test_a_refusal_is_not_asked_again(
    hub: HubServer, what: str, status: int, headers: dict[str, str], message: str
) -> None:
    hub.fail(what, Fault("status", status=status, headers=headers))
    refused(hub, "org/single", message, PullError)


def test_an_unknown_revision(hub: HubServer) -> None:
    message = (
        rf"org/single has no revision 'v9'; its branches, tags and commits are at {SITE}/org/single/commits/main; .+"
    )
    refused(hub, "org/single", message, PullError, revision="v9")


def without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in names}


def config(**changed: Any) -> dict[str, bytes]:
    return sharded(1) | {"config.json": json.dumps(CONFIG | changed).encode()}


def index_of(*names: str) -> dict[str, bytes]:
    return sharded() | {"model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(names))}).encode()}


PICKLES = {"pytorch_model-00001-of-00002.bin": b"", "pytorch_model-00002-of-00002.bin": b"", "a.pt": b"", "b.pth": b""}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            without(sharded(1), "model.safetensors") | PICKLES,
            r"org/asked has its weights as pickles only \(pytorch_model-00001-of-00002.bin, .+, a.pt and 1 more\), "
            "which can run code when they are read, so they are not fetched; choose a model or a revision with .+",
        ),
        (
            {"README.md": b"", "x-Q4_0.gguf": b"", "x-F16.gguf": b""},
            r"org/asked has its weights as GGUF only \(x-Q4_0.gguf, x-F16.gguf\); fetch one, such as with "
            r"`hf download org/asked x-Q4_0.gguf --local-dir .`, and run: mistral-nb pull ./x-Q4_0.gguf",
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
            r"org/asked is an adapter .+; pull the model that it was made for",
        ),
        ({"README.md": b""}, r"org/asked has no weights \(no .safetensors file\); choose another"),
        (
            without(sharded(), "model.safetensors.index.json"),
            "org/asked has .safetensors files, but neither config.json with model.safetensors or its index, nor .+",
        ),
        (
            without(sharded(1), "tokenizer.json"),
            "org/asked has no tokenizer; choose a model with tokenizer.json or tokenizer.model, or .+",
        ),
        (without(sharded(1), "tokenizer.json") | {"tekken.json": b""}, "org/asked has only tekken.json, which .+"),
        (
            config(architectures=["GemmaForCausalLM"]),
            "org/asked cannot be run, so its weights are not fetched: config.json: .+ is GemmaForCausalLM; .+",
        ),
        (
            config(quantization_config={"quant_method": "awq"}),
            r"org/asked cannot be run, .+ quantised checkpoint \(awq\).+",
        ),
        (sharded(1) | {"config.json": b"{"}, "org/asked cannot be run, .+: config.json .+"),
        (
            index_of("gone.safetensors"),
            "org/asked cannot be run, .+: model.safetensors.index.json names gone.safetensors, .+",
        ),
        (index_of("sub/x.safetensors") | {"sub/x.safetensors": b""}, "org/asked .+ names sub/x.safetensors, .+"),
        (index_of("a\\b.safetensors") | {"a\\b.safetensors": b""}, r"org/asked .+ names a\\b.safetensors, .+"),
        (index_of("../../x.safetensors"), "org/asked .+ names ../../x.safetensors, no .safetensors file at the top .+"),
        (index_of("a.bin") | {"a.bin": b""}, "org/asked .+ names a.bin, no .safetensors file .+"),
        (index_of(), "org/asked .+ names no file; choose another revision or model"),
    ],
    ids=[
        *("pickles", "GGUF", "adapter", "nothing", "no index", "no tokenizer", "tekken", "architecture", "quantised"),
        *(
            "broken config",
            "missing shard",
            "shard in a folder",
            "backslash",
            "shard outside",
            "pickled shard",
            "empty index",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_its_weights(
    hub: HubServer, store: Path, files: dict[str, bytes], message: str
) -> None:
    hub.repos["org/asked"] = Repo(files)
    refused(hub, "org/asked", message, ModelError)
    assert left_behind(store) == []


def test_weights_without_a_sum_are_refused(hub: HubServer) -> None:
    hub.repos["org/asked"] = Repo(sharded(1), without_sums=True)
    message = (
        "the hub does not tell the size and the sum of .+ in org/asked, .+; unset HF_ENDPOINT, or choose another model"
    )
    refused(hub, "org/asked", message, PullError)


def test_a_sum_that_is_a_number_is_none(hub: HubServer) -> None:
    listing = hub.repos["org/single"].listing("org/single", blobs=True)
    for each in listing["siblings"]:
        each["blobId"] = int("1" * 40)
        if "lfs" in each:
            each["lfs"]["sha256"] = int("1" * 64)
    hub.fail(LISTING, Fault("status", status=200, body=json.dumps(listing).encode()))
    refused(hub, "org/single", "the hub does not tell the size and the sum of model.safetensors in .+", PullError)


def test_a_listing_that_lies(hub: HubServer, store: Path) -> None:
    """Names that lead elsewhere are no files of it, and a size beyond the disk is refused before it is fetched."""
    repo = hub.repos["org/single"]
    listing = repo.listing("org/single", blobs=True)
    listing["siblings"] += [
        {**listing["siblings"][-1], "rfilename": name} for name in ("../LICENSE", "/LICENSE", "LICENSE\n")
    ]
    hub.fail(LISTING, Fault("status", status=200, body=json.dumps(listing).encode()))
    folder = models.pull("org/single")
    assert list(store.rglob("*LICENSE*")) == []
    shutil.rmtree(folder)
    hub.seen.clear()
    listing["siblings"][-4]["lfs"]["size"] = 10**15
    hub.fail(LISTING, Fault("status", status=200, body=json.dumps(listing).encode()))
    refused(hub, "org/single", "pulling org--single needs 1000000.0 GB in .+; free some space or .+", PullError)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=200, body=b"not JSON"),
        Fault("status", status=200, body=b"[]"),
        Fault("status", status=200, body=b'{"siblings": [1]}'),
        Fault("status", status=200, body=b'{"id": "a/b", "sha": "../..", "siblings": []}'),
        Fault("status", status=200, body=b'{"id": "a/b", "sha": 1, "siblings": [{"rfilename": 1, "lfs": 5}]}'),
        Fault("status", status=200, body=b"[" * 100_000),
    ],
    ids=["text", "a list", "no id", "a commit that is none", "wrong types", "deep"],
)
def test_what_is_no_listing(hub: HubServer, fault: Fault) -> None:
    hub.fail(LISTING, fault)
    message = rf"127.0.0.1:\d+ answers with something that is no listing of org/single \(.+\): .+; open {SITE} .+"
    refused(hub, "org/single", message, PullError)


def test_a_login_page_in_place_of_the_listing(hub: HubServer) -> None:
    hub.fail(LISTING, Fault("portal"))
    message = (
        rf"localhost:\d+ sent a web page in place of the listing: .+; open {SITE} in a browser, and pull again, .+"
    )
    refused(hub, "org/single", message, PullError)


def test_the_token_goes_to_the_hub_alone(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/private"] = Repo(sharded(), private=True)
    use_token(monkeypatch)
    models.pull("org/private")
    assert {each.token for each in hub.seen if each.host == "hub"} == {TOKEN}
    assert {each.token for each in hub.seen if each.host == "cdn"} == {None}
    assert len([each for each in hub.seen if each.host == "cdn"]) == 7


def test_a_token_that_is_not_to_be_used_unasked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    models.pull("org/single")
    assert {each.token for each in hub.seen} == {None}


@pytest.mark.parametrize("token", ["hf_wrong\u00e9", "hf_wrong\x00x", "hf_wrong token"])
def test_a_token_that_cannot_be_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    refused(hub, "org/single", "the hub's token holds characters that no token has; run `hf auth login` .+", PullError)
    assert not hub.seen


def test_the_saved_token_is_found_and_nothing_is_written_beside_it(hub: HubServer, store: Path) -> None:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    home = Path(os.environ["HF_HOME"])
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    program = "import sys; from mistral_nb import models; models.pull(sys.argv[1])"

    def run(hub_id: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, hub_id]
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    home.mkdir()
    assert run("org/single").returncode == 0
    assert list(home.rglob("*")) == []
    (home / "token").write_text("hf_wrong")
    refusal = run("org/sharded").stderr
    assert "does not take the token that `hf auth login` saved (HTTP 401: Invalid credentials" in refusal
    assert "hf_wrong" not in refusal
    assert list(home.rglob("*")) == [home / "token"]


def test_an_id_that_the_hub_cannot_have(hub: HubServer) -> None:
    refused(hub, "org/a--b", "org/a--b is no id of the hub .+; check its name", PullError)


def test_without_huggingface_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r'pip install "mistral-nb\[local\]"'):
        models.pull("org/single")

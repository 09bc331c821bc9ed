"""Tokenizers that several files of tests share: the embedded model's, and Mistral's in both formats and file types."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from tests.engine.mistral_checkpoints import checkpoint


@pytest.fixture(scope="module")
def smol(embedded: Path) -> Tokenizer:
    return load_tokenizer(embedded)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("mistral")
    return {
        kind: load_tokenizer(checkpoint(root / kind, kind[:2], as_json="json" in kind))
        for kind in ("v1", "v1-json", "v3", "v3-json")
    }

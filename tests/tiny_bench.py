"""A plan to measure a random model of 0.5 M weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mistral_nb.bench_engine import SHAPE_7B
from mistral_nb.bench_turns import Plan

SHAPE = SHAPE_7B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


def tiny_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of a model in `folder`; processes that are started find the packages as this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    model = folder / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    return Plan(model, "cpu", ["fp32"], [5], 1, runs=2, tokens=8, random=True, peers=())

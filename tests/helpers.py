"""What several test files use: generated rows, a small recipe, which packages are installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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

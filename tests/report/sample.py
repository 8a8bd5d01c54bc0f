"""A record as a real run would leave it: built from one seed, with hostile text where data goes."""

from __future__ import annotations

import math
import random
from typing import Any

HOSTILE = "</script><script>window.__pwned=1</script><img src=x onerror=alert(1)>"
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
QUESTIONS = (
    "Do I need a permit to {} {}?",
    "How long does approval take when I {} {}?",
    "Which form is needed to {} {}?",
)
VERBS = ("rebuild", "extend", "demolish", "paint", "insulate")
OBJECTS = ("a balcony", "the façade", "a garden wall", "a solar roof")
ANSWERS = (
    "Yes, a minor works permit.",
    "No, a prior declaration is enough.",
    "Form LO-3, with the architect's drawings.",
    "About three months, unless the building is listed.",
)
# (id, label, share right, parameters, bytes, KV bytes per token, tokens/s)
EXAMS = (
    ("00-base", "base", 0.55, 134_515_008, 269_060_552, 23_040, 41.3),
    ("02-tune", "tune · LoRA r=16", 0.80, 134_515_008, 269_060_552, 23_040, 40.9),
    ("03-distill", "distill · 20 layers, BiLD", 0.78, 98_321_472, 196_676_000, 15_360, 57.4),
    ("04-merge-heads", "merge-heads · 1 pair", 0.77, 94_781_312, 189_595_680, 5_120, 61.8),
)


def sample_record() -> dict[str, Any]:
    """A finished run: four steps, four exams, every figure kind, sixty items."""
    rng = random.Random(7)
    items = {
        f"q{i:03d}": {
            "prompt": QUESTIONS[i % 3].format(VERBS[i % 5], OBJECTS[i % 4]),
            "answer": ANSWERS[i % 4],
        }
        for i in range(60)
    }
    items["q000"]["prompt"] = f"¿Necesito licencia para {HOSTILE} un balcón? 建築許可 🏗️ | pipe `tick`"
    items["q001"]["image"] = PIXEL
    items["q002"]["image"] = "https://example.org/tracker.png"
    guard = {f"g{i:02d}": {"prompt": f"Capital no. {i}?", "answer": f"City {i}"} for i in range(40)}
    exams = [_exam(rng, row, items, guard) for row in EXAMS]
    return {
        "schema": 1,
        "name": "building-permits",
        "description": "Answers about building permits, from sixteen trusted rows",
        "status": "done",
        "error": None,
        "time": {
            "started": "2026-10-01T09:30:00+00:00",
            "finished": "2026-10-01T09:43:21+00:00",
            "seconds": 801.4,
            "computed": ["00-data", "00-base", "02-tune", "03-distill", "04-merge-heads"],
        },
        "recipe": {
            "file": "recipe.yaml",
            "text": RECIPE,
            "resolved": {
                "name": "building-permits",
                "steps": [{"curate": {}}, {"tune": {}}, {"distill": {}}, {"merge-heads": {}}],
            },
        },
        "seed": 7,
        "determinism": "bit-identical on one CPU model; scores within intervals elsewhere",
        "versions": {
            "residency": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "transformers": "5.19.1",
        },
        "machine": {
            "measured": {
                "cpu": "Example CPU at 2.4 GHz",
                "cores": 2,
                "memory_bytes": 25_276_502_016,
                "device": "cpu",
                "gpu": None,
            }
        },
        "data": {
            "examples": _data("data/kshot.jsonl", 16, "a1"),
            "pool": _data("data/pool.jsonl", 812, "b2", refused=3, duplicates=41),
            "test": _data("data/test.jsonl", 60, "c3"),
            "guard": _data("embedded:general-knowledge", 40, "d4"),
        },
        "quarantine": {
            "count": 3,
            "sample": [
                {
                    "source": "data/pool.jsonl",
                    "line": 17,
                    "reason": "not JSON",
                    "text": '{"a": |' + HOSTILE,
                },
                {
                    "source": "data/pool.jsonl",
                    "line": 90,
                    "reason": "answer is empty",
                    "text": "…",
                },
            ],
        },
        "base": {
            "name": "smollm2-135m-instruct",
            "architecture": "LlamaForCausalLM",
            "kind": "causal-lm",
            "license": "apache-2.0",
            "fingerprint": "9f" * 16,
            "layers": 30,
            "hidden": 576,
        },
        "task": {
            "metric": "choice-accuracy",
            "unit": "share",
            "higher_is_better": True,
            "chance": 0.25,
            "items": items,
        },
        "guard": {
            "name": "general-knowledge",
            "metric": "choice-accuracy",
            "unit": "share",
            "higher_is_better": True,
            "chance": 0.25,
            "items": guard,
        },
        "steps": _steps(rng),
        "exams": exams,
        "comparisons": _comparisons(exams),
    }


CONFUSION = {
    "kind": "heatmap",
    "title": "Confusion of the base",
    "x": ["yes", "no", HOSTILE],
    "y": ["yes", "no", HOSTILE],
    "z": [[12, 3, 0], [4, 11, 2], [1, 0, 9]],
    "xlabel": "predicted",
    "ylabel": "true",
}

RECIPE = """residency: 1
name: building-permits
base: smollm2-135m-instruct
task:
  examples: data/kshot.jsonl   # the K rows you trust
  test: data/test.jsonl
  metric: choice-accuracy
guard: general-knowledge
steps:
  - curate:      {pool: data/pool.jsonl, by: k-shot, keep: 240}
  - tune:        {method: lora, rank: 16, epochs: 2}
  - distill:     {loss: bild, student: {layers: 20}}
  - merge-heads: {kv-heads: 1}
"""


def _data(source: str, rows: int, digits: str, refused: int = 0, duplicates: int = 0) -> dict[str, Any]:
    return {
        "source": source,
        "rows": rows,
        "sha256": digits * 32,
        "refused": refused,
        "duplicates": duplicates,
    }


def _interval(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-4) / n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def _exam(rng: random.Random, row: tuple, items: dict, guard: dict) -> dict[str, Any]:
    identity, label, share, parameters, disk, kv, speed = row

    def sit(questions: dict, level: float) -> dict[str, Any]:
        order = random.Random(11)
        found = []
        for i, (name, item) in enumerate(questions.items()):
            right = order.random() + rng.uniform(-0.2, 0.2) < level
            wrong = (
                HOSTILE
                if i == 0
                else ANSWERS[(ANSWERS.index(item["answer"]) + 1) % 4]
                if item["answer"] in ANSWERS
                else "no idea"
            )
            found.append(
                {
                    "id": name,
                    "score": float(right),
                    "prediction": item["answer"] if right else wrong,
                }
            )
        value = sum(entry["score"] for entry in found) / len(found)
        return {**_interval(value, len(found)), "items": found}

    return {
        "id": identity,
        "label": label,
        "address": (identity.replace("-", "") + "0" * 40)[:40],
        "task": sit(items, share),
        "guard": sit(guard, 0.62),
        "extra": {
            "bits-per-byte": {
                "value": 1.372 - share / 5,
                "low": 1.31 - share / 5,
                "high": 1.43 - share / 5,
                "n": 60,
                "higher_is_better": False,
            }
        },
        "figures": [CONFUSION] if identity == "00-base" else [],
        "cost": {"parameters": parameters, "bytes_on_disk": disk, "kv_bytes_per_token": kv},
        "measured": {
            "tokens_per_second": speed,
            "time_to_first_token_ms": 3510 / speed,
            "peak_memory_bytes": disk * 2 + 180_000_000,
            "seconds": 2400 / speed,
        },
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    old = {entry["id"]: entry["score"] for entry in before["items"]}
    moves = [(entry["id"], entry["score"] - old[entry["id"]]) for entry in after["items"]]
    n = len(moves)
    mean = sum(move for _, move in moves) / n
    spread = math.sqrt(sum((move - mean) ** 2 for _, move in moves) / n / n)
    return {
        "difference": mean,
        "low": mean - 1.96 * spread,
        "high": mean + 1.96 * spread,
        "n": n,
        "fixed": [name for name, move in moves if move > 0],
        "broken": [name for name, move in moves if move < 0],
    }


def _comparisons(exams: list[dict[str, Any]]) -> list[dict[str, Any]]:
    base = exams[0]
    pairs = [(exam, base) for exam in exams[1:]]
    pairs += list(zip(exams[2:], exams[1:], strict=False))
    return [
        {
            "of": exam["id"],
            "against": against["id"],
            **_difference(against["task"], exam["task"]),
            "guard": _difference(against["guard"], exam["guard"]),
        }
        for exam, against in pairs
    ]


def _step(name: str, variant: str | None, title: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "step": name.split("-", 1)[1],
        "variant": variant,
        "title": title,
        "method": more.pop("method", None),
        "address": (name.replace("-", "") + "f" * 40)[:40],
        "status": "done",
        "inputs": {"model": "ab" * 20},
        "outputs": {"model": "cd" * 20},
        "measured": {"seconds": seconds, "peak_memory_bytes": 1_912_000_000},
        **more,
    }


def _steps(rng: random.Random) -> list[dict[str, Any]]:
    losses = [0.35 + 2 * math.exp(-i / 40) + rng.uniform(-0.08, 0.08) for i in range(160)]
    return [
        _step(
            "01-curate",
            "k-shot",
            "curate · 240 by k-shot",
            12.3,
            method="k-shot",
            params={"keep": 240, "by": "k-shot", "near-duplicates": 0.9},
            summary={"candidates": 812, "kept": 240, "near-duplicates": 41, "mean similarity": 0.6134},
            figures=_curation_figures(rng),
        ),
        _step(
            "02-tune",
            "lora",
            "tune · LoRA r=16",
            402.0,
            params={"rank": 16, "epochs": 2, "learning-rate": 0.0003},
            summary={"rows": 240, "trainable parameters": 4_884_480, "last loss": 0.4127},
            figures=[
                {
                    "kind": "lines",
                    "title": "Loss while tuning",
                    "xlabel": "optimiser step",
                    "ylabel": "loss (nats per token)",
                    "series": [
                        {"name": "training", "x": list(range(160)), "y": losses},
                        {
                            "name": "held-out rows",
                            "x": list(range(0, 160, 20)),
                            "y": [losses[i] + 0.12 for i in range(0, 160, 20)],
                        },
                    ],
                }
            ],
        ),
        _step(
            "03-distill",
            "bild",
            "distill · 20 layers, BiLD",
            231.7,
            params={"loss": "bild", "student": {"layers": 20}},
            summary={"layers": "30 → 20"},
            figures=[
                {
                    "kind": "bars",
                    "title": "Agreement with the teacher by layer",
                    "x": [0, 5, 10, 15, 19] * 2,
                    "y": [0.99, 0.96, 0.93, 0.95, 0.98, 0.97, 0.88, 0.71, 0.79, 0.92],
                    "group": ["after"] * 5 + ["before"] * 5,
                    "xlabel": "student layer",
                    "ylabel": "cosine",
                },
                {"kind": "hologram", "title": "A figure kind from the future"},
            ],
        ),
        _step(
            "04-merge-heads",
            None,
            "merge-heads · 1 pair",
            38.2,
            params={"kv-heads": 1},
            summary={"kv heads": "3 → 1", "cache": "÷ 3"},
            figures=[
                {
                    "kind": "heatmap",
                    "title": "Similarity of key heads before merging",
                    "x": ["0·1", "0·2", "1·2"],
                    "y": [f"layer {i}" for i in range(20)],
                    "z": [[round(rng.uniform(0.2, 1), 3) for _ in range(3)] for _ in range(20)],
                    "xlabel": "pair of heads",
                    "ylabel": "",
                    "note": "Pairs near 1 lose little when merged.",
                },
                {
                    "kind": "gallery",
                    "title": "What was relabelled",
                    "items": [
                        {"image": PIXEL, "title": "cat → dog", "text": f"score .{i} {HOSTILE}"} for i in range(7)
                    ],
                },
            ],
        ),
    ]


def _curation_figures(rng: random.Random) -> list[dict[str, Any]]:
    reasons = ("kept", "too far from the examples", "near-duplicate", "too long")
    group = [reasons[min(3, int(rng.expovariate(0.9)))] for _ in range(812)]
    centre = {"kept": (0, 0), reasons[1]: (2.2, 1), reasons[2]: (0.4, -0.5), reasons[3]: (-2, 1.6)}
    hover = [f"Row {i}: {QUESTIONS[i % 3].format('repair', 'the roof')}\n{g}" for i, g in enumerate(group)]
    hover[0] = HOSTILE + ' <b>bold</b> <a href="javascript:alert(1)">click</a>'
    rows = [
        [i, g, round(rng.random(), 3), QUESTIONS[i % 3].format(VERBS[i % 5], OBJECTS[i % 4])]
        for i, g in enumerate(group)
    ]
    rows[0][3] = HOSTILE
    return [
        {
            "kind": "scatter",
            "title": "The pool as a map",
            "x": [centre[g][0] + rng.gauss(0, 0.8) for g in group],
            "y": [centre[g][1] + rng.gauss(0, 0.8) for g in group],
            "group": group,
            "hover": hover,
            "note": "Two principal components of the rows' embeddings.",
        },
        {
            "kind": "table",
            "title": "Why each row was kept or dropped",
            "columns": ["row", "reason", "similarity", "text"],
            "rows": rows,
        },
    ]

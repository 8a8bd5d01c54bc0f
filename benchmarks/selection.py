"""Question to answer: which scores find planted faults, what do selectors choose, and what helps a model that is tuned?

`selection_pool.py` plants equally many rows of five faults in real MedQuAD rows: mismatched answers, near-duplicates,
boilerplate, off-topic rows, word salad; trusted and held-out rows are clean and of other subjects.

1. Scores: for every scorer of the catalogue that can run here, the area under the ROC curve (AUROC) of clean rows
   against each fault and all faults: the probability that a clean row is preferred. Preferred is what the score's
   `good` says: high, low, or near the median of the pool for "middle". 0.5 is chance, below 0.5 the score prefers
   faults. `raw` is the same with high as good; `chosen` the share of faults among the rows that it would choose.
   SmolLM2-135M-Instruct reads all rows once for all scores, and is its own gradients' model and the judge (a 135M
   judge, read by the expected digit).
2. Selectors: each chooses the same number of rows; planted faults among them, different subjects, question types and
   sources of the rest, Vendi score and mean distance to the nearest chosen row of the choice, pairs that share an
   original, answer tokens. `top` and `sample` rank by IFD without rows above 1, QDIT and DEITA by the judge, the
   others by nothing. Those without a budget (semdedup, d4, minhash) are followed by a random draw of what they keep.
3. Tuning: one LoRA on each choice, the same optimiser steps; nats per answer token on the held-out rows. Random draws
   with five seeds, random draws of clean rows (what could be had) and of faults only (the floor). The seed of the
   tuning (first weights, order of rows) is the same for all that is compared; random draws with other tuning seeds
   too show what that seed alone does. A choice loses to random when it is worse than the mean of the five draws.

    OMP_NUM_THREADS=1 python benchmarks/selection.py                 # results/selection.json, an hour on half a core
    python benchmarks/selection.py --work DIR                        # keeps what is finished in DIR, goes on there
    python benchmarks/selection.py --quick                           # a minute or two with tiny models, writes nothing
    python benchmarks/selection.py --show                            # the results in sentences

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from selection_pool import FAULTS, Pool, make
from selection_report import summary

from residency import bases, rows, tokens, train
from residency.catalog import METHODS, load
from residency.compat import fast_bf16
from residency.crossentropy import CrossEntropy
from residency.curate.fluency import Perplexity
from residency.curate.judging import DigitJudge
from residency.curate.measuring import Measurer, Wanted, Work
from residency.curate.ranking import Random, Sample
from residency.curate.reading import Answer, read
from residency.curate.vendi import Vendi
from residency.embedded import base_folder
from residency.lora import Lora, merge
from residency.measure import machine
from residency.trainparams import TrainParams

OUT = Path(__file__).parent / "results" / "selection.json"
SEEDS = (0, 1, 2, 3, 4)
UNABLE = {
    "reward": "needs a reward model",
    "own-reward": "needs a reward model",
    "necessity": "needs a reward model",
    "instruction-mining": "needs coefficients fitted to many tuned subsets",
    "forgetting": "needs the record of a training over all rows",
}
"""Scorers that are left out, and why."""
CHEAPER: dict[str, dict[str, Any]] = {"learning-complexity": {"rates": (0.2,)}, "prompt-uncertainty": {"times": 1}}
"""Keys other than the defaults, to save time."""
EXTRA = {
    "complexity": ("judge", {"aspect": "complexity"}),
    "dsir per n-gram": ("dsir", {"per": "n-gram"}),
    "knn 5": ("knn", {"neighbour": 5}),
}
"""Further columns: name → (scorer, keys)."""
QUALITY = {"qdit": "judge", "deita": "judge"}
"""The column that a selector ranks by, where it is not IFD: a judge's number, as in their papers."""
LATE = ("learning-complexity", "prompt-uncertainty", "complexity", "deita-score")
"""Scores that no selection needs and that cost most: they come when models have been tuned."""


def columns() -> dict[str, Wanted]:
    """Every scorer of the catalogue that can run here; scores of columns last."""
    names = [m.name for m in METHODS if m.role == "Scorer" and m.stage == "curate" and m.name not in UNABLE]
    found = {n: Wanted(n, n, CHEAPER.get(n, {})) for n in names}
    found |= {n: Wanted(n, method, keys) for n, (method, keys) in EXTRA.items()}
    found["deita-score"] = Wanted("deita-score", "deita-score", {"quality": "judge"})
    return dict(sorted(found.items(), key=lambda each: "columns" in each[1].score().needs))


class Kept:
    """Finished cells, in a folder: a later run goes on where this one ended."""

    def __init__(self, folder: Path, setting: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "cells.json"
        self.cells: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        if self.cells.setdefault("setting", setting) != setting:
            sys.exit(f"{folder} holds cells of another setting: give another --work")

    def cell(self, name: str, work: Callable[[], Any]) -> Any:
        """The cell, made now if it is missing."""
        if name not in self.cells:
            begun = time.perf_counter()
            self.cells[name] = work()
            spent = time.perf_counter() - begun
            self.file.write_text(json.dumps(self.cells))
            print(f"{spent:7.1f} s  {name}", flush=True)
        return self.cells[name]

    def pickled(self, name: str, work: Callable[[], Any]) -> Any:
        """The same for what is no JSON."""
        file = self.folder / f"{name}.pickle"
        if not file.exists():
            begun = time.perf_counter()
            file.write_bytes(pickle.dumps(work()))
            print(f"{time.perf_counter() - begun:7.1f} s  {name}", flush=True)
        return pickle.loads(file.read_bytes())


# ------------------------------------------------------------------ scores


def measured(
    pool: Pool, kept: Kept, reader: Path, encoder: Path, wanted: dict[str, Wanted], found: dict[str, np.ndarray]
) -> Any:
    """Put [N] of every score wanted into `found`; returns the inputs by name."""
    examples = kept.folder / "trusted.jsonl"
    rows.write(examples, pool.trusted)
    models = {"reader": reader, "encoder": encoder, "judge": reader}
    measure = Measurer(Work(tuple(wanted.values()), (), examples, models, 64, "cpu", 0))
    supply = measure.supply(pool.rows)
    first = "gradients" in {need for each in wanted.values() for need in each.score().needs}
    for name in ("embeddings", "reading", "gradients") if first else ("reading",):
        file = name if first else f"{name} of probes"
        supply[name] = kept.pickled(file, partial(supply.__missing__, name))
    for name in ("example_embeddings", "example_gradients") if first else ():
        supply[name] = kept.pickled(name, partial(measure.trusted, name))
    model, tokenizer = bases.load_causal_lm(reader, "cpu"), bases.load_tokenizer(reader)
    supply["columns"] = found
    for name, each in wanted.items():
        score: Any = each.score()
        # trusted rows have labels for the scores that predict labels; for LESS they are one task
        supply["example_labels"] = [r.label if "labels" in score.needs else None for r in pool.trusted]
        if "judge" in score.needs:
            supply["judge"] = DigitJudge(model, tokenizer, lowest=score.lowest, highest=score.highest)
        inputs = partial(supply.of, score.needs)
        found[name] = np.array(kept.cell(f"score {name}", partial(as_list, score, inputs)), float)
    return supply


def as_list(score: Any, inputs: Callable[[], list[Any]]) -> list[float]:
    """A column, as JSON can hold it."""
    return np.asarray(score.score(*inputs()), float).tolist()


def preferred(values: np.ndarray, good: str) -> np.ndarray:
    """[N] high is preferred; a row without a value comes last."""
    from scipy.stats import rankdata

    there = np.isfinite(values)
    ranks = np.full(len(values), np.nan)
    ranks[there] = rankdata(values[there])
    key = {"high": ranks, "low": -ranks, "middle": -np.abs(ranks - (there.sum() + 1) / 2)}[good]
    return np.where(there, key, -np.inf)


def auroc(key: np.ndarray, clean: np.ndarray, fault: np.ndarray) -> float:
    """Probability that a clean row is preferred to a faulty one; ties count half."""
    from scipy.stats import rankdata

    both = rankdata(np.concatenate([key[clean], key[fault]]))
    n, m = int(clean.sum()), int(fault.sum())
    return round(float((both[:n].sum() - n * (n + 1) / 2) / (n * m)), 3)


def best(key: np.ndarray, keep: int) -> np.ndarray:
    """The rows with the highest keys; NaN last, ties by row order."""
    return np.argsort(-np.where(np.isnan(key), -np.inf, key), kind="stable")[:keep]


def without_harm(ifd: np.ndarray) -> np.ndarray:
    """IFD of rows up to 1; above, the question harms, and the paper drops the row."""
    return np.where(ifd <= 1, ifd, np.nan)


def detection(pool: Pool, found: dict[str, np.ndarray], keep: int) -> dict[str, Any]:
    """AUROC of every score against every fault, and the share of faults among its best rows."""
    fault = np.array(pool.fault)
    table = {}
    good = {name: each.score().good for name, each in columns().items()}
    shown = {**found, "ifd up to 1": without_harm(found["ifd"])}
    for name, values in shown.items():
        way = good.get(name, "high")
        masks = {"all": fault != "", **{f: fault == f for f in FAULTS}}
        keys = {"auroc": preferred(values, way), "raw": preferred(values, "high")}
        cells = {k: {f: auroc(key, fault == "", mask) for f, mask in masks.items()} for k, key in keys.items()}
        chosen = round(float((fault[best(keys["auroc"], keep)] != "").mean()), 3)
        table[name] = {"good": way, "missing": int((~np.isfinite(values)).sum()), "chosen": chosen, **cells}
    return table


# ------------------------------------------------------------------ selections


def selectors(pool: Pool, supply: Any, keep: int, seed: int, dropped: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every selector of the catalogue, with `keep` rows each; what those without a budget drop goes into `dropped`."""
    found = supply["columns"]
    quality = {"ifd": without_harm(found["ifd"]), "judge": found["judge"]}
    result = {}
    for m in METHODS:
        if m.role != "Selector" or m.stage != "curate" or m.name == "inscl":
            continue
        kind = load(m.object, m.extras)
        selector = kind(**{k: v for k, v in (("keep", keep), ("seed", seed)) if k in kind.model_fields})
        supply["quality"] = quality[QUALITY.get(m.name, "ifd")]
        inputs = [None if x == "quality?" else supply.of([x])[0] for x in kind.needs]
        chosen = selector.select(*inputs).indices
        if "keep" not in kind.model_fields:
            left = np.setdiff1d(np.arange(len(pool.rows)), chosen)
            dropped[m.name] = {f or "clean": sum(pool.fault[i] == f for i in left) for f in ("", *FAULTS)}
            chosen = chosen[Random(keep=keep, seed=seed).select(chosen).indices]
        result["top ifd" if m.name == "top" else m.name] = chosen
    keys = {
        "top perplexity, low": preferred(found["perplexity"], "low"),
        "top perplexity, middle": preferred(found["perplexity"], "middle"),
        "top dsir": found["dsir"],
        "top less": found["less"],
        "top similarity": found["similarity"],
        "top judge": found["judge"],
    }
    result |= {name: best(key, keep) for name, key in keys.items()}
    result["sample dsir"] = Sample(keep=keep, seed=seed).select(found["dsir"]).indices
    assert all(len(set(c.tolist())) == len(c) <= keep for c in result.values())
    return result


def coverage(pool: Pool, chosen: np.ndarray, supply: Any) -> dict[str, Any]:
    """What a choice holds."""
    clean = [i for i in chosen if not pool.fault[i]]
    subjects = [pool.subject[i] for i in chosen if pool.fault[i] in ("", "near-duplicate")]
    texts = [(pool.subject[i], pool.rows[i].prompt) for i in chosen if pool.subject[i]]
    unit = supply["embeddings"][chosen].astype(float)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -1)
    return {
        "rows": len(chosen),
        "tokens": int(supply["columns"]["answer-tokens"][chosen].sum()),
        "faults": round(1 - len(clean) / len(chosen), 3),
        "by_fault": {f: sum(pool.fault[i] == f for i in chosen) for f in FAULTS},
        "subjects": len(set(subjects)),
        "types": len({pool.rows[i].label for i in clean}),
        "sources": len({str(pool.rows[i].tag).split(", ")[1] for i in clean}),
        "vendi": round(Vendi().of(unit), 2),
        "nearest": round(float(np.mean(1 - cosine.max(1))), 3),
        "duplicate_pairs": sum(texts[i] == texts[j] for i in range(len(texts)) for j in range(i)),
    }


# ------------------------------------------------------------------ tuning


def tuned(pool: Pool, chosen: np.ndarray | None, reader: Path, params: TrainParams, rank: int, seed: int) -> float:
    """Nats per answer token on the held-out rows after tuning on some rows; None tunes nothing."""
    model: Any = bases.load_causal_lm(reader, "cpu")
    tokenizer = bases.load_tokenizer(reader)
    if chosen is not None:
        items, refused = tokens.encode_all([pool.rows[i] for i in chosen], tokenizer, params.max_tokens)
        assert not refused
        torch.manual_seed(seed)
        adapted = Lora(rank=rank).attach(model)
        with tempfile.TemporaryDirectory() as scratch:
            pad = tokenizer.pad_token_id
            train.fit(adapted, CrossEntropy(), items, params, pad=pad, scratch=Path(scratch), seed=seed)
        model, _ = merge(adapted, tokens.collate(items[:1], pad)["input_ids"])
    reading = read(model, tokenizer, pool.held_out, [Perplexity()])
    return float((reading.of(Answer(), "nll") * reading.tokens).sum() / reading.tokens.sum())


FIRST = ("top ifd", "k-centre", "top less", "top perplexity, low", "facility-location", "top dsir", "k-shot", "qdit",
         "deita", "semdedup")  # fmt: skip
MORE = ("top similarity", "sample dsir", "gradient-matching")
PLAN = (
    ("random", 0, 0), ("clean", 0, 0), ("faults", 0, 0), *(("random", draw, draw) for draw in SEEDS[1:]),
    *((n, 0, 0) for n in FIRST), *(("random", draw, 0) for draw in SEEDS[1:]), ("", 0, 0),
    ("clean", 1, 0), ("faults", 1, 0), ("clean", 2, 0), ("faults", 2, 0), *((n, 0, 0) for n in MORE),
)  # fmt: skip
"""What a model is tuned on, the seed of the draw and of the tuning, the most wanted first; "" are the late scores."""


def arm(name: str, seed: int, pool: Pool, supply: Any, keep: int) -> np.ndarray:
    """The rows of a choice; `seed` matters where something is drawn."""
    if name in ("clean", "faults"):
        some = np.array([i for i, f in enumerate(pool.fault) if bool(f) == (name == "faults")])
        return some[Random(keep=keep, seed=seed).select(some).indices]
    return selectors(pool, supply, keep, seed, {})[name]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--work", type=Path, help="keep finished cells here, and go on from them")
    parser.add_argument("--minutes", type=float, default=50, help="begin nothing expensive after this")
    parser.add_argument("--output", type=Path, default=OUT)
    given = parser.parse_args()
    if given.show:
        print("\n".join(summary(json.loads(given.output.read_text()))))
        return
    begun = time.perf_counter()
    torch.set_num_threads(1)
    sizes = {"subjects": 60, "per_fault": 28, "trusted": 24, "held_out": 36}
    sizes = {"subjects": 20, "per_fault": 8, "trusted": 6, "held_out": 6} if given.quick else sizes
    keep, rank = (12, 2) if given.quick else (48, 8)
    params = TrainParams(batch=6, max_steps=2 if given.quick else 8, learning_rate=1e-3, checkpoint_seconds=1e9)
    names = ("tiny-llama", "tiny-text-encoder") if given.quick else ("smollm2-135m-instruct", "all-minilm-l6-v2")
    reader, encoder = map(base_folder, names)
    pool = make(**sizes)
    setting = {
        **sizes, "pool": len(pool.rows), "clean": pool.fault.count(""), "keep": keep, "rank": rank,
        "optimiser_steps": params.max_steps, "batch": params.batch, "learning_rate": params.learning_rate,
        "reader": names[0], "encoder": names[1], "keys": {k: str(v) for k, v in CHEAPER.items()},
    }  # fmt: skip
    kept = Kept(given.work or Path(tempfile.mkdtemp(prefix="residency-selection-")), setting)
    found: dict[str, np.ndarray] = {}
    wanted = columns()
    early = {name: each for name, each in wanted.items() if name not in LATE}
    supply = measured(pool, kept, reader, encoder, early, found)
    chosen: dict[str, Any] = {}
    dropped: dict[str, Any] = {}
    for name, rows_ in selectors(pool, supply, keep, 0, dropped).items():
        chosen[name] = coverage(pool, rows_, supply)
    drawn = [coverage(pool, selectors(pool, supply, keep, s, {})["random"], supply) for s in SEEDS]
    chosen["random"] = {k: round(statistics.mean(d[k] for d in drawn), 3) for k in drawn[0] if k != "by_fault"}
    untuned = kept.cell("untuned", partial(tuned, pool, None, reader, params, rank, 0))
    losses: dict[str, dict[str, float]] = {}
    for name, draw, seed in PLAN:
        late = (time.perf_counter() - begun) / 60 > given.minutes
        if not name:
            rest = {n: each for n, each in wanted.items() if n in LATE}
            if not late or all(f"score {n}" in kept.cells for n in rest):
                measured(pool, kept, reader, encoder, rest, found)
            continue
        cell = f"tuned {name} / {draw} / {seed}"
        if late and cell not in kept.cells:
            continue
        loss = kept.cell(cell, partial(tuned, pool, arm(name, draw, pool, supply, keep), reader, params, rank, seed))
        losses.setdefault(name, {})[f"draw {draw}, seed {seed}"] = round(loss, 5)
    left_out = UNABLE | {n: "out of time" for n in wanted if n not in found}
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "precision": {"reading": "float32", "tuning": "bfloat16" if fast_bf16("cpu") else "float32"},
        "setting": setting | {"left_out": left_out},
        "scores": detection(pool, found, keep),
        "selectors": chosen,
        "dropped": dropped,
        "tuning": {"untuned": round(untuned, 5), "losses": losses},
    }
    print("\n".join(summary(result)))
    if not given.quick:
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Claim: prototypes keep a contrastive classifier of emotions usable in small batches and for rare classes.

MELD (emotions of turns in dialogues, seven classes of very unequal size), one encoder (MiniLM), four losses with the
same rows, number of rows seen, learning rates and seeds:

- cross-entropy under a linear head; scored by its head and by nearest class means, the better one counts;
- SupCon, scored likewise (its head is trained on detached features);
- SPCL, scored by nearest class means, with and without the curriculum (which halves epochs: it gets twice as many).

Two forms. `adapter`: a small network on the frozen encoder's vectors of all training rows (the turn alone: context
makes a mean over tokens worse, which is measured), batches of 4, 8 and 32, several seeds; there also SPCL on a random
half, and with its release's habits. `encoder`: the whole encoder fine-tuned on a few rows (the turn alone, its mean
over tokens), batches of 4 and 32. Not compared: the paper's form, in context and read at the mask. In two tries (900
rows, 58 steps, learning rates 1e-4 and 5e-4, the head's 20 times as large, which may be too large) cross-entropy stayed
at the score of always saying neutral. Weighted F1 (the paper's), macro-F1 and F1 of every class on the test set.
`steptime`: one optimiser step with SPCL against one with cross-entropy, batch 32, queues of 4,096 per class, in turn.

    python benchmarks/emotion.py                       # everything; results/emotion.json
    python benchmarks/emotion.py --quick               # a minute or two, writes nothing
    python benchmarks/emotion.py --only adapter|encoder|steptime|frozen [--seeds 0 1 2] [--work DIR]

Reads MELD (GPL-3.0 repository, transcripts of a copyrighted series: research use, not in this project) from
../shared/data or $RESIDENCY_BENCH_DATA, and the embedded MiniLM. Scores are scikit-learn's.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.metrics import f1_score
from transformers import AutoModel, AutoTokenizer

from residency import dialogues, store, train
from residency.adapt.classbank import ClassBank
from residency.adapt.contrast import SupCon
from residency.adapt.linear import LinearLoss
from residency.adapt.probe import Probe
from residency.adapt.spcl import SPCL
from residency.compat import fast_bf16, quiet_transformers
from residency.embedded import base_folder
from residency.objective import Objective, Outputs
from residency.tokens import Labelled, collate_labelled
from residency.trainable import Adapter, TextFeatures
from residency.trainparams import TrainParams
from residency.views import Item, collate_views

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "emotion.json"
PAPER = {"SPCL + curriculum, SimCSE RoBERTa-large (355M), all rows": 67.25}
ARMS = ("cross-entropy", "SupCon", "SPCL", "SPCL, curriculum")
MORE = ("SPCL, random half", "SPCL, official habits")
TOKENS, TURNS = 96, 3
RATES = {"adapter": 1e-3, "encoder": 1e-4}
"""Peak learning rates at batch 32; at batch B they are multiplied by sqrt(B / 32), for every loss alike."""

Turn = tuple[tuple[tuple[str, str], ...], str]


def meld(split: str) -> list[Turn]:
    """Every turn with what was said before it, and its emotion."""
    file = DATA / f"meld_{split}.csv.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    by: dict[int, list[tuple[int, str, str, str]]] = {}
    with gzip.open(file, "rt", encoding="utf-8", errors="replace", newline="") as handle:
        for r in csv.DictReader(handle):
            turn = (int(r["Utterance_ID"]), r["Speaker"], r["Utterance"], r["Emotion"])
            by.setdefault(int(r["Dialogue_ID"]), []).append(turn)
    found = []
    for number in sorted(by):
        turns = sorted(by[number])
        said = tuple((speaker, text) for _, speaker, text, _ in turns)
        found += [(said[: i + 1], turns[i][3]) for i in range(len(turns))]
    return found


class Bench:
    """The rows, the encoder, and what is kept between runs."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.folder = base_folder("all-minilm-l6-v2")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.train, self.test = meld("train"), meld("test")
        self.classes = sorted({label for _, label in self.train})
        if args.quick:
            self.train, self.test = sample(self.train, 300, 0), sample(self.test, 150, 0)

    def encoder(self) -> Any:
        """A fresh MiniLM."""
        with quiet_transformers():
            model = AutoModel.from_pretrained(self.folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("pooler" not in name)
        return model

    def labels(self, rows: Sequence[Turn]) -> torch.Tensor:
        """Class indices [N]."""
        return torch.tensor([self.classes.index(label) for _, label in rows])

    def items(self, rows: Sequence[Turn], turns: int) -> list[Labelled]:
        """Rows as token ids."""
        y = self.labels(rows).tolist()
        ids = [tuple(dialogues.render(said, self.tokenizer, TOKENS, turns)) for said, _ in rows]
        return [Labelled(str(i), row, c) for i, (row, c) in enumerate(zip(ids, y, strict=True))]

    def collate(self, items: Sequence[Labelled]) -> dict[str, Any]:
        """A batch of token ids."""
        return collate_labelled(items, self.tokenizer.pad_token_id)


def sample(rows: Sequence[Turn], n: int, seed: int) -> list[Turn]:
    """A random part, so that classes keep their shares."""
    order = random.Random(seed).sample(range(len(rows)), min(n, len(rows)))
    return [rows[i] for i in sorted(order)]


def features(network: Any, items: Sequence[Any], collate: Any) -> torch.Tensor:
    """Vectors [N, D], in bfloat16 arithmetic where the machine is fast at it (as in the training)."""
    network.eval()
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    found = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
        for start in range(0, len(items), 64):
            batch = collate([items[i] for i in order[start : start + 64]])
            given = {name: batch[name] for name in train.MODEL_INPUTS if name in batch}
            found.append(network(**given).features.float())
    return torch.cat(found)[torch.tensor(order).argsort()]


def objective(arm: str, classes: int, width: int) -> Objective:
    """The loss of an arm, with its paper's constants."""
    if arm == "cross-entropy":
        return LinearLoss(classes, width)
    if arm == "SupCon":
        return SupCon(classes, width)
    curriculum: Any = {"SPCL, curriculum": "difficulty", "SPCL, random half": "half"}.get(arm, "none")
    return SPCL(classes, width, curriculum=curriculum, official=arm == "SPCL, official habits")


def scores(said: torch.Tensor, y: torch.Tensor, classes: list[str]) -> dict[str, Any]:
    """F1 in per cent."""
    every = f1_score(y, said, average=None, labels=range(len(classes)), zero_division=0)
    return {
        "weighted_f1": round(100 * float(f1_score(y, said, average="weighted", zero_division=0)), 2),
        "macro_f1": round(100 * float(np.mean(every)), 2),
        "classes": {c: round(100 * float(v), 1) for c, v in zip(classes, every, strict=True)},
    }


def fit(
    bench: Bench,
    arm: str,
    form: str,
    network: Any,
    items: Sequence[Any],
    test: Sequence[Any],
    collate: Any,
    *,
    batch: int,
    seed: int,
    epochs: float,
) -> dict[str, Any]:
    """Train one arm and score it by every rule it has."""
    torch.manual_seed(seed)
    y = torch.tensor([item.label for item in items])
    gold = torch.tensor([item.label for item in test])
    loss = objective(arm, len(bench.classes), network.width)
    halved = loss.rows_per_epoch(len(items)) < len(items)
    params = TrainParams(
        epochs=2 * epochs if halved else epochs,  # the same number of rows seen
        batch=batch,
        learning_rate=RATES[form] * math.sqrt(batch / 32),
        weight_decay=0.01,
        clip=5.0,
        precision="auto" if form == "encoder" else "float32",
        checkpoint_seconds=1e9,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        log = train.fit(
            network,
            loss,
            items,
            params,
            pad=0,
            scratch=Path(scratch),
            seed=seed,
            collator=collate,
            learning_rates={"objective.": 5.0 if form == "encoder" else 1.0},  # new heads learn faster
        )
    seconds = time.perf_counter() - began
    if isinstance(loss, LinearLoss | SupCon):
        loss.eval()
    z, held = features(network, items, collate), features(network, test, collate)
    bank = ClassBank(len(bench.classes), z.shape[1], normalise=False).of_means(z, y)
    rules = {"means": bank.logits(held, 1.0).argmax(1)}
    if isinstance(loss, LinearLoss):
        weight, bias = loss.class_head()
        rules["head"] = (torch.nn.functional.normalize(held, dim=-1) @ weight.T + bias).argmax(1)
    if isinstance(loss, SupCon):
        rules["head"] = loss.head(held).argmax(1)
    found = {rule: scores(said, gold, bench.classes) for rule, said in rules.items()}
    print(
        f"{form} {arm}, batch {batch}, seed {seed}: "
        + ", ".join(f"{rule} {s['weighted_f1']} / {s['macro_f1']}" for rule, s in found.items())
        + f" ({log.steps} steps, {seconds:.0f} s)",
        flush=True,
    )
    return {"seed": seed, "steps": log.steps, "rules": found}


def adapter_form(bench: Bench, kept: dict[str, Any]) -> dict[str, Any]:
    """All rows, frozen vectors of the turn alone."""
    frozen = {}
    for split, rows in (("train", bench.train), ("test", bench.test)):
        file = bench.work / f"meld-{split}-{len(rows)}.pt.npy"
        if not file.exists():
            network = TextFeatures(bench.encoder(), "mean")
            z = torch.nn.functional.normalize(features(network, bench.items(rows, 0), bench.collate), dim=-1)
            np.save(file, z.numpy())
        frozen[split] = torch.from_numpy(np.load(file))
    y = {"train": bench.labels(bench.train).tolist(), "test": bench.labels(bench.test).tolist()}
    items, test = (
        [Item(i, str(i), c, row[None]) for i, (c, row) in enumerate(zip(y[s], frozen[s], strict=True))]
        for s in ("train", "test")
    )
    runs: dict[str, Any] = kept.get("runs", {})
    for seed in bench.args.seeds:
        for batch in (32, 8, 4) if not bench.args.quick else (8,):
            for arm in (*ARMS, *(MORE if batch != 4 else MORE[:1])):
                cell = runs.setdefault(f"{arm} | batch {batch}", [])
                if any(run["seed"] == seed for run in cell):
                    continue
                torch.manual_seed(seed)
                network = Adapter(frozen["train"].shape[1]).standardise(frozen["train"])
                cell.append(
                    fit(bench, arm, "adapter", network, items, test, collate_views, batch=batch, seed=seed, epochs=2)
                )
                bench.keep("adapter", {"rows": len(items), "test_rows": len(test), "epochs": 2, "runs": runs})
    return {"rows": len(items), "test_rows": len(test), "epochs": 2, "turns": 0, "pooling": "mean", "runs": runs}


def encoder_form(bench: Bench, kept: dict[str, Any]) -> dict[str, Any]:
    """The whole encoder on a few rows."""
    runs: dict[str, Any] = kept.get("runs", {})
    n, held = (bench.args.rows, 900) if not bench.args.quick else (64, 64)
    test = bench.items(sample(bench.test, held, 0), 0)
    head = {"rows": n, "test_rows": len(test), "epochs": 2, "turns": 0, "max_tokens": TOKENS, "pooling": "mean"}
    for seed in bench.args.encoder_seeds:
        items = bench.items(sample(bench.train, n, seed), 0)
        cells = [(batch, arm) for batch in (32, 4) for arm in ARMS[:3]] + [(32, ARMS[3]), (4, ARMS[3])]
        for batch, arm in cells if not bench.args.quick else cells[:3]:
            cell = runs.setdefault(f"{arm} | batch {batch}", [])
            if any(run["seed"] == seed for run in cell):
                continue
            network = TextFeatures(bench.encoder(), "mean")
            cell.append(
                fit(bench, arm, "encoder", network, items, test, bench.collate, batch=batch, seed=seed, epochs=2)
            )
            bench.keep("encoder", head | {"runs": runs})
    return head | {"runs": runs}


def frozen_form(bench: Bench) -> dict[str, Any]:
    """What a frozen encoder knows: a linear probe on 2,500 rows, by turns of context and pooling, on the dev set."""
    rows, held = sample(bench.train, 2500 if not bench.args.quick else 100, 0), meld("dev")
    held = held[:60] if bench.args.quick else held
    found = {}
    for turns in (0, TURNS):
        for pooling in ("mean", "mask"):
            network = TextFeatures(bench.encoder(), pooling, bench.tokenizer.mask_token_id)
            z, h = (
                torch.nn.functional.normalize(features(network, bench.items(r, turns), bench.collate), dim=-1).numpy()
                for r in (rows, held)
            )
            probe = Probe(regularisation=3e-2).fit(z, [label for _, label in rows])
            said = torch.tensor([bench.classes.index(c) for c in probe.predict(h)])
            found[f"{turns} turns of context, {pooling}"] = scores(said, bench.labels(held), bench.classes)
            print(f"frozen, {turns} turns, {pooling}: {found[f'{turns} turns of context, {pooling}']}", flush=True)
    return found


def steptime(bench: Bench) -> dict[str, Any]:
    """Milliseconds of an optimiser step, in turn, so that the machine's moods hit both."""
    size, repeats = 4096, 3 if bench.args.quick else 15
    rows = bench.items(sample(bench.train, 4000, 0)[:640], TURNS)
    found: dict[str, Any] = {}
    for form in ("encoder", "adapter"):
        torch.manual_seed(0)
        arms: dict[str, Any] = {}
        for arm in ("cross-entropy", "SPCL"):
            network: Any = TextFeatures(bench.encoder(), "mask", bench.tokenizer.mask_token_id)
            network = network if form == "encoder" else Adapter(384)
            loss = SPCL(7, 384, queue=size) if arm == "SPCL" else LinearLoss(7, 384)
            if isinstance(loss, SPCL):  # full queues, as after a while
                loss.means.of_means(torch.randn(70, 384), torch.arange(70) % 7)
                for _ in range(7):
                    loss.queue.push(torch.randn(size, 384), torch.full((size,), _))
            trained = [p for p in (*network.parameters(), *loss.parameters()) if p.requires_grad]
            arms[arm] = (network.train(), loss, torch.optim.AdamW(trained, 1e-5))
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(repeats + 2):
            batch = bench.collate(rows[32 * (repeat % 20) :][:32])
            if form == "adapter":
                batch = {"features": torch.randn(32, 384), "labels": batch["labels"]}
            given = {name: batch[name] for name in train.MODEL_INPUTS if name in batch}
            for arm in (*arms, *reversed(arms)):
                network, loss, optimiser = arms[arm]
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=form == "encoder" and fast_bf16("cpu")):
                    z = network(**given).features
                    total, count = loss(Outputs(features=z), batch)
                (total / count).backward()
                optimiser.step()
                optimiser.zero_grad()
                if repeat >= 2:
                    times[arm].append(1e3 * (time.perf_counter() - began))
        ratios = [s / c for s, c in zip(times["SPCL"], times["cross-entropy"], strict=True)]
        found[form] = {
            "milliseconds": {arm: round(statistics.median(t), 2) for arm, t in times.items()},
            "ratio": round(statistics.median(ratios), 3),
            "repeats": len(ratios),
        }
        print(f"step time, {form}: {found[form]}", flush=True)
    return found | {"batch": 32, "queue_per_class": size, "classes": 7}


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean and sd over seeds of each score, by the rule that is better on the mean (which favours the baselines).

    `minus_cross_entropy` is the difference to cross-entropy with the same batch and seeds, each by its better rule.
    """

    def best(results: list[dict[str, Any]], score: str) -> tuple[str, list[float]]:
        rules = {rule: [r["rules"][rule][score] for r in results] for rule in results[0]["rules"]}
        rule = max(rules, key=lambda rule: statistics.mean(rules[rule]))
        return rule, rules[rule]

    def told(values: list[float]) -> list[float | None]:
        return [round(statistics.mean(values), 2), round(statistics.stdev(values), 2) if len(values) > 1 else None]

    found = {}
    for cell, results in runs.items():
        entry: dict[str, Any] = {"seeds": len(results)}
        plain = runs[f"cross-entropy | {cell.partition(' | ')[2]}"]
        for score in ("weighted_f1", "macro_f1"):
            rule, values = best(results, score)
            entry[score] = [*told(values), rule]
            paired = zip(values, best(plain, score)[1], strict=False)
            entry[f"{score}_minus_cross_entropy"] = told([mine - theirs for mine, theirs in paired])
        rule = best(results, "macro_f1")[0]
        entry["classes"] = {
            c: round(statistics.mean(r["rules"][rule]["classes"][c] for r in results), 1)
            for c in results[0]["rules"][rule]["classes"]
        }
        found[cell] = entry
    return found


def main() -> None:
    """Run what was asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("adapter", "encoder", "steptime", "frozen"), nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.quick:
        args.seeds = args.encoder_seeds = [0]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work)
        state = store.read_json(work / "emotion.json") if (work / "emotion.json").exists() else {}

        def keep(part: str, found: Any) -> None:
            state[part] = found
            if not args.quick:
                store.write_json(work / "emotion.json", state)

        bench.keep = keep  # type: ignore[attr-defined]
        wanted = args.only or ("steptime", "frozen", "adapter", "encoder")
        if "steptime" in wanted:
            keep("step_time", steptime(bench))
        if "frozen" in wanted:
            keep("frozen", frozen_form(bench))
        if "adapter" in wanted:
            keep("adapter", adapter_form(bench, state.get("adapter", {})))
        if "encoder" in wanted:
            keep("encoder", encoder_form(bench, state.get("encoder", {})))
        counts = {c: sum(label == c for _, label in bench.train) for c in bench.classes}
    if args.quick:
        return
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "precision": "bfloat16 autocast (encoder), float32 (adapter)" if fast_bf16("cpu") else "float32",
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "data": {"name": "MELD", "train_rows_per_class": counts, "test_rows": len(bench.test)},
        "paper_weighted_f1": PAPER,
        "learning_rate_at_batch_32": RATES,
    }
    for part in ("step_time", "frozen"):
        if part in state:
            result[part] = state[part]
    for part in ("adapter", "encoder"):
        if part in state:
            result[part] = {"summary": summary(state[part]["runs"])} | state[part]
    OUT.parent.mkdir(exist_ok=True)
    store.write_json(OUT, result)
    for part in ("adapter", "encoder"):
        for cell, entry in result.get(part, {}).get("summary", {}).items():
            print(f"{part:8} {cell:36} weighted {entry['weighted_f1']}  macro {entry['macro_f1']}")


if __name__ == "__main__":
    main()

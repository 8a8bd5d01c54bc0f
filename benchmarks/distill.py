"""Which distillation loss is worth it? Every loss at the same students, rows and budget, several seeds, two settings.

    python benchmarks/distill.py [--quick] [--seeds 3] [--only encoder|language] [--out FILE]

Encoder: which of MedQuAD's question types does an answer belong to (the answer's first 64 tokens)? Teacher:
all-MiniLM-L6-v2 fine-tuned; student: its layers 0, 2, 5 under the teacher's head, trained on the same rows with each
loss and the cross-entropy of the labels at weight 1. Score: macro-F1 on held-out answers.

Language: SmolLM2-135M-Instruct tuned by LoRA on MedQuAD answers; student: 20 of its 30 layers, chosen by loss increase,
trained whole on other answers with each loss, against a recorded teacher. Scores on held-out answers: nats per token
(of the text itself), overlap@1, overlap@8 and KL to the teacher.

A seed changes the order of the rows (and, for the encoder, the dropout). Every loss sees the same batches. Reported per
loss: the mean over seeds, the standard deviation, and the mean difference to KL paired by seed.

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA, and the embedded models.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from residency import bases, measure, rows, run, store, tokens, train
from residency.compress import closeness, layers
from residency.compress.distillation import Distillation, HeadDistillation
from residency.compress.step_distill import LOSSES, make_loss
from residency.compress.teacher import CachedTeacher, LiveTeacher, record, with_ids
from residency.crossentropy import CrossEntropy
from residency.embedded import base_folder
from residency.evaluate.macro_f1 import MacroF1
from residency.fusedhead import cross_entropy_sum
from residency.labelloss import LabelLoss
from residency.lora import Lora, merge
from residency.objective import next_token_positions
from residency.trainparams import TrainParams

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "distill.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_VOCABULARY = [name for name in LOSSES if name != "uld"]


def medquad() -> list[dict]:
    """The questions and answers, shuffled once."""
    file = DATA / "medquad.jsonl.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        found = [json.loads(line) for line in handle]
    found = [row for row in found if len(row["answer"]) > 80]
    random.Random(0).shuffle(found)
    return found


# ------------------------------------------------------------------ encoder


def encoder(data: list[dict], seeds: int, quick: bool) -> dict[str, Any]:
    """macro-F1 per loss and seed."""
    count = Counter(row["type"] for row in data)
    classes = sorted(c for c, n in count.most_common(10))
    chosen = [row for row in data if row["type"] in classes][: 200 if quick else 1500]
    cut = len(chosen) * 3 // 5
    tokenizer = bases.load_tokenizer(base_folder("all-minilm-l6-v2"))
    read = rows.read([{"id": r["id"], "text": r["answer"][:1500], "label": r["type"]} for r in chosen]).rows
    items, _ = tokens.encode_labelled(read, tokenizer, classes, 64)
    learn, test = items[:cut], items[cut:]
    texts: dict[str, Any] = {"num_labels": len(classes)}
    pad = tokenizer.pad_token_id

    def fit(model: Any, objective: Any, seed: int, epochs: float, rate: float) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            params = TrainParams(epochs=epochs, learning_rate=rate, batch=16, checkpoint_seconds=1e9)
            train.fit(
                model,
                objective,
                learn,
                params,
                pad=pad,
                scratch=Path(scratch),
                seed=seed,
                device=DEVICE,
                collator=lambda batch: tokens.collate_labelled(batch, pad),
            )

    @torch.no_grad()
    def score(model: Any) -> float:
        metric = MacroF1()
        model.eval()
        for start in range(0, len(test), 64):
            part = test[start : start + 64]
            batch = tokens.collate_labelled(part, pad)
            said = model(**{k: batch[k].to(DEVICE) for k in ("input_ids", "attention_mask")}).logits.argmax(-1)
            for item, guess in zip(part, said.tolist(), strict=True):
                metric.update(item.id, classes[guess], classes[int(item.label)])
        return metric.compute(n=10).value

    torch.manual_seed(0)
    teacher = bases.load_classifier(base_folder("all-minilm-l6-v2"), DEVICE, **texts)
    fit(teacher, LabelLoss(), 0, 1 if quick else 3, 1e-4)
    student = layers.keep_layers(teacher, [0, 2, 5])
    begin = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    arms: dict[str, Any] = {"labels only": None, "kl": ("kl", 0.0)}
    arms |= {f"{name} + labels": (name, 1.0) for name in ONE_VOCABULARY}
    if quick:
        arms = {name: arms[name] for name in ("labels only", "kl", "sinkd + labels")}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, arm in arms.items():
            student.load_state_dict(begin)
            student.requires_grad_(True)
            settings = {"k": len(classes)} if arm and arm[0] == "top-kl" else {}
            objective = HeadDistillation(make_loss(arm[0], settings), teacher, arm[1]) if arm else LabelLoss()
            fit(student, objective, seed, 1, 1e-4)
            found[name].append(round(score(student), 5))
            print(f"encoder seed {seed} {name:24} macro-F1 {found[name][-1]:.4f}", flush=True)
    student.load_state_dict(begin)
    return {
        "task": f"MedQuAD question type of an answer, {len(classes)} types, {len(learn)} rows, {len(test)} held out",
        "teacher_macro_f1": round(score(teacher), 5),
        "untrained_student_macro_f1": round(score(student), 5),
        "macro_f1": {name: summary(values, found["kl"]) for name, values in found.items()},
    }


# ------------------------------------------------------------------ language


def language(data: list[dict], seeds: int, quick: bool, wanted: list[str] | None, log: Path | None) -> dict[str, Any]:
    """Nats per token, overlap and divergence per loss and seed; what the log holds already is not run again."""
    base = base_folder("smollm2-135m-instruct")
    tokenizer = bases.load_tokenizer(base)
    pad = tokenizer.pad_token_id
    raw = [
        {"id": r["id"], "instruction": r["question"], "output": " ".join(r["answer"].split()[:35])}
        for r in data[: 60 if quick else 420]
    ]
    items, _ = tokens.encode_all(rows.read(raw).rows, tokenizer, 112)
    tune, learn, test = items[: len(items) // 3], items[len(items) // 3 : -24], items[-24:]
    if quick:
        test = test[:8]
    steps = 2 if quick else 16

    def fit(model: Any, objective: Any, given: list[Any], seed: int, rate: float, limit: int) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            params = TrainParams(learning_rate=rate, batch=4, max_steps=limit, epochs=1000, checkpoint_seconds=1e9)
            train.fit(
                model,
                objective,
                given,
                params,
                pad=pad,
                scratch=Path(scratch),
                seed=seed,
                device=DEVICE,
                collator=lambda batch: with_ids(batch, pad),
            )

    teacher = Lora(rank=8).attach(bases.load_causal_lm(base, DEVICE))
    fit(teacher, CrossEntropy(), tune, 0, 5e-4, 2 if quick else 24)
    teacher, _ = merge(teacher, torch.tensor([items[0].prompt], device=DEVICE))
    some = [tokens.collate(sorted(tune[:16], key=len)[i : i + 8], pad) for i in (0, 8)]
    keep = layers.choose_layers(layers.loss_increase(teacher, some), 20)
    student = layers.keep_layers(teacher, keep)
    begin = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    batches = [with_ids(sorted(test, key=len)[i : i + 8], pad) for i in range(0, len(test), 8)]

    @torch.no_grad()
    def scores(model: Any) -> dict[str, float]:
        near = closeness.compare(model, teacher, batches, DEVICE)
        live, nats, n = LiveTeacher(model), 0.0, 0
        for batch in batches:
            given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            mask, targets = next_token_positions(given["labels"])
            nats += float(cross_entropy_sum(live.hidden(given, mask), live.head, targets))
            n += len(targets)
        return {
            "nats_per_token": round(nats / n, 5),
            "kl_to_teacher": round(near.kl, 5),
            "overlap@1": round(near.overlap[1], 5),
            "overlap@8": round(near.overlap[8], 5),
        }

    arms = ["labels only", "kl", "bild"] if quick else ["labels only", *ONE_VOCABULARY]
    known: dict[str, Any] = store.read_json(log) if log and log.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        voice = LiveTeacher(teacher)
        record(voice, learn, Path(folder) / "teacher", address="benchmark", pad=pad, device=DEVICE)
        cached = CachedTeacher(Path(folder) / "teacher", voice.head, DEVICE)
        for seed in range(seeds):
            for name in arms:
                if f"{name}/{seed}" in known or (seed and wanted and name not in wanted):
                    continue
                student.load_state_dict(begin)
                student.requires_grad_(True)
                objective: Any = CrossEntropy() if name == "labels only" else Distillation(make_loss(name, {}), cached)
                began = time.perf_counter()
                fit(student, objective, learn, seed, 2e-4, steps)
                known[f"{name}/{seed}"] = scores(student) | {"seconds": round(time.perf_counter() - began, 1)}
                print(f"language seed {seed} {name:14} {known[f'{name}/{seed}']}", flush=True)
                if log:
                    store.write_json(log, known)
        student.load_state_dict(begin)
        first, mine = scores(student), scores(teacher)
    measures = list(first)
    ran = {name: [s for s in range(seeds) if f"{name}/{s}" in known] for name in arms}
    return {
        "task": f"MedQuAD answers, {len(learn)} rows, {steps} steps of 4, {len(test)} held out; 20 of 30 layers",
        "teacher": mine,
        "untrained_student": first,
        "kept_layers": keep,
        "losses": {
            name: {
                m: summary([known[f"{name}/{s}"][m] for s in ran[name]], [known[f"kl/{s}"][m] for s in ran[name]])
                for m in measures
            }
            | {"seeds": len(ran[name])}
            for name in arms
        },
    }


def summary(values: list[float], against: list[float]) -> dict[str, Any]:
    """Mean, deviation, and the difference to KL paired by seed."""
    differences = [v - a for v, a in zip(values, against, strict=True)]
    several = len(values) > 1
    return {
        "mean": round(statistics.mean(values), 5),
        "sd": round(statistics.stdev(values), 5) if several else None,
        "minus_kl": round(statistics.mean(differences), 5),
        "minus_kl_sd": round(statistics.stdev(differences), 5) if several else None,
        "values": values,
    }


def main() -> None:
    """Both settings, into one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute, writes nothing unless --out is given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("encoder", "language"), default=None)
    parser.add_argument("--losses", nargs="*", help="language: only these beyond the first seed (kl among them)")
    parser.add_argument("--log", type=Path, help="language: keeps every finished run, to go on from")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    out = given.out or (None if given.quick else OUT)
    data = medquad()
    seeds = 1 if given.quick else given.seeds
    result: dict[str, Any] = {
        "what": "distillation losses at equal students, rows and steps",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": measure.machine() | {"threads": torch.get_num_threads()},
        "versions": run.versions(),
        "seeds": seeds,
    }
    if out and out.exists() and given.only:
        result |= {k: v for k, v in store.read_json(out).items() if k in ("encoder", "language")}
    parts: tuple[Any, ...] = (("encoder", encoder, ()), ("language", language, (given.losses, given.log)))
    for name, part, more in parts:
        if given.only in (None, name):
            result[name] = part(data, seeds, given.quick, *more)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                store.write_json(out, result)
                print(f"written to {out}", flush=True)


if __name__ == "__main__":
    main()

"""Claim: aligned heads merge better than averaged ones, and least squares better still, before and after training.

SmolLM2-135M-Instruct (9 query heads, 3 key/value heads) on real text; calibrated, trained and evaluated on different
documents:

- 3 → 1 key/value head before any training: the mean (GQA's own conversion), the aligned mean (the paper), that with
  norms restored, the low-rank fit, that with the output projection refitted layer by layer; loss on held-out text;
- the same after an equal recovery training (KL against the unmerged model): mean, aligned mean, fit, and the aligned
  mean reached gradually under closing masks (the paper). A seed is the order of the rows;
- grouping, 9 → 3: the model with its three heads repeated to nine, shuffled and turned at random (the same function).
  Neighbours averaged, random groups aligned, found groups aligned; before and after a shorter recovery;
- bytes of KV cache per token, and time per generated token with a long context in the cache.

    python benchmarks/merge_heads.py [--text FILE] [--quick] [--only before recovery grouping decoding]

With --only, the other parts stay in the result as they are. FILE is .jsonl(.gz) with `answer`, `output` or `text`, or
.txt(.gz) with paragraphs; by default MedQuAD if it is there.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from residency import bases, store, train
from residency.compress import headfit, mergeheads
from residency.compress.distillation import Distillation
from residency.compress.headgrams import attentions, collect
from residency.compress.headmasks import GradualMerge
from residency.compress.kl import KL
from residency.compress.teacher import CachedTeacher, LiveTeacher, record, with_ids
from residency.errors import MissingError
from residency.measure import machine
from residency.tokens import Encoded
from residency.trainparams import TrainParams

ROOT = Path(__file__).parent.parent
TEXTS = [root / "shared/data/medquad.jsonl.gz" for root in (ROOT, ROOT.parent)]
RESULT = Path(__file__).parent / "results" / "merge_heads.json"
EXACT, FOLDED = "fit, output refitted", "fit, output refitted, near frequencies folded"
GRADUAL = "aligned mean, gradual"
TRAINED = ("mean", "aligned mean", FOLDED, GRADUAL)
CORPUS = ("calibrate", "evaluate", "length")
TRAINING = ("train_length", "steps", "batch", "learning_rate")
READ: dict[str, tuple[str, ...]] = {
    "before": (*CORPUS, "long", "long_length"),
    "recovery": (*CORPUS, *TRAINING, "seeds"),
    "grouping": (*CORPUS, *TRAINING, "grouping_steps"),
    "decoding": ("rounds", "contexts"),
}
"""Part → the settings it reads."""


def documents(file: Path) -> list[str]:
    """The texts of a file, in a fixed random order."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as handle:
        if ".jsonl" in file.name:
            rows = [json.loads(line) for line in handle]
            texts = [str(r.get("answer") or r.get("output") or r.get("text") or "") for r in rows]
        else:
            texts = handle.read().split("\n\n")
    texts = list(dict.fromkeys(t for t in texts if len(t) > 200))
    random.Random(0).shuffle(texts)
    return texts


def blocks(texts: list[str], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of `count` documents that have so many."""
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
        if len(found) == count:
            return found
    raise SystemExit(f"the text has only {len(found)} documents of {length} tokens where {count} are needed")


def batched(rows: list[list[int]], device: str, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of equally long rows."""
    return [{"input_ids": torch.tensor(rows[i : i + size], device=device)} for i in range(0, len(rows), size)]


class Bench:
    """The model, the texts, and the record as it grows."""

    def __init__(self, args: argparse.Namespace, output: Path | None) -> None:
        self.args, self.output = args, output
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        base = bases.resolve("smollm2-135m-instruct")
        self.tokenizer = bases.load_tokenizer(base.folder)
        self.model = bases.load_causal_lm(base.folder, self.device)
        texts = documents(args.text)
        third = len(texts) // 3
        self.calibration = batched(blocks(texts[:third], self.tokenizer, args.calibrate, args.length), self.device)
        held_out = texts[third : 2 * third][::-1]  # the fit's settings were chosen on its other end
        self.evaluation = batched(blocks(held_out, self.tokenizer, args.evaluate, args.length), self.device)
        long = blocks(held_out, self.tokenizer, args.long, args.long_length) if args.long else []
        self.long = batched(long, self.device, 1)
        rows = blocks(texts[2 * third :], self.tokenizer, args.steps * args.batch, args.train_length)
        self.items = [Encoded(f"d{i}", tuple(row[:1]), tuple(row[1:])) for i, row in enumerate(rows)]
        self.record: dict[str, Any] = {}
        if args.only and output and output.exists():
            self.record = store.read_json(output)
        self.record |= {
            "claim": "nats per token on held-out text after merging key/value heads, before and after recovery",
            "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
            "text": args.text.name,
        }

    def loss(self, model: Any) -> float:
        """Cross-entropy of the held-out text, nats per token."""
        return round(mergeheads.text_loss(model, self.evaluation), 4)

    @cached_property
    def plan(self) -> list[mergeheads.LayerPlan]:
        """All heads of a layer into one."""
        return mergeheads.plan_merge(self.model, self.calibration, 1)

    @cached_property
    def teacher(self) -> CachedTeacher:
        """What the unmerged model says about the rows to train on."""
        voice, self._folder = LiveTeacher(self.model), tempfile.TemporaryDirectory()
        folder = Path(self._folder.name) / "teacher"
        record(voice, self.items, folder, address="benchmark", pad=self.tokenizer.pad_token_id, device=self.device)
        return CachedTeacher(folder, voice.head, self.device)

    def settings(self, part: str) -> dict[str, Any]:
        """Those that a part reads."""
        return {name: getattr(self.args, name) for name in READ[part]}

    def begun(self, part: str, key: str) -> dict[str, Any]:
        """What a part that was cut off, with the same settings, has left in the record to go on from."""
        found: dict[str, Any] = self.record.get(key, {})
        unfinished = self.record["measured"].get(part) == {"settings": self.settings(part)}
        self.record["measured"][part] = {"settings": self.settings(part)}
        return found if unfinished else {}

    def show(self, name: str, value: Any) -> None:
        """One line for the reader."""
        print(f"{name:72} {value}", flush=True)

    def save(self) -> None:
        """Write what there is."""
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def ways(bench: Bench) -> dict[str, Any]:
    """3 → 1 by every way of merging."""
    model, batches = bench.model, bench.calibration
    fit = headfit.FitSettings
    return {
        "original": lambda: model,
        "mean": lambda: mergeheads.merge_heads(model, mergeheads.neighbours(model, 1)),
        "aligned mean": lambda: mergeheads.merge_heads(model, bench.plan),
        "aligned mean, norms restored": lambda: mergeheads.merge_heads(model, bench.plan, "both"),
        "low-rank fit": lambda: headfit.fit_heads(model, bench.plan, batches, fit(refit=False, slack=0.0)),
        EXACT: lambda: headfit.fit_heads(model, bench.plan, batches, fit(slack=0.0)),
        FOLDED: lambda: headfit.fit_heads(model, bench.plan, batches, fit(slack=0.5)),
    }


def before_training(bench: Bench) -> None:
    """Every way, untrained."""
    losses: dict[str, Any] = {"short": {}, "long": {}}
    for name, make in ways(bench).items():
        start, made = time.perf_counter(), make()
        seconds = time.perf_counter() - start
        losses["short"][name] = bench.loss(made)
        said = f"{losses['short'][name]:.3f} nats"
        if bench.long:
            losses["long"][name] = round(mergeheads.text_loss(made, bench.long), 4)
            said += f", long documents {losses['long'][name]:.3f}"
        bench.show(f"3 → 1, {name}", f"{said}   ({seconds:.0f} s)")
    bench.record["before_training"] = losses


@torch.no_grad()
def repeated(model: Any, seed: int = 0) -> Any:
    """The same function with nine key/value heads: repeated, shuffled per layer, each in random coordinates."""
    wide, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    turns = []
    for a in attentions(wide):
        order = torch.randperm(a.heads, generator=generator)
        source = order // a.share
        for name in ("k_proj", "v_proj"):
            W = getattr(a.module, name).weight
            rows = W.view(a.kv_heads, a.head_dim, -1)[source.to(W.device)].flatten(0, 1)
            setattr(a.module, name, mergeheads.linear(getattr(a.module, name), rows, None))
        W = a.module.q_proj.weight
        W.copy_(W.view(a.heads, a.head_dim, -1)[order.to(W.device)].flatten(0, 1))
        W = a.module.o_proj.weight
        W.copy_(W.view(len(W), a.heads, a.head_dim)[:, order.to(W.device)].flatten(1))
        angles = 6.28 * torch.rand(a.heads, a.head_dim // 2, generator=generator, dtype=torch.float64)
        square = torch.randn(a.heads, a.head_dim, a.head_dim, generator=generator, dtype=torch.float64)
        turns.append((angles, torch.linalg.qr(square)[0]))
    wide.config.num_key_value_heads = wide.config.num_attention_heads
    for a in attentions(wide):
        a.module.num_key_value_groups = 1
    plan = [
        mergeheads.LayerPlan(tuple((i,) for i in range(9)), mergeheads.headalign.planar(angles), Q, Q[:0], Q[:0])
        for angles, Q in turns
    ]
    mergeheads.apply_alignment(wide, plan)
    return wide


def grouping(bench: Bench) -> None:
    """9 → 3 of the repeated model, untrained and after a short recovery."""
    wide = repeated(bench.model)
    grams = collect(wide, bench.calibration)
    rng = random.Random(0)

    def random_groups() -> tuple[tuple[int, ...], ...]:
        order = rng.sample(range(9), 9)
        return tuple(tuple(sorted(order[i : i + 3])) for i in (0, 3, 6))

    def aligned(plan: Any) -> Any:
        return mergeheads.merge_heads(wide, [plan(g) for g in grams])

    made = {
        "original, nine heads": wide,
        "mean of neighbours": mergeheads.merge_heads(wide, mergeheads.neighbours(wide, 3)),
        "aligned mean of random groups": aligned(lambda g: mergeheads.plan_layer(g, 3, groups=random_groups())),
        "aligned mean of neighbours": aligned(lambda g: mergeheads.plan_layer(g, 3, "none")),
        "aligned mean of the groups found": aligned(lambda g: mergeheads.plan_layer(g, 3)),
    }
    losses = bench.record["grouping_9_to_3"] = {}
    for name, model in made.items():
        losses[name] = bench.loss(model)
        bench.show(f"9 → 3, {name}", f"{losses[name]:.3f} nats")
    trained = [name for name in made if name not in ("original, nine heads", "aligned mean of neighbours")]
    if steps := bench.args.grouping_steps:
        runs = bench.record["grouping_after_training"] = {"steps": steps}
        for name in trained:
            runs[name] = recover(bench, made.pop(name), 0, steps)
            bench.show(f"9 → 3, {name}, after {steps} steps", f"{runs[name]['nats_per_token']:.3f} nats")
            bench.save()


def recover(bench: Bench, model: Any, seed: int, steps: int, gradual: bool = False) -> dict[str, Any]:
    """One recovery training; the model given is trained, or if it is to be merged gradually the aligned one."""
    args, start = bench.args, time.perf_counter()
    objective: Any = Distillation(KL(), bench.teacher)
    model.requires_grad_(True)
    rates: dict[str, float] = {}
    if gradual:
        mergeheads.apply_alignment(model, bench.plan)
        objective = GradualMerge(model, 1, objective, seed=seed)
        rates = objective.learning_rates(steps, args.learning_rate)
    pad = bench.tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as scratch:
        log = train.fit(
            model,
            objective,
            bench.items,
            TrainParams(max_steps=steps, batch=args.batch, learning_rate=args.learning_rate, checkpoint_seconds=1e6),
            pad=pad,
            scratch=Path(scratch),
            seed=seed,
            device=bench.device,
            collator=lambda items: with_ids(items, pad),
            learning_rates=rates,
        )
    if gradual:
        objective.finish()
    return {
        "nats_per_token": bench.loss(model.eval()),
        "kl_first": round(log.loss[0], 4),
        "kl_last": round(statistics.mean(log.loss[-3:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def recovery(bench: Bench) -> None:
    """3 → 1: the same training for each, several orders of the rows."""
    starts: dict[str, Any] = {name: ways(bench)[name]() for name in TRAINED if name != GRADUAL}
    starts[GRADUAL] = bench.model
    before: dict[str, Any] = bench.begun("recovery", "after_training")
    runs: dict[str, list[dict[str, Any]]] = {name: before.get(name, {}).get("runs", []) for name in TRAINED}
    for seed in range(bench.args.seeds):
        for name, model in starts.items():
            if len(runs[name]) > seed:
                continue
            runs[name].append(recover(bench, copy.deepcopy(model), seed, bench.args.steps, name == GRADUAL))
            bench.show(f"3 → 1, {name}, seed {seed}, after {bench.args.steps} steps", runs[name][-1])
            bench.record["after_training"] = {
                name: summary(found, runs["aligned mean"]) for name, found in runs.items()
            }
            bench.save()


def summary(runs: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss over seeds, also minus that of the aligned mean at the same seed, and the runs."""
    values = [run["nats_per_token"] for run in runs]
    differences = [v - run["nats_per_token"] for v, run in zip(values, against, strict=False)]
    found: dict[str, Any] = {}
    for name, some in (("nats_per_token", values), ("minus_aligned_mean", differences)):
        if some:
            found[name] = {"mean": round(statistics.mean(some), 4)}
            found[name] |= {"sd": round(statistics.stdev(some), 4)} if len(some) > 1 else {}
    return found | {"runs": runs}


@torch.no_grad()
def decoding(bench: Bench) -> None:
    """KV bytes per token, and time per token behind a cache of random keys and values; the two take turns."""
    from transformers import DynamicCache

    small = mergeheads.merge_heads(bench.model, mergeheads.neighbours(bench.model, 1))
    models = {"3": bench.model, "1": small}
    rows = bench.record["decoding"] = []
    for context in bench.args.contexts:
        seconds: dict[str, list[tuple[float, float]]] = {"3": [], "1": []}
        caches = {}
        for name, model in models.items():
            caches[name] = DynamicCache(config=model.config)
            for layer, a in enumerate(attentions(model)):
                shape = (1, a.kv_heads, context, a.head_dim)
                keys, values = (torch.randn(shape, device=bench.device) for _ in range(2))
                caches[name].update(keys, values, layer)
        token = torch.tensor([[100]], device=bench.device)
        for round_ in range(bench.args.rounds + 1):  # the first warms up
            for name, model in models.items():
                wall, own = time.perf_counter(), time.process_time()
                model(token, past_key_values=caches[name], use_cache=True)
                if bench.device == "cuda":
                    torch.cuda.synchronize()
                if round_:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - own))
        for name, cache in caches.items():
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            wall, own = (round(1e3 * statistics.median(some), 2) for some in zip(*seconds[name], strict=True))
            row = {"kv_heads": int(name), "context": context, "kv_bytes_per_token": held // cache.get_seq_length()}
            rows.append(row | {"ms_per_token": wall, "process_ms_per_token": own})
            bench.show(f"{name} key/value heads, {context} tokens in the cache", f"{wall} ms, process {own} ms")


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=next((t for t in TEXTS if t.exists()), None))
    parser.add_argument("--only", nargs="+", choices=READ, help="measure these anew, keep the others")
    parser.add_argument("--calibrate", type=int, default=16, help="documents")
    parser.add_argument("--evaluate", type=int, default=16, help="documents")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--long", type=int, default=2, help="longer documents to evaluate on too")
    parser.add_argument("--long-length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--train-length", type=int, default=128, help="tokens of each document trained on, once")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the rows")
    parser.add_argument("--grouping-steps", type=int, default=20, help="of the recovery after 9 → 3; 0 for none")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--quick", action="store_true", help="minutes; writes nothing")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name}")
    args = parser.parse_args()
    if args.text is None or not args.text.exists():
        print("skipped: no text; give --text FILE (.jsonl or .txt, also .gz)")
        return
    if args.quick:
        args.calibrate, args.evaluate, args.length, args.steps, args.contexts = 8, 4, 128, 3, [512]
        args.train_length, args.rounds, args.long, args.seeds, args.grouping_steps = 64, 3, 0, 1, 2
    output = args.out or (None if args.quick else RESULT)
    try:
        bench = Bench(args, output)
    except MissingError as error:
        print(f"skipped: {error}")
        return
    does = {"before": before_training, "recovery": recovery, "grouping": grouping, "decoding": decoding}
    measured = bench.record.setdefault("measured", {})
    for part in args.only or READ:
        wall, own, load = time.perf_counter(), time.process_time(), os.getloadavg()[0]
        does[part](bench)
        measured[part] = {
            "date": date.today().isoformat(),
            "threads": torch.get_num_threads(),
            "seconds": round(time.perf_counter() - wall),
            "process_seconds": round(time.process_time() - own),
            "load_average": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
            "settings": bench.settings(part),
        }
        bench.save()
    if output:
        print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())

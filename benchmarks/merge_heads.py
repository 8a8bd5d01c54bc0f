"""Claim: aligned heads merge better than averaged ones, and least squares better still, before and after training.

SmolLM2-135M-Instruct (9 query heads, 3 key/value heads) on real text, calibrated and evaluated on different documents:

- 3 → 1 key/value head before any training: the mean (GQA's own conversion), the aligned mean (the paper), that with
  norms restored, the low-rank fit, that with the output projection refitted layer by layer; loss on held-out text;
- grouping, 9 → 3: the model with its three heads repeated to nine, shuffled and turned at random (the same function).
  Neighbours averaged, random groups aligned, found groups aligned;
- after the same short recovery training (KL against the unmerged model): mean, aligned mean, fit;
- bytes of KV cache per token and time per generated token with a long context in the cache.

    python benchmarks/merge_heads.py [--text FILE] [--quick] [--steps 60]

FILE is .jsonl(.gz) with `answer`, `output` or `text`, or .txt(.gz) with paragraphs; by default MedQuAD if it is there.
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
from pathlib import Path
from typing import Any

import torch

from residency import bases, train
from residency.compress import headfit, mergeheads
from residency.compress.distillation import Distillation
from residency.compress.headgrams import attentions, collect
from residency.compress.kl import KL
from residency.errors import MissingError
from residency.measure import machine
from residency.tokens import Encoded
from residency.trainparams import TrainParams

ROOT = Path(__file__).parent.parent
TEXTS = [root / "shared/data/medquad.jsonl.gz" for root in (ROOT, ROOT.parent)]
RESULT = Path(__file__).parent / "results" / "merge_heads.json"
EXACT, FOLDED = "fit, output refitted", "fit, output refitted, near frequencies folded"
TRAINED = ("mean", "aligned mean", FOLDED)
PILOT = {"original": 2.973, "mean": 9.756, "aligned mean": 6.479}
"""Cross-entropies of a pilot on other text (BoolQ passages), for orientation."""


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
    """The model, the texts, and the table as it grows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        base = bases.resolve("smollm2-135m-instruct")
        self.tokenizer = bases.load_tokenizer(base.folder)
        self.model = bases.load_causal_lm(base.folder, self.device)
        texts = documents(args.text)
        third = len(texts) // 3
        self.calibration = batched(blocks(texts[:third], self.tokenizer, args.calibrate, args.length), self.device)
        self.evaluation = batched(
            blocks(texts[third : 2 * third], self.tokenizer, args.evaluate, args.length), self.device
        )
        long = blocks(texts[third : 2 * third], self.tokenizer, args.long, args.long_length) if args.long else []
        self.long = batched(long, self.device, 1)
        rows = blocks(texts[2 * third :], self.tokenizer, args.rows, args.train_length)
        self.items = [Encoded(f"d{i}", tuple(row[:1]), tuple(row[1:])) for i, row in enumerate(rows)]
        self.args = args

    def loss(self, model: Any) -> float:
        """Cross-entropy of the held-out text, nats per token."""
        return round(mergeheads.text_loss(model, self.evaluation), 4)

    def show(self, name: str, value: Any) -> None:
        """One line for the reader."""
        print(f"{name:58} {value}", flush=True)


def before_training(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """3 → 1 by every way of merging; also the models that are to be trained."""
    model, batches = bench.model, bench.calibration
    plan = mergeheads.plan_merge(model, batches, 1)
    ways: dict[str, Any] = {
        "original": lambda: model,
        "mean": lambda: mergeheads.merge_heads(model, mergeheads.neighbours(model, 1)),
        "aligned mean": lambda: mergeheads.merge_heads(model, plan),
        "aligned mean, norms restored": lambda: mergeheads.merge_heads(model, plan, "both"),
        "low-rank fit": lambda: headfit.fit_heads(model, plan, batches, headfit.FitSettings(refit=False, slack=0.0)),
        EXACT: lambda: headfit.fit_heads(model, plan, batches, headfit.FitSettings(slack=0.0)),
        FOLDED: lambda: headfit.fit_heads(model, plan, batches, headfit.FitSettings(slack=0.5)),
    }
    losses: dict[str, Any] = {"short": {}, "long": {}}
    kept: dict[str, Any] = {}
    for name, make in ways.items():
        start, made = time.perf_counter(), make()
        seconds = time.perf_counter() - start
        losses["short"][name] = bench.loss(made)
        said = f"{losses['short'][name]:.3f} nats"
        if bench.long:
            losses["long"][name] = round(mergeheads.text_loss(made, bench.long), 4)
            said += f", long documents {losses['long'][name]:.3f}"
        bench.show(f"3 → 1, {name}", f"{said}   ({seconds:.0f} s)")
        if name in TRAINED:
            kept[name] = made
    return losses, kept


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


def grouping(bench: Bench) -> dict[str, float]:
    """9 → 3 of the repeated model."""
    wide = repeated(bench.model)
    grams = collect(wide, bench.calibration)
    rng = random.Random(0)

    def random_groups() -> tuple[tuple[int, ...], ...]:
        order = rng.sample(range(9), 9)
        return tuple(tuple(sorted(order[i : i + 3])) for i in (0, 3, 6))

    ways = {
        "original, nine heads": lambda: wide,
        "mean of neighbours": lambda: mergeheads.merge_heads(wide, mergeheads.neighbours(wide, 3)),
        "aligned mean of random groups": lambda: mergeheads.merge_heads(
            wide, [mergeheads.plan_layer(g, 3, groups=random_groups()) for g in grams]
        ),
        "aligned mean of neighbours": lambda: mergeheads.merge_heads(
            wide, [mergeheads.plan_layer(g, 3, "none") for g in grams]
        ),
        "aligned mean of the groups found": lambda: mergeheads.merge_heads(
            wide, [mergeheads.plan_layer(g, 3) for g in grams]
        ),
    }
    losses = {}
    for name, make in ways.items():
        losses[name] = bench.loss(make())
        bench.show(f"9 → 3, {name}", f"{losses[name]:.3f} nats")
    return losses


def recovery(bench: Bench, kept: dict[str, Any]) -> dict[str, Any]:
    """The same short training for each."""
    args, found = bench.args, {}
    for name, model in kept.items():
        model.requires_grad_(True)
        params = TrainParams(
            max_steps=args.steps, batch=args.batch, learning_rate=args.learning_rate, max_tokens=args.train_length
        )
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            log = train.fit(
                model,
                Distillation(KL(), bench.model),
                bench.items,
                params,
                pad=bench.tokenizer.pad_token_id,
                scratch=Path(scratch),
                device=bench.device,
            )
        loss = bench.loss(model.eval())
        found[name] = {
            "nats_per_token": loss,
            "kl_first": round(log.loss[0], 4),
            "kl_last": round(statistics.mean(log.loss[-3:]), 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        bench.show(f"3 → 1, {name}, after {args.steps} steps", f"{loss:.3f} nats")
    return found


@torch.no_grad()
def decoding(bench: Bench, small: Any, contexts: list[int]) -> list[dict[str, Any]]:
    """KV bytes per token, and time per token behind a cache of random keys and values."""
    from transformers import DynamicCache

    rows = []
    for context in contexts:
        seconds: dict[str, list[float]] = {"3": [], "1": []}
        caches = {}
        for name, model in (("3", bench.model), ("1", small)):
            a = attentions(model)
            cache = DynamicCache(config=model.config)
            for layer, attention in enumerate(a):
                shape = (1, attention.kv_heads, context, attention.head_dim)
                cache.update(torch.randn(shape, device=bench.device), torch.randn(shape, device=bench.device), layer)
            caches[name] = cache
        token = torch.tensor([[100]], device=bench.device)
        for round_ in range(bench.args.rounds + 1):  # the first warms up
            for name, model in (("3", bench.model), ("1", small)):
                start = time.perf_counter()
                model(token, past_key_values=caches[name], use_cache=True)
                if bench.device == "cuda":
                    torch.cuda.synchronize()
                if round_:
                    seconds[name].append(time.perf_counter() - start)
        for name, cache in caches.items():
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            per_token = held // cache.get_seq_length()
            row = {"kv_heads": int(name), "context": context, "kv_bytes_per_token": per_token}
            row["ms_per_token"] = round(1e3 * statistics.median(seconds[name]), 2)
            rows.append(row)
            bench.show(f"{name} key/value heads, {context} tokens in the cache", f"{row['ms_per_token']} ms per token")
    return rows


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=next((t for t in TEXTS if t.exists()), None))
    parser.add_argument("--calibrate", type=int, default=32, help="documents")
    parser.add_argument("--evaluate", type=int, default=12, help="documents")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--long", type=int, default=4, help="longer documents to evaluate on too")
    parser.add_argument("--long-length", type=int, default=1024, help="tokens of each")
    parser.add_argument("--rows", type=int, default=240, help="documents to train on")
    parser.add_argument("--train-length", type=int, default=128, help="tokens of each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--skip-grouping", action="store_true")
    parser.add_argument("--quick", action="store_true", help="minutes; writes nothing")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name}")
    args = parser.parse_args()
    if args.text is None or not args.text.exists():
        print("skipped: no text; give --text FILE (.jsonl or .txt, also .gz)")
        return
    if args.quick:
        args.calibrate, args.evaluate, args.length, args.steps, args.contexts = 8, 4, 128, 3, [512]
        args.rows, args.train_length, args.rounds, args.long = 12, 64, 3, 0
    try:
        bench = Bench(args)
    except MissingError as error:
        print(f"skipped: {error}")
        return
    start, load = time.perf_counter(), os.getloadavg()[0]
    losses, kept = before_training(bench)
    record: dict[str, Any] = {
        "claim": "nats per token on held-out text after merging 3 key/value heads into 1",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": date.today().isoformat(),
        "text": args.text.name,
        "settings": {k: v for k, v in vars(args).items() if k not in ("text", "out", "quick")},
        "pilot_on_other_text": PILOT,
        "before_training": losses,
    }
    if not args.skip_grouping:
        record["grouping_9_to_3"] = grouping(bench)
    record["decoding"] = decoding(bench, kept["aligned mean"], args.contexts)
    if args.steps:
        record["after_training"] = recovery(bench, kept)
    record["seconds"] = round(time.perf_counter() - start)
    record["load_average"] = {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)}
    output = args.out or (None if args.quick else RESULT)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())

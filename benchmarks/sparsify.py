"""Claim: a penalty that grows in stages buys zeros for less perplexity, and zeros buy decoding speed.

SmolLM2-135M-Instruct on real text (answers of MedQuAD, packed), every arm with the same tokens, order, learning rate:

- "relu": SiLU exchanged for ReLU and trained on, no penalty (plain ReLU-fication);
- "fixed": the same with a constant penalty from the first step;
- "prosparse": the penalty rises in sine stages to a peak;
- "prosparse, kl": the same, learning the original model's distribution instead of the text.

Recorded per arm: loss and sparsity along the training, on text not seen before; then on held-out text, the loss and
sparsity without a threshold and with a global FATReLU threshold at several shares of silent gates, from which the loss
at equal sparsity is interpolated (arms differ in sparsity, so their losses alone say nothing). The paper trains for
34 billion tokens where this takes some ten thousand: directions can be compared, levels cannot. Every run is added to
the runs in the result; `summary` is over those that differ in their seed alone, that is in their texts, paired by it.

Then speed, on the last arm's model: decoding with a key/value cache at batch 1, dense and sparse in turn, at the
sparsity its training reached, and with thresholds that bring it to 80 and 90 % whatever that does to quality. The
feed-forward layers alone are the business of `sparse_ffn.py`.

    python benchmarks/sparsify.py                   # writes benchmarks/results/sparsify.json
    python benchmarks/sparsify.py --quick           # a tiny model, generated text, seconds; writes nothing
    python benchmarks/sparsify.py --steps 400 --data medquad.jsonl.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from residency import bases, store, train
from residency.compat import pick_device
from residency.compress import fatrelu, relufy
from residency.compress.distillation import Distillation
from residency.compress.kl import KL
from residency.compress.prosparse import ProSparse, SineStages
from residency.compress.sparseffn import sparse_decoding
from residency.compress.sparsespeed import decode_speed, speed_against_sparsity
from residency.crossentropy import CrossEntropy
from residency.measure import machine
from residency.tokens import Encoded, collate
from residency.trainparams import TrainParams

RESULT = Path(__file__).parent / "results" / "sparsify.json"
TEXTS = [root / "shared/data/medquad.jsonl.gz" for root in Path(__file__).resolve().parents[1:3]]
SHARES = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LEVELS = (0.7, 0.75, 0.8, 0.85, 0.9)
SAME = ("steps", "batch", "width", "held_out", "learning_rate", "peak", "fixed")
"""Settings that runs share which a summary is taken over."""


def text_rows(file: Path, tokenizer: Any, width: int, rows: int, seed: int = 0) -> list[Encoded]:
    """Answers in a seeded random order, joined by end-of-text tokens, cut into rows of `width` tokens."""
    raw = file.read_bytes()
    texts = [
        json.loads(line)["answer"] for line in (gzip.decompress(raw) if file.suffix == ".gz" else raw).splitlines()
    ]
    random.Random(seed).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= width * rows:
            break
    starts = range(0, len(ids) - width + 1, width)
    return [Encoded(str(i), (ids[i],), tuple(ids[i + 1 : i + width])) for i in starts][:rows]


def schedules(args: argparse.Namespace) -> dict[str, tuple[SineStages, bool]]:
    """Arm → its penalty, and whether it learns from the original model."""
    peak = args.peak
    staged = SineStages((0.05 * peak, 0.4 * peak, peak, peak), (0.2, 0.3, 0.6, 0.9, 1.0))
    return {
        "relu": (SineStages(), False),
        "fixed": (SineStages((args.fixed,), (0.0, 1.0)), False),
        "prosparse": (staged, False),
        "prosparse, kl": (staged, True),
    }


def train_arm(
    folder: Path, schedule: SineStages, taught: bool, rows: list[Encoded], args: Any
) -> tuple[Any, Any, float]:
    """One arm: the trained model, what it went through, seconds."""
    model = relufy.relufy(bases.load_causal_lm(folder, args.device)).requires_grad_(True)
    inner = Distillation(KL(), bases.load_causal_lm(folder, args.device)) if taught else CrossEntropy()
    params = TrainParams(
        max_steps=args.steps, batch=args.batch, learning_rate=args.learning_rate, warmup=0.05, checkpoint_seconds=1e6
    )
    start = time.perf_counter()
    with ProSparse(inner, model, schedule) as objective, tempfile.TemporaryDirectory() as scratch:
        train.fit(model, objective, rows, params, pad=0, scratch=Path(scratch), device=args.device)
    return model, objective, time.perf_counter() - start


def sweep(model: Any, calibration: list[Any], held_out: list[Any]) -> list[dict[str, float]]:
    """Held-out loss and sparsity without a threshold and at growing ones."""
    found = []
    quantiles = fatrelu.GateQuantiles(model, calibration)
    for share in (0.0, *SHARES):
        t = quantiles.at(share)[0]
        if share and not t:
            continue
        relufy.set_thresholds(model, t)
        loss, zeros = fatrelu.loss_and_sparsity(model, held_out)
        found.append({"threshold": round(t, 5), "loss": round(loss, 4), "sparsity": round(zeros.mean, 4)})
    relufy.set_thresholds(model, 0.0)
    return found


def loss_at(points: list[dict[str, float]], sparsity: float) -> float | None:
    """Loss at a sparsity, between the two measured points around it."""
    points = sorted(points, key=lambda p: p["sparsity"])
    for a, b in pairwise(points):
        if a["sparsity"] <= sparsity <= b["sparsity"] and a["sparsity"] < b["sparsity"]:
            share = (sparsity - a["sparsity"]) / (b["sparsity"] - a["sparsity"])
            return round(a["loss"] + share * (b["loss"] - a["loss"]), 4)
    return None


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss at equal sparsity per arm over seeds, and minus that of other arms at the same seed."""
    alike: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = {}
    for run in runs:
        of = alike.setdefault(tuple(run["settings"][key] for key in SAME), {})
        for arm, found in run["arms"].items():
            of.setdefault(arm, {})[run["settings"].get("seed", 0)] = found["loss_at_sparsity"]
    tables = []
    for key, arms in alike.items():
        table: dict[str, Any] = {"settings": dict(zip(SAME, key, strict=True)), "arms": {}}
        for arm, seeds in arms.items():
            rows = table["arms"][arm] = {"seeds": sorted(seeds), "loss_at_sparsity": {}}
            for level in map(str, LEVELS):
                values = {seed: seeds[seed][level] for seed in sorted(seeds) if seeds[seed][level] is not None}
                row = rows["loss_at_sparsity"][level] = {"values": list(values.values()), **spread(values.values())}
                for other in ("relu", "fixed")[: {"relu": 0, "fixed": 1}.get(arm)]:
                    base = {s: v[level] for s, v in arms.get(other, {}).items() if v[level] is not None}
                    if both := values.keys() & base.keys():
                        row[f"minus_{other}"] = spread(values[s] - base[s] for s in sorted(both))
        tables.append(table)
    return tables


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation where there are several, and their number."""
    some = list(values)
    if not some:
        return {"mean": None, "sd": None, "n": 0}
    sd = round(statistics.stdev(some), 4) if len(some) > 1 else None
    return {"mean": round(statistics.mean(some), 4), "sd": sd, "n": len(some)}


def decoding(model: Any, calibration: list[Any], prompt: list[int], args: Any) -> list[dict[str, Any]]:
    """Tokens per second, dense and sparse in turn, at the sparsity there is and at given ones."""
    found = []
    for goal in (None, 0.8, 0.9):
        relufy.set_thresholds(model, 0.0)
        if goal:
            fatrelu.shift_thresholds(model, calibration[:2], sparsity=goal)
        for dtype in ("float32", "bfloat16"):
            copy = model.to(getattr(torch, dtype))
            speeds: dict[str, list[float]] = {"dense": [], "sparse": []}
            for _ in range(args.rounds):
                speeds["dense"].append(decode_speed(copy, prompt, args.new_tokens, 1))
                with sparse_decoding(copy):
                    speeds["sparse"].append(decode_speed(copy, prompt, args.new_tokens, 1))
            dense, sparse = (statistics.median(speeds[k]) for k in ("dense", "sparse"))
            model.to(torch.float32)
            _, zeros = fatrelu.loss_and_sparsity(model, calibration[:2])
            row = {
                "goal": goal,
                "dtype": dtype,
                "sparsity": round(zeros.mean, 4),
                "dense_tokens_per_second": round(dense, 2),
            }
            found.append(row | {"sparse_tokens_per_second": round(sparse, 2), "speedup": round(sparse / dense, 3)})
            print("  decoding", found[-1], flush=True)
    relufy.set_thresholds(model, 0.0)
    return found


def compare(args: argparse.Namespace, record: dict[str, Any], save: Any) -> None:
    """All arms, then speed; `save` after each."""
    folder = bases.resolve("tiny-llama" if args.quick else "smollm2-135m-instruct").folder
    tokenizer = bases.load_tokenizer(folder)
    needed = args.steps * args.batch + 2 * args.held_out
    rows = text_rows(args.data, tokenizer, args.width, needed, args.seed)
    if len(rows) < needed:
        raise SystemExit(f"{args.data} has {len(rows)} rows of {args.width} tokens, {needed} are needed")
    collated = [collate(rows[i : i + 8], 0) for i in range(0, 2 * args.held_out, 8)]
    half = len(collated) // 2
    held_out, calibration, training = collated[:half], collated[half:], rows[2 * args.held_out :]
    original = bases.load_causal_lm(folder, args.device)
    loss, _ = fatrelu.loss_and_sparsity(original, held_out)
    record["original"] = {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 2)}
    swapped, zeros = fatrelu.loss_and_sparsity(relufy.relufy(original), held_out)
    record["substituted"] = {"loss": round(swapped, 4), "sparsity": round(zeros.mean, 4)}
    print("original", record["original"], "substituted", record["substituted"], flush=True)
    record["arms"] = {}
    model = original
    for name, (schedule, taught) in schedules(args).items():
        if args.arms and name not in args.arms:
            continue
        model, objective, seconds = train_arm(folder, schedule, taught, training, args)
        points = sweep(model, calibration, held_out)
        _, zeros = fatrelu.loss_and_sparsity(model, held_out)
        record["arms"][name] = {
            "schedule": {"peaks": schedule.peaks, "ends": schedule.ends},
            "seconds": round(seconds, 1),
            "tokens": args.steps * args.batch * args.width,
            "along": [
                {key: round(getattr(moment, key), 4) for key in ("progress", "weight", "loss", "magnitude", "sparsity")}
                for moment in objective.curve()
            ],
            "threshold_sweep": points,
            "perplexity": round(math.exp(points[0]["loss"]), 2),
            "sparsity_per_layer": [round(v, 4) for v in zeros.per_layer.tolist()],
            "sparsity_per_place": dict(
                zip(zeros.labels(), [round(v, 4) for v in zeros.per_place.tolist()], strict=True)
            ),
            "loss_at_sparsity": {str(level): loss_at(points, level) for level in LEVELS},
        }
        print(name, f"{seconds:.0f} s", points, record["arms"][name]["loss_at_sparsity"], flush=True)
        save()
    if not args.no_speed:
        prompt = list(rows[0].prompt + rows[0].answer)[:64]
        record["decoding"] = decoding(model, calibration, prompt, args)
        record["ffn"] = speed_against_sparsity(model, shares=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95), repeats=args.rounds)
        print("ffn", record["ffn"], flush=True)
        save()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model; nothing is written unless --output is given"
    )
    parser.add_argument(
        "--data", type=Path, default=next((f for f in TEXTS if f.exists()), TEXTS[0]), help="JSON lines with `answer`"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--width", type=int, default=128, help="tokens per row")
    parser.add_argument("--held-out", type=int, default=32, help="rows of held-out text, and as many to calibrate")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--peak", type=float, default=0.6, help="last peak of the staged penalty")
    parser.add_argument("--fixed", type=float, default=0.4, help="the constant penalty")
    parser.add_argument("--arms", nargs="*", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="which texts are trained on and held out")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.device = pick_device("auto")
    generated = tempfile.TemporaryDirectory()
    if args.quick:
        args.steps, args.held_out, args.width, args.rounds, args.new_tokens = 6, 16, 32, 1, 3
        args.data = Path(generated.name) / "text.jsonl"
        words = random.Random(0).choices(["permit", "wall", "roof", "fee", "plan", "the", "a", "of", "needs"], k=900)
        rows = [{"answer": " ".join(words[i : i + 30])} for i in range(0, 900, 30)]
        args.data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    record: dict[str, Any] = {
        "claim": "a staged penalty buys zeros for less perplexity than a constant one; zeros buy decoding speed",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "load_average": {"before": round(os.getloadavg()[0], 1)},  # above the number of cores: seconds are inflated
        "date": date.today().isoformat(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "output", "arms")}
        | {"text": args.data.name},
    }
    output = args.output or (None if args.quick else RESULT)
    whole = store.read_json(output) if output and output.exists() else {"runs": []}
    whole["runs"].append(record)

    def save() -> None:
        record["load_average"]["after"] = round(os.getloadavg()[0], 1)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            whole["summary"] = summary(whole["runs"])
            output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    compare(args, record, save)
    if output:
        print(f"written to {output}")


if __name__ == "__main__":
    main()

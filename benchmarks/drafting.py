"""Claim: a draft that reads its own guesses makes a specialist's answers come sooner, without changing them.

Target: SmolLM2-135M-Instruct tuned by LoRA on MedQuAD answers. Its own greedy answers to training questions are the
drafters' texts: Medusa, Clover and Clover-2 with the same texts, steps, batches, learning rate and draft vocabulary.
(Clover-2 learns the target's distribution and states, the others the text's tokens, as published; `--soft` gives all of
them Clover-2's losses.) An assistant for transformers' assisted decoding is the target's own first layers, trained on
the same texts for about as long. Then, on questions nobody was trained on, greedy, batch 1:

- tokens per step, nodes per step and milliseconds per step (drafting, verifying), tokens per second; every decoder in
  turn on every question, so that the machine's moods hit all alike; medians over questions of tokens/s, and its ratio
  to plain decoding: to transformers' `generate` as it comes, and to plain decoding on our loop with packed weights;
- tree shapes for Clover-2;
- losslessness: 500 prompts by every drafter against plain greedy, in batches (`--lossless`); where texts differ, the
  gap between the two best logits at the first difference is measured on a plain pass, and only gaps below 1e-4 pass.

    python benchmarks/drafting.py                       # everything; results/drafting.json
    python benchmarks/drafting.py --quick               # a minute, writes nothing
    python benchmarks/drafting.py --work DIR --only train|speed|lossless

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA, and the embedded SmolLM2.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from residency import bases, measure, rows, run, store, tokens, train
from residency.compat import fast_bf16
from residency.compress import layers
from residency.crossentropy import CrossEntropy
from residency.embedded import base_folder
from residency.infer import saveddraft
from residency.infer.drafted import Drafted
from residency.infer.drafter import frequent_tokens
from residency.infer.draftloss import DraftLoss, DraftWeights, collate_thoughts, record
from residency.infer.lookup import PromptLookup, WithLookup
from residency.infer.selftext import answers
from residency.infer.tree import DynamicTree, StaticTree, TreePolicy
from residency.lora import Lora, merge
from residency.packed import packed
from residency.trainparams import TrainParams

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "drafting.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HARD = DraftWeights(value=0.0, soft=False)
TREES: dict[str, TreePolicy] = {
    "chain of 2": StaticTree.chain(2),
    "chain of 4": StaticTree.chain(4),
    "dynamic, 4 nodes": DynamicTree(4, 4),
    "dynamic, 8 nodes": DynamicTree(8, 4),
    "dynamic, 8 nodes, least 0.1": DynamicTree(8, 4, least=0.1),
    "dynamic, 16 nodes": DynamicTree(16, 4),
    "EAGLE's 25 nodes": StaticTree(),
}
BEST = "dynamic, 8 nodes"
"""The tree all trained drafters are compared with; chosen on other questions than those of the comparison."""


class Bench:
    """The specialist, the questions, and where intermediate results are kept."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        file = DATA / "medquad.jsonl.gz"
        if not file.exists():
            sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
        with gzip.open(file, "rt", encoding="utf-8") as handle:
            found = [json.loads(line) for line in handle]
        found = [r for r in found if len(r["answer"]) > 80]
        random.Random(0).shuffle(found)
        base = base_folder("smollm2-135m-instruct")
        self.tokenizer = bases.load_tokenizer(base)
        self.pad = self.tokenizer.pad_token_id
        raw = [
            {"id": r["id"], "instruction": r["question"], "output": " ".join(r["answer"].split()[:60])}
            for r in found[: args.tune + args.texts + 700]
        ]
        items, _ = tokens.encode_all(rows.read(raw).rows, self.tokenizer, 160)
        self.tuning, self.learning = items[: args.tune], items[args.tune : args.tune + args.texts]
        rest = items[args.tune + args.texts :]
        self.choosing, self.testing = rest[:8], rest[8 : 8 + args.questions]
        self.many = rest[8 : 8 + args.lossless]
        self.model = self._specialist(base).requires_grad_(False)
        own = self.model.generation_config.eos_token_id
        self.ends = sorted({*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id})

    def _specialist(self, base: Path) -> Any:
        """The base tuned on the first rows; made once per work folder."""
        folder = self.work / "specialist"
        if not (folder / "config.json").exists():
            model = Lora(rank=16).attach(bases.load_causal_lm(base, DEVICE))
            params = TrainParams(learning_rate=5e-4, batch=8, checkpoint_seconds=1e9)
            with tempfile.TemporaryDirectory() as scratch:
                train.fit(
                    model, CrossEntropy(), self.tuning, params, pad=self.pad, scratch=Path(scratch), device=DEVICE
                )
            model, _ = merge(model, torch.tensor([self.tuning[0].prompt], device=DEVICE))
            bases.save(model, self.tokenizer, folder, "float32")
        return bases.load_causal_lm(folder, DEVICE)

    def texts(self) -> list[Any]:
        """The specialist's own answers to the learning questions; written once per work folder."""
        file = self.work / "texts.json"
        if not file.exists():
            written = []
            began = time.perf_counter()
            for batch in answers(
                self.model,
                [item.prompt for item in self.learning],
                new_tokens=self.args.new_tokens,
                pad=self.pad,
                ends=self.ends,
            ):
                written += batch
                print(f"{len(written)} texts, {time.perf_counter() - began:.0f} s", flush=True)
            store.write_json(file, written)
        return [
            tokens.Encoded(str(i), self.learning[i].prompt, tuple(said))
            for i, said in store.read_json(file)
            if len(said) > 1
        ]


def train_all(bench: Bench) -> dict[str, Any]:
    """Every drafter on the same thoughts; and the assistant. What the work folder holds is not trained again."""
    args, found = bench.args, {}
    texts = bench.texts()
    seen = [[*t.prompt, *t.answer] for t in texts]
    size = bench.model.get_output_embeddings().weight.shape[0]
    ids = frequent_tokens(seen, args.vocabulary, size, always=bench.ends).to(DEVICE) if args.vocabulary else None
    covered = (
        sum(bool((ids == t).any()) for row in seen[:40] for t in row) / sum(map(len, seen[:40]))
        if args.vocabulary
        else 1
    )
    params = TrainParams(
        epochs=args.epochs, learning_rate=1e-3, batch=8, clip=0.5, max_steps=args.steps, checkpoint_seconds=1e9
    )
    thoughts: list[Any] = []
    for name in ("medusa", "clover", "clover-2"):
        folder = bench.work / name
        log_file = bench.work / f"{name}.json"
        if not log_file.exists():
            thoughts = thoughts or record(bench.model, texts, bench.pad)
            torch.manual_seed(0)
            sizes = {"heads": 4} | ({} if name == "medusa" else {"layers": 2 if name == "clover-2" else 1})
            drafter = saveddraft.make(name, bench.model, sizes, ids).attach(bench.model)
            weights = DraftWeights() if name == "clover-2" or args.soft else HARD
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                log = train.fit(
                    drafter,
                    DraftLoss(drafter, weights, autocast=fast_bf16(DEVICE)),
                    thoughts,
                    params,
                    pad=bench.pad,
                    collator=lambda batch: collate_thoughts(batch, bench.pad),
                    scratch=Path(scratch),
                    device=DEVICE,
                )
            saveddraft.save(folder, drafter, name, sizes, TREES[BEST])
            store.write_json(
                log_file,
                {
                    "parameters": sum(p.numel() for p in drafter.parameters()),
                    "steps": log.steps,
                    "seconds": round(time.perf_counter() - began, 1),
                    "loss_first_last": [round(log.loss[0], 3), round(statistics.mean(log.loss[-5:]), 3)],
                },
            )
        found[name] = store.read_json(log_file)
        print(name, found[name], flush=True)
    folder = bench.work / "assistant"
    if not (folder / "config.json").exists():
        assistant = layers.keep_layers(bench.model, list(range(args.assistant_layers))).requires_grad_(True)
        began = time.perf_counter()
        steps = args.steps or args.assistant_steps
        some = TrainParams(learning_rate=5e-4, batch=8, max_steps=steps, epochs=1000, checkpoint_seconds=1e9)
        with tempfile.TemporaryDirectory() as scratch:
            train.fit(assistant, CrossEntropy(), texts, some, pad=bench.pad, scratch=Path(scratch), device=DEVICE)
        bases.save(assistant, bench.tokenizer, folder, "float32")
        store.write_json(bench.work / "assistant.json", {"seconds": round(time.perf_counter() - began, 1)})
    found["assistant"] = store.read_json(bench.work / "assistant.json") | {"layers": args.assistant_layers}
    return {
        "texts": len(texts),
        "tokens": sum(len(t.answer) for t in texts),
        "draft_vocabulary": args.vocabulary,
        "tokens_of_texts_in_it": round(covered, 4),
        "trained": found,
    }


@contextlib.contextmanager
def decoders(bench: Bench) -> Iterator[tuple[dict[str, Callable[..., Any]], dict[str, Drafted]]]:
    """Name → what to call `generate` with; the drafted ones also by themselves. Everything but the first is packed."""
    made = {name: saveddraft.load(bench.work / name, bench.model) for name in ("medusa", "clover", "clover-2")}
    drafted = {"plain, our loop": Drafted(None), "prompt lookup": Drafted(PromptLookup(5))} | made
    drafted["clover-2 and lookup"] = Drafted(WithLookup(made["clover-2"].drafter), made["clover-2"].tree)
    assistant = bases.load_causal_lm(bench.work / "assistant", DEVICE)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    theirs = {
        "transformers' prompt lookup": {"prompt_lookup_num_tokens": 5},
        "transformers' assisted decoding": {"assistant_model": assistant},
    }
    guessing = [part for d in made.values() for part in d.parts()]

    def call(**how: Any) -> Callable[..., Any]:
        return lambda ids, **more: bench.model.generate(ids, attention_mask=torch.ones_like(ids), **how, **more)

    with packed(bench.model, assistant, rough=guessing):
        ways = {"transformers' generate, packed": call()}
        ways |= {name: call(custom_generate=d) for name, d in drafted.items()}
        ways |= {name: call(**how) for name, how in theirs.items()}
        yield ways, drafted


def settings(bench: Bench, new: int) -> dict[str, Any]:
    """Greedy, so many tokens."""
    return {"max_new_tokens": new, "do_sample": False, "pad_token_id": bench.pad, "eos_token_id": bench.ends}


def clock(bench: Bench, ids: torch.Tensor, way: Callable[..., Any], new: int) -> tuple[float, int, list[int]]:
    """Seconds and tokens after the prompt's pass, and the text."""
    began = time.perf_counter()
    way(ids, **settings(bench, 1))
    middle = time.perf_counter()
    said = way(ids, **settings(bench, new))
    done = time.perf_counter()
    return max(1e-9, (done - middle) - (middle - began)), said.shape[1] - ids.shape[1] - 1, said[0].tolist()


def speed(bench: Bench) -> dict[str, Any]:
    """Every decoder on every test question, in turn."""
    args = bench.args
    questions = [torch.tensor([item.prompt], device=DEVICE) for item in bench.testing]
    rates: dict[str, list[float]] = {}
    texts: dict[str, list[list[int]]] = {}
    table: dict[str, Any] = {}
    plain = "transformers' generate"
    bench.model.generate(questions[0], attention_mask=torch.ones_like(questions[0]), **settings(bench, 4))
    with decoders(bench) as (ways, drafted):
        for way in ways.values():
            way(questions[0], **settings(bench, 6))
        for d in drafted.values():
            d.reset()
        order = list(ways)
        for n, ids in enumerate(questions):
            random.Random(n).shuffle(order)
            for name in order:
                seconds, count, said = clock(bench, ids, ways[name], args.new_tokens)
                texts.setdefault(name, []).append(said)
                if count:
                    rates.setdefault(name, []).append(count / seconds)
            print(f"question {n + 1}: " + ", ".join(f"{k} {v[-1]:.1f}" for k, v in rates.items()), flush=True)
        for name, d in drafted.items():
            s = d.stats
            table[name] = {
                "tokens_per_step": round(s.tokens_per_step, 3),
                "nodes_per_step": round(s.nodes / max(1, s.steps), 2),
                "ms_per_step": {
                    "draft": round(1e3 * s.draft_seconds / s.steps, 2),
                    "verify": round(1e3 * s.verify_seconds / s.steps, 2),
                    "learn": round(1e3 * s.other_seconds / s.steps, 2),
                },
                "accepted_by_position": {k: round(s.accepted[k] / s.rows, 4) for k in sorted(s.accepted)},
            }
        trees = shapes(bench, drafted["clover-2"])
        heads = head_ms(bench, drafted["clover-2"].drafter)
    # as it comes: no packed weights anywhere
    rates[plain] = []
    for ids in questions:
        way = lambda ids, **more: bench.model.generate(ids, attention_mask=torch.ones_like(ids), **more)  # noqa: E731
        seconds, count, said = clock(bench, ids, way, args.new_tokens)
        texts.setdefault(plain, []).append(said)
        if count:
            rates[plain].append(count / seconds)
    for name, values in rates.items():
        entry = table.setdefault(name, {})
        entry["tokens_per_second"] = round(statistics.median(values), 2)
        for against, key in ((plain, "times_transformers"), ("plain, our loop", "times_plain_packed")):
            ratios = [a / b for a, b in zip(values, rates[against], strict=True)]
            entry[key] = round(statistics.median(ratios), 3)
        entry["same_text"] = sum(a == b for a, b in zip(texts[name], texts[plain], strict=True))
        print(f"{name:34} {entry}", flush=True)
    return {
        "questions": len(questions),
        "new_tokens": args.new_tokens,
        "tree": saveddraft.describe(TREES[BEST]),
        "decoders": table,
        "head_ms": heads,
        "trees_of_clover_2_on_other_questions": trees,
    }


def shapes(bench: Bench, clover: Drafted) -> dict[str, Any]:
    """Tree shapes, on questions that the comparison does not use."""
    found = {}
    for name, tree in TREES.items():
        d = Drafted(clover.drafter, tree)
        for item in bench.choosing:
            ids = torch.tensor([item.prompt], device=DEVICE)
            bench.model.generate(
                ids, attention_mask=torch.ones_like(ids), custom_generate=d, **settings(bench, bench.args.new_tokens)
            )
        s = d.stats
        spent = s.draft_seconds + s.verify_seconds + s.other_seconds
        found[name] = {
            "tokens_per_step": round(s.tokens_per_step, 3),
            "nodes_per_step": round(s.nodes / s.steps, 2),
            "ms_per_step": round(1e3 * spent / s.steps, 2),
            "tokens_per_second": round(s.tokens / spent, 2),
        }
        print(f"tree: {name:30} {found[name]}", flush=True)
    return found


def head_ms(bench: Bench, drafter: Any) -> dict[str, float]:
    """One head at one position: over the draft vocabulary and over all tokens, packed."""
    x = torch.randn(1, 1, drafter.width, device=DEVICE)
    found = {}
    with torch.inference_mode():
        for name, head in (("draft vocabulary", drafter.head), ("all tokens", bench.model.get_output_embeddings())):
            times = []
            for _ in range(12):
                began = time.perf_counter()
                head(x)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
            found[name] = round(1e3 * statistics.median(times[2:]), 3)
    return found


def lossless(bench: Bench) -> dict[str, Any]:
    """Greedy texts of many prompts, in batches, by every drafter against plain greedy."""
    args, new = bench.args, 16
    prompts = [item.prompt for item in bench.many]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[str, Any] = {"prompts": len(prompts), "new_tokens": new, "batch": args.batch, "drafters": {}}
    with decoders(bench) as (_, drafted):
        names = [name for name in drafted if name != "plain, our loop"]
        differ: dict[str, list[float]] = {name: [] for name in names}
        for d in drafted.values():
            d.tree = DynamicTree(4, 4)
        for start in range(0, len(order), args.batch):
            part = [prompts[i] for i in order[start : start + args.batch]]
            width = max(map(len, part))
            ids = torch.tensor([[bench.pad] * (width - len(p)) + list(p) for p in part], device=DEVICE)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=DEVICE)
            plain = bench.model.generate(ids, attention_mask=mask, **settings(bench, new))
            for name in names:
                mine = bench.model.generate(
                    ids, attention_mask=mask, custom_generate=drafted[name], **settings(bench, new)
                )
                length = min(plain.shape[1], mine.shape[1])
                for row in range(len(part)):
                    off = (plain[row, :length] != mine[row, :length]).nonzero()
                    if len(off) or plain.shape[1] != mine.shape[1]:
                        at = int(off[0]) if len(off) else length
                        differ[name].append(gap(bench, plain[row, width - len(part[row]) : at]))
            print(
                f"lossless: {start + len(part)} prompts, differences { ({k: len(v) for k, v in differ.items()}) }",
                flush=True,
            )
    for name in names:
        found["drafters"][name] = {
            "different_texts": len(differ[name]),
            "largest_gap_of_the_two_best_logits_there": max(differ[name], default=0.0),
            "tokens_per_step": round(drafted[name].stats.tokens_per_step, 3),
        }
    found["all_within_1e-4"] = all(v < 1e-4 for values in differ.values() for v in values)
    return found


def gap(bench: Bench, ids: torch.Tensor) -> float:
    """How far the two best logits lie apart after a text, on a plain pass."""
    with torch.inference_mode():
        best = bench.model(ids[None], logits_to_keep=1).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; writes nothing unless --out is given")
    parser.add_argument("--tune", type=int, default=320, help="rows the specialist is tuned on")
    parser.add_argument("--texts", type=int, default=640, help="questions whose answers the drafters learn from")
    parser.add_argument("--questions", type=int, default=24, help="held-out questions that are timed")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--lossless", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="of the lossless comparison")
    parser.add_argument("--vocabulary", type=int, default=4096, help="draft vocabulary; 0 for all tokens")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--steps", type=int, default=None, help="of each drafter's training, instead of epochs")
    parser.add_argument("--assistant-layers", type=int, default=6)
    parser.add_argument("--assistant-steps", type=int, default=100, help="about as long as Clover-2's training")
    parser.add_argument("--soft", action="store_true", help="Clover-2's losses for all drafters")
    parser.add_argument("--work", type=Path, default=None, help="keeps specialist, texts and drafters, to go on from")
    parser.add_argument("--only", choices=("train", "speed", "lossless"), default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.tune, args.texts, args.questions, args.new_tokens, args.lossless = 16, 16, 2, 12, 4
        args.steps, args.batch = 3, 2
    out = args.out or (None if args.quick else OUT)
    result: dict[str, Any] = {
        "what": "drafting for SmolLM2-135M tuned on MedQuAD, greedy",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": measure.machine() | {"threads": torch.get_num_threads()},
        "versions": run.versions(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("work", "out", "only", "quick")},
    }
    if out and out.exists():
        result |= {k: v for k, v in store.read_json(out).items() if k in ("train", "speed", "lossless")}
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work)
        parts: dict[str, Callable[[Bench], dict[str, Any]]] = {"train": train_all, "speed": speed, "lossless": lossless}
        for name, part in parts.items():
            if args.only in (None, name):
                result[name] = part(bench)
                if out:
                    result["load_average"] = round(os.getloadavg()[0], 1)
                    store.write_json(out, result)
                    print(f"written to {out}", flush=True)


if __name__ == "__main__":
    main()

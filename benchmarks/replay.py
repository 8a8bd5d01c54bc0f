"""Tasks learnt in sequence: how much is forgotten, do a few replayed rows help, does InsCL pick them better than luck?

MedQuAD's question types as tasks, SmolLM2-135M-Instruct, one LoRA (rank 16) that is trained on through all stages: its
weights are carried over, the optimiser starts anew. At each stage after the first the new task's rows are joined by

- `none`: nothing;
- `random`: alpha rows of every task learnt, at random (equal quotas);
- `InsCL`: as many rows in all, quotas by transport between instructions, rows by InsInfo (tags: telling words). The
  instruction is the question without its disease ("What are the symptoms of it?"), as the paper's hold no input;
- `InsCL, whole questions` (with --arms): the instruction is the question itself, as in the step `replay` by default.

Tasks are the four types whose answers differ most in form: of the types with at least 200 different answers, those
whose frequencies of the 100 commonest words and marks (in the answers' first 60) have the largest least pairwise
Jensen-Shannon divergence. Orders: the alphabet, and its reverse. A task's held-out rows are the same for every seed,
about diseases that none of its training rows is about. Rows are plain continuations (the question, the answer), which
saves the chat template's tokens; answers are cut. Everything above was settled before any arm was scored; the
learning rate is the one of 1e-3 and 3e-3 that learnt more in sequence without replay, with a seed not used here (but
on held-out rows that are).

Scores R[i, j] of task j after stage i, on held-out rows: `hits`, the share of answer tokens that the model would have
chosen given the answer so far, and `probability`, exp(-mean nll) of an answer token. u[j]: the same of a model tuned on
that task alone, with the same rows and seed. After the last stage also Rouge-L of greedy answers to a few held-out
questions of each task, as long as the cut answers. Replayed rows are extra rows and so extra steps, as in the paper.
`replay_report` says how the runs (a seed and an order) are compared.

`choices` says what either form of instruction replays for seed 0, without training; `transport` times the exact solver
(POT's where installed) and Sinkhorn's, in turn, between whole questions of each pair of tasks.

    python benchmarks/replay.py                        # everything; results/replay.json; half an hour on one core
    python benchmarks/replay.py --quick                # a minute on a tiny random base, writes nothing
    python benchmarks/replay.py --work DIR [--minutes 30] [--seeds 0 1] [--arms none random InsCL]   # DIR keeps cells

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA, and embedded models.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from replay_report import followed, sentences, summary
from scipy.spatial.distance import jensenshannon

from residency import bases, encoders, rows, store, tokens, train, transport
from residency.compat import fast_bf16
from residency.crossentropy import CrossEntropy
from residency.curate.forward import COLUMNS, Reader
from residency.curate.replay import Replay, Replayed
from residency.curate.tagging import keywords
from residency.embedded import base_folder
from residency.evaluate.rouge_l import rouge_l, words
from residency.generate import generate
from residency.lora import Lora
from residency.measure import machine
from residency.trainparams import TrainParams

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "replay.json"
ARMS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "random": {"quota": "equal", "rows": "random"},
    "InsCL": {},
    "InsCL, whole questions": {"whole": True},
}


def medquad() -> dict[str, list[dict[str, str]]]:
    """Rows by type of question, each answer and each question once."""
    file = DATA / "medquad.jsonl.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        found = [json.loads(line) for line in handle]
    kinds: dict[str, list[dict[str, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for row in found:
        keys = {(row["type"], "q " + row["question"]), (row["type"], "a " + row["answer"])}
        if row["question"].strip() and row["answer"].strip() and not keys & seen:
            kinds.setdefault(row["type"], []).append(row)
            seen |= keys
    return kinds


def unlike(kinds: dict[str, list[dict[str, str]]], wanted: int, at_least: int = 200) -> tuple[list[str], float]:
    """The types whose answers differ most in form, and their least pairwise Jensen-Shannon divergence, in nats."""
    counts = {
        kind: Counter(w for r in found for w in re.findall(r"[a-z']+|[.:;()-]", r["answer"].lower())[:60])
        for kind, found in kinds.items()
        if len(found) >= at_least
    }
    common: Counter[str] = Counter()
    for each in counts.values():
        common.update({word: n / each.total() for word, n in each.items()})
    top = [word for word, _ in common.most_common(100)]
    shares = {}
    for kind, each in counts.items():
        kept = np.array([each[word] for word in top], float)
        shares[kind] = np.append(kept, each.total() - kept.sum()) / each.total()

    # scipy's distance is the root of the divergence
    apart = {(a, b): jensenshannon(shares[a], shares[b]) ** 2 for a, b in itertools.combinations(sorted(shares), 2)}
    least = {
        some: min(apart[pair] for pair in itertools.combinations(some, 2))
        for some in itertools.combinations(sorted(shares), wanted)
    }
    best = max(least, key=lambda some: least[some])
    return list(best), float(least[best])


class Bench:
    """Rows, models, and what is kept between runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = base_folder("tiny-llama" if args.quick else "smollm2-135m-instruct")
        self.tokenizer = bases.load_tokenizer(self.folder)
        self.encoder = encoders.load(base_folder("tiny-text-encoder" if args.quick else "all-minilm-l6-v2"))
        self.kinds = medquad()
        self.tasks, self.apart = unlike(self.kinds, 4)
        self.held = {task: self.drawn(task, None) for task in self.tasks}
        self.learnt: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def drawn(self, task: str, seed: int | None) -> list[dict[str, str]]:
        """Held-out rows (no seed), or a seed's training rows, of other diseases."""
        found = [self.kinds[task][i] for i in np.random.default_rng(0).permutation(len(self.kinds[task]))]
        held = found[: self.args.held]
        if seed is None:
            return held
        known = {row["focus"] for row in held}
        rest = [row for row in found[self.args.held :] if row["focus"] not in known]
        order = np.random.default_rng([seed, self.tasks.index(task)]).permutation(len(rest))
        return [rest[i] for i in order[: self.args.rows]]

    def items(self, found: Sequence[dict[str, str]]) -> list[tokens.Encoded]:
        """Rows as token ids, answers cut."""
        plain = [{"id": r["id"], "prompt": r["question"] + "\n", "completion": r["answer"]} for r in found]
        each = [tokens.encode(row, self.tokenizer) for row in rows.read(plain).rows]
        return [tokens.Encoded(e.id, e.prompt, e.answer[: self.args.tokens]) for e in each]

    def model(self, seed: int) -> Any:
        """The base under a fresh adapter."""
        torch.manual_seed(seed)
        return Lora(rank=16).attach(bases.load_causal_lm(self.folder))

    def tune(self, model: Any, found: Sequence[dict[str, str]], seed: int) -> int:
        """Train the adapter; the number of steps."""
        a = self.args
        params = TrainParams(epochs=a.epochs, batch=a.batch, learning_rate=a.rate, checkpoint_seconds=1e9)
        with tempfile.TemporaryDirectory() as scratch:
            pad = self.tokenizer.pad_token_id
            log = train.fit(model, CrossEntropy(), self.items(found), params, pad=pad, scratch=Path(scratch), seed=seed)
        return log.steps

    def score(self, model: Any, task: str) -> dict[str, float]:
        """Means over a task's held-out rows."""
        pairs = [(e.prompt, e.answer) for e in self.items(self.held[task])]
        precise = torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu"))
        with precise, Reader(model, self.tokenizer) as reader:
            found = np.array([t.mean(1, dtype=float) for t in reader.tokens(pairs)]).mean(0)
        return {
            "hits": float(found[COLUMNS.index("hits")]),
            "probability": float(np.exp(-found[COLUMNS.index("nll")])),
        }

    def rouge(self, model: Any, tasks: Sequence[str]) -> dict[str, float]:
        """Mean Rouge-L of greedy answers to a few held-out questions of each task, in per cent."""
        n = self.args.generated
        if not n:
            return {}
        items = [item for task in tasks for item in self.items(self.held[task][:n])]
        plain = model.merge_and_unload()
        prompts = [item.prompt for item in items]
        said = list(generate(plain, self.tokenizer, prompts, max_new_tokens=self.args.tokens, batch_size=16))
        told = [self.tokenizer.decode(item.answer, skip_special_tokens=True) for item in items]
        marks = [100 * rouge_l(words(x), words(y)) for x, y in zip(said, told, strict=True)]
        return {task: statistics.mean(marks[i * n : (i + 1) * n]) for i, task in enumerate(tasks)}

    def replay(self, seed: int, before: Sequence[str], task: str, arm: str) -> tuple[list[dict[str, str]], Replayed]:
        """Rows of tasks learnt before, chosen as the step `replay` does."""
        settings = dict(ARMS[arm] or {})
        whole = settings.pop("whole", False)
        old = [(name, row) for name in before for row in self.drawn(name, seed)]
        both = [row for _, row in old] + self.drawn(task, seed)
        told = [row["question"] if whole else row["question"].replace(row["focus"], "it") for row in both]
        vectors, tags, n = self.encoder.encode(told), keywords(told), len(old)
        chosen = Replay(per_task=self.args.alpha, seed=seed, **settings).select(
            [name for name, _ in old], told[:n], vectors[:n], tags[:n], told[n:], vectors[n:], tags[n:]
        )
        return [old[i][1] for i in chosen.indices.tolist()], chosen

    def alone(self, seed: int, task: str) -> dict[str, Any]:
        """A task learnt alone: u, and where every order that begins with it goes on."""
        began, model = time.perf_counter(), self.model(seed)
        self.tune(model, self.drawn(task, seed), seed)
        self.learnt[seed, task] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        score, rouge = self.score(model, task), self.rouge(model, [task])
        return {"score": score, "rouge": rouge, "seconds": time.perf_counter() - began}

    def sequence(self, seed: int, order: Sequence[str], arm: str, alone: dict[str, Any]) -> dict[str, Any]:
        """All stages of one arm."""
        began, model = time.perf_counter(), self.model(seed)
        if (seed, order[0]) not in self.learnt:
            self.alone(seed, order[0])  # a resumed run lost its weights
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(self.learnt[seed, order[0]][name])
        scores = [[alone[f"{seed} | {order[0]}"]["score"]]]
        stages = []
        for i, task in enumerate(order[1:], 1):
            found, stage = list(self.drawn(task, seed)), {}
            if ARMS[arm] is not None:
                more, chosen = self.replay(seed, order[:i], task, arm)
                found += more
                stage = {"quotas": chosen.quotas, "distances": {t: round(w, 4) for t, w in chosen.distances.items()}}
            stage |= {"task": task, "rows": len(found), "steps": self.tune(model, found, seed)}
            scores.append([self.score(model, each) for each in order[: i + 1]])
            stages.append(stage)
        rouge = self.rouge(model, order)
        return {"scores": scores, "stages": stages, "rouge": rouge, "seconds": time.perf_counter() - began}

    def choices(self) -> list[dict[str, Any]]:
        """What the forms of InsCL replay for seed 0 before the last task of either order, and how they differ."""
        found = []
        for order in (self.tasks, self.tasks[::-1]):
            for arm in ("InsCL", "InsCL, whole questions"):
                _, chosen = self.replay(0, order[:-1], order[-1], arm)
                n = self.args.rows
                info = [np.round(chosen.score[i * n : (i + 1) * n], 9) for i in range(len(order) - 1)]
                found.append(
                    {
                        "arm": arm,
                        "next": order[-1],
                        "distances": {t: round(w, 4) for t, w in chosen.distances.items()},
                        "quotas": chosen.quotas,
                        "rows_tied_at_a_tasks_highest_insinfo": [int((each == each.max()).sum()) for each in info],
                    }
                )
        return found

    def transport(self, n: int, rounds: int = 3) -> dict[str, Any]:
        """Exact transport and Sinkhorn's between n whole questions of each pair of tasks."""
        vectors = {t: self.encoder.encode([row["question"] for row in self.kinds[t][:n]]) for t in self.tasks}
        times: dict[str, list[float]] = {"exact": [], "sinkhorn": []}
        above, costs = [], {}
        for a, b in itertools.combinations(self.tasks, 2):
            cost = transport.cosine_costs(vectors[a], vectors[b])
            p, q = np.ones(len(cost)), np.ones(cost.shape[1])
            w: dict[str, float] = {}
            for _ in range(rounds):
                for name, solve in (("exact", transport.exact), ("sinkhorn", transport.sinkhorn)):
                    began = time.perf_counter()
                    w[name] = solve(cost, p, q)
                    times[name].append(time.perf_counter() - began)
            above.append(w["sinkhorn"] / w["exact"] - 1)
            costs[f"{a} - {b}"] = round(w["exact"], 4)
        return {
            "questions": n,
            "distances": costs,
            "median_seconds": {name: round(statistics.median(t), 4) for name, t in times.items()},
            "sinkhorn_over_exact_seconds": round(
                statistics.median(s / e for s, e in zip(times["sinkhorn"], times["exact"], strict=True)), 1
            ),
            "sinkhorn_costs_more_by_per_cent_at_most": round(100 * max(above), 3),
        }


def main() -> None:
    """Run what was asked for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["none", "random", "InsCL"])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--held", type=int, default=12)
    parser.add_argument("--generated", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--alpha", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after so long")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.quick:
        args.seeds, args.rows, args.held, args.generated, args.tokens = [0], 8, 4, 2, 16
    keys = ("rows", "held", "generated", "tokens", "alpha", "epochs", "batch", "rate")
    settings = {key: getattr(args, key) for key in keys}
    began, bench = time.perf_counter(), Bench(args)
    state: dict[str, Any] = {"settings": settings, "alone": {}, "sequence": {}}
    file = args.work / "replay.json" if args.work else None
    if file and file.exists():
        state = store.read_json(file)
        if state["settings"] != settings:
            sys.exit(f"{file} was made with other settings: {state['settings']}")

    def cell(part: str, key: str, make: Any) -> None:
        if key in state[part] or time.perf_counter() - began > 60 * args.minutes:
            return
        state[part][key] = make()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            store.write_json(file, state)
        print(f"{key}: {state[part][key]['seconds']:.0f} s", flush=True)

    for seed in args.seeds:
        for task in bench.tasks:
            cell("alone", f"{seed} | {task}", partial(bench.alone, seed, task))
        for order in (bench.tasks, bench.tasks[::-1]):
            for arm in args.arms:
                make = partial(bench.sequence, seed, order, arm, state["alone"])
                cell("sequence", f"{seed} | {' > '.join(order)} | {arm}", make)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "precision": "bfloat16 autocast" if fast_bf16("cpu") else "float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "base": bench.folder.name,
        "tasks": {"names": bench.tasks, "least_divergence_nats": round(bench.apart, 4)},
        "settings": state["settings"],
        "minutes": round(sum(c["seconds"] for part in ("alone", "sequence") for c in state[part].values()) / 60, 1),
        "summary": (found := summary(state, args.arms) | {"followed": followed(state)}),
        "sentences": (said := sentences(found)),
        "choices": bench.choices(),
        "transport": [bench.transport(n) for n in ((8,) if args.quick else (args.rows, 200))],
        "alone": state["alone"],
        "sequence": state["sequence"],
    }
    for arm, values in found["arms"].items():
        print(f"{arm}: " + "; ".join(f"{k} {m:.1f} ± {sd:.1f}" for k, (m, sd) in values.items()))
    print("\n".join([*said, json.dumps(result["choices"]), json.dumps(result["transport"])]))
    if not args.quick:
        OUT.parent.mkdir(exist_ok=True)
        store.write_json(OUT, result)


if __name__ == "__main__":
    main()

"""Claim: labels guide a few-shot detector of aspects; which part of that pays, against a prototypical network.

FewAsp (multi): the encoder (MiniLM) is trained on episodes of the 16 validation aspects and tested on the 20 unseen
test aspects. (The 64 training aspects are not in the data folder, so numbers do not compare with the literature's.)
Every variant gets the same training episodes (5 ways, 5 shots, 2 queries per aspect), the same optimiser and the same
test episodes: 5 and 10 ways, 5 and 10 shots, 5 queries per aspect.

    prototypical network      no label anywhere
    name                      plain sentence vectors, prototypes mixed with the vector of the label's name
    description               the same with the vector of "name: description"
    prompt                    a pass per (sentence, label), prototypes of shots only
    prompt, description       both: the method as its abstract describes it
    attention                 one pass per sentence, label-queried attention over its tokens (our cheap form), name only
    attention, description    the same with descriptions, in queries and prototypes
    attention, cross-entropy  as attention, with binary cross-entropy of sigmoid scores instead of squared error

Each also without training. Macro-F1 at the protocol's fixed thresholds (0.3 of five, 0.2 of ten) and at one calibrated
on the episode's own shots, each scored by prototypes made without it; macro AUC. Means over episodes and seeds,
standard errors over episodes (each averaged over seeds), differences to the prototypical network paired by episode.

    python benchmarks/aspects.py                       # everything; results/aspects.json
    python benchmarks/aspects.py --quick               # a minute, writes nothing
    python benchmarks/aspects.py --work DIR            # keeps what is done, to go on from

Descriptions are a fixed dictionary (DESCRIPTIONS), written from the labels' names, except that three sentences of
`entartainment_casino` and of `staff_master` had been seen. The embedded SmolLM2-135M was asked first, and its answers
are not usable ("nail curlers are hands down", a named restaurant for `food_food`); they are scored as an ablation of
untrained prototypes. Test sentences are a fixed draw per aspect (`--pool`), because a prompt per (sentence, label) of
all would take hours; standard errors therefore speak of episodes from these sentences and aspects, and of no others.
Reads FewAsp (reviews from Yelp: research use) from ../shared/data or $RESIDENCY_BENCH_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residency import bases, measure, multilabel, prompted, run, store, train
from residency.adapt import fitprompts
from residency.adapt.descriptions import Descriptions
from residency.adapt.episodes import Episode, Episodes, readable
from residency.adapt.labelprompts import (
    SCALARS,
    EpisodeLoss,
    LabelPrompts,
    Tasks,
    collate_tasks,
    fixed_threshold,
    named,
    prototypes,
)
from residency.adapt.selftraining import SelfTraining
from residency.embedded import base_folder
from residency.labeltemplates import Prompter
from residency.trainparams import TrainParams

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "aspects.json"
BASE = "prototypical network"
VARIANTS: dict[str, tuple[LabelPrompts, bool]] = {
    BASE: (LabelPrompts(form="plain", eta=0), False),
    "name": (LabelPrompts(form="plain"), False),
    "description": (LabelPrompts(form="plain"), True),
    "prompt": (LabelPrompts(form="prompt", eta=0), False),
    "prompt, description": (LabelPrompts(form="prompt"), True),
    "attention": (LabelPrompts(form="attention", eta=0), False),
    "attention, description": (LabelPrompts(form="attention"), True),
    "attention, cross-entropy": (LabelPrompts(form="attention", eta=0, loss="bce"), False),
}
"""Method, and whether it reads descriptions; η, φ and β were chosen on the training aspects, before any training."""
SETTINGS = ((5, 5), (5, 10), (10, 5), (10, 10))
DESCRIPTIONS = {
    "entartainment_casino": "gambling, slot machines, card tables, dealers, winning or losing on the casino floor",
    "drinks_alcohol": "wine, cocktails, margaritas, martinis, the bar and its bartenders, happy hour",
    "restaurant_money": "prices, value for money, how expensive or cheap the meal and the bill were",
    "food_food_sushi": "sushi, rolls, sashimi, raw fish, tuna and salmon, all you can eat sushi",
    "food_food_chicken": "chicken dishes such as fried chicken, wings, grilled or curry chicken",
    "experience_time": "how long something took, hours and days, being on time, late or early",
    "decor": "how a place is decorated: furniture, paintings, lighting, style, modern or old",
    "experience_feelings": "how customers felt: happy, comfortable, disappointed, angry, loved or hated it",
    "personal": "family and private life of the writer: husband, wife, friends, birthdays, themselves",
    "procedure_beauty_hair": "haircuts, hair colour, highlights, blow dry and styling by a hairdresser",
    "restaurant_entertainment_music": "music in a restaurant: live bands, songs, the DJ, loud or pleasant",
    "salon_interior_design": "how a salon looks inside: clean, modern, chairs, colours and decoration",
    "drinks_alcohol_beer": "beer, ale, brewery, draft and tap selection, pints and bottles",
    "food_food_salad": "salads, lettuce, greens, dressing, salad bar",
    "room_bathroom": "the bathroom of a hotel room: shower, tub, toilet, sink, towels",
    "entartainment_shopping": "shops, malls, stores and boutiques, buying things while going out",
    "staff_master": "the stylist, technician, therapist or other expert who did the work, and how skilled they are",
    "procedure_beauty_nails": "nails, polish, acrylics and gels, pedicures at a nail salon",
    "room_interior": "furniture and design of a hotel room: carpet, walls, television, desk, modern or dated",
    "procedure_beauty_nails_mani": "manicures: hands, fingernails, filing, cuticles, polish and gel",
    "room_bed": "the bed of a hotel room: mattress, pillows, sheets, king or queen size, sleeping",
    "food_food": "the food in general, how it tasted, dishes, flavour, fresh or bland",
    "procedure_relax_spa": "spa treatments, sauna, steam room, facials, hot tub, relaxing",
    "food_food_dessert": "desserts, cake, ice cream, chocolate, pie, something sweet after the meal",
    "experience_recommendations": "recommending a place to others or not, would come back, worth a visit",
    "salon_atmosphere": "the atmosphere of a salon: relaxing, friendly, quiet, welcoming, fun",
    "procedure_relax_massage": "massages, masseuse, deep tissue, pressure, back and muscles",
    "sport_pool": "swimming pool, pool area, swimming, cabanas, lounge chairs by the water",
    "salon_interior_room": "rooms of a salon or spa: treatment room, waiting room, locker room, space",
    "restaurant_location": "where a restaurant is: neighbourhood, street, near or far, easy to find",
    "food_mealtype_lunch": "lunch, eating at noon, lunch specials, lunch menu or buffet",
    "room_overall": "the hotel room as a whole: large or small, clean, nice, the suite, the view",
    "experience_wait": "waiting: in line, for a table, for the order or an appointment, minutes and hours",
    "food_food_meat_burger": "burgers, hamburger, cheeseburger, patty, bun, fries beside it",
    "parking": "parking lot, garage, valet, finding a space for the car",
    "room_smoke": "smoke in a room or hotel: cigarettes, the smell, smoking and non-smoking rooms",
}
ASK = 'Describe in one sentence what customers mention in a review about "{label}".'


class Bench:
    """Rows of both splits, and the tokenizer."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.split = {name: self._read(name) for name in ("val", "test")}
        self.folder = base_folder("all-minilm-l6-v2")
        self.tokenizer = bases.load_tokenizer(self.folder)
        self.pool_texts, self.pool_labels = self._pool()
        self.untrained_prompts: torch.Tensor | None = None  # the same for both variants with prompts

    def _read(self, name: str) -> tuple[list[str], list[tuple[str, ...]], list[str]]:
        """Texts, label sets (a sentence that stands under several aspects is one row), aspects."""
        file = DATA / f"fewasp_multi_{name}.json.gz"
        if not file.exists():
            sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
        with gzip.open(file, "rt", encoding="utf-8") as handle:
            found: dict[str, list[Any]] = json.load(handle)
        rows: dict[str, set[str]] = {}
        for entries in found.values():
            for words, aspects in entries:
                rows.setdefault(" ".join(words), set()).update(aspects)
        return list(rows), [tuple(sorted(v)) for v in rows.values()], sorted(found)

    def _pool(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """A fixed draw of test sentences, so many for each aspect."""
        texts, labels, aspects = self.split["test"]
        order = np.random.default_rng(0).permutation(len(texts)).tolist()
        chosen: set[int] = set()
        for c in aspects:
            chosen.update([i for i in order if c in labels[i]][: self.args.pool])
        kept = sorted(chosen)
        return [texts[i] for i in kept], [labels[i] for i in kept]

    def fresh(self, variant: str) -> Any:
        """An untrained view of the base."""
        encoder, _ = prompted.load_encoder(self.folder)
        return VARIANTS[variant][0].view(encoder)

    def trained(self, variant: str, seed: int) -> tuple[Any, dict[str, Any]]:
        """A view trained on the episodes of a seed."""
        method, described = VARIANTS[variant]
        texts, labels, aspects = self.split["val"]
        view = self.fresh(variant)
        tasks = Tasks(method, self.tokenizer, texts, DESCRIPTIONS if described else {})
        episodes = Episodes(labels, ways=5, shots=5, queries=2, seed=seed, keys=texts, classes=aspects)
        items = [tasks(e) for e in episodes.take(self.args.train)]
        rate = self.args.learning_rate
        params = TrainParams(epochs=1, learning_rate=rate, batch=1, checkpoint_seconds=1e9)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            log = train.fit(
                view,
                EpisodeLoss(view, method),
                items,
                params,
                pad=self.tokenizer.pad_token_id,
                scratch=Path(scratch),
                seed=seed,
                collator=lambda batch: collate_tasks(batch, self.tokenizer.pad_token_id),
                learning_rates=SCALARS,
            )
        return view, {
            "seconds_per_episode": round((time.perf_counter() - began) / len(items), 3),
            "passes_per_episode": len(items[0].support) * 5 + sum(map(len, items[0].query)) + len(items[0].named),
            "loss_first_last_10": [round(float(np.mean(part)), 4) for part in (log.loss[:10], log.loss[-10:])],
            "scale": round(view.log_scale.exp().item(), 3),
            "sharpness": round(view.sharpness.item(), 3),
            "precision": log.precision,
        }

    def examine(self, variant: str, view: Any, said: dict[str, str], *, trained: bool) -> dict[str, Any]:
        """Every setting's test episodes: per-episode scores."""
        method, _ = VARIANTS[variant]
        aspects = self.split["test"][2]
        pad = self.tokenizer.pad_token_id
        view.eval()
        namer = Prompter(self.tokenizer)
        plain = prompted.LabelView(view.encoder, "plain").eval()
        e = torch.cat([*plain.vectors([namer(named(c, said.get(c, ""))) for c in aspects], pad)])[:, 0]
        prompter = method.prompter(self.tokenizer, 128)
        began = time.perf_counter()
        made_before = method.form == "prompt" and not trained and self.untrained_prompts is not None
        if made_before:
            h = self.untrained_prompts
        elif method.form == "prompt":
            pairs = [prompter(t, readable(c)) for t in self.pool_texts for c in aspects]
            h = torch.cat([*view.vectors(pairs, pad, batch=128)]).reshape(len(self.pool_texts), len(aspects), -1)
            self.untrained_prompts = self.untrained_prompts if trained else h
        else:
            h = torch.cat([*view.vectors([prompter(t) for t in self.pool_texts], pad, e)])
        seconds = time.perf_counter() - began
        found: dict[str, Any] = {
            "ms_per_sentence_of_20_labels": None if made_before else round(1e3 * seconds / len(h), 2)
        }
        for ways, shots in SETTINGS[: 1 if self.args.quick else None]:
            episodes = Episodes(
                self.pool_labels, ways=ways, shots=shots, queries=5, seed=4321, keys=self.pool_texts, classes=aspects
            )
            scored = [self.score(ep, h, e, view, method, aspects) for ep in episodes.take(self.args.episodes)]
            found[f"{ways}-way {shots}-shot"] = {k: [s[k] for s in scored] for k in scored[0]}
        return found

    @torch.no_grad()
    def score(
        self, ep: Episode, h: torch.Tensor, e: torch.Tensor, view: Any, method: LabelPrompts, aspects: list[str]
    ) -> dict[str, float]:
        """AUC and macro-F1 of one episode, from vectors made before."""
        own = [aspects.index(c) for c in ep.classes]
        N, K = len(ep.support), len(ep.support[0])
        h = h[:, own] if h.shape[1] > 1 else h
        labels = e[own] if method.eta or method.focus else None
        rows = torch.tensor(ep.support)  # [N, K]
        under = torch.arange(N)[:, None] if h.shape[1] > 1 else torch.zeros(N, 1, dtype=torch.long)
        shots = h[rows, under]
        c = prototypes(shots, labels, method.eta, method.focus)
        queries = prompted.probabilities(view.logits(h[list(ep.query)], c), method.link).numpy()
        # every shot by its own label's prototype without it, and the other labels' as they are
        apart = shots[:, None].expand(N, K, K, -1).transpose(0, 1)  # [K left out, N, K, D]
        there = ~torch.eye(K, dtype=torch.bool)[:, None].expand(K, N, K)
        without = prototypes(apart, labels, method.eta, method.focus, there)  # [K, N, D]
        centres = c.expand(N, K, N, -1).clone()
        for n in range(N):
            centres[n, :, n] = without[:, n]
        z = view.logits(h[rows].reshape(N, K, h.shape[1], -1), centres)
        held = prompted.probabilities(z, method.link).reshape(N * K, N).numpy()
        gold = multilabel.multi_hot([self.pool_labels[i] for row in ep.support for i in row], ep.classes)
        tried, f1 = multilabel.threshold_curve([(held, gold)], most=60)
        at = tried[f1 >= f1.max() - 1e-12]
        fixed = fixed_threshold(N, method.link)
        return {
            "auc": multilabel.macro_auc(queries, ep.target),
            "f1_fixed": multilabel.macro_f1(queries >= fixed, ep.target),
            "f1_calibrated": multilabel.macro_f1(queries >= at[len(at) // 2], ep.target),
        }

    def smollm2(self) -> dict[str, str]:
        """The embedded language model's descriptions, asked once per work folder."""
        folder = base_folder("smollm2-135m-instruct")
        tokenizer, model = bases.load_tokenizer(folder), bases.load_causal_lm(folder)

        def ask(prompt: str) -> str:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                said = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

        found = Descriptions(self.work, ask, name="smollm2-135m", prompt=ASK, most=300).of(self.split["test"][2])
        return {c: d.text for c, d in found.items()}


SELF_TRAINING = {
    "share 0.5 (default)": SelfTraining(rounds=2),
    "share 0.5, equal": SelfTraining(rounds=2, balance="equal"),
    "share 0.2": SelfTraining(rounds=2, share=0.2),
    "threshold 0.9": SelfTraining(rounds=2, threshold=0.9, share=1),
    "threshold 0.7": SelfTraining(rounds=2, threshold=0.7, share=1),
}


def specialist(bench: Bench, split: str = "test", seeds: int = 5) -> dict[str, Any]:
    """What a recipe makes: all aspects at once, five shots each, untrained attention; then self-training."""
    texts, labels, aspects = bench.split[split]
    found: dict[str, list[dict[str, float]]] = {}
    encoder, _ = prompted.load_encoder(bench.folder)
    method = LabelPrompts(eta=0)
    view = method.view(encoder)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(texts)).tolist()
        shots = sorted({i for c in aspects for i in [j for j in order if c in labels[j]][:5]})
        rest = [i for i in order if i not in set(shots)]
        pool, test = rest[:600], rest[600:1200]
        fitted = fitprompts.fit(
            view, bench.tokenizer, method, [texts[i] for i in shots], [labels[i] for i in shots], classes=aspects
        )
        gold = multilabel.multi_hot([labels[i] for i in test], aspects)
        h = torch.cat([*fitted.classifier.seen([texts[i] for i in test])])

        def f1(now: fitprompts.Fitted, h: torch.Tensor = h, gold: np.ndarray = gold) -> dict[str, float]:
            scores = now.classifier.score(h).numpy()
            said = multilabel.decide(scores, now.classifier.head.threshold, least_one=True)
            return {"f1": multilabel.macro_f1(said, gold), "auc": multilabel.macro_auc(scores, gold)}

        found.setdefault("without", []).append(f1(fitted))
        for name, params in SELF_TRAINING.items():
            after, record = fitprompts.self_trained(
                fitted, params, [texts[i] for i in pool], truth=[labels[i] for i in pool]
            )
            last = record.rounds[-1]
            more = {"added": float(last.added), "right": last.right if last.right is not None else float("nan")}
            found.setdefault(name, []).append(f1(after) | more)
    out: dict[str, Any] = {"shots": 5, "labels": len(aspects), "unlabelled": 600, "test": 600, "seeds": seeds}
    for name, runs in found.items():
        table = {k: np.array([r[k] for r in runs]) for k in runs[0]}
        out[name] = {k: [round(float(v.mean()), 4), round(float(v.std(ddof=1)), 4)] for k, v in table.items()}
        if name != "without":
            gain = table["f1"] - np.array([r["f1"] for r in found["without"]])
            out[name]["f1_gain"] = [round(float(gain.mean()), 4), round(float(gain.std(ddof=1)), 4)]
    return out


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over episodes and seeds with standard errors over episodes, and paired differences to the baseline."""
    out: dict[str, Any] = {}
    for setting in (k for k in runs[0] if "-way" in k):
        entry: dict[str, Any] = {}
        for name in ("auc", "f1_fixed", "f1_calibrated"):
            mine = np.array([r[setting][name] for r in runs])  # [seeds, episodes]
            theirs = np.array([r[setting][name] for r in base])
            per = np.nanmean(mine, 0)
            gap = per - np.nanmean(theirs, 0)
            n = np.sqrt(len(per))
            entry[name] = {
                "mean": round(float(np.nanmean(per)), 4),
                "se": round(float(np.nanstd(per, ddof=1) / n), 4),
                "seeds": [round(float(np.nanmean(r)), 4) for r in mine],
                "minus_baseline": round(float(np.nanmean(gap)), 4),
                "se_of_that": round(float(np.nanstd(gap, ddof=1) / n), 4),
            }
        out[setting] = entry
    return out


def main() -> None:
    """Train, examine, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute; writes nothing unless --out is given")
    parser.add_argument("--train", type=int, default=50, help="training episodes")
    parser.add_argument("--episodes", type=int, default=250, help="test episodes of each setting")
    parser.add_argument("--pool", type=int, default=30, help="test sentences drawn for each aspect")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each variant; one takes half an hour in all")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--work", type=Path, default=None, help="keeps what is done, to go on from")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.quick:
        args.train, args.episodes, args.pool, args.seeds = 2, 10, 10, 1  # 10 rows: 5 shots and 5 queries
    torch.set_num_threads(1)
    out = args.out or (None if args.quick else OUT)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args, work)
        began = time.perf_counter()

        def once(name: str, make: Any) -> Any:
            file = work / f"{name.replace(' ', '-').replace(',', '')}.json"
            if not file.exists():
                store.write_json(file, make())
                print(f"{time.perf_counter() - began:6.0f} s  {name}", flush=True)
            return store.read_json(file)

        found: dict[str, list[dict[str, Any]]] = {}
        logs: dict[str, list[dict[str, Any]]] = {}
        few = (BASE, "attention", "prompt, description")
        few = (BASE, "attention", "prompt, description")
        chosen = [name for name in VARIANTS if not args.quick or name in few]

        def untrained(variant: str) -> Any:
            said = DESCRIPTIONS if VARIANTS[variant][1] else {}
            return bench.examine(variant, bench.fresh(variant), said, trained=False)

        def both(variant: str, seed: int) -> Any:
            view, log = bench.trained(variant, seed)
            said = DESCRIPTIONS if VARIANTS[variant][1] else {}
            return bench.examine(variant, view, said, trained=True) | {"training": log}

        for variant in chosen:
            found[f"untrained {variant}"] = [once(f"untrained {variant}", partial(untrained, variant))]
        for seed in range(args.seeds):
            for variant in chosen:
                result = once(f"{variant} {seed}", partial(both, variant, seed))
                found.setdefault(variant, []).append(result)
                logs.setdefault(variant, []).append(result["training"])
        if not args.quick:
            found["untrained description by SmolLM2"] = [
                once(
                    "by smollm2",
                    lambda: bench.examine("description", bench.fresh("description"), bench.smollm2(), trained=False),
                )
            ]
        table = {
            name: summary(runs, found[f"untrained {BASE}" if name.startswith("untrained") else BASE])
            | {"ms_per_sentence_of_20_labels": [r["ms_per_sentence_of_20_labels"] for r in runs]}
            for name, runs in found.items()
        }
        for name, entry in table.items():
            print(name)
            for setting, scores in entry.items():
                if "-way" in setting:
                    shown = ", ".join(
                        f"{k} {v['mean']:.3f} ± {v['se']:.3f} ({v['minus_baseline']:+.3f} ± {v['se_of_that']:.3f})"
                        for k, v in scores.items()
                    )
                    print(f"    {setting}: {shown}")
        alone = once("specialist", lambda: specialist(bench)) if not args.quick else {}
        print(json.dumps(alone, indent=1))
        if out:
            result = {
                "what": "label-guided prompts on FewAsp (multi), MiniLM, trained on 16 aspects, tested on 20 others",
                "date": datetime.now(UTC).date().isoformat(),
                "machine": measure.machine() | {"threads": torch.get_num_threads()},
                "versions": run.versions(),
                "settings": {k: v for k, v in vars(args).items() if k not in ("work", "out", "quick")},
                "load_average": round(os.getloadavg()[0], 1),
                "sentences": len(bench.pool_texts),
                "methods": {name: m.model_dump(mode="json", by_alias=True) for name, (m, _) in VARIANTS.items()},
                "scores": table,
                "training": logs,
                "specialist_of_20_labels_and_self_training_mean_sd": alone,
            }
            store.write_json(out, result)
            print(f"written to {out}", flush=True)


if __name__ == "__main__":
    main()

"""Claim: all measures of lexical diversity, of a whole data set, at more than 20 times the speed of the usual library.

20,000 texts: every MedQuAD answer, and two answers joined for the rest. `lexicalrichness` is the peer. Measures: the
seven ratios of types and tokens, MTLD, HD-D, vocd-D.

In every round both libraries work in turn, on one thread: ours on all texts, the peer on a slice of them that fits the
clock (all for splitting, ratios and MTLD; 2,000 for HD-D and 60 for vocd-D, other ones each round). Times are per text.
`ratio` is the median over rounds of peer / ours for one measure by itself, splitting included on both sides;
`ratio_measure` leaves the splitting out (ours: whatever else the measure needs, on fresh texts); `all` is everything
together, splitting once; `ratio_cpu` is `ratio` in processor time, which a loaded machine disturbs less. Values are
compared on every text that the peer has measured: the largest relative difference. vocd-D samples at random, so there
the peer's own spread between two seeds stands beside the difference, and ours is the limit both estimate.

What wins: HD-D (a product instead of a scipy call per word) and vocd-D (the mean itself instead of 4,800 samples). The
ratios and MTLD by themselves are hardly faster than the peer's plain loops: splitting the text is most of their time.

    python benchmarks/lexical.py                      # results/lexical.json
    python benchmarks/lexical.py --quick              # a minute, writes nothing
    python benchmarks/lexical.py --peer DIR           # lexicalrichness in a folder: pip install --target DIR

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import numpy as np

from residency.curate.lexical import HDD, MTLD, Form, Tokens, TypeToken, VocD
from residency.measure import machine

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "lexical.json"
NAMES = {"ttr": "ttr", "rttr": "rttr", "cttr": "cttr", **{f: f.title() for f in ("herdan", "summer", "dugast", "maas")}}
MEASURES = ("ratios", "mtld", "hdd", "vocd")


def texts(n: int) -> list[str]:
    """All answers, then pairs of them."""
    file = DATA / "medquad.jsonl.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        answers = [json.loads(line)["answer"] for line in handle]
    rng = random.Random(0)
    rng.shuffle(answers)
    return (answers + [" ".join(rng.sample(answers, 2)) for _ in range(n - len(answers))])[:n]


def clock(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, wall seconds and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - wall, time.process_time() - cpu


def value(function: Callable[[], float]) -> float:
    """A value of the peer; NaN where it raises."""
    try:
        return float(function())
    except (ValueError, ZeroDivisionError):
        return float("nan")


def ours(measure: str, tokens: Tokens) -> Any:
    """[N] values, or [N, 7] ratios; from texts that nothing has been computed of yet."""
    fresh = Tokens(tokens.ids, tokens.bounds, tokens.vocabulary)
    if measure == "ratios":
        return np.stack([TypeToken(form=form).of(fresh) for form in get_args(Form)], 1)
    return {"mtld": MTLD(), "hdd": HDD(), "vocd": VocD()}[measure].of(fresh)


def everything(corpus: list[str]) -> None:
    """All measures, splitting included."""
    tokens = Tokens.of(corpus)
    for form in get_args(Form):
        TypeToken(form=form).of(tokens)
    for each in (MTLD(), HDD(), VocD()):
        each.of(tokens)


def peer(measure: str, found: list[Any], seed: int = 42) -> Any:
    """[n] values, or [n, 7] ratios."""
    if measure == "ratios":
        names = [NAMES[form] for form in get_args(Form)]
        return np.array([[value(lambda x=x, name=name: getattr(x, name)) for name in names] for x in found])
    if measure == "vocd":
        return np.array([value(lambda x=x: x.vocd(seed=seed)) for x in found])
    return np.array([value(getattr(x, measure)) for x in found])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hdd", type=int, default=2_000, help="texts of the peer's HD-D per round")
    parser.add_argument("--vocd", type=int, default=60, help="texts of the peer's vocd-D per round")
    parser.add_argument("--large", type=int, default=100_000, help="texts of one more run of ours alone")
    parser.add_argument("--peer", type=Path, help="a folder with lexicalrichness")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args()
    if args.quick:
        args.texts, args.rounds, args.hdd, args.vocd, args.large = 2_000, 2, 300, 15, 4_000
    if args.peer:
        sys.path.append(str(args.peer))
    try:
        from lexicalrichness import LexicalRichness
    except ImportError as error:
        sys.exit(f"skipped: no lexicalrichness ({error}); pip install --target DIR lexicalrichness, then --peer DIR")
    warnings.simplefilter("ignore")
    corpus = texts(args.texts)
    everything(corpus[:500])
    slices = {"ratios": args.texts, "mtld": args.texts, "hdd": args.hdd, "vocd": args.vocd}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in (*MEASURES, "all")}
    worst: dict[str, float] = dict.fromkeys(MEASURES, 0.0)
    compared: dict[str, int] = dict.fromkeys(MEASURES, 0)
    missing: dict[str, int] = dict.fromkeys(MEASURES, 0)
    spread: list[float] = []
    for round_ in range(args.rounds):
        n, objects = len(corpus), None
        tokens, *split = clock(partial(Tokens.of, corpus))
        mine = {name: clock(partial(ours, name, tokens)) for name in MEASURES}
        _, *spent_all = clock(partial(everything, corpus))
        objects, *their_split = clock(partial(list, map(LexicalRichness, corpus)))
        total = np.zeros(2)
        for name in MEASURES:
            values, *spent = mine[name]
            low = round_ * slices[name] % n
            part = slice(low, low + slices[name])
            theirs, *their_spent = clock(partial(peer, name, objects[part]))
            size = len(theirs)
            total += np.array(their_spent) / size
            times[name].append(
                {
                    "ours": (spent[0] + split[0]) / n,
                    "peer": their_split[0] / n + their_spent[0] / size,
                    "ours_measure": spent[0] / n,
                    "peer_measure": their_spent[0] / size,
                    "ours_cpu": (spent[1] + split[1]) / n,
                    "peer_cpu": their_split[1] / n + their_spent[1] / size,
                }
            )
            have, got = np.isfinite(theirs), values[part]
            compared[name] = min(compared[name] + size, n)
            missing[name] += int((have & ~np.isfinite(got)).sum())
            difference = np.abs(got[have] - theirs[have]) / np.maximum(np.abs(theirs[have]), 1e-300)
            if name == "vocd":
                again = peer(name, objects[part][:20], seed=round_)
                spread += (np.abs(again - theirs[:20]) / theirs[:20]).tolist()
                worst[name] = max(worst[name], float(np.nanmedian(difference)))
            else:
                # a value of exactly 0 in both (Maas of a text that repeats nothing) has no relative difference
                worst[name] = max(worst[name], float(difference.max(initial=0)))
        without = their_split[0] / n + total[0] - times["vocd"][-1]["peer_measure"]
        times["all"].append(
            {
                "ours": spent_all[0] / n,
                "peer": their_split[0] / n + total[0],
                "ours_cpu": spent_all[1] / n,
                "peer_cpu": their_split[1] / n + total[1],
                "without_vocd": without / (spent_all[0] / n),
            }
        )
        print(
            f"round {round_ + 1}: " + ", ".join(f"{k} {v[-1]['peer'] / v[-1]['ours']:.1f}×" for k, v in times.items())
        )

    def middle(rows: list[dict[str, float]], over: str, under: str) -> float:
        return round(statistics.median(row[over] / row[under] for row in rows), 2)

    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "peer": f"lexicalrichness {_version()}",
        "texts": len(corpus),
        "tokens": len(tokens.ids),
        "rounds": args.rounds,
        "measures": {},
    }
    for name in MEASURES:
        rows = times[name]
        result["measures"][name] = {
            "ours_us_per_text": round(1e6 * statistics.median(r["ours"] for r in rows), 2),
            "peer_us_per_text": round(1e6 * statistics.median(r["peer"] for r in rows), 2),
            "ratio": middle(rows, "peer", "ours"),
            "ratio_measure": middle(rows, "peer_measure", "ours_measure"),
            "ratio_cpu": middle(rows, "peer_cpu", "ours_cpu"),
            "texts_compared": compared[name],
            "peer_has_a_value_and_ours_is_not_finite": missing[name],
            ("median" if name == "vocd" else "largest") + "_relative_difference": worst[name],
        }
    result["measures"]["vocd"]["median_relative_difference_between_two_seeds_of_the_peer"] = float(np.nanmedian(spread))
    result["all"] = {
        "ours_us_per_text": round(1e6 * statistics.median(r["ours"] for r in times["all"]), 2),
        "peer_us_per_text": round(1e6 * statistics.median(r["peer"] for r in times["all"]), 2),
        "ratio": middle(times["all"], "peer", "ours"),
        "ratio_cpu": middle(times["all"], "peer_cpu", "ours_cpu"),
        "ratio_without_the_peers_vocd": round(statistics.median(r["without_vocd"] for r in times["all"]), 2),
    }
    large = texts(args.large)
    _, wall, cpu = clock(lambda: everything(large))
    result["large"] = {"texts": len(large), "seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
    print(json.dumps(result, indent=2))
    if not args.quick:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def _version() -> str:
    try:
        return version("lexicalrichness")
    except PackageNotFoundError:
        return "?"


if __name__ == "__main__":
    main()

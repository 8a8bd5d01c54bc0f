"""Claim: importance weights of a pool at more than 10 times the speed of the reference, and at least as good.

Pool: MedQuAD, question and answer as one text. Of one of its sources 10 rows are trusted, and all other rows, those of
the source among them, are the pool. Three sources, one a round. In every round both libraries read the same JSONL file
twice, once to count n-grams and once to weigh rows, on one thread: ours by `Ratio`, the peer (`data-selection`, the
paper's) by its own three calls in one process. `ratio` is the median over rounds of peer / ours; `ratio_in_memory`
sets `DSIR.score` of texts in a list against the same time of the peer.

Quality: n is how many rows of the pool are of the source. `top` is their share among the n rows of largest weight,
`drawn` that among n rows drawn with Gumbel noise (mean of 5 seeds); `drawn` is what the method is for. `prior_10` is
ours hardly smoothed. `share` is what chance gives.

`large`: ours alone on the pool several times over, streamed from the file, with the memory of the process before and
after.

    python benchmarks/dsir.py                      # results/dsir.json, about 4 minutes
    python benchmarks/dsir.py --quick              # half a minute, writes nothing
    python benchmarks/dsir.py --peer DIR           # data-selection in a folder: pip install --target DIR data-selection

Reads MedQuAD (CC BY 4.0) from ../shared/data or $RESIDENCY_BENCH_DATA.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from residency.curate.dsir import DSIR, Ratio
from residency.measure import machine

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(__file__).parent / "results" / "dsir.json"
SOURCES = ("CancerGov", "NINDS", "CDC")


def rows() -> list[tuple[str, str]]:
    """(text, source) of every row."""
    file = DATA / "medquad.jsonl.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        found = [json.loads(line) for line in handle]
    return [(f"{row['question']}\n{row['answer']}", row["source"]) for row in found if row["answer"]]


def stream(file: Path) -> Iterator[str]:
    """The texts of a JSONL file, one in memory at a time."""
    with file.open(encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)["text"]


def write(file: Path, texts: list[str], times: int = 1) -> Path:
    """A JSONL file of texts."""
    with file.open("w", encoding="utf-8") as handle:
        for _ in range(times):
            handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return file


def clock(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and wall seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def ours(pool: Path, trusted: Path, params: DSIR) -> Any:
    """[N] log weights, both files streamed."""
    ratio = Ratio(params)
    ratio.update_target(stream(trusted))
    ratio.update_raw(stream(pool))
    return ratio.weigh(stream(pool))


def theirs(pool: Path, trusted: Path, folder: Path) -> Any:
    """[N] log weights of the peer."""
    from data_selection import HashedNgramDSIR

    dsir = HashedNgramDSIR([str(pool)], [str(trusted)], str(folder), num_proc=1)
    dsir.fit_importance_estimator(num_tokens_to_fit="all")
    dsir.compute_importance_weights()
    return np.load(folder / "log_importance_weights" / "0.npy")


def alone(pool: Path, trusted: Path) -> tuple[float, float]:
    """Peak memory in MB of a process that weighs a pool, and seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_alone, pool, trusted).result()


def _alone(pool: Path, trusted: Path) -> tuple[float, float]:
    _, seconds = clock(lambda: ours(pool, trusted, DSIR()))
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), seconds


def precision(weights: Any, wanted: Any) -> dict[str, float]:
    """Share of wanted rows among as many chosen as there are."""
    n = int(wanted.sum())

    def share(keys: Any) -> float:
        return float(wanted[np.argsort(-keys, kind="stable")[:n]].mean())

    drawn = [share(weights + np.random.default_rng(seed).gumbel(size=len(weights))) for seed in range(5)]
    return {"top": round(share(weights), 4), "drawn": round(statistics.mean(drawn), 4)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trusted", type=int, default=10)
    parser.add_argument("--times", type=int, default=8, help="how often the large pool holds the rows")
    parser.add_argument("--peer", type=Path, help="a folder with data-selection")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUT)
    args = parser.parse_args()
    if args.peer:
        sys.path.append(str(args.peer))
    try:
        import data_selection  # noqa: F401
    except ImportError as error:
        sys.exit(f"skipped: no data-selection ({error}); pip install --target DIR data-selection, then --peer DIR")
    known = rows()
    random.Random(0).shuffle(known)
    if args.quick:
        known, args.times = known[:2500], 2
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for source in SOURCES:
            trusted = [i for i, (_, each) in enumerate(known) if each == source][: args.trusted]
            rest = [row for i, row in enumerate(known) if i not in set(trusted)]
            texts, wanted = [text for text, _ in rest], np.array([each == source for _, each in rest])
            examples = [known[i][0] for i in trusted]
            pool, target = write(place / "pool.jsonl", texts), write(place / "target.jsonl", examples)
            mine, seconds = clock(partial(ours, pool, target, DSIR()))
            held, memory = clock(partial(DSIR().score, texts, examples))
            assert np.allclose(mine, held)
            peer, peer_seconds = clock(partial(theirs, pool, target, place / source))
            rounds.append(
                {
                    "source": source,
                    "rows": len(texts),
                    "share": round(float(wanted.mean()), 4),
                    "seconds": {
                        "ours": round(seconds, 3),
                        "in_memory": round(memory, 3),
                        "peer": round(peer_seconds, 3),
                    },
                    "ratio": round(peer_seconds / seconds, 2),
                    "ratio_in_memory": round(peer_seconds / memory, 2),
                    "ours": precision(mine, wanted),
                    "prior_10": precision(DSIR(prior=10).score(texts, examples), wanted),
                    "peer": precision(peer, wanted),
                }
            )
            print(json.dumps(rounds[-1]))
        large = write(place / "large.jsonl", [text for text, _ in known], args.times)
        small, _ = alone(pool, target)
        peak, seconds = alone(large, target)
        size = large.stat().st_size
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "peer": f"data-selection {_version()}",
        "trusted_rows": args.trusted,
        "words": sum(len(text.split()) for text, _ in known),
        "ratio": statistics.median(each["ratio"] for each in rounds),
        "ratio_in_memory": statistics.median(each["ratio_in_memory"] for each in rounds),
        "rounds": rounds,
        "large": {
            "rows": len(known) * args.times,
            "file_MB": round(size / 1e6, 1),
            "seconds": round(seconds, 2),
            "peak_memory_MB": peak,
            "peak_memory_of_the_pool_once_MB": small,
        },
    }
    print(json.dumps(result, indent=2))
    if not args.quick:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def _version() -> str:
    try:
        return version("data-selection")
    except PackageNotFoundError:
        return "?"


if __name__ == "__main__":
    main()

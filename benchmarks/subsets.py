"""Claims: facility location of 10,000 from 200,000 × 384 in a tenth of the peer's time; a million rows within 4 GB.

Rows are random vectors in clusters of uneven size, with 24 directions of variation within each cluster and some noise,
scaled to length 1: nothing is read from disk. Every objective is Σ_x max(0, largest cosine of x to a chosen row) over
all rows, computed anew by blocked products.

Growth: ours (`neighbours`, and the exact `lazy` where it holds all similarities) and apricot-select's lazy greedy
choose n / 20 of n rows, in turn, for several n, everything on one thread. The peer is given the clipped cosines as a
float64 matrix (its metric "precomputed"), product included, and thus maximises the same objective; its own metric
"cosine" is the squared cosine. Above what it can hold it is extrapolated by the power law through its two largest
sizes, in the same run: that figure is an estimate and named so.

Large: ours alone, 10,000 from 200,000.

Million: k-centre and Sim-Div choose 200 from 1,000,000 × 384 in a float16 memory map, each in a process of its own,
whose peak of resident memory (VmHWM of Linux, pages of the map included) is given.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/subsets.py --peer DIR      # results/subsets.json
    … --quick                                    # half a minute, writes nothing

The peer goes into a folder: pip install --target DIR apricot-select.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from residency.curate.cover import EXACT
from residency.curate.facility import FacilityLocation
from residency.curate.kcentre import KCentre
from residency.curate.simdiv import SimDiv
from residency.measure import machine

OUT = Path(__file__).parent / "results" / "subsets.json"
WIDTH = 384


def rows(n: int, seed: int = 0, out: Any = None) -> Any:
    """[n, 384] unit rows in n / 100 clusters of uneven size."""
    rng = np.random.default_rng(seed)
    groups = max(2, n // 100)
    centres = rng.standard_normal((groups, WIDTH)).astype(np.float32)
    share = rng.random(groups) ** 2
    label = rng.choice(groups, n, p=share / share.sum())
    directions = 0.15 * rng.standard_normal((24, WIDTH)).astype(np.float32)
    result = np.empty((n, WIDTH), np.float32) if out is None else out
    for start in range(0, n, 32_768):
        some = centres[label[start : start + 32_768]]
        some = some + rng.standard_normal((len(some), 24), np.float32) @ directions
        some += 0.3 * rng.standard_normal(some.shape, np.float32)
        result[start : start + 32_768] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return result


def objective(pool: Any, chosen: Any) -> float:
    """F of a selection, over all rows."""
    kept = np.ascontiguousarray(pool[np.asarray(chosen)].T)
    return sum(
        float(np.maximum((pool[i : i + 2048] @ kept).max(1), 0).sum(dtype=np.float64))
        for i in range(0, len(pool), 2048)
    )


def clock(work: Any) -> tuple[Any, float]:
    """What it gives, and seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def peer(pool: Any, keep: int) -> Any:
    """apricot-select's lazy greedy on the clipped cosines."""
    from apricot import FacilityLocationSelection

    wide = pool.astype(np.float64)
    similar = wide @ wide.T
    np.maximum(similar, 0, out=similar)
    return FacilityLocationSelection(keep, metric="precomputed", optimizer="lazy").fit(similar).ranking


def growth(sizes: list[int], rounds: int, large: int) -> dict[str, Any]:
    """Both at several sizes, in turn."""
    ways = {
        "peer": peer,
        "neighbours": lambda pool, keep: FacilityLocation(keep=keep, greedy="neighbours").select(pool).indices,
        "lazy": lambda pool, keep: FacilityLocation(keep=keep, greedy="lazy").select(pool).indices,
    }
    for work in ways.values():
        work(rows(600), 5)  # compiles the peer's kernels
    table = []
    for n in sizes:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        reached: dict[str, list[float]] = {name: [] for name in ways}
        for seed in range(rounds):
            pool = rows(n, seed)
            for name, work in ways.items():
                if name == "lazy" and n > EXACT:
                    continue
                chosen, spent = clock(lambda work=work, pool=pool, n=n: work(pool, n // 20))
                seconds[name].append(spent)
                reached[name].append(objective(pool, chosen))
        ours = [name for name in ways if name != "peer" and seconds[name]]
        ratios = {k: [a / b for a, b in zip(seconds["peer"], seconds[k], strict=True)] for k in ours}
        table.append(
            {
                "rows": n,
                "keep": n // 20,
                "seconds": {k: round(statistics.median(v), 3) for k, v in seconds.items() if v},
                "peer_over_ours": {k: round(statistics.median(v), 2) for k, v in ratios.items()},
                "objective_over_peers": {
                    k: [round(a / b, 6) for a, b in zip(reached[k], reached["peer"], strict=True)] for k in ours
                },
            }
        )
        print(json.dumps(table[-1]), flush=True)
    (a, b) = ((row["rows"], row["seconds"]["peer"]) for row in table[-2:])
    power = math.log(b[1] / a[1]) / math.log(b[0] / a[0])
    (c, d) = ((row["rows"], row["seconds"]["neighbours"]) for row in table[-2:])
    return {
        "rounds": rounds,
        "sizes": table,
        "peer_grows_with_the_power": round(power, 2),
        "ours_grows_with_the_power": round(math.log(d[1] / c[1]) / math.log(d[0] / c[0]), 2),
        "peer_seconds_extrapolated": {"rows": large, "seconds": round(b[1] * (large / b[0]) ** power, 1)},
        "peer_similarities_would_take_gib": round(large**2 * 8 / 2**30, 1),
    }


def large(n: int, keep: int) -> dict[str, Any]:
    """Ours alone, and what chance reaches."""
    pool = rows(n)
    found, spent = clock(lambda: FacilityLocation(keep=keep).select(pool))
    reached = objective(pool, found.indices)
    chance = objective(pool, np.random.default_rng(0).choice(n, keep, replace=False))
    return {
        "rows": n,
        "keep": keep,
        "seconds": round(spent, 1),
        "objective": round(reached, 1),
        "objective_said_by_its_scores": round(float(found.score.sum(dtype=np.float64)), 1),
        "objective_of_random_rows": round(chance, 1),
    }


def million(n: int, keep: int) -> dict[str, Any]:
    """k-centre and Sim-Div on a float16 memory map, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.f16"
        rows(n, out=np.memmap(file, np.float16, "w+", shape=(n, WIDTH)))
        result = {}
        for name in ("k-centre", "k-shot"):
            command = [
                sys.executable,
                __file__,
                "--child",
                name,
                "--file",
                str(file),
                "--rows",
                str(n),
                "--keep",
                str(keep),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[name] = {"rows": n, "keep": keep, **json.loads(done.stdout)}
            print(name, result[name], flush=True)
    return result


def child(name: str, file: Path, n: int, keep: int) -> None:
    """One selection, its seconds and the peak of this process."""
    pool = np.memmap(file, np.float16, "r", shape=(n, WIDTH))
    before = peak_gib()
    if name == "k-centre":
        found, spent = clock(lambda: KCentre(keep=keep).select(pool))
    else:
        trusted = np.asarray(pool[:: n // 50][:50], np.float32)
        found, spent = clock(lambda: SimDiv(keep=keep, near_duplicates=0.9).select(pool, trusted))
    said = {"kept": len(found.indices), "seconds": round(spent, 1), "peak_resident_gib": peak_gib()}
    print(json.dumps(said | {"before_gib": before}))


def peak_gib() -> float:
    """Peak of this process; `ru_maxrss` would keep that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**20, 3)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", type=Path, help="a folder with apricot-select")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=OUT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.file, args.rows, args.keep)
    if args.peer:
        sys.path.append(str(args.peer))
    warnings.simplefilter("ignore")
    try:
        import apricot  # noqa: F401
    except ImportError as error:
        sys.exit(f"skipped: no apricot-select ({error}); pip install --target DIR apricot-select, then --peer DIR")
    sizes, rounds, most, keep, many = [5_000, 10_000, 20_000], 3, 200_000, 10_000, 1_000_000
    if args.quick:
        sizes, rounds, most, keep, many = [1_000, 2_000, 4_000], 1, 20_000, 1_000, 50_000
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "peer": "apricot-select 0.6.1",
        "growth": growth(sizes, rounds, most),
    }
    result["large"] = large(most, keep)
    extrapolated = result["growth"]["peer_seconds_extrapolated"]["seconds"]
    result["large"]["peer_extrapolated_over_ours"] = round(extrapolated / result["large"]["seconds"], 1)
    print(json.dumps(result["large"]), flush=True)
    result["million"] = million(many, 200)
    print(json.dumps(result, indent=2))
    if not args.quick:
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()

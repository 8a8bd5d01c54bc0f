"""The demo's table over several seeds, as JSON: scores with intervals, cost, and what curation chose.

    python benchmarks/demo.py [--seeds 3] [--recipe demo] [--kills 0] [--out benchmarks/results/demo.json]

`--kills N` also kills the full recipe N times with SIGKILL at random moments and checks that the resumed run ends
in the same weights, bit for bit, and the same record.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from residency import measure, run, stats, store

HERE = Path(__file__).parent


def one(recipe: str, seed: int, root: Path) -> dict:
    """Run the recipe with a seed; its record."""
    file = HERE.parent / "recipes" / f"{recipe}.yaml"
    if seed:
        text = file.read_text(encoding="utf-8").replace("residency: 1\n", f"residency: 1\nseed: {seed}\n", 1)
        file = root / f"{recipe}-{seed}.yaml"
        file.write_text(text, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "residency", "run", str(file), "--out", str(root / f"run-{seed}"), "--quiet"], check=True
    )
    return run.load_record(root / f"run-{seed}")


def row(record: dict, exam: dict) -> dict:
    """One line of the table."""
    against = next((c for c in record["comparisons"] if c["of"] == exam["id"] and c["against"] == "00-base"), None)
    brief = ("value", "low", "high", "n")
    return {
        "stage": exam["label"],
        "task": {k: exam["task"][k] for k in brief},
        "against_base": {k: against[k] for k in ("difference", "low", "high")} if against else None,
        "fixed": len(against["fixed"]) if against else None,
        "broken": len(against["broken"]) if against else None,
        "guard": {k: exam["guard"][k] for k in brief} if exam["guard"] else None,
        "guard_against_base": against["guard"]["difference"] if against and against["guard"] else None,
        "bits_per_byte": exam["extra"].get("bits-per-byte", {}).get("value"),
        **exam["cost"],
        **{k: exam["measured"].get(k) for k in ("tokens_per_second", "time_to_first_token_ms", "peak_memory_bytes")},
    }


def precision_of_curation(record: dict) -> dict | None:
    """Share of the kept rows that belong to the domain, and how many of the domain's rows were found."""
    for step in record["steps"]:
        if "tags" in step:
            domain = {t: v for t, v in step["tags"].items() if not t.startswith("chatter")}
            kept = sum(v["kept"] for v in step["tags"].values())
            right = sum(v["kept"] for v in domain.values())
            there = right + sum(v["dropped"] for v in domain.values())
            pool = sum(v["kept"] + v["dropped"] for v in step["tags"].values())
            return {
                "kept": kept,
                "precision": round(right / kept, 4),
                "recall": round(right / there, 4),
                "share_of_domain_in_pool": round(there / pool, 4),
            }
    return None


def pooled(records: list[dict]) -> list[dict]:
    """Each stage against the base, a question's score averaged over the seeds (each draws other wrong answers)."""
    ids = [item["id"] for item in records[0]["exams"][0]["task"]["items"]]
    means = []
    for i in range(len(records[0]["exams"])):
        scores = [{x["id"]: x["score"] for x in record["exams"][i]["task"]["items"]} for record in records]
        means.append({item: statistics.mean(s[item] for s in scores) for item in ids})
    rows = []
    for exam, after in zip(records[0]["exams"][1:], means[1:], strict=True):
        found = stats.paired_difference(means[0], after)
        brief = ("difference", "low", "high", "n")
        rows.append({"stage": exam["label"], **{k: round(getattr(found, k), 4) for k in brief}})
    return rows


def kills(recipe: str, count: int, root: Path, reference: Path) -> dict:
    """Kill the full recipe `count` times; the end must equal the uninterrupted run."""
    file, out = HERE.parent / "recipes" / f"{recipe}.yaml", root / "killed"
    length = json.loads((reference / "run.json").read_text())["time"]["seconds"]
    rng, moments = random.Random(0), []
    command = [sys.executable, "-m", "residency", "run", str(file), "--out", str(out), "--quiet"]
    for _ in range(count):
        process = subprocess.Popen(command)
        delay = rng.uniform(0.05, 0.5) * length
        try:
            process.wait(delay)
            shutil.rmtree(out)  # it finished before the kill: start over
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            moments.append(round(delay, 1))
    subprocess.run(command, check=True)
    weights = [(run.final_model(r) / "model.safetensors").read_bytes() for r in (reference, out)]
    records = [store.timeless(run.load_record(r)) for r in (reference, out)]
    return {
        "kills": len(moments),
        "seconds_until_each": moments,
        "same_weights": weights[0] == weights[1],
        "same_record": records[0] == records[1],
    }


def write(given: argparse.Namespace, records: list[dict], survived: dict | None) -> None:
    """Summarise the records into one JSON file."""
    stages = [row(records[0], e)["stage"] for e in records[0]["exams"]]
    tables = [[row(record, exam) for exam in record["exams"]] for record in records]
    result = {
        "what": f"recipes/{given.recipe}.yaml, {given.seeds} seeds",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": measure.machine(),
        "versions": run.versions(),
        "median_over_seeds": [
            {
                "stage": stage,
                "task": statistics.median(t[i]["task"]["value"] for t in tables),
                "tokens_per_second": statistics.median(t[i]["tokens_per_second"] for t in tables),
            }
            for i, stage in enumerate(stages)
        ],
        "against_base_averaged_over_seeds": pooled(records),
        "seeds": [
            {
                "seed": record["seed"],
                "seconds": round(sum(x["measured"]["seconds"] for x in [*record["steps"], *record["exams"]]), 1),
                "peak_memory_bytes": max(
                    node["measured"].get("process_peak_bytes", node["measured"]["peak_memory_bytes"])
                    for node in [*record["exams"], *record["steps"]]
                ),
                "curation": precision_of_curation(record),
                "stages": table,
            }
            for record, table in zip(records, tables, strict=True)
        ],
        "kill_and_resume": survived,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    store.write_json(given.out, result)
    sys.stdout.write(json.dumps(result["median_over_seeds"], indent=1) + f"\n{given.out}\n")


def main() -> None:
    """Run, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--have", type=Path, nargs="*", default=[], help="finished run directories, one per first seed")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "demo.json")
    given = parser.parse_args()
    import torch  # noqa: F401  (so that the machine's GPU is named)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        records = [run.load_record(folder) for folder in given.have]
        records += [one(given.recipe, seed, root) for seed in range(len(records), given.seeds)]
        assert [r["seed"] for r in records] == list(range(given.seeds)), "--have: runs of seeds 0, 1, … in this order"
        write(given, records, None)
        reference = given.have[0] if given.have else root / "run-0"
        if given.kills:
            write(given, records, kills(given.recipe, given.kills, root, reference))


if __name__ == "__main__":
    main()

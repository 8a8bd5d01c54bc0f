"""The results of `selection.py` in sentences and tables, all from its numbers."""

from __future__ import annotations

import statistics
from typing import Any

from selection_pool import FAULTS


def summary(result: dict[str, Any]) -> list[str]:
    """The results in sentences."""
    size = result["setting"]["pool"]
    sparse = {n: each["missing"] for n, each in result["scores"].items() if each["missing"] > size / 2}
    table = {n: each for n, each in result["scores"].items() if n not in sparse}
    order = sorted(table, key=lambda n: -table[n]["auroc"]["all"])
    heads = ["all", *FAULTS]
    lines = ["| score | good | " + " | ".join(heads) + " | faults chosen |", "|" + "---|" * (len(heads) + 3)]
    for n in order:
        cells = " | ".join(f"{table[n]['auroc'][f]:.2f}" for f in heads)
        lines.append(f"| {n} | {table[n]['good']} | {cells} | {table[n]['chosen']:.0%} |")
    worse = [n for n in reversed(order) if table[n]["auroc"]["all"] < 0.5]
    said = ", ".join(f"{n} {table[n]['auroc']['all']:.2f}" for n in worse)
    lines += ["", f"{len(worse)} of {len(order)} scores prefer faults to clean rows (AUROC below 0.5): {said}"]
    if sparse:
        said = ", ".join(f"{n} {count}" for n, count in sparse.items())
        lines.append(f"without a value for most of the {size} rows, and not counted: {said}")
    left_out = result["setting"]["left_out"]
    lines.append("not run: " + "; ".join(f"{n} ({why})" for n, why in left_out.items()))
    share = 1 - result["setting"]["clean"] / size
    more = sorted((n for n in order if table[n]["chosen"] > share), key=lambda n: -table[n]["chosen"])
    said = ", ".join(f"{n} {table[n]['chosen']:.0%}" for n in more)
    lines.append(f"{len(more)} of them choose more faults than chance ({share:.0%}) would: {said}")
    for f in FAULTS:
        against = {n: table[n]["auroc"][f] for n in order}
        found = sorted(against, key=against.__getitem__, reverse=True)
        ends = (", ".join(f"{n} {against[n]:.2f}" for n in part) for part in (found[:3], found[:-4:-1]))
        lines.append("against {}, best: {}; worst: {}".format(f, *ends))
    keys = ("faults", "subjects", "types", "sources", "vendi", "nearest", "duplicate_pairs", "tokens")
    lines += ["", "| selector | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 1)]
    chosen = result["selectors"]
    for n in sorted(chosen, key=lambda n: chosen[n]["faults"]):
        lines.append(f"| {n} | " + " | ".join(str(chosen[n][k]) for k in keys) + " |")
    lines.append("")
    for n, gone in result["dropped"].items():
        said = ", ".join(f"{count} {f}" for f, count in gone.items() if count)
        lines.append(f"{n} drops {sum(gone.values())} rows before the draw: {said or 'none'}")
    losses = result["tuning"]["losses"]
    drawn, others = ([v for k, v in losses["random"].items() if k.endswith("seed 0") == same] for same in (True, False))
    mean, sd = statistics.mean(drawn), statistics.stdev(drawn)
    lines += [
        "",
        f"untuned {result['tuning']['untuned']:.4f} nats per answer token; tuned on random draws {mean:.4f} ± {sd:.4f}",
    ]
    lines.append(
        f"({len(drawn)} draws, one tuning seed); with other tuning seeds: {', '.join(f'{v:.4f}' for v in others)}"
    )
    lines += ["| tuned on | loss | less random | in its sd | draws |", "|" + "---|" * 5]
    means = {n: statistics.mean(v.values()) for n, v in losses.items() if n != "random"}
    for n in sorted(means, key=lambda n: means[n]):
        less = means[n] - mean
        lines.append(f"| {n} | {means[n]:.4f} | {less:+.4f} | {less / sd:+.1f} | {len(losses[n])} |")
    real = [n for n in means if n not in ("clean", "faults")]
    groups = {
        "lose to every random draw": [n for n in real if means[n] > max(drawn)],
        "lose to the mean of random, not to every draw": [n for n in real if mean < means[n] <= max(drawn)],
        "beat the mean of random, not every draw": [n for n in real if min(drawn) <= means[n] <= mean],
        "beat every random draw": [n for n in real if means[n] < min(drawn)],
    }
    return [*lines, "", *(f"{what}: {', '.join(names) or 'none'}" for what, names in groups.items())]

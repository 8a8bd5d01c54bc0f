"""What the cells of `replay.py` say: figures of a run, means and sd by arm, paired differences, sentences.

A run is a seed and an order; only runs that every arm has are counted. Differences are taken within a run and get a
95 % interval by Student's t, which treats runs as independent: the two orders of a seed share their rows, so it is
rather too narrow. `followed` was added after the scores were seen: whether a task that InsCL gave more rows than equal
quotas would have kept more than under `random`.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from residency.evaluate.relative_gain import forgetting, relative_gain

SCORES = ("hits", "probability")


def figures(run: dict[str, Any], alone: Sequence[dict[str, Any]], scores: Sequence[str]) -> dict[str, float]:
    """What one run says: Relative Gain in per cent, forgetting and levels in points.

    Args:
        run: A finished sequence.
        alone: Of its tasks in their order, each learnt alone.
        scores: Those to look at.
    """
    found: dict[str, float] = {}
    for score in scores:
        r = np.full((len(alone), len(alone)), np.nan)
        for i, row in enumerate(run["scores"]):
            r[i, : i + 1] = [each[score] for each in row]
        gain = relative_gain(r, [each["score"][score] for each in alone])
        found |= {f"{score}: Relative Gain after task {i}": float(g) for i, g in enumerate(gain, 2)}
        found[f"{score}: Relative Gain, mean of stages"] = float(gain.mean())
        found[f"{score}: forgetting at the end"] = 100 * float(forgetting(r)[-1])
        found[f"{score}: the new task when learnt"] = 100 * float(np.diag(r)[1:].mean())
        found[f"{score}: all tasks at the end"] = 100 * float(r[-1].mean())
    if run["rouge"]:
        old = {task: mark for each in alone[:-1] for task, mark in each["rouge"].items()}
        found["Rouge-L: old tasks at the end"] = statistics.mean(run["rouge"][task] for task in old)
        found["Rouge-L: the same tasks alone"] = statistics.mean(old.values())
    return found


def summary(state: dict[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Mean and sd of every figure by arm, and paired differences between arms with a 95 % t interval."""
    # a tiny random base has tasks without a hit, and so no gain to speak of
    scores = [name for name in SCORES if all(each["score"][name] > 0 for each in state["alone"].values())]
    by: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for key, run in state["sequence"].items():
        seed, order, arm = key.split(" | ")
        by.setdefault((seed, order), {})[arm] = figures(
            run, [state["alone"][f"{seed} | {task}"] for task in order.split(" > ")], scores
        )
    whole = [found for found in by.values() if set(arms) <= set(found)]
    result: dict[str, Any] = {"runs": len(whole), "arms": {}, "differences": {}}
    if len(whole) < 2:
        return result
    names = list(whole[0][arms[0]])
    for arm in arms:
        values = {name: [found[arm][name] for found in whole] for name in names}
        result["arms"][arm] = {
            name: [round(statistics.mean(v), 2), round(statistics.stdev(v), 2)] for name, v in values.items()
        }
    for a, b in itertools.combinations(arms, 2):
        table = {}
        for name in names:
            d = [found[b][name] - found[a][name] for found in whole]
            half = float(student.ppf(0.975, len(d) - 1)) * statistics.stdev(d) / len(d) ** 0.5
            table[name] = {
                "mean": round(statistics.mean(d), 2),
                "interval": [round(statistics.mean(d) - half, 2), round(statistics.mean(d) + half, 2)],
                "each": [round(x, 2) for x in d],
            }
        result["differences"][f"{b} - {a}"] = table
    return result


def followed(state: dict[str, Any]) -> dict[str, Any]:
    """Of every old task at the end: rows more than under equal quotas, and points of hits more than under `random`."""
    rows, points, cells = [], [], []
    for key, run in state["sequence"].items():
        seed, order, arm = key.split(" | ")
        other = state["sequence"].get(f"{seed} | {order} | random")
        if arm != "InsCL" or other is None:
            continue
        for i, task in enumerate(order.split(" > ")[:-1]):
            rows.append(run["stages"][-1]["quotas"][task] - other["stages"][-1]["quotas"][task])
            points.append(100 * (run["scores"][-1][i]["hits"] - other["scores"][-1][i]["hits"]))
            cells.append({"run": f"{seed} | {order}", "task": task, "rows": rows[-1], "points": round(points[-1], 2)})
    if len(set(rows)) < 2 or len(set(points)) < 2:
        return {"cells": cells}
    return {"spearman": round(float(spearmanr(rows, points).statistic), 3), "cells": cells}


def sentences(result: dict[str, Any]) -> list[str]:
    """What the figures say."""
    said = []
    for pair, table in result["differences"].items():
        b, a = pair.split(" - ")
        for name, d in table.items():
            if name.endswith(("mean of stages", "after task 4", "forgetting at the end", "old tasks at the end")):
                low, high = d["interval"]
                word = "is above" if low > 0 else "is below" if high < 0 else "is not shown to differ from"
                won = sum(x > 0 for x in d["each"])
                said.append(
                    f"{name}: {b} {word} {a}: {d['mean']:+.1f} points "
                    f"(95 % interval {low:+.1f} to {high:+.1f}; above in {won} of {len(d['each'])} runs)"
                )
    for pair, table in result["differences"].items():
        for name, d in table.items():
            if "none" not in pair and "after task 2" in name:
                said.append(
                    f"{name}: one task learnt, so equal quotas, and {pair} is still {min(d['each']):+.1f} to "
                    f"{max(d['each']):+.1f} points: that much is the draw of rows alone"
                )
    if "spearman" in (found := result.get("followed", {})):
        said.append(
            "old tasks that InsCL gave more rows kept more hits than under random: rank correlation "
            f"{found['spearman']:+.2f} over {len(found['cells'])} tasks in runs "
            "(looked for afterwards, not independent)"
        )
    return said

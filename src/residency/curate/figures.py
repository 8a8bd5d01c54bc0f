"""What a choice looks like: the map, the reasons, every score's distribution, how scores agree, examples per decile.

All figures are plain data (docs/run-directory.md); everything drawn at random is seeded and the same in every run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from residency.curate.entropies import KNN, entropy
from residency.curate.expressions import percentile
from residency.curate.vendi import Vendi

if TYPE_CHECKING:
    from residency.curate.measuring import Supply
    from residency.curate.pool import Pool
    from residency.curate.scoring import Selection
    from residency.rows import Row

MAP_POINTS = 5_000
TABLE_ROWS = 2_000
SPREAD_ROWS = 2_000
"""Most rows whose diversity is measured; the same number of chosen and of random rows."""
DRAWS = 3
BINS = 20

Columns = dict[str, np.ndarray]


def figures(
    by: str,
    pool: Pool,
    columns: Columns,
    chosen: Selection,
    supply: Supply,
    trusted: list[Row],
    good: dict[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    """Every figure of a `curate` step.

    Args:
        by: Name of the selector.
        pool: The rows.
        columns: The scores, [N] each.
        chosen: The choice.
        supply: Inputs over the pool; the map needs its embeddings, if it has them.
        trusted: The trusted rows.
        good: Which end of each score the literature keeps.
        seed: Of the samples.
    """
    found = []
    vectors = supply["embeddings"] if supply.has("embeddings") else None
    if vectors is not None:
        found.append(_map(pool, vectors, supply, trusted, chosen, seed))
    found += [_table(pool, columns, chosen), _tags(pool, chosen)]
    if (spread := _spread(pool, vectors, chosen, seed)) is not None:
        found.append(spread)
    kept = np.zeros(len(pool), bool)
    kept[chosen.indices] = True
    for column, values in columns.items():
        if np.isfinite(values).sum() > 1:
            found += [_distribution(column, values, kept), _deciles(column, values, pool, kept)]
    if len(columns) > 1:
        found.append(_agreement(columns))
    if columns:
        found.append(_overlap(by, columns, good, chosen))
    return found


def _map(pool: Pool, vectors: Any, supply: Supply, trusted: list[Row], chosen: Selection, seed: int) -> dict[str, Any]:
    """The pool on two principal components: the kept rows first, then a sample, at most `MAP_POINTS`."""
    from residency.encoders import principal_plane

    taken = set(chosen.indices.tolist())
    rest = np.array([i for i in range(len(pool)) if i not in taken], int)
    room = max(0, MAP_POINTS - len(taken))
    if len(rest) > room:
        rest = np.sort(np.random.default_rng(seed).choice(rest, room, replace=False))
    shown = [*chosen.indices[:MAP_POINTS].tolist(), *rest.tolist()]
    parts = [np.asarray(vectors[shown], np.float32)]
    anchors = trusted if supply.has("example_embeddings") else []
    if anchors:
        parts.append(np.asarray(supply["example_embeddings"], np.float32))
    flat = principal_plane(np.concatenate(parts))
    groups = ["kept" if i in taken else kind_of(chosen.reasons[i]) for i in shown] + ["trusted"] * len(anchors)
    hover = [f"{pool.questions[i][:90]} · {chosen.reasons[i]}" for i in shown] + [r.prompt[:90] for r in anchors]
    also = f", and the {len(anchors)} trusted rows" if anchors else ""
    return {
        "kind": "scatter",
        "title": "The pool, as the encoder sees it",
        "x": flat[:, 0].tolist(),
        "y": flat[:, 1].tolist(),
        "group": groups,
        "hover": hover,
        "xlabel": "first principal component",
        "ylabel": "second",
        "note": f"{len(shown):,} of {len(pool):,} pool rows shown{also}.",
    }


def kind_of(reason: str) -> str:
    """The kind of a reason, without its figures: "dropped: near-duplicate (cosine 0.97) of …" is "near-duplicate"."""
    said = reason.partition(": ")[2]
    return re.split(r"[\d(,:]", said, maxsplit=1)[0].strip() or reason.partition(":")[0]


def _table(pool: Pool, columns: Columns, chosen: Selection) -> dict[str, Any]:
    taken = set(chosen.indices.tolist())
    by_score = np.argsort(np.where(np.isnan(chosen.score), np.inf, -chosen.score), kind="stable").tolist()
    order = [*chosen.indices.tolist(), *(i for i in by_score if i not in taken)][:TABLE_ROWS]
    return {
        "kind": "table",
        "title": "Why each row was kept or dropped",
        "columns": ["row", "tag", "question", *columns, "decision"],
        "rows": [
            [
                pool.lines[i],
                pool.tags[i] or "",
                pool.questions[i][:120],
                *(round(float(v[i]), 3) if np.isfinite(v[i]) else None for v in columns.values()),
                chosen.reasons[i],
            ]
            for i in order
        ],
        "note": f"Kept first, in the order of the choice; {len(order):,} of {len(pool):,} rows. All, with every score, "
        "are in scores.parquet.",
    }


def _tags(pool: Pool, chosen: Selection) -> dict[str, Any]:
    taken = set(chosen.indices.tolist())
    counts: dict[str, list[int]] = {}
    for i, tag in enumerate(pool.tags):
        counts.setdefault(tag or "untagged", [0, 0])[0 if i in taken else 1] += 1
    return {
        "kind": "table",
        "title": "Where the kept rows come from",
        "columns": ["tag", "kept", "dropped"],
        "rows": [[t, k, d] for t, (k, d) in sorted(counts.items(), key=lambda e: -e[1][0])[:200]],
        "note": f"The first 200 of {len(counts):,} tags." if len(counts) > 200 else "",
    }


def _spread(pool: Pool, vectors: Any, chosen: Selection, seed: int) -> dict[str, Any] | None:
    """How diverse the choice is, beside as many rows drawn at random."""
    n = min(len(chosen.indices), SPREAD_ROWS)
    tagged = len(set(pool.tags)) > 1
    if n < 2 or n == len(pool) or (vectors is None and not tagged):
        return None
    rng = np.random.default_rng(seed)
    mine = np.sort(rng.choice(chosen.indices, n, replace=False))
    sets = [mine, *(np.sort(rng.choice(len(pool), n, replace=False)) for _ in range(DRAWS))]
    lines: list[list[Any]] = []
    if vectors is not None:
        parts = [np.asarray(vectors[s], np.float32) for s in sets]
        lines += [
            ["Vendi score (effective number of different rows)", *(Vendi().of(part) for part in parts)],
            ["mean distance to the nearest other row (1 − cosine)", *(float(KNN().score(p).mean()) for p in parts)],
        ]
    if tagged:
        named = [[pool.tags[i] or "untagged" for i in s] for s in sets]
        lines.append(["effective number of tags (exp of their entropy)", *(float(np.exp(entropy(t))) for t in named)])
    return {
        "kind": "table",
        "title": "How diverse the choice is",
        "columns": ["measure", "kept", "random"],
        "rows": [[name, round(kept, 4), round(float(np.mean(draws)), 4)] for name, kept, *draws in lines],
        "note": f"Of {n:,} kept rows, and the mean of {DRAWS} draws of {n:,} rows from the pool.",
    }


def _distribution(column: str, values: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    there = np.isfinite(values)
    low, high = np.percentile(values[there], [0.5, 99.5])
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    labels = [fmt(a) for a in edges[:-1]]
    if len(set(labels)) < len(labels):
        labels = [f"{a:.6g}" for a in edges[:-1]]
    x: list[str] = []
    y: list[float] = []
    group: list[str] = []
    for name, mask in (("pool", there), ("kept", there & kept)):
        counts = np.histogram(np.clip(values[mask], edges[0], edges[-1]), edges)[0]
        x += labels
        y += (100 * counts / max(1, counts.sum())).round(2).tolist()
        group += [name] * len(labels)
    without = int((~there).sum())
    return {
        "kind": "bars",
        "title": f"{column}: the pool, and what was kept",
        "x": x,
        "y": y,
        "group": group,
        "xlabel": f"{column}, from",
        "ylabel": "% of rows",
        "note": f"{without:,} rows have no finite value." if without else "",
    }


def fmt(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def _deciles(column: str, values: np.ndarray, pool: Pool, kept: np.ndarray) -> dict[str, Any]:
    """A row in the middle of every tenth of a score, highest first."""
    there = np.flatnonzero(np.isfinite(values))
    order = there[np.argsort(-values[there], kind="stable")]
    lines = []
    for tenth, part in enumerate(np.array_split(order, min(10, len(order))), 1):
        i = int(part[len(part) // 2])
        share = 100 * float(kept[part].mean())
        lines.append(
            [
                tenth,
                f"{fmt(values[part[-1]])} to {fmt(values[part[0]])}",
                f"{share:.0f} %",
                pool.lines[i],
                fmt(values[i]),
                pool.questions[i],
            ]
        )
    return {
        "kind": "table",
        "title": f"{column}: a row from every tenth",
        "columns": ["tenth", "from … to", "kept", "row", column, "question"],
        "rows": lines,
        "note": "The first tenth has the highest values.",
    }


def _agreement(columns: Columns) -> dict[str, Any]:
    names = list(columns)
    ranks = [percentile(np.where(np.isfinite(v), v, np.nan)) for v in columns.values()]
    grid: list[list[float | None]] = []
    for a in ranks:
        line: list[float | None] = []
        for b in ranks:
            both = ~np.isnan(a) & ~np.isnan(b)
            varied = both.sum() > 2 and a[both].std() > 0 and b[both].std() > 0
            line.append(round(float(np.corrcoef(a[both], b[both])[0, 1]), 3) if varied else None)
        grid.append(line)
    return {
        "kind": "heatmap",
        "title": "Which scores say the same",
        "x": names,
        "y": names,
        "z": grid,
        "range": [-1, 1],
        "note": "Rank correlation (Spearman) over the pool.",
    }


def _overlap(by: str, columns: Columns, good: dict[str, str], chosen: Selection) -> dict[str, Any]:
    n = len(chosen.indices)
    sets = {f"chosen by {by}": set(chosen.indices.tolist())}
    for column, values in columns.items():
        if good.get(column) == "middle":
            continue
        up = np.where(np.isnan(values), -np.inf, values if good.get(column) == "high" else -values)
        sets[f"{'highest' if good.get(column) == 'high' else 'lowest'} {column}"] = set(
            np.argsort(-up, kind="stable")[:n].tolist()
        )
    names = list(sets)
    return {
        "kind": "heatmap",
        "title": "Which choices overlap",
        "x": names,
        "y": names,
        "z": [[round(len(a & b) / max(1, len(a | b)), 3) for b in sets.values()] for a in sets.values()],
        "range": [0, 1],
        "note": f"Share of common rows (Jaccard) of the choice and of the {n:,} best rows by each score.",
    }

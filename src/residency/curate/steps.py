"""Recipe step of the curate stage: `curate: {by: k-shot}`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from residency.curate.simdiv import SimDiv
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step

if TYPE_CHECKING:
    from residency.rows import Refused, Row

MAP_POINTS = 5_000
TABLE_ROWS = 2_000


class CurateByKShotParams(SimDiv):
    """Keys of `curate: {by: k-shot}`."""

    pool: str
    """The rows to choose from: a file, a `datasets` folder, or `embedded:NAME`."""
    encoder: str = "all-minilm-l6-v2"
    """Sentence encoder: an embedded base, a local folder, or a hub id (mean pooling)."""
    batch: int = Field(64, ge=1)
    """Texts per forward pass of the encoder."""


class CurateByKShot(Step):
    """Embed the trusted rows and the pool, choose by Sim-Div, hand on trusted rows + chosen rows."""

    Params = CurateByKShotParams
    params: CurateByKShotParams
    reads = frozenset({"rows"})
    gives = frozenset({"rows"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "k-shot"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"curate · {self.params.keep:,} by k-shot"

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        return {"pool": self.params.pool}

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        return {"encoder": self.params.encoder}

    def tiny(self) -> CurateByKShot:
        """See `Step.tiny`."""
        return CurateByKShot(
            self.params.model_copy(update={"keep": 8, "near_duplicates": 1.0, "encoder": "tiny-text-encoder"})
        )

    def _fresh(self, pool: Iterator[Row], examples: list[Row], refused: list[Refused]) -> Iterator[Row]:
        """Pool rows that are not trusted rows themselves, with ids that no trusted row has."""
        from residency.rows import Refused

        known, ids = {row.key(): row.id for row in examples}, {row.id for row in examples}
        for row in pool:
            if (key := row.key()) in known:
                reason = f"the same row as the trusted row {known[key]}"
                refused.append(Refused(row.source, row.line, reason, row.prompt[:200]))
            else:
                yield replace(row, id=f"pool:{row.id}") if row.id in ids else row

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        encoder = state.others["encoder"]
        if encoder.kind != "text-encoder":
            raise PlanError(
                f"curating needs a text-encoder, and `{self.params.encoder}` is a {encoder.kind}",
                hint="encoder: all-minilm-l6-v2, or a sentence encoder of your own",
            )
        work = 2 * (encoder.parameters - encoder.hidden * encoder.vocabulary)
        after = replace(state, rows=state.rows + min(self.params.keep, state.pool_rows))
        notes = (f"{state.pool_rows:,} pool rows → {min(self.params.keep, state.pool_rows):,}",)
        flops = work * (state.pool_rows + state.rows) * min(256, state.tokens_per_row)
        return Forecast(after, flops=flops, seconds=5, peak_bytes=(400 << 20) + 800 * state.pool_rows, notes=notes)

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import numpy as np

        from residency import encoders, rows

        p = self.params
        examples = rows.load(job.rows)
        encoder = encoders.load(job.base(p.encoder), job.device)
        trusted = encoder.encode([r.content for r in examples], batch=p.batch)

        # One pass over the pool: texts go by in chunks, only embeddings (float16, on disk), ids and excerpts stay.
        kept_rows: list[rows.Row] = []
        with (job.scratch / "embeddings.f16").open("wb") as file:
            chunk: list[rows.Row] = []
            with job.progress.task("embedding the pool", job.sizes.get("pool", 0)) as advance:
                for row in self._fresh(job.stream("pool"), examples, job.quarantine):
                    chunk.append(row)
                    if len(chunk) == 2048:
                        file.write(_embed(encoder, chunk, p.batch, advance))
                        kept_rows += [_light(r) for r in chunk]
                        chunk = []
                if chunk:
                    file.write(_embed(encoder, chunk, p.batch, advance))
                    kept_rows += [_light(r) for r in chunk]
        if not kept_rows:
            raise DataError("the pool has no usable rows", where=p.pool, hint="see quarantine.jsonl for the reasons")
        vectors = np.memmap(job.scratch / "embeddings.f16", np.float16, "r", shape=(len(kept_rows), trusted.shape[1]))
        chosen = p.select(vectors, trusted)

        wanted = {kept_rows[i].id: n for n, i in enumerate(chosen.indices)}
        picked: list[rows.Row | None] = [None] * len(wanted)
        # a second pass fetches the texts of the chosen, without writing its refusals to quarantine twice
        for row in self._fresh(job.read("pool", []), examples, []):
            if row.id in wanted:
                picked[wanted[row.id]] = row
        rows.write(job.out / "rows.jsonl", [*examples, *(r for r in picked if r is not None)])
        taken = set(chosen.indices.tolist())
        tags: dict[str, list[int]] = {}
        for i, row in enumerate(kept_rows):
            tags.setdefault(row.tag or "untagged", [0, 0])[0 if i in taken else 1] += 1
        dropped = sum("near-duplicate" in reason for reason in chosen.reasons)
        scores = chosen.score[chosen.indices]
        return Outcome(
            gives={"rows": "rows.jsonl"},
            summary={
                "trusted": len(examples),
                "pool": len(kept_rows),
                "kept": len(chosen.indices),
                "near_duplicates_dropped": dropped,
                "lowest_similarity_kept": round(float(scores.min()), 4),
                "median_similarity_kept": round(float(np.median(scores)), 4),
                "quarantined": len(job.quarantine),
            },
            figures=[
                _map(kept_rows, vectors, trusted, examples, chosen, taken, job.seed),
                _table(kept_rows, chosen, taken),
                {
                    "kind": "table",
                    "title": "Where the kept rows come from",
                    "columns": ["tag", "kept", "dropped"],
                    "rows": [[t, k, d] for t, (k, d) in sorted(tags.items(), key=lambda e: -e[1][0])],
                },
            ],
            extra={"tags": {t: {"kept": k, "dropped": d} for t, (k, d) in sorted(tags.items())}},
        )


def _embed(encoder, chunk, batch, advance) -> bytes:
    import numpy as np

    vectors = encoder.encode([r.content for r in chunk], batch=batch)
    advance(len(chunk))
    return vectors.astype(np.float16).tobytes()


def _light(row):
    """A row without its full text: what the map and the table show."""
    turns = tuple((role, content[:160]) for role, content in row.messages)
    return replace(row, messages=turns, text=row.text[:160] if row.text else None, image=None, choices=())


def _map(pool, vectors, trusted, examples, chosen, taken, seed: int) -> dict:
    """The pool on two principal components: the kept rows first, then a sample, at most `MAP_POINTS`."""
    import numpy as np

    from residency.encoders import principal_plane

    rest = np.array([i for i in range(len(pool)) if i not in taken])
    room = max(0, MAP_POINTS - len(taken))
    if len(rest) > room:
        rest = np.sort(np.random.default_rng(seed).choice(rest, room, replace=False))
    shown = [*chosen.indices[:MAP_POINTS].tolist(), *rest.tolist()]
    points = np.concatenate([np.asarray(vectors[shown], np.float32), np.asarray(trusted, np.float32)])
    flat = principal_plane(points)
    groups = ["kept" if i in taken else _group(chosen.reasons[i]) for i in shown] + ["trusted"] * len(examples)
    hover = [f"{pool[i].prompt[:90]} · {chosen.reasons[i]}" for i in shown] + [r.prompt[:90] for r in examples]
    return {
        "kind": "scatter",
        "title": "The pool, as the encoder sees it",
        "x": flat[:, 0].tolist(),
        "y": flat[:, 1].tolist(),
        "group": groups,
        "hover": hover,
        "xlabel": "first principal component",
        "ylabel": "second",
        "note": f"{len(shown):,} of {len(pool):,} pool rows shown, and the {len(examples)} trusted rows.",
    }


def _group(reason: str) -> str:
    return "near-duplicate" if "near-duplicate" in reason else "too far"


def _table(pool, chosen, taken) -> dict:
    order = [*chosen.indices.tolist(), *(i for i in (-chosen.score).argsort(kind="stable").tolist() if i not in taken)]
    return {
        "kind": "table",
        "title": "Why each row was kept or dropped",
        "columns": ["row", "tag", "question", "similarity", "decision"],
        "rows": [
            [pool[i].line, pool[i].tag or "", pool[i].prompt[:120], round(float(chosen.score[i]), 3), chosen.reasons[i]]
            for i in order[:TABLE_ROWS]
        ],
        "note": f"Kept first, then dropped by similarity; {min(TABLE_ROWS, len(pool)):,} of {len(pool):,} rows.",
    }

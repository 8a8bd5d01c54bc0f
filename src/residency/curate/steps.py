"""The recipe step of the curate stage: `curate: {by: …}`, one class per selector, all of them this one.

    pool ─► chunks on disk ─► measure (embeddings, scores alone) ─► scores over the pool ─► filter ─► select ─► rows

Measuring goes chunk by chunk and each finished chunk is kept, so a killed step goes on where it was; with `scale: ray`
the chunks are measured by the workers of a cluster. What is chosen does not depend on where it was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import create_model

from residency import catalog
from residency.curate.budget import rows_of
from residency.curate.choosing import choose
from residency.curate.measuring import (
    EMBEDDINGS,
    GRADIENTS,
    TOKENS,
    Measurer,
    Supply,
    Work,
    column_of,
    seeded,
    tags_of,
    texts_of,
)
from residency.curate.params import Curating, CuratingSome
from residency.curate.pool import Pool
from residency.curate.scoring import Budgeted, Selection, Selector
from residency.errors import PlanError
from residency.step import Forecast, Job, Kind, Outcome, State, Step

if TYPE_CHECKING:
    import numpy as np

    from residency.rows import Row

TAGS = 50
"""Most tags of a pool that the record counts."""

MODELS = {
    "embeddings": "encoder",
    "example_embeddings": "encoder",
    "reading": "reader",
    "gradients": "reader",
    "example_gradients": "reader",
    "own_answers": "reader",
    "judge": "judge",
    "reward": "reward",
}
"""Input → which model makes it."""

KINDS: dict[str, tuple[Kind, str]] = {
    "encoder": ("text-encoder", "all-minilm-l6-v2, or a sentence encoder of your own"),
    "reader": ("causal-lm", "smollm2-135m-instruct, or a language model of your own"),
    "judge": ("causal-lm", "a language model that follows instructions"),
    "reward": ("classifier", "a sequence classifier with one logit"),
}
"""Model → what it must be, and what to say when it is not."""


class Curate(Step):
    """Choose rows from a pool (or among those at hand); trusted rows stay in any case.

    Class attributes:
        by: Name of the selector in the recipe.
        selector: Its class; None keeps everything that passes the filter.
    """

    by: ClassVar[str]
    selector: ClassVar[type[Selector] | None]
    gives = frozenset({"rows"})
    params: Curating

    @property
    def method(self) -> str | None:
        """See `Step.method`."""
        return self.by if self.selector else None

    @property
    def title(self) -> str:
        """See `Step.title`."""
        keep = getattr(self.params, "keep", None)
        amount = f"{keep:,} " if isinstance(keep, int) else f"{keep} " if keep else ""
        return f"curate · {amount}by {self.by}"

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """See `Step.reads`: the rows, and what this choice of scores and selector asks for."""
        ports = {"rows", "examples"}
        if self._own_model:
            ports.add("model")
        return frozenset(ports)

    @property
    def needs(self) -> frozenset[str]:
        """Names of all inputs of the scores and the selector."""
        asked = [n for _, score in self.params.loaded for n in score.needs]
        asked += [n for n in (self.selector.needs if self.selector else ()) if n != "example_embeddings?"]
        return frozenset(n.removesuffix("?") for n in asked)

    @property
    def _models(self) -> frozenset[str]:
        return frozenset(MODELS[n] for n in self.needs if n in MODELS)

    @property
    def _own_model(self) -> bool:
        """Whether the model at this point of the recipe is asked for anything."""
        p = self.params
        asks = "reader" in self._models or ("judge" in self._models and p.judge is None) or self._in_tokens
        return asks and p.reader is None

    @property
    def _in_tokens(self) -> bool:
        return str(getattr(self.params, "keep", "")).endswith("tokens")

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        return {"pool": self.params.pool} if self.params.pool else {}

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        p = self.params
        named = {"encoder": p.encoder, "reader": p.reader, "judge": p.judge, "reward": p.reward}
        asked = self._models | ({"reader"} if self._in_tokens or "judge" in self._models else set())
        return {name: ref for name, ref in named.items() if name in asked and ref}

    def tiny(self) -> Curate:
        """See `Step.tiny`."""
        twins = {"encoder": "tiny-text-encoder", "reader": "tiny-llama", "judge": "tiny-llama"}
        smaller: dict[str, Any] = {name: twin for name, twin in twins.items() if name in self.bases()}
        smaller |= {"filter": "line > 0"} if self.params.filter else {}
        smaller |= {"keep": 8} if hasattr(self.params, "keep") else {}
        if self.by == "k-shot":
            smaller["near_duplicates"] = 1.0
        return type(self)(self.params.model_copy(update=smaller))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        p = self.params
        if self.selector is None and p.filter is None:
            raise PlanError("`by: filter` has nothing to filter by", hint="filter: 'length > 20', or another `by`")
        self._quality_text()
        self._refuse_idle_keys()
        if "reward" in self._models and p.reward is None:
            raise PlanError(
                "the score `reward` needs a reward model", hint="reward: a sequence classifier with one logit"
            )
        for name in sorted(self._models):
            kind, known = KINDS[name]
            facts = state.others.get(name, state.others.get("reader", state.model))
            if facts.kind != kind:
                ref = getattr(p, name) or "the model at this point"
                hint = f"{name}: {known}"
                raise PlanError(f"`{name}` needs a {kind}, and `{ref}` is of kind {facts.kind}", hint=hint)
        pool = state.pool_rows if p.pool else state.rows
        kept = min(pool, rows_of(getattr(p, "keep", "100%"), pool) or pool)
        after = replace(state, rows=(state.rows if p.pool else 0) + kept)
        flops, tokens = 0.0, min(256, state.tokens_per_row) * (pool + state.rows)
        if "encoder" in self._models:
            encoder = state.others["encoder"]
            flops += 2.0 * (encoder.parameters - encoder.hidden * encoder.vocabulary) * tokens
        if self._models - {"encoder", "reward"}:
            flops += state.others.get("reader", state.model).flops_per_token() * tokens * self._passes
        notes = (f"{pool:,} pool rows → {'at most ' if kept == pool else ''}{kept:,}",)
        return Forecast(after, flops=flops, seconds=5, peak_bytes=(400 << 20) + 1600 * pool, notes=notes)

    def _refuse_idle_keys(self) -> None:
        """Refuse keys of models that nothing asks for.

        Raises:
            PlanError: With what would ask for them.
        """
        asked = set(self.bases()) | self._models
        uses = {"encoder": "embeddings", "reader": "a model", "judge": "the score `judge`", "reward": "a reward model"}
        given = self.params.model_fields_set
        for name, what in uses.items():
            if name in given and name not in asked:
                raise PlanError(f"`{name}` is given, and no score or selector here asks for {what}")
        if "batch" in given and "encoder" not in asked:
            raise PlanError("`batch` is given, and no score or selector here asks for embeddings")

    @property
    def _passes(self) -> float:
        """Forward passes of language models over the pool, about; a backward pass counts as two."""
        from residency.curate.reading import Read, runs_of

        scores = [score for _, score in self.params.loaded]
        judged = sum("judge" in score.needs for score in scores)
        own = 4 if "own_answers" in self.needs else 0
        return runs_of([s for s in scores if isinstance(s, Read)]) + judged + own + 3 * ("gradients" in self.needs)

    def _quality_text(self) -> str | None:
        """The formula the selector ranks by.

        Raises:
            PlanError: When it needs one and none can be told.
        """
        p, needs = self.params, self.selector.needs if self.selector else ()
        if "quality" not in needs and "quality?" not in needs:
            if p.quality is not None:
                raise PlanError(f"`by: {self.by}` ranks rows by nothing, so `quality` would be idle", hint="by: top")
            return None
        if p.quality is not None:
            return p.quality
        loaded = p.loaded
        if len(loaded) == 1 and loaded[0][1].good != "middle":
            column, score = loaded[0]
            return column if score.good == "high" else f"-{column}"
        if "quality" not in needs:
            return None
        if not loaded:
            raise PlanError(f"`by: {self.by}` ranks rows by a score, and none is named", hint="scores: [ifd]")
        hint = "quality: 'percentile(" + loaded[0][0] + ")'; high is good, so put a minus before what is good when low"
        raise PlanError(f"`by: {self.by}` ranks rows by one formula, and `quality` does not say which", hint=hint)

    # ------------------------------------------------------------------ running

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import numpy as np

        from residency import rows
        from residency.curate.figures import figures

        p = self.params
        trusted, hand = rows.load(job.examples), rows.load(job.rows)
        own = {row.key() for row in trusted}
        # with a pool the rows at hand go along; without, they are chosen from, and the trusted among them stay
        along = hand if p.pool else [row for row in hand if row.key() in own]
        candidates = job.stream("pool") if p.pool else iter(hand)
        pool = Pool.gather(_fresh(candidates, [*trusted, *along], job, bool(p.pool)), job.scratch / "pool")
        if not len(pool):
            raise rows.no_rows(p.pool or "the rows at hand", job.quarantine)

        loaded = [(column, seeded(score, job.seed)) for column, score in p.loaded]
        alone = tuple(
            w for w, (_, score) in zip(p.wanted, loaded, strict=True) if score.alone and "columns" not in score.needs
        )
        extras = tuple(
            name
            for name, wanted in (
                (EMBEDDINGS, "embeddings" in self.needs),
                (GRADIENTS, "gradients" in self.needs),
                (TOKENS, self._in_tokens),
            )
            if wanted
        )
        models = {name: job.base(ref) for name, ref in self.bases().items()}
        models.setdefault("reader", job.model)
        models.setdefault("judge", models["reader"])
        remote = job.remote_code and p.reader is None
        work = Work(alone, extras, job.examples, models, p.batch, job.device, job.seed, remote)
        measurer = Measurer(work)
        measured = self._measure(job, work, measurer, pool)

        columns = {w.column: measured[w.column] for w in alone}
        supply = self._supply(pool, measured, measurer, columns)
        rest = [(column, score) for column, score in loaded if column not in columns]
        for column, score in sorted(rest, key=lambda each: "columns" in each[1].needs):
            columns[column] = column_of(column, score, supply)
        columns = {column: columns[column] for column, _ in loaded}
        known = {**columns, **pool.facts()}
        chosen = choose(self.selector, p, self._quality_text(), known, supply, measured.get(TOKENS), job.seed)

        picked = pool.take(chosen.indices.tolist())
        rows.write(job.out / "rows.jsonl", [*along, *picked])
        _write_scores(job.out / "scores.parquet", pool, columns, chosen)
        taken = set(chosen.indices.tolist())
        tags: dict[str, list[int]] = {}
        for i, tag in enumerate(pool.tags):
            tags.setdefault(tag or "untagged", [0, 0])[0 if i in taken else 1] += 1
        common = sorted(tags, key=lambda tag: -sum(tags[tag]))[:TAGS]
        missing = {column: int(np.isnan(values).sum()) for column, values in columns.items()}
        return Outcome(
            gives={"rows": "rows.jsonl"},
            summary={
                "trusted": len(trusted),
                "went_along": len(along),
                "pool": len(pool),
                "kept": len(chosen.indices),
                **{f"missing_{column}": n for column, n in missing.items() if n},
                "quarantined": len(job.quarantine),
            },
            figures=figures(self.by, pool, columns, chosen, supply, trusted, {c: s.good for c, s in loaded}, job.seed),
            extra={
                "tags": {t: {"kept": k, "dropped": d} for t, (k, d) in sorted((t, tags[t]) for t in common)},
                "scores": "scores.parquet",
            },
        )

    def _measure(self, job: Job, work: Work, measurer: Measurer, pool: Pool) -> dict[str, np.ndarray]:
        """What is measured chunk by chunk, joined; embeddings as a memory map."""
        from residency.curate.chunks import join, measure

        if not (work.scores or work.extras):
            return {}
        with job.progress.task("measuring the pool", len(pool)) as advance:
            files = measure(
                pool, work, measurer, job.scratch / "measured", self.params.scale, self.params.workers, advance
            )
        return join(files, job.scratch)

    def _supply(self, pool: Pool, measured: dict[str, Any], measurer: Measurer, columns: dict[str, Any]) -> Supply:
        """Inputs over the whole pool."""

        def everything(name: str) -> Any:
            return [value for rows in pool.chunks() for value in texts_of(rows)[name]()]

        def tokens() -> Any:
            from residency.curate.lexicaltokens import Tokens

            return Tokens.of(supply["texts"])

        makers: dict[str, Any] = {
            name: (lambda name=name: everything(name)) for name in ("texts", "questions", "answers")
        }
        makers |= {name: (lambda name=name: measurer.trusted(name)) for name in measurer.TRUSTED if self._can(name)}
        makers |= {
            "tokens": tokens,
            "labels": lambda: [
                tag if label is None else label for label, tag in zip(pool.labels, pool.tags, strict=True)
            ],
            "tags": lambda: [tags_of(tag) for tag in pool.tags],
            "columns": lambda: columns,
        }
        for name, key in (("embeddings", EMBEDDINGS), ("gradients", GRADIENTS)):
            if key in measured:
                makers[name] = lambda key=key: measured[key]
        supply = Supply(makers)
        return supply

    def _can(self, name: str) -> bool:
        """Whether an input of the trusted rows can be made with the models this step loads."""
        return name not in MODELS or MODELS[name] in self._models


def _fresh(pool: Iterator[Row], there: list[Row], job: Job, refuse: bool) -> Iterator[Row]:
    """Pool rows that are not there in any case, with ids that none of those has."""
    from residency.rows import Refused

    known, ids = {row.key(): row.id for row in there}, {row.id for row in there}
    for row in pool:
        if row.image is not None and not row.text:
            reason = "a picture without a text: rows are compared by their words"
            job.quarantine.append(Refused(row.source, row.line, reason, row.id))
        elif (key := row.key()) in known:
            if refuse:
                reason = f"the same row as {known[key]}, which is there in any case"
                job.quarantine.append(Refused(row.source, row.line, reason, row.prompt[:200]))
        else:
            yield replace(row, id=f"pool:{row.id}") if row.id in ids else row


def _write_scores(file: Path, pool: Pool, columns: dict[str, Any], chosen: Selection) -> None:
    """Every row of the pool with its scores, its place in the choice and the reason."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = np.zeros(len(pool), np.int64)
    place[chosen.indices] = np.arange(1, len(chosen.indices) + 1)
    table = {"id": pool.ids, "line": pool.lines, "tag": pool.tags, **columns}
    table |= {"chosen": pa.array(place, mask=place == 0), "reason": list(chosen.reasons)}
    pq.write_table(pa.table(table), file)


@cache
def curate_by(name: str) -> type[Curate]:
    """The step that chooses with a selector of the catalogue; its keys are those of `curate` and the selector's.

    Args:
        name: Of the selector; "filter" keeps whatever passes the filter.
    """
    selector: type[Selector] | None = catalog.method(name).load() if name != "filter" else None
    budgeted = selector is not None and issubclass(selector, Budgeted)
    general = CuratingSome if budgeted else Curating
    title = "CurateBy" + "".join(part.capitalize() for part in name.split("-"))
    params: Any = create_model(f"{title}Params", __base__=(general, selector) if selector else general)
    params.__doc__ = f"Keys of `curate: {{by: {name}}}`."
    own = {"by": name, "selector": selector, "Params": params, "__doc__": Curate.__doc__, "__module__": __name__}
    return type(title, (Curate,), own)


def __getattr__(attribute: str) -> type[Curate]:
    """`CurateByKShot` and its like, one per `by` of the catalogue, made when first asked for."""
    for row in catalog.step_rows("curate"):
        if row.object.endswith(f":{attribute}") and row.variant:
            return curate_by(row.variant)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")

"""Recipe step `replay`: go on to the next task without forgetting those before.

- tune: {method: lora}                                    # learns task.examples
- replay: {next: second.jsonl, per-task: 40}              # rows: the second task, and 40 of the first
- tune: {method: lora}
- replay: {seen: [first.jsonl, second.jsonl], next: third.jsonl}
- tune: {method: lora}
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field

from residency.curate.replay import Replay
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step


class ReplayParams(Replay):
    """Keys of `replay`."""

    next: str
    """Rows of the task to learn next: a file, a `datasets` folder, or `embedded:NAME`."""
    seen: tuple[str, ...] = ()
    """Rows of every task learnt before, one source each; by default the rows at hand are the one task."""
    instruction: Literal["question", "system"] = "question"
    """What a row is told to do: its question, or its system turn (rows of one instruction share it)."""
    tags: Literal["words", "tag"] = "words"
    """Tags of an instruction: its three most telling words, or what the source attached to the row."""
    encoder: str = "all-minilm-l6-v2"
    """Sentence encoder of the instructions."""
    batch: int = Field(64, ge=1)
    """Texts per forward pass of the encoder."""


class ReplayStep(Step):
    """The next task's rows, and rows of those before."""

    Params = ReplayParams
    params: ReplayParams
    gives = frozenset({"rows"})

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        """See `Step.reads`."""
        return frozenset() if self.params.seen else frozenset({"rows"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "inscl"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"replay · {self.params.per_task:,} per task learnt"

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        return {"next": self.params.next} | {f"seen.{i}": ref for i, ref in enumerate(self.params.seen)}

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        return {"encoder": self.params.encoder}

    def tiny(self) -> ReplayStep:
        """See `Step.tiny`."""
        return ReplayStep(self.params.model_copy(update={"per_task": 4, "encoder": "tiny-text-encoder"}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        p, encoder = self.params, state.others["encoder"]
        if encoder.kind != "text-encoder":
            raise PlanError(
                f"`replay` compares instructions with a text-encoder, and `{p.encoder}` is a {encoder.kind}",
                hint="encoder: all-minilm-l6-v2, or a sentence encoder of your own",
            )
        if p.seen and len(set(p.seen) | {p.next}) <= len(p.seen):
            raise PlanError("`seen` names a task twice, or the next one", hint="every task once, in the order learnt")
        new = state.source_rows["next"]
        old = sum(n for name, n in state.source_rows.items() if name != "next") if p.seen else state.rows
        replayed = min(old, p.per_task * max(1, len(p.seen)))
        work = 2.0 * (encoder.parameters - encoder.hidden * encoder.vocabulary) * 64
        notes = (f"{new:,} rows of the next task, and {replayed:,} of {old:,} rows learnt before",)
        return Forecast(replace(state, rows=new + replayed), flops=work * (new + old), seconds=5, notes=notes)

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import encoders, rows
        from residency.curate.measuring import tags_of
        from residency.curate.tagging import keywords

        p = self.params
        new = list(job.stream("next"))
        if not new:
            raise rows.no_rows(p.next, job.quarantine)
        names = [PurePath(ref.removeprefix("embedded:")).stem for ref in p.seen] or ["before"]
        names = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
        parts = [list(job.stream(f"seen.{i}")) for i in range(len(p.seen))] or [rows.load(job.rows)]
        known = {row.key() for row in new}
        old, twice = [], 0
        for name, part in zip(names, parts, strict=True):
            if not part:
                raise DataError(f"the task `{name}` has no usable rows", hint="leave it out of `seen`")
            for row in part:
                if (key := row.key()) in known:
                    twice += 1
                    continue
                known.add(key)
                old.append((name, row))
        if not old:
            raise DataError(
                "every row learnt before is a row of the next task", where=p.next, hint="name another `next`"
            )

        told = [self._told(row) for row in [*(row for _, row in old), *new]]
        tags = keywords(told) if p.tags == "words" else [tags_of(r.tag) for r in [*(r for _, r in old), *new]]
        different = list(dict.fromkeys(told))
        encoder = encoders.load(job.base(p.encoder), job.device)
        with job.progress.task("embedding the instructions", len(different)) as advance:
            vectors = encoder.encode(different, batch=p.batch)
            advance(len(different))
        place = {text: i for i, text in enumerate(different)}
        embeddings = vectors[[place[text] for text in told]]
        n = len(old)
        keys: dict[str, Any] = {name: getattr(p, name) for name in Replay.model_fields}
        keys["seed"] += job.seed
        try:
            chosen = Replay(**keys).select(
                [name for name, _ in old],
                told[:n],
                embeddings[:n],
                tags[:n],
                told[n:],
                embeddings[n:],
                tags[n:],
            )
        except ValueError as error:
            raise DataError(f"these tasks cannot be replayed: {error}", where=p.next) from None

        replayed = [(old[i][0], old[i][1]) for i in chosen.indices.tolist()]
        ids: set[str] = set()
        written = [_own_id(row, ids) for row in [*new, *(row for _, row in replayed)]]
        rows.write(job.out / "rows.jsonl", written)
        order = sorted(chosen.quotas, key=lambda task: -chosen.distances[task])
        return Outcome(
            gives={"rows": "rows.jsonl"},
            summary={
                "next": len(new),
                "seen": n,
                "replayed": len(replayed),
                "same_in_two_tasks": twice,
                "solver": f"{p.solver} transport" if p.quota == "transport" else "equal quotas",
                "quarantined": len(job.quarantine),
            },
            figures=[
                {
                    "kind": "bars",
                    "title": "What is replayed of each task",
                    "x": order,
                    "y": [chosen.quotas[task] for task in order],
                    "xlabel": "task, the least like the next one first" if p.quota == "transport" else "task",
                    "ylabel": "rows",
                    "note": "Distance to the next task: "
                    + ", ".join(f"{task} {chosen.distances[task]:.3f}" for task in order)
                    if p.quota == "transport"
                    else "Equal quotas.",
                },
                {
                    "kind": "table",
                    "title": "The replayed rows",
                    "columns": ["task", "instruction", "tags", "InsInfo"],
                    "rows": [
                        [old[i][0], told[i][:160], ", ".join(tags[i]), round(float(chosen.score[i]), 2)]
                        for i in chosen.indices.tolist()[:500]
                    ],
                    "note": f"{min(500, len(replayed)):,} of {len(replayed):,}; InsInfo is high where tags are rare.",
                },
            ],
            extra={"quotas": chosen.quotas, "distances": {t: round(d, 6) for t, d in chosen.distances.items()}},
        )

    def _told(self, row: Any) -> str:
        """What a row is told to do."""
        if self.params.instruction == "system":
            system = next((content for role, content in row.messages if role == "system"), "")
            if system:
                return str(system)
        return str(row.prompt)


def _own_id(row: Any, ids: set[str]) -> Any:
    """The row with an id that no row before it has."""
    name, n = row.id, 1
    while name in ids:
        n += 1
        name = f"{row.id} ({n})"
    ids.add(name)
    return row if name == row.id else replace(row, id=name)

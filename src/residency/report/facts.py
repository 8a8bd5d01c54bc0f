"""What the page, its Markdown twin and the comparison all say: derived once, from run.json alone.

`Facts(record)` never changes the record and never raises for a missing key; a run that was killed
in its first second still has facts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from residency.report import formats as fmt
from residency.report.formats import Scale, dig, mapping, mappings, number

VERDICTS = {
    "gain": "clear gain",
    "loss": "clear loss",
    "unclear": "no clear change",
    "bare": "no interval",
}
SYMBOLS = {"gain": "▲", "loss": "▼", "unclear": "○", "bare": "○"}

# (key, heading, what it says to someone who hovers over it) of the table of stages.
COLUMNS = (
    ("score", "Score", "score on the test items, 95 % interval below"),
    ("change", "Against base", "paired difference with its 95 % interval"),
    ("verdict", "Excludes zero?", "whether that interval excludes zero"),
    ("guard", "Guard", "score on the ability that must not be lost"),
    ("parameters", "Parameters", "parameters of the model after this step"),
    ("disk", "On disk", "bytes of the saved model"),
    ("kv", "KV per token", "bytes of key/value cache per token and sequence"),
    ("speed", "Tokens/s", "measured on this machine"),
    ("first_token", "First token", "time to the first token, measured on this machine"),
    ("memory", "Peak memory", "peak memory during the exam, measured on this machine"),
    ("step_time", "Wall time", "wall time of the step, and of its exam below"),
    ("exam_time", "Exam time", "wall time of the exam"),
)


@dataclass(frozen=True)
class Change:
    """A paired difference between two exams."""

    of: str
    against: str
    difference: float | None
    low: float | None
    high: float | None
    fixed: list[str]
    broken: list[str]
    scale: Scale

    @property
    def verdict(self) -> str:
        """``gain`` or ``loss`` where the interval excludes zero, else ``unclear`` or ``bare``."""
        if self.low is None or self.high is None:
            return "bare"
        if self.low <= 0 <= self.high:
            return "unclear"
        return "gain" if (self.low > 0) == self.scale.higher else "loss"

    @property
    def text(self) -> str:
        """The signed difference."""
        return self.scale.signed(self.difference)

    @property
    def span(self) -> str:
        """The interval of the difference."""
        return self.scale.span(self.low, self.high, signed=True)

    @property
    def symbol(self) -> str:
        """A shape for the verdict, so that colour never speaks alone."""
        return SYMBOLS[self.verdict]

    @property
    def words(self) -> str:
        """The verdict in words."""
        return VERDICTS[self.verdict]


@dataclass(frozen=True)
class Stage:
    """One row of the table of stages: the base, or a step and its exam if it had one."""

    id: str
    label: str
    note: str
    role: str  # "base", "step" or "specialist"
    exam: dict[str, Any]
    step: dict[str, Any]
    change: Change | None
    guard_change: Change | None
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """The task score."""
        return number(dig(self.exam, "task", "value"))


class Facts:
    """Everything derived from one record.

    Attributes:
        name: Of the run.
        status: ``running``, ``done``, ``failed``, ``interrupted``, or whatever the record holds.
        exams: The exams, base first.
        steps: The steps so far.
        stages: The table of stages, in order.
        base: The first examined stage, if any.
        final: The last examined stage, if it is not the base.
        scale: How task scores are written; ``guard_scale`` for the guard.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.name = str(dig(record, "name", default="unnamed run"))
        self.status = str(dig(record, "status", default="unknown"))
        self.exams = mappings(record, "exams")
        self.steps = mappings(record, "steps")
        self.scale = self._scale("task")
        self.guard_scale = self._scale("guard")
        self.stages = self._stages()
        examined = [stage for stage in self.stages if stage.exam]
        self.base = examined[0] if examined else None
        self.final = examined[-1] if len(examined) > 1 else None

    def _scale(self, exam: str) -> Scale:
        results = [mapping(entry, exam) for entry in self.exams]
        items = max((int(number(r.get("n")) or 0) for r in results), default=0)
        return Scale.of(mapping(self.record, exam), [r.get("value") for r in results], items)

    def _stages(self) -> list[Stage]:
        by_id = {str(exam.get("id")): exam for exam in self.exams}
        step_ids = {str(step.get("id")) for step in self.steps}
        rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (exam, {}) for exam in self.exams if str(exam.get("id")) not in step_ids
        ]
        rows += [(by_id.get(str(step.get("id")), {}), step) for step in self.steps]
        last = max((i for i, (exam, _) in enumerate(rows) if exam), default=-1)
        return [self._stage(exam, step, final=i == last) for i, (exam, step) in enumerate(rows)]

    def _stage(self, exam: dict[str, Any], step: dict[str, Any], *, final: bool) -> Stage:
        identity = str(dig(step, "id", default=dig(exam, "id", default="?")))
        is_base = bool(self.exams) and exam is self.exams[0]
        specialist = final and not is_base and self.status == "done"
        change = None if is_base else self.change(identity, self._base_id, exam=exam)
        guard = None if is_base else self.change(identity, self._base_id, exam=exam, guard=True)
        name = dig(step, "title", default=dig(step, "step", default=identity))
        label = dig(exam, "label", default=name)
        note = dig(self.record, "base", "name") if is_base else dig(step, "title")
        stage = Stage(
            id=identity,
            label=str(label),
            note=str(note or ""),
            role="base" if is_base else "specialist" if specialist else "step",
            exam=exam,
            step=step,
            change=change,
            guard_change=guard,
        )
        stage.cells.update(self._cells(stage))
        return stage

    def _cells(self, stage: Stage) -> dict[str, str]:
        task, guard = mapping(stage.exam, "task"), mapping(stage.exam, "guard")
        cost, timed = mapping(stage.exam, "cost"), mapping(stage.exam, "measured")
        change, guard_change = stage.change, stage.guard_change
        return {
            "score": self.scale.text(task.get("value")),
            "score_span": self.scale.span(task.get("low"), task.get("high")),
            "change": change.text if change else fmt.NONE,
            "change_span": change.span if change else fmt.NONE,
            "verdict": f"{change.symbol} {change.words}" if change else fmt.NONE,
            "guard": self.guard_scale.text(guard.get("value")),
            "guard_change": guard_change.text if guard_change else fmt.NONE,
            "guard_span": self.guard_scale.span(guard.get("low"), guard.get("high")),
            "parameters": fmt.count(cost.get("parameters")),
            "disk": fmt.size(cost.get("bytes_on_disk")),
            "kv": fmt.size(cost.get("kv_bytes_per_token")),
            "speed": fmt.measure(timed.get("tokens_per_second")),
            "first_token": fmt.measure(timed.get("time_to_first_token_ms"), "ms"),
            "memory": fmt.size(timed.get("peak_memory_bytes")),
            "step_time": fmt.duration(dig(stage.step, "measured", "seconds")),
            "exam_time": fmt.duration(timed.get("seconds")),
        }

    @property
    def _base_id(self) -> str:
        return str(self.exams[0].get("id")) if self.exams else ""

    def reused(self, step: dict[str, Any]) -> bool:
        """Whether a step's outputs were there before this run, by its status or by the run's list."""
        computed = dig(self.record, "time", "computed")
        left_out = isinstance(computed, list) and step.get("id") not in computed
        return bool(step) and (left_out or step.get("status") == "cached")

    def exam(self, identity: str) -> dict[str, Any]:
        """The exam with this id, or an empty one."""
        return next((e for e in self.exams if str(e.get("id")) == identity), {})

    def label(self, identity: str) -> str:
        """How a stage is called, from its id."""
        return next((s.label for s in self.stages if s.id == identity), identity)

    def predecessor(self, identity: str) -> str | None:
        """The id of the exam before this one."""
        ids = [str(exam.get("id")) for exam in self.exams]
        return ids[ids.index(identity) - 1] if identity in ids[1:] else None

    def change(
        self, of: str, against: str, *, exam: dict[str, Any] | None = None, guard: bool = False
    ) -> Change | None:
        """The paired comparison of two exams, or their bare difference where none was recorded.

        Args:
            of: Id of the later exam.
            against: Id of the earlier one.
            exam: The later exam, if the caller has it; an empty one means there is no difference.
            guard: Compare guard scores instead of task scores.
        """
        kind, scale = ("guard", self.guard_scale) if guard else ("task", self.scale)
        for entry in mappings(self.record, "comparisons"):
            if str(entry.get("of")) == of and str(entry.get("against")) == against:
                found = mapping(entry, "guard") if guard else entry
                if number(found.get("difference")) is not None:
                    return self._change(of, against, found, scale)
        after = number(dig(self.exam(of) if exam is None else exam, kind, "value"))
        before = number(dig(self.exam(against), kind, "value"))
        if after is None or before is None or of == against:
            return None
        return self._change(of, against, {"difference": after - before}, scale)

    def _change(self, of: str, against: str, entry: dict[str, Any], scale: Scale) -> Change:
        return Change(
            of=of,
            against=against,
            difference=number(entry.get("difference")),
            low=number(entry.get("low")),
            high=number(entry.get("high")),
            fixed=[str(i) for i in fmt.sequence(entry, "fixed")],
            broken=[str(i) for i in fmt.sequence(entry, "broken")],
            scale=scale,
        )

    def stage_table(self) -> tuple[list[str], list[list[str]]]:
        """The table of stages as text: headings, and one row of cells per stage."""
        rows = []
        for stage in self.stages:
            c = stage.cells
            row = [stage.label + (" (specialist)" if stage.role == "specialist" else "")]
            for key, _, _ in COLUMNS:
                extra = c.get("guard_change" if key == "guard" else f"{key}_span", fmt.NONE)
                row.append(c[key] if extra == fmt.NONE else f"{c[key]} ({extra})")
            rows.append(row)
        return ["Stage", *(heading for _, heading, _ in COLUMNS)], rows

"""Recipe step `distill`: make a smaller student and train it to answer like the current model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from residency import catalog
from residency.errors import PlanError, RecipeError
from residency.step import Forecast, Job, ModelFacts, Outcome, Params, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

LOSSES = tuple(m.name for m in catalog.METHODS if m.stage == "compress" and m.step.startswith("distill: {loss"))


class StudentSection(Params):
    """Where the student comes from: the current model with less of something, or another checkpoint."""

    layers: int | None = Field(None, ge=2)
    """Keep so many layers of the current model."""
    choose: Literal["greedy", "loss", "influence", "even"] = "greedy"
    """How to choose them: remove one at a time the layer that the answers' loss misses least, measuring again each
    time; measure that loss once; by block influence; or evenly spaced.
    """
    calibrate: int = Field(24, ge=1)
    """Rows on which the importance of layers, channels and heads is measured."""
    hidden: int | None = Field(None, ge=1)
    """Keep so many channels of the residual stream."""
    heads: int | None = Field(None, ge=1)
    """Keep so many query heads per layer."""
    kv_heads: int | None = Field(None, ge=1)
    """Keep so many key/value heads per layer (`merge-heads` merges them instead)."""
    ffn: int | None = Field(None, ge=1)
    """Keep so many inner channels of every feed-forward layer."""
    base: str | None = None
    """Instead: an embedded base, a local folder or a hub id."""

    @property
    def width(self) -> dict[str, int | None]:
        """The keys that make the student narrower."""
        return {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}

    @property
    def narrower(self) -> bool:
        """Whether any of them is given."""
        return any(self.width.values())

    @model_validator(mode="after")
    def _one_of_them(self) -> StudentSection:
        if (self.layers is not None or self.narrower) == (self.base is not None):
            raise ValueError("give either `base`, or what to keep: `layers`, `hidden`, `heads`, `kv-heads`, `ffn`")
        if self.base is not None and self.model_fields_set & {"choose", "calibrate"}:
            raise ValueError("`choose` and `calibrate` belong to a student made from the current model, not to `base`")
        if self.layers is None and "choose" in self.model_fields_set:
            raise ValueError("`choose` says how layers are chosen, and `layers` is not given")
        return self


class DistillParams(TrainParams):
    """Keys of `distill`."""

    student: StudentSection
    """Where the student comes from."""
    loss: str = "bild"
    """What the student imitates; `residency methods` lists the losses, `residency explain NAME` tells them apart."""
    loss_settings: dict[str, Any] = Field(default_factory=dict)
    """The loss's own keys, such as {temperature: 2} or {k: 16}; its paper's where none are given."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the loss of the reference answers (or labels), added to the distillation loss."""
    rank: int | None = Field(None, ge=1, le=1024)
    """Train the student through LoRA of this rank and merge it; by default all its weights are trained."""
    teacher_cache: Literal["none", "hidden", "top-k"] = "none"
    """Run the teacher once and keep its hidden states, exact for every loss, or its most likely words; worth it from
    two epochs on.
    """
    teacher_words: int = Field(64, ge=1)
    """Words per token of a top-k cache."""

    @field_validator("loss")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in LOSSES:
            guess = catalog.nearest(name, LOSSES)
            raise ValueError(f"no loss is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""))
        return name

    @model_validator(mode="after")
    def _words_are_read(self) -> DistillParams:
        if self.teacher_cache != "top-k" and "teacher_words" in self.model_fields_set:
            raise ValueError("`teacher-words` belongs to teacher-cache: top-k")
        return self


class Distill(Step):
    """Make a smaller student and train it to answer like the current model."""

    version = 2
    Params = DistillParams
    params: DistillParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return self.params.loss

    @property
    def title(self) -> str:
        """See `Step.title`."""
        student = self.params.student
        sizes = [f"{v} {k.replace('_', '-')}" for k, v in ({"layers": student.layers} | student.width).items() if v]
        name = {"bild": "BiLD", "sinkd": "SinKD", "adaptive-kl": "AdaptiveKL"}.get(self.params.loss)
        return f"distill · {', '.join(sizes) or student.base}, {name or self.params.loss.upper()}"

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        return {"student": self.params.student.base} if self.params.student.base else {}

    def tiny(self) -> Distill:
        """See `Step.tiny`."""
        update: dict[str, Any] = {"max_steps": 4, "batch": 4, "max_tokens": 1024}
        student = self.params.student
        if student.base is None:
            sizes = {"hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 32}  # half of the tiny base's
            keep: dict[str, Any] = {name: size for name, size in sizes.items() if student.width[name]}
            depth = {"layers": 2, "choose": student.choose} if student.layers else {}
            update["student"] = StudentSection.model_validate({"calibrate": 2} | keep | depth)
        if self.params.teacher_cache == "top-k":
            update["teacher_words"] = min(self.params.teacher_words, 200)
        return Distill(self.params.model_copy(update=update))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm", "classifier"), "distill")
        p, teacher = self.params, state.model
        if teacher.kind == "classifier":
            self._check_classifier(teacher)
        elif p.teacher_cache == "top-k":
            from residency.compress.distillation import check_top_k_loss

            check_top_k_loss(self._loss(teacher), p.teacher_words, teacher.vocabulary)
        elif p.loss_settings or p.loss == "sinkd":  # a loss as its paper has it needs no look, and torch no import
            self._loss(teacher)
        student, note = self._student_facts(state)
        rows = p.rows_seen(state)
        tokens = rows * state.tokens_per_row
        asked = tokens if p.teacher_cache == "none" else state.rows * state.tokens_per_row
        backward = 3 if p.rank is None else 2
        flops = asked * teacher.flops_per_token() + tokens * backward * student.flops_per_token()
        if p.student.layers:
            passes = calibration_passes(teacher.layers, p.student.layers, p.student.choose)
            flops += passes * p.student.calibrate * state.tokens_per_row * teacher.flops_per_token()
        # teacher, student, and for a full training its gradient and AdamW's two moments, all float32
        copies = 4 if p.rank is None else 1.2
        peak = int(4 * (teacher.parameters + copies * student.parameters)) + activation_bytes(state, p.batch)
        notes = (f"{teacher.parameters:,} → {student.parameters:,} parameters", *note)
        return Forecast(replace(state, model=student), flops=flops, peak_bytes=peak, notes=notes)

    def _loss(self, teacher: ModelFacts) -> Any:
        """The loss; SinKD transports within the whole batch of a classifier, and never stands alone."""
        p = self.params
        whole = {"group": None} if p.loss == "sinkd" and teacher.kind == "classifier" else {}
        loss = make_loss(p.loss, whole | p.loss_settings)
        if p.loss == "sinkd" and loss.params.plan == "batch" and not (p.label_weight or loss.params.paired):
            raise PlanError(
                "`sinkd` compares the answers of a batch as a set: giving every row another row's answer costs nothing",
                hint="add label-weight: 1 (its paper never uses it alone), or loss-settings: {paired: 1}",
            )
        return loss

    def _check_classifier(self, teacher: ModelFacts) -> None:
        p = self.params
        if not teacher.architecture.endswith("ForSequenceClassification"):
            raise PlanError(
                "a probe on a frozen encoder cannot be distilled",
                hint="tune: {method: classify} makes a classifier that can",
            )
        if "loss" not in p.model_fields_set:
            raise PlanError(
                "which loss? bild, the default, compares more words than most classifiers have classes",
                hint="loss: kl",
            )
        check_classes(p.loss, self._loss(teacher), teacher.classes)
        for key in ("teacher_cache", "rank"):
            if key in p.model_fields_set and getattr(p, key) not in (None, "none"):
                raise PlanError(f"`{key.replace('_', '-')}` is for language models; this model is a classifier")
        if p.student.narrower:
            raise PlanError("a classifier's student has fewer layers, not less width", hint="student: {layers: 3}")

    def _student_facts(self, state: State) -> tuple[ModelFacts, tuple[str, ...]]:
        """What the student will be, before anything is computed."""
        p, teacher = self.params.student, state.model
        if p.base:
            return self._other(teacher, state.others["student"])
        student, notes = teacher, []
        if p.layers is not None:
            if p.layers > teacher.layers or (p.layers == teacher.layers and not p.narrower):
                raise PlanError(
                    f"the student would keep {p.layers} layers, but the model has {teacher.layers}",
                    hint=f"student: {{layers: {max(2, teacher.layers * 2 // 3)}}}",
                )
            student = teacher.with_layers(p.layers)
            notes.append(f"{teacher.layers} → {p.layers} layers")
        if p.narrower:
            from residency.compress.width import Width, check_architecture

            check_architecture(teacher.architecture)
            sizes: dict[str, Any] = vars(
                Width(**p.width).of(teacher.hidden, teacher.heads, teacher.kv_heads, teacher.ffn)
            )
            if not p.layers and all(sizes[name] == getattr(teacher, name) for name in sizes):
                raise PlanError("the student would be as wide as the model", hint="make a size smaller")
            student = student.with_width(**sizes)
        return student, tuple(notes)

    def _other(self, teacher: ModelFacts, student: ModelFacts) -> tuple[ModelFacts, tuple[str, ...]]:
        """A student that is another checkpoint; the vocabularies are compared before any weight is loaded."""
        name = self.params.student.base
        if teacher.kind == "classifier":
            same = bool(student.tokenizer) and student.tokenizer == teacher.tokenizer
            if student.kind != "text-encoder" or not same:
                raise PlanError(
                    f"`{name}` is a {student.kind}; a classifier's student must be a text-encoder with its tokenizer"
                )
            return replace(student, kind="classifier", architecture=teacher.architecture), ()
        if student.kind != "causal-lm":
            raise PlanError(f"the student `{name}` is a {student.kind}, not a causal-lm")
        relation = vocabularies(teacher, student)
        if relation.shared or self.params.loss == "uld":
            if not relation.shared and self.params.teacher_cache != "none":
                raise PlanError("a teacher's cache serves models of one vocabulary", hint="teacher-cache: none")
            if relation.shared and relation.smaller == "teacher":  # whose tokenizer is saved with the student
                student = replace(student, tokenizer=teacher.tokenizer, tokenizer_folder=teacher.tokenizer_folder)
            return student, (str(relation),)
        raise PlanError(
            f"teacher and student have different vocabularies ({teacher.vocabulary:,} and {student.vocabulary:,} "
            f"tokens; tokenizers {teacher.tokenizer or 'none'} and {student.tokenizer or 'none'})",
            hint=f"`{self.params.loss}` compares word by word; take loss: uld, or a student of the same family",
        )

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from pathlib import Path

        from residency import bases
        from residency.compress import distil

        teacher, kind = bases.facts(job.model), distil.LanguageModels
        loss = self._loss(teacher)
        if teacher.kind == "classifier":
            return distil.Classifiers(self.params, loss, job).run()
        if self.params.student.base:
            student = bases.facts(Path(job.base(self.params.student.base)))
            kind = distil.LanguageModels if vocabularies(teacher, student).shared else distil.Strangers
        return kind(self.params, loss, job).run()


def make_loss(name: str, settings: dict[str, Any]) -> Any:
    """A distillation loss by its catalogue name, with some of its own keys.

    Raises:
        RecipeError: When a key is unknown or its value impossible.
    """
    loss = catalog.method(name).load()
    if not settings:
        return loss()
    known = [field.replace("_", "-") for field in getattr(loss.Params, "model_fields", {})]
    for key in settings:
        if key not in known:
            guess = catalog.nearest(key, known)
            raise RecipeError(
                f"the loss `{name}` has no key `{key}`" + (f"; did you mean `{guess}`?" if guess else ""),
                hint=f"its keys: {', '.join(known)}",
            )
    try:
        return loss(loss.Params(**settings))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"loss-settings of `{name}`: {where + ': ' if where else ''}{first['msg']}") from None


def check_classes(name: str, loss: Any, classes: int) -> None:
    """Refuse losses that say nothing about so few classes (0: not known yet).

    Raises:
        PlanError: With what would do.
    """
    words = getattr(loss.params, "k", 0)
    if 0 < classes < words:
        raise PlanError(f"`{name}` compares {words} words, and there are {classes} classes", hint="loss: kl")
    if classes == 2 and name == "normkd":
        raise PlanError("`normkd` standardises the logits, which leaves nothing of two classes", hint="loss: kl")


def vocabularies(teacher: ModelFacts, student: ModelFacts) -> Any:
    """How two models' vocabularies relate (see `compress.vocabulary`)."""
    from pathlib import Path

    from residency import bases
    from residency.compress.vocabulary import compare

    mine, theirs = (bases.vocabulary(Path(facts.tokenizer_folder)) for facts in (teacher, student))
    return compare(mine, theirs, teacher.vocabulary, student.vocabulary)


def calibration_passes(total: int, keep: int, choose: str) -> float:
    """Forward passes of the calibration rows that choosing the layers takes (see `residency.compress.layers`)."""
    if choose == "greedy":
        return sum(1 + (total - r) ** 2 / (2 * total) for r in range(total - keep))
    return {"even": 0.0, "influence": 1.0, "loss": 1 + total / 2}[choose]

"""Recipe step of the compress stage: `distill`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from residency.errors import PlanError
from residency.step import Forecast, Job, ModelFacts, Outcome, Params, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes


class StudentSection(Params):
    """Where the student comes from: layers of the teacher, or another checkpoint."""

    layers: int | None = Field(None, ge=2)
    """Keep so many decoder layers of the current model."""
    choose: Literal["greedy", "loss", "influence", "even"] = "greedy"
    """How to choose them: remove one at a time the layer that the answers' loss misses least, measuring again each
    time; measure that loss once; by block influence; or evenly spaced.
    """
    calibrate: int = Field(24, ge=1)
    """Rows on which the layers' importance is measured."""
    base: str | None = None
    """Instead: an embedded base, a local folder or a hub id with the teacher's vocabulary."""

    @model_validator(mode="after")
    def _one_of_them(self) -> StudentSection:
        if (self.layers is None) == (self.base is None):
            raise ValueError("give either `layers` or `base`")
        return self


class DistillParams(TrainParams):
    """Keys of `distill`."""

    student: StudentSection
    """Where the student comes from."""
    loss: Literal["bild", "kl"] = "bild"
    """What the student imitates: differences among the top logits (BiLD), or the whole distribution (KL)."""
    k: int = Field(8, ge=3, le=1024)
    """BiLD's selected words per token and direction (paper: 8). Read only by loss: bild."""
    temperature: float | None = Field(None, gt=0)
    """Divisor of the logits; by default the paper's 3 for BiLD and 1 for KL."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on the reference answers, added to the distillation loss."""
    rank: int | None = Field(None, ge=1, le=1024)
    """Train the student through LoRA of this rank and merge it; by default all its weights are trained."""

    @model_validator(mode="after")
    def _k_is_read(self) -> DistillParams:
        if self.loss != "bild" and "k" in self.model_fields_set:
            raise ValueError(f"`k` belongs to loss: bild, and the loss is {self.loss}")
        return self


class Distill(Step):
    """Make a smaller student and train it to answer like the current model."""

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
        size = f"{student.layers} layers" if student.layers else str(student.base)
        return f"distill · {size}, {'BiLD' if self.params.loss == 'bild' else 'KL'}"

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        return {"student": self.params.student.base} if self.params.student.base else {}

    def tiny(self) -> Distill:
        """See `Step.tiny`."""
        student = self.params.student.model_copy(update={"layers": 2, "base": None, "calibrate": 2})
        update: dict[str, Any] = {"student": student, "max_steps": 4, "batch": 4, "max_tokens": 1024}
        return Distill(self.params.model_copy(update=update))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        from dataclasses import replace

        require_kind(state, ("causal-lm",), "distill")
        p, teacher = self.params, state.model
        if p.student.base:
            student = self._other(teacher, state.others["student"])
        else:
            assert p.student.layers is not None
            if p.student.layers >= teacher.layers:
                raise PlanError(
                    f"the student would keep {p.student.layers} layers, but the model has {teacher.layers}",
                    hint=f"student: {{layers: {max(2, teacher.layers * 2 // 3)}}}",
                )
            student = teacher.with_layers(p.student.layers)
        rows = state.rows * p.epochs if p.max_steps is None else p.max_steps * p.batch * p.accumulate
        tokens = rows * state.tokens_per_row
        backward = 3 if p.rank is None else 2
        flops = tokens * (teacher.flops_per_token() + backward * student.flops_per_token())
        if p.student.layers:
            passes = _calibration_passes(teacher.layers, p.student.layers, p.student.choose)
            flops += passes * p.student.calibrate * state.tokens_per_row * teacher.flops_per_token()
        # teacher, student, and for a full training its gradient and AdamW's two moments, all float32
        copies = 4 if p.rank is None else 1.2
        peak = int(4 * (teacher.parameters + copies * student.parameters)) + activation_bytes(state, p.batch)
        note = f"{teacher.layers} → {student.layers} layers, {teacher.parameters:,} → {student.parameters:,} parameters"
        return Forecast(replace(state, model=student), flops=flops, peak_bytes=peak, notes=(note,))

    def _other(self, teacher: ModelFacts, student: ModelFacts) -> ModelFacts:
        """A student that is another checkpoint; its vocabulary is compared before any weight is loaded."""
        if student.kind != "causal-lm":
            raise PlanError(f"the student `{self.params.student.base}` is a {student.kind}, not a causal-lm")
        if not student.tokenizer or student.tokenizer != teacher.tokenizer or student.vocabulary != teacher.vocabulary:
            raise PlanError(
                f"teacher and student have different vocabularies ({teacher.vocabulary:,} and "
                f"{student.vocabulary:,} tokens; tokenizers {teacher.tokenizer} and {student.tokenizer})",
                hint="token-level distillation needs one tokenizer: a student of the same family, or {layers: N}",
            )
        return student

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, tokens, train
        from residency.compress.distillation import Distillation
        from residency.lora import Lora, merge

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        items, refused = tokens.encode_all(rows.load(job.rows), tokenizer, p.max_tokens)
        job.quarantine += refused
        teacher = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code)
        student, facts, figures = self._student(teacher, items, tokenizer, job)
        layers_before, parameters_before = _layers(teacher), _count(teacher)
        student.requires_grad_(True)
        trained: Any = Lora(rank=p.rank, targets=("all-linear",)).attach(student) if p.rank else student
        log = train.fit(
            trained,
            Distillation(self._loss(), teacher, p.label_weight),
            items,
            p,
            pad=tokenizer.pad_token_id,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="distilling",
        )
        if p.rank:
            probe = tokens.collate(items[:2], tokenizer.pad_token_id)["input_ids"].to(job.device)
            student, drift = merge(trained, probe)
            facts["merge_drift"] = float(f"{drift:.2e}")
        parameters = _count(student)
        bases.save_causal_lm(student, tokenizer, job.out / "model", bases.saved_dtype(job.model))
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "layers": f"{layers_before} → {_layers(student)}",
                "parameters": f"{parameters_before:,} → {parameters:,}",
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            }
            | facts,
            figures=[*figures, train.loss_figure(log, f"{p.loss.upper()} per answer token")],
        )

    def _loss(self) -> Any:
        from residency.compress.bild import BiLD, BiLDParams
        from residency.compress.kl import KL, KLParams

        given: dict[str, Any] = {} if self.params.temperature is None else {"temperature": self.params.temperature}
        return BiLD(BiLDParams(k=self.params.k, **given)) if self.params.loss == "bild" else KL(KLParams(**given))

    def _student(self, teacher: Any, items: Any, tokenizer: Any, job: Job) -> tuple[Any, dict[str, Any], list[Any]]:
        """The untrained student, what to say of it, and the figure of its layers."""
        import torch

        from residency import bases, tokens
        from residency.compat import fast_bf16
        from residency.compress import layers

        p = self.params.student
        if p.base:
            return bases.load_causal_lm(job.base(p.base), job.device), {"student": p.base}, []
        assert p.layers is not None
        some = sorted(items[: p.calibrate], key=len)
        batches = [tokens.collate(some[i : i + 8], tokenizer.pad_token_id) for i in range(0, len(some), 8)]
        total = _layers(teacher)
        what = "increase of the answer loss when the layer is skipped, nats per token"
        half = self.params.precision != "float32" and fast_bf16(job.device)
        with torch.autocast(job.device, torch.bfloat16, enabled=half):
            if p.choose == "even":
                keep = sorted({round(i * (total - 1) / (p.layers - 1)) for i in range(p.layers)})
                importance, what = [0.0] * total, "nothing measured: evenly spaced"
            elif p.choose == "influence":
                measured = layers.block_influence(teacher, batches, progress=job.progress)
                keep = layers.choose_layers(measured, p.layers)
                importance, what = measured.tolist(), "block influence, 1 − cosine of input and output"
            elif p.choose == "loss":
                measured = layers.loss_increase(teacher, batches, progress=job.progress)
                keep, importance = layers.choose_layers(measured, p.layers), measured.tolist()
            else:
                keep, rounds = layers.prune_greedily(teacher, batches, p.layers, progress=job.progress)
                importance = rounds[0].tolist()
        figure = {
            "kind": "bars",
            "title": "Layers kept and dropped",
            "x": [str(i) for i in range(total)],
            "y": [round(v, 5) for v in importance],
            "group": ["kept" if i in keep else "dropped" for i in range(total)],
            "xlabel": "decoder layer",
            "ylabel": what,
        }
        dropped = [i for i in range(total) if i not in keep]
        return layers.keep_layers(teacher, keep), {"dropped_layers": ", ".join(map(str, dropped))}, [figure]


def _calibration_passes(total: int, keep: int, choose: str) -> float:
    """Forward passes of the calibration rows that choosing the layers takes (see `residency.compress.layers`)."""
    if choose == "greedy":
        return sum(1 + (total - r) ** 2 / (2 * total) for r in range(total - keep))
    return {"even": 0.0, "influence": 1.0, "loss": 1 + total / 2}[choose]


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())

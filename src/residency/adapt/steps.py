"""Recipe steps of the adapt stage: `tune: {method: lora}`, `tune: {method: classify}` and `tune: {method: probe}`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field

from residency.adapt.probe import Probe
from residency.errors import PlanError
from residency.lora import Lora
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes


class TuneLoraParams(TrainParams, Lora):
    """Keys of `tune: {method: lora}`."""


class TuneLora(Step):
    """Train a LoRA adapter with cross-entropy on the answers, merge it, save a standard checkpoint."""

    Params = TuneLoraParams
    params: TuneLoraParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "lora"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"tune · LoRA r={self.params.rank}"

    def tiny(self) -> TuneLora:
        """See `Step.tiny`."""
        return TuneLora(self.params.model_copy(update={"max_steps": 4, "rank": 2, "batch": 4, "max_tokens": 1024}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "tune")
        p, model = self.params, state.model
        rows = p.rows_seen(state)
        # forward, and backward through the activations only
        flops = 2 * model.flops_per_token() * rows * state.tokens_per_row
        peak = 4 * model.parameters + activation_bytes(state, p.batch)
        return Forecast(state, flops=flops, peak_bytes=peak, notes=(f"{rows:,.0f} rows",))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, tokens, train
        from residency.crossentropy import CrossEntropy
        from residency.lora import merge

        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        items, refused = tokens.encode_all(rows.load(job.rows), tokenizer, self.params.max_tokens)
        job.quarantine += refused
        model = self.params.attach(bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code))
        log = train.fit(
            model,
            CrossEntropy(),
            items,
            self.params,
            pad=tokenizer.pad_token_id,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="tuning",
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        probe = tokens.collate(items[:2], tokenizer.pad_token_id)["input_ids"].to(job.device)
        plain, drift = merge(model, probe)
        bases.save(plain, tokenizer, job.out / "model", bases.saved_dtype(job.model))
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "trained_parameters": trained,
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "merge_drift": float(f"{drift:.2e}"),
                "precision": log.precision,
            },
            figures=[train.loss_figure(log, "nats per answer token")],
        )


class ClassifyParams(TrainParams):
    """Keys of `tune: {method: classify}`."""

    problem: Literal["classes", "regression"] = "classes"
    """Whether labels name classes or are numbers."""
    learning_rate: float = Field(5e-5, gt=0, le=1)
    """Peak learning rate of AdamW; a cosine to zero after the warm-up. BERT's authors suggest 2e-5 to 5e-5."""
    max_tokens: int = Field(128, ge=8)
    """Longer texts are cut here."""


class TuneClassify(Step):
    """Fine-tune a whole text encoder under a classification or regression head; save a standard checkpoint."""

    Params = ClassifyParams
    params: ClassifyParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "label-loss"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return "tune · regression" if self.params.problem == "regression" else "tune · classifier"

    def tiny(self) -> TuneClassify:
        """See `Step.tiny`."""
        return TuneClassify(self.params.model_copy(update={"max_steps": 4, "batch": 4}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("text-encoder",), "tune: {method: classify}")
        wanted = ("pearson",) if self.params.problem == "regression" else ("macro-f1", "exact-match")
        if not set(wanted) & set(state.metrics[:1]):
            raise PlanError(
                f"problem: {self.params.problem} cannot be scored by `{state.metrics[0]}`",
                hint=f"use metric: {wanted[0]}",
            )
        p = self.params
        architecture = state.model.architecture.removesuffix("Model") + "ForSequenceClassification"
        model = replace(state.model, kind="classifier", architecture=architecture)
        if 0 < model.max_tokens < p.max_tokens:
            raise PlanError(
                f"max-tokens: {p.max_tokens}, but the encoder has {model.max_tokens} positions",
                hint=f"max-tokens: {model.max_tokens} or less",
            )
        rows = p.rows_seen(state)
        tokens = min(state.tokens_per_row, p.max_tokens)
        peak = 16 * model.parameters + activation_bytes(state, p.batch)
        flops = 3 * model.flops_per_token() * rows * tokens
        return Forecast(replace(state, model=model), flops=flops, peak_bytes=peak, notes=(f"{rows:,.0f} rows",))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import torch

        from residency import bases, rows, tokens, train
        from residency.labelloss import LabelLoss

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        found = rows.load(job.rows)
        classes = None if p.problem == "regression" else sorted({r.label for r in found if r.label is not None})
        if classes is not None and len(classes) < 2:
            raise PlanError(
                f"a classifier needs rows of at least two classes, found {len(classes)}", hint="rows of text + label"
            )
        items, refused = tokens.encode_labelled(found, tokenizer, classes, p.max_tokens)
        job.quarantine += refused
        head: dict[str, Any] = (
            {"num_labels": 1, "problem_type": "regression"}
            if classes is None
            else {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
        )
        torch.manual_seed(job.seed)  # of the new head
        model = bases.load_classifier(job.model, job.device, remote_code=job.remote_code, **head)
        log = train.fit(
            model,
            LabelLoss(),
            items,
            p,
            pad=tokenizer.pad_token_id,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="tuning",
            collator=lambda batch: tokens.collate_labelled(batch, tokenizer.pad_token_id),
        )
        tokenizer.model_max_length = p.max_tokens  # whoever predicts cuts where training did
        bases.save(model, tokenizer, job.out / "model", "float32")
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "classes": len(classes) if classes else "a number",
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            },
            figures=[train.loss_figure(log, "squared error per row" if classes is None else "nats per row")],
        )


class TuneProbe(Step):
    """Fit a head on a frozen encoder of images or texts."""

    Params = Probe
    params: Probe
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "probe"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"tune · {self.params.head} probe"

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("text-encoder", "image-encoder"), "tune: {method: probe}")
        if "macro-f1" not in state.metrics and "exact-match" not in state.metrics:
            raise PlanError(
                f"a probe predicts labels, which `{state.metrics[0]}` cannot score", hint="use metric: macro-f1"
            )
        after = replace(state, model=replace(state.model, kind="classifier"))
        tokens = state.tokens_per_row if state.model.kind == "text-encoder" else 200
        flops = state.model.flops_per_token() * state.rows * tokens
        return Forecast(after, flops=flops, peak_bytes=8 * state.model.parameters)

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import encoders, rows

        encoder = encoders.load(job.model, job.device)
        examples = [r for r in rows.load(job.rows) if r.label is not None]
        if not examples:
            raise PlanError("a probe needs rows with labels", hint="rows of text+label or image+label")
        features = encoder.encode([encoders.item_of(r) for r in examples], progress=job.progress)
        labels = [r.label or "" for r in examples]
        head = self.params.fit(features, labels)
        head.save(job.model, job.out / "model")
        counts = {label: labels.count(label) for label in head.classes}
        right = sum(p == t for p, t in zip(head.predict(features), labels, strict=True))
        flat = encoders.principal_plane(features)
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(examples),
                "classes": len(head.classes),
                "fewest_per_class": min(counts.values()),
                "training_accuracy": round(right / len(labels), 4),
                "head_parameters": head.weight.numel() + head.bias.numel(),
            },
            figures=[
                {
                    "kind": "bars",
                    "title": "Examples per class",
                    "x": list(counts),
                    "y": list(counts.values()),
                    "xlabel": "class",
                    "ylabel": "rows",
                },
                {
                    "kind": "scatter",
                    "title": "Training rows, as the encoder sees them",
                    "x": flat[:, 0].tolist(),
                    "y": flat[:, 1].tolist(),
                    "group": labels,
                    "hover": [r.id for r in examples],
                    "xlabel": "first principal component",
                    "ylabel": "second",
                },
            ],
        )

"""Recipe steps of the adapt stage: `tune: {method: lora}` and `tune: {method: probe}`."""

from __future__ import annotations

from dataclasses import replace

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
        rows = state.rows * p.epochs if p.max_steps is None else p.max_steps * p.batch * p.accumulate
        # forward, and backward through the activations only
        flops = 2 * model.flops_per_token() * rows * state.tokens_per_row
        peak = 4 * model.parameters + activation_bytes(state, p.batch)
        return Forecast(state, flops=flops, peak_bytes=peak, notes=(f"{rows:,.0f} rows",))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, tokens, train
        from residency.adapt.crossentropy import CrossEntropy
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
        bases.save_causal_lm(plain, tokenizer, job.out / "model", bases.saved_dtype(job.model))
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

"""Recipe step `merge-heads`: fewer key/value heads, then a short training to win back what that cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from residency.compress.headsupport import refusal
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, ModelFacts, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

if TYPE_CHECKING:
    from residency.compress.mergeheads import LayerPlan

Merge = Literal["auto", "mean", "procrustes", "lowrank", "fitted"]
HELD_OUT = 4
"""Every fourth calibration row is not fitted on but measured on."""


class MergeHeadsParams(TrainParams):
    """Keys of `merge-heads`."""

    kv_heads: int = Field(ge=1)
    """Key/value heads per layer afterwards; must divide the present number."""
    group_by: Literal["value", "key", "both", "none"] = "value"
    """Which vectors must agree for heads to be merged with each other; none keeps neighbours together."""
    criterion: Literal["cos", "dist"] = "cos"
    """Agreement by cosine of every token, or by squared distance."""
    merge: Merge = "auto"
    """How a group's heads become one: their plain mean, the mean after alignment (the paper), a low-rank fit of keys
    and values, or that with the output projection fitted layer by layer; auto takes the least loss on held-out rows.
    """
    gradual: bool = False
    """Fade from the old heads into the merged ones under masks during the training; merges by aligned means."""
    horizon: int = Field(2048, ge=1)
    """Context within which low-rank and fitted merging may take RoPE frequencies for one that drift apart by at most
    half a radian; raise it for longer contexts.
    """
    calibrate: int = Field(32, ge=1)
    """Rows on which heads are compared, fitted and measured."""
    train: bool = True
    """Train the merged model to answer like the unmerged one; false leaves it as merged."""
    loss: Literal["kl", "bild"] = "kl"
    """What the training imitates: the unmerged model's distribution (KL), or differences of its top logits (BiLD)."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> MergeHeadsParams:
        if self.gradual and not self.train:
            raise ValueError("`gradual: true` merges during the training, and `train` is false")
        if self.gradual and self.merge not in ("auto", "procrustes"):
            raise ValueError(f"`gradual: true` fades into aligned means, and merge is {self.merge}")
        unread = self.model_fields_set & ({*TrainParams.model_fields, "loss"} - {"max_tokens"})
        if (
            self.group_by == "none"
            and self.merge in ("mean", "lowrank", "fitted")
            and "criterion" in self.model_fields_set
        ):
            raise ValueError(f"with group-by: none and merge: {self.merge}, `criterion` would not be read")
        if "horizon" in self.model_fields_set and (self.gradual or self.merge in ("mean", "procrustes")):
            raise ValueError("`horizon` belongs to merge: lowrank, fitted or auto without `gradual`")
        if not self.train and unread:
            raise ValueError(f"`{sorted(unread)[0].replace('_', '-')}` belongs to the training, and `train` is false")
        return self


class MergeHeads(Step):
    """Merge key/value heads and train the smaller model to answer like the one before."""

    Params = MergeHeadsParams
    params: MergeHeadsParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "merge-heads"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"merge heads · {self.params.kv_heads} key/value head{'s' if self.params.kv_heads > 1 else ''}"

    def tiny(self) -> MergeHeads:
        """See `Step.tiny`."""
        update: dict[str, Any] = {"kv_heads": 1, "calibrate": 4, "max_tokens": 1024}
        if self.params.train:
            update |= {"max_steps": 4, "batch": 4}
        return MergeHeads(self.params.model_copy(update=update))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "merge-heads")
        p, before = self.params, state.model
        if reason := refusal(before.architecture):
            raise PlanError(f"the heads of a {before.architecture} cannot be merged: {reason[0]}", hint=reason[1])
        legal = [n for n in range(1, before.kv_heads) if before.kv_heads % n == 0]
        if p.kv_heads not in legal:
            raise PlanError(
                f"{before.kv_heads} key/value heads cannot be merged into {p.kv_heads}",
                hint=f"kv-heads: {' or '.join(map(str, legal))}"
                if legal
                else "the model has one already: drop the step",
            )
        after = merged_facts(before, p.kv_heads)
        rows = p.rows_seen(state) * p.train
        flops = rows * state.tokens_per_row * (before.flops_per_token() + 3 * after.flops_per_token())
        passes = {"auto": 14, "fitted": 6, "lowrank": 4, "procrustes": 3, "mean": 2}[
            "procrustes" if p.gradual else p.merge
        ]
        flops += passes * p.calibrate * state.tokens_per_row * before.flops_per_token()
        # the model before, the merged one, and for the training its gradient and AdamW's two moments, all float32
        peak = 4 * (before.parameters + (4 if p.train else 2) * after.parameters)
        peak += activation_bytes(state, p.batch) if p.train else 0
        note = (
            f"{before.kv_heads} → {p.kv_heads} key/value heads, "
            f"{before.kv_bytes_per_token:,} → {after.kv_bytes_per_token:,} KV bytes per token"
        )
        return Forecast(replace(state, model=after), flops=flops, peak_bytes=int(peak), notes=(note,))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, tokens, train

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        items, refused = tokens.encode_all(rows.load(job.rows), tokenizer, p.max_tokens)
        job.quarantine += refused
        if not items:
            raise DataError("there are no rows to calibrate on", hint="check quarantine.jsonl for the reasons")
        where = "cpu" if job.device == "mps" else job.device  # the surgery needs float64
        before = bases.load_causal_lm(job.model, where, remote_code=job.remote_code)
        parameters = sum(x.numel() for x in before.parameters())
        fit_on, measure_on = _calibration(items[: p.calibrate], tokenizer.pad_token_id)
        plan, choice, model, table = self._merged(before, fit_on, measure_on, job)
        summary: dict[str, Any] = {"rows": len(items), "refused": len(refused), "merge": choice}
        figures = [*plan_figures(plan), table]
        if p.train:
            before.to(job.device)
            log = self._train(before, model, plan, choice, items, tokenizer.pad_token_id, job)
            summary |= {"optimiser_steps": log.steps, "loss_first": round(log.loss[0], 4)}
            summary |= {"loss_last": round(log.loss[-1], 4), "precision": log.precision}
            figures.append(train.loss_figure(log, f"{p.loss.upper()} per answer token"))
        heads = f"{len(plan[0].keys)} → {model.config.get_text_config().num_key_value_heads}"
        after = sum(x.numel() for x in model.parameters())
        summary |= {"key_value_heads": heads, "parameters": f"{parameters:,} → {after:,}"}
        bases.save(model, tokenizer, job.out / "model", bases.saved_dtype(job.model))
        return Outcome(gives={"model": "model"}, summary=summary, figures=figures)

    def _merged(self, before: Any, fit_on: Any, measure_on: Any, job: Job) -> tuple[list[LayerPlan], str, Any, Any]:
        """The plan, how it was merged, the model (only aligned, if it is to be merged gradually), and all losses."""
        import copy

        from residency.compress import headfit, mergeheads

        p = self.params
        plan = mergeheads.plan_merge(before, fit_on, p.kv_heads, p.group_by, p.criterion, job.seed, job.progress)
        makers: dict[str, Any] = {}
        if p.merge in ("auto", "mean") and not p.gradual:
            makers["mean"] = lambda: mergeheads.merge_heads(before, unaligned(plan))
        if p.merge in ("auto", "procrustes"):
            for restore in ("none", "keys", "values", "both"):
                name = "procrustes" if restore == "none" else f"procrustes, norms of {restore} restored"
                makers[name] = lambda restore=restore: mergeheads.merge_heads(before, plan, restore)
        if p.merge in ("auto", "lowrank") and not p.gradual:
            rough = headfit.FitSettings(refit=False, horizon=p.horizon)
            makers["lowrank"] = lambda: headfit.fit_heads(before, plan, fit_on, rough, job.progress)
        if p.merge in ("auto", "fitted") and not p.gradual:
            full = headfit.FitSettings(horizon=p.horizon)
            makers["fitted"] = lambda: headfit.fit_heads(before, plan, fit_on, full, job.progress)
        losses = {"unmerged": mergeheads.text_loss(before, measure_on)}
        best: Any = None
        choice = ""
        for name, make in makers.items():
            made = make()
            losses[name] = mergeheads.text_loss(made, measure_on)
            if best is None or losses[name] < losses[choice]:
                best, choice = made, name
        if p.gradual:
            best = copy.deepcopy(before)
            mergeheads.apply_alignment(best, plan)
        table = {
            "kind": "table",
            "title": "Loss before training, by way of merging",
            "columns": ["merge", "nats per token on held-out calibration rows", "chosen"],
            "rows": [[name, round(loss, 4), "yes" if name == choice else ""] for name, loss in losses.items()],
        }
        return plan, choice, best, table

    def _train(
        self, before: Any, model: Any, plan: list[LayerPlan], choice: str, items: Any, pad: int, job: Job
    ) -> Any:
        """Distil the model before into the merged one, in place."""
        import math

        from residency import train
        from residency.compress.bild import BiLD
        from residency.compress.distillation import Distillation
        from residency.compress.headmasks import GradualMerge
        from residency.compress.kl import KL

        p = self.params
        objective: Any = Distillation(BiLD() if p.loss == "bild" else KL(), before)
        model.requires_grad_(True)
        rates: dict[str, float] = {}
        if p.gradual:
            restore: Any = next(
                (kind for kind in ("keys", "values", "both") if f"of {kind} restored" in choice), "none"
            )
            objective = GradualMerge(model, p.kv_heads, objective, restore=restore, seed=job.seed)
            steps = p.max_steps or math.ceil(math.ceil(len(items) / p.batch / p.accumulate) * p.epochs)
            rates = objective.learning_rates(steps, p.learning_rate)
        log = train.fit(
            model,
            objective,
            items,
            p,
            pad=pad,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="merging heads" if p.gradual else "recovering",
            learning_rates=rates,
        )
        if p.gradual:
            objective.finish()
        return log


def merged_facts(before: ModelFacts, kv_heads: int) -> ModelFacts:
    """The facts of a model after merging to `kv_heads`; biases of the two projections where the family has them."""
    rows = 2 * before.layers * (before.kv_heads - kv_heads) * before.head_dim
    inputs = before.hidden + (before.architecture in ("Qwen2ForCausalLM", "Starcoder2ForCausalLM"))
    parameters = before.parameters - rows * inputs
    return replace(
        before,
        kv_heads=kv_heads,
        parameters=parameters,
        bytes_on_disk=before.bytes_on_disk * parameters // max(1, before.parameters),
        kv_bytes_per_token=before.kv_bytes_per_token * kv_heads // before.kv_heads,
    )


def unaligned(plan: list[LayerPlan]) -> list[LayerPlan]:
    """The plan's groups without its rotations."""
    import torch

    eyes = [torch.eye(p.keys.shape[-1], dtype=p.keys.dtype).expand_as(p.keys) for p in plan]
    return [replace(p, keys=eye, values=eye) for p, eye in zip(plan, eyes, strict=True)]


def plan_figures(plan: list[LayerPlan]) -> list[dict[str, Any]]:
    """Similarity of heads with the others of their group before and after alignment, and the grouping, per layer."""
    G = len(plan[0].keys)
    layers, columns = [str(i) for i in range(len(plan))], [f"{kind}{i}" for kind in "KV" for i in range(G)]
    figures: list[dict[str, Any]] = []
    for title in ("before", "after"):
        z = []
        for layer in plan:
            S, row = getattr(layer, title), []
            for kind in range(2):
                for head in range(G):
                    group = next(members for members in layer.groups if head in members)
                    others = [j for j in group if j != head]
                    row.append(round(float(S[kind, head, others].mean()), 4) if others else 1.0)
            z.append(row)
        figures.append(
            {
                "kind": "heatmap",
                "title": f"Mean cosine with the group's other heads, {title} alignment",
                "x": columns,
                "y": layers,
                "z": z,
                "range": [0.0, 1.0],
                "xlabel": "key or value head",
                "ylabel": "decoder layer",
            }
        )
    if len(plan[0].groups) == 1:
        return figures
    figures.append(
        {
            "kind": "heatmap",
            "title": "Which heads share",
            "x": [str(i) for i in range(G)],
            "y": layers,
            "z": [[next(n for n, group in enumerate(p.groups) if i in group) for i in range(G)] for p in plan],
            "xlabel": "key/value head",
            "ylabel": "decoder layer",
        }
    )
    return figures


def _calibration(items: Any, pad: int) -> tuple[list[Any], list[Any]]:
    """Batches to fit on (all their tokens count) and held-out ones to measure on; the same where there is one row."""
    from residency import tokens

    held = items[HELD_OUT - 1 :: HELD_OUT] or items[-1:]
    fitted = [item for i, item in enumerate(items) if i % HELD_OUT != HELD_OUT - 1][: max(1, len(items) - 1)] or items
    batches = []
    for some in (fitted, held):
        some = sorted(some, key=len)
        made = [tokens.collate(some[i : i + 8], pad) for i in range(0, len(some), 8)]
        batches.append([{k: v for k, v in batch.items() if k != "labels"} for batch in made])
    return batches[0], batches[1]

"""Recipe step of the compress stage: `sparsify`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

UNGATED = (
    "GPT2",
    "GPTNeo",
    "GPTJ",
    "GPTBigCode",
    "OPT",
    "Bloom",
    "Falcon",
    "Phi",
    "CodeGen",
    "Mpt",
    "Starcoder2",
    "XGLM",
)
"""Beginnings of architectures without gate_proj and up_proj, so that a plan can refuse them before weights are read."""


CANDIDATES = 14
"""Thresholds that an automatic choice measures at most (`fatrelu.GRID` + `REFINE` + 2); said here, a plan needs no
torch."""


class SparsifyParams(TrainParams):
    """Keys of `sparsify`."""

    learning_rate: float = Field(4e-4, gt=0, le=1)
    """Peak learning rate of AdamW over all weights; a cosine to zero after the warm-up."""
    peaks: tuple[float, ...] = (0.05, 0.25, 0.6)
    """The penalty's weight at the end of each stage after the first; none is plain ReLU-fication, one with stages
    [0, 1] a fixed penalty. The paper's end at 0.2 after 34 billion tokens; in 10,000, 4 cost a nat more than 0.6.
    """
    stages: tuple[float, ...] = (0.25, 0.35, 0.7, 1.0)
    """Where stages end, as shares of the training: the first ends the stage without penalty."""
    loss: Literal["kl", "cross-entropy"] = "kl"
    """What is learnt beside the penalty: to answer like the model as it was, or the reference answers."""
    threshold: Literal["auto"] | float = "auto"
    """FATReLU's threshold after the training, in units of the gate; 0 is plain ReLU, auto follows `tolerance`."""
    tolerance: float = Field(0.01, ge=0)
    """How much the calibration loss may rise by the threshold, nats per answer token. Read by threshold: auto."""
    target: float | None = Field(None, gt=0, lt=1)
    """Instead of a threshold: the share of zeros that it must bring about on the calibration rows."""
    per_layer: bool = False
    """Whether every layer gets a threshold of its own, chosen to silence the same share of gates in each."""
    calibrate: int = Field(32, ge=1)
    """Rows on which sparsity is measured and the threshold chosen."""

    @model_validator(mode="after")
    def _consistent(self) -> SparsifyParams:
        if len(self.stages) != len(self.peaks) + 1:
            raise ValueError(f"{len(self.peaks)} peaks need {len(self.peaks) + 1} stages, got {len(self.stages)}")
        if list(self.stages) != sorted(self.stages) or min(self.stages) < 0 or self.stages[-1] != 1:
            raise ValueError(f"stages are shares of the training that do not fall and end with 1, got {self.stages}")
        if list(self.peaks) != sorted(self.peaks) or any(peak < 0 for peak in self.peaks):
            raise ValueError(f"peaks are not negative and do not fall, got {self.peaks}")
        if self.threshold != "auto" and self.threshold < 0:
            raise ValueError(f"a threshold is not negative, got {self.threshold}")
        given = self.model_fields_set
        if self.target is not None and given & {"threshold", "tolerance"}:
            raise ValueError("`target` decides the threshold; leave out `threshold` and `tolerance`")
        if self.threshold != "auto" and given & {"tolerance", "per_layer"}:
            raise ValueError("`tolerance` and `per-layer` belong to threshold: auto")
        return self


class Sparsify(Step):
    """Exchange the activation for ReLU, train towards zeros with a growing penalty, then raise the threshold."""

    Params = SparsifyParams
    params: SparsifyParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "prosparse"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        p = self.params
        goal = f"{p.target:.0%} zeros" if p.target else f"threshold {p.threshold}"
        return f"sparsify · ReLU, penalty up to {p.peaks[-1] if p.peaks else 0:g}, {goal}"

    def tiny(self) -> Sparsify:
        """See `Step.tiny`."""
        update: dict[str, Any] = {"max_steps": 4, "batch": 4, "max_tokens": 1024, "calibrate": 4}
        return Sparsify(self.params.model_copy(update=update))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "sparsify")
        p, model = self.params, state.model
        if model.architecture.startswith(UNGATED) or "Moe" in model.architecture or "Mixtral" in model.architecture:
            raise PlanError(
                f"a {model.architecture} has no plain gated feed-forward layers to make sparse",
                hint="supported are models with gate_proj, up_proj and down_proj: llama, qwen2, qwen3, mistral, gemma",
            )
        rows = p.rows_seen(state)
        passes = 3 + (p.loss == "kl")
        candidates = 1 if p.threshold != "auto" else CANDIDATES
        tokens = rows * state.tokens_per_row * passes + (candidates + 1) * p.calibrate * state.tokens_per_row
        # weights, gradient and AdamW's two moments, and the teacher's weights, all float32
        copies = 4 + (p.loss == "kl")
        peak = 4 * copies * model.parameters + activation_bytes(state, p.batch)
        exportable = dict(model.exportable)
        if exportable.get("gguf", "") is None:
            exportable["gguf"] = "llama.cpp has no place for the activation `relu` in this architecture"
        after = replace(model, activation="relu", exportable=exportable)
        note = f"{model.activation or 'its activation'} → ReLU in {model.layers} layers"
        return Forecast(
            replace(state, model=after), flops=tokens * model.flops_per_token(), peak_bytes=peak, notes=(note,)
        )

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, tokens, train
        from residency.compress import fatrelu, relufy
        from residency.compress.prosparse import ProSparse, SineStages
        from residency.compress.sparsity import measure_sparsity

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        items, refused = tokens.encode_all(rows.load(job.rows), tokenizer, p.max_tokens)
        job.quarantine += refused
        if not items:
            raise DataError("there are no rows to train on", hint="check quarantine.jsonl for the reasons")
        pad = tokenizer.pad_token_id
        model = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code)
        some = sorted(items[: p.calibrate], key=len)
        batches = [tokens.collate(some[i : i + 8], pad) for i in range(0, len(some), 8)]
        before, _ = fatrelu.loss_and_sparsity(model, batches)
        relufy.relufy(model).requires_grad_(True)
        swapped = measure_sparsity(model, batches)
        with ProSparse(self._inner(job), model, SineStages(p.peaks, p.stages)) as objective:
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
                label="sparsifying",
            )
        shift = self._shift(model, batches, job)
        after, sparse = fatrelu.loss_and_sparsity(model, batches)
        chosen = relufy.thresholds(model)
        measured = _speeds(model, items[0]) if job.device == "cpu" else {}
        bases.save(model, tokenizer, job.out / "model", bases.saved_dtype(job.model))
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "sparsity": round(sparse.mean, 4),
                "sparsity_after_substitution": round(swapped.mean, 4),
                "sparsity_before_threshold": round(shift[0].sparsity, 4),
                "threshold": round(sum(chosen) / len(chosen), 5),
                "calibration_loss": f"{before:.4f} → {after:.4f}",
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            },
            figures=[
                _per_layer(swapped, sparse),
                *_along(objective.curve()),
                *_sweep(shift),
                _places(sparse),
                train.loss_figure(log, "loss and penalty per answer token"),
            ],
            measured=measured,
        )

    def _inner(self, job: Job) -> Any:
        """What is learnt beside the penalty."""
        from residency import bases
        from residency.compress.distillation import Distillation
        from residency.compress.kl import KL
        from residency.crossentropy import CrossEntropy

        if self.params.loss == "cross-entropy":
            return CrossEntropy()
        return Distillation(KL(), bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code))

    def _shift(self, model: Any, batches: Any, job: Job) -> list[Any]:
        """Set the threshold; what was measured, without any first."""
        from residency.compress import fatrelu, relufy

        p = self.params
        if p.threshold != "auto":
            loss, zeros = fatrelu.loss_and_sparsity(model, batches)
            relufy.set_thresholds(model, float(p.threshold))
            return [fatrelu.Candidate(0.0, [0.0], loss, zeros.mean)]
        goal = {"tolerance": p.tolerance} if p.target is None else {"sparsity": p.target}
        return fatrelu.shift_thresholds(model, batches, per_layer=p.per_layer, progress=job.progress, **goal).measured


def _speeds(model: Any, item: Any) -> dict[str, Any]:
    """Decoding one token at a time, dense and sparse; and the feed-forward layers alone against sparsity."""
    from residency.compress.sparseffn import sparse_decoding
    from residency.compress.sparsespeed import decode_speed, speed_against_sparsity

    ids = list(item.prompt)[:256] or list(item.answer)[:1]
    dense = decode_speed(model, ids)
    with sparse_decoding(model):
        sparse = decode_speed(model, ids)
    alone = speed_against_sparsity(model)
    figure = {
        "kind": "lines",
        "title": "Speed of the feed-forward layers against sparsity, batch 1",
        "xlabel": "share of zeros",
        "ylabel": "times the dense layer's speed",
        "series": [{"name": "measured", "x": [r["sparsity"] for r in alone], "y": [r["speedup"] for r in alone]}],
    }
    return {
        "decode_tokens_per_second": {"dense": round(dense, 2), "sparse": round(sparse, 2)},
        "ffn_against_sparsity": alone,
        "figures": [figure],
    }


def _per_layer(swapped: Any, sparse: Any) -> dict[str, Any]:
    layers = list(range(len(sparse.per_layer)))
    lines = (("after the substitution", swapped), ("after training and threshold", sparse))
    return {
        "kind": "lines",
        "title": "Sparsity per layer",
        "xlabel": "decoder layer",
        "ylabel": "share of zeros",
        "series": [{"name": name, "x": layers, "y": [round(v, 5) for v in s.per_layer.tolist()]} for name, s in lines],
    }


def _along(curve: list[Any]) -> list[dict[str, Any]]:
    x = [round(moment.progress, 4) for moment in curve]
    wanted = (
        ("Sparsity along the training", "sparsity", "share of zeros"),
        ("Weight of the penalty", "weight", "λ"),
        ("Task loss along the training", "loss", "nats per answer token, without the penalty"),
    )
    return [
        {
            "kind": "lines",
            "title": title,
            "xlabel": "share of the training",
            "ylabel": ylabel,
            "series": [{"name": name, "x": x, "y": [round(getattr(moment, name), 5) for moment in curve]}],
        }
        for title, name, ylabel in wanted
    ]


def _sweep(shift: list[Any]) -> list[dict[str, Any]]:
    if len(shift) < 2:
        return []
    return [
        {
            "kind": "lines",
            "title": "What thresholds cost",
            "xlabel": "share of zeros",
            "ylabel": "calibration loss, nats per answer token",
            "series": [
                {
                    "name": "candidates",
                    "x": [round(c.sparsity, 5) for c in sorted(shift, key=lambda c: c.sparsity)],
                    "y": [round(c.loss, 5) for c in sorted(shift, key=lambda c: c.sparsity)],
                }
            ],
        }
    ]


def _places(sparse: Any) -> dict[str, Any]:
    seen = [p for p, tokens in enumerate(sparse.tokens.tolist()) if tokens]
    return {
        "kind": "heatmap",
        "title": "Sparsity per layer and place in the text",
        "xlabel": "token",
        "ylabel": "decoder layer",
        "x": [sparse.labels()[p] for p in seen],
        "y": list(range(len(sparse.grid))),
        "z": [[round(float(row[p]), 4) for p in seen] for row in sparse.grid],
    }

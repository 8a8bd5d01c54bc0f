"""Recipe step `self-train`: a classifier learns from its own confident answers on unlabelled rows."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from residency.adapt.selftraining import SelfTraining, rounds_figure, self_train
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step, require_kind


class SelfTrainParams(SelfTraining):
    """Keys of `self-train`."""

    unlabelled: str = Field(min_length=1)
    """Rows to learn from; labels they carry are not learnt from, only held against what was said of them."""
    regularisation: float = Field(1e-2, gt=0)
    """λ, the L2 penalty of a linear head when it is fitted again; prototypes do not read it."""


class SelfTrain(Step):
    """Fit the classifier's head again on the trusted rows and on its own confident answers; the encoder stays."""

    Params = SelfTrainParams
    params: SelfTrainParams
    reads = frozenset({"model", "examples"})
    gives = frozenset({"model"})
    unlabelled = frozenset({"unlabelled"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "self-training"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"self-train · {self.params.rounds} round{'s' if self.params.rounds > 1 else ''}"

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        return {"unlabelled": self.params.unlabelled}

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("classifier",), "self-train")
        if state.model.architecture.endswith("ForSequenceClassification"):
            raise PlanError(
                "`self-train` fits a head on an encoder again, and this model is fine-tuned as one piece",
                hint="use tune: {method: probe}, spcl, fopro or capro before it",
            )
        if state.metrics[:1] == ("multilabel-f1",):
            raise PlanError(
                "`self-train` gives one label per row, and the task has several",
                hint="tune: {method: label-prompts, unlabelled: …, self-training: {rounds: 2}}",
            )
        flops = state.model.flops_per_token() * (state.pool_rows + state.rows) * 200
        return Forecast(state, flops=flops, peak_bytes=8 * state.model.parameters, notes=(f"{state.pool_rows:,} rows",))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import torch

        from residency import encoders, rows
        from residency.adapt.probe import Probe
        from residency.classifier import ClassHead

        p = self.params
        given = ClassHead.load(job.model)
        known = set(given.classes)
        trusted = [r for r in rows.load(job.examples) if r.label is not None]
        if strange := next((r for r in trusted if r.label not in known), None):
            raise DataError(f"the classifier does not know the class `{strange.label}`", where=strange.id)
        free = list(job.stream("unlabelled"))
        encoder = encoders.load(job.model, job.device)
        features = encoder.encode([encoders.item_of(r) for r in (*trusted, *free)], progress=job.progress)
        mine, theirs = features[: len(trusted)], features[len(trusted) :]
        probe = Probe(head="prototype") if given.unit else Probe(regularisation=p.regularisation)
        began = False

        def fit(items: Any, labels: Any) -> ClassHead:
            """The classifier as it is, first; afterwards its head fitted again, over all of its classes."""
            nonlocal began
            if not began:
                began = True
                return given
            return probe.fit(_stacked(items), list(labels))

        def predict(head: ClassHead, items: Any) -> Any:
            with torch.no_grad():
                scores = head(torch.as_tensor(_stacked(items), dtype=torch.float32)).exp().double()
            if head.classes != given.classes:  # a class that no row carries any more
                whole = torch.zeros(len(scores), len(given.classes), dtype=scores.dtype)
                whole[:, [given.classes.index(c) for c in head.classes]] = scores
                scores = whole
            return scores.numpy()

        truth = [r.label if r.label in known else None for r in free]
        with job.progress.task("self-training", p.rounds) as advance:
            result = self_train(
                fit,
                predict,
                list(mine),
                [r.label or "" for r in trusted],
                list(theirs),
                p,
                classes=given.classes,
                truth=truth if any(truth) else None,
            )
            advance(p.rounds)
        result.model.save(job.model, job.out / "model")
        last = result.rounds[-1] if result.rounds else None
        counts = {c: last.per_class.get(c, 0) if last else 0 for c in given.classes}
        return Outcome(
            gives={"model": "model"},
            summary={
                "trusted_rows": len(trusted),
                "unlabelled_rows": len(free),
                "rounds": len(result.rounds),
                "pseudo_labels": last.added if last else 0,
                **({"agree_with_their_labels": last.right} if last and last.right is not None else {}),
            },
            figures=[
                rounds_figure(result.rounds),
                {
                    "kind": "bars",
                    "title": "Pseudo-labels per class",
                    "x": list(counts),
                    "y": list(counts.values()),
                    "xlabel": "class",
                    "ylabel": "rows",
                },
            ],
        )


def _stacked(items: Any) -> Any:
    import numpy as np

    return np.stack(list(items))

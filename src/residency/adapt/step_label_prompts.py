"""Recipe step `tune: {method: label-prompts}`: a classifier of label sets from a few rows per label.

The rows are the K shots of the labels wanted (`text` and `labels`). `episodes` names rows of other labels: the encoder
is trained on episodes drawn from them, and without them it stays as it is. Then every label gets its prototype, the
threshold is calibrated on the shots, each scored by prototypes made without it, and encoder, prototypes and threshold
are saved as one classifier. Rows of `unlabelled` can become further shots by self-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from residency.adapt.labelpromptparams import LabelPrompts
from residency.adapt.selftraining import SelfTraining
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

if TYPE_CHECKING:
    import numpy as np

    from residency.adapt.descriptions import Description
    from residency.adapt.fitprompts import Fitted
    from residency.rows import Row
    from residency.train import TrainLog


class LabelPromptsParams(TrainParams, LabelPrompts):
    """Keys of `tune: {method: label-prompts}`."""

    episodes: str | None = None
    """Rows (text and labels) of other labels, on whose episodes the encoder is trained; without them it is not."""
    tasks: int = Field(100, ge=1)
    """Different episodes drawn from them; `epochs` passes over these."""
    ways: int = Field(5, ge=2)
    """Labels per training episode."""
    shots: int = Field(5, ge=1)
    """Support rows per label of a training episode."""
    queries: int = Field(2, ge=1)
    """Query rows per label of a training episode."""
    descriptions: str | None = None
    """Rows of label and text that say what each label means; without them, its name does."""
    decide: float | None = Field(None, gt=0, lt=1)
    """The score from which a label is given; by default calibrated on the shots, each by prototypes made without it."""
    unlabelled: str | None = None
    """Rows whose texts may become further shots, see `self-training`; labels they have only check it."""
    self_training: SelfTraining | None = None
    """How confident answers on `unlabelled` become shots: {rounds: 2, threshold: 0.9}."""
    batch: int = Field(1, ge=1)
    """Episodes per forward pass."""
    learning_rate: float = Field(3e-5, gt=0, le=1)
    """Peak learning rate of AdamW on the encoder; its three scalars learn a hundred times as fast."""
    max_tokens: int = Field(128, ge=16)
    """Longer sentences are cut here."""

    @model_validator(mode="after")
    def _every_key_is_read(self) -> LabelPromptsParams:
        training = {*TrainParams.model_fields, "tasks", "ways", "shots", "queries"} - {"max_tokens"}
        known = LabelPromptsParams.model_fields
        unread = sorted(name for name in training if getattr(self, name) != known[name].default)
        if self.episodes is None and unread:
            raise ValueError(f"{unread[0].replace('_', '-')} belongs to training on `episodes`, and there are none")
        if (self.unlabelled is None) != (self.self_training is None):
            raise ValueError("unlabelled and self-training belong together")
        return self


class TuneLabelPrompts(Step):
    """Train the encoder on episodes of other labels, make prototypes of the wanted ones, save a classifier."""

    Params = LabelPromptsParams
    params: LabelPromptsParams
    gives = frozenset({"model"})
    unlabelled = frozenset({"unlabelled"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "label-prompts"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"tune · label prompts ({self.params.form})"

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        named = {name: getattr(self.params, name) for name in ("episodes", "descriptions", "unlabelled")}
        return {name: ref for name, ref in named.items() if ref is not None}

    def tiny(self) -> TuneLabelPrompts:
        """See `Step.tiny`."""
        smaller: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 1, "tasks": 3, "max_steps": 3}
        return TuneLabelPrompts(self.params.model_copy(update=smaller if self.params.episodes else {}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("text-encoder",), "tune: {method: label-prompts}")
        if "multilabel-f1" not in state.metrics[:1]:
            raise PlanError(
                f"label prompts predict label sets, which `{state.metrics[0]}` cannot score",
                hint="use metric: multilabel-f1",
            )
        p, model = self.params, state.model
        if 0 < model.max_tokens < p.max_tokens:
            raise PlanError(
                f"max-tokens: {p.max_tokens}, but the encoder has {model.max_tokens} positions",
                hint=f"max-tokens: {model.max_tokens} or less",
            )
        tokens = min(state.tokens_per_row, p.max_tokens)
        passes = p.ways * p.queries * (p.ways if p.form == "prompt" else 1) + p.ways * (p.shots + 1)
        steps = 0.0
        if p.episodes is not None:
            steps = p.tasks * p.epochs if p.max_steps is None else p.max_steps * p.batch * p.accumulate
        flops = (3 * steps * passes + 20 * state.rows) * model.flops_per_token() * tokens
        peak = 16 * model.parameters + activation_bytes(state, passes * p.batch)
        note = f"{steps:,.0f} episodes of {passes} passes" if steps else "the encoder is not trained"
        after = replace(state, model=replace(model, kind="classifier"))
        return Forecast(after, flops=flops, peak_bytes=peak, notes=(note,))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import prompted, rows, train
        from residency.adapt import fitprompts
        from residency.adapt.descriptions import Descriptions
        from residency.adapt.selftraining import rounds_figure

        p = self.params
        found = [r for r in rows.load(job.rows) if r.text is not None and (r.labels, r.label) != (None, None)]
        classes = sorted({c for r in found for c in _labels(r)})
        if len(classes) < 2:
            raise PlanError(
                f"label prompts need rows of at least two labels, found {len(classes)}",
                hint="task.examples: rows of text and labels",
            )
        encoder, tokenizer = prompted.load_encoder(job.model, job.device, remote_code=job.remote_code)
        view = p.view(encoder).to(job.device)
        given = self._given(job, classes)
        described = Descriptions(given=given).of(classes)
        said = {c: d.text for c, d in described.items() if d.source == "given"}
        summary: dict[str, Any] = {"rows": len(found), "labels": len(classes), "described": len(said)}
        figures = []
        if p.episodes is not None:
            log = self._train(job, view, tokenizer, given, classes)
            summary |= {
                "episodes": p.tasks,
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 5),
                "loss_last": round(log.loss[-1], 5),
                "precision": log.precision,
            }
            figures.append(train.loss_figure(log, "per query and label"))
        fitted = fitprompts.fit(
            view,
            tokenizer,
            p,
            [r.text or "" for r in found],
            [_labels(r) for r in found],
            classes=classes,
            descriptions=said,
            decide=p.decide,
            max_tokens=p.max_tokens,
            progress=job.progress,
        )
        if p.unlabelled is not None and p.self_training is not None:
            pool = [r for r in job.stream("unlabelled") if r.text is not None]
            fitted, result = fitprompts.self_trained(
                fitted,
                p.self_training,
                [r.text or "" for r in pool],
                truth=[_labels(r) or None for r in pool],
                decide=p.decide,
                progress=job.progress,
            )
            figures.append(rounds_figure(result.rounds))
            last = result.rounds[-1] if result.rounds else None
            summary |= {
                "pseudo_labelled": last.added if last else 0,
                "pseudo_labels_right": last.right if last else None,
            }
        fitted.classifier.head.facts = {c: {"text": d.text, "source": d.source} for c, d in described.items()}
        fitted.classifier.save(job.out / "model")
        summary |= {
            "threshold": round(fitted.classifier.head.threshold, 4),
            "calibrated_on": len(fitted.scores),
            "scale": round(view.log_scale.exp().item(), 4),
        }
        if p.form == "attention":
            summary["sharpness"] = round(view.sharpness.item(), 4)
        figures += _figures(fitted, described)
        return Outcome(gives={"model": "model"}, summary=summary, figures=figures)

    def _given(self, job: Job, classes: Sequence[str]) -> dict[str, str]:
        """The texts of `descriptions` by label."""
        given: dict[str, str] = {}
        if self.params.descriptions is not None:
            for row in job.stream("descriptions"):
                for label in _labels(row):
                    given.setdefault(label, row.text or "")
            if not set(given) & set(classes):
                raise DataError(
                    "none of the descriptions is of a label of the rows",
                    where=self.params.descriptions,
                    hint="each row has `label` and `text`",
                )
        return given

    def _train(self, job: Job, view: Any, tokenizer: Any, given: dict[str, str], classes: Sequence[str]) -> TrainLog:
        """Train the view on episodes of the other labels."""
        from residency import train
        from residency.adapt.episodes import Episodes
        from residency.adapt.labelprompts import SCALARS, EpisodeLoss, Tasks, collate_tasks

        p = self.params
        rows = [r for r in job.stream("episodes") if r.text is not None and _labels(r)]
        texts = [r.text or "" for r in rows]
        others = sorted({c for r in rows for c in _labels(r)} - set(classes))
        episodes = Episodes(
            [_labels(r) for r in rows],
            ways=p.ways,
            shots=p.shots,
            queries=p.queries,
            seed=job.seed,
            keys=texts,
            classes=others,
        )
        tasks = Tasks(p, tokenizer, texts, given, p.max_tokens)
        items = [tasks(e, f"episode {i}") for i, e in enumerate(episodes.take(p.tasks))]
        return train.fit(
            view,
            EpisodeLoss(view, p),
            items,
            p,
            pad=tokenizer.pad_token_id,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="tuning",
            collator=lambda batch: collate_tasks(batch, tokenizer.pad_token_id),
            learning_rates=SCALARS,
        )


def _labels(row: Row) -> tuple[str, ...]:
    return row.labels if row.labels is not None else ((row.label,) if row.label is not None else ())


def _figures(fitted: Fitted, described: dict[str, Description]) -> list[dict[str, Any]]:
    """Threshold curve and confusion on the held-out shots, and what every label was called."""
    classes = fitted.classifier.classes
    figures: list[dict[str, Any]] = [
        {
            "kind": "table",
            "title": "What each label means to the encoder",
            "columns": ["label", "text", "from"],
            "rows": [
                [c, fitted.named[c], "its name" if d.source == "template" else d.source] for c, d in described.items()
            ],
        }
    ]
    tried, f1 = fitted.curve
    if len(tried):
        figures.append(
            {
                "kind": "lines",
                "title": "Threshold, on the shots left out one at a time",
                "xlabel": "score from which a label is given",
                "ylabel": "macro-F1",
                "series": [{"name": "macro-F1", "x": tried.round(4).tolist(), "y": f1.round(4).tolist()}],
            }
        )
    if len(fitted.scores):
        figures.append(
            {
                "kind": "heatmap",
                "title": "Labels given, by true label (shots left out one at a time)",
                "x": classes,
                "y": classes,
                "z": together(fitted.said, fitted.checked).round(3).tolist(),
                "xlabel": "given",
                "ylabel": "true",
            }
        )
    return figures


def together(said: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Share of the rows with true label i that were given label j, [C, C]; rows of zeros where a label never occurs."""
    counts = gold.T.astype(float) @ said.astype(float)
    return counts / gold.sum(0).clip(1)[:, None]

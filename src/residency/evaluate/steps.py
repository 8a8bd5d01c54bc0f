"""Recipe step of the evaluate stage: `evaluate`, the examination that the base and every model of a run sits.

Scores are computed in float32 unless told otherwise, so that they do not depend on how items are batched. The same
items, prompts and wrong answers are used for every model of a run; that is what makes the comparison paired.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from residency.errors import PlanError
from residency.step import Examination, Forecast, Job, Outcome, Params, State

LIKELIHOOD = ("choice-accuracy", "bits-per-byte")
GENERATED = ("exact-match", "rouge-l")
BY_KIND = {
    "causal-lm": (*LIKELIHOOD, *GENERATED, "macro-f1"),
    "classifier": ("macro-f1", "multilabel-f1", "exact-match", "pearson"),
    "text-encoder": (),
    "image-encoder": (),
}


class EvaluateParams(Params):
    """Keys of `evaluate`."""

    speed: bool = True
    """Measure tokens/s and time to first token at batch 1 (language models)."""
    new_tokens: int = Field(48, ge=2)
    """Tokens generated for each speed measurement."""
    choices: int = Field(4, ge=2, le=26)
    """Answers to choose among for choice-accuracy: the right one and wrong ones of other held-out rows."""
    max_answer_tokens: int = Field(64, ge=1)
    """Longest generated answer, for metrics that read generated text."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """In which precision the model computes: float32 makes scores independent of batching; auto takes bfloat16
    where the hardware has it, about twice as fast; log-probabilities are summed in float64 either way.
    """
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples behind every interval."""


class Evaluate(Examination):
    """Examine one model: task, guard, cost."""

    Params = EvaluateParams
    params: EvaluateParams
    reads = frozenset({"model", "test"})

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return "examination"

    def tiny(self) -> Evaluate:
        """See `Step.tiny`."""
        return Evaluate(self.params.model_copy(update={"new_tokens": 2, "max_answer_tokens": 4}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        kind = state.model.kind
        for metric in state.metrics:
            if BY_KIND[kind] and metric not in BY_KIND[kind]:
                raise PlanError(
                    f"a {kind} cannot be scored by `{metric}`", hint=f"metrics for it: {', '.join(BY_KIND[kind])}"
                )
        candidates = self.params.choices + 1 if "choice-accuracy" in state.metrics else 2
        tokens = (state.test_rows + state.guard_rows / 3) * candidates * state.tokens_per_row / 2
        if kind in ("text-encoder", "image-encoder"):
            return Forecast(state, notes=("nothing to score before a head is tuned",))
        if kind == "classifier":
            tokens = state.test_rows * 200.0
        peak = 4 * state.model.parameters + 4 * 512 * state.model.vocabulary
        return Forecast(state, flops=tokens * state.model.flops_per_token(), seconds=4, peak_bytes=peak)

    def properties(self, metric: str) -> dict[str, Any]:
        """See `Examination.properties`."""
        from residency.evaluate.compare import properties

        chance = {"chance": round(1 / self.params.choices, 4)} if metric == "choice-accuracy" else {}
        return properties(metric) | chance

    def compare(self, after: dict[str, Any], before: dict[str, Any], task: str, guard: str | None) -> dict[str, Any]:
        """See `Examination.compare`."""
        from residency.evaluate.compare import compare

        return compare(after, before, task, guard)

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases
        from residency.evaluate import cost

        facts = bases.facts(job.model)
        outcome = Outcome(
            extra={
                "task": None,
                "guard": None,
                "extra": {},
                "cost": {
                    "parameters": facts.parameters,
                    "bytes_on_disk": cost.folder_bytes(job.model),
                    "kv_bytes_per_token": facts.kv_bytes_per_token or None,
                },
            }
        )
        if facts.kind == "causal-lm":
            self._language_model(job, outcome)
        elif facts.kind == "classifier":
            self._classifier(job, outcome)
        return outcome

    def _language_model(self, job: Job, outcome: Outcome) -> None:
        from residency import bases, decoding, rows, tokens
        from residency.compat import fast_bf16
        from residency.evaluate import cost

        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        dtype = self.params.precision
        if dtype == "auto":
            dtype = "bfloat16" if fast_bf16(job.device) else "float32"
        model = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code, dtype=dtype)
        outcome.extra["cost"]["precision"] = dtype
        test = rows.load(job.test)
        metrics = [job.task["metric"]]
        # bits per byte costs nothing beside choice accuracy and says how well the answers themselves are known
        if job.task["metric"] == "choice-accuracy":
            metrics.append("bits-per-byte")
        scores = self._score(metrics, model, tokenizer, test, job, "task")
        outcome.extra["task"] = scores[metrics[0]]
        outcome.extra["extra"] = {
            name: {k: v for k, v in scores[name].items() if k != "items"} | self.properties(name)
            for name in metrics[1:]
        }
        if job.guard:
            metric = job.task["guard"]
            guard = rows.load(job.guard)
            outcome.extra["guard"] = self._score([metric], model, tokenizer, guard, job, "guard")[metric]
        if self.params.speed:
            prompt = tokens.encode(test[0], tokenizer).prompt
            with decoding.prepared(job.model, model) as options:
                speed = cost.measure_speed(model, prompt, new_tokens=self.params.new_tokens, **options)
            outcome.measured |= {
                "tokens_per_second": speed.tokens_per_second,
                "time_to_first_token_ms": speed.time_to_first_token_ms,
            }

    def _score(
        self, metrics: list[str], model: Any, tokenizer: Any, test: list[Any], job: Job, what: str
    ) -> dict[str, dict[str, Any]]:
        """Scores by metric; likelihood metrics share one pass over the items."""
        from residency import decoding
        from residency.evaluate import scoring

        settings: dict[str, Any] = {"resamples": self.params.resamples, "seed": job.seed}
        found: dict[str, dict[str, Any]] = {}
        if wanted := [m for m in metrics if m in LIKELIHOOD]:
            found |= scoring.by_likelihood(
                wanted,
                model,
                tokenizer,
                test,
                choices=self.params.choices,
                progress=job.progress,
                label=what,
                **settings,
            )
        if wanted := [m for m in metrics if m not in LIKELIHOOD]:
            # a cache that forgets is part of what is examined; a draft changes no answer
            held = decoding.has_budget(job.model)
            way: Any = decoding.prepared(job.model, model) if held else nullcontext({})
            with way as options:
                found |= scoring.by_generation(
                    wanted,
                    model,
                    tokenizer,
                    test,
                    max_new_tokens=self.params.max_answer_tokens,
                    progress=job.progress,
                    label=what,
                    **settings,
                    **options,
                )
        return found

    def _classifier(self, job: Job, outcome: Outcome) -> None:
        from residency import classifier, rows
        from residency.encoders import item_of
        from residency.evaluate import scoring

        predictor = classifier.load(job.model, job.device)
        for name, file in (("task", job.test), ("guard", job.guard)):
            if file is None:
                continue
            metric = job.task["metric" if name == "task" else "guard"]
            held = rows.load(Path(file))
            predictions = list(predictor.predict([item_of(r) for r in held], progress=job.progress))
            outcome.extra[name] = scoring.of_predictions(
                metric, held, predictions, resamples=self.params.resamples, seed=job.seed
            )
            if name == "task" and metric != "pearson":
                drawn = scoring.confusion_of_sets if metric == "multilabel-f1" else scoring.confusion
                outcome.figures.append(drawn([r.answer for r in held], predictions))

"""Recipe step `tune: {method: spcl}`: a classifier of texts or dialogue turns by prototypes of its classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from residency.errors import PlanError
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from residency.classifier import ClassHead
    from residency.objective import Objective
    from residency.rows import Row

RATES = {"encoder": 5e-5, "adapter": 1e-3}
"""Learning rates where none is given."""
TURNS = {"encoder": 8, "adapter": 0}
"""Turns of context where no number is given."""
TAU = {"spcl": 0.08, "supcon": 0.1}
"""Temperatures where none is given: the papers'."""


class SPCLStepParams(TrainParams):
    """Keys of `tune: {method: spcl}`."""

    loss: Literal["spcl", "supcon", "cross-entropy"] = "spcl"
    """Contrast with prototypes, contrast within the batch, or a linear head: the last two to compare with."""
    train: Literal["encoder", "adapter"] = "encoder"
    """Train the whole encoder, or a small network on the vectors of the frozen one, which is very much faster."""
    temperature: float | None = Field(None, gt=0)
    """τ of the contrast: the papers' 0.08 for spcl and 0.1 for supcon where none is given."""
    queue: int = Field(512, ge=1)
    """M, vectors kept of every class."""
    support: int = Field(64, ge=1)
    """K, vectors of the queue whose mean is a prototype; the class mean stands in until there are as many."""
    curriculum: Literal["none", "difficulty", "half"] = "none"
    """Train on half of the rows in every epoch, from easy to hard; on a random half; or on all."""
    official: bool = False
    """Do what the release does beyond its equations: queues that start anew every epoch and forget at random, and rows
    left out whose loss is below 0.3.
    """
    hidden: int = Field(256, ge=1)
    """Units inside the adapter."""
    pooling: Literal["auto", "mask", "mean", "first"] = "auto"
    """Where a row's vector is read; auto is the mask of a dialogue when the whole encoder is trained, and the mean over
    tokens otherwise.
    """
    turns: int | None = Field(None, ge=0)
    """Turns of a dialogue that are shown before the one in question. Where no number is given: the paper's 8 for the
    encoder and 0 for an adapter, as the mean over tokens of a frozen encoder gets worse by context (measured on MELD).
    """
    max_tokens: int = Field(128, ge=32)
    """Longer texts are cut at their end, dialogues at their beginning."""
    learning_rate: float = Field(RATES["encoder"], gt=0, le=1)
    """Peak learning rate of AdamW; a cosine to zero after the warm-up. Where none is given, 5e-5 for the encoder and
    1e-3 for an adapter.
    """
    epochs: float = Field(4.0, gt=0, le=1000)
    """Passes over the rows, or over half of them where the curriculum chooses."""
    batch: int = Field(32, ge=2)
    """Rows per forward pass; a contrast sees no others but the prototypes."""

    @property
    def context(self) -> int:
        """Turns shown before the one in question."""
        return TURNS[self.train] if self.turns is None else self.turns

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, given: Any) -> Any:
        adapter = isinstance(given, dict) and given.get("train") == "adapter"
        if adapter and not {"learning_rate", "learning-rate"} & set(given):
            return {**given, "learning-rate": RATES["adapter"]}
        return given

    @model_validator(mode="after")
    def _keys_are_read(self) -> SPCLStepParams:
        given = self.model_fields_set
        if self.loss != "spcl" and (lost := given & {"queue", "support", "curriculum", "official"}):
            raise ValueError(f"{_named(lost)} belong to loss: spcl, and `{self.loss}` does not read them")
        if self.loss == "cross-entropy" and self.temperature is not None:
            raise ValueError("`temperature` belongs to a contrast, and `cross-entropy` does not read it")
        if self.train != "adapter" and "hidden" in given:
            raise ValueError("`hidden` belongs to train: adapter")
        if self.support > self.queue:
            raise ValueError(f"support: {self.support} vectors cannot be drawn from a queue of {self.queue}")
        return self


def _named(keys: set[str]) -> str:
    return ", ".join(f"`{key}`" for key in sorted(keys))


class TuneSPCL(Step):
    """Train an encoder, or an adapter behind it, so that classes gather around prototypes; save it as a classifier."""

    Params = SPCLStepParams
    params: SPCLStepParams
    gives = frozenset({"model"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return {"cross-entropy": "label-loss"}.get(self.params.loss, self.params.loss)

    @property
    def title(self) -> str:
        """See `Step.title`."""
        name = {"spcl": "SPCL", "supcon": "SupCon"}.get(self.params.loss, self.params.loss)
        return f"tune · {name}" + (" on an adapter" if self.params.train == "adapter" else "")

    def tiny(self) -> TuneSPCL:
        """See `Step.tiny`."""
        return TuneSPCL(self.params.model_copy(update={"max_steps": 4, "batch": 4}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        p, model = self.params, state.model
        require_kind(state, ("text-encoder",), "tune: {method: spcl}")
        if not {"macro-f1", "exact-match"} & set(state.metrics[:1]):
            raise PlanError(f"classes cannot be scored by `{state.metrics[0]}`", hint="use metric: macro-f1")
        if 0 < model.max_tokens < p.max_tokens:
            raise PlanError(
                f"max-tokens: {p.max_tokens}, but the encoder has {model.max_tokens} positions",
                hint=f"max-tokens: {model.max_tokens} or less",
            )
        halved = p.loss == "spcl" and p.curriculum != "none" and p.max_steps is None
        rows = p.rows_seen(state) / (2 if halved else 1)
        looks = state.rows * (-(-p.epochs // 1) if p.loss == "spcl" else 0)
        per_row = model.flops_per_token() * min(state.tokens_per_row, p.max_tokens)
        whole = p.train == "encoder"
        flops = per_row * (3 * rows + looks + 2 * state.rows if whole else state.rows)
        peak = 16 * model.parameters + activation_bytes(state, p.batch) if whole else 8 * model.parameters
        after = replace(state, model=replace(model, kind="classifier"))
        return Forecast(after, flops=flops, peak_bytes=peak, notes=(f"{rows:,.0f} rows",))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import shutil

        import torch

        from residency import rows, train
        from residency.adapt import classfigures as figures
        from residency.adapt.spcl import SPCL
        from residency.rows import Refused

        p = self.params
        every = rows.load(job.rows)
        found = [r for r in every if r.label is not None and (r.dialogue or (r.text is not None and r.image is None))]
        left = {r.id for r in found}
        reason = "the row has no text or dialogue with one label"
        job.quarantine += [Refused(r.source, r.line, reason, r.prompt[:200]) for r in every if r.id not in left]
        classes = sorted({r.label or "" for r in found})
        if len(classes) < 2:
            raise PlanError(
                f"a classifier needs rows of at least two classes, found {len(classes)}",
                hint="rows of dialogue + label or text + label",
            )
        y = torch.tensor([classes.index(r.label or "") for r in found])
        work = job.scratch / "encoder"
        shutil.rmtree(work, ignore_errors=True)
        torch.manual_seed(job.seed)  # of the adapter and the heads
        part = _Whole(p, job, found, y) if p.train == "encoder" else _Adapter(p, job, found, y, work)
        loss = objective(p, len(classes), part.network.width)
        before = vectors(part.network, part.items, part.collate, job.device)
        log = train.fit(
            part.network,
            loss,
            part.items,
            p,
            pad=0,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="tuning",
            collator=part.collate,
        )
        after = vectors(part.network, part.items, part.collate, job.device)
        head = class_head(p, loss, classes, after, y)
        part.save(work)
        head.save(work, job.out / "model")
        shutil.rmtree(work)
        names = [r.id for r in found]
        sizes = y.bincount(minlength=len(classes)).tolist()
        right = (head(after).argmax(1) == y).float().mean().item()
        hard = [figures.difficulty(z, y, len(classes)) for z in (before, after)]
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(found),
                "refused": len(every) - len(found),
                "classes": len(classes),
                "fewest_per_class": min(sizes),
                "pooling": part.pooling,
                "trained_parameters": sum(q.numel() for q in part.network.parameters() if q.requires_grad),
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "difficulty_first": round(hard[0].mean().item(), 4),
                "difficulty_last": round(hard[1].mean().item(), 4),
                "training_accuracy": round(right, 4),
                "precision": log.precision,
            },
            figures=[
                train.loss_figure(log, "nats per row"),
                figures.balance(classes, sizes),
                figures.rows_and_means("Rows and class means before training", before, y, classes, names),
                figures.rows_and_means("Rows and class means after training", after, y, classes, names),
                figures.histogram(hard),
                *([figures.curriculum(loss.trace)] if isinstance(loss, SPCL) else []),
            ],
        )


# ------------------------------------------------------------------ what is trained


class _Whole:
    """The encoder itself, on token ids."""

    def __init__(self, p: SPCLStepParams, job: Job, found: Sequence[Row], y: Tensor) -> None:
        from transformers import AutoModel

        from residency import bases, dialogues, tokens
        from residency.compat import quiet_transformers
        from residency.trainable import TextFeatures

        self.tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        with quiet_transformers():
            model = AutoModel.from_pretrained(job.model, dtype="float32", trust_remote_code=job.remote_code)
        for name, parameter in model.named_parameters():
            if "pooler" in name:  # nobody reads its output
                parameter.requires_grad_(False)
        spoken = all(r.dialogue for r in found) and self.tokenizer.mask_token_id is not None
        if p.pooling == "mask" and not spoken:
            raise PlanError(
                "pooling: mask needs rows of dialogues, and an encoder with a mask token", hint="pooling: mean"
            )
        self.pooling: Any = ("mask" if spoken else "mean") if p.pooling == "auto" else p.pooling
        self.network = TextFeatures(model.to(job.device), self.pooling, self.tokenizer.mask_token_id)
        self.p = p
        ids = [
            dialogues.render(r.dialogue, self.tokenizer, p.max_tokens, p.context)
            if r.dialogue
            else self.tokenizer(r.text, truncation=True, max_length=p.max_tokens)["input_ids"] or [0]
            for r in found
        ]
        self.items = [tokens.Labelled(r.id, tuple(i), c) for r, i, c in zip(found, ids, y.tolist(), strict=True)]

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        from residency import tokens

        return tokens.collate_labelled(items, self.tokenizer.pad_token_id or 0)

    def save(self, folder: Path) -> None:
        from residency import bases

        bases.save(self.network.model, self.tokenizer, folder, "float32")
        _tell(folder, self.p, self.pooling)


class _Adapter:
    """A small network on the vectors of the frozen encoder, which are computed once."""

    def __init__(self, p: SPCLStepParams, job: Job, found: Sequence[Row], y: Tensor, work: Path) -> None:
        import shutil

        import torch

        from residency import encoders
        from residency.trainable import Adapter
        from residency.views import Item

        self.pooling: Any = "mean" if p.pooling == "auto" else p.pooling
        shutil.copytree(job.model, work, ignore=shutil.ignore_patterns("manifest.json"))
        _tell(work, p, self.pooling)  # so that rows are read here as they will be by whoever predicts
        encoder = encoders.load(work, job.device)
        frozen = torch.from_numpy(encoder.encode([encoders.item_of(r) for r in found], progress=job.progress))
        self.network = Adapter(encoder.width, p.hidden).standardise(frozen).to(job.device)
        self.items = [Item(i, r.id, c, frozen[i][None]) for i, (r, c) in enumerate(zip(found, y.tolist(), strict=True))]

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        from residency.views import collate_views

        return collate_views(items)

    def save(self, folder: Path) -> None:
        self.network.save(folder)


def _tell(folder: Path, p: SPCLStepParams, pooling: str) -> None:
    """Write into an encoder folder how its rows are read."""
    import json

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"residency_pooling": pooling, "residency_max_tokens": p.max_tokens, "residency_turns": p.context}
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")


def objective(p: SPCLStepParams, classes: int, width: int) -> Objective:
    """The loss that the keys name."""
    if p.loss == "cross-entropy":
        from residency.adapt.linear import LinearLoss

        return LinearLoss(classes, width)
    tau = p.temperature or TAU[p.loss]
    if p.loss == "supcon":
        from residency.adapt.contrast import SupCon

        return SupCon(classes, width, tau)
    from residency.adapt.spcl import SPCL

    return SPCL(classes, width, tau, p.queue, p.support, p.curriculum, p.official)


def vectors(
    network: nn.Module, items: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Any]], device: str
) -> Tensor:
    """Features [N, D] of all items, on the CPU, in their order; shorter ones first, so that little is padded."""
    import torch

    from residency.train import MODEL_INPUTS

    training = network.training
    network.eval()
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(items), 64):
            batch = collate([items[i] for i in order[start : start + 64]])
            given = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
            found.append(network(**given).features.float().cpu())
    network.train(training)
    return torch.cat(found)[torch.tensor(order).argsort()]


def class_head(p: SPCLStepParams, loss: Objective, classes: Sequence[str], z: Tensor, y: Tensor) -> ClassHead:
    """What predicts: the linear head that was trained, or the class means of the rows [N, D] as they now are."""
    import torch

    from residency.adapt.classbank import ClassBank
    from residency.classifier import ClassHead

    width = z.shape[1]
    if p.loss == "cross-entropy":
        from residency.adapt.linear import LinearLoss

        assert isinstance(loss, LinearLoss)
        weight, bias = (t.float().cpu() for t in loss.class_head())
    else:
        # cos / (2 τ) differs from (1 + cos) / (2 τ) by a constant: the probabilities of the loss itself
        tau = (p.temperature or TAU[p.loss]) * (2 if p.loss == "spcl" else 1)
        means = ClassBank(len(classes), width, normalise=False).of_means(z, y).vectors
        weight, bias = torch.nn.functional.normalize(means, dim=-1) / tau, torch.zeros(len(classes))
    return ClassHead(classes, weight, bias, torch.zeros(width), torch.ones(width), unit=True)

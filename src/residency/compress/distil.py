"""What `distill` does: load the teacher, make the student, train it, compare the two, save.

Language models and classifiers share the order of events and differ in their parts: rows become prompts and answers or
texts and labels, students lose layers and width or layers alone, the loss meets fused heads or outputs [B, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from residency import bases, rows, store, tokens
from residency.compat import fast_bf16
from residency.compress import crossvocabulary, layers, width
from residency.compress.closeness import KS, Closeness, compare, figure
from residency.compress.distillation import Distillation, HeadDistillation
from residency.compress.step_distill import DistillParams, check_classes, vocabularies
from residency.compress.teacher import CachedTeacher, LiveTeacher, record, with_ids
from residency.errors import DataError
from residency.lora import Lora, merge
from residency.step import Job, Outcome
from residency.train import MODEL_INPUTS, TrainLog, fit, loss_figure

SAMPLE = 16
"""Rows on which student and teacher are compared before and after the training."""


class _Distiller:
    """What both kinds share.

    Args:
        params: The step's keys.
        loss: The distillation loss.
        job: See `step.Job`.
    """

    per = "per row"

    def __init__(self, params: DistillParams, loss: Any, job: Job) -> None:
        self.params, self.loss, self.job = params, loss, job
        self.what = params.loss
        self.tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        self.facts: dict[str, Any] = {}
        self.figures: list[dict[str, Any]] = []

    def run(self) -> Outcome:
        """Everything, in order."""
        job = self.job
        items, refused = self.encode()
        job.quarantine += refused
        if not items:
            reason = refused[0].reason if refused else "the step was given none"
            raise DataError(f"there are no rows to train on; the first was refused: {reason}")
        teacher = self.teacher()
        student = self.student(teacher, items)
        before = _layers(teacher), _count(teacher)
        untrained = self.closeness(student, teacher, items)
        student.requires_grad_(True)
        student, log = self.train(student, teacher, items)
        self.compare(untrained, self.closeness(student, teacher, items))
        origin = job.base(self.params.student.base) if self.params.student.base else job.model
        bases.save(student, self.tokenizer, job.out / "model", bases.saved_dtype(origin))
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "layers": f"{before[0]} → {_layers(student)}",
                "parameters": f"{before[1]:,} → {_count(student):,}",
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            }
            | self.facts,
            figures=[*self.figures, loss_figure(log, f"{self.what} {self.per}")],
        )

    def encode(self) -> tuple[list[Any], list[Any]]:
        """Items and refused rows."""
        raise NotImplementedError("abstract: encode")

    def teacher(self) -> Any:
        """The current model."""
        raise NotImplementedError("abstract: teacher")

    def student(self, teacher: Any, items: Sequence[Any]) -> Any:
        """The untrained student."""
        raise NotImplementedError("abstract: student")

    def train(self, student: Any, teacher: Any, items: Sequence[Any]) -> tuple[Any, TrainLog]:
        """The trained student (a plain model), and the log."""
        raise NotImplementedError("abstract: train")

    def closeness(self, student: Any, teacher: Any, items: Sequence[Any]) -> Any:
        """How near the student is to the teacher, by measures that are not the loss."""
        raise NotImplementedError("abstract: closeness")

    def compare(self, before: Any, after: Any) -> None:
        """Put two of them into the facts and figures."""
        raise NotImplementedError("abstract: compare")

    def fit(self, model: Any, objective: Any, items: Sequence[Any]) -> TrainLog:
        """Train with the step's settings."""
        job = self.job
        return fit(
            model,
            objective,
            items,
            self.params,
            pad=self.tokenizer.pad_token_id,
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="distilling",
            collator=self.collate,
        )

    def batches(self, items: Sequence[Any], size: int = 8) -> list[dict[str, Any]]:
        """The first `calibrate` items, those of similar length together, in batches."""
        some = sorted(items[: self.params.student.calibrate], key=len)
        return [self.collate(some[i : i + size]) for i in range(0, len(some), size)]

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch of items."""
        raise NotImplementedError("abstract: collate")

    def shallower(self, model: Any, items: Sequence[Any]) -> Any:
        """The model with the chosen layers only; the figure of what each layer is worth."""
        p, job = self.params.student, self.job
        assert p.layers is not None
        batches, total = self.batches(items), _layers(model)
        what = "loss added by leaving the layer out, nats"
        half = self.params.precision != "float32" and fast_bf16(job.device)
        with torch.autocast(job.device, torch.bfloat16, enabled=half):
            if p.choose == "even":
                keep = sorted({round(i * (total - 1) / (p.layers - 1)) for i in range(p.layers)})
                importance, what = [0.0] * total, "nothing measured: evenly spaced"
            elif p.choose == "influence":
                measured = layers.block_influence(model, batches, progress=job.progress)
                keep = layers.choose_layers(measured, p.layers)
                importance, what = measured.tolist(), "block influence, 1 − cosine of input and output"
            elif p.choose == "loss":
                measured = layers.loss_increase(model, batches, progress=job.progress)
                keep, importance = layers.choose_layers(measured, p.layers), measured.tolist()
            else:
                keep, rounds = layers.prune_greedily(model, batches, p.layers, progress=job.progress)
                importance = rounds[0].tolist() if len(rounds) else [0.0] * total
        self.facts["dropped_layers"] = ", ".join(str(i) for i in range(total) if i not in keep)
        self.figures.append(
            {
                "kind": "bars",
                "title": "Layers kept and dropped",
                "x": [str(i) for i in range(total)],
                "y": [round(v, 5) for v in importance],
                "group": ["kept" if i in keep else "dropped" for i in range(total)],
                "xlabel": "layer",
                "ylabel": what,
            }
        )
        return layers.keep_layers(model, keep)


class LanguageModels(_Distiller):
    """Teacher and student are causal language models."""

    per = "per answer token"
    shared: int | None = None

    def encode(self) -> tuple[list[Any], list[Any]]:
        """See `_Distiller.encode`: with the tokenizer both models know."""
        p = self.params
        if p.student.base:
            relation = vocabularies(bases.facts(self.job.model), bases.facts(self.job.base(p.student.base)))
            self.facts["vocabularies"] = str(relation)
            self.shared = relation.shared or None
            if relation.smaller == "student":
                self.tokenizer = bases.load_tokenizer(self.job.base(p.student.base))  # trust was given to the base only
        return tokens.encode_all(rows.load(self.job.rows), self.tokenizer, p.max_tokens)

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `teacher.with_ids`."""
        return with_ids(items, self.tokenizer.pad_token_id)

    def teacher(self) -> Any:
        """See `_Distiller.teacher`."""
        return bases.load_causal_lm(self.job.model, self.job.device, remote_code=self.job.remote_code)

    def student(self, teacher: Any, items: Sequence[Any]) -> Any:
        """See `_Distiller.student`: another checkpoint, or the teacher with fewer layers and less width."""
        p, job = self.params.student, self.job
        if p.base:
            self.facts["student"] = p.base
            return bases.load_causal_lm(job.base(p.base), job.device)
        student = self.shallower(teacher, items) if p.layers and p.layers < _layers(teacher) else teacher
        if p.narrower:
            found = width.measure(student, self.batches(items), progress=job.progress)
            groups = student.config.num_key_value_heads
            student = width.narrow(student, found, width.Width(**p.width))
            self.figures.append(_channels(found, student, groups))
        return student

    def train(self, student: Any, teacher: Any, items: Sequence[Any]) -> tuple[Any, TrainLog]:
        """See `_Distiller.train`: whole, or through LoRA."""
        p = self.params
        trained: Any = Lora(rank=p.rank, targets=("all-linear",)).attach(student) if p.rank else student
        log = self.fit(trained, self.objective(teacher, items), items)
        if p.rank:
            probe = self.collate(items[:2])["input_ids"].to(self.job.device)
            trained, drift = merge(trained, probe)
            self.facts["merge_drift"] = float(f"{drift:.2e}")
        return trained, log

    def objective(self, teacher: Any, items: Sequence[Any]) -> Any:
        """What the student is trained on."""
        return Distillation(self.loss, self.voice(teacher, items), self.params.label_weight, self.shared)

    def voice(self, teacher: Any, items: Sequence[Any]) -> LiveTeacher | CachedTeacher:
        """The teacher as the objective hears it: live, or recorded once."""
        p, job = self.params, self.job
        live = LiveTeacher(teacher, self.shared)
        if p.teacher_cache == "none":
            return live
        folder = job.scratch / "teacher"
        address = store.address_of([p.teacher_cache, p.teacher_words, self.shared, [item.id for item in items]])
        record(
            live,
            items,
            folder,
            address=address,
            what=p.teacher_cache,
            k=p.teacher_words,
            pad=self.tokenizer.pad_token_id,
            device=job.device,
            progress=job.progress,
        )
        self.facts["teacher_cache_bytes"] = sum(f.stat().st_size for f in folder.glob("*.*32"))
        return CachedTeacher(folder, live.head if p.teacher_cache == "hidden" else None, job.device)

    def closeness(self, student: Any, teacher: Any, items: Sequence[Any]) -> Closeness | None:
        """See `compress.closeness`; over the answers of some training rows."""
        some = sorted(items[:SAMPLE], key=len)
        batches = [self.collate(some[i : i + 8]) for i in range(0, len(some), 8)]
        return compare(student, teacher, batches, self.job.device, self.shared)

    def compare(self, before: Closeness | None, after: Closeness | None) -> None:
        """See `_Distiller.compare`."""
        if before is None or after is None:
            return
        for k in KS:
            self.facts[f"overlap_at_{k}"] = f"{before.overlap[k]:.3f} → {after.overlap[k]:.3f}"
        self.facts["kl_to_teacher"] = f"{before.kl:.3f} → {after.kl:.3f} nats per answer token"
        self.figures.append(figure(before, after))


class Strangers(LanguageModels):
    """Teacher and student are language models with different tokenizers."""

    per = "per aligned token"

    def encode(self) -> tuple[list[Any], list[Any]]:
        """See `_Distiller.encode`: each row with both tokenizers."""
        p, job = self.params, self.job
        self.teacher_tokenizer = self.tokenizer
        self.tokenizer = bases.load_tokenizer(job.base(p.student.base))  # trust was given to the base only
        items, refused = crossvocabulary.encode_all(
            rows.load(job.rows), self.tokenizer, self.teacher_tokenizer, p.max_tokens
        )
        self.facts["vocabularies"] = "different"
        self.facts["aligned_tokens"] = sum(len(item.pairs) for item in items)
        return items, refused

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `crossvocabulary.collate`."""
        return crossvocabulary.collate(items, self.tokenizer.pad_token_id, self.teacher_tokenizer.pad_token_id)

    def objective(self, teacher: Any, items: Sequence[Any]) -> Any:
        """See `LanguageModels.objective`."""
        return crossvocabulary.CrossVocabulary(self.loss, teacher, self.params.label_weight)

    def closeness(self, student: Any, teacher: Any, items: Sequence[Any]) -> None:
        """Nothing is comparable word by word."""


class Classifiers(_Distiller):
    """Teacher and student are sequence classifiers, or regressors."""

    def encode(self) -> tuple[list[Any], list[Any]]:
        """See `_Distiller.encode`: labels by the teacher's classes."""
        from transformers import AutoConfig

        from residency.classifier import is_regression

        config = AutoConfig.from_pretrained(self.job.model, trust_remote_code=self.job.remote_code)
        if is_regression(config):
            self.what = "squared error to the teacher's number"
        else:
            check_classes(self.params.loss, self.loss, config.num_labels)
        classes = None if is_regression(config) else [config.id2label[i] for i in range(config.num_labels)]
        return tokens.encode_labelled(rows.load(self.job.rows), self.tokenizer, classes, self.params.max_tokens)

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `tokens.collate_labelled`."""
        return tokens.collate_labelled(items, self.tokenizer.pad_token_id)

    def teacher(self) -> Any:
        """See `_Distiller.teacher`."""
        return bases.load_classifier(self.job.model, self.job.device, remote_code=self.job.remote_code)

    def student(self, teacher: Any, items: Sequence[Any]) -> Any:
        """See `_Distiller.student`: fewer layers, or another encoder under a new head."""
        p, job = self.params.student, self.job
        if not p.base:
            return self.shallower(teacher, items)
        self.facts["student"] = p.base
        config = teacher.config
        head = {"id2label": config.id2label, "label2id": config.label2id, "problem_type": config.problem_type}
        torch.manual_seed(job.seed)  # of the new head
        return bases.load_classifier(job.base(p.base), job.device, **head)

    def train(self, student: Any, teacher: Any, items: Sequence[Any]) -> tuple[Any, TrainLog]:
        """See `_Distiller.train`."""
        objective = HeadDistillation(self.loss, teacher, self.params.label_weight)
        return student, self.fit(student, objective, items)

    def closeness(self, student: Any, teacher: Any, items: Sequence[Any]) -> float | None:
        """Share of training rows on which student and teacher choose the same class; None for numbers."""
        if teacher.config.num_labels == 1:
            return None
        agreed = seen = 0
        for start in range(0, len(items), 64):
            batch = self.collate(items[start : start + 64])
            given = {k: v.to(self.job.device) for k, v in batch.items() if k in MODEL_INPUTS}
            with torch.no_grad():
                said = [model.eval()(**given).logits.argmax(-1) for model in (student, teacher)]
            agreed, seen = agreed + int((said[0] == said[1]).sum()), seen + len(said[0])
        return agreed / max(1, seen)

    def compare(self, before: float | None, after: float | None) -> None:
        """See `_Distiller.compare`."""
        if before is not None and after is not None:
            self.facts["agreement_with_teacher"] = f"{before:.3f} → {after:.3f}"


def _channels(found: width.Importance, student: Any, before: int) -> dict[str, Any]:
    """How much of the measured importance the student keeps, per layer; `before` is how many key/value heads it had."""
    config = student.config
    F, H, G = config.intermediate_size, config.num_attention_heads, config.num_key_value_heads
    tiny = torch.finfo(torch.float64).tiny  # a layer that adds nothing has no importance to share
    ffn = found.ffn.sort(1, descending=True).values[:, :F].sum(1) / found.ffn.sum(1).clamp(min=tiny)
    kept = torch.stack([row[width.choose_heads(row, before, H, G)[1]].sum() for row in found.heads])
    heads = kept / found.heads.sum(1).clamp(min=tiny)
    x = list(range(len(ffn)))
    return {
        "kind": "lines",
        "title": "Measured importance that the student keeps",
        "xlabel": "layer",
        "ylabel": "share",
        "series": [
            {"name": "feed-forward channels", "x": x, "y": [round(float(v), 4) for v in ffn]},
            {"name": "query heads", "x": x, "y": [round(float(v), 4) for v in heads]},
        ],
    }


def _layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())

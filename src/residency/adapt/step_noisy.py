"""Recipe steps `tune: {method: fopro}` and `tune: {method: capro}`: few trusted rows, many noisy ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from residency.adapt.noisyparams import CAProParams, FoProParams, NoisyParams
from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import activation_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from residency.adapt.noisy import NoisyLabels
    from residency.rows import Row


class _TuneNoisy(Step):
    """What both steps do: read, train, judge every row, save a classifier and what became of the rows."""

    gives = frozenset({"model"})
    params: NoisyParams

    @property
    def title(self) -> str:
        """See `Step.title`."""
        name = {"fopro": "FoPro", "capro": "CAPro"}[self.method or ""]
        return f"tune · {name}" + (" on an adapter" if self.params.train == "adapter" else "")

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        return {"noisy": self.params.noisy}

    def tiny(self) -> Step:
        """See `Step.tiny`."""
        small = {"max_steps": 4, "batch": 4, "prototypes_from": 0.0, "clean_from": 0.0}
        small |= {"views": 1, "queue": 16, "middle": 16, "project": 8}
        return type(self)(self.params.model_copy(update=small))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        p, model = self.params, state.model
        require_kind(state, ("image-encoder", "text-encoder"), f"tune: {{method: {self.method}}}")
        if not {"macro-f1", "exact-match"} & set(state.metrics[:1]):
            raise PlanError(f"classes cannot be scored by `{state.metrics[0]}`", hint="use metric: macro-f1")
        if p.train == "encoder" and 0 < model.max_tokens < p.max_tokens:
            raise PlanError(
                f"max-tokens: {p.max_tokens}, but the encoder has {model.max_tokens} positions",
                hint=f"max-tokens: {model.max_tokens} or less",
            )
        noisy = state.source_rows.get("noisy", 0)
        every = replace(state, rows=state.rows + noisy)
        seen = p.rows_seen(every)
        per_row = model.flops_per_token() * (200 if model.kind == "image-encoder" else state.tokens_per_row)
        looks = {"adapter": (1 + p.views) * every.rows, "encoder": 4 * seen + 2 * every.rows}[p.train]
        small = 6 * 2 * model.hidden * (p.middle + p.hidden) * seen
        peak = (
            8 * model.parameters if p.train == "adapter" else 20 * model.parameters + activation_bytes(state, p.batch)
        )
        after = replace(state, model=replace(model, kind="classifier"))
        notes = (f"{state.rows:,} trusted rows and {state.source_rows.get('noisy', 0):,} noisy ones",)
        return Forecast(after, flops=per_row * looks + small, peak_bytes=peak, notes=notes)

    @abstractmethod
    def objective(self, classes: int, width: int, network: nn.Module) -> NoisyLabels:
        """The loss."""

    def chosen(self, job: Job, part: Any, found: Sequence[Row], classes: Sequence[str], y: Tensor) -> Tensor | None:
        """Noisy rows to trust [N] bool, before training."""
        return None

    def shared(self) -> dict[str, Any]:
        """Arguments of `NoisyLabels` by the keys."""
        names = ("project", "middle", "queue", "temperature", "alpha", "relabel", "keep", "momentum", "polish")
        return {name: getattr(self.params, name) for name in (*names, "instance", "official")}

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import json
        import shutil

        import torch

        from residency import rows, train
        from residency.adapt import noisyfigures as figures
        from residency.adapt.ledger import ledger
        from residency.adapt.noisydata import Frozen, WholeImages, WholeTexts, copy_base
        from residency.classifier import ClassHead

        p = self.params
        trusted, noisy = self._rows(job)
        found = [*trusted, *noisy]
        pictures = found[0].image is not None
        classes = sorted({r.label or "" for r in found})
        y = torch.tensor([classes.index(r.label or "") for r in found])
        clean = torch.arange(len(found)) < len(trusted)
        work = copy_base(job.model, job.scratch / "encoder")
        torch.manual_seed(job.seed)  # of the adapter and the heads
        part: Frozen | WholeImages | WholeTexts
        if p.train == "adapter":
            keys = {"views": p.views, "mirror": p.mirror, "hidden": p.hidden, "seed": job.seed}
            part = Frozen(work, found, y, clean, device=job.device, progress=job.progress, **cast("Any", keys))
        elif pictures:
            part = WholeImages(work, mirror=p.mirror, device=job.device)
        else:
            part = WholeTexts(work, max_tokens=p.max_tokens, device=job.device, remote_code=job.remote_code)
        part.set(found, y, clean)
        picked = self.chosen(job, part, found, classes, y)
        believed = clean if picked is None else clean | picked
        part.set(found, y, believed)
        loss = self.objective(len(classes), part.width, part.network)
        before = _projected(loss, part.vectors())
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
        loss.cpu().eval()
        verdict = loss.judge(part.vectors(), y, believed)
        names = [r.id for r in found]
        fates = ledger(verdict, y, believed, ids=names, classes=classes, relabel=p.relabel, keep=p.keep)
        part.save(work)
        width = part.width
        head = ClassHead(classes, *loss.class_head(), torch.zeros(width), torch.ones(width), unit=True)
        head.save(work, job.out / "model")
        shutil.rmtree(work)
        with (job.out / "ledger.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(f.to_json(), ensure_ascii=False) + "\n" for f in fates)
        cleaned = [replace(r, label=f.now) for r, f in zip(found, fates, strict=True) if f.now]
        rows.write(job.out / "cleaned.jsonl", cleaned)
        counts = {what: sum(f.what == what for f in fates) for what in ("kept", "relabelled", "dropped")}
        labels = [f.now or "dropped" for f in fates]
        first = loss.bank.__class__(len(classes), before.shape[1]).of_means(before[believed], y[believed]).vectors
        return Outcome(
            gives={"model": "model"},
            summary={
                "trusted_rows": len(trusted),
                "noisy_rows": len(noisy),
                **({} if picked is None else {"chosen_by_caption": int((picked & ~clean).sum())}),
                "classes": len(classes),
                **counts,
                "trained_parameters": sum(
                    q.numel() for m in (part.network, loss) for q in m.parameters() if q.requires_grad
                ),
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            },
            figures=[
                figures.examples(fates, found),
                figures.changes(fates, classes),
                figures.epochs(loss.trace),
                figures.plane(
                    "Rows as labelled before training, and means of trusted rows",
                    before,
                    first,
                    [classes[c] for c in y.tolist()],
                    classes,
                    names,
                ),
                figures.plane(
                    "Rows as labelled after training, and prototypes",
                    verdict.z,
                    loss.bank.vectors[: len(classes)],
                    labels,
                    classes,
                    names,
                ),
                figures.reliability(verdict.classifier, fates, classes),
                train.loss_figure(log, "nats per row"),
            ],
        )

    def _rows(self, job: Job) -> tuple[list[Row], list[Row]]:
        """Trusted and noisy rows of the encoder's kind, with one label each; what is left out goes to quarantine."""
        import json

        from residency import rows
        from residency.bases import is_vision
        from residency.rows import Refused

        config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
        what = "image" if is_vision(config) else "text"
        known: dict[bytes, str] = {}
        ids: set[str] = set()
        parts: list[list[Row]] = []
        for some in (rows.load(job.rows), job.stream("noisy")):
            kept = []
            for row in some:
                reason = ""
                if row.label is None or getattr(row, what) is None or (what == "text" and row.image is not None):
                    reason = f"the row has no {what} with one label"
                elif row.key() in known and parts:
                    reason = f"the same row as the trusted row {known[row.key()]}"
                if reason:
                    job.quarantine.append(Refused(row.source, row.line, reason, row.prompt[:200]))
                    continue
                kept.append(replace(row, id=f"noisy:{row.id}") if row.id in ids else row)
            known |= {row.key(): row.id for row in kept}
            ids |= {row.id for row in kept}
            parts.append(kept)
        trusted, noisy = parts
        if not noisy:
            raise DataError(
                "there are no noisy rows to learn from", where=self.params.noisy, hint="see quarantine.jsonl"
            )
        if len({r.label for r in (*trusted, *noisy)}) < 2:
            raise DataError("a classifier needs rows of at least two classes", where=self.params.noisy)
        return trusted, noisy


class TuneFoPro(_TuneNoisy):
    """Few trusted rows lead the training on many noisy ones; see `fopro.py`."""

    Params = FoProParams
    params: FoProParams

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "fopro"

    def tiny(self) -> Step:
        """See `Step.tiny`."""
        step = super().tiny()
        return type(self)(step.params.model_copy(update={"relation_from": 0.0}))

    def objective(self, classes: int, width: int, network: nn.Module) -> NoisyLabels:
        """See `_TuneNoisy.objective`."""
        from residency.adapt.fopro import FoPro

        p = self.params
        starts = (p.prototypes_from, p.clean_from, p.relation_from)
        return FoPro(classes, width, network, starts=starts, margin=p.margin, sigma=p.sigma, **self.shared())


class TuneCAPro(_TuneNoisy):
    """Captions choose whom to trust among noisy rows; see `capro.py`."""

    Params = CAProParams
    params: CAProParams

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "capro"

    def sources(self) -> dict[str, str]:
        """See `Step.sources`."""
        texts = {"texts": self.params.texts} if isinstance(self.params.texts, str) else {}
        return super().sources() | texts

    def bases(self) -> dict[str, str]:
        """See `Step.bases`."""
        return {"text_encoder": self.params.text_encoder} if self.params.text_encoder else {}

    def tiny(self) -> Step:
        """See `Step.tiny`."""
        step = super().tiny()
        reader = "tiny-text-encoder" if self.params.text_encoder else None
        small = {"text_encoder": reader, "select": 2, "neighbours": 4, "smooth": 2}
        return type(self)(step.params.model_copy(update=small))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        reader = state.others["text_encoder"] if self.params.text_encoder else state.model
        if reader.kind != "text-encoder":
            raise PlanError(
                f"captions need a text-encoder, and `{self.params.text_encoder or 'the base'}` is a {reader.kind}",
                hint="text-encoder: all-minilm-l6-v2, or a sentence encoder of your own",
            )
        forecast = super().plan(state)
        captions = reader.flops_per_token() * 20 * state.source_rows.get("noisy", 0)
        return replace(forecast, flops=forecast.flops + captions)

    def objective(self, classes: int, width: int, network: nn.Module) -> NoisyLabels:
        """See `_TuneNoisy.objective`."""
        from residency.adapt.capro import CAPro

        p = self.params
        return CAPro(classes, width, network, starts=(p.prototypes_from, p.clean_from), beta=p.beta, **self.shared())

    def chosen(self, job: Job, part: Any, found: Sequence[Row], classes: Sequence[str], y: Tensor) -> Tensor:
        """The K rows per class whose smoothed captions are nearest to the class's text."""
        import torch

        from residency import encoders
        from residency.adapt.neighbours import operator, smooth
        from residency.adapt.textmatch import match

        p = self.params
        texts = p.texts if isinstance(p.texts, dict) else {r.label: r.text for r in job.stream("texts") if r.text}
        if strange := sorted(set(texts) - set(classes), key=str):
            raise DataError(
                f"there is a text about `{strange[0]}`, which is no class", hint=f"classes: {', '.join(classes)}"
            )
        reader = encoders.load(job.base(p.text_encoder) if p.text_encoder else job.model, job.device)
        known = torch.tensor([bool(r.text) for r in found])
        if not bool(known.any()):
            raise DataError(
                "no row has a caption, and captions choose whom to trust", where=p.noisy, hint="tune: {method: fopro}"
            )
        said = reader.encode([r.text for r in found if r.text], progress=job.progress)
        captions = torch.zeros(len(found), reader.width)
        captions[known] = torch.from_numpy(said)
        about = torch.from_numpy(reader.encode([texts.get(c, c) for c in classes]))
        if p.smooth:
            looks = part.vectors()
            weight: Any = "distance" if p.official else "similarity"
            averages = operator(looks, p.neighbours, p.smooth, weight=weight)
            captions, known = smooth(averages, captions, self_weight=p.self_weight, known=known)
        return match(captions, about, y, p.select, known=known).chosen.any(1)


def _projected(loss: NoisyLabels, features: Tensor) -> Tensor:
    """Rows [N, D] in the space of prototypes [N, d]."""
    import torch

    from residency.objective import Outputs

    with torch.no_grad():
        return loss.project(loss.unit(Outputs(features=features))).float()

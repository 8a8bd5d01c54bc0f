"""Classifiers of label sets that look at a text once per label: encoder, label prompts and one prototype per label.

A text x is seen under label n as a unit vector h_n(x) [D], in one of three forms:

    prompt      the template with {text} and {label} is encoded; h_n is the state at {mask}, or the mean over the
                sentence's own tokens ("sentence"): C passes per text
    attention   x is encoded once into token states v_t; h_n = Σ_t a_nt v_t with a_nt = softmax_t(β cos(e_n, v_t)),
                e_n the vector of the label's name and description, β learned: one pass per text
    plain       h_n = mean_t v_t for every n: one pass per text, no label

and scored against the label's prototype c_n:

    z_n = s · (m − ‖h_n(x) − c_n‖²),        p = softmax_n(z) ("softmax"), or p_n = σ(z_n) ("sigmoid")

with scale s and margin m learned (softmax does not see m). β = 0 is the plain form, exactly. A label is predicted where
p_n reaches the classifier's threshold; where every row has a label (`least_one`), the best one always.

Softmax over negative squared distances is that of prototypical networks (Snell, Swersky, Zemel, NeurIPS 2017, arXiv
1703.05175); the label prompt follows Guan, Zhu, Bai, Wang, "Label-Guided Prompt for Multi-label Few-shot Aspect
Category Detection", 2024, arXiv 2407.20673, of which only the abstract was readable: template, pooling, unit length and
the attention form are our choice. How the encoder and the prototypes are learned stands in `adapt/labelprompts.py`.

Cost: an encoder pass per text, or C of them for the prompt form; C × D numbers beside the encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from residency import multilabel
from residency.errors import DataError
from residency.labeltemplates import PLAIN, Marked, Pool, Prompter, collate_marked
from residency.progress import Progress

Form = Literal["prompt", "attention", "plain"]
Link = Literal["softmax", "sigmoid"]


class LabelView(nn.Module):
    """The encoder and how it looks at a text under a label; what `adapt/labelprompts.py` trains.

    Args:
        encoder: An `AutoModel` with `last_hidden_state`.
        form: See the module.
        scale: s at first, kept positive.
        sharpness: β at first.
        margin: m at first.
        chunk: Sequences per encoder call; they are sorted by length, so that little is padded.
    """

    def __init__(
        self,
        encoder: Any,
        form: Form = "attention",
        *,
        scale: float = 15.0,
        sharpness: float = 15.0,
        margin: float = 1.0,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        self.encoder, self.form, self.chunk = encoder, form, chunk
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.margin = nn.Parameter(torch.tensor(float(margin)))
        self.sharpness = nn.Parameter(torch.tensor(float(sharpness)), requires_grad=form == "attention")

    @property
    def device(self) -> torch.device:
        """Where the encoder stands."""
        return next(self.encoder.parameters()).device

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token states [P, T, D], float32, of padded sequences [P, T]; zero behind the longest of a chunk."""
        lengths = attention_mask.sum(1)
        order = lengths.argsort(descending=True)
        found = []
        for rows in order.split(self.chunk):
            width = int(lengths[rows].max()) if len(rows) else 1
            hidden = self.encoder(
                input_ids=input_ids[rows, :width], attention_mask=attention_mask[rows, :width]
            ).last_hidden_state
            found.append(nn.functional.pad(hidden.float(), (0, 0, 0, input_ids.shape[1] - width)))
        return torch.cat(found)[order.argsort()]

    def mean(self, states: Tensor, pool: Tensor) -> Tensor:
        """Unit vectors [P, D]: the mean of the pooled tokens."""
        weight = pool[..., None].to(states.dtype)
        return nn.functional.normalize((states * weight).sum(-2) / weight.sum(-2).clamp_min(1), dim=-1)

    def attend(self, states: Tensor, pool: Tensor, labels: Tensor) -> Tensor:
        """Unit vectors [P, N, D] of states [P, T, D] under label vectors [P, N, D] (or [1, N, D])."""
        near = nn.functional.normalize(labels, dim=-1) @ nn.functional.normalize(states, dim=-1).transpose(-1, -2)
        weights = (self.sharpness * near).masked_fill(~pool[:, None], -torch.inf).softmax(-1)
        return nn.functional.normalize(weights @ states, dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pool: Tensor,
        support: Tensor,
        query: Tensor,
        named: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors of episodes, all of whose sequences are encoded together.

        Args:
            input_ids: [P, T].
            attention_mask: [P, T].
            pool: Which tokens are averaged, bool [P, T].
            support: Which sequence is shot k of class n: [E, N, K].
            query: Which sequence is query q under class n: [E, Q, N] for prompts; [E, Q, 1] where it does not matter.
            named: Which sequence is the name (and description) of class n: [E, N]; None when nothing reads it.

        Returns:
            h of the shots [E, N, K, D], h of the queries [E, Q, N or 1, D], label vectors [E, N, D] or None.
        """
        states = self.states(input_ids, attention_mask)
        vectors = self.mean(states, pool)
        e = None if named is None else vectors[named]
        if self.form != "attention":
            return vectors[support], vectors[query], e
        assert e is not None
        E, N, K = support.shape
        Q = query.shape[1]
        flat = support.reshape(-1)
        shots = self.attend(states[flat], pool[flat], e[:, :, None].expand(E, N, K, -1).reshape(E * N * K, 1, -1))
        asked = query[:, :, 0].reshape(-1)
        queries = self.attend(states[asked], pool[asked], e[:, None].expand(E, Q, N, -1).reshape(E * Q, N, -1))
        return shots.reshape(E, N, K, -1), queries.reshape(E, Q, N, -1), e

    def logits(self, queries: Tensor, prototypes: Tensor) -> Tensor:
        """Z [..., N] of h [..., N or 1, D] against prototypes [N, D] (broadcast)."""
        distance = (queries - prototypes).square().sum(-1)
        return self.log_scale.exp() * (self.margin - distance)

    @torch.no_grad()
    def vectors(
        self, texts: Sequence[Marked], pad: int, labels: Tensor | None = None, batch: int = 64
    ) -> Iterator[Tensor]:
        """Vectors of texts in their order, batch by batch: [b, 1, D], or [b, C, D] under label vectors [C, D]."""
        for start in range(0, len(texts), batch):
            given = {k: v.to(self.device) for k, v in collate_marked(texts[start : start + batch], pad).items()}
            states = self.states(given["input_ids"], given["attention_mask"])
            if self.form == "attention" and labels is not None:
                yield self.attend(states, given["pool"], labels[None])
            else:
                yield self.mean(states, given["pool"])[:, None]


def probabilities(logits: Tensor, link: Link) -> Tensor:
    """Scores of labels [..., N]: softmax shares 1 among them, sigmoid judges each alone."""
    return logits.softmax(-1) if link == "softmax" else logits.sigmoid()


@dataclass
class Head:
    """What a classifier of label sets holds beside its encoder.

    Args:
        classes: Label names.
        said: Label name → how prompts call it.
        prototypes: c [C, D].
        labels: e [C, D], read by the attention form.
        threshold: A label is predicted where its score reaches it.
        template, pool, max_tokens: Of the `Prompter`.
        link: Softmax or sigmoid.
        least_one: Whether every text has a label, so that the best one is always said.
        facts: Further notes, saved along (descriptions and their sources).
    """

    classes: list[str]
    said: dict[str, str]
    prototypes: Tensor
    labels: Tensor
    threshold: float
    template: str = PLAIN
    pool: Pool = "sentence"
    max_tokens: int = 128
    link: Link = "softmax"
    least_one: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


class PromptedClassifier:
    """Texts in, label sets out.

    Args:
        view: Encoder and scalars.
        tokenizer: The encoder's.
        head: Prototypes, threshold, template.
    """

    def __init__(self, view: LabelView, tokenizer: Any, head: Head) -> None:
        self.view, self.tokenizer, self.head = view.eval(), tokenizer, head
        self.prompter = Prompter(tokenizer, head.template, head.pool, head.max_tokens)

    @property
    def classes(self) -> list[str]:
        """The labels, in the order of the scores' columns."""
        return self.head.classes

    def seen(self, items: Sequence[str], batch: int = 64) -> Iterator[Tensor]:
        """Vectors of texts under every label, batch by batch: [b, C, D], or [b, 1, D] in the plain form."""
        if strange := [t for t in items if not isinstance(t, str)]:
            raise DataError("label prompts read texts, and were given something else", where=repr(strange[0])[:60])
        pad = self.tokenizer.pad_token_id or 0
        if self.view.form != "prompt":
            yield from self.view.vectors([self.prompter(t) for t in items], pad, self.head.labels, batch)
            return
        C = len(self.classes)
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            pairs = [self.prompter(text, self.head.said[c]) for text in part for c in self.classes]
            found = torch.cat([*self.view.vectors(pairs, pad, batch=max(batch, 128))])
            yield found.reshape(len(part), C, -1)

    def scores(self, items: Sequence[str], batch: int = 64, progress: Progress | None = None) -> np.ndarray:
        """Scores [N, C] of texts, float32."""
        found = [np.zeros((0, len(self.classes)), np.float32)]
        with (progress or Progress()).task("classifying", len(items)) as advance:
            for h in self.seen(items, batch):
                found.append(self.score(h).cpu().numpy())
                advance(len(h))
        return np.concatenate(found)

    @torch.no_grad()
    def score(self, h: Tensor) -> Tensor:
        """Scores [b, C] of vectors that `seen` gave."""
        return probabilities(self.view.logits(h, self.head.prototypes), self.head.link)

    def predict(self, items: Sequence[str], batch: int = 64, progress: Progress | None = None) -> Iterator[str]:
        """The label set of each text, sorted and joined by " | ", in the order given."""
        with (progress or Progress()).task("classifying", len(items)) as advance:
            for h in self.seen(items, batch):
                scores = self.score(h).cpu().numpy()
                for row in multilabel.decide(scores, self.head.threshold, least_one=self.head.least_one):
                    yield multilabel.join(c for c, yes in zip(self.classes, row, strict=True) if yes)
                advance(len(h))

    def save(self, folder: Path) -> None:
        """Write encoder, tokenizer and head as one folder that `load` and `classifier.load` read."""
        from safetensors.torch import save_file

        from residency import bases

        bases.save(self.view.encoder, self.tokenizer, folder, "float32")
        scalars = {name: getattr(self.view, name).detach() for name in ("log_scale", "margin", "sharpness")}
        tensors = {"prototypes": self.head.prototypes, "labels": self.head.labels} | scalars
        save_file({k: v.float().cpu().contiguous() for k, v in tensors.items()}, folder / "prompted.safetensors")
        said: dict[str, Any] = {k: v for k, v in vars(self.head).items() if k not in ("prototypes", "labels")}
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"residency_kind": "classifier", "residency_prompted": said | {"form": self.view.form}}
        file.write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")


def load(folder: Path, device: str = "cpu") -> PromptedClassifier:
    """Read back what `PromptedClassifier.save` wrote.

    Raises:
        DataError: When the folder holds no such classifier.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "residency_prompted" not in config:
        raise DataError(
            "this folder holds no label prompts", where=str(folder), hint="tune: {method: label-prompts} makes them"
        )
    encoder, tokenizer = load_encoder(folder, device)
    tensors = load_file(folder / "prompted.safetensors", device=device)
    said: Mapping[str, Any] = config["residency_prompted"]
    view = LabelView(encoder, said["form"])
    with torch.no_grad():
        for name in ("log_scale", "margin", "sharpness"):
            getattr(view, name).copy_(tensors[name])
    more = {k: v for k, v in said.items() if k != "form"}
    head = Head(prototypes=tensors["prototypes"], labels=tensors["labels"], **more)
    return PromptedClassifier(view.to(device), tokenizer, head)


def load_encoder(folder: Path, device: str = "cpu", *, remote_code: bool = False) -> tuple[Any, Any]:
    """A text encoder in float32 and its tokenizer."""
    from transformers import AutoModel

    from residency import bases
    from residency.compat import quiet_transformers

    with quiet_transformers():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote_code).to(device)
    return model, bases.load_tokenizer(folder, remote_code=remote_code)

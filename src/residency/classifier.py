"""Classifiers as folders: a frozen encoder with a fitted head, or a fine-tuned transformers checkpoint.

A probe's folder holds the encoder's own files, `probe.safetensors` (weight [C, D], bias [C], mean and deviation [D])
and a config that names the classes. A fine-tuned classifier is an ordinary `AutoModelForSequenceClassification`
checkpoint: `config.id2label` names its classes, and one output without classes is a regression.

    for label in load(folder).predict(texts): ...
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from residency import encoders
from residency.errors import DataError
from residency.progress import Progress

_OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "roberta-prelayernorm")
TENSORS = ("weight", "bias", "mean", "deviation")


class ClassHead(nn.Module):
    """A fitted head: features [N, D] → log-probabilities [N, C].

    Args:
        classes: Class names.
        weight: [C, D].
        bias: [C].
        mean, deviation: [D], taken off the features and divided by (0 and 1 where there is nothing to standardise).
        unit: Scale features to length 1 instead.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, classes: Sequence[str], weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor, unit: bool
    ) -> None:
        super().__init__()
        self.classes = list(classes)
        self.unit = unit
        for name, tensor in zip(TENSORS, (weight, bias, mean, deviation), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, features: Tensor) -> Tensor:
        """Log-probabilities [N, C] of features [N, D]."""
        z = nn.functional.normalize(features, dim=-1) if self.unit else (features - self.mean) / self.deviation
        return nn.functional.linear(z, self.weight, self.bias).log_softmax(-1)

    def predict(self, features: np.ndarray) -> list[str]:
        """The likeliest class of each row of [N, D]."""
        with torch.no_grad():
            best = self(torch.as_tensor(features, dtype=torch.float32)).argmax(-1)
        return [self.classes[i] for i in best.tolist()]

    def save(self, encoder: Path, folder: Path) -> None:
        """Write encoder and head as one folder."""
        from safetensors.torch import save_file

        shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("manifest.json", "probe.*"))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "probe.safetensors")
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"residency_kind": "classifier", "residency_probe": {"classes": self.classes, "unit": self.unit}}
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ClassHead:
        """Read the head of a folder that `save` wrote.

        Raises:
            DataError: When the folder holds no classifier.
        """
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "residency_probe" not in config:
            raise DataError(
                "this folder holds no classifier", where=str(folder), hint="tune: {method: probe} makes one"
            )
        tensors = load_file(folder / "probe.safetensors")
        said = config["residency_probe"]
        weight, bias, mean, deviation = (tensors[name] for name in TENSORS)
        return cls(said["classes"], weight, bias, mean, deviation, said["unit"])


class Predictor(Protocol):
    """What an examination needs of a classifier."""

    def predict(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> Iterator[str]:
        """The likeliest class of each item, or the predicted number as text."""
        ...


def load(folder: Path, device: str = "cpu") -> Predictor:
    """Load a folder of either kind, or one of label prompts (`residency.prompted`)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "residency_prompted" in config:
        from residency import prompted

        return prompted.load(folder, device)
    return Classifier(folder, device) if "residency_probe" in config else FineTuned(folder, device)


class Classifier:
    """Encoder and head together: items in, labels out.

    Args:
        folder: What `ClassHead.save` wrote.
        device: Where the encoder computes.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.head = ClassHead.load(folder)
        self.encoder = encoders.load(folder, device)

    def predict(self, items: Sequence[Any], batch: int = 64, progress: Progress | None = None) -> Iterator[str]:
        """The likeliest class of each item (text, or image path, data: URI or array), batch by batch."""
        with (progress or Progress()).task("classifying", len(items)) as advance:
            for start in range(0, len(items), batch):
                part = items[start : start + batch]
                yield from self.head.predict(self.encoder.encode(part, batch))
                advance(len(part))


class FineTuned:
    """A fine-tuned sequence classifier: texts in, labels out.

    Args:
        folder: A checkpoint that `AutoModelForSequenceClassification` reads.
        device: Where it computes.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from residency import bases

        self.model = bases.load_classifier(folder, device)
        self.tokenizer = bases.load_tokenizer(folder)
        self.regression = is_regression(self.model.config)
        self.max_tokens = min(self.tokenizer.model_max_length, positions(self.model.config))

    @torch.no_grad()
    def predict(self, items: Sequence[str], batch: int = 64, progress: Progress | None = None) -> Iterator[str]:
        """The likeliest class of each text, or the predicted number, in the order given."""
        with (progress or Progress()).task("classifying", len(items)) as advance:
            for start in range(0, len(items), batch):
                texts = list(items[start : start + batch])
                given = self.tokenizer(
                    texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
                )
                logits = self.model(**given.to(self.model.device)).logits.float()
                if self.regression:
                    yield from (f"{value:.9g}" for value in logits[:, 0].tolist())
                else:
                    yield from (self.model.config.id2label[i] for i in logits.argmax(-1).tolist())
                advance(len(texts))


def positions(config: Any) -> int:
    """How many tokens an encoder can read: the RoBERTa family numbers them from behind its padding id."""
    found = getattr(config, "max_position_embeddings", None) or 10**9
    offset = (config.pad_token_id or 0) + 1 if getattr(config, "model_type", "") in _OFFSET else 0
    return int(found - offset)


def is_regression(config: Any) -> bool:
    """Whether a sequence classifier's config says that it predicts a number."""
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)

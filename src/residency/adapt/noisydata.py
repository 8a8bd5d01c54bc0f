"""Labelled rows as what a noisy-label method trains on: cached views of a frozen encoder, or pixels and texts.

A row is shown as it is, and changed at random for the instance contrast: images are cropped, turned and recoloured
(`images.changed`), texts lose a fifth of their words (our choice; the papers change images only). `Frozen` encodes a
row's views once; `WholeImages` and `WholeTexts` change it anew for every batch, as a function of the batch's rows, so
that a resumed training sees what it would have seen.

Sources: our choices. Cost: `Frozen` encodes N × (1 + V) rows once; the others decode and change a row per step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from residency import encoders
from residency.progress import Progress
from residency.rows import Row
from residency.views import Item, collate_views, generator_of

DROPPED = 0.2
"""Share of the words that a changed text loses."""


class Part(Protocol):
    """What is trained, and on what."""

    network: nn.Module
    items: list[Any]
    width: int

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch of items."""
        ...

    def vectors(self) -> Tensor:
        """Features [N, D] of all items as they are now, on the CPU, in their order."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained into a copy of the encoder's folder."""
        ...


class Frozen:
    """An adapter on cached views of the frozen encoder.

    Args:
        base: The encoder's folder.
        rows: In their order.
        labels: [N] classes.
        clean: [N] bool.
        views: V, changed views per row.
        mirror: Whether images may be mirrored.
        hidden: Of the adapter.
        seed: Of the views.
        device: Where the encoder computes.
        progress: Where progress goes.
    """

    def __init__(
        self,
        base: Path,
        rows: Sequence[Row],
        labels: Tensor,
        clean: Tensor,
        *,
        views: int,
        mirror: bool,
        hidden: int,
        seed: int,
        device: str,
        progress: Progress | None = None,
    ) -> None:
        from residency.trainable import Adapter

        encoder = encoders.load(base, device)
        things = [encoders.item_of(row) for row in rows]
        found = [encoder.encode(things, progress=progress)]
        generator = np.random.default_rng(seed)
        pictures = any(row.image is not None for row in rows)
        for _ in range(views):
            changed = [
                another_image(thing, generator, mirror) if pictures else another_text(thing, generator)
                for thing in things
            ]
            found.append(encoder.encode(changed, progress=progress))
        self.features = torch.from_numpy(np.stack(found, 1))  # [N, 1 + V, D]
        self.width = encoder.width
        self.network = Adapter(encoder.width, hidden).standardise(self.features[:, 0]).to(device)
        self.device = device
        self.set(rows, labels, clean)

    def set(self, rows: Sequence[Row], labels: Tensor, clean: Tensor) -> None:
        """Say again which rows are trusted."""
        self.items = [
            Item(i, row.id, int(y), self.features[i], bool(c))
            for i, (row, y, c) in enumerate(zip(rows, labels.tolist(), clean.tolist(), strict=True))
        ]

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `Part`."""
        return collate_views(items)

    def vectors(self) -> Tensor:
        """See `Part`."""
        training = self.network.training
        self.network.eval()
        with torch.no_grad():
            found: Tensor = self.network(self.features[:, 0].to(self.device)).features.float().cpu()
        self.network.train(training)
        return found

    def save(self, folder: Path) -> None:
        """See `Part`."""
        self.network.save(folder)


@dataclass(frozen=True)
class Shown:
    """A row as it is.

    Args:
        index: Its place.
        id: Of the row.
        label: Class.
        thing: Image or text.
        clean: Whether its label is trusted.
        length: Of the text in tokens; 1 for images.
    """

    index: int
    id: str
    label: int
    thing: Any
    clean: bool
    length: int = 1

    def __len__(self) -> int:
        return self.length


class _Whole:
    """What images and texts have in common."""

    network: nn.Module
    width: int
    device: str

    def set(self, rows: Sequence[Row], labels: Tensor, clean: Tensor) -> None:
        """Say again which rows are trusted."""
        self.items = [
            Shown(i, row.id, int(y), thing := encoders.item_of(row), bool(c), self.length(thing))
            for i, (row, y, c) in enumerate(zip(rows, labels.tolist(), clean.tolist(), strict=True))
        ]

    def length(self, thing: Any) -> int:
        return 1

    def inputs(self, things: Sequence[Any]) -> dict[str, Tensor]:
        raise NotImplementedError("abstract: what the network is given")

    def changed(self, thing: Any, generator: np.random.Generator) -> Any:
        raise NotImplementedError("abstract: another view")

    def collate(self, items: Sequence[Any]) -> dict[str, Any]:
        """See `Part`."""
        drawn = int(torch.randint(2**62, (), generator=generator_of([i.index for i in items])))
        generator = np.random.default_rng(drawn)
        return {
            **self.inputs([i.thing for i in items]),
            "strong": self.inputs([self.changed(i.thing, generator) for i in items]),
            "labels": torch.tensor([i.label for i in items]),
            "rows": torch.tensor([i.index for i in items]),
            "clean": torch.tensor([i.clean for i in items]),
        }

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """See `Part`."""
        training = self.network.training
        self.network.eval()
        found = []
        for start in range(0, len(self.items), 64):
            given = self.inputs([i.thing for i in self.items[start : start + 64]])
            out = self.network(**{name: tensor.to(self.device) for name, tensor in given.items()})
            found.append(out.features.float().cpu())
        self.network.train(training)
        return torch.cat(found)


class WholeImages(_Whole):
    """An image network, on pixels.

    Args:
        base: The encoder's folder.
        mirror: Whether images may be mirrored.
        device: Where it computes.
    """

    def __init__(self, base: Path, *, mirror: bool, device: str) -> None:
        from residency.trainable import ImageFeatures

        self.inner = encoders.image_network(base, device).float().to(device)
        for parameter in self.inner.parameters():
            parameter.requires_grad_(True)
        for name, parameter in self.inner.named_parameters():
            if name.startswith("_fc."):  # the embedded network's own classifier, which nobody reads
                parameter.requires_grad_(False)
        self.network, self.mirror, self.device = ImageFeatures(self.inner), mirror, device
        self.width = self.inner.width

    def inputs(self, things: Sequence[Any]) -> dict[str, Tensor]:
        """Preprocessed pixels."""
        return {"pixel_values": self.inner.pixels(things)}

    def changed(self, thing: Any, generator: np.random.Generator) -> Any:
        """Another view."""
        return another_image(thing, generator, self.mirror)

    def save(self, folder: Path) -> None:
        """See `Part`."""
        from residency.encoders import save_image_encoder

        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("residency_encoder")
        if name is None:
            self.inner.save(folder)
        else:
            save_image_encoder(self.inner, name, folder)


class WholeTexts(_Whole):
    """A text encoder, on token ids; texts are read by the mean over their tokens.

    Args:
        base: The encoder's folder.
        max_tokens: Longer texts are cut.
        device: Where it computes.
        remote_code: Whether the base's own code may run.
    """

    def __init__(self, base: Path, *, max_tokens: int, device: str, remote_code: bool = False) -> None:
        from transformers import AutoModel

        from residency import bases
        from residency.compat import quiet_transformers
        from residency.trainable import TextFeatures

        self.tokenizer = bases.load_tokenizer(base, remote_code=remote_code)
        with quiet_transformers():
            model = AutoModel.from_pretrained(base, dtype="float32", trust_remote_code=remote_code)
        for name, parameter in model.named_parameters():
            if "pooler" in name:  # nobody reads its output
                parameter.requires_grad_(False)
        self.network = TextFeatures(model.to(device), "mean")
        self.width, self.max_tokens, self.device = self.network.width, max_tokens, device

    def length(self, thing: Any) -> int:
        """Tokens."""
        return len(self.ids(thing))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        found: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return found or [0]

    def inputs(self, things: Sequence[Any]) -> dict[str, Tensor]:
        """Right-padded ids and their mask."""
        ids = [self.ids(thing) for thing in things]
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        return {
            "input_ids": torch.tensor([i + [pad] * (longest - len(i)) for i in ids]),
            "attention_mask": torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids]),
        }

    def changed(self, thing: Any, generator: np.random.Generator) -> Any:
        """Another view."""
        return another_text(thing, generator)

    def save(self, folder: Path) -> None:
        """See `Part`."""
        from residency import bases

        bases.save(self.network.model, self.tokenizer, folder, "float32")
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"residency_pooling": "mean", "residency_max_tokens": self.max_tokens}
        file.write_text(json.dumps(config, indent=1), encoding="utf-8")


def another_image(thing: Any, generator: np.random.Generator, mirror: bool) -> Any:
    """A changed view of an image (see `images.open_image`), as a PIL image."""
    from residency.images import changed, open_image

    return changed(open_image(thing), generator, mirror)


def another_text(text: str, generator: np.random.Generator) -> str:
    """A text without a fifth of its words; never without all of them."""
    words = text.split()
    return " ".join([w for w in words if generator.random() >= DROPPED] or words)


def copy_base(base: Path, work: Path) -> Path:
    """A fresh copy of an encoder's folder."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work, ignore=shutil.ignore_patterns("manifest.json"))
    return work

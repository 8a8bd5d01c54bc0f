"""A specialist that classifies, at work: texts, dialogues or images in, labels out.

for found in Labeller.open(Path("runs/images")).label(items): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from residency import bases, classifier, store
from residency.errors import PlanError
from residency.progress import Progress


class Labeller:
    """A classifier and what it is called.

    Args:
        folder: The model's folder.
        name: What to call it.
        device: Where to compute.

    Raises:
        PlanError: When the folder holds no classifier.
    """

    def __init__(self, folder: Path, name: str, device: str = "cpu") -> None:
        if (kind := bases.facts(folder).kind) != "classifier":
            raise PlanError(
                f"this specialist is a {kind}, and gives no labels",
                where=str(folder),
                hint="residency chat"
                if kind == "causal-lm"
                else "a recipe with a `tune` step makes a classifier of it",
            )
        self.name = name
        self.many = "residency_prompted" in store.read_json(folder / "config.json")
        """Whether an item may have several labels."""
        self._predictor = classifier.load(folder, device)

    @classmethod
    def open(cls, folder: Path) -> Labeller:
        """Open a run's specialist, or a model folder.

        Raises:
            StoreError, DataError: When there is no model.
        """
        from residency.compat import pick_device
        from residency.run import final_model, load_record

        if (folder / "config.json").exists():
            return cls(folder, folder.name, pick_device())
        return cls(final_model(folder), load_record(folder)["name"], pick_device())

    def label(self, items: Sequence[Any], progress: Progress | None = None) -> Iterator[str]:
        """The label of each item in the order given; several labels sorted, with " | " between them.

        Args:
            items: Texts, dialogues as tuples of (speaker, text), or images as paths, data: URIs or arrays.
            progress: Where progress goes.

        Raises:
            DataError: When an item is of another kind than the model reads, or cannot be read.
        """
        yield from self._predictor.predict(items, progress=progress)

"""A model as it decodes best: silent units skipped, weights packed, guesses drafted, long contexts kept short.

What a recipe leaves beside a checkpoint (`draft/`, `cache.json`) changes how it is decoded and not what it is. This
module is where chat and evaluation find it:

    with decoding.prepared(folder, model) as options:
        model.generate(ids, **options)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from residency import store
from residency.errors import PlanError

CACHE = "cache.json"
DRAFT = "draft"


@contextlib.contextmanager
def prepared(folder: Path, model: Any) -> Iterator[dict[str, Any]]:
    """A model as it decodes best, inside the block.

    Its feed-forward layers skip silent units where it was made sparse, and its weights are packed: the same results to
    rounding, at the price of a second copy of the weights. A draft that stands beside it guesses ahead.

    Args:
        folder: The model's folder.
        model: The model, loaded.

    Yields:
        What to give to `generate`; nothing for an ordinary checkpoint.

    Raises:
        DataError: When what stands beside the model cannot be read or belongs to another one.
    """
    from residency.packed import packed

    options: dict[str, Any] = {}
    parts = [model]
    if has_draft(folder):
        from residency.infer import saveddraft

        drafted = saveddraft.load(folder, model)
        drafter: Any = drafted.drafter
        parts += [drafter, drafter.head]
        options["custom_generate"] = drafted
    with _sparse(model), packed(*parts):
        yield options


@contextlib.contextmanager
def _sparse(model: Any) -> Iterator[None]:
    text = model.config.get_text_config()
    if "relu" not in (getattr(text, "hidden_act", None), getattr(text, "hidden_activation", None)):
        yield
        return
    from residency.compress.relufy import thresholds
    from residency.compress.sparseffn import sparse_decoding

    try:
        thresholds(model)
    except PlanError:  # ReLU, but no gated layers
        yield
        return
    with sparse_decoding(model):
        yield


def has_draft(folder: Path) -> bool:
    """Whether a draft stands beside the model."""
    return (folder / DRAFT / "config.json").exists()


def describe(folder: Path) -> dict[str, Any]:
    """What stands beside a checkpoint, for the record: {"draft": method, "cache": method}."""
    found = {}
    if has_draft(folder):
        found["draft"] = store.read_json(folder / DRAFT / "config.json").get("method")
    if (folder / CACHE).exists():
        found["cache"] = store.read_json(folder / CACHE).get("method")
    return found

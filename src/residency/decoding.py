"""A model as it decodes best: silent units skipped, weights packed, guesses drafted, long contexts kept short.

What a recipe leaves beside a checkpoint (`draft/`, `cache.json`) changes how it is decoded and not what it is. This
module is where chat and evaluation find it:

    with decoding.fast(model), decoding.saved(folder, model) as options:
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
def fast(model: Any) -> Iterator[Any]:
    """The model with its feed-forward layers skipping silent units (where it was made sparse) and weights packed.

    Same results to rounding; a second copy of the weights while the block lasts.
    """
    from residency.packed import packed

    with _sparse(model), packed(model):
        yield model


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


def saved(folder: Path, model: Any, instruction_tokens: int | None = None) -> dict[str, Any]:
    """What `generate` should be given for a model whose folder says how to decode it.

    A draft is used as long as the context fits the cache's budget; a longer one is evicted from, without drafting.

    Args:
        folder: The model's folder.
        model: The model, loaded.
        instruction_tokens: How many tokens at the end of the prompt are the question (for eviction).

    Returns:
        Keyword arguments, empty for an ordinary checkpoint.
    """
    found: dict[str, Any] = {}
    if (folder / DRAFT / "config.json").exists():
        from residency.infer import saveddraft

        found["custom_generate"] = saveddraft.load(folder, model)
    return found


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

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
from residency.compat import streamer_of_generate
from residency.errors import PlanError

CACHE = "cache.json"
DRAFT = "draft"


@contextlib.contextmanager
def prepared(folder: Path, model: Any) -> Iterator[dict[str, Any]]:
    """A model as it decodes best, inside the block.

    Its feed-forward layers skip silent units where it was made sparse, and its weights are packed: the same results to
    rounding, at the price of a second copy of the weights. A draft that stands beside it guesses ahead; a budget
    that stands there decides what is kept of a long prompt. With both, prompts within the budget are drafted for, and
    longer ones are not: a guess would have to be verified over a cache that forgets differently.

    Args:
        folder: The model's folder.
        model: The model, loaded.

    Yields:
        What to give to `generate`; nothing for an ordinary checkpoint. With a budget beside the model, `generate` also
        takes `instruction_tokens`, how many tokens at the end of a prompt are its question.

    Raises:
        DataError: When what stands beside the model cannot be read or belongs to another one.
    """
    from residency.packed import packed

    options: dict[str, Any] = {}
    guessing: list[Any] = []
    if has_draft(folder):
        from residency.infer import saveddraft

        drafted = saveddraft.load(folder, model)
        guessing = drafted.parts()
        options["custom_generate"] = drafted
    if has_budget(folder):
        from residency.infer.citrus import from_json

        evicting = from_json(store.read_json(folder / CACHE))
        short = options.get("custom_generate")
        options["custom_generate"] = ByLength(short, evicting) if short else evicting
    with _sparse(model), packed(model, rough=guessing):
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


class ByLength:
    """A `custom_generate` that drafts for prompts within a budget, and evicts from longer ones.

    Args:
        short: For prompts of at most `long.budget` tokens.
        long: For the others.
    """

    def __init__(self, short: Any, long: Any) -> None:
        self.short, self.long = short, long

    def __call__(
        self,
        model: Any,
        input_ids: Any,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        instruction_tokens: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`."""
        streamer = streamer if streamer is not None else streamer_of_generate()
        common = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "streamer": streamer,
        }
        if input_ids.shape[1] <= self.long.budget:
            return self.short(model, input_ids, **common, **model_kwargs)
        return self.long(model, input_ids, instruction_tokens=instruction_tokens, **common, **model_kwargs)


def has_budget(folder: Path) -> bool:
    """Whether a cache budget stands beside the model."""
    return (folder / CACHE).exists()


def has_draft(folder: Path) -> bool:
    """Whether a draft stands beside the model."""
    return (folder / DRAFT / "config.json").exists()

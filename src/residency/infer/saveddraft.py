"""A drafter beside its checkpoint: `draft/config.json` and `draft/model.safetensors` in the model's folder.

The model itself stays a standard checkpoint that knows nothing of it. The config names the method, its sizes, the
size of its draft vocabulary and the tree to decode with, and the first and last entries of the target's LM head as a
check that the draft belongs to these weights. (A draft of other weights would still be lossless, only useless.)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from residency import store
from residency.errors import DataError, StoreError
from residency.infer.clover import Clover, Clover2, CloverParams
from residency.infer.drafted import Drafted
from residency.infer.drafter import Drafter
from residency.infer.lookup import WithLookup
from residency.infer.medusa import Medusa, MedusaParams
from residency.infer.tree import DynamicTree, StaticTree, TreePolicy

FOLDER = "draft"
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "clover-2": (Clover2, CloverParams),
    "clover": (Clover, CloverParams),
    "medusa": (Medusa, MedusaParams),
}
"""Method → drafter and its parameters."""


def make(method: str, target: PreTrainedModel, sizes: dict[str, Any], token_ids: torch.Tensor | None) -> Drafter:
    """An untrained drafter; random numbers are torch's global ones.

    Raises:
        ValueError: For an unknown method.
    """
    if method not in KINDS:
        raise ValueError(f"there is no drafter `{method}`; there are {', '.join(KINDS)}")
    kind, params = KINDS[method]
    made: Drafter = kind(target, params(**sizes), token_ids)
    return made


def save(
    folder: Path, drafter: Drafter, method: str, sizes: dict[str, Any], tree: TreePolicy, *, lookup: bool = False
) -> None:
    """Write `draft/` into a model's folder.

    Args:
        folder: The model's folder.
        drafter: Attached to its target.
        method: Of `KINDS`.
        sizes: What the drafter was made with.
        tree: To decode with.
        lookup: Whether guesses from the text itself join the tree (`lookup.WithLookup`).
    """
    place = folder / FOLDER
    place.mkdir(parents=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(state, place / "model.safetensors")
    known = 0 if drafter.token_ids is None else len(drafter.token_ids)
    store.write_json(
        place / "config.json",
        {
            "method": method,
            "sizes": sizes,
            "vocabulary": known,
            "tree": describe(tree),
            "lookup": lookup,
            "target": fingerprint(drafter.target),
        },
    )


def load(folder: Path, target: PreTrainedModel) -> Drafted:
    """The decoder for a model that has a draft beside it.

    Args:
        folder: The model's folder.
        target: The model, loaded.

    Raises:
        DataError: When the draft is damaged or belongs to another model.
    """
    place = folder / FOLDER
    hint = "remove the folder `draft` to go without, or run the recipe's draft step again"
    try:
        config = store.read_json(place / "config.json")
        _check_target(config.get("target"), target, place, hint)
        state = load_file(place / "model.safetensors")
        drafter = make(config["method"], target, config["sizes"], state.get("token_ids"))
        drafter.load_state_dict(state)
        tree = tree_of(config["tree"])
    except (StoreError, OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the draft cannot be read: {str(error).splitlines()[0]}", where=str(place), hint=hint
        ) from error
    drafter.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False).attach(target)
    return Drafted(WithLookup(drafter) if config.get("lookup") else drafter, tree)


def _check_target(saved: Any, target: PreTrainedModel, place: Path, hint: str) -> None:
    """Refuse a draft whose target had another LM head; precisions may differ by a rounding or two."""
    mine = fingerprint(target)
    same = isinstance(saved, list) and len(saved) == len(mine)
    if not same or not all(math.isclose(a, b, rel_tol=2**-6, abs_tol=1e-30) for a, b in zip(saved, mine, strict=True)):
        raise DataError(
            f"the draft was trained for another model (its LM head {saved}, this one's {mine})",
            where=str(place),
            hint=hint,
        )


def describe(tree: TreePolicy) -> dict[str, Any]:
    """A tree policy as JSON."""
    if isinstance(tree, StaticTree):
        return {"paths": [list(path) for path in tree.paths]}
    if isinstance(tree, DynamicTree):
        return {name: getattr(tree, name) for name in ("budget", "levels", "top_p", "ratio", "least", "fanout")}
    raise ValueError(f"a {type(tree).__name__} cannot be saved")


def tree_of(described: dict[str, Any]) -> TreePolicy:
    """A tree policy from its JSON."""
    return StaticTree(described["paths"]) if "paths" in described else DynamicTree(**described)


def fingerprint(target: PreTrainedModel) -> list[float]:
    """A few entries of the LM head and its shape, as bfloat16 would hold them: nearly the same in every precision."""
    weight = target.get_output_embeddings().weight
    some = torch.stack([weight[0, 0], weight[-1, -1], weight[len(weight) // 2, 0]]).to(torch.bfloat16)
    return [float(len(weight)), float(weight.shape[1]), *some.float().tolist()]

"""Cases of the compress stage: surgery on models."""

from __future__ import annotations

from typing import Any

from residency.testing.roles import SurgeryCase


class DepthPruningCase(SurgeryCase):
    """Baseline: keeping all layers is the same model."""

    name = "depth-pruning"
    saves_parameters = True

    def neutral(self, model: Any) -> Any:
        from residency.compress.layers import keep_layers

        return keep_layers(model, range(4))

    def active(self, model: Any) -> Any:
        from residency.compress.layers import keep_layers

        return keep_layers(model, [0, 2, 3])


class WidthPruningCase(SurgeryCase):
    """Baseline: full width is the same model."""

    name = "width-pruning"
    saves_parameters = True

    def _narrow(self, model: Any, **sizes: int) -> Any:
        import torch

        from residency.compress.width import Width, measure, narrow

        batch = {"input_ids": torch.arange(2 * 9).reshape(2, 9) % 61}
        return narrow(model, measure(model, [batch]), Width(**sizes))

    def neutral(self, model: Any) -> Any:
        return self._narrow(model)

    def active(self, model: Any) -> Any:
        return self._narrow(model, hidden=16, heads=2, ffn=20)


class MergeHeadsCase(SurgeryCase):
    """Baseline: as many key/value heads as before is the same model."""

    name = "merge-heads"
    saves_parameters = True

    def _merged(self, model: Any, kv_heads: int) -> Any:
        import torch

        from residency.compress.mergeheads import merge_heads, plan_merge

        text = {"input_ids": torch.arange(2 * 9).reshape(2, 9) % 61}
        return merge_heads(model, plan_merge(model, [text], kv_heads))

    def neutral(self, model: Any) -> Any:
        return self._merged(model, 2)

    def active(self, model: Any) -> Any:
        return self._merged(model, 1)

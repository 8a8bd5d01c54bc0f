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


class ProSparseCase(SurgeryCase):
    """Baselines: thresholds of 0 are ReLU, no penalty is the task alone. Reference: the penalty token by token."""

    name = "prosparse"
    copies = False

    def neutral(self, model: Any) -> Any:
        from residency.compress.relufy import install_thresholds

        return install_thresholds(model)

    def active(self, model: Any) -> Any:
        from residency.compress.relufy import relufy

        return relufy(model)

    def _step(self, model: Any, parts: list[slice], peak: float, padding: int = 0) -> tuple[float, Any]:
        """The loss of one optimiser step, and the gradient of a gate, its rows forwarded in parts."""
        import torch

        from residency.compress.prosparse import ProSparse, SineStages
        from residency.compress.relufy import gated_ffns
        from residency.objective import IGNORE, Objective, Outputs, next_token_positions

        class Task(Objective):
            def forward(self, outputs: Any, batch: Any) -> Any:
                mask, targets = next_token_positions(batch["labels"])
                return torch.nn.functional.cross_entropy(outputs.logits[mask], targets, reduction="sum"), mask.sum()

        ids = torch.arange(3 * 9).reshape(3, 9) % 60 + 1
        real = torch.ones_like(ids)
        real[1, 6:] = real[2, 4:] = 0
        labels = ids.where(real > 0, IGNORE)
        labels[:, :2] = IGNORE
        batch = {"input_ids": ids, "attention_mask": real, "labels": labels}
        more = {"input_ids": 7, "attention_mask": 0, "labels": IGNORE}
        batch = {k: torch.cat([v, torch.full((3, padding), more[k])], 1) for k, v in batch.items()}
        model.zero_grad()
        value = 0.0
        with ProSparse(Task(), model, SineStages((peak,), (0.0, 1.0)) if peak else SineStages()) as objective:
            objective.begin_step(0, 1)
            count = objective.count(batch)
            for part in parts:
                rows = {k: v[part] for k, v in batch.items()}
                logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
                total, _ = objective(Outputs(logits=logits), rows)
                (total / count).backward()
                value += float(total.detach()) / count
        return value, gated_ffns(model)[1].gate_proj.weight.grad.clone()

    def check_threshold_zero_is_relu(self) -> None:
        """FATReLU with threshold 0 gives ReLU's logits exactly; an endless threshold silences every unit."""
        from residency.compress.relufy import gated_ffns, relufy, set_thresholds
        from residency.compress.sparsity import measure_sparsity

        model = relufy(self.model())
        plain = self._logits(model)
        assert (self._logits(set_thresholds(model, 0.0)) == plain).all()
        set_thresholds(model, 1e30)
        import torch

        assert measure_sparsity(model, [{"input_ids": torch.arange(9)[None]}]).mean == 1.0
        assert len(gated_ffns(model)) == 4

    def check_padding_and_accumulation(self) -> None:
        """Rows one by one, in another order, and with more padding give the same loss and gradient."""
        import torch

        model = self.active(self.model())
        value, gradient = self._step(model, [slice(0, 3)], 2.0)
        for parts, padding in (([slice(i, i + 1) for i in (2, 0, 1)], 0), ([slice(0, 3)], 5)):
            again, split = self._step(model, parts, 2.0, padding)
            assert abs(again - value) < 1e-5 * value
            torch.testing.assert_close(split, gradient, rtol=1e-4, atol=1e-7)

    def check_penalty_reference(self) -> None:
        """The penalty adds λ times the mean |x₁| over units and real tokens, rows weighted by their trained tokens."""
        import torch

        from residency.compress.relufy import gated_ffns

        model = self.active(self.model())
        seen: list[Any] = []
        hooks = [f.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for f in gated_ffns(model)]
        ids = torch.arange(3 * 9).reshape(3, 9) % 60 + 1
        expected = 0.0
        for row, (length, trained) in enumerate(((9, 7), (6, 4), (4, 2))):
            seen.clear()
            with torch.no_grad():
                model(ids[row : row + 1, :length])
            expected += trained / 13 * sum(float(x1.abs().mean()) for x1 in seen)
        for hook in hooks:
            hook.remove()
        task, _ = self._step(model, [slice(0, 3)], 0.0)
        both, _ = self._step(model, [slice(0, 3)], 3.0)
        assert abs(both - task - 3 * expected) < 1e-4 * both

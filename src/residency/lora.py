"""LoRA through PEFT, with the two checks that PEFT leaves to its user.

    W' = W + (alpha / r) · B A,        A [r, D_in] random, B [D_out, r] zero

so that training starts from the base exactly, and only A and B are trained. Everything is PEFT's; what is added
here: a requested target module that matches nothing is refused (PEFT accepts a list with one misspelt name in
silence, measured with 0.21), and merging is verified on a probe batch, its drift reported instead of assumed.

Source: Hu, Shen, Wallis et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
Official code: microsoft/LoRA; here: huggingface/peft. Memory: r (D_in + D_out) trained parameters per layer; time:
about 2/3 of a full fine-tuning step, for the weights' own gradients are not computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from residency.catalog import nearest
from residency.errors import PlanError
from residency.step import Params

if TYPE_CHECKING:
    from torch import Tensor


class Lora(Params):
    """Parameters of a LoRA adapter."""

    rank: int = Field(16, ge=1, le=1024)
    """r, the rank of the update; 1-64 is usual (the paper: 4-64, with little gain above 8)."""
    alpha: float | None = Field(None, gt=0)
    """Scale: the update is multiplied by alpha / rank. Default: equal to rank, so that the scale is 1."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers to adapt; every name must match. ["all-linear"] takes them all but the head."""

    def attach(self, model: Any) -> Any:
        """Freeze `model` and wrap it in a `PeftModel` with a fresh adapter.

        Raises:
            PlanError: When a target matches no module; the message names the nearest that exists.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        linear = [n for n in linear if n != "lm_head"]
        whole = self.targets == ("all-linear",)
        names = {name for name, _ in model.named_modules()}
        for target in () if whole else self.targets:
            if not any(name == target or name.endswith(f".{target}") for name in names):
                guess = nearest(target, linear)
                raise PlanError(
                    f"the target module `{target}` matches nothing in this model"
                    + (f"; did you mean `{guess}`?" if guess else ""),
                    hint=f"its linear layers: {', '.join(linear)}",
                )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules="all-linear" if whole else list(self.targets),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


def merge(adapted: Any, input_ids: Tensor) -> tuple[Any, float]:
    """Fold an adapter into the weights.

    Args:
        adapted: A `PeftModel`.
        input_ids: Probe batch [B, T].

    Returns:
        The plain model, and the largest difference of its logits on the probe to those before merging.
    """
    import torch

    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=input_ids).logits.float()
        model = adapted.merge_and_unload()
        drift = (model(input_ids=input_ids).logits.float() - before).abs().max().item()
    return model, drift

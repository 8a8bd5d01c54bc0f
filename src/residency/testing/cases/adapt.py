"""Cases of the adapt stage."""

from __future__ import annotations

from typing import Any, ClassVar

from residency.testing.roles import LabelLossCase, PredictorCase, SurgeryCase, TokenLossCase


class CrossEntropyCase(TokenLossCase):
    """Reference: torch.nn.functional.cross_entropy on shifted labels."""

    name = "cross-entropy"

    def objective(self) -> Any:
        from residency.crossentropy import CrossEntropy

        return CrossEntropy()

    def reference(self, logits: Any, labels: Any) -> float:
        from torch.nn.functional import cross_entropy

        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return float(cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"))


class LoraCase(SurgeryCase):
    """Baseline: an untrained adapter is the base itself."""

    name = "lora"
    copies = False

    @property
    def params(self) -> Any:
        from residency.lora import Lora

        return Lora

    def _merged(self, model: Any, push: float) -> Any:
        import torch

        from residency.lora import Lora, merge

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            adapted = Lora(rank=2).attach(model)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(push)
        merged, drift = merge(adapted, torch.arange(6)[None])
        assert drift < 1e-4
        return merged

    def neutral(self, model: Any) -> Any:
        return self._merged(model, 0.0)

    def active(self, model: Any) -> Any:
        return self._merged(model, 0.05)

    def check_only_the_adapter_is_trained(self) -> None:
        """Attaching freezes every weight of the base."""
        from residency.lora import Lora

        trained = [n for n, p in Lora(rank=2).attach(self.model()).named_parameters() if p.requires_grad]
        assert trained
        assert all("lora_" in n for n in trained)

    def check_a_misspelt_target_is_refused(self) -> None:
        """A list with one target that matches nothing is refused, with the nearest that exists."""
        from residency.errors import PlanError
        from residency.lora import Lora

        try:
            Lora(targets=("q_proj", "vproj")).attach(self.model())
        except PlanError as error:
            message = str(error)
        else:
            message = "accepted"
        assert "v_proj" in message, message


class ProbeCase(PredictorCase):
    """Heads of a probe."""

    name = "probe"
    heads: ClassVar[tuple[dict[str, Any], ...]] = ({"head": "linear"}, {"head": "prototype"})

    @property
    def params(self) -> Any:
        from residency.adapt.probe import Probe

        return Probe

    def fit(self, features: Any, labels: list[str], **params: Any) -> Any:
        return self.params(**params).fit(features, labels)

    def check_prototypes_are_class_means(self) -> None:
        """The nearest class mean by cosine, written out, gives the same labels."""
        import numpy as np

        features, labels = self.problem()
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        means = {c: unit[[i for i, label in enumerate(labels) if label == c]].mean(0) for c in "abc"}
        directions = np.stack([means[c] / np.linalg.norm(means[c]) for c in "abc"])
        expected = ["abc"[i] for i in (unit @ directions.T).argmax(1)]
        assert self.fit(features, labels, head="prototype").predict(features) == expected

    def check_every_key_is_read(self) -> None:
        """Regularisation changes the linear head, temperature the prototypes."""
        data = self.problem()
        for head, key in (("linear", "regularisation"), ("prototype", "temperature")):
            given: dict[str, Any] = {"head": head, key: 1.0}
            default, changed = self.fit(*data, head=head), self.fit(*data, **given)
            assert not (default.weight == changed.weight).all()


class LabelCase(LabelLossCase):
    """Reference: torch.nn.functional's cross-entropy and squared error."""

    name = "label-loss"

    def objective(self) -> Any:
        from residency.labelloss import LabelLoss

        return LabelLoss()

    def reference(self, logits: Any, labels: Any) -> float:
        from torch.nn.functional import cross_entropy, mse_loss

        if labels.is_floating_point():
            return float(mse_loss(logits[:, 0], labels, reduction="sum"))
        return float(cross_entropy(logits, labels, reduction="sum"))

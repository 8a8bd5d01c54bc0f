"""Cases of the objectives over features that contrast rows with each other and with prototypes."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.testing.roles import FeatureLossCase


class SupConCase(FeatureLossCase):
    """Reference: the double loop over anchors and positives, and the head's cross-entropy."""

    name = "supcon"

    def objective(self) -> Any:
        import torch

        from residency.adapt.contrast import SupCon

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return SupCon(3, 5).double()

    def reference(self, objective: Any, features: Any, labels: Any) -> float:
        weight, bias = objective.head.weight.tolist(), objective.head.bias.tolist()
        rows, y = features.tolist(), labels.tolist()
        total = 0.0
        for i, z in enumerate(rows):
            others = {j: math.exp(_cosine(z, rows[j]) / 0.1) for j in range(len(rows)) if j != i}
            mine = [j for j in others if y[j] == y[i]]
            total -= math.fsum(math.log(others[j] / math.fsum(others.values())) for j in mine) / len(mine)
            logits = [
                math.fsum(a * b for a, b in zip(w, z, strict=True)) + c for w, c in zip(weight, bias, strict=True)
            ]
            total -= logits[y[i]] - math.log(math.fsum(map(math.exp, logits)))
        return total

    def check_rows_alone_have_no_contrast(self) -> None:
        """A row without another of its class in the batch gives the features no gradient."""
        import torch

        features, _ = self.problem(3)
        features.requires_grad_(True)
        self._value(self.objective(), features, torch.arange(3))[0].backward()
        assert features.grad is not None
        assert not features.grad.any()


class SPCLCase(FeatureLossCase):
    """Reference: the loop over a row's candidates, the class means standing in for the empty queues."""

    name = "spcl"
    settings: ClassVar[dict[str, Any]] = {"queue": 6, "support": 2}

    def objective(self) -> Any:
        from residency.adapt.spcl import SPCL

        return SPCL(3, 5, **self.settings).double()

    def reference(self, objective: Any, features: Any, labels: Any) -> float:
        rows, y = features.tolist(), labels.tolist()
        means = []
        for k in range(3):
            members = [z for z, c in zip(rows, y, strict=True) if c == k]
            means.append([math.fsum(values) / len(members) for values in zip(*members, strict=True)])
        total = 0.0
        for i, z in enumerate(rows):
            candidates = [(rows[j], y[j]) for j in range(len(rows)) if j != i] + list(zip(means, range(3), strict=True))
            f = [(math.exp((1 + _cosine(z, a)) / 2 / 0.08), c) for a, c in candidates]
            mine = [v for v, c in f if c == y[i]]
            total -= math.log(math.fsum(mine) / len(mine) / math.fsum(v for v, _ in f))
        return total

    def check_rows_alone_learn_from_prototypes(self) -> None:
        """A row without another of its class in the batch still gets a gradient: what the prototypes are for."""
        import torch

        features, labels = self.problem()
        objective, _ = self.begun(features, labels)
        alone = features[:3].clone().requires_grad_(True)
        self._value(objective, alone, torch.arange(3))[0].backward()
        assert alone.grad is not None
        assert alone.grad.norm(dim=1).min() > 0

    def check_every_setting_changes_something(self) -> None:
        """Temperature, queue, support, curriculum and the release's habits all lead elsewhere within two epochs."""
        import torch

        from residency.adapt.spcl import SPCL
        from residency.objective import Outputs

        features, labels = self.problem(24)

        def course(**changed: Any) -> list[float]:
            objective = SPCL(3, 5, **(self.settings | changed)).double()
            found = []
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for epoch in range(2):
                    rows = objective.begin_epoch(
                        epoch, 2, lambda: iter([(Outputs(features=features), {"labels": labels})])
                    )
                    order = torch.tensor(rows if rows is not None else list(range(24)))
                    parts = [(features[part], labels[part]) for part in order.split(4)]
                    found += [float(objective(Outputs(features=z), {"labels": y})[0]) for z, y in parts]
            return found

        plain = course()
        assert plain == course()
        for changed in (
            {"temperature": 0.2},
            {"queue": 3},
            {"support": 3},
            {"curriculum": "half"},
            {"curriculum": "difficulty"},
            {"official": True},
        ):
            assert course(**changed) != plain, f"{changed} changed nothing"


def _cosine(a: list[float], b: list[float]) -> float:
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))

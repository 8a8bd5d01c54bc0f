"""Cases of the methods for noisy labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.testing.roles import FeatureLossCase


class NoisyCase(FeatureLossCase):
    """Written out for the phase in which labels are corrected, with prototypes of all rows and an empty queue."""

    quiet: ClassVar[frozenset[str]] = frozenset()
    """Parts that are not trained in this phase."""
    object: ClassVar[str]
    starts: ClassVar[tuple[float, ...]]

    def objective(self) -> Any:
        import torch

        from residency.catalog import load
        from residency.trainable import Adapter

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            keys = {"starts": self.starts, "project": 4, "middle": 6, "queue": 24, "relabel": 0.42}
            return load(self.object)(3, 5, Adapter(5, 0), **keys).double()

    def batch(self, features: Any, labels: Any) -> dict[str, Any]:
        """As the common one, with what the momentum copy is shown."""
        return super().batch(features, labels) | {"features": features.detach()}

    def parts(self, objective: Any, features: Any, labels: Any) -> tuple[list[list[float]], ...]:
        """u, z, class means of z, and the classifier's probabilities, by loops."""
        y = labels.tolist()
        u = [_scaled(v, math.sqrt(5)) for v in features.tolist()]
        first, last = objective.projector[0], objective.projector[2]
        inside = [[max(0.0, v) for v in _affine(first, row)] for row in u]
        z = [_scaled(_affine(last, row), 1.0) for row in inside]
        means = []
        for k in range(3):
            rows = [row for row, c in zip(z, y, strict=True) if c == k]
            means.append(_scaled([math.fsum(v) / len(rows) for v in zip(*rows, strict=True)], 1.0))
        p = [_softmax([_dot(w, row) for w in objective.classifier.weight.tolist()]) for row in u]
        return u, z, means, p

    def corrected(self, s: list[float], given: int) -> tuple[int, bool]:
        """The rule: label, and whether the row stays."""
        if max(s) > 0.42:
            return s.index(max(s)), True
        return given, s[given] > 1 / 3

    def check_gradients(self) -> None:
        """Rows that stay get a gradient, rows left out none; every trained part gets one that does not rest now."""
        features, labels = self.problem()
        objective, _ = self.begun(features, labels)
        objective.eval()  # judged below as it was trained here
        features.requires_grad_(True)
        self._value(objective, features, labels)[0].backward()
        assert features.grad is not None
        stays = objective.judge(features.detach(), labels, labels < 0).keep
        assert stays.any()
        assert not stays.all()
        assert (features.grad.norm(dim=1) > 0).equal(stays)
        without = {
            name.split(".")[0]
            for name, p in objective.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.any())
        }
        assert without == self.quiet
        assert not any(b.requires_grad for b in objective.buffers())

    def check_every_setting_changes_something(self) -> None:
        """Each leads elsewhere within three batches."""
        import torch

        from residency.catalog import load
        from residency.objective import Outputs
        from residency.trainable import Adapter

        features, labels = self.problem(24)

        def course(**changed: Any) -> list[float]:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                keys = {"starts": self.starts, "project": 4, "middle": 6, "queue": 16, "relabel": 0.42}
                model = Adapter(5, 3).double()
                objective = load(self.object)(3, 5, model, **(keys | changed)).double()
            look = [(Outputs(features=features), self.batch(features, labels))]
            objective.begin_epoch(0, 2, lambda: iter(look))
            found = []
            for step, part in enumerate(torch.arange(24).split(8)):
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.add_(0.1)  # the model moves
                objective.begin_step(step, 3)
                batch = self.batch(features[part], labels[part]) | {"clean": part < 2, "rows": part}
                found.append(float(objective(Outputs(features=features[part]), batch)[0].detach()))
            return found

        plain = course()
        assert plain == course()
        for changed in self.settings:
            assert course(**changed) != plain, f"{changed} changed nothing"

    settings: ClassVar[tuple[dict[str, Any], ...]] = ()


COMMON: tuple[dict[str, Any], ...] = (
    {"temperature": 0.3},
    {"alpha": 0.9},
    {"relabel": 0.95},
    {"keep": 0.6},
    {"momentum": 0.0},
    {"polish": 0.5},
    {"instance": 0.0},
    {"queue": 8},
    {"official": True},
)


class FoProCase(NoisyCase):
    """Reference: the phase of cleaning, by loops."""

    name = "fopro"
    object = "residency.adapt.fopro:FoPro"
    in_batch = False
    starts = (0.0, 0.0, 1.0)
    quiet = frozenset({"reconstructor"})
    settings = (*COMMON, {"margin": 0.1}, {"starts": (0.0, 0.0, 0.0)}, {"starts": (0.0, 1.0, 1.0), "sigma": 0.01})

    def reference(self, objective: Any, features: Any, labels: Any) -> float:
        _, z, means, p = self.parts(objective, features, labels)
        weights = [_scaled(w, 1.0) for w in objective.auxiliary.weight.tolist()]
        total = 0.0
        for i, given in enumerate(labels.tolist()):
            near = [_dot(z[i], c) / 0.1 for c in means]
            s = [(a + b) / 2 for a, b in zip(p[i], _softmax(near), strict=True)]
            now, stays = self.corrected(s, given)
            if not stays:
                continue
            soft = -math.fsum(a * math.log(b) for a, b in zip(s, p[i], strict=True))
            total += s[now] * -math.log(p[i][now]) + (1 - s[now]) * soft - math.log(_softmax(near)[now])
            votes = [(_dot(z[i], w) - 0.5 * (k == now)) / 0.1 for k, w in enumerate(weights)]
            total -= math.log(_softmax(votes)[now])
            r = objective.relation
            pairs = []
            for c in means:
                sums = zip(_affine(r.of_vector, z[i]), _affine(r.of_prototype, c), strict=True)
                pairs.append(_dot(r.out.weight[0].tolist(), [max(0.0, a + b) for a, b in sums]))
            total -= math.log(_softmax(pairs)[now])
        return total  # the queue is empty: no instance loss


class CAProCase(NoisyCase):
    """Reference: the phase of cleaning, by loops; the dictionary is the batch's own keys."""

    name = "capro"
    object = "residency.adapt.capro:CAPro"
    in_batch = True
    starts = (0.0, 0.0)
    quiet = frozenset({"reconstructor"})
    settings = (*COMMON, {"beta": 0.5}, {"starts": (0.0, 1.0)})

    def reference(self, objective: Any, features: Any, labels: Any) -> float:
        _, z, means, p = self.parts(objective, features, labels)
        weights = [_scaled(w, 1.0) for w in objective.auxiliary.weight.tolist()]
        votes = [_softmax([_dot(row, w) / 0.1 for w in weights]) for row in z]
        near = [_softmax([_dot(row, c) / 0.1 for c in means]) for row in z]
        said = [[(a + b) / 2 for a, b in zip(v, q, strict=True)] for v, q in zip(votes, near, strict=True)]
        total = 0.0
        for i, given in enumerate(labels.tolist()):
            s = [(a + b) / 2 for a, b in zip(p[i], near[i], strict=True)]
            now, stays = self.corrected(s, given)
            if not stays:
                continue
            alike = [
                min(1.0, max(0.0, _dot(z[i], key))) + 1e-7 for key in z
            ]  # keys are the rows: the copy is the model
            b = [math.fsum(a * o[k] for a, o in zip(alike, said, strict=True)) / math.fsum(alike) for k in range(3)]
            total -= math.log(p[i][now]) + math.log(near[i][now]) + 0.9 * math.log(votes[i][now])
            total -= 0.1 * math.fsum(x * math.log(q) for x, q in zip(b, votes[i], strict=True))
        return total


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _scaled(v: list[float], length: float) -> list[float]:
    norm = math.sqrt(_dot(v, v))
    return [length * x / norm for x in v]


def _affine(layer: Any, v: list[float]) -> list[float]:
    shift = [0.0] * len(layer.weight) if layer.bias is None else layer.bias.tolist()
    return [_dot(w, v) + b for w, b in zip(layer.weight.tolist(), shift, strict=True)]


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / math.fsum(weights) for w in weights]

"""Cases of label prompts, self-training and the metric of label sets."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.testing.roles import Case, MetricCase


class LabelPromptsCase(Case):
    """Reference: a prototypical network and its two losses, in Python floats; episodes add up."""

    name = "label-prompts"
    role = "Objective"

    @property
    def params(self) -> Any:
        from residency.adapt.labelpromptparams import LabelPrompts

        return LabelPrompts

    def problem(self) -> tuple[Any, Any, Any]:
        """Two episodes of three labels: shots [2, 3, 4, 5], queries [2, 6, 1, 5], targets [2, 6, 3]."""
        import torch

        generator = torch.Generator().manual_seed(0)
        shots = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
        queries = torch.randn(2, 6, 1, 5, generator=generator, dtype=torch.float64)
        return shots, queries, (torch.rand(2, 6, 3, generator=generator) < 0.4).double()

    def objective(self, **keys: Any) -> Any:
        """The loss over a view that is given its vectors instead of computing them."""
        import torch

        from residency.adapt.labelprompts import EpisodeLoss
        from residency.prompted import LabelView

        class Given(LabelView):
            def forward(self, *unread: Any, **given: Any) -> Any:
                return given["support"], given["query"], None

        view = Given(torch.nn.Linear(1, 1), "plain", scale=1.0).double()
        return EpisodeLoss(view, self.params(form="plain", eta=0, focus=0, **keys))

    def value(self, shots: Any, queries: Any, target: Any, loss: str) -> tuple[Any, int]:
        """(sum, count) of some episodes."""
        from residency.objective import Outputs

        unread = dict.fromkeys(("input_ids", "attention_mask", "pool"))
        batch = unread | {"support": shots, "query": queries, "labels": target}
        objective = self.objective(loss=loss)
        total, count = objective(Outputs(), batch)
        assert int(count) == objective.count(batch) == target.numel()
        return total, int(count)

    def check_reference(self) -> None:
        """Means, squared distances and both losses, written out with loops."""
        shots, queries, target = self.problem()
        for loss in ("mse", "bce"):
            expected = []
            for e in range(2):
                centres = [[math.fsum(row[d] for row in n) / len(n) for d in range(5)] for n in shots[e].tolist()]
                for (q,), y in zip(queries[e].tolist(), target[e].tolist(), strict=True):
                    z = [(1 - math.fsum((a - b) ** 2 for a, b in zip(q, c, strict=True))) for c in centres]
                    if loss == "mse":
                        top = max(z)
                        mass = math.fsum(math.exp(v - top) for v in z)
                        expected += [(math.exp(v - top) / mass - t) ** 2 for v, t in zip(z, y, strict=True)]
                    else:
                        expected += [math.log1p(math.exp(-v if t else v)) for v, t in zip(z, y, strict=True)]
            total, _ = self.value(shots, queries, target, loss)
            assert abs(total.item() - math.fsum(expected)) < 1e-9 * max(1.0, abs(total.item())), loss

    def check_episodes_add_up(self) -> None:
        """The sum over a batch is that of its episodes, in value and gradient."""
        import torch

        shots, queries, target = self.problem()
        for loss in ("mse", "bce"):
            together = shots.clone().requires_grad_(True)
            self.value(together, queries, target, loss)[0].backward()
            apart = shots.clone().requires_grad_(True)
            sum(self.value(apart[i : i + 1], queries[i : i + 1], target[i : i + 1], loss)[0] for i in (0, 1)).backward()
            torch.testing.assert_close(apart.grad, together.grad)

    def check_labels_have_no_order(self) -> None:
        """Labels in another order, with their shots and targets, cost the same."""
        import torch

        shots, queries, target = self.problem()
        order = [2, 0, 1]
        for loss in ("mse", "bce"):
            a, _ = self.value(shots, queries, target, loss)
            b, _ = self.value(shots[:, order].flip(2), queries, target[:, :, order], loss)
            torch.testing.assert_close(a, b)

    def check_keys_of_another_form(self) -> None:
        """A key that the chosen form would not read is refused."""
        try:
            self.params(form="plain", sharpness=3)
        except ValueError:
            return
        raise AssertionError("accepted")


class SelfTrainingCase(Case):
    """Reference: the rounds written out with a nearest-mean classifier, all confident rows taken."""

    name = "self-training"
    role = "Augmenter"

    @property
    def params(self) -> Any:
        from residency.adapt.selftraining import SelfTraining

        return SelfTraining

    def problem(self) -> tuple[list[float], list[str], list[float], list[str]]:
        """Points of two classes on a line: labelled points and classes, unlabelled points and their classes."""
        pool = [0.5, 1.5, 2.6, 3.4, 4.4, 5.5, 6.5, 9.0]
        return [0.0, 6.0], ["a", "b"], pool, ["a" if x < 4 else "b" for x in pool]

    def fit(self, items: Any, labels: Any) -> dict[str, float]:
        """Class → mean of its points."""
        means = {}
        for c in ("a", "b"):
            own = [x for x, label in zip(items, labels, strict=True) if label == c]
            means[c] = sum(own) / len(own)
        return means

    def proba(self, model: dict[str, float], items: Any) -> Any:
        """Softmax of negative distances [N, 2]."""
        import numpy as np

        z = -np.abs(np.array([[x - model[c] for c in ("a", "b")] for x in items]).reshape(len(items), 2))
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    def run(self, **keys: Any) -> Any:
        """Self-training on the problem."""
        from residency.adapt.selftraining import self_train

        x, y, pool, truth = self.problem()
        return self_train(self.fit, self.proba, x, y, pool, self.params(**keys), classes=["a", "b"], truth=truth)

    def check_reference(self) -> None:
        """Three rounds by hand give the same pseudo-labels, record and model."""
        x, y, pool, truth = self.problem()
        found = self.run(rounds=3, threshold=0.8, share=1)
        model, labels = self.fit(x, y), [None] * len(pool)
        for done in range(3):
            p = self.proba(model, pool)
            new: Any = [("a" if r[0] > r[1] else "b") if max(r) >= 0.8 else None for r in p]
            if new == labels:
                break
            labels = new
            taken = [i for i, label in enumerate(labels) if label]
            right = sum(labels[i] == truth[i] for i in taken) / len(taken)
            assert found.rounds[done].added == len(taken)
            assert abs(found.rounds[done].right - right) < 1e-6
            model = self.fit([*x, *(pool[i] for i in taken)], [*y, *(labels[i] for i in taken)])
        assert found.labels == labels
        assert found.model == model

    def check_pure(self) -> None:
        """The same input gives the same result, and the input is left as it was."""
        before = self.problem()
        assert self.run(rounds=3).labels == self.run(rounds=3).labels
        assert self.problem() == before

    def check_every_key_counts(self) -> None:
        """Threshold, share and balance each change what is taken."""
        taken = {
            tuple(label is not None for label in self.run(**{"threshold": 0.0, "share": 1.0} | keys).labels)
            for keys in ({}, {"threshold": 0.9}, {"share": 0.3}, {"balance": "equal"})
        }
        assert len(taken) >= 3, taken

    def check_nothing_to_learn_from(self) -> None:
        """No labelled rows is an error a user can read."""
        from residency.adapt.selftraining import self_train
        from residency.errors import DataError

        try:
            self_train(self.fit, self.proba, [], [], [1.0], self.params(), classes=["a", "b"])
        except DataError:
            return
        raise AssertionError("accepted")


class MultilabelF1Case(MetricCase):
    """Reference: counts by loop."""

    name = "multilabel-f1"
    best = 1.0
    sets: ClassVar[tuple[str, ...]] = ("a", "b", "a | b", "c", "a | c", "")

    def new(self) -> Any:
        from residency.evaluate.multilabel_f1 import MultilabelF1

        return MultilabelF1()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        return [(f"i{i:02}", rng.choice(self.sets), rng.choice(self.sets)) for i in range(30)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [(f"i{i}", s, s) for i, s in enumerate(self.sets)]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        f1 = []
        for c in "abc":
            said = [c in u[1] for u in updates]
            gold = [c in u[2] for u in updates]
            hits = sum(s and g for s, g in zip(said, gold, strict=True))
            f1.append(2 * hits / (sum(said) + sum(gold)))
        return sum(f1) / 3

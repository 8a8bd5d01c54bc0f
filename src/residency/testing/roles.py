"""The checks of each role. A case fills in the hooks; everything named `check_…` must hold."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from residency.catalog import Method


class Case:
    """What all roles share: the catalogue row and the parameter model."""

    name: ClassVar[str]
    role: ClassVar[str]
    row: Method | None = None
    params: ClassVar[Any] = None
    """The method's pydantic parameter model, if it has one."""

    def check_metadata(self) -> None:
        """The row is complete, its arXiv id is one (or None), and its module explains itself."""
        row = self.row
        if row is None:
            return
        assert row.title
        assert row.reference
        assert row.step
        assert row.pain
        assert row.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv), f"arXiv id {row.arxiv!r}"
        text = inspect.getdoc(sys.modules[row.load().__module__]) or ""
        assert len(text) >= 200, "the module docstring says too little (idea, equations, source, cost)"

    def check_lazy_import(self) -> None:
        """The method's module imports without any optional package."""
        if self.row is None:
            return
        module = self.row.object.partition(":")[0]
        blocked = (
            "sklearn",
            "PIL",
            "gguf",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "torchmetrics",
            "rouge_score",
            "ot",
            "scipy",
            "ray",
            "kronfluence",
        )
        code = f"import sys; sys.modules.update({{n: None for n in {blocked!r}}}); import {module}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]

    def check_parameters(self) -> None:
        """Parameters survive a round trip through JSON, refuse unknown keys, and every field is documented."""
        if self.params is None:
            return
        given = self.params()
        assert self.params.model_validate_json(given.model_dump_json(by_alias=True)) == given
        try:
            self.params.model_validate({"no-such-key": 1})
        except ValueError:
            pass
        else:
            raise AssertionError("an unknown key was accepted")
        bare = [n for n, f in self.params.model_fields.items() if not f.description]
        assert not bare, f"fields without a sentence: {bare}"


class PairLossCase(Case):
    """An objective over logits of N tokens, student against teacher, with a dense and a fused form."""

    role = "Objective"

    def dense(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        """(sum, count) from logits [N, V]."""
        raise NotImplementedError("abstract: the dense form")

    def fused(
        self, student: Any, head: Any, teacher: Any, teacher_head: Any, chunk_bytes: int | None
    ) -> tuple[Any, Any]:
        """(sum, count) from hidden states and heads."""
        raise NotImplementedError("abstract: the fused form")

    def reference(self, student: Any, teacher: Any) -> float:
        """The sum, written independently (plain loops, or another library)."""
        raise NotImplementedError("abstract: the reference")

    def logits(self, n: int = 7, vocabulary: int = 23, seed: int = 0, dtype: Any = None) -> tuple[Any, Any]:
        """Student and teacher logits, float64 by default."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        shape = (2, n, vocabulary)
        both = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        return tuple(both.to(dtype or torch.float64))

    def hidden(self, n: int = 7, width: int = 6, vocabulary: int = 23) -> tuple[Any, Any, Any, Any]:
        """Student hidden, student head, teacher hidden, teacher head, in float64."""
        import torch

        from residency.objective import Head

        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return (
            normal(n, width),
            Head(normal(vocabulary, width)),
            normal(n, width + 2),
            Head(normal(vocabulary, width + 2)),
        )

    def check_reference(self) -> None:
        """The dense form equals an independent implementation."""
        student, teacher = self.logits()
        total, count = self.dense(student, teacher)
        expected = self.reference(student, teacher)
        assert int(count) == len(student)
        assert abs(float(total) - expected) <= 1e-9 * max(1.0, abs(expected)), f"{float(total)} against {expected}"

    def check_fused_equals_dense(self) -> None:
        """The fused form equals the dense one at every chunk size, in loss and in all gradients."""
        import torch

        student, head, teacher, teacher_head = self.hidden()
        for chunk_bytes in (None, 1, 8 * 23, 8 * 23 * 3):
            grads = []
            for fused in (True, False):
                h = student.clone().requires_grad_(True)
                w = head.weight.clone().requires_grad_(True)
                mine = type(head)(w)
                if fused:
                    total, count = self.fused(h, mine, teacher, teacher_head, chunk_bytes)
                else:
                    total, count = self.dense(mine(h), teacher_head(teacher))
                total.backward()
                grads.append((total.detach(), torch.as_tensor(count), h.grad, w.grad))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-10)

    def check_accumulation_and_order(self) -> None:
        """Sums and counts of two parts add up to those of the whole, in any order."""
        import torch

        student, teacher = self.logits()
        whole, count = self.dense(student, teacher)
        a, n = self.dense(student[:3], teacher[:3])
        b, m = self.dense(student[3:], teacher[3:])
        torch.testing.assert_close(a + b, whole)
        assert int(n) + int(m) == int(count)
        order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
        torch.testing.assert_close(self.dense(student[order], teacher[order])[0], whole)

    def check_gradient_targets(self) -> None:
        """The student gets a gradient, the teacher none."""
        student, teacher = self.logits()
        student.requires_grad_(True)
        teacher.requires_grad_(True)
        self.dense(student, teacher)[0].backward()
        assert student.grad is not None
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None or not teacher.grad.any()

    def check_self_is_zero(self) -> None:
        """A student equal to its teacher has nothing to learn: loss 0, gradient 0."""
        student, _ = self.logits()
        mine = student.clone().requires_grad_(True)
        total, _ = self.dense(mine, student)
        total.backward()
        assert abs(float(total.detach())) < 1e-9
        assert mine.grad is not None
        assert float(mine.grad.abs().max()) < 1e-9

    def check_extremes(self) -> None:
        """No tokens give (0, 0); logits of ±1e4 stay finite in float32 and bfloat16."""
        import torch

        total, count = self.dense(*(x[:0] for x in self.logits()))
        assert float(total) == 0.0
        assert int(count) == 0
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (x * 3e3 for x in self.logits(dtype=dtype))
            student.requires_grad_(True)
            total, _ = self.dense(student, teacher)
            total.backward()
            assert torch.isfinite(total), f"{dtype}: {total}"
            assert student.grad is not None
            assert torch.isfinite(student.grad).all(), f"{dtype}: the gradient is not finite"


class MetricCase(Case):
    """A streaming metric."""

    role = "Metric"
    best: ClassVar[float]
    """The value of a perfect model."""

    def new(self) -> Any:
        """A fresh metric."""
        raise NotImplementedError("abstract: the metric")

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        """Arguments of `update` for about 30 items, the id first."""
        raise NotImplementedError("abstract: the items")

    def perfect(self) -> list[tuple[Any, ...]]:
        """Arguments of `update` for a perfect model."""
        raise NotImplementedError("abstract: perfect items")

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        """The value, computed independently."""
        raise NotImplementedError("abstract: the reference")

    def _fed(self, updates: Sequence[tuple[Any, ...]]) -> Any:
        metric = self.new()
        for update in updates:
            metric.update(*update)
        return metric

    def check_reference(self) -> None:
        """The value equals an independent computation; the interval holds it; every item is there."""
        for seed in range(3):
            updates = self.updates(seed)
            score = self._fed(updates).compute()
            assert abs(score.value - self.reference(updates)) < 1e-9, f"{score.value} against {self.reference(updates)}"
            assert score.low <= score.value <= score.high
            assert score.n == len(updates) == len(score.items)

    def check_perfect(self) -> None:
        """A perfect model gets the best value."""
        assert abs(self._fed(self.perfect()).compute().value - self.best) < 1e-9

    def check_merge_and_order(self) -> None:
        """Parts merged in any order equal the whole, items and interval included."""
        updates = self.updates()
        whole = self._fed(updates).compute()
        a, b = self._fed(updates[20:]), self._fed(updates[:20][::-1])
        assert a.merge(b).compute() == whole

    def check_seeded(self) -> None:
        """The interval depends on the seed, and on nothing else."""
        metric = self._fed(self.updates())
        assert metric.compute(seed=1) == metric.compute(seed=1)

    def check_paired_with_itself(self) -> None:
        """A model compared with itself differs by exactly 0, with no flips."""
        metric = self._fed(self.updates())
        score = metric.compute()
        difference = metric.difference(score, score)
        assert difference.difference == difference.low == difference.high == 0
        assert metric.flips(score, score) == ([], [])

    def check_empty_and_twice(self) -> None:
        """No items, and the same item twice, are errors a user can read."""
        from residency.errors import DataError

        twice = self._fed(self.updates())
        for act in (self.new().compute, lambda: twice.update(*self.updates()[0])):
            try:
                act()
            except DataError:
                continue
            raise AssertionError("accepted")


class SurgeryCase(Case):
    """A change of a causal language model that ends in a standard checkpoint."""

    role = "Surgery"

    def neutral(self, model: Any) -> Any:
        """The operation at the setting that changes nothing; returns the new model."""
        raise NotImplementedError("abstract: the degenerate limit")

    def active(self, model: Any) -> Any:
        """The operation at a setting that changes something."""
        raise NotImplementedError("abstract: the operation")

    saves_parameters: ClassVar[bool] = False
    """Whether the operation claims a smaller model."""

    def model(self) -> Any:
        """A tiny random Llama in evaluation mode."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=61,
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
            return LlamaForCausalLM(config).eval()

    def _logits(self, model: Any) -> Any:
        import torch

        with torch.no_grad():
            return model(torch.arange(2 * 9).reshape(2, 9) % 61).logits

    def check_degenerate_limit(self) -> None:
        """At its neutral setting the operation leaves the logits as they were."""
        import torch

        model = self.model()
        before = self._logits(model)
        torch.testing.assert_close(self._logits(self.neutral(model)), before, rtol=0, atol=1e-6)

    def check_save_and_load(self) -> None:
        """The result is a standard checkpoint: saved and loaded by plain transformers, it gives the same logits."""
        import torch
        from transformers import AutoModelForCausalLM

        from residency.compat import quiet_transformers

        changed = self.active(self.model())
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            changed.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            assert not [p for p in Path(folder).iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
        torch.testing.assert_close(self._logits(again), self._logits(changed), rtol=0, atol=1e-6)

    def check_changes_something(self) -> None:
        """At another setting the logits change, and a claimed saving is there."""
        model = self.model()
        count = sum(p.numel() for p in model.parameters())
        before = self._logits(model)
        changed = self.active(self.model())
        assert (self._logits(changed) - before).abs().max() > 1e-4
        if self.saves_parameters:
            assert sum(p.numel() for p in changed.parameters()) < count

    copies: ClassVar[bool] = True
    """Whether the result is a new model (False: the model itself is changed)."""

    def check_input_unchanged(self) -> None:
        """The model it was given is as before, and shares no memory with the result."""
        if not self.copies:
            return
        model = self.model()
        before = self._logits(model)
        small = self.active(model)
        for parameter in small.parameters():
            parameter.data.zero_()
        assert (self._logits(model) == before).all()

    def check_deterministic(self) -> None:
        """The same operation on the same model gives the same weights."""
        import torch

        a, b = self.active(self.model()), self.active(self.model())
        for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert torch.equal(p, q), name


class TokenLossCase(Case):
    """An objective over (outputs, batch) of a language model."""

    role = "Objective"

    def objective(self) -> Any:
        """A fresh objective."""
        raise NotImplementedError("abstract: the objective")

    def reference(self, logits: Any, labels: Any) -> float:
        """The sum over trained tokens, written independently."""
        raise NotImplementedError("abstract: the reference")

    def problem(self, rows: int = 3, tokens: int = 8) -> tuple[Any, Any, Any]:
        """Hidden states [B, T, D], a head, and labels with prompt and padding masked."""
        import torch

        from residency.objective import IGNORE, Head

        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn((rows, tokens, 5), generator=generator, dtype=torch.float64)
        head = Head(torch.randn((19, 5), generator=generator, dtype=torch.float64))
        labels = torch.randint(0, 19, (rows, tokens), generator=generator)
        labels[:, :3] = IGNORE
        labels[0, 6:] = IGNORE
        return hidden, head, labels

    def _value(self, hidden: Any, head: Any, labels: Any) -> tuple[Any, int]:
        from residency.objective import Outputs

        total, count = self.objective()(Outputs(hidden=hidden, head=head), {"labels": labels})
        return total, int(count)

    def check_reference(self) -> None:
        """The sum equals an independent implementation; the count is the number of trained tokens."""
        hidden, head, labels = self.problem()
        total, count = self._value(hidden, head, labels)
        assert abs(float(total) - self.reference(head(hidden), labels)) < 1e-8
        assert count == int((labels[:, 1:] != -100).sum()) == self.objective().count({"labels": labels})

    def check_padding_and_accumulation(self) -> None:
        """Rows one by one, and with more padding, give the same sum."""
        import torch

        hidden, head, labels = self.problem()
        whole, count = self._value(hidden, head, labels)
        parts = [self._value(hidden[i : i + 1], head, labels[i : i + 1]) for i in range(len(hidden))]
        torch.testing.assert_close(sum(p for p, _ in parts), whole)
        assert sum(c for _, c in parts) == count
        wider = torch.cat([hidden, torch.full_like(hidden[:, :2], 7.0)], 1)
        padded = torch.cat([labels, torch.full_like(labels[:, :2], -100)], 1)
        torch.testing.assert_close(self._value(wider, head, padded)[0], whole)

    def check_masked_positions(self) -> None:
        """Masked positions get exactly zero gradient; a batch without supervision gives (0, 0)."""
        import torch

        hidden, head, labels = self.problem()
        hidden.requires_grad_(True)
        self._value(hidden, head, labels)[0].backward()
        trained = torch.zeros(labels.shape, dtype=torch.bool)
        trained[:, :-1] = labels[:, 1:] != -100
        assert hidden.grad is not None
        assert not hidden.grad[~trained].any()
        assert hidden.grad[trained].abs().sum(-1).min() > 0
        total, count = self._value(hidden.detach(), head, torch.full_like(labels, -100))
        assert float(total) == 0
        assert count == 0


class LabelLossCase(Case):
    """An objective over a head's outputs [B, C] and labels [B]."""

    role = "Objective"

    def objective(self) -> Any:
        """A fresh objective."""
        raise NotImplementedError("abstract: the objective")

    def reference(self, logits: Any, labels: Any) -> float:
        """The sum over rows, written independently."""
        raise NotImplementedError("abstract: the reference")

    def problems(self) -> list[tuple[Any, Any]]:
        """Logits and labels: five rows of four classes, and five of one number."""
        import torch

        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((5, 4), generator=generator, dtype=torch.float64)
        return [(logits, torch.tensor([0, 3, 1, 1, 2])), (logits[:, :1], logits[:, 1])]

    def _value(self, logits: Any, labels: Any) -> tuple[Any, int]:
        from residency.objective import Outputs

        total, count = self.objective()(Outputs(logits=logits), {"labels": labels})
        return total, int(count)

    def check_reference(self) -> None:
        """The sum equals an independent implementation; the count is the number of rows."""
        for logits, labels in self.problems():
            total, count = self._value(logits, labels)
            assert abs(float(total) - self.reference(logits, labels)) < 1e-10
            assert count == 5 == self.objective().count({"labels": labels})

    def check_accumulation(self) -> None:
        """Rows one by one give the same sum and gradient."""
        import torch

        for logits, labels in self.problems():
            whole = logits.clone().requires_grad_(True)
            self._value(whole, labels)[0].backward()
            parts = logits.clone().requires_grad_(True)
            sum(self._value(parts[i : i + 1], labels[i : i + 1])[0] for i in range(5)).backward()
            torch.testing.assert_close(parts.grad, whole.grad)

    def check_extremes(self) -> None:
        """Half precision and logits of ±1e4 stay finite; wrong shapes are refused."""
        import torch

        for logits, labels in self.problems():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                hot = (logits * 1e4).to(dtype).requires_grad_(True)
                total, _ = self._value(hot, labels.float() if labels.is_floating_point() else labels)
                total.backward()
                assert torch.isfinite(total), dtype
                assert hot.grad is not None
                assert torch.isfinite(hot.grad).all(), dtype
            try:
                self._value(logits[:3], labels)
            except ValueError:
                continue
            raise AssertionError("3 rows of logits were matched with 5 labels")


class FeatureLossCase(Case):
    """An objective over an encoder's features [B, D] and labels [B], perhaps with a memory of what it has seen."""

    role = "Objective"
    in_batch: ClassVar[bool] = True
    """Whether rows are contrasted with others of their batch: then another cut of a step is another loss, and the suite
    checks that this is so instead of the opposite.
    """

    def objective(self) -> Any:
        """A fresh objective for three classes and five features, in float64."""
        raise NotImplementedError("abstract: the objective")

    def reference(self, objective: Any, features: Any, labels: Any) -> float:
        """The sum over rows, written independently; the objective has begun its epoch and seen no batch."""
        raise NotImplementedError("abstract: the reference")

    def problem(self, rows: int = 12) -> tuple[Any, Any]:
        """Features and labels; every class has several rows."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randn((rows, 5), generator=generator, dtype=torch.float64), torch.arange(rows) % 3

    def batch(self, features: Any, labels: Any) -> dict[str, Any]:
        """A batch of these rows, as `views.collate_views` makes them."""
        import torch

        clean = torch.zeros(len(labels), dtype=torch.bool)
        return {"labels": labels, "rows": torch.arange(len(labels)), "clean": clean, "strong": features.detach()}

    def begun(self, features: Any, labels: Any, epoch: int = 0) -> tuple[Any, Any]:
        """An objective that has prepared an epoch over these rows, and the rows it chose."""
        import torch

        from residency.objective import Outputs

        objective = self.objective()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            chosen = objective.begin_epoch(
                epoch, 4, lambda: iter([(Outputs(features=features.detach()), self.batch(features, labels))])
            )
        return objective, chosen

    def _value(self, objective: Any, features: Any, labels: Any) -> tuple[Any, int]:
        import torch

        from residency.objective import Outputs

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            total, count = objective(Outputs(features=features), self.batch(features, labels))
        return total, int(count)

    def check_reference(self) -> None:
        """The sum equals an independent implementation; the count is the number of rows, known beforehand."""
        features, labels = self.problem()
        objective, _ = self.begun(features, labels)
        expected = self.reference(objective, features, labels)
        total, count = self._value(objective, features, labels)
        total = total.detach()
        assert abs(float(total) - expected) <= 1e-8 * max(1.0, abs(expected)), f"{float(total)} against {expected}"
        assert count == len(labels) == objective.count(self.batch(features, labels))

    def check_order(self) -> None:
        """The order of a batch's rows does not matter."""
        import torch

        features, labels = self.problem()
        order = torch.tensor([3, 11, 0, 7, 1, 10, 5, 2, 8, 4, 9, 6])
        (a, _), (b, _) = self.begun(features, labels), self.begun(features, labels)
        whole, shuffled = self._value(a, features, labels)[0], self._value(b, features[order], labels[order])[0]
        torch.testing.assert_close(shuffled, whole)

    def check_cutting_a_step(self) -> None:
        """Counts of parts add up, and so do sums, unless the case declares that rows see their batch: then not."""
        import torch

        features, labels = self.problem()
        whole, count = self._value(self.begun(features, labels)[0], features, labels)
        rows = range(len(labels))
        parts = [self._value(self.begun(features, labels)[0], features[i : i + 1], labels[i : i + 1]) for i in rows]
        assert sum(c for _, c in parts) == count
        added = torch.stack([p for p, _ in parts]).sum()
        same = bool((added - whole).abs() <= 1e-9 * whole.abs())
        assert same != self.in_batch, f"parts add up to {float(added)}, the whole is {float(whole)}"

    def check_gradients(self) -> None:
        """Every row's features get a gradient, every trained parameter of the objective too, and nothing else."""
        features, labels = self.problem()
        objective, _ = self.begun(features, labels)
        features.requires_grad_(True)
        self._value(objective, features, labels)[0].backward()
        assert features.grad is not None
        assert features.grad.norm(dim=1).min() > 0
        without = [
            n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
        ]
        assert not without, f"no gradient: {without}"
        assert not any(b.requires_grad for b in objective.buffers())

    def check_extremes(self) -> None:
        """No rows give (0, 0); half precision, equal rows, rows of length 0 and of 1e4 stay finite."""
        import torch

        features, labels = self.problem()
        total, count = self._value(self.begun(features, labels)[0], features[:0], labels[:0])
        assert float(total.detach()) == 0.0
        assert count == 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for scale, shift in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1e4, 0.0)):
                z = (features * scale + shift).to(dtype)
                objective, _ = self.begun(z, labels)
                objective = objective.float()
                z.requires_grad_(True)
                total, _ = self._value(objective, z, labels)
                total.backward()
                assert torch.isfinite(total), f"{dtype}, {scale} z + {shift}: {total}"
                assert z.grad is not None
                assert torch.isfinite(z.grad).all(), f"{dtype}, {scale} z + {shift}: the gradient is not finite"

    def check_rows_of_an_epoch(self) -> None:
        """An epoch has as many different rows as announced, or all."""
        features, labels = self.problem()
        for epoch in range(4):
            objective, chosen = self.begun(features, labels, epoch)
            expected = objective.rows_per_epoch(len(labels))
            if chosen is None:
                assert expected == len(labels)
            else:
                assert len(chosen) == len(set(chosen)) == expected
                assert all(0 <= i < len(labels) for i in chosen)

    def check_state(self) -> None:
        """All it remembers is in its state: a copy goes on with the same values, and the shapes do not change."""
        import torch

        features, labels = self.problem()
        one, other = self.begun(features, labels)[0], self.objective()
        shapes = {n: t.shape for n, t in other.state_dict().items()}
        for start in (0, 4):
            self._value(one, features[start : start + 4], labels[start : start + 4])
        other.load_state_dict(one.state_dict())
        for start in (8, 2):
            part = features[start : start + 4], labels[start : start + 4]
            torch.testing.assert_close(self._value(other, *part)[0], self._value(one, *part)[0], rtol=0, atol=0)
        assert {n: t.shape for n, t in one.state_dict().items()} == shapes


class PredictorCase(Case):
    """A head fitted on frozen features."""

    role = "Predictor"
    heads: ClassVar[tuple[dict[str, Any], ...]] = ()

    def fit(self, features: Any, labels: list[str], **params: Any) -> Any:
        """Fit a head; it has `predict(features)`, `classes`, `save`, `load`."""
        raise NotImplementedError("abstract: fitting")

    def problem(self, seed: int = 0) -> tuple[Any, list[str]]:
        """Three separable classes with unequal sizes."""
        import numpy as np

        rng = np.random.default_rng(seed)
        labels = ["a"] * 20 + ["b"] * 12 + ["c"] * 8
        centres = {"a": [3, 0, 0], "b": [0, 3, 0], "c": [0, 0, 3]}
        return np.array([centres[c] + rng.standard_normal(3) * 0.6 for c in labels], np.float32), labels

    def check_learns(self) -> None:
        """Separable classes are learnt, and fresh rows of them recognised."""
        import numpy as np

        for params in self.heads:
            head = self.fit(*self.problem(), **params)
            fresh, labels = self.problem(1)
            right = np.mean([p == t for p, t in zip(head.predict(fresh), labels, strict=True)])
            assert right > 0.95, f"{params}: {right}"

    def check_order_does_not_matter(self) -> None:
        """Shuffled training rows give the same head."""
        import numpy as np
        import torch

        features, labels = self.problem()
        order = np.random.default_rng(0).permutation(len(labels))
        for params in self.heads:
            a = self.fit(features, labels, **params)
            b = self.fit(features[order], [labels[i] for i in order], **params)
            torch.testing.assert_close(a.weight, b.weight, rtol=1e-3, atol=1e-4)

    def check_one_class_is_refused(self) -> None:
        """A single class is an error a user can read."""
        from residency.errors import DataError

        features, labels = self.problem()
        try:
            self.fit(features[:5], labels[:5], **self.heads[0])
        except DataError:
            return
        raise AssertionError("accepted")


Factory = Callable[[], Case]

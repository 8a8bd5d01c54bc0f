"""Cases of the distillation losses."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.catalog import load
from residency.testing.roles import PairLossCase


class DivergenceCase(PairLossCase):
    """What the cases of `compress.divergence` share: the method's class with its default parameters."""

    object: ClassVar[str]

    @property
    def params(self) -> Any:
        return load(self.object).Params

    def _loss(self) -> Any:
        return load(self.object)()

    def dense(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        return self._loss().dense(student, teacher)

    def fused(
        self, student: Any, head: Any, teacher: Any, teacher_head: Any, chunk_bytes: int | None
    ) -> tuple[Any, Any]:
        return self._loss().fused(student, head, teacher, teacher_head, chunk_bytes=chunk_bytes)

    def reference(self, student: Any, teacher: Any) -> float:
        rows = zip(student.tolist(), teacher.tolist(), strict=True)
        return math.fsum(self.token(s, t) for s, t in rows)

    def token(self, s: list[float], t: list[float]) -> float:
        """The loss of one token, in Python floats: student and teacher logits."""
        raise NotImplementedError("abstract: the reference of one token")


class BiLDCase(DivergenceCase):
    """Reference: the definition in plain Python, one pair at a time."""

    name = "bild"
    object = "residency.compress.bild:BiLD"

    def reference(self, student: Any, teacher: Any) -> float:
        total = 0.0
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
            for leader in (t, s):
                top = sorted(range(len(leader)), key=lambda i: -leader[i])[:8]
                pairs = [(top[m], top[n]) for m in range(8) for n in range(m + 1, 8)]
                target = _log_softmax([(t[i] - t[j]) / 3 for i, j in pairs])
                guess = _log_softmax([(s[i] - s[j]) / 3 for i, j in pairs])
                total += sum(math.exp(p) * (p - q) for p, q in zip(target, guess, strict=True))
        return total

    def check_constants_do_not_matter(self) -> None:
        """Adding a constant to all logits of a token changes nothing."""
        student, teacher = self.logits()
        before = float(self.dense(student, teacher)[0])
        assert abs(float(self.dense(student + 5, teacher - 3)[0]) - before) < 1e-9

    def check_two_words_are_refused(self) -> None:
        """Fewer than three selected words would make the loss identically zero, and are refused."""
        from residency.compress.bild import BiLDParams

        try:
            BiLDParams(k=2)
        except ValueError:
            return
        raise AssertionError("accepted k=2")


class KLCase(DivergenceCase):
    """Reference: torch.nn.functional.kl_div."""

    name = "kl"
    object = "residency.compress.kl:KL"

    def reference(self, student: Any, teacher: Any) -> float:
        from torch.nn.functional import kl_div

        guess, target = student.log_softmax(-1), teacher.log_softmax(-1)
        return float(kl_div(guess, target, log_target=True, reduction="sum"))


def _kl(log_p: list[float], log_q: list[float]) -> float:
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def _mix(weight: float, log_p: list[float], log_q: list[float]) -> list[float]:
    return [math.log(weight * math.exp(p) + (1 - weight) * math.exp(q)) for p, q in zip(log_p, log_q, strict=True)]


class ReverseKLCase(DivergenceCase):
    """Reference: the sum over words, by loop."""

    name = "reverse-kl"
    object = "residency.compress.divergences:ReverseKL"

    def token(self, s: list[float], t: list[float]) -> float:
        return _kl(_log_softmax(s), _log_softmax(t))


class JSCase(DivergenceCase):
    """Reference: the sum over words, by loop."""

    name = "js"
    object = "residency.compress.divergences:JS"

    def token(self, s: list[float], t: list[float]) -> float:
        q, p = _log_softmax(s), _log_softmax(t)
        m = _mix(0.5, p, q)
        return (_kl(p, m) + _kl(q, m)) / 2


class SkewedKLCase(DivergenceCase):
    """Reference: the sum over words, by loop."""

    name = "skewed-kl"
    object = "residency.compress.divergences:SkewedKL"

    def token(self, s: list[float], t: list[float]) -> float:
        q, p = _log_softmax(s), _log_softmax(t)
        return _kl(p, _mix(0.1, p, q))


class TVDCase(DivergenceCase):
    """Reference: the sum over words, by loop."""

    name = "tvd"
    object = "residency.compress.divergences:TVD"

    def token(self, s: list[float], t: list[float]) -> float:
        return (
            math.fsum(abs(math.exp(a) - math.exp(b)) for a, b in zip(_log_softmax(s), _log_softmax(t), strict=True)) / 2
        )


class DKDCase(DivergenceCase):
    """Reference: two divergences by loop, the target being the teacher's likeliest word."""

    name = "dkd"
    object = "residency.compress.divergences:DKD"

    def token(self, s: list[float], t: list[float]) -> float:
        y = t.index(max(t))
        halves, rests = [], []
        for logits in (t, s):
            whole = _log_softmax([x / 4 for x in logits])
            others = [x for v, x in enumerate(whole) if v != y]
            halves.append([whole[y], math.log(math.fsum(map(math.exp, others)))])
            rests.append(_log_softmax(others))
        return 16 * (_kl(*halves) + 8 * _kl(*rests))


class NKDCase(DivergenceCase):
    """Reference: two cross-entropies by loop."""

    name = "nkd"
    object = "residency.compress.divergences:NKD"

    def token(self, s: list[float], t: list[float]) -> float:
        y = t.index(max(t))
        q, p = _log_softmax(s), _log_softmax(t)
        rest_q, rest_p = (_log_softmax([v for i, v in enumerate(x) if i != y]) for x in (q, p))
        return -math.exp(p[y]) * q[y] - 1.5 * math.fsum(math.exp(a) * b for a, b in zip(rest_p, rest_q, strict=True))

    def check_self_is_zero(self) -> None:
        """By its definition it is not: a student equal to its teacher is still drawn to the target, and only there."""
        student, _ = self.logits()
        mine = student.clone().requires_grad_(True)
        total, _ = self.dense(mine, student)
        total.backward()
        assert float(total.detach()) > 0
        assert mine.grad is not None
        targets = student.argmax(1, keepdim=True)
        assert (mine.grad.gather(1, targets) < 0).all()
        # among the others nothing is left to learn: their gradient is proportional to their probability
        ratio = (mine.grad / student.softmax(1)).scatter(1, targets, 0)
        assert float((ratio.amax(1) - ratio.scatter(1, targets, 1e9).amin(1)).abs().max()) < 1e-9


class NormKDCase(DivergenceCase):
    """Reference: the statistics module's standard deviation, and KL by loop."""

    name = "normkd"
    object = "residency.compress.divergences:NormKD"

    def token(self, s: list[float], t: list[float]) -> float:
        import statistics

        own = [2 * statistics.stdev(x) for x in (s, t)]
        return own[1] ** 2 * _kl(*(_log_softmax([v / o for v in x]) for x, o in ((t, own[1]), (s, own[0]))))


class AdaptiveKLCase(DivergenceCase):
    """Reference: the head by a walk down the teacher's ranking."""

    name = "adaptive-kl"
    object = "residency.compress.divergences:AdaptiveKL"

    def token(self, s: list[float], t: list[float]) -> float:
        q, p = _log_softmax(s), _log_softmax(t)
        order = sorted(range(len(t)), key=lambda v: -t[v])
        gaps = [abs(math.exp(p[v]) - math.exp(q[v])) for v in order]
        inside = 1
        while math.fsum(math.exp(p[v]) for v in order[: inside + 1]) <= 0.5:
            inside += 1
        head = math.fsum(gaps[:inside]) / math.fsum(gaps)
        return head * _kl(p, q) + (1 - head) * _kl(q, p)


class TopKLCase(DivergenceCase):
    """Reference: KL over the best words by loop, with k below the vocabulary."""

    name = "top-kl"
    object = "residency.compress.divergences:TopKL"

    def _loss(self) -> Any:
        loss = load(self.object)
        return loss(loss.Params(k=9))

    def token(self, s: list[float], t: list[float]) -> float:
        best = sorted(range(len(t)), key=lambda v: -t[v])[:9]
        return _kl(*(_log_softmax([x[v] / 3 for v in best]) for x in (t, s)))


class SinKDCase(DivergenceCase):
    """Reference: the released equations, in exponentials, by loop; groups of three tokens."""

    name = "sinkd"
    object = "residency.compress.sinkd:SinKD"

    def _loss(self, **keys: Any) -> Any:
        loss = load(self.object)
        return loss(loss.Params(group=3, **keys))

    def reference(self, student: Any, teacher: Any) -> float:
        total = 0.0
        for start in range(0, len(student), 3):
            q, p = (
                [[math.exp(v) for v in _log_softmax([x / 2 for x in row])] for row in z[start : start + 3].tolist()]
                for z in (student, teacher)
            )
            n = range(len(q))
            cost = [[math.fsum(abs(a - b) for a, b in zip(q[i], p[j], strict=True)) for j in n] for i in n]
            plan = [[math.exp(-c / 0.1) for c in row] for row in cost]
            for _ in range(20):
                plan = [[x / math.fsum(row) for x in row] for row in plan]
                sums = [math.fsum(plan[i][j] for i in n) for j in n]
                plan = [[plan[i][j] / sums[j] for j in n] for i in n]
            total += math.fsum(plan[i][j] * cost[i][j] for i in n for j in n)
        return total

    def check_accumulation_and_order(self) -> None:
        """Whole groups add up; within a group the order of the student's tokens does not matter at convergence."""
        import torch

        student, teacher = self.logits()
        whole, count = self.dense(student, teacher)
        a, n = self.dense(student[:3], teacher[:3])
        b, m = self.dense(student[3:], teacher[3:])
        torch.testing.assert_close(a + b, whole)
        assert int(n) + int(m) == int(count)
        order = torch.tensor([2, 0, 1, 5, 3, 4, 6])
        converged = self._loss(iterations=3000)
        torch.testing.assert_close(converged.dense(student[order], teacher)[0], converged.dense(student, teacher)[0])

    def check_self_is_zero(self) -> None:
        """Debiased, a batch equal to its teacher's has nothing to learn: loss 0, gradient 0."""
        student, _ = self.logits()
        mine = student.clone().requires_grad_(True)
        total, _ = self._loss(debias=True, gradient="envelope", iterations=3000).dense(mine, student)
        total.backward()
        assert abs(float(total.detach())) < 1e-9
        assert mine.grad is not None
        assert float(mine.grad.abs().max()) < 1e-7


class ULDCase(DivergenceCase):
    """Reference: sorted lists."""

    name = "uld"
    object = "residency.compress.uld:ULD"

    def token(self, s: list[float], t: list[float]) -> float:
        q, p = (sorted(map(math.exp, _log_softmax(x)), reverse=True) for x in (s, t))
        longest = max(len(q), len(p))
        q, p = (x + [0.0] * (longest - len(x)) for x in (q, p))
        return math.fsum(abs(a - b) for a, b in zip(q, p, strict=True))

    def check_vocabularies_may_differ(self) -> None:
        """Other vocabularies, and other names of the words, make no difference to it."""
        import torch

        student, teacher = self.logits()
        short = teacher[:, :11]
        assert abs(float(self.dense(student, short)[0]) - self.reference(student, short)) < 1e-9
        torch.testing.assert_close(self.dense(student.flip(1), teacher), self.dense(student, teacher))


def _log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = math.log(sum(math.exp(v - top) for v in values)) + top
    return [v - total for v in values]

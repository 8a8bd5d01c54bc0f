"""One case per catalogue row: its tiny input, its baseline, its independent reference."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from residency.testing.roles import (
    Case,
    Factory,
    MetricCase,
    PairLossCase,
    PredictorCase,
    SelectorCase,
    SurgeryCase,
    TokenLossCase,
)


class BiLDCase(PairLossCase):
    """Reference: the definition in plain Python, one pair at a time."""

    name = "bild"

    def _loss(self) -> Any:
        from residency.compress.bild import BiLD

        return BiLD()

    def dense(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        return self._loss().dense(student, teacher)

    def fused(
        self, student: Any, head: Any, teacher: Any, teacher_head: Any, chunk_bytes: int | None
    ) -> tuple[Any, Any]:
        return self._loss().fused(student, head, teacher, teacher_head, chunk_bytes=chunk_bytes)

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


class KLCase(PairLossCase):
    """Reference: torch.nn.functional.kl_div."""

    name = "kl"

    def _loss(self) -> Any:
        from residency.compress.kl import KL

        return KL()

    def dense(self, student: Any, teacher: Any) -> tuple[Any, Any]:
        return self._loss().dense(student, teacher)

    def fused(
        self, student: Any, head: Any, teacher: Any, teacher_head: Any, chunk_bytes: int | None
    ) -> tuple[Any, Any]:
        return self._loss().fused(student, head, teacher, teacher_head, chunk_bytes=chunk_bytes)

    def reference(self, student: Any, teacher: Any) -> float:
        from torch.nn.functional import kl_div

        guess, target = student.log_softmax(-1), teacher.log_softmax(-1)
        return float(kl_div(guess, target, log_target=True, reduction="sum"))


class CrossEntropyCase(TokenLossCase):
    """Reference: torch.nn.functional.cross_entropy on shifted labels."""

    name = "cross-entropy"

    def objective(self) -> Any:
        from residency.adapt.crossentropy import CrossEntropy

        return CrossEntropy()

    def reference(self, logits: Any, labels: Any) -> float:
        from torch.nn.functional import cross_entropy

        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return float(cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"))


class KShotCase(SelectorCase):
    """Reference: the paper's pairwise rule by double loop, over as many candidates as the budget takes."""

    name = "k-shot"
    settings = (
        {"keep": 20, "near_duplicates": 0.9},
        {"keep": 12, "near_duplicates": 0.9},
        {"keep": 12, "near_duplicates": 0.8},
        {"keep": 12, "near_duplicates": 0.8, "candidates": 9},
    )
    everything = {"keep": 10_000, "near_duplicates": 1.0}  # noqa: RUF012

    @property
    def params(self) -> Any:
        from residency.curate.simdiv import SimDiv

        return SimDiv

    def select(self, pool: Any, examples: Any, **params: Any) -> Any:
        return self.params(**params).select(pool, examples)

    def reference(self, pool: Any, examples: Any, **params: Any) -> list[int]:
        import numpy as np

        def cosine(a: Any, b: Any) -> float:
            return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))

        score = [max(cosine(u, v) for u in examples) for v in pool]
        order = sorted(range(len(pool)), key=lambda j: -score[j])[: params.get("candidates") or len(pool)]
        kept = []
        for place, j in enumerate(order):
            if not any(cosine(pool[i], pool[j]) > params["near_duplicates"] for i in order[:place]):
                kept.append(j)
        return kept[: params["keep"]]


class LoraCase(SurgeryCase):
    """Baseline: an untrained adapter is the base itself."""

    name = "lora"

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

    def check_input_unchanged(self) -> None:
        """The model it was given is as before, and shares no memory with the result."""
        model = self.model()
        before = self._logits(model)
        small = self.active(model)
        for parameter in small.parameters():
            parameter.data.zero_()
        assert (self._logits(model) == before).all()


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


def _log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = math.log(sum(math.exp(v - top) for v in values)) + top
    return [v - total for v in values]


def _labels(seed: int, n: int = 30, classes: str = "abcd") -> list[str]:
    import random

    rng = random.Random(seed)
    return [rng.choice(classes) for _ in range(n)]


class ChoiceCase(MetricCase):
    """Reference: counting by hand."""

    name = "choice-accuracy"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.choice import ChoiceAccuracy

        return ChoiceAccuracy()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        scores = [([rng.gauss(0, 1) for _ in range(4)], [rng.gauss(0, 1) for _ in range(4)]) for _ in range(30)]
        return [(f"i{i:02}", list("wxyz"), a, b) for i, (a, b) in enumerate(scores)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [(f"i{i:02}", ["a", "b"], [-1.0, -1.0], [-3.0, -2.0]) for i in range(5)]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        right = [all(c[0] - u[0] > c[k] - u[k] for k in (1, 2, 3)) for _, _, c, u in updates]
        return sum(right) / len(right)


class BitsCase(MetricCase):
    """Reference: bits over bytes of all answers together."""

    name = "bits-per-byte"
    best = 0.0

    def new(self) -> Any:
        from residency.evaluate.bits_per_byte import BitsPerByte

        return BitsPerByte()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        import random

        rng = random.Random(seed)
        return [(f"i{i:02}", -rng.expovariate(0.05), "é" * rng.randint(1, 40)) for i in range(30)]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", 0.0, "sure"), ("i1", 0.0, "certain")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        nats = -sum(logprob for _, logprob, _ in updates)
        return nats / math.log(2) / sum(len(answer.encode()) for _, _, answer in updates)


class ExactMatchCase(MetricCase):
    """Reference: SQuAD's normalisation, written out."""

    name = "exact-match"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.exact_match import ExactMatch

        return ExactMatch()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        forms = {"a": "The cat!", "b": "cat", "c": " a  CAT ", "d": "dog"}
        return [(f"i{i:02}", forms[said], "cat") for i, said in enumerate(_labels(seed))]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "An apple.", "apple"), ("i1", "x", "X")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        return sum("cat" in said.lower() for _, said, _ in updates) / len(updates)


class RougeLCase(MetricCase):
    """Reference: the longest common subsequence by recursion over all subsets of the shorter text."""

    name = "rouge-l"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.rouge_l import RougeL

        return RougeL()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        letters = iter(_labels(seed, 30 * 11))
        take = [next(letters) for _ in range(30 * 11)]
        return [
            (f"i{i:02}", " ".join(take[11 * i : 11 * i + 5]), " ".join(take[11 * i + 5 : 11 * i + 11]))
            for i in range(30)
        ]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "The fee is due.", "the fee is due")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        def longest(a: tuple[str, ...], b: tuple[str, ...]) -> int:
            if not a or not b:
                return 0
            if a[0] == b[0]:
                return 1 + longest(a[1:], b[1:])
            return max(longest(a[1:], b), longest(a, b[1:]))

        values = []
        for _, said, gold in updates:
            a, b = tuple(said.split()), tuple(gold.split())
            shared = longest(a, b)
            precision, recall = shared / len(a), shared / len(b)
            values.append(2 * precision * recall / (precision + recall) if shared else 0.0)
        return sum(values) / len(values)


class MacroF1Case(MetricCase):
    """Reference: one class after the other, from counts."""

    name = "macro-f1"
    best = 1.0

    def new(self) -> Any:
        from residency.evaluate.macro_f1 import MacroF1

        return MacroF1()

    def updates(self, seed: int = 0) -> list[tuple[Any, ...]]:
        said, gold = _labels(seed), _labels(seed + 100, classes="aab")
        return [(f"i{i:02}", s, g) for i, (s, g) in enumerate(zip(said, gold, strict=True))]

    def perfect(self) -> list[tuple[Any, ...]]:
        return [("i0", "x", "x"), ("i1", "y", "y")]

    def reference(self, updates: list[tuple[Any, ...]]) -> float:
        pairs = [(s, g) for _, s, g in updates]
        classes = {label for pair in pairs for label in pair}
        values = []
        for c in classes:
            hit = sum(s == g == c for s, g in pairs)
            values.append(2 * hit / (sum(s == c for s, _ in pairs) + sum(g == c for _, g in pairs)))
        return sum(values) / len(values)


_ALL: tuple[type[Case], ...] = (
    BiLDCase,
    KLCase,
    CrossEntropyCase,
    KShotCase,
    LoraCase,
    DepthPruningCase,
    ProbeCase,
    ChoiceCase,
    BitsCase,
    ExactMatchCase,
    RougeLCase,
    MacroF1Case,
)

CASES: dict[str, Factory] = {case.name: case for case in _ALL}

"""Cases of the curate stage: scores of single rows: statistics, what a language model or a judge says of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from residency.testing.rowroles import ScorerCase

# ------------------------------------------------------------------ what one forward pass says


@cache
def model_and_tokenizer() -> tuple[Any, Any]:
    """A tiny random model whose predictions are not flat, and a byte-level tokenizer."""
    from residency.embedded import CHAT_TEMPLATE, byte_tokenizer
    from residency.testing.tinyllama import tiny_llama

    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    return tiny_llama(vocab_size=len(tokenizer), num_hidden_layers=2), tokenizer


@cache
def rows_to_read() -> tuple[Any, ...]:
    """Chat rows of all lengths, one with a system turn, two without a template, one without an answer."""
    from residency.rows import Row

    asked = ("what is it", "why", "how many of these are there in all", "is that so", "say it again please")
    said = ("a wall", "b", "because of the rain and the wind", "no, it is not", "a roof, a door and seven windows")
    rows = [
        Row(id=f"{i}", messages=(("user", f"{asked[i % 5]} {i}?"), ("assistant", said[(i * 3 + i // 5) % 5])))
        for i in range(11)
    ]
    system = Row(id="s", messages=(("system", "be brief"), ("user", "why is that?"), ("assistant", "of old")))
    plain = [Row(id=f"p{i}", messages=(("user", "1 2 3"), ("assistant", f" 4 {i}")), chat=False) for i in range(2)]
    empty = Row(id="e", messages=(("user", "why?"), ("assistant", " ")))
    return (*rows, system, *plain, empty)


@cache
def reading_for(score: type, settings: str) -> Any:
    """One reading with the passes of a score under all settings of its case."""
    import json

    from residency.curate.reading import read

    model, tokenizer = model_and_tokenizer()
    return read(model, tokenizer, rows_to_read(), [score(**each) for each in json.loads(settings)], batch_tokens=200)


class ReadCase(ScorerCase):
    """Scores of a reading; the reference runs the model row by row, without batches, on transformers' own logits."""

    tolerance = 1e-4

    def problem(self, seed: int = 0) -> tuple[Any]:
        """The reading of some rows."""
        import json

        return (reading_for(self.params, json.dumps(self.settings)),)

    def reference(self, *inputs: Any, **params: Any) -> list[float]:
        from residency.tokens import encode

        _, tokenizer = model_and_tokenizer()
        found = []
        for row in rows_to_read():
            if not row.answer.strip():
                found.append(float("nan"))
                continue
            item = encode(row, tokenizer)
            found.append(self.of_row(row, list(item.prompt), list(item.answer), **params))
        return found

    def of_row(self, *row: Any, **params: Any) -> float:
        """The score of one row, by hand, from the row and the ids of its prompt and answer."""
        raise NotImplementedError("abstract: the score of one row")

    def log_p(self, prompt: list[int], answer: list[int], model: Any = None) -> Any:
        """[T, V] log-probabilities at the answer's tokens, float64."""
        import torch

        model = model or model_and_tokenizer()[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.double().log_softmax(-1)

    def nll(self, prompt: list[int], answer: list[int], model: Any = None) -> float:
        """What transformers itself gives as the loss on the answer."""
        import torch

        model = model or model_and_tokenizer()[0]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + answer])
            return float(model(torch.tensor([prompt + answer]), labels=labels).loss)


class PerplexityCase(ReadCase):
    """Reference: transformers' own loss per row."""

    name = "perplexity"

    def of_row(self, row: Any, prompt: list[int], answer: list[int]) -> float:
        import math

        return math.exp(self.nll(prompt, answer))


class IFDCase(ReadCase):
    """Reference: two runs per row with transformers' own loss."""

    name = "ifd"
    settings = ({}, {"form": "perplexity"})

    def of_row(self, row: Any, prompt: list[int], answer: list[int], form: str = "loss") -> float:
        import math

        _, tokenizer = model_and_tokenizer()
        start = "<|im_start|>assistant\n" if row.chat else "<|im_start|>"  # the latter is BOS
        alone = self.nll(tokenizer(start)["input_ids"], answer)
        given = self.nll(prompt, answer)
        return given / alone if form == "loss" else math.exp(given) / math.exp(alone)


class AnswerTokensCase(ReadCase):
    """Reference: the bytes of the answer and one end token."""

    name = "answer-tokens"

    def of_row(self, row: Any, prompt: list[int], answer: list[int]) -> float:
        return len(row.answer.encode()) + 1


class TokenEntropyCase(ReadCase):
    """Reference: torch's own entropy of a categorical distribution."""

    name = "token-entropy"

    def of_row(self, row: Any, prompt: list[int], answer: list[int]) -> float:
        from torch.distributions import Categorical

        return float(Categorical(logits=self.log_p(prompt, answer)).entropy().mean())


class LeastConfidenceCase(ReadCase):
    """Reference: the definition, on float64 probabilities."""

    name = "least-confidence"
    settings = ({}, {"form": "whole"})

    def of_row(self, row: Any, prompt: list[int], answer: list[int], form: str = "mean") -> float:
        best = self.log_p(prompt, answer).exp().max(-1).values
        return float((1 - best).mean() if form == "mean" else 1 - best.prod())


class MarginCase(ReadCase):
    """Reference: sorted probabilities."""

    name = "margin"
    settings = ({}, {"form": "least"})

    def of_row(self, row: Any, prompt: list[int], answer: list[int], form: str = "mean") -> float:
        p = self.log_p(prompt, answer).exp().sort(-1).values
        margins = p[:, -1] - p[:, -2]
        return float(margins.mean() if form == "mean" else margins.min())


class EL2NCase(ReadCase):
    """Reference: the norm of p − onehot, written out."""

    name = "el2n"

    def of_row(self, row: Any, prompt: list[int], answer: list[int]) -> float:
        import torch

        p = self.log_p(prompt, answer).exp()
        error = p - torch.nn.functional.one_hot(torch.tensor(answer), p.shape[1])
        return float(error.norm(dim=-1).mean())


class LearningComplexityCase(ReadCase):
    """Reference: a copy of the model whose weight columns are zeroed and scaled, with transformers' own loss."""

    name = "learning-complexity"
    settings = (
        {"rates": [0.1, 0.4]},
        {"rates": [0.2]},
        {"rates": [0.2], "form": "confidence"},
        {"rates": [0.2], "seed": 1},
    )

    def of_row(self, row: Any, prompt: list[int], answer: list[int], form: str = "loss", **params: Any) -> float:
        import math

        nll = [self.nll(prompt, answer, weaker(r, params.get("seed", 0), i)) for i, r in enumerate(params["rates"])]
        if form == "loss":
            return sum(nll) / len(nll)
        return 1 - sum(math.exp(-x) for x in nll) / len(nll)


@cache
def weaker(rate: float, seed: int, number: int) -> Any:
    """The model without some inputs of its layers: what they read is found by probing the weakened model."""
    import copy

    import torch

    from residency.curate.probes import weakened

    model = copy.deepcopy(model_and_tokenizer()[0])
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    columns = {}
    with torch.no_grad(), weakened(model, rate, f"{seed}/{number}"):
        for name, layer in layers.items():
            columns[name] = layer(torch.eye(layer.in_features)).T  # what comes out of each single input
    with torch.no_grad():
        for name, layer in layers.items():
            whole = layer.weight
            kept = (columns[name] != 0).any(0)
            assert 0 < int(kept.sum()) <= layer.in_features
            layer.weight.copy_(torch.where(kept, whole / (1 - rate), torch.zeros(())))
    return model


class Letters:
    """A tokenizer with one letter per token of the tiny model, so that whatever it writes is a text."""

    chat_template = None
    bos_token_id = pad_token_id = eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 0x4E00 for letter in text]}


class MemorisationCase(ReadCase):
    """Reference: argmax by hand; transformers' own greedy generation where exact."""

    name = "memorisation"
    settings = ({"over": "answer"}, {"over": "answer", "exact": True}, {"over": "window"}, {"exact": True})

    def problem(self, seed: int = 0) -> tuple[Any]:
        """Answers of which the model would write much itself: its own, with a change here and there."""
        return (memorised()[1],)

    def reference(self, reading: Any, over: str = "window", exact: bool = False) -> list[float]:
        import torch

        model, found = model_and_tokenizer()[0], []
        for row in memorised()[0]:
            prompt, answer = (Letters()(text)["input_ids"] for text in (row.prompt, row.answer))
            answer = [*answer, 0]
            if exact:
                whole = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)
                written = whole[0, len(prompt) :].tolist()
            else:
                written = self.log_p(prompt, answer).argmax(-1).tolist()
            count = len(answer) if over == "answer" else min(32, len(answer))
            found.append(sum(a == b for a, b in zip(written[:count], answer[:count], strict=True)) / count)
        return found


@cache
def memorised() -> tuple[tuple[Any, ...], Any]:
    """Rows whose answers are the model's own, changed at some places, and their reading."""
    import torch

    from residency.curate.hardness import Memorisation
    from residency.curate.reading import read
    from residency.rows import Row

    model, rows = model_and_tokenizer()[0], []
    for i in range(6):
        prompt = list(range(5 + i, 10 + i + i % 2))
        own = model.generate(torch.tensor([prompt]), max_new_tokens=50 - 6 * i, do_sample=False, pad_token_id=0)[0]
        answer = own[len(prompt) :].tolist()
        answer[8 + i] = (answer[8 + i] + 1) % 200
        asked, said = ("".join(chr(0x4E00 + t) for t in ids) for ids in (prompt, answer))
        rows.append(Row(id=str(i), messages=(("user", asked), ("assistant", said)), chat=False))
    wanted = [Memorisation(**each) for each in MemorisationCase.settings]
    return tuple(rows), read(model, Letters(), rows, wanted, batch_tokens=150)


class PromptUncertaintyCase(ReadCase):
    """Reference: the perturbed prompts rendered by hand, probabilities row by row."""

    name = "prompt-uncertainty"
    settings = (
        {"times": 3, "drop": 0.4},
        {"times": 3, "drop": 0.4, "per": "answer"},
        {"times": 3, "drop": 0.4, "seed": 1},
        {"times": 4, "drop": 0.4, "seed": 1},
        {"times": 4, "drop": 0.2, "seed": 1},
    )

    def of_row(self, row: Any, prompt: list[int], answer: list[int], times: int, drop: float, **more: Any) -> float:
        import math
        from hashlib import blake2b
        from random import Random

        _, tokenizer = model_and_tokenizer()
        question = row.prompt
        digest = blake2b(f"{more.get('seed', 0)}/{question}".encode(), digest_size=8).digest()
        random = Random(int.from_bytes(digest, "big") // 2)
        total = 0.0
        for _ in range(times):
            words = [word for word in question.split(" ") if random.random() >= drop] or [question.split(" ")[0]]
            text = tokenizer.decode(prompt).replace(question, " ".join(words))
            other = tokenizer(text)["input_ids"]
            if more.get("per") == "answer":
                total += abs(math.exp(-self.nll(prompt, answer)) - math.exp(-self.nll(other, answer)))
            else:
                at = list(range(len(answer)))
                p, q = (self.log_p(x, answer).exp()[at, answer] for x in (prompt, other))
                total += float((p - q).abs().mean())
        return total / times


# ------------------------------------------------------------------ statistics of texts

WORDS = ["the", "a", "roof", "wall", "rain", "table", "cables", "is", "wanted", "complicated", "permission", "because"]


def sayings(seed: int = 0, count: int = 12) -> list[str]:
    """Texts of a few different words, so that phrases repeat; one is empty, one has lines, one has no words."""
    import random

    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS[: 3 + i % 9], k=4 + 3 * i)) + draw.choice(".?!") for i in range(count)]
    texts[2] += " It is. The roof!\nthe wall\n\nIt is\nthe wall \n x2 = 30 % {of} 17;"
    return [*texts, "", " 12 --\n"]


class LengthCase(ScorerCase):
    """Reference: counted by hand."""

    name = "length"
    settings = ({}, {"of": "question"}, {"of": "both"}, {"of": "both", "unit": "characters"})
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        """Questions and answers."""
        return sayings(1)[::-1], sayings(2)

    def reference(self, questions: Any, answers: Any, of: str = "answer", unit: str = "words") -> list[float]:
        import re

        def size(text: str) -> int:
            return len(re.findall(r"\S+", text)) if unit == "words" else sum(1 for _ in text)

        pairs = zip(questions, answers, strict=True)
        return [(of != "answer") * size(q) + (of != "question") * size(a) for q, a in pairs]


class RepetitionCase(ScorerCase):
    """Reference: mark every word that lies in a repeated n-gram, all pairs compared."""

    name = "repetition"
    settings = ({}, {"n": 2}, {"form": "top-n-gram"}, {"form": "top-n-gram", "n": 3}, {"form": "lines"})

    def problem(self, seed: int = 0) -> tuple[Any]:
        """Texts that repeat themselves more or less."""
        return (sayings(3),)

    def reference(self, texts: Any, form: str = "n-grams", n: int | None = None) -> list[float]:
        return [self.of_text(text, form, n) for text in texts]

    def of_text(self, text: str, form: str, n: int | None) -> float:
        if form == "lines":
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            again = [line in lines[:i] for i, line in enumerate(lines)]
            return sum(again) / len(again) if again else float("nan")
        words, n = text.split(), n or (5 if form == "n-grams" else 2)
        if not words:
            return float("nan")
        grams = [words[i : i + n] for i in range(len(words) - n + 1)]
        if form == "n-grams":
            places = [i for i, gram in enumerate(grams) if gram in grams[:i]]
        else:
            best = max(grams, key=lambda gram: (grams.count(gram), len("".join(gram)))) if grams else []
            places = [i for i, gram in enumerate(grams) if gram == best] if grams.count(best) > 1 else []
        marked = {i + k for i in places for k in range(n)}
        return sum(len(words[i]) for i in marked) / len("".join(words))


class CharactersCase(ScorerCase):
    """Reference: Python's own classes of characters, one by one."""

    name = "characters"
    settings = ({}, {"kind": "letters"}, {"kind": "digits"})

    def problem(self, seed: int = 0) -> tuple[Any]:
        """Texts in several scripts."""
        return ([*sayings(4), "naïve Ὀδυσσεύς, 東京 2020!", "٣ € ½ + x", "\ud800 a\u200b."],)

    def reference(self, texts: Any, kind: str = "symbols") -> list[float]:
        import string

        found = []
        for text in texts:
            seen = [c for c in text if c.isprintable() and not c.isspace()]
            letters, digits = sum(c.isalpha() for c in seen), sum(c.isnumeric() and not c.isalpha() for c in seen)
            times = {"letters": letters, "digits": digits, "symbols": len(seen) - letters - digits}
            assert all(c.isalnum() or c in string.punctuation or ord(c) > 127 for c in seen)
            found.append(times[kind] / len(seen) if seen else float("nan"))
        return found


SYLLABLES = (1, 1, 1, 1, 1, 2, 2, 1, 2, 4, 3, 2)
"""Of `WORDS`, from a dictionary."""


class ReadabilityCase(ScorerCase):
    """Reference: the formulas, over words whose syllables are written down here."""

    name = "readability"
    settings = ({}, {"form": "fog"})

    def problem(self, seed: int = 0) -> tuple[Any]:
        """Sentences of known words."""
        import random

        draw = random.Random(seed)
        texts = ["  ".join(draw.choices(WORDS, k=3 + i)) + ". " + " ".join(draw.choices(WORDS, k=4)) for i in range(9)]
        return ([*(text + draw.choice("?!.") for text in texts), "...", ""],)

    def reference(self, texts: Any, form: str = "flesch") -> list[float]:
        found = []
        for text in texts:
            counts = [SYLLABLES[WORDS.index(word.strip(".?!"))] for word in text.split() if word.strip(".?!")]
            words, sentences = len(counts), 2
            if not words:
                found.append(float("nan"))
            elif form == "flesch":
                found.append(206.835 - 1.015 * words / sentences - 84.6 * sum(counts) / words)
            else:
                found.append(0.4 * (words / sentences + 100 * sum(c >= 3 for c in counts) / words))
        return found


# ------------------------------------------------------------------ classifiers, judges, combinations


class AFLiteCase(ScorerCase):
    """Reference: scikit-learn's classifiers on the same partitions."""

    name = "aflite"
    settings = (
        {"partitions": 6, "train": 0.5},
        {"partitions": 6, "train": 0.5, "penalty": 30.0},
        {"partitions": 6, "train": 0.5, "penalty": 30.0, "classifier": "logistic"},
        {"partitions": 6, "train": 0.5, "seed": 1},
        {"partitions": 9, "train": 0.5, "seed": 1},
        {"partitions": 9, "train": 0.7, "seed": 1},
    )
    per_row = (0, 1)

    def problem(self, seed: int = 0) -> tuple[Any, Any]:
        """Three classes in a cloud, one label in eight wrong, one missing."""
        import numpy as np

        rng = np.random.default_rng(seed)
        y = rng.integers(0, 3, 70)
        rows = (rng.standard_normal((70, 6)) + np.eye(3, 6)[y] * 1.6).astype(np.float32)
        y[::8] = rng.integers(0, 3, len(y[::8]))
        labels: list[Any] = [f"class {i}" for i in y]
        labels[5] = None
        return rows, labels

    def reference(self, rows: Any, labels: Any, **params: Any) -> list[float]:
        import numpy as np
        from sklearn.linear_model import LogisticRegression, RidgeClassifier

        from residency.curate.predictability import content_keys, partitions

        known = [i for i, label in enumerate(labels) if label is not None]
        x, y = rows[known], np.array([labels[i] for i in known])
        keys = content_keys(x, np.array([int(label[-1]) for label in y]), params.get("seed", 0))
        x = x - x.mean(0)
        x = x / np.sqrt((x**2).sum(1).mean())
        penalty = params.get("penalty", 1.0)
        right, held = np.zeros(len(labels)), np.zeros(len(labels))
        for trained in partitions(keys, params["partitions"], params["train"]):
            if params.get("classifier") == "logistic":
                model: Any = LogisticRegression(C=1 / penalty, max_iter=1_000)
            else:
                model = RidgeClassifier(alpha=penalty)
            predicted = model.fit(x[trained], y[trained]).predict(x[~trained])
            for i, guess in zip(np.flatnonzero(~trained), predicted, strict=True):
                held[known[i]] += 1
                right[known[i]] += guess == labels[known[i]]
        return [r / h if h else float("nan") for r, h in zip(right, held, strict=True)]


def grader(messages: list[dict[str, str]]) -> str:
    """A judge without a model: its grade is the last digit of the prompt's length, in several manners of speaking."""
    size = len(messages[0]["content"])
    return ("{}", "Score: {}/6", "I would say {}.", "no idea", "Rating: **{}** of course")[size % 5].format(size % 10)


class JudgedCase(ScorerCase):
    """What scores of a judge share; the judge is an input that callers supply."""

    per_row = (0, 1)


class JudgeCase(JudgedCase):
    """Reference: the grades the judge must have given, from the length of the prompt."""

    name = "judge"
    settings = ({}, {"aspect": "complexity"}, {"lowest": 0}, {"lowest": 0, "highest": 4})

    def problem(self, seed: int = 0) -> tuple[Any, Any, Any]:
        """Rows, and a judge that sometimes says nothing."""
        questions, answers = sayings(5), sayings(6)
        answers[4] = "Ignore {lowest} and {question}."
        return questions, answers, grader

    def reference(self, questions: Any, answers: Any, judge: Any, **params: Any) -> list[float]:
        from residency.curate.judging import COMPLEXITY, QUALITY

        form = COMPLEXITY if params.get("aspect") == "complexity" else QUALITY
        lowest, highest = params.get("lowest", 1), params.get("highest", 6)
        found = []
        for q, a in zip(questions, answers, strict=True):
            head, _, rest = form.partition("{question}")
            rest = rest.replace("{lowest}", str(lowest)).replace("{highest}", str(highest))
            size = len(head) + len(q) + len(rest.replace("{answer}", a))
            value = size % 10 if size % 5 != 3 and lowest <= size % 10 <= highest else float("nan")
            found.append(value if q.strip() and a.strip() else float("nan"))
        return found


class RewardCase(JudgedCase):
    """Reference: the model of the case itself, row by row."""

    name = "reward"

    def problem(self, seed: int = 0) -> tuple[Any, Any, Any]:
        """Rows and a callable that gives numbers."""

        def reward(questions: list[str], answers: list[str]) -> list[float]:
            return [len(a) - len(q) / 2 for q, a in zip(questions, answers, strict=True)]

        return sayings(5), sayings(6), reward

    def reference(self, questions: Any, answers: Any, reward: Any) -> list[float]:
        pairs = zip(questions, answers, strict=True)
        return [len(a) - len(q) / 2 if q.strip() and a.strip() else float("nan") for q, a in pairs]


class OwnRewardCase(RewardCase):
    """The same of the model's own answers, where an empty one counts."""

    name = "own-reward"

    def reference(self, questions: Any, answers: Any, reward: Any) -> list[float]:
        pairs = zip(questions, answers, strict=True)
        return [len(a) - len(q) / 2 if q.strip() else float("nan") for q, a in pairs]


class CombinedCase(ScorerCase):
    """What scores of columns share."""

    def problem(self, seed: int = 0) -> tuple[Any]:
        """Four columns, one value missing."""
        import numpy as np

        rng = np.random.default_rng(seed)
        columns = {name: rng.uniform(1, 6, 15) for name in ("complexity", "quality", "own-reward", "reward")}
        columns["quality"][3] = np.nan
        return (columns,)

    def rows(self, inputs: tuple[Any, ...]) -> int:
        return len(inputs[0]["quality"])


class DeitaScoreCase(CombinedCase):
    """Reference: one row after the other."""

    name = "deita-score"
    settings = ({}, {"complexity": "reward"}, {"complexity": "reward", "quality": "own-reward"})

    def reference(self, columns: Any, complexity: str = "complexity", quality: str = "quality") -> list[float]:
        return [float(c) * float(q) for c, q in zip(columns[complexity], columns[quality], strict=True)]


class InstructionMiningCase(CombinedCase):
    """Reference: the sum, one row after the other."""

    name = "instruction-mining"
    settings = ({"weights": {"quality": -0.5, "reward": 2.0}}, {"weights": {"quality": -0.5}, "intercept": 1.0})

    def reference(self, columns: Any, weights: dict[str, float], intercept: float = 0.0) -> list[float]:
        return [intercept + sum(w * columns[name][i] for name, w in weights.items()) for i in range(15)]


class NecessityCase(CombinedCase):
    """Reference: one row after the other."""

    name = "necessity"
    settings = ({}, {"own": "reward"}, {"own": "reward", "given": "quality"})

    def reference(self, columns: Any, own: str = "own-reward", given: str | None = None) -> list[float]:
        return [(columns[given][i] if given else 0.0) - columns[own][i] for i in range(15)]

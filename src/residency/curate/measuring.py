"""Scores, embeddings and gradients of rows, a chunk at a time: what one worker does, here or on another machine.

`Work` says in plain values what is wanted and where the models lie; `Measurer` loads them once and measures chunk after
chunk. Every input a score needs is made once per chunk and shared (`Supply`), so ten scores over what a language model
says of a row cost one pass of that model. A row's figures depend on its chunk of `pool.CHUNK` rows at most, and chunks
are the same wherever they are measured: one process, several machines, or a second try after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from residency.catalog import load, method
from residency.curate.scoring import Score
from residency.errors import DataError

if TYPE_CHECKING:
    from residency.rows import Row

EMBEDDINGS, GRADIENTS, TOKENS = "#embeddings", "#gradients", "#tokens"
"""Names of what a measured chunk holds besides the columns of scores."""
OWN_TOKENS = 64
"""Longest answer of the reader's own, for scores that compare with it."""


@dataclass(frozen=True)
class Wanted:
    """One column: its name, the catalogue's name of the score, and the score's keys as the recipe spells them."""

    column: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)

    def score(self) -> Score:
        """The score with its keys."""
        row = method(self.method)
        found = load(row.object, row.extras).model_validate(self.params)
        assert isinstance(found, Score)
        return found


class Supply(dict[str, Any]):
    """Inputs by name, each made when it is first asked for.

    Args:
        makers: Name → makes the input.
    """

    def __init__(self, makers: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self._makers = makers

    def __missing__(self, name: str) -> Any:
        self[name] = value = self._makers[name]()
        return value

    def has(self, name: str) -> bool:
        """Whether an input is there or can be made."""
        return name in self or name in self._makers

    def only(self, rows: np.ndarray, size: int) -> Supply:
        """The same inputs of some of the `size` rows; what belongs to trusted rows stays whole."""

        def part(name: str) -> Any:
            values = self[name]
            if len(rows) == size or name.startswith("example_"):
                return values
            if name == "columns":
                return {column: each[rows] for column, each in values.items()}
            return values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]

        return Supply({name: partial(part, name) for name in self._makers})

    def of(self, needs: Iterable[str]) -> list[Any]:
        """The inputs of a score or a selector, in order; a name that ends in "?" may have no maker."""
        return [
            None if name.endswith("?") and not self.has(name[:-1]) else self[name.removesuffix("?")] for name in needs
        ]


def seeded(score: Score, seed: int) -> Score:
    """The score with the recipe's seed added to its own, if it draws anything."""
    own = getattr(score, "seed", None)
    return score if own is None else score.model_copy(update={"seed": own + seed})


def column_of(column: str, score: Score, supply: Supply) -> np.ndarray:
    """The values of a score.

    Raises:
        DataError: When these rows cannot be scored; the message names the column.
    """
    try:
        return np.asarray(score.score(*supply.of(score.needs)), float)
    except ValueError as error:
        raise DataError(f"the score `{column}` cannot be computed: {error}") from None


def texts_of(rows: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    """Makers of the inputs that come from the rows themselves."""

    def tokens() -> Any:
        from residency.curate.lexicaltokens import Tokens

        return Tokens.of([r.content for r in rows])

    return {
        "texts": lambda: [r.content for r in rows],
        "questions": lambda: [r.prompt for r in rows],
        "answers": lambda: [r.answer for r in rows],
        "labels": lambda: [label_of(r) for r in rows],
        "tags": lambda: [tags_of(r.tag) for r in rows],
        "tokens": tokens,
    }


def text_of(row: Row) -> str:
    """A row as a text to embed: what is asked and answered, or what is to be classified, without its label."""
    return row.content if row.messages else row.prompt


def label_of(row: Row) -> str | None:
    """The class of a row: its label, or its tag where it is not a row to classify."""
    return row.label if row.label is not None else row.tag


def tags_of(tag: str | None) -> tuple[str, ...]:
    """The tags of a row: what its source attached, parted at commas."""
    return tuple(t for t in (part.strip() for part in (tag or "").split(",")) if t)


@dataclass(frozen=True)
class Work:
    """What to measure, and with what.

    Args:
        scores: The columns.
        extras: Of `EMBEDDINGS`, `GRADIENTS`, `TOKENS`, what else to return.
        examples: JSONL of the trusted rows.
        models: Folder of each model that may be asked for: "encoder" (of sentences), "reader" (a language model that
            reads rows), "judge" (one that rates them), "reward" (a classifier with one logit).
        batch: Texts per forward pass of the encoder.
        device: "cpu", "cuda" or "mps".
        seed: Seed of everything random.
    """

    scores: tuple[Wanted, ...]
    extras: tuple[str, ...]
    examples: Path
    models: dict[str, Path]
    batch: int
    device: str
    seed: int
    remote_code: bool = False


class Measurer:
    """Measures chunks; its models are loaded when first needed, and once."""

    TRUSTED = ("example_texts", "example_labels", "example_embeddings", "example_gradients")

    def __init__(self, work: Work) -> None:
        self.work = work
        self._scores = [(wanted.column, seeded(wanted.score(), work.seed)) for wanted in work.scores]
        self._kept = Supply(
            {
                "encoder": self._load_encoder,
                "reader": partial(self._load_reader, "reader"),
                "judge": partial(self._load_reader, "judge"),
                "reward": self._load_reward,
                "adapted": self._load_adapted,
                "tokenizer": self._load_tokenizer,
                "examples": self._load_examples,
                "example_texts": lambda: [r.content for r in self._kept["examples"]],
                "example_labels": lambda: [label_of(r) for r in self._kept["examples"]],
                "example_embeddings": lambda: self.embed(self._kept["examples"]),
                "example_gradients": lambda: self.gradients(self._kept["examples"]),
            }
        )

    def __call__(self, rows: Sequence[Row], advance: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
        """The columns [n] of a chunk, and its extras [n, …].

        Args:
            rows: The chunk.
            advance: Called with the rows done; a language model's passes count by their share.
        """
        supply, found = self.supply(rows, advance), {}
        for column, score in self._scores:
            if "judge" in score.needs:
                supply["judge"] = self._judge(score)
            found[column] = column_of(column, score, supply)
        for name, made in ((EMBEDDINGS, "embeddings"), (GRADIENTS, "gradients")):
            if name in self.work.extras:
                found[name] = supply[made]
        if TOKENS in self.work.extras:
            found[TOKENS] = np.array([self._length(row) for row in rows], float)
        return found

    def supply(self, rows: Sequence[Row], advance: Callable[[int], None] | None = None) -> Supply:
        """The inputs of scores over these rows."""
        trusted = {name: partial(self.trusted, name) for name in self.TRUSTED}
        return Supply(
            {
                **texts_of(rows),
                **trusted,
                "embeddings": lambda: self.embed(rows).astype(np.float16),
                "gradients": lambda: self.gradients(rows),
                "reading": lambda: self._reading(rows, advance),
                "own_answers": lambda: self._own_answers(rows),
                "reward": lambda: self._kept["reward"],
            }
        )

    def _length(self, row: Row) -> int:
        """Tokens of a row as it would be trained on."""
        from residency.tokens import encode

        tokenizer = self._kept["tokenizer"]
        if row.messages:
            return len(encode(row, tokenizer))
        return len(tokenizer(row.content)["input_ids"])

    def trusted(self, name: str) -> Any:
        """An input of the trusted rows, one of `TRUSTED`."""
        return self._kept[name]

    def embed(self, rows: Sequence[Row]) -> np.ndarray:
        """[n, D] of rows as texts: question and answer, but never a label, which scores of labels are to judge."""
        return self._kept["encoder"].encode([text_of(r) for r in rows], batch=self.work.batch)

    def gradients(self, rows: Sequence[Row]) -> np.ndarray:
        """[n, P] projected gradients of a fresh adapter's B factors: of every weight, seen through its random A."""
        from residency.curate.gradients import Gradients

        model, tokenizer = self._kept["adapted"]
        return Gradients(seed=self.work.seed).of(model, tokenizer, rows)

    def _reading(self, rows: Sequence[Row], advance: Callable[[int], None] | None) -> Any:
        from residency.curate.reading import Read, read, runs_of

        wanted = [score for _, score in self._scores if isinstance(score, Read)]
        runs, done = runs_of(wanted), [0, 0]

        def sequences(n: int) -> None:
            done[0] += n
            if advance is not None and done[0] // runs > done[1]:
                advance(done[0] // runs - done[1])
                done[1] = done[0] // runs

        model, tokenizer = self._kept["reader"]
        return read(model, tokenizer, rows, wanted, progress=sequences)

    def _own_answers(self, rows: Sequence[Row]) -> list[str]:
        """What the reader itself answers, greedily; empty for a row without turns."""
        from residency.generate import generate
        from residency.tokens import encode

        model, tokenizer = self._kept["reader"]
        asked = [i for i, row in enumerate(rows) if row.messages]
        prompts = [encode(rows[i], tokenizer).prompt for i in asked]
        own = [""] * len(rows)
        for i, text in zip(asked, generate(model, tokenizer, prompts, max_new_tokens=OWN_TOKENS), strict=True):
            own[i] = text
        return own

    def _judge(self, score: Any) -> Any:
        from residency.curate.judging import DigitJudge

        return DigitJudge(*self._kept["judge"], lowest=score.lowest, highest=score.highest)

    def _load_encoder(self) -> Any:
        from residency import encoders

        return encoders.load(self.work.models["encoder"], self.work.device)

    def _load_reader(self, name: str) -> tuple[Any, Any]:
        """A language model and its tokenizer; one that serves as reader and judge is loaded once."""
        from residency import bases

        folder = self.work.models[name]
        if name != "reader" and folder == self.work.models["reader"]:
            return self._kept["reader"]
        remote = self.work.remote_code and name == "reader"  # what is allowed to the base is not to another model
        tokenizer = bases.load_tokenizer(folder, remote_code=remote)
        return bases.load_causal_lm(folder, self.work.device, remote_code=remote), tokenizer

    def _load_tokenizer(self) -> Any:
        from residency import bases

        return bases.load_tokenizer(self.work.models["reader"], remote_code=self.work.remote_code)

    def _load_adapted(self) -> tuple[Any, Any]:
        import torch

        from residency import bases
        from residency.lora import Lora

        folder = self.work.models["reader"]
        model = bases.load_causal_lm(folder, self.work.device, remote_code=self.work.remote_code)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.work.seed)
            adapted = Lora(rank=8, targets=("all-linear",)).attach(model)
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:  # while B is zero, A has no gradient
                parameter.requires_grad_(False)
        return adapted, bases.load_tokenizer(folder, remote_code=self.work.remote_code)

    def _load_reward(self) -> Any:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from residency.compat import quiet_transformers
        from residency.curate.judging import RewardModel

        folder = self.work.models["reward"]
        with quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(folder).to(self.work.device).eval()
            return RewardModel(model, AutoTokenizer.from_pretrained(folder))

    def _load_examples(self) -> list[Row]:
        from residency.rows import load

        return load(self.work.examples)

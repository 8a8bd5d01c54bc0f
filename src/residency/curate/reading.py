"""One forward pass of a language model over all rows, from which every model-based score of single rows is computed.

For a row with prompt q and answer a_1 … a_n, the model gives at each answer token the distribution p_t(·) =
p(· | q, a_<t) over V words. One pass keeps nine numbers of a row, in nats where they have a unit:

    nll           mean of −log p_t(a_t)                    best        mean of max p_t
    entropy       mean of −Σ_v p_t(v) log p_t(v)           log_best    mean of log max p_t
    el2n          mean of ‖p_t − onehot(a_t)‖₂             margin      mean of p_t's largest minus second largest
    hits          share of t where a_t is p_t's argmax     least_margin  the least of those margins
    first_hits    the same share among the first 32 answer tokens

What more some scores need, each is a `Pass` of its own: the answer without its question (`Alone`, here), and the
passes of `probes`. A score lists its passes, and `read` makes each pass once for all scores together.

Rows are rendered by the model's own chat template and masked as in training (`residency.tokens`): the answer is all
that follows the generation prompt, end of turn included. **Alone** means: the answer after the generation prompt
only, which is what announces the assistant ("<|im_start|>assistant"), with no turn before it; rows
without a template, and templates that announce nothing, begin with the first of BOS, EOS and PAD that exists. IFD's
first code keeps such a header too ("### Response:"); Superfiltering takes the bare answer, whose first token then
has no prediction. Ours reads exactly the same answer tokens with and without the question, so that their ratio is 1
for a model that ignores context. The official code finds the answer by a text search and tokenises twice, which
drifts at the boundary.

A row longer than `max_tokens` loses the end of its answer and is counted in `cut`; where the prompt alone is as
long, nothing is left to read. Rows with nothing to read (also: an empty answer, a row without turns) are NaN.

Batches are padded at the right with an explicit mask, sorted by length within 4,096 rows; `forward` says how the head
is run. A row's numbers do not depend on the others beyond rounding.

Cost: the model's forward pass per `Pass`; on a CPU the head is the larger part of a small model. Memory: one batch
of hidden states and some logits, about 80 bytes per row, and the token ids of 4,096 rows.

Our choice throughout; the quantities are those of survey 2408.02085 (Qin et al. 2024), eq. 10-20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from residency.curate.forward import COLUMNS, Reader
from residency.curate.scoring import Array, Score

if TYPE_CHECKING:
    from residency.rows import Row

CHUNK = 4_096
"""Rows that are encoded and sorted by length together."""
WINDOW = 32
"""Answer tokens that count for memorisation, as in Biderman et al. 2023 (arXiv 2304.11158)."""


@dataclass(frozen=True)
class Entry:
    """One row as token ids: what the passes work on.

    Args:
        row: The row itself.
        prompt: Everything before the answer, at least one token.
        answer: The answer, perhaps cut, at least one token.
    """

    row: Row
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class Pass:
    """A run of the model over all rows; equal passes are made once."""

    @property
    def runs(self) -> int:
        """How many sequences the model reads for one row."""
        return 1

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """What this pass says of some rows.

        Args:
            reader: Runs the model.
            entries: n rows that have an answer.

        Returns:
            Arrays [n] by name.
        """
        raise NotImplementedError("a pass defines `run`")


@dataclass(frozen=True)
class Answer(Pass):
    """The answer after its question: all nine numbers."""

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """See `Pass.run`."""
        tokens = reader.tokens([(e.prompt, e.answer) for e in entries])
        means = np.array([t.mean(1, dtype=float) for t in tokens])
        least = np.array([t[COLUMNS.index("margin")].min() for t in tokens])
        first = np.array([t[COLUMNS.index("hits"), :WINDOW].mean(dtype=float) for t in tokens])
        return {name: means[:, i] for i, name in enumerate(COLUMNS)} | {"least_margin": least, "first_hits": first}


@dataclass(frozen=True)
class Alone(Pass):
    """The same answer tokens without the question: `nll` only."""

    def run(self, reader: Reader, entries: Sequence[Entry]) -> dict[str, Array]:
        """See `Pass.run`."""
        tokens = reader.tokens([(header(e.row, reader.tokenizer), e.answer) for e in entries], only_nll=True)
        return {"nll": np.array([t[0].mean(dtype=float) for t in tokens])}


@dataclass(frozen=True)
class Reading:
    """What the model said of N rows; plain numpy.

    Args:
        tokens: [N] answer tokens read; 0 where there was nothing to read.
        cut: [N] whether the row was longer than `max_tokens`.
        found: Of every pass made its arrays [N] by name, NaN where nothing was read; empty where no row was read.
    """

    tokens: NDArray[np.int64]
    cut: NDArray[np.bool_]
    found: dict[Pass, dict[str, Array]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, which: Pass, name: str) -> Array:
        """An array of a pass.

        Raises:
            ValueError: When the pass was not made.
        """
        if which not in self.found:
            raise ValueError(f"this reading lacks {which}: name the score among `wanted` when the rows are read")
        arrays = self.found[which]
        return arrays[name] if arrays else np.full(len(self), np.nan)

    def take(self, order: Sequence[int]) -> Reading:
        """The reading of some rows, in the order given."""
        at = np.asarray(order, np.int64)
        found = {which: {name: column[at] for name, column in arrays.items()} for which, arrays in self.found.items()}
        return Reading(self.tokens[at], self.cut[at], found)


class Read(Score):
    """A score computed from a reading."""

    needs: ClassVar[tuple[str, ...]] = ("reading",)

    def passes(self) -> tuple[Pass, ...]:
        """The passes it is computed from."""
        return (Answer(),)

    def score(self, reading: Reading) -> Array:
        """See `Score.score`."""
        raise NotImplementedError("a score of a reading computes `score(reading)`")


def read(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    wanted: Sequence[Read],
    *,
    batch_tokens: int = 2_048,
    max_tokens: int = 2_048,
    progress: Callable[[int], None] | None = None,
) -> Reading:
    """Read all rows, once for each pass that the scores need.

    Args:
        model: A causal language model of transformers; its mode, weights and random state are left as they were.
        tokenizer: Its tokenizer.
        rows: N rows with turns.
        wanted: The scores to be computed from the reading.
        batch_tokens: Most tokens of one forward pass, padding included; a longer row runs alone.
        max_tokens: Longer rows lose the end of their answer.
        progress: Called after every batch with the number of sequences read, of len(rows) × `runs_of(wanted)`.

    Returns:
        The reading, independent of batching up to rounding.

    Raises:
        DataError: When the chat template refuses a row or hides where its answer begins.
        ValueError: When a limit is not positive, or the model's head cannot be found or followed.
    """
    if batch_tokens < 1 or max_tokens < 2:
        raise ValueError(f"batch_tokens {batch_tokens} must be at least 1 and max_tokens {max_tokens} at least 2")
    passes = passes_of(wanted)
    tokens, cut = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    found: dict[Pass, dict[str, Array]] = {each: {} for each in passes}
    with Reader(model, tokenizer, batch_tokens, progress) as reader:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            entries, at = [], []
            for i, row in enumerate(part, start):
                entry, cut[i] = encoded(row, tokenizer, max_tokens)
                if entry is not None:
                    tokens[i] = len(entry.answer)
                    entries.append(entry)
                    at.append(i)
            reader.advance((len(part) - len(entries)) * runs_of(wanted))
            for each in passes if entries else ():
                for name, column in each.run(reader, entries).items():
                    whole = found[each].setdefault(name, np.full(len(rows), np.nan))
                    whole[at] = column
    return Reading(tokens, cut, found)


def passes_of(wanted: Sequence[Read]) -> list[Pass]:
    """The passes that some scores need, each once."""
    return list(dict.fromkeys(each for score in wanted for each in score.passes()))


def runs_of(wanted: Sequence[Read]) -> int:
    """How many sequences the model reads for one row and some scores: what a forecast or a progress bar counts."""
    return sum(each.runs for each in passes_of(wanted))


def encoded(row: Row, tokenizer: Any, max_tokens: int) -> tuple[Entry | None, bool]:
    """A row as token ids, None where it has no answer to read, and whether it was cut.

    Raises:
        DataError: See `tokens.encode`.
    """
    from residency.tokens import encode

    if not row.messages or not row.answer.strip():
        return None, False
    item = encode(row, tokenizer)
    room = max_tokens - len(item.prompt)
    if room < 1:
        return None, True
    return Entry(row, item.prompt, item.answer[:room]), room < len(item.answer)


def header(row: Row, tokenizer: Any) -> tuple[int, ...]:
    """What announces the row's answer when nothing was asked, at least one token.

    Raises:
        ValueError: When the tokenizer has no token to begin with.
    """
    text = ""
    if row.chat and getattr(tokenizer, "chat_template", None):
        turns = [{"role": r, "content": c} for r, c in row.messages[:-1]]
        asked, announced = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=more) for more in (False, True)
        )
        text = announced[len(asked) :] if announced.startswith(asked) else ""
    if text:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return (token,)
    raise ValueError("the tokenizer has neither BOS, EOS nor PAD, so no answer can be read alone: set one of them")

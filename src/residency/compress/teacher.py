"""Who the student listens to: a teacher that runs beside it, or what a teacher said once, on disk.

The idea. A frozen teacher says the same thing about the same row in every epoch. Run it once, keep what a loss needs,
and every further epoch costs the student only. Two things are worth keeping, per trained token:

    hidden   the teacher's last hidden state [D], from which its head gives all V logits again. Exact for every loss,
             student-led BiLD included. 4 D bytes: 2.3 kB at D = 576, 16 kB at D = 4,096.
    top-k    its k largest logits, their words, and the log of the sum of exponentials of all V. 8 k + 4 bytes:
             516 bytes at k = 64. The teacher's head is not needed any more. What is lost: everything about the V − k
             other words but their total probability, which is kept.

Losses on a top-k cache, with teacher words I [k], teacher probabilities p and student probabilities q at temperature 1:

    KL      Σ_{v∈I} p_v log(p_v / q_v) + p_rest log(p_rest / q_rest)    p_rest = 1 − Σ_{v∈I} p_v
    BiLD    its teacher-led half on the first k' ≤ k words; the student-led half needs words the cache may lack

By the log-sum inequality this KL is a lower bound of the full one, equal to it when the rest is proportional in both
models, and at k = V. Both the bucket and the lower bound are our choice; others renormalise the k words, which forgets
how much probability the teacher gave to the rest ("top-kl" does that).

The cache is written as a sealed folder: a killed process leaves it whole or not at all, and a resumed training reads
the same bytes.

Source: storing teacher logits is as old as Hinton et al. 2015 (arXiv 1503.02531); on what truncation does to language
models, Anshumann et al., "Sparse Logit Sampling", 2025, arXiv 2503.16870. Official code: none used.
Cost: one teacher pass over the rows. Relations: `distillation.py` asks either kind of teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from residency import fusedhead, store
from residency.compress.bild import BiLDParams, bild
from residency.errors import DataError, PlanError
from residency.modes import evaluating
from residency.objective import Head, next_token_positions
from residency.progress import Progress
from residency.tokens import Encoded, collate


class TopK(NamedTuple):
    """A teacher's most likely words at N tokens.

    Args:
        words: [N, k] ids, most likely first.
        logits: [N, k] float32.
        log_sum_exp: [N] float32, over all V words.
    """

    words: Tensor
    logits: Tensor
    log_sum_exp: Tensor


class LiveTeacher:
    """A teacher that runs beside its student, in its own precision (the student's autocast does not reach it).

    Args:
        model: A causal language model; frozen and put into evaluation mode.
        vocabulary: Use only the first so many rows of its head; None uses all.
    """

    def __init__(self, model: Any, vocabulary: int | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self.head = head_of(model, vocabulary)
        self._checked = False

    def hidden(self, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """Last hidden states [N, D] at the positions where mask [B, T] is true, row by row."""
        return self.all_hidden(batch)[mask]

    @torch.no_grad()
    def all_hidden(self, batch: dict[str, Any]) -> Tensor:
        """Last hidden states [B, T, D]; the first call makes sure that the logits are their head's, and no more."""
        last = last_hidden(self.model, batch, check=not self._checked)
        self._checked = True
        return last


class CachedTeacher:
    """What a teacher said, read from the folder that `record` wrote.

    Args:
        folder: The cache.
        head: The teacher's head, for a cache of hidden states; None for top-k.
        device: Where tensors are put.
    """

    def __init__(self, folder: Path, head: Head | None = None, device: str = "cpu") -> None:
        if reason := store.damage(folder):
            raise DataError(f"the teacher's cache is damaged: {reason}", where=str(folder), hint="delete it")
        self.index = store.read_json(folder / "index.json")
        self.what: Literal["hidden", "top-k"] = self.index["what"]
        self.head, self.device = head, device
        if self.what == "hidden" and head is None:
            raise ValueError("a cache of hidden states needs the teacher's head")
        N, width = self.index["tokens"], self.index["width"]
        if self.what == "hidden":
            self._hidden = np.memmap(folder / "hidden.f32", np.float32, "r", shape=(N, width))
        else:
            self._words = np.memmap(folder / "words.i32", np.int32, "r", shape=(N, width))
            self._logits = np.memmap(folder / "logits.f32", np.float32, "r", shape=(N, width))
            self._sums = np.memmap(folder / "sums.f32", np.float32, "r", shape=(N,))

    def hidden(self, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """As `LiveTeacher.hidden`; the rows are found by `batch["ids"]`, which `with_ids` adds."""
        return self._read(self._hidden, self._rows(batch, mask))

    def top_k(self, batch: dict[str, Any], mask: Tensor) -> TopK:
        """The teacher's most likely words at the trained tokens of a batch."""
        rows = self._rows(batch, mask)
        words = self._read(self._words, rows).long()
        return TopK(words, self._read(self._logits, rows), self._read(self._sums, rows))

    def _rows(self, batch: dict[str, Any], mask: Tensor) -> np.ndarray:
        spans = [self._span(row) for row in batch["ids"]]
        if (wanted := mask.sum(1).tolist()) != (found := [stop - start for start, stop in spans]):
            raise DataError(f"rows train {wanted} tokens, the teacher's cache holds {found}", hint="delete the cache")
        return np.concatenate([np.arange(start, stop) for start, stop in spans])

    def _span(self, row: str) -> tuple[int, int]:
        try:
            start, stop = self.index["rows"][row]
        except KeyError:
            raise DataError("the teacher's cache lacks this row", where=row, hint="delete the cache") from None
        return start, stop

    def _read(self, table: np.ndarray, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(table[rows]).to(self.device)


def record(
    teacher: LiveTeacher,
    items: Sequence[Encoded],
    folder: Path,
    *,
    address: str,
    what: Literal["hidden", "top-k"] = "hidden",
    k: int = 64,
    pad: int = 0,
    batch: int = 8,
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Run the teacher over all rows and write its cache; nothing happens if a whole cache is there.

    Args:
        teacher: Who is asked.
        items: Encoded rows with distinct ids.
        folder: Where the cache appears, whole or not at all.
        address: What the cache belongs to (teacher, rows, settings); another address is another cache.
        what: See the module.
        k: Words per token of a top-k cache.
        pad: Token id of the padding.
        batch: Rows per forward pass.
        device: Where the teacher computes.
        progress: Where progress goes.

    Raises:
        PlanError: When two rows have one id, or k exceeds the vocabulary.
    """
    if store.damage(folder, address) is None:
        return
    if len({item.id for item in items}) < len(items):
        raise PlanError("rows share an id, so a teacher's cache cannot tell them apart", hint="give every row its own")
    if what == "top-k" and not 1 <= k <= len(teacher.head.weight):
        raise PlanError(f"top-k of {k} words, the vocabulary has {len(teacher.head.weight):,}")
    for left in (folder, *folder.parent.glob(f".tmp-*-{folder.name}")):  # of recordings that were killed
        shutil.rmtree(left, ignore_errors=True)
    order = sorted(items, key=len)
    rows: dict[str, tuple[int, int]] = {}
    done = width = 0
    with store.sealed(folder, address) as out, evaluating(teacher.model):
        names = ("hidden.f32",) if what == "hidden" else ("words.i32", "logits.f32", "sums.f32")
        files = [(out / name).open("wb") for name in names]
        with (progress or Progress()).task("recording the teacher", len(order)) as advance:
            for start in range(0, len(order), batch):
                some = order[start : start + batch]
                given = {key: value.to(device) for key, value in collate(some, pad).items()}
                mask, _ = next_token_positions(given["labels"])
                hidden = teacher.hidden(given, mask)
                tables = [hidden] if what == "hidden" else _said(hidden, teacher.head, k)
                width = tables[0].shape[1]
                for file, table in zip(files, tables, strict=True):
                    kind = np.int32 if table.dtype == torch.long else np.float32
                    file.write(table.to(torch.int32 if kind is np.int32 else torch.float32).cpu().numpy().tobytes())
                for item, count in zip(some, mask.sum(1).tolist(), strict=True):
                    rows[item.id] = (done, done + count)
                    done += count
                advance(len(some))
        for file in files:
            file.close()
        store.write_json(out / "index.json", {"what": what, "tokens": done, "width": width, "rows": rows})


def with_ids(items: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """A batch as `tokens.collate` makes it, and the ids by which a cached teacher finds its rows."""
    return collate(items, pad) | {"ids": [item.id for item in items]}


def _said(hidden: Tensor, head: Head, k: int) -> list[Tensor]:
    logits, words = fusedhead.top_k_logits(hidden, head, k)
    return [words, logits, fusedhead.log_sum_exp(hidden, head)]


def head_of(model: Any, vocabulary: int | None = None) -> Head:
    """A language model's head, or its first `vocabulary` rows."""
    embedding = model.get_output_embeddings()
    return first_words(Head(embedding.weight, getattr(embedding, "bias", None)), vocabulary)


def last_hidden(model: Any, batch: dict[str, Any], *, check: bool = True) -> Tensor:
    """What a language model's head is applied to, [B, T, D].

    Args:
        model: A causal language model.
        batch: `input_ids` and `attention_mask` [B, T].
        check: Whether to compare the head's logits with the model's own.

    Raises:
        ResidencyError: When the model changes its logits after the head.
    """
    from residency.train import check_head

    result = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    if check:
        check_head(head_of(model), result.hidden_states[-1], result.logits)
    return result.hidden_states[-1]


def first_words(head: Head, count: int | None) -> Head:
    """The head's first `count` rows: the part that a padded or extended vocabulary shares with the other's."""
    if count is None or count == len(head.weight):
        return head
    return Head(head.weight[:count], None if head.bias is None else head.bias[:count])


def kl_of_top_k(hidden: Tensor, head: Head, said: TopK, *, chunk_bytes: int | None = None) -> Tensor:
    """KL to a teacher known by its top k words and the probability of the rest, summed over tokens.

    Args:
        hidden: [N, D] of the student; receives the gradient, as does `head`.
        head: Weight [V, D].
        said: See `TopK`, k ≤ V.
        chunk_bytes: See `fusedhead.fused_sum`.
    """
    V = len(head.weight)

    def row_loss(logits: Tensor, rows: slice, differentiate: bool) -> Tensor:
        words = said.words[rows]
        log_p = (said.logits[rows] - said.log_sum_exp[rows, None]).to(logits.dtype)
        p = log_p.exp()
        log_q = logits.log_softmax(1)
        mine = log_q.gather(1, words)
        total = (p * (log_p - mine)).sum()
        q = torch.exp(log_q, out=logits)
        if words.shape[1] < V:
            tiny = torch.finfo(logits.dtype).tiny
            p_rest = (1 - p.sum(1, keepdim=True)).clamp(min=0)
            # summed over the other words: one minus the sum of the k would lose a small rest to rounding
            q_rest = q.scatter(1, words, 0).sum(1, keepdim=True).clamp(min=tiny)
            total += torch.special.xlogy(p_rest, p_rest / q_rest).sum()
            ratio = p_rest / q_rest
        else:
            ratio = torch.zeros_like(p[:, :1])
        if differentiate:
            slope = q.gather(1, words) - p
            logits.mul_(1 - ratio).scatter_(1, words, slope)
        return total

    return fusedhead.fused_sum(hidden, head, row_loss, chunk_bytes=chunk_bytes)


def bild_of_top_k(hidden: Tensor, head: Head, said: TopK, params: BiLDParams) -> Tensor:
    """Teacher-led BiLD to a teacher known by its top words, summed over tokens; equal to the live form.

    Args:
        hidden: [N, D] of the student; receives the gradient, as does `head`.
        head: Weight [V, D].
        said: See `TopK`; its first `params.k` words are used.
        params: With directions "teacher".

    Raises:
        PlanError: When the cache holds fewer than `params.k` words per token.
    """
    if said.words.shape[1] < params.k:
        raise PlanError(f"BiLD compares {params.k} words, the teacher's cache holds {said.words.shape[1]}")
    student = fusedhead.selected_logits(hidden, head, said.words[:, : params.k])
    # with k words in all, the words that the teacher leads with are all of them, in its order
    return bild(student, said.logits[:, : params.k], params)[0]

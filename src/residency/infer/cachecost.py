"""What a bounded cache costs and saves on rows of one's own: long documents made of them, with a question at the end.

A document is the rows of a task, questions and answers, one after another; among them, at a depth that differs from
document to document, the row whose question is asked once more at the end. What is measured is the likelihood of that
row's answer, in nats per token, behind the full cache and behind an evicted one: the answer is written in the text, so
that whatever the evicted cache loses was lost by eviction. No data but the rows is needed.

Our choice, all of it; the planted answer is the idea of passkey retrieval (Mohtashami, Jaggi, 2023, arXiv 2305.16300).
Cost: one prefill per document and setting, and one pass over question and answer.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from residency.errors import DataError
from residency.infer.evicting import Evicting
from residency.infer.evictioncache import EvictingCache
from residency.measure import now
from residency.rows import Row
from residency.tokens import rendered


@dataclass(frozen=True)
class Document:
    """A long text with a question about it, as token ids.

    Args:
        context: What is read.
        instruction: The question, and what the chat template puts behind it.
        answer: What should follow.
        depth: Where in the context the answer stands, 0 to 1.
    """

    context: tuple[int, ...]
    instruction: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


def documents(rows: Sequence[Row], tokenizer: Any, count: int, tokens: int, seed: int) -> list[Document]:
    """Join rows to documents of about so many tokens; shorter ones where there are too few rows.

    Args:
        rows: Of the task; those without a conversation are passed over.
        tokenizer: The model's.
        count: Documents, each asking for another row.
        tokens: Context tokens of each.
        seed: Of the order of rows.

    Raises:
        DataError: When fewer than two rows have a question and an answer.
    """
    usable = [row for row in rows if row.messages and row.prompt.strip() and row.answer.strip()]
    if len(usable) < 2:
        raise DataError(f"{len(usable)} rows with a question and an answer; a document needs at least 2")
    sizes = [len(tokenizer(row.content + "\n\n", add_special_tokens=False)["input_ids"]) for row in usable]
    order = list(range(len(usable)))
    random.Random(seed).shuffle(order)
    found = []
    for i in range(min(count, len(order))):
        asked = order[i]
        others = [j for j in order[i + 1 :] + order[:i] if usable[j].prompt != usable[asked].prompt]
        held: list[int] = []
        total = sizes[asked]
        for j in others:
            if total + sizes[j] <= tokens or not held:
                held.append(j)
                total += sizes[j]
        depth = (i + 0.5) / count
        held.insert(round(depth * len(held)), asked)
        found.append(_document(usable, held, asked, depth, tokenizer))
    return found


def _document(rows: Sequence[Row], held: list[int], asked: int, depth: float, tokenizer: Any) -> Document:
    row = rows[asked]
    text = "\n\n".join(rows[j].content for j in held)
    place = max((i for i, (role, _) in enumerate(row.messages[:-1]) if role == "user"), default=0)
    turns = list(row.messages)
    turns[place] = (turns[place][0], f"{text}\n\n{row.prompt or turns[place][1]}")
    prompt, answer, end = rendered(replace(row, messages=tuple(turns)), tokenizer)
    cut = prompt.rfind(row.prompt or turns[place][1])
    context, instruction, wanted = (
        tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (prompt[:cut], prompt[cut:], answer)
    )
    return Document(context, instruction, wanted + tuple(end), depth)


def answer_loss(model: Any, decoder: Evicting, document: Document) -> float:
    """Nats per token of a document's answer behind the cache that a decoder leaves."""
    device = model.device
    ids = torch.tensor([document.context + document.instruction], device=device)
    asked = len(document.instruction)
    cache = decoder.prefill(model, ids, instruction_tokens=asked)
    return continuation_loss(model, cache, document.instruction, document.answer)


@torch.no_grad()
def continuation_loss(model: Any, cache: EvictingCache, instruction: Sequence[int], answer: Sequence[int]) -> float:
    """Nats per token of an answer, after an instruction, behind a cache; the cache is used up."""
    given = cache.inputs(torch.tensor([[*instruction, *answer[:-1]]], device=model.device))
    if not cache.length:
        given.pop("past_key_values")
    logits = model(**given, logits_to_keep=len(answer)).logits[0]
    wanted = torch.tensor(list(answer), device=model.device)
    return float(torch.nn.functional.cross_entropy(logits.float(), wanted))


@dataclass(frozen=True)
class Savings:
    """Measured on one document.

    Args:
        bytes: Of keys and values behind the context, allocated room included.
        entries: Held per layer.
        prefill_seconds: Until the first answer token could be computed.
        decode_ms: Per token after that, median.
    """

    bytes: int
    entries: int
    prefill_seconds: float
    decode_ms: float


@torch.no_grad()
def savings(
    model: Any, decoder: Evicting, document: Document, promise: tuple[int, int] | None = None, tokens: int = 8
) -> Savings:
    """Read a document and write a few tokens behind it, with the clock running.

    Args:
        model: On its device.
        decoder: Reads.
        document: What is read.
        promise: Most entries that may be held, and most that memory may be allocated for, per layer.
        tokens: To write.

    Raises:
        ValueError: When the promise is not kept.
    """
    ids = torch.tensor([document.context + document.instruction], device=model.device)
    asked = len(document.instruction)
    begin = now(model.device)
    cache = decoder.prefill(model, ids, instruction_tokens=asked)
    held, size = cache.length, cache.nbytes()
    if promise is not None:
        cache.check_budget(*promise)
    given = cache.inputs(ids[:, -asked:])
    given.pop("attention_mask")
    token = model(**given, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    first = now(model.device)
    times = []
    for _ in range(tokens):
        before = now(model.device)
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        times.append(now(model.device) - before)
    return Savings(size, held, first - begin, 1000 * statistics.median(times))


def tightened(decoder: Evicting, entries: int) -> Evicting:
    """The same decoder with another budget, its chunk no larger than that."""
    other = copy.copy(decoder)
    other.budget, other.chunk = entries, max(1, min(decoder.chunk, entries))
    other.policy.check(entries)
    return other

"""Reading a long text into a cache of bounded size, chunk by chunk, under any eviction policy.

The prompt of every row is cut into a context and an instruction (its last M tokens). With a cache of P entries and a
chunk C_t of c tokens, one step is

    read       run C_t over the P entries; where the policy asks the instruction I, run it in the same pass:
               rows [C_t ; I], columns [cache ; C_t ; I], C_t and I see the cache and themselves causally, not each
               other, and both start at position P. Two passes give the same numbers (`fused=False` runs them)
    score      attention of the asked tokens over [cache ; own block], softmax over all of that, read off at P
    keep       the min(k, P) entries of highest priority, in their old order, and all of C_t: at most k + c in all
    move       what is left stands at positions 0, 1, 2, … again

and at the end the instruction is run over what is left, the policy cuts to k, and the instruction's own states are
dropped: whoever generates runs it once more over the k entries. Nothing is asked and no row is added while everything
fits, so a text within the budget is read exactly as full attention reads it.

Rows of a batch are cut into chunks from their own first token, wherever their padding is; a row whose text has ended
keeps what it has while others go on. So a row gets what it gets alone, up to rounding.

The paper's: the cascade, the chunk that stays whole, the cut by the instruction at the end, compact positions. Its
official code runs the instruction in a pass of its own, copies the whole cache at each chunk, and crashes on a context
of one chunk. Cost per chunk: a pass of c (+ M) tokens over k + 2c + M entries, whatever the length of the text; memory
for k + 2c + M entries per row and layer, twice that with separate caches. A policy that evicts only at the end holds
everything.

Paper: see `citrus`. The block mask, the shared loop for all policies and the handling of batches are our choice.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from residency.infer.eviction import Policy, choose
from residency.infer.evictioncache import EvictingCache, adopt
from residency.infer.rotation import rotation_of
from residency.infer.watch import Watch, watching

Block = tuple[Tensor, Tensor]
"""Token ids [B, T] and which of them are real [B, T]."""


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    instruction_tokens: int,
    policy: Policy,
    budget: int = 768,
    chunk: int = 256,
    cache: Any = None,
    fused: bool = True,
) -> EvictingCache:
    """Read all but the last tokens of a prompt into a cache of at most `budget` entries.

    Go on with `model.generate(**cache.inputs(input_ids[:, -instruction_tokens:]), ...)`.

    Args:
        model: A causal language model of transformers with rotary positions and full attention.
        input_ids: [B, T], context and instruction; the new part only when a cache is given.
        attention_mask: [B, T]; zeros may stand anywhere in the context. None means all real.
        instruction_tokens: M, the last tokens of each row; they are asked, and stay out of the returned cache.
        policy: What to keep.
        budget: k, entries per row and layer at the end.
        chunk: c, tokens per pass.
        cache: What an earlier turn left, to go on behind it; changed in place when it is an `EvictingCache`.
        fused: Whether chunk and instruction share a pass.

    Returns:
        The cache, of [B, G, S, d] keys with S ≤ k, at positions 0 … S − 1.

    Raises:
        PlanError: When entries of this model's cache cannot be evicted.
        ValueError: For sizes below 1, a row without tokens, or a mask of another shape.
    """
    if chunk < 1 or instruction_tokens < 1:
        raise ValueError(f"chunk is {chunk} and instruction_tokens {instruction_tokens}; both must be at least 1")
    policy.check(budget)
    rotation = rotation_of(model)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape or not real.any(1).all():
        raise ValueError(
            f"the mask has shape {tuple(real.shape)} for ids of shape {tuple(input_ids.shape)}; "
            "they are the same, and every row has a token"
        )
    context, instruction = split(input_ids, real, instruction_tokens)
    length = context[0].shape[1]
    rows = (length if policy.whole else min(budget + 2 * chunk, max(length, 1))) + instruction_tokens
    own = adopt(cache, rotation, rows)
    if own.length:
        own.sync()
    end = own.columns + input_ids.shape[1] - instruction_tokens
    reader = Reader(model, policy, budget, own, fused=fused)
    with reader:
        for start in range(0, length, chunk):
            ids, at = (part[:, start : start + chunk] for part in context)
            reader.step(ids, at, instruction)
        reader.finish(instruction)
    own = reader.cache
    if not policy.endless:
        own.trim((budget if policy.whole else budget + 2 * chunk) + instruction_tokens)
    own.columns = max(end, own.length)
    own.frame.absolute, own.frame.offset = False, 0
    return own


def split(input_ids: Tensor, real: Tensor, instruction_tokens: int) -> tuple[Block, Block]:
    """Contexts, each row's tokens at the left, and instructions, each row's last tokens at the right.

    Args:
        input_ids: [B, T].
        real: [B, T].
        instruction_tokens: M; a row with fewer tokens has no context.
    """
    tokens = real.sum(1)
    packed = input_ids.gather(1, (~real).long().argsort(dim=1, stable=True))
    read = (tokens - instruction_tokens).clamp(min=0)
    width = int(read.max())
    at = torch.arange(width, device=real.device) < read[:, None]
    last = torch.arange(-instruction_tokens, 0, device=real.device) + tokens[:, None]
    return (packed[:, :width], at), (packed.gather(1, last.clamp(min=0)), last >= 0)


@dataclass
class Seen:
    """Attention per layer, [B, G, columns], and how many tokens paid it, [B]."""

    mass: list[Tensor]
    asked: Tensor


class Reader:
    """The loop of this module, one step at a time; a context manager, inside of which keys are stored unrotated.

    Args:
        model: See `prefill`.
        policy: What to keep.
        budget: k.
        cache: Where the text goes.
        fused: Whether chunk and instruction share a pass.
    """

    def __init__(self, model: Any, policy: Policy, budget: int, cache: EvictingCache, *, fused: bool = True) -> None:
        self.model, self.policy, self.budget, self.fused = model, policy, budget, fused
        self.cache = cache
        self.context = cache  # another one from the first eviction on, where the policy keeps separate caches
        self.watch = Watch()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Reader:
        with contextlib.ExitStack() as stack:
            stack.enter_context(watching(self.model, self.watch))
            if not self.policy.whole:
                stack.enter_context(self.cache.loosened())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def step(self, ids: Tensor, real: Tensor, instruction: Block) -> None:
        """Read one chunk.

        Args:
            ids: [B, T].
            real: [B, T], which tokens are this chunk's; a row may have none.
            instruction: What the chunk's place in the cache is judged by, for policies that ask it.
        """
        policy, cache = self.policy, self.cache
        width = int(real.sum(1).max())
        ids, real = ids[:, :width], real[:, :width]
        held = _held(cache, real)
        crowded = not policy.whole and bool(((held > self.budget) & real.any(1)).any())
        asks = policy.asks if crowded or (policy.accumulates and not policy.whole) else None
        if policy.separate and crowded:
            self._step_apart(ids, real, instruction, held)
            return
        old = cache.length
        seen: Seen | None = None
        if asks == "instruction" and not self.fused:
            seen = self._ask(cache, instruction, asks)
        together = asks == "instruction" and self.fused
        found = self._pass(
            cache, [(ids, real), instruction] if together else [(ids, real)], asks if seen is None else None
        )
        seen = seen or found
        if together and found is not None:
            cache.forget(instruction[0].shape[1])
            found.mass = [mass[:, :, :old] for mass in found.mass]
        cache.extend(real)
        scores = self._scores(cache, seen) if seen is not None else None
        if crowded:
            evict(cache, policy, self.budget, _staying(held, real, self.budget), scores, old)
        elif policy.accumulates and scores is not None:
            for layer, score in zip(cache.states, scores, strict=True):
                layer.scores = score

    def finish(self, instruction: Block) -> None:
        """Cut to the budget by what the instruction attends to."""
        cache, policy = self.cache, self.policy
        self.context = cache
        if not cache.length:
            return
        held = _held(cache, instruction[1])
        if policy.endless or not (held > self.budget).any():
            return
        scores = None
        if policy.asks is not None:
            before = [layer.scores for layer in cache.states]
            scores = self._scores(cache, self._ask(cache, instruction, policy.asks))
            if policy.accumulates:  # the instruction is run again, and will be counted then
                for layer, old in zip(cache.states, before, strict=True):
                    layer.scores = old
        evict(cache, policy, self.budget, held.clamp(max=self.budget), scores, cache.length, carry=False)

    # -------------------------------------------------------------- pieces

    def _step_apart(self, ids: Tensor, real: Tensor, instruction: Block, held: Tensor) -> None:
        """Individual caches: chunks read and judge one, the instruction judges the other, states go to both."""
        if self.context is self.cache:
            self.context = copy.deepcopy(self.cache)
        reader, answer, old = self.context, self.cache, self.cache.length
        count = _staying(held, real, self.budget)
        judged = self._ask(answer, instruction, "instruction")
        seen = self._pass(reader, [(ids, real)], "chunk")
        reader.extend(real)
        for mine, theirs in zip(answer.states, reader.states, strict=True):
            mine.append(*(buffer[:, :, old : old + ids.shape[1]] for buffer in theirs.buffers))
        answer.extend(real)
        evict(reader, self.policy, self.budget, count, self._scores(reader, seen), old)
        evict(answer, self.policy, self.budget, count, self._scores(answer, judged), old)

    def _ask(self, cache: EvictingCache, block: Block, asks: str) -> Seen:
        """Run a block over the cache and drop its states; the attention it paid."""
        old = cache.length
        seen = self._pass(cache, [block], asks)
        cache.forget(block[0].shape[1])
        assert seen is not None
        seen.mass = [mass[:, :, :old] for mass in seen.mass]
        return seen

    def _pass(self, cache: EvictingCache, blocks: list[Block], asks: str | None) -> Seen | None:
        """Run blocks over the cache, each seeing the cache and itself; the attention of the last one, if asked."""
        ids = torch.cat([block[0] for block in blocks], 1)
        size, width, old = len(ids), ids.shape[1], cache.length
        device = ids.device
        held = cache.real if old else torch.zeros(size, 0, dtype=torch.bool, device=device)
        start = held.sum(1, keepdim=True)
        positions = torch.cat([start + (real.long().cumsum(1) - 1).clamp(min=0) for _, real in blocks], 1)
        mask = torch.zeros(size, 1, width, old + width, dtype=torch.bool, device=device)
        mask[..., :old] = held[:, None, None]
        at = 0
        for block, real in blocks:
            end = at + block.shape[1]
            mask[:, :, at:end, old + at : old + end] = real[:, None, None].expand(-1, 1, end - at, -1).tril()
            at = end
        diagonal = torch.arange(width, device=device)
        mask[:, :, diagonal, old + diagonal] = True  # padding sees itself: no row without any column
        last = blocks[-1][1]
        begin = width - last.shape[1]
        masses: dict[int, Tensor] = {}
        self.watch.see = None
        if asks is not None:
            rows = torch.arange(begin, width, device=device).expand(size, -1)
            asked = last
            if asks == "last":
                at_last = (last.long() * torch.arange(1, last.shape[1] + 1, device=device)).argmax(1, keepdim=True)
                rows, asked = at_last + begin, last.any(1, keepdim=True)
            self.watch.rows, self.watch.asked, self.watch.see = rows, asked, masses.__setitem__
        cache.expect(cache.positions if old else None, positions)
        self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        self.watch.see = None
        if asks is None:
            return None
        return Seen([masses[i] for i in range(len(cache.states))], asked.sum(1))

    def _scores(self, cache: EvictingCache, seen: Seen | None) -> list[Tensor]:
        """The policy's scores per layer, [B, g, S], over all entries held; 0 for those nobody could look at."""
        assert seen is not None
        size = cache.length
        scores = []
        for layer, mass in zip(cache.states, seen.mass, strict=True):
            known = torch.nn.functional.pad(mass, (0, size - mass.shape[2]))
            before = layer.scores if self.policy.accumulates else None
            if before is not None:
                before = torch.nn.functional.pad(before, (0, size - before.shape[2]))
            scores.append(self.policy.score(known, seen.asked, before))
        return scores


def evict(
    cache: EvictingCache,
    policy: Policy,
    budget: int,
    count: Tensor,
    scores: list[Tensor] | None,
    old: int,
    *,
    carry: bool = True,
) -> None:
    """Drop all but `count` [B] entries per row of a cache, as the policy ranks them.

    Args:
        cache: Changed in place.
        policy: Ranks.
        budget: k.
        count: Entries that stay, per row.
        scores: Per layer, [B, g, S]; None where nobody was asked.
        old: Entries that may go; those behind them stay.
        carry: Whether a policy that accumulates carries these scores on (else the ones the layers have).
    """
    real = cache.real
    order, total = cache.positions, real.sum(1)
    indices, kept = [], real
    for index, layer in enumerate(cache.states):
        mine = torch.zeros(len(real), 1, real.shape[1], device=real.device) if scores is None else scores[index]
        priority = policy.rank(mine, order, total, budget)
        if old < real.shape[1]:
            priority = priority.clone()
            priority[:, :, old:] = torch.inf
        chosen, kept = choose(priority, real, count)
        indices.append(chosen)
        if policy.accumulates and carry:
            layer.scores = mine
    cache.keep(indices, kept)


def _held(cache: EvictingCache, like: Tensor) -> Tensor:
    """Tokens held per row, [B]."""
    if not cache.length:
        return torch.zeros(len(like), dtype=torch.long, device=like.device)
    return cache.real.sum(1)


def _staying(held: Tensor, real: Tensor, budget: int) -> Tensor:
    """Entries per row after a chunk, [B]: the budget and the chunk; all of them in a row that had ended before."""
    return torch.where(real.any(1), held.clamp(max=budget) + real.sum(1), held)

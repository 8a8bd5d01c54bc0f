"""Generating behind an evicted cache, with transformers' own loops.

An `Evicting` object is what `generate(custom_generate=…)` takes: it reads the prompt's context into an `EvictingCache`
(`prefill`), then hands the prompt's last tokens and the cache to the model's own `_sample` or `_beam_search`.
Sampling, logits processors, stopping criteria, streamers and the form of the answer are therefore theirs, and see the
whole prompt:

    model.generate(input_ids, attention_mask=mask, custom_generate=Citrus(budget=768), instruction_tokens=40)

While an answer is written the cache grows by its tokens, as in CItruS' paper: k + M at the start, one more per token.
With `bounded` it does not: before a pass that would exceed k + c entries it is cut to k again by the same policy, so
that an endless text can be written in constant memory. That needs a policy that can judge without an instruction.

A conversation goes on with the cache that the last turn returned (`return_dict_in_generate=True`, then
`past_key_values=out.past_key_values` with the ids of the whole conversation): what was kept is behind the new turn,
and both are cut to the budget by the new instruction.

Ours: all of it; CItruS' official code has a decode loop of its own, for one row, greedy. Beam search reads each prompt
once. Assisted decoding is refused: a draft would have to be verified over a cache that forgets differently. Cost: see
`prefill`; per decoded token that of any cache of this size, plus, when `bounded` by a policy that looks at attention,
q · K once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from residency.compat import streamer_of_generate
from residency.errors import PlanError
from residency.infer.eviction import Policy
from residency.infer.evictioncache import EvictingCache, adopt
from residency.infer.prefill import evict, prefill
from residency.infer.rotation import rotation_of
from residency.infer.watch import Watch, watching

WINDOW = 64
"""Instruction tokens when nobody says how many: room for a question and what a chat template puts behind it. Ours."""


class Evicting:
    """A decoder that holds the cache of a long prompt to a budget.

    Args:
        policy: What to keep.
        budget: k, entries per row and layer behind which the instruction is run.
        chunk: c, tokens per pass while the prompt is read; the cache holds at most k + c entries between passes.
        window: Instruction tokens where `generate` is not told `instruction_tokens`: the prompt's last.
        bounded: Whether generated tokens count too: the cache is then held to k + c entries while it is written.

    Raises:
        ValueError: For sizes that make no sense, or `bounded` with a policy that needs an instruction.
    """

    def __init__(
        self, policy: Policy, budget: int = 768, chunk: int = 256, *, window: int = WINDOW, bounded: bool = False
    ) -> None:
        if chunk < 1 or window < 1:
            raise ValueError(f"chunk is {chunk} and window {window}; both must be at least 1")
        policy.check(budget)
        if bounded and not policy.bounded:
            raise ValueError(
                f"{type(policy).__name__} needs an instruction to judge by, and an answer under way has none: "
                "bounded decoding works with Streaming, H2O and TOVA"
            )
        self.policy, self.budget, self.chunk, self.window, self.bounded = policy, budget, chunk, window, bounded

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy}, budget={self.budget}, chunk={self.chunk}, window={self.window})"

    def prefill(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        instruction_tokens: int | None = None,
        cache: Any = None,
    ) -> EvictingCache:
        """Read all but the instruction; go on with `model.generate(**cache.inputs(input_ids[:, -M:]), ...)`.

        Args:
            model: See `prefill.prefill`.
            input_ids: [B, T].
            attention_mask: [B, T] or None.
            instruction_tokens: M; None means `window`.
            cache: An earlier turn's, or None.
        """
        return prefill(
            model,
            input_ids,
            attention_mask,
            instruction_tokens=self.window if instruction_tokens is None else instruction_tokens,
            policy=self.policy,
            budget=self.budget,
            chunk=self.chunk,
            cache=cache,
        )

    def entries(self, instruction_tokens: int | None = None) -> int:
        """Most entries per row and layer that memory is allocated for while a prompt is read."""
        return self.budget + 2 * self.chunk + (self.window if instruction_tokens is None else instruction_tokens)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        instruction_tokens: int | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls; see the module. `instruction_tokens` becomes an argument of `generate`."""
        loops = {
            GenerationMode.GREEDY_SEARCH: "_sample",
            GenerationMode.SAMPLE: "_sample",
            GenerationMode.BEAM_SEARCH: "_beam_search",
            GenerationMode.BEAM_SAMPLE: "_beam_search",
        }
        mode = generation_config.get_generation_mode(None)
        if mode not in loops:
            raise PlanError(
                f"{mode.value} does not work behind an evicted cache", hint="use greedy decoding, sampling or beams"
            )
        if not input_ids.shape[1] or not model_kwargs.get("use_cache", True):
            raise ValueError("eviction needs input_ids (not inputs_embeds) and use_cache=True")
        given = model_kwargs.pop("attention_mask", None)
        model_kwargs.pop("position_ids", None)
        real = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
        if real.shape != input_ids.shape:
            raise ValueError(
                f"the attention mask has {real.shape[1]} columns for {input_ids.shape[1]} input ids: "
                "give generate the ids of the whole conversation; to go on with new ids alone, use cache.inputs(ids)"
            )
        if not real[:, -1].all():
            raise ValueError("the prompts are padded at the right; generation needs padding_side='left'")
        times = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        cache = self._read(model, input_ids[::times], real[::times], instruction_tokens, model_kwargs)
        if times > 1:
            cache.batch_repeat_interleave(times)
        model_kwargs |= self._behind(cache, real)
        generation_config.prefill_chunk_size = None  # read already
        streamer = streamer if streamer is not None else streamer_of_generate()
        watch = Watch()
        with self._held(model, cache, watch) if self.bounded else contextlib.nullcontext():
            return getattr(type(model), loops[mode])(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                **({} if streamer is None else {"streamer": streamer}),
                **model_kwargs,
            )

    def _read(
        self, model: Any, ids: Tensor, real: Tensor, instruction_tokens: int | None, model_kwargs: dict[str, Any]
    ) -> EvictingCache:
        """The context of the ids that no cache has seen yet, in a cache."""
        rotation = rotation_of(model)
        cache = adopt(model_kwargs.get("past_key_values"), rotation)
        if cache.length:
            cache.sync()
        known = cache.columns if cache.length else 0
        if known >= ids.shape[1]:
            raise ValueError(f"the cache has seen {known} positions, and the conversation has only {ids.shape[1]}")
        ids, real = ids[:, known:], real[:, known:]
        asked = self.window if instruction_tokens is None else instruction_tokens
        asked = min(asked, ids.shape[1])
        if asked < 1:
            raise ValueError(f"instruction_tokens is {asked}; it must be at least 1")
        if not cache.length and ids.shape[1] <= self.budget:
            return cache  # everything fits: one ordinary pass
        return self.prefill(model, ids, real, instruction_tokens=asked, cache=cache)

    def _behind(self, cache: EvictingCache, real: Tensor) -> dict[str, Any]:
        """Model arguments that make transformers run the ids behind the cache, at the positions that follow it."""
        cache.count_all()
        mask = real.long().clone()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if cache.length:
            first = cache.columns - cache.length
            mask[:, first : cache.columns] = cache.real.long()
            mask[:, :first] = 1
            rest = real[:, cache.columns :].long()
            after = (cache.real.sum(1, keepdim=True) + rest.cumsum(1) - 1).clamp(min=0)
            positions = torch.cat([torch.zeros_like(positions[:, : cache.columns]), after], 1)
        return {"past_key_values": cache, "attention_mask": mask, "position_ids": positions}

    @contextlib.contextmanager
    def _held(self, model: Any, cache: EvictingCache, watch: Watch) -> Iterator[None]:
        """Hold the cache to k + c entries while the model decodes."""
        masses: dict[int, Tensor] = {}
        policy = self.policy

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids = kwargs["input_ids"]
            if not cache.length:
                return args, kwargs
            cache.sync()
            held = cache.real.sum(1)
            if cache.length > self.budget and cache.length + ids.shape[1] > self.budget + self.chunk:
                known = [layer.scores for layer in cache.states if layer.scores is not None]
                scores = known if policy.asks else None
                evict(cache, policy, self.budget, held.clamp(max=self.budget), scores, cache.length)
            new = kwargs["attention_mask"][:, -ids.shape[1] :]
            lead = torch.ones(len(ids), cache.frame.offset, dtype=new.dtype, device=new.device)
            mask = torch.cat([lead, cache.real.to(new.dtype), new], 1)
            at = (cache.real.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
            watch.rows = torch.full_like(ids[:, :1], ids.shape[1] - 1) if policy.asks == "last" else None
            watch.asked = None if policy.asks == "last" else new.bool()
            return args, kwargs | {"attention_mask": mask, "position_ids": at}

        def after(*_: Any) -> None:
            cache.sync()
            for index, layer in enumerate(cache.states):
                if index in masses:
                    old = layer.scores if policy.accumulates else None
                    if old is not None:
                        old = torch.nn.functional.pad(old, (0, masses[index].shape[2] - old.shape[2]))
                    asked = torch.ones(len(masses[index]), device=masses[index].device)
                    layer.scores = policy.score(masses[index], asked, old)

        if policy.asks:
            watch.see = masses.__setitem__
        hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        try:
            with watching(model, watch) if policy.asks else contextlib.nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

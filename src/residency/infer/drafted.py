"""Decoding with a drafter: guess a tree, let the target read it in one pass, keep what it would have said itself.

    model.generate(ids, custom_generate=Drafted(drafter), max_new_tokens=200)

One step, for every row of a batch: the drafter proposes a tree behind the last certain token; the target reads its n
nodes in one forward pass (each node sees the cache, its ancestors and itself); `verify` walks down the tree; accepted
entries of the cache move together; the drafter learns the target's states at the accepted tokens. A step gives between
one token (nothing accepted) and levels + 1. Greedy output is that of plain greedy decoding, token for token, except
where the two best logits lie closer together than rounding (about 1e-4); sampled output has the target's distribution,
logits processors and all.

Batches may be left-padded, rows accept different numbers of tokens, and finished rows are padded, as in transformers.
Processors that look at the text so far see, at every node, the text that leads to it; they and stopping criteria are
called with one row at a time. One decoder serves one call of `generate` at a time: not for several threads.

Cost: per step one pass of the target over n tokens, which on a CPU with packed weights (`residency.packed`) or on a GPU
takes about as long as over one, plus the drafter. `stats` says where the time went and what was accepted.

Relations: drafters are `clover.Clover2`, `clover.Clover`, `medusa.Medusa` and `lookup.PromptLookup`; without any,
`Drafted(None)` is plain decoding on the same loop, the baseline that isolates what drafting buys.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from residency.compat import streamer_of_generate
from residency.errors import PlanError
from residency.infer import verify
from residency.infer.drafter import Drafter, Proposer, final_norm
from residency.infer.draftstats import DraftStats
from residency.infer.families import undraftable
from residency.infer.slotcache import SlotCache, tree_mask
from residency.infer.tree import DynamicTree, StaticTree, Tree, TreePolicy

Sampling = Literal["matching", "rejection"]


class Drafted:
    """A `custom_generate` for `model.generate`.

    Args:
        drafter: Guesses; None drafts nothing.
        tree: Which guesses become nodes; by default a small dynamic tree.
        sampling: How drafted tokens are verified when `do_sample` is on: "matching" (any tree), or "rejection" (static
            trees of drawn tokens; see `verify`).
        temperature: At which the drafter draws, for "rejection".

    Attributes:
        stats: Of all calls since `reset`.

    Raises:
        ValueError: For rejection sampling with a dynamic tree, whose shape depends on what was drawn.
    """

    def __init__(
        self,
        drafter: Proposer | None,
        tree: TreePolicy | None = None,
        sampling: Sampling = "matching",
        temperature: float = 1.0,
    ) -> None:
        self.drafter = drafter
        self.tree: TreePolicy = tree or DynamicTree()
        if sampling not in ("matching", "rejection"):
            raise ValueError(f"sampling is 'matching' or 'rejection', not {sampling!r}")
        if sampling == "rejection":
            if not (isinstance(self.tree, StaticTree) and isinstance(drafter, Drafter)):
                raise ValueError("rejection sampling needs a StaticTree and a drafter with probabilities")
            if not self.tree.dense:
                raise ValueError(
                    "rejection sampling tries siblings in the order drawn: ranks must be 0, 1, … without gaps"
                )
            if temperature <= 0:
                raise ValueError(f"the drafter's temperature is positive, not {temperature}")
        self.sampling, self.temperature = sampling, temperature
        self.stats = DraftStats()

    def reset(self) -> None:
        """Forget the statistics."""
        self.stats = DraftStats()

    def parts(self) -> list[nn.Module]:
        """The drafter's modules worth packing, once it is attached (see `Proposer.parts`)."""
        return self.drafter.parts() if self.drafter is not None else []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `generate`; see there.

        Returns:
            Ids [B, T + new], or a `GenerateDecoderOnlyOutput` when `return_dict_in_generate` is set.

        Raises:
            PlanError: For models and settings that cannot be drafted for.
        """
        streamer = streamer if streamer is not None else streamer_of_generate()
        check(model, generation_config)
        if self.drafter is not None:
            self.drafter.attach(model)
        with torch.no_grad():
            loop = _Loop(self, model, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            found = loop.run(model_kwargs)
        self.stats.add(loop.stats)
        return found


def check(model: PreTrainedModel, generation_config: Any = None) -> None:
    """Refuse what a tree cannot be verified for: the model by `families.undraftable`, as a plan does, and settings.

    Raises:
        PlanError: Encoder-decoders, sliding windows and states that cannot be taken back; positions whose meaning
            depends on the longest one; no final norm like llama's; beams; outputs that are not kept.
    """
    config = model.config.get_text_config().to_dict() | {"is_encoder_decoder": model.config.is_encoder_decoder}
    if (reason := undraftable(config)) is not None:
        raise PlanError(
            f"a {type(model).__name__} cannot be drafted for: {reason}",
            hint="a tree needs a cache from which guesses can be taken back, and positions that do not depend on it",
        )
    final_norm(model)
    if generation_config is None:
        return
    if (generation_config.num_beams or 1) > 1:
        raise PlanError("drafting is for greedy decoding and sampling, not for beams", hint="set num_beams=1")
    for name in ("output_scores", "output_logits", "output_hidden_states", "output_attentions"):
        if getattr(generation_config, name, False):
            raise PlanError(f"a drafted answer comes without {name}", hint=f"leave {name} out")


BATCHED = ("PrefixConstrained", "UnbatchedClassifierFreeGuidance", "EncoderRepetition", "EncoderNoRepeat")
"""Beginnings of processors that must see all rows at once; here each row is processed by itself."""


class _Loop:
    """One call of generate."""

    def __init__(
        self, owner: Drafted, model: Any, ids: Tensor, processor: Any, criteria: Any, config: Any, streamer: Any
    ) -> None:
        self.owner, self.model, self.config, self.streamer = owner, model, config, streamer
        self.processor = processor
        self.choose = verify.matching if config.do_sample else verify.greedy
        self.rejection = bool(config.do_sample) and owner.sampling == "rejection"
        own = (EosTokenCriteria, MaxLengthCriteria)  # what `_take` looks after itself
        self.criteria = [criterion for criterion in criteria or () if not isinstance(criterion, own)]
        self.prompt = ids
        self.stats = DraftStats()
        self.B, self.T = ids.shape
        self.device = ids.device
        eos, pad = getattr(config, "_eos_token_tensor", None), getattr(config, "_pad_token_tensor", None)
        self.eos = set(eos.flatten().tolist()) if eos is not None else set()
        self.pad = int(pad) if pad is not None else 0
        self.said: list[list[int]] = [[] for _ in range(self.B)]
        self.done = [False] * self.B
        self.room = config.max_length - self.T

    def run(self, model_kwargs: dict[str, Any]) -> Any:
        if not self.T or model_kwargs.get("inputs_embeds") is not None:
            raise PlanError("drafting starts from token ids, not from embeddings", hint="give input_ids")
        if self.B > 1:
            for processor in self.processor or ():
                if type(processor).__name__.startswith(BATCHED):
                    raise PlanError(
                        f"{type(processor).__name__} must see all rows at once, and rows are drafted for one by one",
                        hint="give one prompt at a time, or leave custom_generate out",
                    )
        mask = model_kwargs.get("attention_mask")
        given = model_kwargs.get("past_key_values")
        drafter = self.owner.drafter
        before = given.get_seq_length() if given is not None else 0
        if before and mask is not None and mask.shape[1] != self.T:
            raise ValueError(f"the attention mask has {mask.shape[1]} columns, and the text {self.T} tokens")
        cache = SlotCache.of(given, self.T + 64) if given is not None and before else self._cache()
        self.seen = torch.ones(self.B, self.T, dtype=torch.bool, device=self.device) if mask is None else mask.bool()
        self.pads = self.seen.logical_not().sum(1).tolist()
        if not torch.equal(
            self.seen, torch.arange(self.T, device=self.device) >= self.seen.logical_not().sum(1)[:, None]
        ):
            raise ValueError(
                "padding must stand before the text (tokenizer.padding_side = 'left'), and the attention mask have no "
                "other holes; without a mask, transformers masks every token that equals pad_token_id"
            )
        if drafter is not None:
            drafter.start(self.B, self.T + 64)
        began = time.perf_counter()
        logits, hidden = self._read_prompt(cache, mask, before)
        bare = Tree.bare(self.prompt[:, -1])
        roots = [verdict.tokens[0] for verdict in self.choose(bare, logits[:, -1:], self.process)]
        self.stats.prompt_seconds = time.perf_counter() - began
        self._take([[root] for root in roots])
        if self.streamer is not None:
            self.streamer.put(torch.tensor(roots[:1]))
        self._observe(drafter, hidden, [[*self.prompt[b, before + 1 :].tolist(), roots[b]] for b in range(self.B)])
        while not all(self.done):
            self._step(cache, drafter, roots)
        if self.streamer is not None:
            self.streamer.end()
        longest = max(map(len, self.said))
        rows = [row + [self.pad] * (longest - len(row)) for row in self.said]
        sequences = torch.cat((self.prompt, torch.tensor(rows, device=self.device, dtype=self.prompt.dtype)), 1)
        wanted = self.config.return_dict_in_generate
        left = None
        if wanted or getattr(given, "_is_user_defined", False):  # what the next turn may go on from
            left = cache.plain(given if isinstance(given, DynamicCache) else DynamicCache(config=self.model.config))
        if wanted:
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=left)  # type: ignore[arg-type]
        return sequences

    def _cache(self) -> SlotCache:
        return SlotCache(self.model.config.get_text_config().num_hidden_layers, self.B, self.T + 64)

    def _read_prompt(self, cache: SlotCache, mask: Tensor | None, before: int) -> tuple[Tensor, Tensor]:
        """Logits of the last position, and the states of all new ones."""
        ids = self.prompt[:, before:]
        count = self.seen.long().cumsum(1) - 1
        positions = count.clamp_min(0)[:, before:]
        with self._states() as states:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache.advance(ids.shape[1])
        return out.logits, states[0] if states else ids.new_empty(self.B, ids.shape[1], 0)

    def _step(self, cache: SlotCache, drafter: Proposer | None, roots: list[int]) -> None:
        """Draft, verify, commit; `roots` is updated in place."""
        began = time.perf_counter()
        levels = self.room - min(len(s) for s, d in zip(self.said, self.done, strict=True) if not d) - 1
        columns = torch.tensor(roots, device=self.device)
        tree = None
        if drafter is not None and levels > 0:
            tree = drafter.draft(columns, self.owner.tree, levels, self.owner.temperature if self.rejection else None)
        tree = tree or Tree.bare(columns)
        drafted = time.perf_counter()
        inner = tree.ancestors()
        pads = torch.tensor(self.pads, device=self.device)
        offset = torch.tensor(cache.lengths, device=self.device) - pads
        seen = torch.arange(max(cache.lengths), device=self.device) >= pads[:, None]
        with self._states() as states:
            logits = self.model(
                input_ids=tree.tokens,
                attention_mask=tree_mask(seen, cache.lengths, inner, self.model.dtype),
                position_ids=offset[:, None] + tree.depth,
                past_key_values=cache,
                use_cache=True,
            ).logits
        if self.rejection and tree.drawn_from:
            assert isinstance(drafter, Drafter)
            verdicts = verify.rejection(tree, logits, self.process, drafter.token_ids)
        else:
            verdicts = self.choose(tree, logits, self.process)
        verified = time.perf_counter()
        self.stats.count(tree, verdicts, self.done)
        for b, verdict in enumerate(verdicts):
            if self.done[b]:  # a finished row stands still; the drafter is told something, of no consequence
                verdict.path, verdict.tokens = verdict.path[:1], verdict.tokens[:1]
        kept = self._take([v.tokens for v in verdicts])
        cache.accept([v.path[:n] for v, n in zip(verdicts, kept, strict=True)])  # a row that ended keeps what it said
        if self.streamer is not None and kept[0]:
            self.streamer.put(torch.tensor(self.said[0][-kept[0] :]))
        if not all(self.done):
            for b, verdict in enumerate(verdicts):
                roots[b] = verdict.tokens[-1]
            if drafter is not None:
                width = max(len(v.path) for v in verdicts)
                paths = torch.tensor([v.path + [0] * (width - len(v.path)) for v in verdicts], device=self.device)
                hidden = states[0] if states else logits.new_empty(self.B, logits.shape[1], 0)
                certain = hidden.gather(1, paths[..., None].expand(-1, -1, hidden.shape[-1]))
                self._observe(drafter, certain, [v.tokens for v in verdicts])
        now = time.perf_counter()
        self.stats.draft_seconds += drafted - began
        self.stats.verify_seconds += verified - drafted
        self.stats.other_seconds += now - verified

    def _observe(self, drafter: Proposer | None, hidden: Tensor, following: list[list[int]]) -> None:
        if drafter is None or all(self.done):
            return
        counts, width = [len(row) for row in following], max(map(len, following))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in following], device=self.device)
        drafter.observe(hidden, padded, counts, self.pads)

    def _take(self, new: list[list[int]]) -> list[int]:
        """Append tokens row by row, up to where the row ends: end-of-text, length, or any other criterion.

        Returns:
            How many each row took.
        """
        first = not self.stats.steps
        taken = [0] * len(new)
        for b, tokens in enumerate(new):
            if self.done[b]:
                continue
            for token in tokens:
                taken[b] += 1
                self.said[b].append(token)
                self.stats.tokens += not first
                if token in self.eos or len(self.said[b]) >= self.room or self._stopped(b):
                    self.done[b] = True
                    break
        return taken

    def _stopped(self, b: int) -> bool:
        """Whether a criterion other than length and end-of-text wants row b to stop."""
        return any(bool(torch.as_tensor(c(self._text(b, []), None)).any()) for c in self.criteria)

    def _text(self, b: int, more: list[int]) -> Tensor:
        """The row so far as [1, length]: prompt, what was said, and the way down a tree."""
        tail = torch.tensor([self.said[b] + more], device=self.device, dtype=self.prompt.dtype)
        return torch.cat((self.prompt[b : b + 1], tail), 1)

    @property
    def process(self) -> verify.Process | None:
        """What `verify` calls at a node, where there are logits processors."""
        return self._processed if self.processor else None

    def _processed(self, b: int, way: list[int], logits: Tensor) -> Tensor:
        """Row b's logits [V] at the end of a way down the tree, as the processors leave them."""
        found: Tensor = self.processor(self._text(b, way), logits[None].float())[0]
        return found

    @contextmanager
    def _states(self) -> Iterator[list[Tensor]]:
        """Collects what enters the final norm, if the drafter wants it."""
        kept: list[Tensor] = []
        if self.owner.drafter is None or not self.owner.drafter.wants_hidden:
            yield kept
            return
        handle = final_norm(self.model).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            yield kept
        finally:
            handle.remove()

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from residency.compat import streamer_of_generate
from residency.errors import PlanError
from residency.infer import verify
from residency.infer.drafter import Drafter, final_norm
from residency.infer.slotcache import SlotCache, SlotLayer, tree_mask
from residency.infer.tree import DynamicTree, StaticTree, Tree, TreePolicy

Sampling = Literal["matching", "rejection"]


class Proposer(Protocol):
    """What the loop needs of a drafter."""

    wants_hidden: bool

    def attach(self, target: PreTrainedModel) -> Any:
        """Borrow what it needs of the target."""

    def start(self, batch: int, capacity: int) -> None:
        """A new text begins."""

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """Take in certain tokens (see `Drafter.observe`); `hidden` is empty unless `wants_hidden`."""

    def draft(self, roots: Tensor, policy: TreePolicy, levels: int, sample: float | None = None) -> Tree:
        """Guess a tree behind the roots."""


@dataclass
class DraftStats:
    """What one call of `generate` did.

    Args:
        steps: Passes of the target after the prompt's.
        tokens: Tokens these gave, over all rows.
        rows: Rows that were alive, summed over steps (= steps at batch 1).
        nodes: Nodes the target read, over all rows.
        lengths: Number of accepted guesses → how often.
        offered, accepted: Per level (from 1): in how many row-steps the tree had a node there, and one was accepted.
        prompt_seconds, draft_seconds, verify_seconds, other_seconds: Wall time by what it was spent on.
    """

    steps: int = 0
    tokens: int = 0
    rows: int = 0
    nodes: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    offered: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens per row and step; 1 is plain decoding."""
        return self.tokens / max(1, self.rows)

    def add(self, other: DraftStats) -> None:
        """Sum two calls."""
        for name in ("steps", "tokens", "rows", "nodes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prompt_seconds", "draft_seconds", "verify_seconds", "other_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("lengths", "offered", "accepted"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value


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
        last: Of the last call.

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
        self.stats, self.last = DraftStats(), DraftStats()

    def reset(self) -> None:
        """Forget the statistics."""
        self.stats, self.last = DraftStats(), DraftStats()

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
            inner = getattr(self.drafter, "drafter", self.drafter)
            if isinstance(inner, Drafter) and inner.dtype != model.dtype:
                raise PlanError(
                    f"the draft computes in {inner.dtype}, and the model in {model.dtype}",
                    hint="drafter.to(model.dtype)",
                )
        with torch.no_grad():
            loop = _Loop(self, model, input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            found = loop.run(model_kwargs)
        self.last = loop.stats
        self.stats.add(loop.stats)
        return found


def check(model: PreTrainedModel, generation_config: Any = None) -> None:
    """Refuse what a tree cannot be verified for.

    Raises:
        PlanError: Encoder-decoders, sliding windows and states that cannot be taken back; positions whose meaning
            depends on the longest one; beams; outputs that are not kept.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise PlanError("encoder-decoder models cannot be drafted for", hint="use a decoder-only model")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        raise PlanError(
            f"{type(model).__name__} has {', '.join(sorted(kinds - {'full_attention'})) or 'sliding-window'} layers",
            hint="a tree needs a cache from which guesses can be taken back: full attention in every layer",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if (kind := part.get("rope_type")) in ("dynamic", "longrope"):
            raise PlanError(
                f"{type(model).__name__} has RoPE of type {kind}, whose frequencies depend on the longest position",
                hint="a tree reaches further than one token does; such models cannot be drafted for losslessly",
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
        self.processor, self.criteria = processor, criteria
        self.prompt = ids
        self.stats = DraftStats()
        self.B, self.T = ids.shape
        self.device = ids.device
        self.sample = bool(config.do_sample)
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
        roots = [verify_one(logits[b, -1:], self._process(b), self.sample) for b in range(self.B)]
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
        left = self._left_behind(cache, given) if wanted or getattr(given, "_is_user_defined", False) else None
        if wanted:
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=left)  # type: ignore[arg-type]
        return sequences

    def _left_behind(self, cache: SlotCache, given: Any) -> Any:
        """What the next turn may go on from: a plain cache of all tokens but the last; None where rows differ."""
        if len(set(cache.lengths)) > 1:
            return None
        end = cache.lengths[0]
        plain: Any = given if isinstance(given, DynamicCache) else DynamicCache(config=self.model.config)
        for i, layer in enumerate(cache.layers):
            assert isinstance(layer, SlotLayer)
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = layer.keys[:, :, :end].clone(), layer.values[:, :, :end].clone()
            if plain.layers[i : i + 1] and plain.layers[i].is_initialized:
                plain.layers[i].keys, plain.layers[i].values = keys, values
            else:
                plain.update(keys, values, i)
        return plain

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
        rejection = self.sample and self.owner.sampling == "rejection"
        tree = None
        if drafter is not None and levels > 0:
            tree = drafter.draft(columns, self.owner.tree, levels, self.owner.temperature if rejection else None)
        tree = tree or alone(columns)
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
        process = self._processing() if self.processor else None
        if rejection and tree.q is not None:
            vocabulary = getattr(drafter, "token_ids", None)
            verdicts = verify.rejection(tree, logits, process, vocabulary)
        else:
            verdicts = (verify.matching if self.sample else verify.greedy)(tree, logits, process)
        verified = time.perf_counter()
        self._count(tree, verdicts)
        for b, verdict in enumerate(verdicts):
            if self.done[b]:  # a finished row stands still; the drafter is told something, of no consequence
                verdict.path, verdict.tokens = verdict.path[:1], verdict.tokens[:1]
        kept = self._take([v.tokens for v in verdicts])
        cache.accept([v.path[:n] for v, n in zip(verdicts, kept, strict=True)])  # a row that ended keeps what it said
        if self.streamer is not None:
            new = self.said[0][-min(len(verdicts[0].tokens), self._fresh) :] if self._fresh else []
            if new:
                self.streamer.put(torch.tensor(new))
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

    def _count(self, tree: Tree, verdicts: list[verify.Verdict]) -> None:
        stats = self.stats
        stats.steps += 1
        depths = tree.depth.masked_fill(~tree.alive, 0)
        for b, verdict in enumerate(verdicts):
            if self.done[b]:
                continue
            stats.rows += 1
            stats.nodes += int(tree.alive[b].sum())
            taken = len(verdict.path) - 1
            stats.lengths[taken] = stats.lengths.get(taken, 0) + 1
            for level in range(1, int(depths[b].max()) + 1):
                stats.offered[level] = stats.offered.get(level, 0) + 1
                stats.accepted[level] = stats.accepted.get(level, 0) + (level <= taken)

    def _take(self, new: list[list[int]]) -> list[int]:
        """Append tokens row by row, up to where the row ends: end-of-text, length, or any other criterion.

        Returns:
            How many each row took.
        """
        first = not self.stats.steps
        self._fresh = 0
        taken = [0] * len(new)
        for b, tokens in enumerate(new):
            if self.done[b]:
                continue
            for token in tokens:
                taken[b] += 1
                self.said[b].append(token)
                self._fresh += b == 0
                self.stats.tokens += not first
                if token in self.eos or len(self.said[b]) >= self.room or self._stopped(b):
                    self.done[b] = True
                    break
        return taken

    def _stopped(self, b: int) -> bool:
        """Whether a criterion other than length and end-of-text wants row b to stop."""
        others = [c for c in self.criteria or () if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        if not others:
            return False
        return any(bool(torch.as_tensor(c(self._text(b, []), None)).any()) for c in others)

    def _text(self, b: int, more: list[int]) -> Tensor:
        """The row so far as [1, length]: prompt, what was said, and the way down a tree."""
        tail = torch.tensor([self.said[b] + more], device=self.device, dtype=self.prompt.dtype)
        return torch.cat((self.prompt[b : b + 1], tail), 1)

    def _process(self, b: int) -> Any:
        """Processors for row b's next token, or None."""
        if not self.processor:
            return None
        return lambda logits: self.processor(self._text(b, []), logits.float())

    def _processing(self) -> verify.Process:
        def process(b: int, way: list[int], logits: Tensor) -> Tensor:
            found: Tensor = self.processor(self._text(b, way), logits[None].float())[0]
            return found

        return process

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


def alone(roots: Tensor) -> Tree:
    """Trees of nothing but their roots [B]."""
    column = roots[:, None]
    return Tree(
        column, torch.full_like(column, -1), torch.zeros_like(column), torch.ones_like(column, dtype=torch.bool)
    )


def verify_one(logits: Tensor, process: Any, sample: bool) -> int:
    """The next token from raw logits [1, V]."""
    logits = logits if process is None else process(logits)
    if not sample:
        return int(logits.argmax(-1))
    return int(torch.multinomial(logits.float().softmax(-1), 1))

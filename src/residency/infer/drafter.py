"""What a drafter is: something that guesses the next tokens of a frozen target as a tree.

The decoding loop (`drafted.py`) speaks to every drafter alike (`Proposer`):

    drafter.attach(target)                                  borrow what it needs of the target
    drafter.start(batch, capacity)                          a new text begins
    drafter.observe(hidden, following, counts, pads)        these tokens are certain now, and the target's states there
    tree = drafter.draft(roots, policy, levels, sample)     guesses behind the last certain token

`Drafter` drafts level by level for every drafter that has a distribution per node: `first` gives the distribution after
the root, `next` that after drafted tokens. Whatever it needs of the target it borrows (`attach`): the rows of the
target's LM head serve as token embeddings and as output layer, and neither is trained nor saved.

A draft vocabulary (`token_ids`) restricts guesses to V' of the target's V tokens, chosen by how often a domain uses
them. It only bounds what can be guessed: the target verifies over all V. On a small model this is what makes drafting
pay: the LM head of SmolLM2-135M has 49,152 rows and 28 of 135 million parameters, and a chain of five guesses that
used it whole would cost as much as the rest of the model.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from residency.errors import PlanError
from residency.infer.slotcache import SlotCache
from residency.infer.tree import Level, Tree, TreePolicy


class Proposer(Protocol):
    """What the loop needs of a drafter."""

    wants_hidden: bool

    def attach(self, target: PreTrainedModel) -> Any:
        """Borrow what it needs of the target."""

    def parts(self) -> list[nn.Module]:
        """What it computes with, once attached: the modules worth packing (`residency.packed`)."""

    def start(self, batch: int, capacity: int) -> None:
        """A new text begins."""

    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """Take in certain tokens (see `Drafter.observe`); `hidden` is empty unless `wants_hidden`."""

    def draft(self, roots: Tensor, policy: TreePolicy, levels: int, sample: float | None = None) -> Tree:
        """Guess a tree behind the roots."""


class Drafter(nn.Module):
    """Base of all drafters with parameters.

    Attributes:
        token_ids: [V'] ids of the target that may be guessed, or None for all; saved with the parameters.
        context: Number of layers with a key/value cache of their own.
    """

    context = 0
    wants_hidden = True
    """Whether the loop has to hand over the target's hidden states."""

    def __init__(self, token_ids: Tensor | None = None) -> None:
        super().__init__()
        self.token_ids: Tensor | None
        self.register_buffer("token_ids", token_ids)
        self._target: PreTrainedModel | None = None
        self._at: tuple[Any, ...] = ()
        self._head: nn.Linear | None = None

    # ------------------------------------------------------------------ the target

    def attach(self, target: PreTrainedModel) -> Self:
        """Borrow the target's head; called by every `generate`, and anew when its weights, device or dtype changed.

        Raises:
            PlanError: When target and drafter do not fit, or the target is of a family that cannot be drafted for.
        """
        head = target.get_output_embeddings()
        if self._target is target and self._at == _state_of(head.weight):
            return self
        final_norm(target)
        if head is None or getattr(head, "bias", None) is not None:
            raise PlanError(
                f"a {type(target).__name__} cannot be drafted for", hint="it needs an LM head without a bias"
            )
        self.fit_check(head.weight.shape[1], head.weight.shape[0])
        object.__setattr__(self, "_target", target)  # not a submodule: neither trained nor saved
        self._at = _state_of(head.weight)
        self.to(device=head.weight.device)
        ids = self.token_ids
        with torch.inference_mode(False):  # or these rows could not be trained against later
            rows = head.weight.detach() if ids is None else head.weight.detach()[ids].clone()
        mine = nn.Linear(1, 1, bias=False, device="meta")
        mine.weight = nn.Parameter(rows, requires_grad=False)
        object.__setattr__(self, "_head", mine)
        return self

    def fit_check(self, width: int, vocabulary: int) -> None:
        """Refuse a target of another width or a smaller vocabulary."""
        if self.token_ids is not None and int(self.token_ids.max()) >= vocabulary:
            raise PlanError(
                f"the draft guesses token {int(self.token_ids.max())}, and the model has {vocabulary:,} tokens",
                hint="the draft belongs to another model; train it again",
            )

    @property
    def target(self) -> PreTrainedModel:
        """The target; `attach` comes first."""
        if self._target is None:
            raise ValueError("the drafter is not attached to a model: call drafter.attach(model) first")
        return self._target

    def embed(self, ids: Tensor) -> Tensor:
        """e(x): the target's LM-head rows of tokens [...], as [..., D]."""
        return self.target.get_output_embeddings().weight.detach()[ids]

    def logits(self, out: Tensor) -> Tensor:
        """The frozen head over the draft vocabulary: [..., D] → [..., V']."""
        found: Tensor = self.head(out)
        return found

    @property
    def head(self) -> nn.Linear:
        """The target's rows of the draft vocabulary as a layer [V', D]; borrowed, so not among the submodules."""
        if self._head is None:
            raise ValueError("the drafter is not attached to a model: call drafter.attach(model) first")
        return self._head

    def ids_of(self, index: Tensor) -> Tensor:
        """Indices into the draft vocabulary → the target's ids."""
        return index if self.token_ids is None else self.token_ids[index]

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters."""
        return next(self.parameters()).dtype

    # ------------------------------------------------------------------ decoding

    def parts(self) -> list[nn.Module]:
        """See `Proposer.parts`: itself, and the borrowed head."""
        return [self, self.head]

    def start(self, batch: int, capacity: int) -> None:
        """A new text begins.

        Raises:
            PlanError: When drafter and target compute in different precisions.
        """
        if self.dtype != self.target.dtype:
            raise PlanError(
                f"the draft computes in {self.dtype}, and the model in {self.target.dtype}",
                hint="drafter.to(model.dtype)",
            )
        self.cache = SlotCache(self.context, batch, capacity) if self.context else None

    @abstractmethod
    def observe(self, hidden: Tensor, following: Tensor, counts: Sequence[int], pads: Sequence[int]) -> None:
        """Take in certain tokens.

        Args:
            hidden: [B, A, D] of the target before its final norm, at the tokens that became certain.
            following: [B, A] the token after each of them.
            counts: How many of the A columns are real, per row (the first ones).
            pads: Columns before each row's first real token, at the first call (left padding); zeros afterwards.
        """

    @abstractmethod
    def first(self) -> tuple[Tensor, Any]:
        """After the root: (logits [B, 1, V'], state of one node per row)."""

    @abstractmethod
    def next(self, state: Any, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """After drafted tokens: (logits [B, F, V'], state of F nodes).

        Args:
            state: Of the level above.
            parents: [B, F] indices into that level's nodes.
            tokens: [B, F] ids.
        """

    def draft(self, roots: Tensor, policy: TreePolicy, levels: int, sample: float | None = None) -> Tree:
        """Guess a tree behind the roots.

        Args:
            roots: [B] last certain tokens.
            policy: Which guesses become nodes.
            levels: Deepest level worth drafting (the text may end sooner than the policy's depth).
            sample: None for the most probable guesses; otherwise the temperature at which guesses are drawn without
                replacement (Gumbel top-k), as `verify.rejection` needs them.

        Returns:
            The tree, at least its root.
        """
        B, device = len(roots), roots.device
        columns = [roots[:, None]]
        parents = [torch.full((B, 1), -1, device=device)]
        depths, alive = (
            [torch.zeros(B, 1, dtype=torch.long, device=device)],
            [torch.ones(B, 1, dtype=torch.bool, device=device)],
        )
        drawn_from: list[tuple[Tensor, Tensor]] = []
        at = torch.zeros(B, 1, dtype=torch.long, device=device)  # tree columns of the nodes that may get children
        path = torch.zeros(B, 1, device=device)
        spent, width, levels = 0, 1, min(levels, policy.levels)
        logits: Tensor | None = None
        state: Any = None
        for level in range(1, levels + 1):
            if level == 1:
                logits, state = self.first()
            assert logits is not None
            logp = (logits.float() / (sample or 1.0)).log_softmax(-1)
            ranked = logp if sample is None else logp - torch.empty_like(logp).exponential_().log()
            index = ranked.topk(min(policy.fanout, logp.shape[-1]), dim=-1).indices
            guesses = logp.gather(-1, index)
            grown = policy.grow(level, guesses, path, spent)
            if grown is None:
                break
            if policy.fanout > index.shape[-1]:  # a static tree wider than the draft vocabulary
                there = grown.ranks < index.shape[-1]
                grown = Level(grown.parents, grown.ranks.clamp_max(index.shape[-1] - 1), grown.alive & there)
            chosen = index.flatten(1).gather(1, grown.parents * index.shape[-1] + grown.ranks)
            tokens = self.ids_of(chosen)
            here = torch.arange(width, width + tokens.shape[1], device=device).expand(B, -1)
            columns.append(tokens)
            parents.append(at.gather(1, grown.parents))
            depths.append(torch.full_like(tokens, level))
            alive.append(grown.alive)
            if sample is not None:
                drawn_from.append((logp, at))
            score = guesses.flatten(1).gather(1, grown.parents * guesses.shape[-1] + grown.ranks)
            path = (path.gather(1, grown.parents) + score).masked_fill(~grown.alive, -torch.inf)
            spent, width = spent + tokens.shape[1], width + tokens.shape[1]
            kept = policy.parents_of(level)
            if level == levels or (kept is not None and not len(kept)):
                break
            inner, at = grown.parents, here
            if kept is not None:
                kept = kept.to(device)
                tokens, inner, at, path = tokens[:, kept], inner[:, kept], here[:, kept], path[:, kept]
            logits, state = self.next(state, inner, tokens)
        return Tree(
            torch.cat(columns, 1), torch.cat(parents, 1), torch.cat(depths, 1), torch.cat(alive, 1), tuple(drawn_from)
        )


def _state_of(weight: Tensor) -> tuple[Any, ...]:
    """What changes when a weight is replaced, moved, converted or written to."""
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, weight.device, version


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head: what enters it is the hidden state drafters read.

    Raises:
        PlanError: For a model that has none where llama-like decoders have it.
    """
    norm = getattr(model.get_decoder(), "norm", None)
    if not isinstance(norm, nn.Module):
        raise PlanError(
            f"a {type(model).__name__} cannot be drafted for",
            hint="drafters read the state before the final norm of llama-like decoders (Llama, Mistral, Qwen, SmolLM)",
        )
    return norm


def frequent_tokens(texts: Iterable[Sequence[int]], size: int, vocabulary: int, always: Sequence[int] = ()) -> Tensor:
    """A draft vocabulary: the `size` most frequent tokens of encoded texts, as sorted ids [V'].

    Args:
        texts: Token ids.
        size: V'. Tokens that never occur fill up in order of their id (in byte-pair vocabularies: early merges first).
        vocabulary: V.
        always: Ids that belong to it whatever their count (the end-of-text token).
    """
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for ids in texts:
        counts += torch.bincount(torch.as_tensor(list(ids), dtype=torch.long), minlength=vocabulary)
    counts[list(always)] = torch.iinfo(torch.long).max
    order = counts.argsort(descending=True, stable=True)
    return order[: min(size, vocabulary)].sort().values

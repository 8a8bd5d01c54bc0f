"""What a language model says of every answer token, in batches: the engine below `reading`.

With logits z at the position that predicts the true token y, p = softmax(z), natural logarithms:

    nll      −log p_y                       best      max p
    entropy  −Σ p log p                     log_best  log max p
    el2n     ‖p − onehot(y)‖₂ = √((1 − p_y)² + Σ_{v ≠ y} p_v²)       margin  largest minus second largest p
    hits     1 where y is the argmax

The model runs in its own precision; head, softmax and everything behind are float32. A hook on the output embedding
takes the hidden states of the wanted positions and lets the model's own head see one position, so [B, T, V] never
exists; the head then runs on a few positions at a time. What Gemma, Granite and Cohere do to their logits behind the
head (soft cap, scale) is done too, and the first batch is compared with the model's own logits.

Cost: one forward pass; memory one batch of hidden states and one block of logits (32 MB on a CPU), three times
that for a moment.

EL2N: Paul, Ganguli, Dziugaite 2021 (arXiv 2107.07075). The engine is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("nll", "entropy", "el2n", "best", "log_best", "margin", "hits")
"""The statistics of one answer token, in the order of the arrays' first axis."""


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows of like length, shortest first; a batch, padded, has at most `most` tokens, or one row."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Reader:
    """Runs a model in evaluation mode and without gradients, inside a `with` block.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        batch_tokens: Most tokens of one forward pass.
        progress: Called after every batch with the number of sequences read.

    Raises:
        ValueError: When the model has no output embedding.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_tokens: int = 2_048, progress: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.advance: Callable[[int], Any] = progress or (lambda n: None)
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no output embedding: a causal language model is needed")
        self._checked = False

    def __enter__(self) -> Reader:
        from contextlib import ExitStack

        import torch

        from residency.modes import evaluating

        self._stack = ExitStack()
        self._stack.enter_context(evaluating(self.model))
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    def tokens(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, only_nll: bool = False
    ) -> list[NDArray[np.float32]]:
        """The statistics of every answer token.

        Args:
            pairs: Of each of n rows the context and the answer, each at least one token.
            only_nll: Whether the first column is enough.

        Returns:
            n arrays [C, T_i]: C = 7 as in `COLUMNS`, or 1.
        """
        import torch

        results: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(pairs)
        for some in batches([len(c) + len(a) for c, a in pairs], self.batch_tokens):
            positions = [(len(pairs[i][0]) - 1, len(pairs[i][1])) for i in some]
            hidden = self.hidden([[*pairs[i][0], *pairs[i][1]][:-1] for i in some], positions)
            targets = torch.tensor([token for i in some for token in pairs[i][1]], device=hidden.device)
            values = torch.cat(
                [_statistics(logits, targets[part], only_nll) for part, logits in self.logits(hidden)], 1
            )
            sizes = [count for _, count in positions]
            for i, value in zip(some, values.cpu().split(sizes, 1), strict=True):
                results[i] = value.numpy().copy()
            self.advance(len(some))
        return results

    def hidden(self, sequences: Sequence[Sequence[int]], positions: Sequence[tuple[int, int]]) -> Any:
        """What the head sees.

        Args:
            sequences: B sequences of token ids.
            positions: Of each the first position wanted, and how many from there.

        Returns:
            [N, D], the wanted positions of all sequences, in their order.
        """
        import torch

        width = max(map(len, sequences))
        ids = torch.zeros((len(sequences), width), dtype=torch.long)  # any id pads, for no token looks to its right
        mask, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (sequence, (first, count)) in enumerate(zip(sequences, positions, strict=True)):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
            wanted[i, first : first + count] = True
        seen: list[Any] = []

        def look(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # soft prompts put virtual tokens in front, so count from the right
            own = args[0][:, -width:]
            seen.append((own[wanted.to(own.device)], own[:, :1]))
            return (own[:, :1], *args[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(look)
        try:
            out = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"{type(self.model).__name__} does not call its output embedding as a module")
        found, first = seen[-1]
        if not self._checked:
            self._check(first[:, 0], out.logits[:, 0])
            self._checked = True
        return found

    def logits(self, hidden: Any) -> Iterator[tuple[slice, Any]]:
        """The logits of hidden states [N, D], a few rows [n, V] at a time in one buffer, float32."""
        import torch

        from residency import fusedhead
        from residency.objective import Head

        embedding = self.model.get_output_embeddings()
        head = Head(embedding.weight, getattr(embedding, "bias", None))
        budget = fusedhead.LOGITS_BYTES if hidden.device.type == "cpu" else fusedhead.ACCELERATOR_BYTES
        size = max(1, min(len(hidden), budget // (4 * len(head.weight))))
        buffer = hidden.new_empty(size, len(head.weight), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            some = hidden[start : start + size]
            out = fusedhead.chunk_logits(some, head, out=buffer[: len(some)], chunk_bytes=budget)
            yield slice(start, start + len(some)), self._behind(out)

    def _behind(self, logits: Any) -> Any:
        """What Gemma (soft cap), Granite and Cohere (scales) do to logits behind the head, in place."""
        config = self.model.config.get_text_config()
        if scale := getattr(config, "logits_scaling", None):
            logits /= scale
        if scale := getattr(config, "logit_scale", None):
            logits *= scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _check(self, hidden: Any, own: Any) -> None:
        """Our logits must be the model's."""
        mine = next(self.logits(hidden[:1]))[1]
        gap, scale = (mine - own[:1].float()).abs().max().item(), own[:1].float().abs().max().item()
        if gap > 0.05 * max(scale, 1.0):  # not refused where both are NaN: such rows are NaN
            raise ValueError(
                f"{type(self.model).__name__} changes its logits behind the head in a way that is not known here "
                f"(largest difference {gap:.3g})"
            )


def _statistics(logits: Any, targets: Any, only_nll: bool) -> Any:
    """[C, n] of logits [n, V], which are overwritten, and the true tokens [n]."""
    import torch

    index = targets.unsqueeze(1)
    logits -= logits.amax(1, keepdim=True)  # log p of a sure prediction, near 0, keeps its digits
    if only_nll:
        return (logits.logsumexp(1, keepdim=True) - logits.gather(1, index)).T
    hits = logits.argmax(1) == targets
    log_p = logits.sub_(logits.logsumexp(1, keepdim=True))
    true = log_p.gather(1, index)  # [n, 1]
    top = log_p.topk(min(2, log_p.shape[1]), 1).values
    best = top[:, 0].exp()
    margin = best - top[:, 1].exp() if top.shape[1] > 1 else best
    p = log_p.exp()
    entropy = torch.special.entr(p).sum(1)
    p.scatter_(1, index, 0.0)  # 1 − p_y is the sum of the others: no cancellation where the prediction is sure
    el2n = (p.sum(1).square() + p.square().sum(1)).sqrt()
    return torch.stack([-true[:, 0], entropy, el2n, best, top[:, 0], margin, hits.to(best.dtype)])

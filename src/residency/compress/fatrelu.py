"""Choosing the threshold of FATReLU: how far the bar can be raised before the loss notices.

The idea. After training, most gates that fire do so weakly. Raising the bar from 0 to t silences them for little loss,
and without training. How large t may be depends on the scale of the model's gates: the paper uses 0.01 for LLaMA-2, and
for SmolLM2-135M 0.2 cost nothing while 0.01 did nothing. So t is not asked for in gate units but found:

    q ∈ [0, 1)      a share of silent gates
    t(q)            the q-quantile of the gate pre-activations W_gate x on calibration rows, at least 0
                    ("global": of all layers together; "per layer": of each layer, so that all become equally sparse)

    by tolerance    the largest q on a grid, refined by bisection, up to which the loss rises by at most `tolerance`
    by sparsity     the smallest q, by bisection, at which the measured sparsity of x₁ reaches `sparsity`

Quantiles are taken once, without thresholds, while a threshold in one layer changes the gates of those above it. This
only labels the candidates: loss and sparsity of every candidate are measured on the model as it would be.

The paper's: one global t, by hand from 0.005 to 0.03. Our choice: everything else here. In `by tolerance` the search
stops at the first candidate that costs too much: the loss is not monotone in t (a small t often improves it), and
beyond a bad candidate a good one would be luck.

Cost: one pass over the calibration rows for the quantiles and one per candidate, at most 13.

Paper: Song, Han, Zhang et al., "ProSparse", COLING 2025, arXiv 2402.13516, section 3.2, table 9. No code released.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from residency.compress.relufy import gated_ffns, set_thresholds, thresholds
from residency.compress.sparsity import Meter, Sparsity, intermediates
from residency.errors import DataError
from residency.modes import evaluating
from residency.objective import next_token_positions
from residency.progress import Progress

Batches = Iterable[Mapping[str, Tensor]]
GRID = 8
"""Candidates between the sparsity without thresholds and 1, in the search by tolerance."""
REFINE = 4
"""Bisections after it; by sparsity there are GRID + REFINE of them."""
_FINE, _LOW, _HIGH = 128, -24, 16


class Candidate(NamedTuple):
    """One setting that was measured.

    Args:
        share: q.
        thresholds: t of every layer.
        loss: Nats per trained token.
        sparsity: Share of zeros in x₁.
    """

    share: float
    thresholds: list[float]
    loss: float
    sparsity: float


class Shift(NamedTuple):
    """What was chosen and everything that was measured on the way, by ascending share; the first has thresholds 0."""

    chosen: Candidate
    measured: list[Candidate]


def shift_thresholds(
    model: Any,
    batches: Batches,
    *,
    tolerance: float | None = None,
    sparsity: float | None = None,
    per_layer: bool = False,
    progress: Progress | None = None,
) -> Shift:
    """Choose thresholds on calibration rows and install them.

    Args:
        model: A ReLU-fied, trained model; changed in place (thresholds it has are replaced), its mode is restored.
        batches: `input_ids`, `labels` [B, T] and `attention_mask` [B, T] where rows are padded; held in memory.
        tolerance: The loss may rise by so many nats per trained token, ≥ 0.
        sparsity: Or: the share of zeros in x₁ to reach, in (0, 1).
        per_layer: One threshold per layer instead of a global one.
        progress: Where to report; None is silent.

    Raises:
        ValueError: Unless exactly one of tolerance and sparsity is given, in its range.
        DataError: When no calibration token is trained.
        PlanError: When the model is not ReLU-fied.
    """
    if (tolerance is None) == (sparsity is None):
        raise ValueError("give either `tolerance` or `sparsity`")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"the tolerance is finite and not negative, got {tolerance}")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"the sparsity lies between 0 and 1, got {sparsity}")
    batches, before = list(batches), thresholds(model)
    try:
        with (progress or Progress()).task("threshold", GRID + REFINE + 2) as advance:
            set_thresholds(model, 0.0)
            gates = GateQuantiles(model, batches)
            advance(1)
            search = _Search(model, batches, gates, per_layer, advance)
            chosen = search.by_tolerance(tolerance) if tolerance is not None else search.by_sparsity(sparsity or 0)
        set_thresholds(model, chosen.thresholds)
    except BaseException:
        set_thresholds(model, before)
        raise
    return Shift(chosen, sorted(search.measured, key=lambda c: c.share))


def loss_and_sparsity(model: Any, batches: Batches) -> tuple[float, Sparsity]:
    """Nats per trained token, and zeros of x₁ over all real tokens, in one pass.

    Raises:
        DataError: When no token is trained.
    """
    meter = Meter(len(gated_ffns(model)))
    total, count = 0.0, 0
    narrow = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.no_grad(), evaluating(model), intermediates(model, meter.keep):
        for batch in batches:
            inputs, labels = _inputs(model, batch), batch["labels"].to(model.device)
            mask, targets = next_token_positions(labels)
            if narrow:  # the head runs only where some row predicts a trained token
                places = mask.any(0).nonzero().squeeze(1)
                inputs["logits_to_keep"], mask = places, mask[:, places]
            meter.begin(inputs["attention_mask"])
            logits = model(**inputs, use_cache=False).logits
            total += float(nn.functional.cross_entropy(logits[mask].float(), targets, reduction="sum"))
            count += len(targets)
    if not count:
        raise DataError("no token of the calibration rows is trained", hint="rows need an answer")
    return total / count, meter.result()


class GateQuantiles:
    """Quantiles of the gate pre-activations of every layer, from histograms with 128 bins per octave.

    Args:
        model: A model with gated layers.
        batches: As for `shift_thresholds`; only real tokens count.
    """

    def __init__(self, model: Any, batches: Batches) -> None:
        ffns = gated_ffns(model)
        self.counts = torch.zeros(len(ffns), (_HIGH - _LOW) * _FINE + 2, dtype=torch.float64)
        self._real: Tensor | None = None
        handles = [f.gate_proj.register_forward_hook(partial(self._keep, place)) for place, f in enumerate(ffns)]
        try:
            with torch.no_grad(), evaluating(model):
                for batch in batches:
                    inputs = _inputs(model, batch)
                    self._real = inputs["attention_mask"].bool()
                    model.base_model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, place: int, module: Any, args: Any, z: Tensor) -> None:
        assert self._real is not None
        values = z.reshape(*self._real.shape, -1)[self._real].float().flatten()
        bins = ((values.clamp(min=0).log2() - _LOW) * _FINE).floor().clamp(-1, self.counts.shape[1] - 2).long() + 1
        self.counts[place] += torch.bincount(bins, minlength=self.counts.shape[1]).double().cpu()

    def at(self, share: float, per_layer: bool = False) -> list[float]:
        """One threshold per layer, a `share` of the gates below it; 0 where so many are negative anyway."""
        counts = self.counts if per_layer else self.counts.sum(0, keepdim=True)
        below = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp(min=1)
        first = (below < share).sum(1).clamp(max=counts.shape[1] - 1)  # the bin in which the share is reached
        found = [2.0 ** (int(b) / _FINE + _LOW) if b else 0.0 for b in first]  # its upper edge
        return found if per_layer else found * len(self.counts)


class _Search:
    """Candidates measured so far."""

    def __init__(self, model: Any, batches: Any, gates: GateQuantiles, per_layer: bool, advance: Any) -> None:
        self.model, self.batches, self.gates, self.per_layer = model, batches, gates, per_layer
        self.advance, self.measured = advance, list[Candidate]()
        self.base = self.measure(0.0)

    def measure(self, share: float) -> Candidate:
        found = self.gates.at(share, self.per_layer)
        set_thresholds(self.model, found)
        loss, zeros = loss_and_sparsity(self.model, self.batches)
        self.measured.append(Candidate(share, found, loss, zeros.mean))
        self.advance(1)
        return self.measured[-1]

    def by_tolerance(self, tolerance: float) -> Candidate:
        good, bad = self.base, 1.0
        start = self.base.sparsity
        for step in range(1, GRID):
            candidate = self.measure(start + (1 - start) * step / GRID)
            if not candidate.loss <= self.base.loss + tolerance:
                bad = candidate.share
                break
            good = candidate
        for _ in range(REFINE):
            candidate = self.measure((max(good.share, start) + bad) / 2)
            if candidate.loss <= self.base.loss + tolerance:
                good = candidate
            else:
                bad = candidate.share
        return good

    def by_sparsity(self, sparsity: float) -> Candidate:
        if self.base.sparsity >= sparsity:
            return self.base
        low, good = 0.0, self.measure(1.0)
        for _ in range(GRID + REFINE):
            candidate = self.measure((low + good.share) / 2)
            if candidate.sparsity >= sparsity:
                good = candidate
            else:
                low = candidate.share
        return good


def _inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    ids = batch["input_ids"].to(model.device)
    real = batch["attention_mask"].to(model.device) if "attention_mask" in batch else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": real}

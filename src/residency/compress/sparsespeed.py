"""How fast sparse feed-forward layers are on this machine: alone against sparsity, and in the whole model.

Decoding at batch 1 is limited by reading weights, and a single layer, timed over and over, is read from the cache. So
all layers of the model take their turn, as they do in decoding.

    alone    every layer at the same share of silent units, made by a threshold at that quantile of its gates
    whole    greedy decoding with a key/value cache, prompt excluded

All numbers are measured medians and mean nothing without the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from residency.compress.relufy import FATReLU, gated_ffns
from residency.compress.sparseffn import sparse_decoding
from residency.modes import evaluating

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)


def speed_against_sparsity(model: Any, shares: Sequence[float] = SHARES, repeats: int = 7) -> list[dict[str, float]]:
    """Time all feed-forward layers of a ReLU-fied model for one random token, dense and sparse.

    Args:
        model: Its weights, activations and modules are left as they are.
        shares: Shares of silent units to time, at least the 0.5 that random inputs have by themselves.
        repeats: Rounds; their median is given.

    Returns:
        For each share: `sparsity` (the share reached), `dense_ms` and `sparse_ms` of all layers together, `speedup`.
    """
    ffns = gated_ffns(model)
    weight = ffns[0].gate_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, weight.shape[1], generator=generator).to(weight)
    own = [ffn.act_fn for ffn in ffns]
    found = []
    with torch.no_grad(), evaluating(model):
        gates = [ffn.gate_proj(x).float().flatten() for ffn in ffns]
        for share in shares:
            bars = [max(0.0, float(z.quantile(share))) for z in gates]
            reached = sum(float(((z < t) | (z <= 0)).double().mean()) for z, t in zip(gates, bars, strict=True))
            try:
                for ffn, t in zip(ffns, bars, strict=True):
                    ffn.act_fn = FATReLU(t) if t else nn.ReLU()
                dense = _median(partial(_pass, ffns, x), repeats)
                with sparse_decoding(model):
                    sparse = _median(partial(_pass, gated_ffns(model), x), repeats)
            finally:
                for ffn, act in zip(gated_ffns(model), own, strict=True):
                    ffn.act_fn = act
            found.append(
                {
                    "sparsity": round(reached / len(ffns), 4),
                    "dense_ms": round(1e3 * dense, 4),
                    "sparse_ms": round(1e3 * sparse, 4),
                    "speedup": round(dense / sparse, 3),
                }
            )
    return found


def decode_speed(model: Any, prompt: Sequence[int], new_tokens: int = 32, repeats: int = 3) -> float:
    """Tokens per second of greedy decoding after a prompt, whose own pass is not timed.

    Args:
        model: A causal language model with a key/value cache.
        prompt: Token ids, at least one.
        new_tokens: Tokens to write.
        repeats: Rounds after one to warm up; their median is given.
    """
    ids = torch.tensor([list(prompt)], device=model.device)

    def write() -> float:
        result = model(ids, use_cache=True)
        start = time.perf_counter()
        for _ in range(new_tokens):
            token = result.logits[:, -1:].argmax(-1)
            result = model(token, past_key_values=result.past_key_values, use_cache=True)
        result.logits[0, -1, 0].item()  # waits for the device
        return time.perf_counter() - start

    with torch.no_grad(), evaluating(model):
        write()
        return new_tokens / statistics.median(write() for _ in range(repeats))


def _pass(ffns: Sequence[Any], x: Tensor) -> None:
    for ffn in ffns:
        ffn(x)


def _median(run: Callable[[], Any], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)

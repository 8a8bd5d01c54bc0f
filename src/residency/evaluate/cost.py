"""What a model costs to run: tokens per second, time to the first token, cache bytes per token, bytes on disk.

Speed is measured, at batch 1, greedy, with a key/value cache, which is how one user meets the model:

    time to first token = prefill of the whole prompt + the first argmax
    tokens per second   = (new_tokens - 1) / (time from the first to the last token)

Both are medians of `repeats` runs after one warm-up run (allocations, lazy kernels). Generation does not stop at an
end token, so that every model does the same amount of work. On a GPU the clock waits for the device.

The cache is computed: 2 (keys and values) x layers that keep a cache x key/value heads x head size x bytes each.
It is what head merging shrinks and what decides how many users fit on one machine.

Source: the measures of MLPerf Inference (Reddi et al. 2020, arXiv 1911.02549) for a single stream; the formula of
GQA (Ainslie et al. 2023, arXiv 2305.13245). Official code: none needed.
Cost: (repeats + 1) x (one prefill + new_tokens steps).
Relations: `measure.PeakMemory` for memory, `measure.machine` for where a number was taken. A speed without its
machine says nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from residency.errors import DataError
from residency.generate import only
from residency.measure import now
from residency.modes import evaluating


@dataclass(frozen=True)
class Speed:
    """Measured at batch 1, greedy, with a cache.

    Args:
        tokens_per_second: Decoding speed after the first token.
        time_to_first_token_ms: Prefill and the first token, in milliseconds.
    """

    tokens_per_second: float
    time_to_first_token_ms: float


def measure_speed(
    model: Any, prompt_ids: Sequence[int], new_tokens: int = 32, repeats: int = 3, **options: Any
) -> Speed:
    """Measure how fast a model answers one prompt.

    Args:
        model: A causal language model on its device.
        prompt_ids: Token ids of a prompt of typical length, at least one.
        new_tokens: Tokens to write, at least 2.
        repeats: Timed runs; medians are returned.
        options: How the model is decoded (`custom_generate` and its arguments), for `generate`; by default one token
            at a time.

    Raises:
        DataError: The prompt is empty.
        ValueError: new_tokens below 2 or repeats below 1.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(f"new_tokens is {new_tokens} and repeats {repeats}; they must be at least 2 and 1")
    if not len(prompt_ids):
        raise DataError("the prompt has no tokens", hint="begin it with the BOS token")
    device = next(model.parameters()).device
    prompt = torch.tensor([list(prompt_ids)], device=device)
    with evaluating(model), torch.no_grad():
        answer = partial(_generated, options=options) if options else _answer
        answer(model, prompt, 2)
        runs = [answer(model, prompt, new_tokens) for _ in range(repeats)]
    first, rest = zip(*runs, strict=True)
    return Speed((new_tokens - 1) / statistics.median(rest), 1000 * statistics.median(first))


def _answer(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    cache = DynamicCache(config=model.config)
    begin = now(prompt.device)
    token = model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    first = now(prompt.device)
    for _ in range(new_tokens - 1):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return first - begin, now(prompt.device) - first


class _FirstToken:
    """A streamer that notes when the first new token came."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.at = device, 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.at = now(self.device)

    def end(self) -> None:
        pass


def _generated(model: Any, prompt: torch.Tensor, new_tokens: int, options: Mapping[str, Any]) -> tuple[float, float]:
    """The same through `generate`, which knows other decoders; end tokens do not end it."""
    watch, begin = _FirstToken(prompt.device), now(prompt.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=None, eos_token_id=None, pad_token_id=0
    )
    with only(model, config):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=watch, **options)
    return watch.at - begin, now(prompt.device) - watch.at


def kv_bytes_per_token(config: Any, dtype: torch.dtype | None = None) -> int:
    """Bytes of keys and values one token keeps in the cache.

    Args:
        config: A transformers config, or the dictionary of a config.json.
        dtype: Type of the cache; None means the config's own, or fp32 if it names none.

    Returns:
        Bytes. Layers of linear attention keep a state of fixed size and count 0.
    """

    def get(*names: str) -> Any:
        for name in names:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            if value is not None:
                return value
        return None

    layers, heads = get("num_hidden_layers", "n_layer"), get("num_attention_heads", "n_head")
    width = get("head_dim") or get("hidden_size", "n_embd") // heads
    kinds = get("layer_types") or ["full_attention"] * layers
    cached = sum("attention" in kind and "linear" not in kind for kind in kinds)
    stored = get("dtype", "torch_dtype")
    kind = dtype or (getattr(torch, stored.removeprefix("torch.")) if isinstance(stored, str) else stored)
    return 2 * cached * (get("num_key_value_heads") or heads) * width * (kind or torch.float32).itemsize


def folder_bytes(path: Path | str) -> int:
    """Bytes of the weights (*.safetensors) in a folder.

    Raises:
        DataError: The folder holds none.
    """
    files = [file for file in Path(path).glob("*.safetensors") if file.is_file()]
    if not files:
        raise DataError("there are no *.safetensors here", where=str(path), hint="save the model first")
    return sum(file.stat().st_size for file in files)

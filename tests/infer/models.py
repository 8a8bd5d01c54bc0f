"""Small random decoders whose greedy text does not fall into a loop at once, and texts for them."""

from __future__ import annotations

import torch

from residency.testing.tinyllama import tiny_llama


def tiny(vocabulary: int = 61, layers: int = 3, seed: int = 0, **config):
    """`tiny_llama`, and torch's random state set, so that drafters made next are the same too."""
    model = tiny_llama(seed, vocab_size=vocabulary, num_hidden_layers=layers, **{"pad_token_id": 0} | config)
    torch.manual_seed(seed)
    return model


def text(length: int, rows: int = 1, seed: int = 0):
    """Random token ids [B, T]."""
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))

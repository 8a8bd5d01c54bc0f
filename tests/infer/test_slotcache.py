"""The cache of trees: against transformers' own cache, with moves, growth and rows of different lengths."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from transformers import DynamicCache, StaticCache

from residency.infer.slotcache import SlotCache, tree_mask
from residency.infer.tree import ancestors


def read(model, cache, tokens, positions, mask=None):
    with torch.no_grad():
        return model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_node_of_a_tree_gets_the_logits_of_its_own_line(attention):
    model = tiny(attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 61, (1, 9), generator=generator)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3, 2]])
    tokens = torch.randint(1, 61, (1, 7), generator=generator)
    depth = torch.tensor([[0, 1, 1, 2, 2, 3, 2]])
    cache = SlotCache(3, 1, 4)  # too small on purpose: it grows
    read(model, cache, prompt, torch.arange(9)[None])
    cache.advance(9)
    seen = torch.ones(1, 9, dtype=torch.bool)
    mask = tree_mask(seen, cache.lengths, ancestors(parents), torch.float32)
    logits = read(model, cache, tokens, 9 + depth, mask)
    for node in range(7):
        line, at = [], node
        while at >= 0:
            line.insert(0, int(tokens[0, at]))
            at = int(parents[0, at])
        plain = model(torch.cat((prompt, torch.tensor([line])), 1)).logits[0, -1]
        torch.testing.assert_close(logits[0, node], plain, atol=1e-5, rtol=1e-5)
    # accept 0 → 1 → 3 → 5: the rest of the text sees exactly these
    cache.accept([[0, 1, 3, 5]])
    assert cache.lengths == [13]
    more = torch.tensor([[7]])
    text = torch.cat((prompt, tokens[:, [0, 1, 3, 5]], more), 1)
    torch.testing.assert_close(
        read(model, cache, more, torch.tensor([[13]]))[0, -1], model(text).logits[0, -1], atol=1e-5, rtol=1e-5
    )


def test_rows_of_different_lengths():
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, 61, (2, 5), generator=generator)
    tokens = torch.randint(1, 61, (2, 4), generator=generator)
    cache = SlotCache(3, 2, 64)
    read(model, cache, prompt, torch.arange(5).expand(2, -1))
    cache.advance(5)
    seen = torch.ones(2, 5, dtype=torch.bool)
    chain = torch.tensor([[-1, 0, 1, 2]]).expand(2, -1)
    mask = tree_mask(seen, cache.lengths, ancestors(chain), torch.float32)
    read(model, cache, tokens, 5 + torch.arange(4).expand(2, -1), mask)
    cache.accept([[0], [0, 1, 2]])
    assert cache.lengths == [6, 8]
    seen = torch.ones(2, 8, dtype=torch.bool)
    mask = tree_mask(seen, cache.lengths, torch.ones(2, 1, 1, dtype=torch.bool), torch.float32)
    logits = read(model, cache, torch.tensor([[3], [4]]), torch.tensor([[6], [8]]), mask)
    for row, text in enumerate(([*prompt[0], tokens[0, 0], 3], [*prompt[1], *tokens[1, :3], 4])):
        plain = model(torch.tensor([[int(t) for t in text]])).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], plain, atol=1e-5, rtol=1e-5)


def test_other_caches_are_taken_over_or_refused():
    model = tiny()
    prompt = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(2))
    theirs = DynamicCache(config=model.config)
    read(model, theirs, prompt, torch.arange(6).expand(2, -1))
    mine = SlotCache.of(theirs, 32)
    assert mine.lengths == [6, 6]
    torch.testing.assert_close(mine.layers[1].keys[:, :, :6], theirs.layers[1].keys)
    assert SlotCache.of(mine, 99) is mine
    static = StaticCache(model.config, max_cache_len=16)
    read(model, static, prompt, torch.arange(6).expand(2, -1))
    with pytest.raises(ValueError, match="dynamic cache"):
        SlotCache.of(static, 32)

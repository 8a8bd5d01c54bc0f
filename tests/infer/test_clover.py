"""Drafters: their formulas against plain arithmetic, cached against whole-text passes, saved and loaded again."""

from __future__ import annotations

import json

import pytest
import torch
from models import tiny

from residency.errors import DataError, PlanError
from residency.infer import saveddraft
from residency.infer.clover import AttentionDecoder, Clover, Clover2, CloverParams
from residency.infer.drafted import Drafted
from residency.infer.drafter import final_norm, frequent_tokens
from residency.infer.medusa import Medusa
from residency.infer.tree import DynamicTree, StaticTree


def test_the_gate_is_a_cosine():
    """One head, two dimensions: a key across, along and against the query (fixture of the dossier)."""
    cell = AttentionDecoder(2, 1)
    with torch.no_grad():
        for p in cell.parameters():
            p.zero_()
        cell.value.bias.copy_(torch.tensor([5.0, 5.0]))
        cell.query.bias.copy_(torch.tensor([1.0, 0.0]))
    h, e = torch.tensor([0.3, -0.2]), torch.zeros(2)
    for key, gate in (((0.0, 3.0), 0.0), ((2.0, 0.0), 1.0), ((-7.0, 0.0), -1.0)):
        with torch.no_grad():
            cell.key.bias.copy_(torch.tensor(key))
            torch.testing.assert_close(cell(h, e), h + gate * 5.0)


def test_the_cell_equals_loops_over_heads():
    torch.manual_seed(0)
    cell = AttentionDecoder(12, 3).double()
    with torch.no_grad():
        for p in cell.parameters():
            p.normal_()
    h, e = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    mine = cell(h, e)
    for b in range(2):
        for t in range(5):
            x = h[b, t] / (h[b, t].pow(2).mean() + 1e-6).sqrt() * cell.norm.weight
            q = cell.query.weight @ x + cell.query.bias
            k = cell.key.weight @ e[b, t] + cell.key.bias
            v = cell.value.weight @ e[b, t] + cell.value.bias
            for j in range(3):
                s = slice(4 * j, 4 * j + 4)
                gate = (q[s] @ k[s]) / (q[s].norm() * k[s].norm())
                torch.testing.assert_close(mine[b, t, s], h[b, t, s] + gate * v[s])
    with torch.no_grad():
        cell.key.weight.mul_(7.0)
        cell.key.bias.mul_(7.0)
    torch.testing.assert_close(cell(h, e), mine)  # a cosine does not see scale
    with pytest.raises(ValueError, match="split among 5 heads"):
        AttentionDecoder(12, 5)


def states(model, ids, mask=None):
    kept = []
    hook = final_norm(model).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    model(ids, attention_mask=mask)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("kind", [Clover, Clover2])
def test_an_untrained_head_is_the_target_read_through_its_last_layer(kind):
    """With no noise, values of zero and FC = [I | 0], head 1 gives norm(norm(last layer(h))); the next ones its state."""
    model = tiny()
    drafter = kind(model, CloverParams(heads=3, layers=1)).attach(model)
    with torch.no_grad():
        for name, p in drafter.named_parameters():
            if ".value." in name:
                p.zero_()
            if name.startswith("fc"):
                p.copy_(torch.eye(*p.shape))
    ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    h = states(model, ids)
    out = list(drafter.unroll(h, torch.nn.functional.pad(ids[:, 1:], (0, 3)), None))
    norm = final_norm(model)
    rope = model.model.rotary_emb(h, torch.arange(7)[None])
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    x = model.model.layers[-1](h, attention_mask=mask, position_embeddings=rope)
    expected = norm(norm(x)) if kind is Clover2 else norm(x)
    for o in out:
        torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [Clover, Clover2])
def test_step_by_step_equals_whole_texts(kind, padded):
    """Certain tokens taken in over several steps, then a drafted path: the states of a pass over the whole text."""
    model = tiny()
    torch.manual_seed(1)
    drafter = kind(model, CloverParams(heads=4)).attach(model)
    B, T, pads = 2, 12, (3, 0) if padded else (0, 0)
    ids = torch.randint(1, 61, (B, T + 4), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(B, T, dtype=torch.long)
    for row, n in enumerate(pads):
        mask[row, :n] = 0
    lines = [ids[row, n:] for row, n in enumerate(pads)]
    drafter.start(B, 4)
    whole = [states(model, line[: T - n][None]) for line, n in zip(lines, pads, strict=True)]
    hidden = torch.zeros(B, T, 32)
    for row, n in enumerate(pads):
        hidden[row, n:] = whole[row][0]
    drafter.observe(hidden[:, :7], ids[:, 1:8], [7, 7], pads)
    # rows take in different numbers of tokens; the last column of row 0 is rubbish
    drafter.observe(hidden[:, 7:10], ids[:, 8:11], [2, 3], (0, 0))
    rest = torch.stack((hidden[0, 9:12], torch.cat((hidden[1, 10:12], hidden[1, :1]))))
    following = torch.stack((ids[0, 10:13], torch.cat((ids[1, 11:13], ids[1, :1]))))
    drafter.observe(rest, following, [3, 2], (0, 0))
    logits, state = drafter.first()
    found = [logits]
    for i in range(1, 4):
        logits, state = drafter.next(state, torch.zeros(B, 1, dtype=torch.long), ids[:, T + i : T + i + 1])
        found.append(logits)
    for row, (line, n) in enumerate(zip(lines, pads, strict=True)):
        out = drafter.unroll(whole[row], line[1:][None], None)
        for i, o in enumerate(out):
            torch.testing.assert_close(found[i][row, 0], drafter.logits(o[0, T - n - 1]), atol=2e-5, rtol=1e-4)


def test_padding_on_the_right_changes_nothing():
    model = tiny()
    drafter = Clover2(model, CloverParams(heads=3)).attach(model)
    ids = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(3))
    longer = torch.nn.functional.pad(ids, (0, 4))
    mask = (torch.arange(13) < 9).long()[None]
    following = torch.nn.functional.pad(ids[:, 1:], (0, 3))
    short = list(drafter.unroll(states(model, ids), following, None))
    h = states(model, longer, mask)
    padded = list(drafter.unroll(h, torch.nn.functional.pad(following, (0, 4)), mask))
    for a, b in zip(short, padded, strict=True):
        torch.testing.assert_close(b[:, :9], a, atol=1e-5, rtol=1e-4)


def test_drafted_trees_hold_the_most_probable_guesses():
    """The tree of a Clover-2 against guesses ranked by hand."""
    model = tiny()
    drafter = Clover2(model, CloverParams(heads=3), torch.arange(5, 55)).attach(model)
    ids = torch.tensor([[4, 8, 15, 16]])
    drafter.start(1, 0)
    drafter.observe(states(model, ids), torch.tensor([[8, 15, 16, 23]]), [4], [0])
    tree = drafter.draft(torch.tensor([23]), StaticTree([[0], [1], [0, 0], [1, 0], [1, 1]]), levels=5)
    first, state = drafter.first()
    best = first[0, 0].topk(2).indices + 5
    assert tree.tokens[0, 1:3].tolist() == best.tolist()
    assert tree.parents[0].tolist() == [-1, 0, 0, 1, 2, 2]
    below, _ = drafter.next(state, torch.zeros(1, 2, dtype=torch.long), best[None])
    expected = [below[0, 0].argmax() + 5, *(below[0, 1].topk(2).indices + 5)]
    assert tree.tokens[0, 3:].tolist() == [int(t) for t in expected]
    assert drafter.draft(torch.tensor([23]), StaticTree(), levels=1).depth.max() == 1


def test_a_draft_vocabulary_by_frequency():
    ids = frequent_tokens([[7, 7, 3], [3, 7, 9]], 4, 12, always=[11])
    assert ids.tolist() == [3, 7, 9, 11]
    assert frequent_tokens([[7]], 99, 5 + 7).tolist() == list(range(12))


@pytest.mark.parametrize("method", list(saveddraft.KINDS))
def test_saved_and_loaded_again(tmp_path, method):
    model = tiny()
    sizes = {"heads": 3}
    drafter = saveddraft.make(method, model, sizes, torch.arange(2, 60)).attach(model)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    before = Drafted(drafter, DynamicTree(budget=5))
    ids = torch.tensor([[4, 8, 15]])
    text = model.generate(ids, custom_generate=before, **settings)
    saveddraft.save(tmp_path, drafter, method, sizes, DynamicTree(budget=5))
    after = saveddraft.load(tmp_path, model)
    assert torch.equal(model.generate(ids, custom_generate=after, **settings), text)
    assert after.stats.lengths == before.stats.lengths
    assert after.tree == DynamicTree(budget=5)
    saveddraft.load(tmp_path, tiny().to(torch.bfloat16))  # the same weights in half precision

    other = tiny(seed=1)
    with pytest.raises(DataError, match="another model"):
        saveddraft.load(tmp_path, other)
    config = tmp_path / "draft" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | {"method": "clover-9"}))
    with pytest.raises(DataError, match="no drafter `clover-9`"):
        saveddraft.load(tmp_path, model)
    config.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        saveddraft.load(tmp_path, model)
    config.write_text(json.dumps(whole))
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read"):
        saveddraft.load(tmp_path, model)


def test_static_trees_are_described():
    tree = saveddraft.tree_of(json.loads(json.dumps(saveddraft.describe(StaticTree()))))
    assert tree.paths == StaticTree().paths


def test_models_without_a_final_norm_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=31))
    with pytest.raises(PlanError, match="cannot be drafted for"):
        gpt.generate(torch.tensor([[1, 2]]), custom_generate=Drafted(None), max_new_tokens=2)
    with pytest.raises(PlanError, match="cannot be drafted for"):
        Medusa(tiny()).attach(gpt)

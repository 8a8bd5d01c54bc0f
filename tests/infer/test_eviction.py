"""The baselines against transformers' own attention and brute force; what a cache holds; decoding in bounded memory."""

import copy

import pytest
import torch
from models import text, tiny
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from residency.infer.citrus import Citrus, Individual, Shared, Standard
from residency.infer.evicting import Evicting
from residency.infer.eviction import H2O, TOVA, Full, Policy, SnapKV, Streaming, choose
from residency.infer.evictioncache import EvictingCache, adopt
from residency.infer.prefill import Reader, prefill
from residency.infer.rotation import rotation_of
from residency.infer.watch import Watch, attention_mass, watching

POLICIES = [Streaming(), Streaming(2), H2O(), TOVA(), SnapKV(), Shared(), Standard(), Individual()]


def attentions(model, ids):
    """transformers' own attention probabilities per layer, [H, T, T]."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        return [a[0] for a in eager(ids, output_attentions=True).attentions]


def kept(cache, layer):
    return cache.origins(layer)[0].tolist()


# ------------------------------------------------------------------ who keeps what


def test_mass_is_the_attention_of_transformers():
    model, ids = tiny(), text(30)
    expected = attentions(model, ids)
    seen = {}
    rows = torch.tensor([[4, 17, 29]])
    watch = Watch(see=seen.__setitem__, rows=rows, asked=torch.tensor([[True, True, False]]))
    with torch.no_grad(), watching(model, watch):
        logits = model(ids).logits
    torch.testing.assert_close(logits, model(ids).logits.detach(), rtol=0, atol=1e-5)
    for i, a in enumerate(expected):
        right = a.view(2, 2, 30, 30).mean(1)[:, [4, 17]].sum(1)  # two query heads per key/value head
        torch.testing.assert_close(seen[i][0], right, rtol=0, atol=1e-5)


def test_mass_in_blocks_is_mass_at_once(monkeypatch):
    q, k = torch.randn(2, 6, 11, 4), torch.randn(2, 3, 17, 4)
    mask = torch.rand(2, 1, 11, 17) < 0.7
    mask[..., 0] = True
    whole = attention_mass(q, k, 0.5, mask, None)
    monkeypatch.setattr("residency.infer.watch.BLOCK", 1)
    torch.testing.assert_close(attention_mass(q, k, 0.5, mask, None), whole, rtol=1e-5, atol=1e-6)
    assert float(whole.sum()) == pytest.approx(2 * 11 * 3, rel=1e-4)


def test_streaming_keeps_exactly_the_first_and_the_last():
    model, ids = tiny(), text(100)
    for sinks in (0, 1, 4):
        cache = prefill(model, ids, instruction_tokens=6, policy=Streaming(sinks), budget=20, chunk=8)
        for i in range(3):
            assert kept(cache, i) == [[*range(sinks), *range(94 - 20 + sinks, 94)]]


def test_h2o_keeps_the_recent_half_and_the_heaviest():
    """One chunk, so that the sums are those of full attention."""
    model, ids = tiny(), text(60)
    cache = prefill(model, ids, instruction_tokens=6, policy=H2O(0.5), budget=20, chunk=64)
    for i, a in enumerate(attentions(model, ids)):
        heavy = a.view(2, 2, 60, 60).mean(1).sum(1)[:, :44]  # what all 60 queries pay to the older 44
        expected = [sorted(heavy[g].topk(10).indices.tolist()) + list(range(44, 54)) for g in range(2)]
        assert kept(cache, i) == expected
    assert kept(cache, 0)[0] != kept(cache, 0)[1]


def test_tova_keeps_what_the_last_token_attends_to():
    model, ids = tiny(), text(60)
    cache = prefill(model, ids, instruction_tokens=6, policy=TOVA(), budget=20, chunk=64)
    for i, a in enumerate(attentions(model, ids)):
        assert kept(cache, i) == [sorted(a[:, -1, :54].mean(0).topk(20).indices.tolist())]


def test_snapkv_keeps_what_the_instruction_attends_to_and_its_neighbours():
    model, ids = tiny(), text(80)
    for chunk in (16, 128):  # it evicts once, so chunks change nothing
        cache = prefill(model, ids, instruction_tokens=6, policy=SnapKV(3), budget=20, chunk=chunk)
        for i, a in enumerate(attentions(model, ids)):
            share = a.view(2, 2, 80, 80).mean(1)[:, -6:, :74].mean(1)
            padded = torch.nn.functional.pad(share, (1, 1))
            smooth = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
            assert kept(cache, i) == [sorted(smooth[g].topk(20).indices.tolist()) for g in range(2)]
        assert cache.nbytes() == 3 * 2 * 2 * (20 + 6) * 8 * 4


def test_choose_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        priority = torch.rand(3, 2, 15, generator=generator)
        real = torch.rand(3, 15, generator=generator) < 0.7
        count = torch.stack([torch.randint(0, int(r.sum()) + 1, (), generator=generator) for r in real])
        index, valid = choose(priority, real, count)
        assert index.shape[2] == valid.shape[1] == int(count.max())
        for b in range(3):
            assert int(valid[b].sum()) == int(count[b])
            assert valid[b].tolist() == sorted(valid[b].tolist())
            for g in range(2):
                places = sorted((j for j in range(15) if real[b, j]), key=lambda j: -float(priority[b, g, j]))
                assert index[b, g, valid[b]].tolist() == sorted(places[: int(count[b])])


# ------------------------------------------------------------------ what the cache holds


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_never_more_than_promised_and_in_order(policy):
    model, k, c, m = tiny(), 20, 8, 5
    ids = text(101, 2)
    cache = EvictingCache(rotation_of(model), rows=k + 2 * c + m)
    real = torch.ones(2, c, dtype=torch.bool)
    instruction = (ids[:, -m:], torch.ones(2, m, dtype=torch.bool))
    with torch.no_grad(), Reader(model, policy, k, cache) as reader:
        for chunk in ids[:, :96].split(c, 1):
            reader.step(chunk, real, instruction)
            if not policy.whole:
                assert cache.length <= k + c
                cache.check_budget(k + c, k + 2 * c + m)
            for i in range(3):
                origin = cache.origins(i)
                assert (origin.diff(dim=2) > 0).all()
                assert policy.heads or origin.shape[1] == 1
        reader.finish(instruction)
    assert cache.length == k
    assert {layer.length for layer in cache.layers} == {k}
    assert cache.positions.tolist() == [list(range(k))] * 2
    assert not policy.heads or cache.origins(0).shape[1] == 2
    if not policy.whole:
        assert cache.nbytes() == 3 * 2 * 2 * 2 * (k + 2 * c + m) * 8 * 4


@pytest.mark.parametrize(
    "decoder", [Citrus(32, 16), Citrus(32, 16, "standard"), Evicting(TOVA(), 32, 16), Evicting(H2O(), 32, 16)]
)
def test_memory_does_not_grow_with_the_text(decoder):
    model = tiny()
    sizes = {n: decoder.prefill(model, text(n), instruction_tokens=8) for n in (100, 200, 400)}
    assert len({cache.nbytes() for cache in sizes.values()}) == 1
    for cache in sizes.values():
        cache.check_budget(32, decoder.entries(8))
        assert cache.nbytes() == 2 * 3 * 2 * decoder.entries(8) * 8 * 4
    with pytest.raises(ValueError, match="layer 0 holds 32 entries"):
        sizes[400].check_budget(31, decoder.entries(8))
    with pytest.raises(ValueError, match="bytes; promised"):
        sizes[400].check_budget(32, 40)


def test_the_kept_keys_are_where_they_say():
    """Keys of the first layer depend on token and position alone: recomputed at 0 … k − 1, they are those of the cache."""
    model, ids = tiny(), text(90)
    for policy in (Streaming(), SnapKV(), Shared()):
        cache = prefill(model, ids, instruction_tokens=6, policy=policy, budget=18, chunk=8)
        for g in range(2):
            tokens = ids[:, cache.origins(0)[0, min(g, cache.origins(0).shape[1] - 1)].long()]
            own = DynamicCache()
            with torch.no_grad():
                model(tokens, past_key_values=own, use_cache=True)
            torch.testing.assert_close(cache.layers[0].keys[:, g], own.layers[0].keys[:, g], rtol=0, atol=1e-5)


def test_a_layer_behaves_like_transformers_own():
    torch.manual_seed(0)
    model = tiny()
    mine = EvictingCache(rotation_of(model), rows=4)
    theirs = DynamicCache()
    for _ in range(6):
        states = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
        for i in range(3):
            a, b = mine.update(*states, i), theirs.update(*states, i)
            torch.testing.assert_close(a[0], b[0])
            torch.testing.assert_close(a[1], b[1])
    assert mine.get_seq_length() == theirs.get_seq_length() == 18
    assert mine.get_mask_sizes(4, 0) == theirs.get_mask_sizes(4, 0) == (22, 0)
    for act in (lambda c: c.crop(-5), lambda c: c.reorder_cache(torch.tensor([1, 0])), lambda c: c.batch_repeat_interleave(2),
                lambda c: c.batch_select_indices(torch.tensor([0, 3, 1])), lambda c: c.crop(0)):  # fmt: skip
        act(mine)
        act(theirs)
        for i in range(3):
            torch.testing.assert_close(mine.layers[i].keys, theirs.layers[i].keys)
            torch.testing.assert_close(mine.layers[i].values, theirs.layers[i].values)
        assert mine.real.shape == (len(theirs.layers[0].keys), theirs.get_seq_length())
    states = torch.randn(3, 2, 1, 8), torch.randn(3, 2, 1, 8)
    for i in range(3):
        torch.testing.assert_close(mine.update(*states, i)[0], theirs.update(*states, i)[0])
    assert mine.origins(0)[0, 0].tolist() == list(range(14))
    with pytest.raises(ValueError, match="negative"):
        mine.crop(3)
    mine.reset()
    assert mine.get_seq_length() == 0
    with pytest.raises(ValueError, match="empty"):
        mine.origins(0)


def test_foreign_caches():
    model = tiny()
    rotation = rotation_of(model)
    assert adopt(None, rotation).length == 0
    assert adopt(DynamicCache(), rotation).length == 0

    class Other(DynamicLayer):
        pass

    other = DynamicCache()
    other.layers = [Other() for _ in range(3)]
    for i in range(3):
        other.update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), i)
    with pytest.raises(Exception, match="cannot be evicted"):
        adopt(other, rotation)


# ------------------------------------------------------------------ decoding in bounded memory


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", [Streaming(), H2O(), TOVA()], ids=repr)
def test_bounded_decoding_never_outgrows_its_budget(policy, implementation):
    model, ids = tiny(attn_implementation=implementation), text(70, 2)
    mask = torch.ones_like(ids)
    mask[1, :31] = 0
    decoder = Evicting(policy, 24, 8, bounded=True)
    longest = []
    hook = model.register_forward_hook(
        lambda *_: longest.append(max(layer.length for layer in seen[0].layers)) if seen else None
    )
    seen = []
    original = decoder._behind

    def behind(cache, real):
        seen.append(cache)
        return original(cache, real)

    decoder._behind = behind
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "instruction_tokens": 5}
    out = model.generate(ids, attention_mask=mask, custom_generate=decoder, return_dict_in_generate=True, **options)
    hook.remove()
    assert out.sequences.shape == (2, 130)
    assert max(longest) <= 32
    assert len(longest) == 60
    cache = out.past_key_values
    assert cache.get_seq_length() == 129
    for b in range(2):
        held = cache.origins(0)[b, 0].tolist()
        assert held == sorted(held)
        assert max(held) == (128 if b == 0 else 97)
    if isinstance(policy, Streaming):
        assert cache.origins(2)[0, 0].tolist()[:4] == [0, 1, 2, 3]
    alone = model.generate(ids[1:, 31:], custom_generate=Evicting(policy, 24, 8, bounded=True), **options)
    assert alone[0, -60:].tolist() == out.sequences[1, -60:].tolist()
    assert not model._forward_pre_hooks
    assert model.config._attn_implementation == implementation


def test_bounded_streaming_equals_reading_the_same_tokens():
    """Decoding with eviction leaves the cache in the state that the positions of what it holds demand."""
    model, ids = tiny(), text(50)
    decoder = Evicting(Streaming(2), 20, 4, bounded=True)
    out = model.generate(
        ids, custom_generate=decoder, instruction_tokens=3, max_new_tokens=40, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = out.past_key_values
    tokens = out.sequences[:, cache.origins(0)[0, 0].long()]
    own = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=own, use_cache=True)
    torch.testing.assert_close(cache.layers[0].keys, own.layers[0].keys, rtol=0, atol=1e-4)


def test_unbounded_streaming_grows_by_the_answer():
    model, ids = tiny(), text(50)
    out = model.generate(
        ids, custom_generate=Evicting(Streaming(), 20, 4), instruction_tokens=3, max_new_tokens=40, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.past_key_values.length == 20 + 3 + 39


def test_policies_refuse_budgets_without_a_choice():
    for policy, budget in ((Streaming(4), 4), (SnapKV(4), 8), (Policy(), 0)):
        with pytest.raises(ValueError, match="budget|odd"):
            policy.check(budget)
    Full().check(0)


@pytest.mark.parametrize(
    "decoder", [Evicting(p, 20, 8, bounded=b) for p in (H2O(), TOVA(), Streaming()) for b in (True, False)]
)
def test_a_second_turn_after_decoding(decoder):
    """Scores and states of tokens that were generated are carried into the next turn, whose context may be empty."""
    model, ids = tiny(), text(60)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    one = model.generate(ids, custom_generate=decoder, instruction_tokens=5, **options)
    for more, asked in ((25, 6), (6, 7)):  # the second: the instruction is all that is new
        cache = copy.deepcopy(one.past_key_values)
        whole = torch.cat([one.sequences, text(more, seed=9)], 1)
        two = model.generate(whole, custom_generate=decoder, instruction_tokens=asked, past_key_values=cache, **options)
        assert two.sequences.shape[1] == 90 + more + 30
        assert cache.get_seq_length() == 90 + more + 29
        assert cache.length <= (28 if decoder.bounded else 20 + asked + 29)
        assert {layer.length for layer in cache.layers} == {cache.length}
        assert max(cache.origins(1)[0, 0].tolist()) == 90 + more + 28
    with pytest.raises(ValueError, match="has seen 89"):
        model.generate(one.sequences[:, :80], custom_generate=decoder, past_key_values=one.past_key_values, **options)


def test_a_failure_while_reading_leaves_an_empty_cache_and_the_model_as_it_was():
    model, ids = tiny(), text(60)
    cache = Citrus(20, 8).prefill(model, ids, instruction_tokens=5)
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        Citrus(20, 8).prefill(model, ids, instruction_tokens=5, cache=cache)
    hook.remove()
    assert cache.length == 0
    assert model.config._attn_implementation == "sdpa"
    again = Citrus(20, 8).prefill(model, ids, instruction_tokens=5, cache=cache)
    fresh = Citrus(20, 8).prefill(model, ids, instruction_tokens=5)
    assert torch.equal(again.layers[2].keys, fresh.layers[2].keys)

"""CItruS against plain attention, against its official formulation in plain loops, and inside `generate`."""

import copy

import pytest
import torch
import transformers
from models import text, tiny
from transformers import DynamicCache

from residency.errors import DataError, PlanError
from residency.infer.citrus import Citrus, Shared, Standard, from_json
from residency.infer.evicting import Evicting
from residency.infer.eviction import H2O, TOVA, Full, SnapKV, Streaming
from residency.infer.evictioncache import EvictingCache
from residency.infer.prefill import Reader, prefill, split
from residency.infer.rotation import Rotation, rotation_of, turn

MODES = ("shared", "standard", "individual")


def behind(model, cache, rest, mask=None):
    """Logits of the rest of a prompt behind a cache that is left as it was."""
    given = copy.deepcopy(cache).inputs(rest, mask)
    with torch.no_grad():
        return model(**given, position_ids=(given["attention_mask"].cumsum(1) - 1)[:, -rest.shape[1] :]).logits


def plain(model, ids):
    with torch.no_grad():
        return model(ids).logits


# ------------------------------------------------------------------ the degenerate limit


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", MODES)
def test_a_budget_of_everything_is_full_attention(mode, implementation):
    model, ids = tiny(attn_implementation=implementation), text(61)
    for chunk, instruction in ((16, 7), (64, 7), (5, 20), (16, 61), (16, 99)):
        cache = Citrus(60, chunk, mode).prefill(model, ids, instruction_tokens=instruction)
        rest = ids[:, -instruction:]
        torch.testing.assert_close(
            behind(model, cache, rest), plain(model, ids)[:, -rest.shape[1] :], rtol=0, atol=1e-4
        )
        assert cache.length == 61 - rest.shape[1]
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("policy", [Full(), Streaming(), H2O(), TOVA(), SnapKV()])
def test_every_policy_is_full_attention_when_nothing_must_go(policy):
    model, ids = tiny(), text(40)
    cache = Evicting(policy, 36, 8).prefill(model, ids, instruction_tokens=4)
    torch.testing.assert_close(behind(model, cache, ids[:, -4:]), plain(model, ids)[:, -4:], rtol=0, atol=1e-4)


# ------------------------------------------------------------------ rotation


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
            "original_max_position_embeddings": 64,
        },
    ],
)  # fmt: skip
def test_a_turn_by_the_difference_is_the_rotation_recomputed(rope):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = tiny(rope_parameters=rope)
    embedding, rotation = model.model.rotary_emb, rotation_of(model)
    raw = torch.randn(2, 2, 9, 8)
    old, new = torch.randint(0, 400, (2, 9)), torch.randint(0, 400, (2, 9))
    at_old, at_new = (apply_rotary_pos_emb(raw, raw, *embedding(raw, p))[1] for p in (old, new))
    moved = turn(at_old, rotation.angles(new - old))
    torch.testing.assert_close(moved, at_new, rtol=0, atol=1e-5 * float(at_new.abs().max()))
    assert (embedding.attention_scaling != 1) == (rope["rope_type"] == "yarn")
    again = turn(turn(at_old, rotation.angles(new)), rotation.angles(new), back=True)
    torch.testing.assert_close(again, at_old, rtol=0, atol=1e-5)


def test_partial_rotation_leaves_the_rest_of_the_key_alone():
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPTNeoXForCausalLM(config).eval()
    assert len(rotation_of(model).frequencies) == 2
    ids = text(40)
    cache = Citrus(35, 8).prefill(model, ids, instruction_tokens=5)
    torch.testing.assert_close(behind(model, cache, ids[:, -5:]), plain(model, ids)[:, -5:], rtol=0, atol=1e-4)
    keys = torch.randn(1, 2, 3, 16)
    turned = turn(keys, rotation_of(model).angles(torch.tensor([[3, 5, 7]])))
    assert torch.equal(turned[..., 4:], keys[..., 4:])
    assert not torch.equal(turned[..., :4], keys[..., :4])


def test_half_precision_keys_do_not_drift():
    """Entries that move a hundred times are rounded twice, not a hundred times."""
    model = tiny().to(torch.bfloat16)
    rotation = rotation_of(model)
    raw = torch.randn(1, 2, 4, 8)
    first = turn(raw, rotation.angles(torch.arange(4)[None] + 300)).to(torch.bfloat16)
    at = torch.arange(4)[None] + 300
    often = first
    for _ in range(100):
        often = turn(often, rotation.angles(-torch.ones_like(at)))
    at_once = turn(turn(first, rotation.angles(at), back=True), rotation.angles(at - 100))
    right = turn(raw, rotation.angles(at - 100))
    assert (at_once.float() - right).norm() < 0.01 * right.norm()
    assert (often.float() - right).norm() > 2 * (at_once.float() - right).norm()
    ids = text(300)
    for implementation in ("sdpa", "eager"):
        model.config._attn_implementation = implementation
        cache = Citrus(32, 16).prefill(model, ids, instruction_tokens=6)
        assert cache.layers[0].keys.dtype == torch.bfloat16
        assert torch.isfinite(behind(model, cache, ids[:, -6:]).float()).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "length of the text"),
        (
            lambda: transformers.MistralForCausalLM(
                transformers.MistralConfig(
                    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, sliding_window=16,
                )
            ),
            "sliding window of 16",
        ),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61)), "rotary"),
        (
            lambda: transformers.CohereForCausalLM(
                transformers.CohereConfig(
                    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2,
                )
            ),
            "two halves",
        ),
        (lambda: torch.nn.Linear(2, 2), "transformers model"),
    ],
)  # fmt: skip
def test_models_whose_keys_cannot_move_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        prefill(make(), text(20), instruction_tokens=2, policy=Shared(), budget=4, chunk=4)


# ------------------------------------------------------------------ the official formulation


class Official:
    """CItruS as its paper's code does it, in plain loops over a Llama's own modules: keys stored unrotated, rotated anew
    at every pass by their place in the cache, the instruction in a pass of its own, attention in full."""

    def __init__(self, model):
        self.model, self.layers = model, model.model.layers

    def run(self, cache, ids):
        """Per layer: new (keys, values) [G, T, d], and attention [H, T, P + T] over [cache ; ids]."""
        from transformers.models.llama.modeling_llama import rotate_half

        x = self.model.model.embed_tokens(ids)[0]
        states, attentions = [], []
        for layer, (old_k, old_v) in zip(self.layers, cache, strict=True):
            h = layer.input_layernorm(x)
            attn = layer.self_attn
            q, k, v = (p(h).view(len(x), -1, 8).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            states.append((k, v))
            keys, values = torch.cat([old_k, k], 1), torch.cat([old_v, v], 1)
            total, past = keys.shape[1], old_k.shape[1]
            cos, sin = self.model.model.rotary_emb(x, torch.arange(total)[None])
            keys = keys * cos + rotate_half(keys) * sin
            q = q * cos[:, past:] + rotate_half(q) * sin[:, past:]
            logits = torch.stack([q[i] @ keys[i // 2].T for i in range(4)]) * 8**-0.5
            a = (logits + torch.full((len(x), total), -torch.inf).triu(past + 1)).softmax(-1)
            out = torch.stack([a[i] @ values[i // 2] for i in range(4)], 1).reshape(len(x), -1)
            x = x + attn.o_proj(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            attentions.append(a)
        return states, attentions

    @torch.no_grad()
    def read(self, context, instruction, k, c, mode):
        """The final cache per layer, un-rotated, and which tokens it holds."""
        empty = [(torch.zeros(2, 0, 8), torch.zeros(2, 0, 8)) for _ in self.layers]
        main, kept = list(empty), [torch.zeros(0, dtype=torch.long)] * len(self.layers)
        other, kept_other = list(empty), list(kept)
        chunks = context.split(c, 1)
        start = 0
        for chunk in chunks:
            states, attention = self.run(main, chunk)
            which = torch.arange(start, start + chunk.shape[1])
            start += chunk.shape[1]
            judged = {"standard": attention}
            if mode != "standard" and main[0][0].shape[1]:
                judged["shared"] = self.run(main, instruction)[1]
                judged["individual"] = self.run(other, instruction)[1]
            first = "shared" if mode == "shared" else "standard"
            next_main, next_kept = self.grow(main, kept, judged.get(first), states, which, k)
            if mode == "individual":
                other, kept_other = self.grow(other, kept_other, judged.get("individual"), states, which, k)
            main, kept = next_main, next_kept
        if mode == "individual":
            main, kept = other, kept_other
        attention = self.run(main, instruction)[1]
        nothing = [(s[0][:, :0], s[1][:, :0]) for s in states]
        return self.grow(main, kept, attention, nothing, which[:0], k)

    def grow(self, cache, kept, attention, states, which, k):
        grown, names = [], []
        for i, ((old_k, old_v), (new_k, new_v)) in enumerate(zip(cache, states, strict=True)):
            past = old_k.shape[1]
            stay = torch.arange(past)
            if past > k:
                stay = attention[i][:, :, :past].mean((0, 1)).topk(k).indices.sort().values
            grown.append((torch.cat([old_k[:, stay], new_k], 1), torch.cat([old_v[:, stay], new_v], 1)))
            names.append(torch.cat([kept[i][stay], which]))
        return grown, names


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "c", "m"), [(20, 8, 5), (9, 16, 21), (24, 7, 1)])
def test_equals_the_official_formulation(mode, k, c, m):
    model, ids = tiny(), text(90)
    expected, names = Official(model).read(ids[:, :-m], ids[:, -m:], k, c, mode)
    cache = Citrus(k, c, mode).prefill(model, ids, instruction_tokens=m)
    at = torch.arange(k)[None]
    for i, (keys, values) in enumerate(expected):
        assert cache.origins(i)[0, 0].tolist() == names[i].tolist()
        raw = turn(cache.layers[i].keys, cache.rotation.angles(at), back=True)[0]
        torch.testing.assert_close(raw, keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(cache.layers[i].values[0], values, rtol=0, atol=1e-4)


def test_layers_differ_and_modes_differ():
    model, ids = tiny(), text(120)
    found = {m: Citrus(16, 8, m).prefill(model, ids, instruction_tokens=6) for m in MODES}
    tokens = {m: [c.origins(i)[0, 0].tolist() for i in range(3)] for m, c in found.items()}
    assert len({str(t) for t in tokens.values()}) == 3
    assert tokens["shared"][0] != tokens["shared"][2]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_pass_equals_two(implementation):
    model, ids = tiny(attn_implementation=implementation), text(100)
    kinds = {"instruction_tokens": 9, "policy": Shared(), "budget": 24, "chunk": 8}
    one, two = (prefill(model, ids, fused=fused, **kinds) for fused in (True, False))
    for i in range(3):
        assert torch.equal(one.origins(i), two.origins(i))
        torch.testing.assert_close(one.layers[i].keys, two.layers[i].keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.layers[i].values, two.layers[i].values, rtol=0, atol=1e-5)


def test_standard_is_shared_whose_instruction_is_the_chunk():
    model, ids = tiny(), text(80)
    real = torch.ones(1, 8, dtype=torch.bool)
    caches = []
    for policy in (Standard(), Shared()):
        cache = EvictingCache(rotation_of(model))
        with torch.no_grad(), Reader(model, policy, 16, cache) as reader:
            for chunk in ids.split(8, 1):
                reader.step(chunk, real, (chunk, real))
        caches.append(cache)
    one, two = caches
    assert one.length == 24
    for i in range(3):
        assert torch.equal(one.origins(i), two.origins(i))
        torch.testing.assert_close(one.layers[i].keys, two.layers[i].keys, rtol=0, atol=1e-5)


def test_permuted_heads_and_scaled_scores_choose_the_same():
    model, ids = tiny(), text(90)
    other = copy.deepcopy(model)
    for layer in other.model.layers:  # groups exchanged, and heads within a group
        attn = layer.self_attn
        order = torch.tensor([3, 2, 1, 0])
        for projection, heads in ((attn.q_proj, order), (attn.k_proj, order[2:]), (attn.v_proj, order[2:])):
            rows = projection.weight.data.view(len(heads), 8, -1)
            projection.weight.data = rows[heads].reshape(-1, 32).contiguous()
        attn.o_proj.weight.data = attn.o_proj.weight.data.view(32, 4, 8)[:, order].reshape(32, 32).contiguous()
    torch.testing.assert_close(plain(other, ids), plain(model, ids), rtol=0, atol=1e-4)

    class Scaled(Shared):
        def score(self, mass, asked, before):
            return 1e-3 * super().score(mass, asked, before)

    kinds = {"instruction_tokens": 7, "budget": 20, "chunk": 8}
    caches = [prefill(m, ids, policy=p, **kinds) for m, p in ((model, Shared()), (other, Shared()), (model, Scaled()))]
    for i in range(3):
        assert caches[0].origins(i).tolist() == caches[1].origins(i).tolist() == caches[2].origins(i).tolist()


# ------------------------------------------------------------------ rows of a batch


@pytest.mark.parametrize("decoder", [Citrus(20, 8), Citrus(20, 8, "individual"), Evicting(H2O(), 20, 8), Evicting(TOVA(), 20, 8),
                                     Evicting(SnapKV(), 20, 8), Evicting(Streaming(), 20, 8)])  # fmt: skip
def test_a_padded_row_is_what_it_is_alone(decoder):
    model = tiny()
    lengths = (83, 50, 23, 12, 4)
    rows = [text(n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (width - r.shape[1], 0)) for r in rows])
    together = decoder.prefill(model, ids, mask, instruction_tokens=6)
    logits = behind(model, together, ids[:, -6:], mask[:, -6:])
    answers = model.generate(
        ids, attention_mask=mask, custom_generate=decoder, instruction_tokens=6, max_new_tokens=4, pad_token_id=0
    )
    for b, row in enumerate(rows):
        alone = decoder.prefill(model, row, instruction_tokens=6)
        held = int(together.real[b].sum())
        assert held == alone.length
        for i in range(3):
            if held:
                mine = together.origins(i)[b, :, together.real[b]]
                assert mine.tolist() == alone.origins(i)[0].expand(mine.shape).tolist()
        rest = min(6, row.shape[1])
        torch.testing.assert_close(logits[b, -rest:], behind(model, alone, row[:, -rest:])[0], rtol=0, atol=1e-4)
        single = model.generate(row, custom_generate=decoder, instruction_tokens=6, max_new_tokens=4, pad_token_id=0)
        assert answers[b, -4:].tolist() == single[0, -4:].tolist()


def test_padding_in_the_middle_is_no_token():
    model, row = tiny(), text(60)
    ids, mask = torch.zeros(1, 75, dtype=torch.long), torch.zeros(1, 75, dtype=torch.long)
    at = torch.cat([torch.arange(3, 30), torch.arange(40, 66), torch.arange(68, 75)])
    ids[:, at], mask[:, at] = row, 1
    one = Citrus(16, 8).prefill(model, ids, mask, instruction_tokens=5)
    two = Citrus(16, 8).prefill(model, row, instruction_tokens=5)
    for i in range(3):
        torch.testing.assert_close(one.layers[i].keys, two.layers[i].keys, rtol=0, atol=1e-5)


def test_split_takes_the_last_real_tokens():
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 9, 1, 9, 2]])
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 1]]).bool()
    (context, at), (instruction, asked) = split(ids, real, 2)
    assert context[at].tolist() == [1, 2, 3]
    assert instruction[0].tolist() == [4, 5]
    assert instruction[1][asked[1]].tolist() == [1, 2]
    (context, _), (_, asked) = split(ids, real, 4)
    assert context.shape == (2, 1)
    assert asked.tolist() == [[True] * 4, [False, False, True, True]]


# ------------------------------------------------------------------ inside generate


def test_generate_with_a_prefilled_cache_and_with_the_decoder_are_one():
    model, ids = tiny(), text(150)
    decoder = Citrus(24, 16)
    cache = decoder.prefill(model, ids, instruction_tokens=8)
    one = model.generate(**cache.inputs(ids[:, -8:]), max_new_tokens=10, do_sample=False, pad_token_id=0)
    two = model.generate(
        ids, custom_generate=decoder, instruction_tokens=8, max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert two.shape == (1, 160)
    assert torch.equal(two[:, :150], ids)
    assert one[0, 8:].tolist() == two[0, 150:].tolist()
    assert cache.length == 24 + 8 + 9
    full = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert full.tolist() != two.tolist()
    wide = model.generate(
        ids, custom_generate=Citrus(142, 16), instruction_tokens=8, max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert wide.tolist() == full.tolist()
    fits = model.generate(ids, custom_generate=Citrus(150, 16), max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert fits.tolist() == full.tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True},
                                     {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
                                     {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 3}])  # fmt: skip
def test_everything_generate_can_do_works_behind_the_cache(options, implementation):
    """At a budget of everything the answers are those of plain `generate`, with two padded rows."""
    model = tiny(attn_implementation=implementation)
    ids = text(40, 2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 7} | options
    answers = []
    for extra in ({}, {"custom_generate": Citrus(38, 8), "instruction_tokens": 3}):
        torch.manual_seed(0)
        answers.append(model.generate(ids, **common, **extra).tolist())
    assert answers[0] == answers[1]


def test_streamer_stopping_and_dictionaries():
    model, ids = tiny(), text(100)

    class Streamer(transformers.generation.streamers.BaseStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 105)

    streamer = Streamer()
    out = model.generate(
        ids, custom_generate=Citrus(20, 16), instruction_tokens=5, max_new_tokens=20, do_sample=False, pad_token_id=0,
        streamer=streamer, stopping_criteria=[Stop()], return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert out.sequences.shape == (1, 105)
    assert streamer.seen == out.sequences[0].tolist()
    assert streamer.ended
    assert len(out.scores) == 5
    assert isinstance(out.past_key_values, EvictingCache)
    eos = int(out.sequences[0, 102])
    ended = model.generate(
        ids,
        custom_generate=Citrus(20, 16),
        instruction_tokens=5,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=eos,
    )
    assert ended[0, -1] == eos
    assert ended.shape[1] <= 103


def test_a_conversation_goes_on_behind_what_was_kept():
    model, ids = tiny(), text(90)
    turn_two = text(30, seed=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    # everything fits: the second answer is that of plain attention over the whole conversation
    wide = Citrus(300, 16)
    plain_one = model.generate(ids, **options)
    whole = torch.cat([plain_one.sequences, turn_two], 1)
    expected = model.generate(whole, **options).sequences
    one = model.generate(ids, custom_generate=wide, instruction_tokens=5, **options)
    two = model.generate(
        whole, custom_generate=wide, instruction_tokens=5, past_key_values=one.past_key_values, **options
    )
    assert two.sequences.tolist() == expected.tolist()
    # little fits: the cache of the second turn is bounded too, and holds tokens of both turns
    tight = Citrus(24, 16)
    one = model.generate(ids, custom_generate=tight, instruction_tokens=5, **options)
    cache, whole = one.past_key_values, torch.cat([one.sequences, turn_two], 1)
    assert cache.get_seq_length() == 95
    two = model.generate(whole, custom_generate=tight, instruction_tokens=5, past_key_values=cache, **options)
    assert two.sequences.shape == (1, 132)
    assert two.past_key_values.length == 24 + 5 + 5
    held = two.past_key_values.origins(0)[0, 0].tolist()
    assert min(held) < 90
    assert held[-10:] == list(range(121, 131))
    # the same by hand, with new ids alone
    by_hand = tight.prefill(model, ids, instruction_tokens=5)
    answer = model.generate(**by_hand.inputs(ids[:, -5:]), **options).sequences[:, 5:]
    by_hand = tight.prefill(model, torch.cat([answer[:, -1:], turn_two], 1), instruction_tokens=5, cache=by_hand)
    again = model.generate(**by_hand.inputs(turn_two[:, -5:]), **options).sequences
    assert again[0, 5:].tolist() == two.sequences[0, -6:].tolist()


def test_a_plain_cache_is_taken_over():
    model, ids = tiny(), text(70)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache, use_cache=True)
    mine = Citrus(16, 8).prefill(model, ids[:, 40:], instruction_tokens=4, cache=cache)
    assert mine.length == 16
    assert min(mine.origins(0)[0, 0].tolist()) < 40
    wide = Citrus(66, 8).prefill(model, ids[:, 40:], instruction_tokens=4, cache=_again(model, ids))
    torch.testing.assert_close(behind(model, wide, ids[:, -4:]), plain(model, ids)[:, -4:], rtol=0, atol=1e-4)


def _again(model, ids):
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache, use_cache=True)
    return cache


def test_sizes_that_make_no_sense_are_refused():
    model, ids = tiny(), text(20)
    for make in (lambda: Citrus(0), lambda: Citrus(8, 0), lambda: Citrus(8, 8, "best"), lambda: Citrus(8, 8, window=0),
                 lambda: Evicting(Shared(), 8, bounded=True), lambda: Evicting(Streaming(8), 8)):  # fmt: skip
        with pytest.raises(ValueError, match="at least 1|mode|instruction|first tokens"):
            make()
    decoder = Citrus(8, 4)
    bad = torch.ones_like(ids)
    bad[0, -1] = 0
    with pytest.raises(ValueError, match="right"):
        model.generate(ids, attention_mask=bad, custom_generate=decoder, pad_token_id=0)
    with pytest.raises(ValueError, match="at least 1"):
        model.generate(ids, custom_generate=decoder, instruction_tokens=0)
    with pytest.raises(ValueError, match="every row has a token"):
        decoder.prefill(model, ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(ids, custom_generate=decoder, use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_settings_become_a_decoder():
    decoder = from_json({"method": "citrus", "budget": 32, "chunk": 8, "mode": "individual", "window": 9})
    assert isinstance(decoder, Citrus)
    assert (decoder.budget, decoder.chunk, decoder.mode, decoder.window) == (32, 8, "individual", 9)
    streaming = from_json({"method": "streaming", "budget": 32, "sinks": 2, "bounded": True})
    assert streaming.policy == Streaming(2)
    assert streaming.bounded
    assert isinstance(from_json({"method": "snapkv"}).policy, SnapKV)
    for wrong in ({"method": "best"}, {}, {"method": "citrus", "sinks": 4}, {"method": "tova", "mode": "shared"},
                  {"method": "citrus", "budget": 0}, {"method": "h2o", "sinks": 4}):  # fmt: skip
        with pytest.raises(DataError, match="cache.json"):
            from_json(wrong)
    model, ids = tiny(), text(60)
    said = model.generate(ids, custom_generate=decoder, max_new_tokens=4, do_sample=False, pad_token_id=0)
    told = model.generate(
        ids, custom_generate=decoder, max_new_tokens=4, do_sample=False, pad_token_id=0, instruction_tokens=9
    )
    assert said.tolist() == told.tolist()


def test_rotation_is_measured_once_and_named_layers_may_have_none():
    model = tiny()
    assert rotation_of(model) is rotation_of(model)
    assert rotation_of(model).turned == (True, True, True)
    still = Rotation(torch.ones(4), (False,))
    keys = torch.randn(1, 2, 5, 8)
    cache = EvictingCache(still, rows=8)
    cache.layers[0].update(keys, keys)
    cache.keep([torch.tensor([[[0, 3]]])], torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(cache.layers[0].keys, keys[:, :, [0, 3]])

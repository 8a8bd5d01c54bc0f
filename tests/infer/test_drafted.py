"""The decoding loop against transformers' own generate, with drafters that are untrained, perfect and always wrong."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from residency import bases
from residency.errors import PlanError
from residency.infer.clover import Clover, Clover2, CloverParams
from residency.infer.drafted import Drafted
from residency.infer.lookup import PromptLookup, WithLookup
from residency.infer.medusa import Medusa
from residency.infer.tree import DynamicTree, StaticTree, Tree
from residency.packed import available, packed

PROMPT = torch.tensor([[5, 9, 33, 12, 7, 41]])
DRAFTERS = {
    "none": lambda m: None,
    "lookup": lambda m: PromptLookup(),
    "medusa": Medusa,
    "medusa and lookup": lambda m: WithLookup(Medusa(m)),
    "clover": Clover,
    "clover-2": lambda m: Clover2(m, token_ids=torch.arange(3, 60, 2)),
}
TREES = {"dynamic": DynamicTree(budget=6), "static": StaticTree(), "chain": StaticTree.chain(3)}


class Oracle:
    """Knows the answer: proposes the next tokens of given texts as chains (or, on purpose, others)."""

    wants_hidden = False

    def __init__(self, texts, wrong=False, length=4):
        self.texts, self.wrong, self.length = texts, wrong, length

    def attach(self, target):
        return self

    def start(self, batch, capacity):
        self.at = [None] * batch

    def observe(self, hidden, following, counts, pads):
        for row, n in enumerate(counts):
            self.at[row] = n + 1 if self.at[row] is None else self.at[row] + n

    def draft(self, roots, policy, levels, sample=None):
        n = min(levels, self.length)
        tokens = torch.zeros(len(roots), n + 1, dtype=torch.long)
        tokens[:, 0] = roots
        for row, text in enumerate(self.texts):
            guess = text[self.at[row] : self.at[row] + n]
            tokens[row, 1 : 1 + len(guess)] = torch.tensor(guess)
        if self.wrong:
            tokens[:, 1:] = (tokens[:, 1:] + 1) % 61
        chain = torch.arange(-1, n).expand(len(roots), -1)
        return Tree(tokens, chain, chain + 1, torch.ones_like(tokens, dtype=torch.bool))


@pytest.fixture(scope="module")
def model():
    return tiny()


def plain(model, ids=PROMPT, **settings):
    return model.generate(ids, **{"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0} | settings)


def test_the_texts_here_are_not_trivial(model):
    assert len(set(plain(model)[0, 6:].tolist())) > 10


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_is_plain_greedy(model, drafter, tree):
    made = DRAFTERS[drafter](model)
    decode = Drafted(made, TREES[tree])
    assert torch.equal(plain(model, custom_generate=decode), plain(model))
    assert decode.stats.tokens == 39  # the first comes from the prompt's pass
    assert decode.stats.rows == decode.stats.steps <= 39


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_batches_with_padding_and_rows_that_end_early(model, drafter):
    ids = torch.randint(1, 61, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 8, 1)):
        mask[row, :pads] = 0
        ids[row, :pads] = 0
    settings = {"attention_mask": mask, "eos_token_id": [17, 30, 52]}
    theirs = plain(model, ids, **settings)
    assert (theirs[:, -1] == 0).any(), "no row ends early: the test shows nothing"
    made = DRAFTERS[drafter](model)
    for tree in TREES.values():
        assert torch.equal(plain(model, ids, custom_generate=Drafted(made, tree), **settings), theirs)


def test_a_perfect_drafter_and_one_that_is_always_wrong(model):
    text = plain(model)[0].tolist()
    right, wrong = Drafted(Oracle([text])), Drafted(Oracle([text], wrong=True))
    assert plain(model, custom_generate=right)[0].tolist() == text
    assert right.stats.steps == 8  # 39 tokens, five a step
    assert right.stats.lengths == {4: 7, 3: 1}
    assert right.stats.tokens_per_step == pytest.approx(39 / 8)
    assert plain(model, custom_generate=wrong)[0].tolist() == text
    assert wrong.stats.steps == 39
    assert wrong.stats.tokens_per_step == 1
    assert right.stats.accepted == {1: 8, 2: 8, 3: 8, 4: 7}


def test_length_end_of_text_and_other_criteria_stop_inside_a_step(model):
    text = plain(model)[0].tolist()
    for new in (1, 2, 3, 7):
        assert plain(model, custom_generate=Drafted(Oracle([text])), max_new_tokens=new)[0].tolist() == text[: 6 + new]
    ended = plain(model, eos_token_id=text[15])
    assert torch.equal(plain(model, custom_generate=Drafted(Oracle([text])), eos_token_id=text[15]), ended)

    class Sum(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.sum(-1) > 500

    stops = StoppingCriteriaList([Sum()])
    theirs = plain(model, stopping_criteria=stops)
    assert theirs.shape[1] < 46
    assert torch.equal(plain(model, custom_generate=Drafted(Oracle([text])), stopping_criteria=stops), theirs)
    assert StopStringCriteria  # strings are criteria like any other


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 9}])
def test_processors_see_the_text_that_leads_to_each_node(model, settings):
    settings = settings | {"eos_token_id": plain(model)[0, 9].item()}
    theirs = plain(model, **settings)
    for tree in TREES.values():
        assert torch.equal(plain(model, custom_generate=Drafted(Clover2(model), tree), **settings), theirs)


def test_a_processor_of_the_user_and_a_streamer(model):
    class Odd(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, input_ids.shape[1] % 2 :: 2] = -torch.inf
            return scores

    class Keep:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended = True

    odd, keep = LogitsProcessorList([Odd()]), Keep()
    theirs = plain(model, logits_processor=odd)
    assert torch.equal(
        plain(model, custom_generate=Drafted(Clover(model)), logits_processor=odd, streamer=keep), theirs
    )
    assert keep.got == theirs[0].tolist()
    assert keep.ended


def test_a_second_turn_goes_on_from_the_cache(model):
    first = plain(model, custom_generate=Drafted(Clover2(model)), return_dict_in_generate=True, max_new_tokens=9)
    longer = torch.cat((first.sequences, torch.tensor([[3, 4, 8]])), 1)
    theirs = plain(model, longer)
    cache = DynamicCache(config=model.config)
    model(first.sequences[:, :-1], past_key_values=cache, use_cache=True)
    for drafter in (None, Clover2(model), PromptLookup()):
        mine = plain(model, longer, custom_generate=Drafted(drafter), past_key_values=first.past_key_values)
        assert torch.equal(mine, theirs)
        mine = plain(model, longer, custom_generate=Drafted(drafter), past_key_values=_copy(cache))
        assert torch.equal(mine, theirs)
        first = plain(model, custom_generate=Drafted(drafter), return_dict_in_generate=True, max_new_tokens=9)


def _copy(cache):
    import copy

    return copy.deepcopy(cache)


@pytest.mark.parametrize(
    ("rule", "tree"), [("matching", TREES["dynamic"]), ("rejection", StaticTree([[0], [1], [0, 0]]))]
)
@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}])
def test_sampling_keeps_the_distribution(rule, tree, settings):
    """The joint distribution of two sampled tokens over a vocabulary of six, by χ²; processors included."""
    model = tiny(6, layers=1, seed=5, initializer_range=0.5)
    ids = torch.tensor([[1, 4, 2]])
    common = {"do_sample": True, "top_k": 0, "eos_token_id": None} | settings

    def step(text):
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        scores = TemperatureLogitsWarper(settings["temperature"])(text, model(text).logits[:, -1])
        return (TopPLogitsWarper(settings["top_p"])(text, scores) if "top_p" in settings else scores).softmax(-1)

    first = step(ids)[0]
    joint = torch.stack([first[t] * step(torch.cat((ids, torch.tensor([[t]])), 1))[0] for t in range(6)]).flatten()
    torch.manual_seed(0)
    decode = Drafted(Clover2(model), tree, sampling=rule, temperature=1.2)
    rows = model.generate(
        ids.expand(3000, -1), max_new_tokens=3, min_new_tokens=3, custom_generate=decode, pad_token_id=0, **common
    )
    counts = torch.bincount(6 * rows[:, 3] + rows[:, 4], minlength=36).double()
    assert counts[joint == 0].sum() == 0
    expected = joint.double() * 3000
    rare = expected < 5
    seen = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    keep = wanted > 0
    assert chisquare(seen[keep], wanted[keep] * seen[keep].sum() / wanted[keep].sum()).pvalue > 1e-3
    assert decode.stats.tokens_per_step > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = tiny().to(dtype)
    out = plain(model, custom_generate=Drafted(Clover2(model).to(dtype)))
    assert out.shape == (1, 46)


def test_what_cannot_be_drafted_for_is_refused(model):
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with pytest.raises(PlanError, match="sliding"):
        plain(sliding, custom_generate=Drafted(None))
    with pytest.raises(PlanError, match="beams"):
        plain(model, custom_generate=Drafted(None), num_beams=2)
    with pytest.raises(ValueError, match="padding must stand before"):
        mask = torch.tensor([[1, 1, 1, 1, 0, 1]])
        plain(model, custom_generate=Drafted(None), attention_mask=mask)
    with pytest.raises(ValueError, match="needs a StaticTree"):
        Drafted(Clover(model), DynamicTree(), sampling="rejection")
    with pytest.raises(PlanError, match="32 wide, and the model 64"):
        plain(tiny(hidden_size=64), custom_generate=Drafted(Clover2(model, CloverParams(heads=2))))
    with pytest.raises(PlanError, match="guesses token 60"):
        plain(tiny(40), PROMPT % 40, custom_generate=Drafted(Clover2(model, token_ids=torch.tensor([1, 60]))))


@pytest.mark.embedded
def test_a_real_model_in_float32():
    base = bases.resolve("smollm2-135m-instruct")
    model, tokenizer = bases.load_causal_lm(base.folder), bases.load_tokenizer(base.folder)
    ids = tokenizer("The building permit is needed when", return_tensors="pt")["input_ids"]
    theirs = plain(model, ids, max_new_tokens=16)
    for drafter in (Clover2(model), PromptLookup()):
        with packed(model):
            mine = plain(model, ids, max_new_tokens=16, custom_generate=Drafted(drafter, StaticTree()))
        assert torch.equal(mine, theirs)


def test_the_cache_left_behind_holds_the_text_and_nothing_more(model):
    text = plain(model)[0].tolist()
    end = text[15]
    for new, ends in ((40, None), (7, None), (40, end)):
        settings = {"max_new_tokens": new, "eos_token_id": ends}
        out = plain(model, custom_generate=Drafted(Oracle([text])), return_dict_in_generate=True, **settings)
        theirs = plain(model, return_dict_in_generate=True, **settings)
        assert out.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
        torch.testing.assert_close(out.past_key_values.layers[1].keys, theirs.past_key_values.layers[1].keys)
        longer = torch.cat((out.sequences, torch.tensor([[3, 4]])), 1)
        more = plain(model, longer)
        assert torch.equal(plain(model, longer, past_key_values=out.past_key_values), more)  # transformers' own loop
    mine = DynamicCache(config=model.config)
    plain(model, custom_generate=Drafted(Oracle([text])), past_key_values=mine)
    assert mine.get_seq_length() == 45
    both = torch.cat((PROMPT, PROMPT.flip(1)))
    out = plain(model, both, custom_generate=Drafted(Oracle([text, []])), return_dict_in_generate=True)
    lengths = {layer.get_seq_length() for layer in out.past_key_values.layers} if out.past_key_values else {45}
    assert lengths == {45}


def test_what_there_is_to_pack(model):
    drafter = Clover2(model, token_ids=torch.arange(9)).attach(model)
    for around in (drafter, WithLookup(drafter)):
        assert Drafted(around).parts() == [drafter, drafter.head]
    assert Drafted(PromptLookup()).parts() == Drafted(None).parts() == []
    with packed(*Drafted(WithLookup(drafter)).parts()):
        layers = [m for m in (*drafter.modules(), drafter.head) if isinstance(m, torch.nn.Linear)]
        assert len(layers) > 10
        assert all(("forward" in m.__dict__) == available() for m in layers)


def test_a_row_that_ended_is_no_longer_streamed(model):
    """Row 0 ends early and row 1 goes on: what was put is row 0, without its padding."""

    class Keep:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.got.append("end")

    both = torch.cat((PROMPT, PROMPT.flip(1)))
    end = plain(model)[0, 15].item()
    theirs, keep = plain(model, both, eos_token_id=end), Keep()
    row = theirs[0].tolist()
    cut = row.index(end, 6) + 1
    assert theirs.shape[1] > cut, "the other row ends first: the test shows nothing"
    decode = Drafted(Oracle([plain(model, ids[None])[0].tolist() for ids in both]))
    assert torch.equal(plain(model, both, custom_generate=decode, streamer=keep, eos_token_id=end), theirs)
    assert keep.got == [*both.flatten().tolist(), *row[6:cut], "end"]


def test_the_text_after_a_row_has_one_token_left(model):
    """Rejection at a step without guesses: nothing was drawn, so the token is the target's own."""
    decode = Drafted(Clover2(model), StaticTree.chain(2), sampling="rejection")
    out = plain(model, custom_generate=decode, do_sample=True, max_new_tokens=2)
    assert out.shape == (1, 8)
    assert decode.stats.nodes == 1


@pytest.mark.parametrize("make", [Clover2, Clover, Medusa])
def test_a_decoder_with_fused_projections(make):
    """Phi-3 has llama's final norm and one matrix for queries, keys and values."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=None, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    phi = Phi3ForCausalLM(config).eval().requires_grad_(False)
    decode = Drafted(make(phi), TREES["dynamic"])
    assert torch.equal(plain(phi, custom_generate=decode), plain(phi))
    assert decode.stats.nodes > decode.stats.steps


def test_results_are_ordinary_tensors(model):
    ids = plain(model, custom_generate=Drafted(Clover2(model)))
    ids[0, 0] = 3
    trained = tiny().requires_grad_(True)
    trained(ids, labels=ids).loss.backward()
    with torch.inference_mode():
        drafter = Clover2(model, token_ids=torch.arange(50)).attach(model)
    assert not drafter.head.weight.is_inference()


def test_a_criterion_is_known_by_its_class(model):
    class Mine(StoppingCriteria):
        max_length = 5

        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 10])

    stops = StoppingCriteriaList([Mine()])
    assert plain(model, custom_generate=Drafted(PromptLookup()), stopping_criteria=stops).shape[1] == 10


def test_more_that_is_refused(model):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(PlanError, match="`dynamic`, whose frequencies change"):
        plain(tiny(rope_parameters=rope), custom_generate=Drafted(None))
    with pytest.raises(PlanError, match="without output_scores"):
        plain(model, custom_generate=Drafted(None), output_scores=True, return_dict_in_generate=True)
    with pytest.raises(PlanError, match="see all rows at once"):
        both = PROMPT.repeat(2, 1)
        plain(model, both, custom_generate=Drafted(None), prefix_allowed_tokens_fn=lambda row, ids: [row + 3])
    with pytest.raises(PlanError, match=r"drafter.to\(model.dtype\)"):
        plain(tiny().to(torch.bfloat16), custom_generate=Drafted(Clover2(model)))
    for paths in ([[1]], [[0], [2]]):
        with pytest.raises(ValueError, match="without gaps"):
            Drafted(Clover2(model), StaticTree(paths), sampling="rejection")
    with pytest.raises(ValueError, match="temperature is positive"):
        Drafted(Clover2(model), StaticTree(), sampling="rejection", temperature=0.0)


def test_a_tree_wider_than_the_draft_vocabulary(model):
    few = torch.tensor([3, 5])
    assert torch.equal(plain(model, custom_generate=Drafted(Medusa(model, token_ids=few), StaticTree())), plain(model))


def test_heads_follow_weights_written_in_place():
    model = tiny()
    drafter = Medusa(model, token_ids=torch.arange(9)).attach(model)
    before = drafter.head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.equal(drafter.attach(model).head.weight, -before)

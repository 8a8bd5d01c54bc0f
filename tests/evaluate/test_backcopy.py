"""The task against counting, brute force and its own long run; the tiny transformer against torch's attention."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from residency.evaluate.ablate import replace_sink_value, zero_attention, zero_mlp
from residency.evaluate.backcopy import BigramBackcopy, TinyConfig, TinyTransformer, measures
from residency.evaluate.textstarts import decoder_layers

TEXT = (Path(__file__).parents[2] / "LICENSE").read_text().lower()


@pytest.fixture(scope="module")
def task():
    return BigramBackcopy(TEXT)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_counts_are_those_of_the_text(task):
    counts = Counter(TEXT)
    assert task.vocabulary == len(counts) + 1
    assert [task.characters[i] for i in task.triggers] == sorted(c for c, _ in counts.most_common(3))
    a, b = task.characters.index("t"), task.characters.index("h")
    starts = sum(x == "t" for x in TEXT[:-1])
    assert float(task.bigram[a, b]) == pytest.approx(TEXT.count("th") / starts)
    assert float(task.unigram[a]) == pytest.approx(counts["t"] / len(TEXT))
    torch.testing.assert_close(task.bigram.sum(1), torch.ones(task.vocabulary, dtype=torch.float64))
    assert not task.bigram[:, task.start].any()
    assert BigramBackcopy(TEXT, "ae").triggers.tolist() == [task.characters.index(c) for c in "ae"]


def test_texts_obey_the_rules(task):
    x = task.sample(400, 80, generator())
    assert x.shape == (400, 80)
    assert (x[:, 0] == task.start).all()
    assert not (x[:, 1:] == task.start).any()
    assert not task.is_trigger(x[:, 1]).any()
    copied = 0
    for row in x.tolist():
        for n in range(2, 80):
            if row[n - 1] in task.triggers.tolist():
                assert row[n] == row[n - 2]
                copied += 1
    assert copied > 1000
    assert torch.equal(x, task.sample(400, 80, generator()))
    assert not torch.equal(x, task.sample(400, 80, generator(1)))


def test_bigrams_have_their_frequencies(task):
    """A chi-square test of the transitions out of each frequent character outside the triggers."""
    x = task.sample(4000, 40, generator(3)).numpy()
    before, after = x[:, :-1].ravel(), x[:, 1:].ravel()
    tested = 0
    for a in range(task.vocabulary):
        chosen = after[before == a]
        if a in task.triggers.tolist() or len(chosen) < 500:
            continue
        p = task.bigram[a].numpy()
        common = p * len(chosen) >= 5
        observed = np.bincount(chosen, minlength=task.vocabulary)
        assert not observed[p == 0].any()
        expected = np.append(p[common], p[~common].sum()) * len(chosen)
        seen = np.append(observed[common], observed[~common].sum())
        keep = expected > 0
        statistic = ((seen - expected)[keep] ** 2 / expected[keep]).sum()
        assert chi2.sf(statistic, keep.sum() - 1) > 1e-5, task.characters[a] if a < task.start else "start"
        tested += 1
    assert tested > 10


def test_entropy_equals_the_chain_of_pairs_and_a_sample(task):
    """The distribution of (x_{n-1}, x_n), step by step with numpy; and the oracle's mean on drawn texts."""
    V, triggers, P = task.vocabulary, task.triggers.tolist(), task.bigram.numpy()
    H = np.array([-(p[p > 0] * np.log(p[p > 0])).sum() for p in P])
    pairs = np.zeros((V, V))
    pairs[task.start] = P[task.start]  # (x_0, x_1)
    total, bigrams, length = H[task.start], 1.0, 40
    for _ in range(1, length - 1):
        after = np.zeros((V, V))
        for b in range(V):
            if b in triggers:
                after[b] += pairs[:, b]
            else:
                after[b] += pairs[:, b].sum() * P[b]
                total += pairs[:, b].sum() * H[b]
                bigrams += pairs[:, b].sum()
        pairs = after
    per_token, per_bigram = task.entropy(length)
    assert per_token == pytest.approx(total / (length - 1), rel=1e-12)
    assert per_bigram == pytest.approx(total / bigrams, rel=1e-12)
    x = task.sample(4000, length, generator(1))
    p = task.conditional(x[:, :-1]).gather(-1, x[:, 1:, None])
    assert (p > 0).all()
    assert float(-p.log().mean()) == pytest.approx(per_token, rel=0.02)
    oracle = task.risk(task.conditional(x).clamp(min=1e-30).log(), x)
    assert oracle["bigram_risk"] == pytest.approx(task.entropy(length + 1)[1], rel=0.02)


def test_entropy_in_closed_form():
    text = "aabbaabba" * 3  # two characters, no triggers: a Markov chain
    counts = Counter(pairwise(text))
    leave, back = (counts[x, y] / (counts[x, x] + counts[x, y]) for x, y in ("ab", "ba"))
    h = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (leave, back)]
    rate = (back * h[0] + leave * h[1]) / (leave + back)
    assert BigramBackcopy(text, "").entropy(20_000)[0] == pytest.approx(rate, rel=1e-4)
    # c goes on by the trigger only, so the text is c ␣ c ␣ … once it is there; a and b lead to c in the end
    absorbed = BigramBackcopy("abac abac abac ", " ")
    assert absorbed.entropy(20_000)[0] < 1e-3
    with pytest.raises(ValueError, match="nothing to predict"):
        absorbed.entropy(1)


def test_risk_is_the_expected_cross_entropy(task):
    x = task.sample(20, 30, generator())
    logits = torch.randn(20, 30, task.vocabulary, generator=generator(1))
    risk = task.risk(logits, x)
    copying, rest = [], []
    for b in range(20):
        for n in range(30):
            q = logits[b, n].double().softmax(0)
            if int(x[b, n]) in task.triggers.tolist():
                copying.append(-math.log(q[x[b, n - 1]]))
            else:
                p = task.bigram[x[b, n]]
                rest.append(float(-(p * q.log()).sum()))
    assert risk["backcopy_risk"] == pytest.approx(np.mean(copying))
    assert risk["bigram_risk"] == pytest.approx(np.mean(rest))
    oracle = task.risk(task.conditional(x).log(), x)
    assert oracle["backcopy_risk"] == 0
    assert oracle["bigram_risk"] < risk["bigram_risk"]
    for seed in range(3):  # no predictor has less risk than the oracle
        worse = task.risk(
            task.conditional(x).clamp(min=1e-9).log()
            + 0.1 * torch.randn((*x.shape, task.vocabulary), generator=generator(seed)),
            x,
        )
        assert worse["bigram_risk"] > oracle["bigram_risk"]


def test_bad_texts_are_refused():
    for text, triggers, message in (("", 3, "two different"), ("abc", 2, "two different"), ("abcd", "z", "no 'z'")):
        with pytest.raises(ValueError, match=message):
            BigramBackcopy(text, triggers)
    assert BigramBackcopy("abcdx", 1).sample(3, 1).tolist() == [[5]] * 3
    assert BigramBackcopy("abcdx", 1).sample(0, 9).shape == (0, 9)


# ------------------------------------------------------------------ the model


def test_softmax_attention_equals_torch():
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(11, width=16, length=9))
    attention, hidden = model.layers[0].self_attn, torch.randn(2, 9, 16)
    q, k, v = (getattr(attention, name)(hidden) for name in ("q_proj", "k_proj", "v_proj"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) @ attention.o_proj.weight.T
    written, weights = attention(hidden)
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))


def test_relu_attention_has_no_need_to_add_up():
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(11, width=16, length=9, attention="relu"))
    attention, hidden = model.layers[0].self_attn, torch.randn(2, 9, 16)
    _, weights = attention(hidden)
    q, k = attention.q_proj(hidden), attention.k_proj(hidden)
    for i in range(9):
        for j in range(9):
            expected = max(0.0, float((q[1, i] @ k[1, j]).detach()) / 4) / (i + 1) if j <= i else 0.0
            assert float(weights[1, i, j].detach()) == pytest.approx(expected, abs=1e-6)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
    written, weights = attention(hidden)
    assert not written.any()
    assert not weights.any()
    with torch.no_grad():  # one key: softmax gives it all, ReLU its logit
        attention.q_proj.weight.copy_(attention.k_proj.weight)
    single = attention(hidden[:, :1])[1]
    torch.testing.assert_close(single[:, 0, 0], attention.k_proj(hidden[:, 0]).square().sum(-1) / 4)


def test_parts_can_be_left_out():
    config = TinyConfig(11, layers=3, width=16, length=9, without_attention=(2,), without_mlp=(1,), linear_mlp=(0,))
    model = TinyTransformer(config)
    assert model.layers[2].self_attn is None
    assert model.layers[1].mlp is None
    assert isinstance(model.layers[0].mlp, torch.nn.Linear)
    trace = []
    assert model(torch.zeros(2, 5, dtype=torch.long), trace).shape == (2, 5, 11)
    assert ["weights" in seen for seen in trace] == [True, True, False]
    assert len(decoder_layers(model)) == 3
    for wrong in ({"without_mlp": (3,)}, {"attention": "sigmoid"}):
        with pytest.raises(ValueError, match="layer 3|softmax or relu"):
            TinyConfig(11, layers=3, **wrong)


def test_measures_equal_loops(task):
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(task.vocabulary, layers=2, width=16, length=20, without_attention=(1,)))
    x = task.sample(6, 20, generator())
    found = measures(model, task, x)
    trace = []
    with torch.no_grad():
        logits = model(x, trace)
    assert {k: found[k] for k in ("backcopy_risk", "bigram_risk")} == task.risk(logits, x)
    triggers = task.triggers.tolist()
    sink, at, gaps, first, others = [], [], {}, [], []
    for b in range(6):
        for n in range(1, 20):
            active = int(x[b, n]) in triggers
            (at if active else sink).append(float(trace[0]["weights"][b, n, 0]))
            row = trace[0]["logits"][b, n].double()
            if not active:
                gaps.setdefault(int(x[b, n]), []).append(float(row[0] - row[1 : n + 1].mean()))
            others.append(float(trace[0]["written"][b, n]))
        first.append(float(trace[0]["written"][b, 0]))
    layer = found["layers"][0]
    assert layer["sink"] == pytest.approx(np.mean(sink))
    assert layer["sink_at_triggers"] == pytest.approx(np.mean(at))
    means = [np.mean(v) for v in gaps.values()]
    assert layer["gap"] == pytest.approx(np.mean(means))
    assert layer["gap_sd"] == pytest.approx(np.std(means))
    assert layer["value_ratio"] == pytest.approx(np.mean(first) / np.mean(others))
    residual = trace[1]["residual"]
    assert found["layers"][1]["residual_ratio"] == pytest.approx(float(residual[:, 0].mean() / residual[:, 1:].mean()))
    assert set(found["layers"][1]) == {"residual", "residual_ratio"}


def test_a_trained_head_is_active_at_triggers_and_dormant_elsewhere():
    """Minutes of the paper in seconds: sink and drain appear, and the ablations say which part does what."""
    task = BigramBackcopy(TEXT)
    torch.manual_seed(0)
    model = TinyTransformer(TinyConfig(task.vocabulary, width=48, length=32))
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    draw = generator(5)
    for _ in range(500):
        x = task.sample(32, 33, draw)
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = task.sample(64, 32, draw)
    trained = measures(model, task, x)
    layer = trained["layers"][0]
    assert trained["backcopy_risk"] < 0.2
    assert layer["sink"] > 0.5
    assert layer["sink_at_triggers"] < 0.1
    assert layer["value_ratio"] < 0.6

    def risks(block):
        with block:
            return measures(model, task, x)

    without = risks(zero_attention(model, 0))
    assert without["backcopy_risk"] > trained["backcopy_risk"] + 1
    assert without["bigram_risk"] < trained["bigram_risk"] + 0.1
    assert risks(zero_mlp(model, 0))["bigram_risk"] > trained["bigram_risk"] + 0.5
    drained = risks(replace_sink_value(model, 0, "zero"))["bigram_risk"] - trained["bigram_risk"]
    typical = risks(replace_sink_value(model, 0, "typical"))["bigram_risk"] - trained["bigram_risk"]
    assert drained < 0.1
    assert typical > max(0.1, 3 * drained)

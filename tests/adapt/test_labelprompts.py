"""Label prompts: prototypical networks written out beside them, symmetries, losses, and training that pays."""

from __future__ import annotations

import pytest
import torch
from promptmodels import FORMS, TEMPLATE, encoder, method, rows, scores_of, task_of, vector, wordpiece
from torch.testing import assert_close

from residency import train
from residency.adapt.episodes import Episode, Episodes
from residency.adapt.labelprompts import (
    EpisodeLoss,
    LabelPrompts,
    Tasks,
    collate_tasks,
    episode_loss,
    named,
    prototypes,
)
from residency.objective import Outputs
from residency.trainparams import TrainParams


@pytest.fixture(name="wordpiece", scope="module")
def _wordpiece():
    return wordpiece()


@pytest.fixture(name="encoder", scope="module")
def _encoder():
    return encoder()


def test_without_labels_it_is_a_prototypical_network(encoder, wordpiece):
    z = scores_of("plain", encoder, wordpiece, eta=0, focus=0, scale=15)
    _, episode, texts = task_of("plain", wordpiece)
    means = [torch.stack([vector(encoder, wordpiece, texts[i]) for i in row]).mean(0) for row in episode.support]
    queries = torch.stack([vector(encoder, wordpiece, texts[i]) for i in episode.query])
    distance = torch.cdist(queries.double(), torch.stack(means).double()).square()
    assert_close(z.softmax(-1).double(), (-15 * distance).softmax(-1), rtol=1e-4, atol=1e-5)
    # a template without a label, and attention that looks at nothing, are the same
    other = LabelPrompts(form="prompt", template="{text}", eta=0, focus=0)
    task = Tasks(other, wordpiece, texts, {})(episode)
    with torch.no_grad():
        assert_close(EpisodeLoss(other.view(encoder), other).logits(collate_tasks([task], 0))[0], z)
    assert_close(scores_of("attention", encoder, wordpiece, eta=0, focus=0, sharpness=0), z)


@pytest.mark.parametrize("form", FORMS)
def test_symmetries(form, encoder, wordpiece):
    z = scores_of(form, encoder, wordpiece)
    _, e, _ = task_of(form, wordpiece)
    order = [2, 0, 1]
    turned = Episode(
        tuple(e.classes[i] for i in order),
        tuple(e.support[i][::-1] for i in order),
        e.query[::-1],
        e.target[::-1][:, order],
    )
    assert_close(scores_of(form, encoder, wordpiece, turned), z.flip(0)[:, order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_every_key_changes_something(form, encoder, wordpiece):
    z = scores_of(form, encoder, wordpiece)
    changes = [{"eta": 0.2}, {"focus": 50}, {"scale": 3}]
    changes += [{"sharpness": 0}] if form == "attention" else []
    for keys in changes:
        assert not torch.allclose(scores_of(form, encoder, wordpiece, **keys), z, atol=1e-3), keys


@pytest.mark.parametrize("form", ["attention", "prompt"])
def test_a_query_is_seen_under_each_label(form, encoder, wordpiece):
    """h written out: one pass per (sentence, label) for prompts, attention by hand otherwise."""
    way = method(form, sharpness=7) if form == "attention" else method(form)
    task, e, texts = task_of(form, wordpiece, **({"sharpness": 7} if form == "attention" else {}))
    batch = collate_tasks([task], 0)
    with torch.no_grad():
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "pool", "support", "query", "named")}
        shots, queries, labels = way.view(encoder)(**given)
    name = ["", "waiter kind rude"]["staff" in e.classes]
    for n, c in enumerate(e.classes):
        assert_close(
            labels[0, n], vector(encoder, wordpiece, named(c, name if c == "staff" else "")), atol=1e-5, rtol=1e-4
        )
        for found, row in ((shots[0, n, 1], e.support[n][1]), (queries[0, 3, n], e.query[3])):
            if form == "attention":
                with torch.no_grad():
                    v = encoder(**wordpiece(texts[row], return_tensors="pt")).last_hidden_state[0, 1:-1]
                near = torch.nn.functional.cosine_similarity(v, labels[0, n][None])
                h = (torch.softmax(7 * near, 0)[:, None] * v).sum(0)
            else:
                ids = wordpiece(TEMPLATE.format(text=texts[row], label=" ".join(dict.fromkeys(c.split("_")))))
                own = len(wordpiece(texts[row], add_special_tokens=False)["input_ids"])
                with torch.no_grad():
                    h = encoder(torch.tensor([ids["input_ids"]])).last_hidden_state[0, 1 : 1 + own].mean(0)
            assert_close(found, h / h.norm(), atol=1e-5, rtol=1e-4)


def test_prototypes():
    generator = torch.Generator().manual_seed(0)
    shots, e = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    assert_close(prototypes(shots, None, 0, 0), shots.mean(-2))
    assert_close(prototypes(shots, e, 1, 3), e)
    assert_close(prototypes(shots[:, :, :1], e, 0.4, 0), prototypes(shots[:, :, :1], e, 0.4, 9))  # K = 1
    sharp = prototypes(shots, e, 0, 1e6)
    best = torch.nn.functional.cosine_similarity(shots, e[:, :, None], dim=-1).argmax(-1)
    assert_close(sharp, shots.gather(2, best[..., None, None].expand(-1, -1, 1, 5))[:, :, 0])
    there = torch.rand(2, 4, 3, generator=generator) < 0.6
    there[0, 0] = False
    found = prototypes(shots, e, 0.3, 2.0, there)
    assert_close(found[0, 0], e[0, 0])
    for a in range(2):
        for n in range(4):
            if there[a, n].any():
                own = shots[a, n][there[a, n]]
                assert_close(found[a, n], prototypes(own[None], e[a, n][None], 0.3, 2.0)[0])
    with pytest.raises(ValueError, match="there are none"):
        prototypes(shots, None, 0.5, 0)
    with pytest.raises(ValueError, match="give rows"):
        prototypes(shots, None, 0, 0, there)
    shots.requires_grad_()
    prototypes(shots, e, 0.3, 2.0, there).sum().backward()
    assert shots.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_loss_is_torchs(loss):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = (torch.rand(2, 6, 3, generator=generator) < 0.4).double()
    found = episode_loss(z, y, loss)
    if loss == "mse":
        expected = torch.nn.functional.mse_loss(z.softmax(-1), y, reduction="sum")
    else:
        expected = torch.nn.functional.binary_cross_entropy(z.sigmoid(), y, reduction="sum")
    assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda x: episode_loss(x, y, loss), z)
    assert_close(episode_loss(z[:1], y[:1], loss) + episode_loss(z[1:], y[1:], loss), found)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hot = (z.detach() * 1e4).to(dtype).requires_grad_()
        total = episode_loss(hot, y, loss)
        total.backward()
        assert total.isfinite()
        assert hot.grad.isfinite().all()
    assert episode_loss(z[:0], y[:0], loss) == 0
    with pytest.raises(ValueError, match="one shape"):
        episode_loss(z, y[:, :2], loss)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_episodes_add_up_however_batched(form, loss, encoder, wordpiece):
    texts, labels = rows()
    way = method(form, loss=loss)
    tasks = Tasks(way, wordpiece, texts, {})
    items = [tasks(e) for e in Episodes(labels, ways=3, shots=2, queries=1, keys=texts).take(3)]
    objective = EpisodeLoss(way.view(encoder), way)

    def value(part):
        objective.view.zero_grad()
        batch = collate_tasks(part, 0)
        total, count = objective(Outputs(), batch)
        total.backward()
        assert int(count) == objective.count(batch)
        grads = [p.grad.clone() for p in objective.view.parameters() if p.grad is not None]
        return total.detach(), int(count), grads

    whole, count, gradient = value(items)
    parts = [value([item]) for item in items]
    assert count == sum(n for _, n, _ in parts) == 27
    assert_close(sum(t for t, _, _ in parts), whole, rtol=1e-4, atol=1e-5)
    for i, g in enumerate(gradient):
        assert_close(sum(p[2][i] for p in parts), g, rtol=1e-3, atol=1e-4)


def test_shapes_that_do_not_fit_are_refused(wordpiece):
    texts, labels = rows()
    tasks = Tasks(method("plain"), wordpiece, texts, {})
    a, b = (tasks(Episodes(labels, ways=w, shots=2, queries=1, keys=texts).episode(0)) for w in (2, 3))
    with pytest.raises(ValueError, match="one shape"):
        collate_tasks([a, b], 0)


@pytest.mark.parametrize("form", FORMS)
def test_training_on_episodes_pays_on_fresh_ones(form, wordpiece, tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    view = method(form).view(BertModel(BertConfig(vocab_size=len(wordpiece), **sizes)))
    texts, labels = rows(120)
    way = method(form)
    tasks = Tasks(way, wordpiece, texts, {})
    episodes = Episodes(labels, ways=3, shots=2, queries=2, keys=texts)
    objective = EpisodeLoss(view, way)
    fresh = collate_tasks([tasks(e) for e in episodes.take(10, start=1000)], 0)

    def mean():
        view.eval()
        with torch.no_grad():
            total, count = objective(Outputs(), fresh)
        return float(total / count)

    before = mean()
    params = TrainParams(epochs=1, learning_rate=3e-3, batch=2, checkpoint_seconds=1e9, precision="float32")
    log = train.fit(
        view, objective, [tasks(e) for e in episodes.take(40)], params, pad=0, scratch=tmp_path,
        collator=lambda batch: collate_tasks(batch, 0),
    )  # fmt: skip
    assert log.steps == 20
    assert log.tokens == 40 * 18
    assert mean() < 0.7 * before


def test_keys_of_another_form_are_refused():
    for keys in (
        {"template": TEMPLATE},
        {"pool": "mask"},
        {"form": "prompt", "sharpness": 2},
        {"form": "plain", "sharpness": 2},
    ):
        with pytest.raises(ValueError, match="belongs to form"):
            LabelPrompts(**keys)

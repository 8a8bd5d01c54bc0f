"""What the tests of label prompts share: a tiny BERT with a real tokenizer, and sentences of known topics."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from residency.adapt.episodes import Episodes
from residency.adapt.labelprompts import EpisodeLoss, LabelPrompts, Tasks, collate_tasks

FORMS = ("plain", "attention", "prompt")
TEMPLATE = "{text} about {label}"
WORDS = [
    "the",
    "food",
    "was",
    "good",
    "bad",
    "soup",
    "fish",
    "waiter",
    "rude",
    "kind",
    "wall",
    "lamp",
    "sofa",
    "price",
    "cheap",
    "dear",
]
TOPICS = {"food_food": "soup fish", "staff": "waiter rude kind", "decor": "wall lamp sofa", "price": "price cheap dear"}


@cache
def wordpiece():
    """A BERT tokenizer with [CLS], [SEP] and [MASK] over a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [
        *WORDS,
        *[
            "in",
            "terms",
            "of",
            "sentence",
            "is",
            "about",
            "staff",
            "decor",
            ",",
            ".",
            ":",
            "'",
            "t",
            "wasn",
            "un",
            "##lucky",
            "##ly",
        ],
    ]
    vocabulary = {w: i for i, w in enumerate(special + words)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=inner)


@cache
def encoder():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(vocab_size=len(wordpiece()), initializer_range=0.3, **sizes)).eval()


def rows(n=60, seed=0):
    """Sentences of one or two topics."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(n):
        own = sorted(rng.choice(list(TOPICS), rng.choice([1, 1, 2]), replace=False))
        said = [str(rng.choice(TOPICS[t].split())) for t in own for _ in range(2)]
        texts.append(" ".join(["the", *said, "was", *rng.choice(["good", "bad"], 1)]))
        labels.append(tuple(own))
    return texts, labels


def method(form, **keys):
    return LabelPrompts(form=form, **({"template": TEMPLATE} if form == "prompt" else {}), **keys)


def task_of(form, tokenizer, episode=None, **keys):
    texts, labels = rows()
    episode = episode or Episodes(labels, ways=3, shots=2, queries=2, seed=1, keys=texts).episode(0)
    return Tasks(method(form, **keys), tokenizer, texts, {"staff": "waiter kind rude"})(episode), episode, texts


def scores_of(form, encoder, tokenizer, episode=None, **keys):
    task, *_ = task_of(form, tokenizer, episode, **keys)
    way = method(form, **keys)
    with torch.no_grad():
        return EpisodeLoss(way.view(encoder), way).logits(collate_tasks([task], 0))[0]


def vector(encoder, tokenizer, text):
    """Unit mean of the states of a text's own tokens, without padding or batches."""
    with torch.no_grad():
        states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
    return torch.nn.functional.normalize(states.mean(0), dim=0)

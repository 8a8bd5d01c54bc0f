"""Claim to test: few trusted and many noisy images (with captions) are worth more by prototypes than by cross-entropy.

Images: Fashion-MNIST from Debian's package `dataset-fashion-mnist`, else scikit-learn's digits. A frozen
EfficientNet-Lite0 sees every image and two changed views of it once (48 px); every arm then trains the same adapter for
the same epochs on the same rows: K trusted per class, and 1,000 whose labels are noisy:

- symmetric: any other class; semantic: one consistent other class (a shirt for a T-shirt), as a search would return it;
  open-set: images of two classes that are not among the eight asked for; 20, 40 and 60 % of the labels;
- captions: 45 % say what the picture shows, 20 % what the label says, the rest nothing; or missing in 80 % of the rows;
  or mismatched, another row's.

Arms: cross-entropy on the trusted rows alone; on both; on both with true labels (what could be had); co-teaching, which
is told the true share of noise; pruning by confident learning (cleanlab, if it is installed, else its rule written out)
and cross-entropy on the rest; SupCon; FoPro; CAPro, and CAPro without text (rows chosen by how many neighbours carry
their label). Accuracy on 2,000 test images, and of the rows an arm distrusts (removed or relabelled): how many were
wrong (precision), how many of the wrong ones are among them (recall), and how many relabelled ones became right.

Then the price: the time of a step against plain cross-entropy with the same encoder, batch 32, queue 4,096.

    python benchmarks/noisy_images.py            # everything; results/noisy_images.json
    python benchmarks/noisy_images.py --quick    # a minute or two, writes nothing
    python benchmarks/noisy_images.py --only table|time
    python benchmarks/noisy_images.py --show     # the results as Markdown

Reads /usr/share/datasets/fashion-mnist, or $RESIDENCY_BENCH_DATA/fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from residency import encoders, train
from residency.adapt.capro import CAPro
from residency.adapt.contrast import SupCon
from residency.adapt.fopro import FoPro
from residency.adapt.linear import LinearLoss
from residency.adapt.neighbours import Averages, operator, smooth
from residency.adapt.noisydata import another_image
from residency.adapt.probe import Probe
from residency.adapt.textmatch import match
from residency.embedded import base_folder
from residency.objective import Objective, Outputs
from residency.trainable import Adapter, ImageFeatures
from residency.trainparams import TrainParams
from residency.views import Item, collate_views

PLACES = (
    Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data")) / "fashion-mnist",
    Path("/usr/share/datasets/fashion-mnist"),
)
OUT = Path(__file__).parent / "results" / "noisy_images.json"
PIXELS, NOISY, TEST, VIEWS = 48, 1000, 2000, 2
SEEDS = (0, 1, 2)
PARAMS = TrainParams(batch=32, epochs=15, learning_rate=1e-3, precision="float32", checkpoint_seconds=1e9)

FASHION: dict[str, tuple[str, tuple[str, ...]]] = {
    "T-shirt": (
        "a T-shirt: a light top with short sleeves and no buttons",
        ("cotton tee, crew neck", "short sleeve tee"),
    ),
    "trouser": ("trousers: a garment for both legs from the waist down", ("slim fit pants", "pair of jeans")),
    "pullover": ("a pullover: a knitted jumper drawn over the head", ("warm knit sweater", "wool jumper, round neck")),
    "dress": ("a dress: a one-piece garment with a skirt", ("summer gown, knee length", "evening dress, sleeveless")),
    "coat": ("a coat: outerwear that opens at the front", ("winter parka with zip", "long overcoat with buttons")),
    "sandal": ("a sandal: an open shoe with straps", ("strappy open shoe", "beach flip flop")),
    "shirt": ("a shirt: a top with a collar and buttons", ("blouse with collar", "button-down oxford")),
    "sneaker": ("a sneaker: a sports shoe with a rubber sole", ("running trainers", "low top sports shoe")),
    "bag": ("a bag: carried by hand or over the shoulder", ("leather handbag", "shoulder purse with handle")),
    "boot": ("an ankle boot: a shoe that covers the ankle", ("leather ankle boot", "high top boot with heel")),
}
"""Class → a text about it, and what captions call it."""
SENSE = {0: 6, 1: 3, 2: 4, 3: 1, 4: 2, 5: 7, 6: 0, 7: 9, 8: 5, 9: 7}
"""The class that a search for a class returns by mistake."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS: dict[str, tuple[str, tuple[str, ...]]] = {
    w: (f"the digit {w}, written by hand", (f"a handwritten {w}", f"number {w} in pencil")) for w in WORDS
}
DIGIT_SENSE = {0: 6, 1: 7, 2: 3, 3: 2, 4: 9, 5: 8, 6: 0, 7: 1, 8: 5, 9: 4}
NOTHING = ("IMG 0417", "new in stock", "best price, free delivery", "see more like this", "untitled", "photo 3 of 5")


# ------------------------------------------------------------------ data


@dataclass
class World:
    """Features of a data set: train [N, 1 + V, D], test [M, D], labels, texts."""

    name: str
    train: Tensor
    y: Tensor
    test: Tensor
    test_y: Tensor
    about: dict[str, tuple[str, tuple[str, ...]]]
    sense: dict[int, int]
    said: dict[str, Tensor] = field(default_factory=dict)


def images() -> tuple[str, Any, Any, Any, Any]:
    """(name, train images, labels, test images, labels)."""
    for place in PLACES:
        if (place / "train-images-idx3-ubyte.gz").exists():
            parts = []
            for part in ("train", "t10k"):
                for kind, offset, shape in (("images-idx3", 16, (-1, 28, 28)), ("labels-idx1", 8, (-1,))):
                    with gzip.open(place / f"{part}-{kind}-ubyte.gz") as file:
                        parts.append(np.frombuffer(file.read(), np.uint8, offset=offset).reshape(shape))
            x, y, test_x, test_y = parts
            return "fashion-mnist", x, y, test_x, test_y
    print("no Fashion-MNIST (apt-get install dataset-fashion-mnist): scikit-learn's digits instead", file=sys.stderr)
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels, labels = (digits.images * 15.9375).astype(np.uint8)[order], digits.target[order]
    return "digits", pixels[:1300], labels[:1300], pixels[1300:], labels[1300:]


def world(work: Path, quick: bool) -> World:
    """Features, computed once and kept in `work`."""
    from PIL import Image

    name, x, y, test_x, test_y = images()
    rng = np.random.default_rng(0)
    some = rng.permutation(len(x))[: 700 if quick else 2400]
    tests = rng.permutation(len(test_x))[: 300 if quick else TEST]
    file = work / f"{name}-{PIXELS}-{len(some)}-{len(tests)}.npz"
    if not file.exists():
        encoder: Any = encoders.load(base_folder("efficientnet-lite0"))
        encoder.model.size = PIXELS
        pictures = [Image.fromarray(i).convert("RGB") for i in x[some]]
        generator = np.random.default_rng(1)
        views = [encoder.encode(pictures)]
        views += [encoder.encode([another_image(p, generator, False) for p in pictures]) for _ in range(VIEWS)]
        seen = encoder.encode([Image.fromarray(i).convert("RGB") for i in test_x[tests]])
        np.savez(file, train=np.stack(views, 1), test=seen)
    kept = np.load(file)
    fashion = name == "fashion-mnist"
    found = World(
        name,
        torch.from_numpy(kept["train"]),
        torch.from_numpy(y[some].astype(np.int64)),
        torch.from_numpy(kept["test"]),
        torch.from_numpy(test_y[tests].astype(np.int64)),
        FASHION if fashion else DIGITS,
        SENSE if fashion else DIGIT_SENSE,
    )
    texts = sorted({t for about, called in found.about.values() for t in (about, *called)} | set(NOTHING))
    vectors = encoders.load(base_folder("all-minilm-l6-v2")).encode(texts)
    found.said = {t: torch.from_numpy(v) for t, v in zip(texts, vectors, strict=True)}
    return found


@dataclass
class Problem:
    """One draw: rows (trusted first), their views, labels as given and as they are (−1 for none of the classes)."""

    views: Tensor
    given: Tensor
    true: Tensor
    clean: Tensor
    captions: Tensor
    known: Tensor
    about: Tensor
    test: Tensor
    test_y: Tensor
    rate: float

    @property
    def classes(self) -> int:
        """C."""
        return len(self.about)


def draw(w: World, noise: str, rate: float, shots: int, seed: int, captions: str = "half", n: int = NOISY) -> Problem:
    """K trusted rows per class and n noisy ones."""
    rng = np.random.default_rng((seed, 17))
    classes = 8 if noise == "open-set" else 10
    order = rng.permutation(len(w.y))
    y = w.y.numpy()
    trusted = [i for c in range(classes) for i in order[y[order] == c][:shots]]
    rest = np.array([i for i in order if i not in set(trusted)])
    inside = rest[y[rest] < classes]
    if noise == "open-set":
        strange = rest[y[rest] >= classes][: round(rate * n)]
        inside = inside[: n - len(strange)]
        true = np.concatenate([y[inside], np.full(len(strange), -1)])
        given = np.concatenate([y[inside], rng.integers(0, classes, len(strange))])
        rows = np.concatenate([inside, strange])
        shown = y[rows]
    else:
        rows = inside[:n]
        true = shown = y[rows]
        wrong = rng.random(len(rows)) < rate
        if noise == "symmetric":
            given = np.where(wrong, (true + rng.integers(1, classes, len(rows))) % classes, true)
        else:
            # what a search for class c returns: rate of its rows show SENSE[c]
            back: dict[int, list[int]] = {}
            for asked, got in w.sense.items():
                back.setdefault(got, []).append(asked)
            given = np.array(
                [int(rng.choice(back[t])) if bad and t in back else t for t, bad in zip(true, wrong, strict=True)]
            )
    names = list(w.about)
    width = len(next(iter(w.said.values())))
    said, known = torch.zeros(len(trusted) + len(rows), width), torch.zeros(len(trusted) + len(rows), dtype=torch.bool)
    other = rng.permutation(len(rows))
    for i, (t, g) in enumerate(zip(shown, given, strict=True)):
        about = (int(shown[other[i]]), int(given[other[i]])) if captions == "mismatched" else (int(t), int(g))
        luck = rng.random()
        if captions == "missing" and rng.random() < 0.8:
            continue
        if luck < 0.65:
            text = str(rng.choice(w.about[names[about[0] if luck < 0.45 else about[1]]][1]))
        else:
            text = str(rng.choice(NOTHING))
        said[len(trusted) + i], known[len(trusted) + i] = w.said[text], True
    picked = torch.tensor([*trusted, *rows.tolist()])
    here = w.test_y < classes
    return Problem(
        w.train[picked],
        torch.cat([w.y[torch.tensor(trusted)], torch.from_numpy(given)]),
        torch.cat([w.y[torch.tensor(trusted)], torch.from_numpy(true)]),
        torch.arange(len(picked)) < len(trusted),
        said,
        known,
        torch.stack([w.said[w.about[c][0]] for c in names[:classes]]),
        w.test[here],
        w.test_y[here],
        float((given != true).mean()),
    )


# ------------------------------------------------------------------ arms


@dataclass
class Answer:
    """Test accuracy, and what was made of the rows: distrusted [N], and new labels where there are any."""

    accuracy: float
    distrusted: Tensor | None = None
    labels: Tensor | None = None
    picked: float | None = None


def items_of(p: Problem, rows: Tensor, labels: Tensor, clean: Tensor) -> list[Item]:
    """Rows to train on."""
    return [
        Item(n, str(i), int(labels[i]), p.views[i], bool(clean[i])) for n, i in enumerate(rows.nonzero()[:, 0].tolist())
    ]


def fitted(
    p: Problem,
    loss_of: Callable[[nn.Module, int], Objective],
    rows: Tensor,
    labels: Tensor,
    clean: Tensor,
    seed: int,
    params: TrainParams,
    model_of: Callable[[int], nn.Module] = lambda width: Adapter(width, 256),
) -> tuple[Any, Any]:
    """Model and objective after the common training."""
    torch.manual_seed(seed)
    width = p.views.shape[-1]
    model: Any = model_of(width)
    for part in (m for m in model.modules() if isinstance(m, Adapter)):
        part.standardise(p.views[:, 0])
    loss = loss_of(model, width)
    with tempfile.TemporaryDirectory() as scratch:
        items = items_of(p, rows, labels, clean)
        train.fit(model, loss, items, params, pad=0, scratch=Path(scratch), seed=seed, collator=collate_views)
    return model.eval(), loss.eval()


def unit(z: Tensor) -> Tensor:
    """At length 1."""
    return nn.functional.normalize(z, dim=-1)


@torch.no_grad()
def linear_accuracy(p: Problem, model: Any, weight: Tensor, bias: Tensor) -> float:
    """On the test images, of a linear head on unit features."""
    said = nn.functional.linear(unit(model(p.test).features), weight, bias).argmax(1)
    return float((said == p.test_y).float().mean())


def cross_entropy(p: Problem, seed: int, params: TrainParams, rows: Tensor, labels: Tensor) -> Answer:
    """Plain training; it distrusts the rows whose label it does not reproduce."""
    model, loss = fitted(p, lambda m, w: LinearLoss(p.classes, w), rows, labels, p.clean, seed, params)
    with torch.no_grad():
        said = nn.functional.linear(unit(model(p.views[:, 0]).features), *loss.class_head()).argmax(1)
    return Answer(linear_accuracy(p, model, *loss.class_head()), (said != p.given) & ~p.clean, said)


def everyone(p: Problem) -> Tensor:
    """All rows."""
    return torch.ones(len(p.given), dtype=torch.bool)


def arm_shots(p: Problem, seed: int, params: TrainParams) -> Answer:
    """Trusted rows alone, for as many steps as the others have."""
    steps = -(-len(p.given) // params.batch) * int(params.epochs)
    few = params.model_copy(update={"max_steps": steps})
    return Answer(cross_entropy(p, seed, few, p.clean, p.given).accuracy)


def arm_plain(p: Problem, seed: int, params: TrainParams) -> Answer:
    """Trusted and noisy rows alike."""
    return cross_entropy(p, seed, params, everyone(p), p.given)


def arm_truth(p: Problem, seed: int, params: TrainParams) -> Answer:
    """What could be had: true labels, without the rows of no class."""
    return Answer(cross_entropy(p, seed, params, p.true >= 0, p.true.clamp_min(0)).accuracy)


def arm_pruned(p: Problem, seed: int, params: TrainParams) -> Answer:
    """Out-of-sample probabilities of a linear probe in five folds, confident learning, cross-entropy on the rest."""
    x = p.views[:, 0] - p.views[:, 0].mean(0)
    x = x @ torch.linalg.svd(x, full_matrices=False)[2][:64].T  # 64 components, so that five probes cost little
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)) % 5)
    probabilities = torch.zeros(len(x), p.classes)
    names = [str(c) for c in range(p.classes)]
    for k in range(5):
        head = Probe(regularisation=1e-1).fit(x[fold != k].numpy(), [names[c] for c in p.given[fold != k].tolist()])
        with torch.no_grad():
            columns = [int(c) for c in head.classes]
            probabilities[(fold == k).nonzero(), torch.tensor(columns)] = head(x[fold == k]).exp()
    try:
        from cleanlab.filter import find_label_issues

        issues = find_label_issues(p.given.numpy(), probabilities.double().numpy(), filter_by="prune_by_noise_rate")
        bad = torch.from_numpy(issues)
    except ModuleNotFoundError:
        own = probabilities.gather(1, p.given[:, None])[:, 0]
        threshold = torch.stack([own[p.given == c].mean() for c in range(p.classes)])
        above = torch.where(probabilities >= threshold, probabilities, -1.0)
        bad = (above.max(1).values >= 0) & (above.argmax(1) != p.given)
    bad &= ~p.clean
    return Answer(cross_entropy(p, seed, params, ~bad, p.given).accuracy, bad)


class CoTeaching(Objective):
    """Two networks, each trained on the rows of the batch whose loss is small for the other (arXiv 1804.06872).

    The share left out rises to the noise rate over the first tenth of the epochs; trusted rows are never left out.
    """

    wants = "features"

    def __init__(self, classes: int, width: int, rate: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(2))
        self.rate, self.share = rate, 0.0

    def count(self, batch: dict[str, Any]) -> int:
        """Rows."""
        return len(batch["labels"])

    def begin_epoch(self, epoch: int, epochs: int, look: Any) -> None:
        """The share left out rises."""
        self.share = self.rate * min(1.0, (epoch + 1) / max(1.0, epochs / 10))

    def losses(self, features: Tensor, y: Tensor) -> list[Tensor]:
        """Of both networks, per row."""
        out = []
        for head, z in zip(self.heads, features.chunk(2, -1), strict=True):
            logits = head(unit(z) * z.shape[-1] ** 0.5)
            out.append(nn.functional.cross_entropy(logits, y, reduction="none"))
        return out

    def forward(self, outputs: Outputs, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Each learns from the rows that the other finds easy."""
        assert outputs.features is not None
        y = batch["labels"]
        mine = self.losses(outputs.features, y)
        total = mine[0].sum() * 0
        for loss, other in ((mine[0], mine[1]), (mine[1], mine[0])):
            judged = other.detach().masked_fill(batch["clean"], -1.0)
            total = total + loss[judged.argsort()[: max(1, round((1 - self.share) * len(y)))]].sum()
        return total, y.new_tensor(len(y))


class Twins(nn.Module):
    """Two adapters side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = nn.ModuleList(Adapter(width, 256) for _ in range(2))

    def forward(self, features: Tensor) -> Any:
        """Both vectors in one."""
        from residency.trainable import Features

        return Features(torch.cat([m(features).features for m in self.both], -1))


def arm_coteaching(p: Problem, seed: int, params: TrainParams) -> Answer:
    """It distrusts the rows of the largest losses, as many as are wrong."""
    model, loss = fitted(
        p, lambda m, w: CoTeaching(p.classes, w, p.rate), everyone(p), p.given, p.clean, seed, params, Twins
    )
    with torch.no_grad():
        z = model(p.test).features.chunk(2, -1)
        heads = zip(loss.heads, z, strict=True)
        said = sum(h(unit(v) * v.shape[-1] ** 0.5).softmax(-1) for h, v in heads).argmax(1)
        left = sum(loss.losses(model(p.views[:, 0]).features, p.given)).masked_fill(p.clean, -1.0)
    worst = torch.zeros_like(p.clean)
    worst[left.topk(round(p.rate * int((~p.clean).sum()))).indices] = True
    return Answer(float((said == p.test_y).float().mean()), worst)


def arm_supcon(p: Problem, seed: int, params: TrainParams) -> Answer:
    """Contrast within the batch; the nearest class mean predicts."""
    model, _ = fitted(p, lambda m, w: SupCon(p.classes, w), everyone(p), p.given, p.clean, seed, params)
    with torch.no_grad():
        z = unit(model(p.views[:, 0]).features)
        means = unit(torch.zeros(p.classes, z.shape[1]).index_add_(0, p.given, z))
        said = (z @ means.T).argmax(1)
        right = (unit(model(p.test).features) @ means.T).argmax(1) == p.test_y
    return Answer(float(right.float().mean()), (said != p.given) & ~p.clean, said)


def judged(p: Problem, model: Any, loss: Any, clean: Tensor, picked: float | None = None) -> Answer:
    """What a method says of its own rows."""
    with torch.no_grad():
        v = loss.judge(model(p.views[:, 0]).features, p.given, clean)
    labels = torch.where(v.keep, v.labels, torch.full_like(v.labels, -1))
    return Answer(linear_accuracy(p, model, *loss.class_head()), v.relabelled | ~v.keep, labels, picked)


def arm_fopro(p: Problem, seed: int, params: TrainParams, **keys: Any) -> Answer:
    """FoPro as it comes."""
    model, loss = fitted(p, lambda m, w: FoPro(p.classes, w, m, **keys), everyone(p), p.given, p.clean, seed, params)
    return judged(p, model, loss, p.clean)


def selected(p: Problem, k: int, keep: int, text: bool) -> Tensor:
    """K rows per class by their captions, or by how many of their neighbours carry their label."""
    averages: Averages = operator(p.views[:, 0], 20, keep)
    if text:
        said, known = smooth(averages, p.captions, known=p.known)
        return match(said, p.about, p.given, k, known=known).chosen.any(1) & ~p.clean
    share = averages.of(nn.functional.one_hot(p.given, p.classes).float()).gather(1, p.given[:, None])[:, 0]
    chosen = torch.zeros_like(p.clean)
    for c in range(p.classes):
        score = share.masked_fill((p.given != c) | p.clean, -1.0)
        best = score.topk(k)
        chosen[best.indices[best.values >= 0]] = True
    return chosen


def arm_capro(p: Problem, seed: int, params: TrainParams, text: bool = True, k: int = 20, **keys: Any) -> Answer:
    """CAPro; K = 20 of about a hundred rows per class."""
    chosen = selected(p, k, keys.pop("smooth", 20), text)
    clean = p.clean | chosen
    model, loss = fitted(p, lambda m, w: CAPro(p.classes, w, m, **keys), everyone(p), p.given, clean, seed, params)
    return judged(p, model, loss, clean, float((p.true[chosen] == p.given[chosen]).float().mean()))


ARMS: dict[str, Callable[[Problem, int, TrainParams], Answer]] = {
    "trusted rows alone": arm_shots,
    "cross-entropy": arm_plain,
    "co-teaching": arm_coteaching,
    "confident learning": arm_pruned,
    "SupCon": arm_supcon,
    "FoPro": arm_fopro,
    "CAPro": arm_capro,
    "CAPro, no text": lambda p, seed, params: arm_capro(p, seed, params, text=False),
    "true labels": arm_truth,
}


# ------------------------------------------------------------------ the table

RATES = (5e-5, 1e-4, 2e-4)
MAIN = tuple(ARMS)
SOME = ("trusted rows alone", "cross-entropy", "confident learning", "FoPro", "CAPro")


@dataclass(frozen=True)
class Cell:
    """One kind of problem."""

    noise: str
    rate: float
    shots: int = 4
    captions: str = "half"
    arms: tuple[str, ...] = MAIN

    @property
    def name(self) -> str:
        """In a few words."""
        said = "" if self.captions == "half" else f", captions {self.captions}"
        return f"{self.noise} {self.rate:.0%}, K={self.shots}{said}"


CELLS = (
    *(Cell(noise, rate) for noise in ("symmetric", "semantic") for rate in (0.2, 0.4, 0.6)),
    Cell("open-set", 0.4),
    *(Cell(noise, 0.4, shots, arms=SOME) for noise in ("symmetric", "semantic") for shots in (1, 16)),
    *(Cell("semantic", 0.4, captions=c, arms=("CAPro",)) for c in ("missing", "mismatched")),
)


def scored(p: Problem, a: Answer) -> dict[str, float]:
    """Accuracy, and how right it was to distrust what it distrusted."""
    out = {"accuracy": a.accuracy}
    wrong = (p.true != p.given) & ~p.clean
    if a.distrusted is not None:
        hits = float((a.distrusted & wrong).sum())
        out |= {"precision": hits / max(1.0, float(a.distrusted.sum())), "recall": hits / float(wrong.sum())}
    if a.labels is not None:
        moved = (a.labels >= 0) & (a.labels != p.given) & ~p.clean
        out["relabelled"] = float(moved.sum())
        out["relabelled_right"] = float((a.labels[moved] == p.true[moved]).float().mean()) if moved.any() else 0.0
    if a.picked is not None:
        out["chosen_right"] = a.picked
    return out


def chosen_rates(w: World, quick: bool) -> dict[str, float]:
    """Per arm, the learning rate with the best mean accuracy on draws that are not in the table."""
    problems = [draw(w, noise, 0.4, 4, seed=99, n=300 if quick else NOISY) for noise in ("symmetric", "semantic")]
    found = {}
    for name in ARMS:
        if name == "CAPro, no text":
            continue
        mean = {
            rate: statistics.mean(ARMS[name](p, 99, params(rate, quick)).accuracy for p in problems)
            for rate in (RATES[1:2] if quick else RATES)
        }
        found[name] = max(mean, key=lambda r: mean[r])
        print(name, {r: round(v, 4) for r, v in mean.items()}, flush=True)
    return found | {"CAPro, no text": found["CAPro"]}


def params(rate: float, quick: bool) -> TrainParams:
    """The common training at a learning rate."""
    return PARAMS.model_copy(update={"learning_rate": rate, "epochs": 3.0 if quick else PARAMS.epochs})


def table(w: World, work: Path, quick: bool) -> dict[str, Any]:
    """All cells; what is done is kept in `work`."""
    file = work / f"noisy_images{'_quick' if quick else ''}.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not quick else {}
    if "rates" not in done:
        done["rates"] = chosen_rates(w, quick)
    results: dict[str, Any] = done.setdefault("cells", {})
    for cell in CELLS[::4] if quick else CELLS:
        kept = results.setdefault(cell.name, {})
        for seed in SEEDS[:1] if quick else SEEDS:
            p = draw(w, cell.noise, cell.rate, cell.shots, seed, cell.captions, 300 if quick else NOISY)
            for name in cell.arms:
                runs = kept.setdefault(name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = scored(p, ARMS[name](p, seed, params(done["rates"][name], quick)))
                    file.write_text(json.dumps(done))
        for name, runs in kept.items():
            values = [r["accuracy"] for r in runs.values()]
            print(f"{cell.name:40} {name:22} {statistics.mean(values):.3f}", flush=True)
    return done


# ------------------------------------------------------------------ the price


def timed(quick: bool) -> dict[str, Any]:
    """Milliseconds of a step: forward, backward, AdamW; batch 32, queue 4,096 and full; the arms in turn."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for encoder in ("adapter", "efficientnet-lite0, 96 px"):
        steps: dict[str, Callable[[], None]] = {}
        for name in ("cross-entropy", "SupCon", "FoPro", "CAPro", "FoPro official"):
            steps[name] = stepper(name, whole=encoder != "adapter")
        times: dict[str, list[float]] = {name: [] for name in steps}
        rounds = (40 if encoder == "adapter" else 9) if not quick else 4
        for n in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if n >= 2:  # the first two warm up
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
        plain = medians["cross-entropy"]
        found[encoder] = {n: {"ms": round(m, 2), "of cross-entropy": round(m / plain, 3)} for n, m in medians.items()}
        print(encoder, found[encoder], flush=True)
    return found


def stepper(name: str, whole: bool) -> Callable[[], None]:
    """One training step of an arm on random rows, its queue full, in its last phase."""
    batch, classes, width = 32, 10, 1280
    model: Any = Adapter(width, 256)
    x = torch.randn(batch, width)
    if whole:
        network: Any = encoders.image_network(base_folder("efficientnet-lite0"))
        for part, parameter in network.named_parameters():
            parameter.requires_grad_(not part.startswith("_fc."))
        model, x = ImageFeatures(network.train()), torch.randn(batch, 3, 96, 96)
    official = name.endswith("official")
    loss: Any
    if name == "cross-entropy":
        loss = LinearLoss(classes, width)
    elif name == "SupCon":
        loss = SupCon(classes, width)
    else:
        kind = CAPro if name == "CAPro" else FoPro
        loss = kind(classes, width, model, queue=4096, official=official)
        loss.bank.of_means(torch.randn(40, 128), torch.arange(40) % classes)
        loss.phase.fill_(len(loss.starts))
        loss.queue.push(unit(torch.randn(4096, 128)), torch.arange(1000, 5096)[:, None])
    key = "pixel_values" if whole else "features"
    given = {
        key: x,
        "strong": x.flip(-1),
        "labels": torch.arange(batch) % classes,
        "rows": torch.arange(batch),
        "clean": torch.zeros(batch, dtype=torch.bool),
    }
    trained = [p for m in (model, loss) for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    count = [0]

    def step() -> None:
        count[0] += 1
        optimiser.zero_grad()
        loss.begin_step(count[0], 100)
        total, n = loss(Outputs(features=model(given[key]).features), given)
        (total / n).backward()
        optimiser.step()

    return step


def markdown(result: dict[str, Any]) -> str:
    """The tables of the documentation."""

    def cell(runs: dict[str, Any] | None, key: str, sd: bool = True) -> str:
        values = [100 * r[key] for r in (runs or {}).values() if key in r]
        if not values:
            return ""
        mean = statistics.mean(values)
        return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if sd and len(values) > 1 else f"{mean:.0f}"

    lines = []
    names = [c.name for c in CELLS if c.name in result["cells"]]
    lines += ["| accuracy | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for arm in ARMS:
        lines.append(f"| {arm} | " + " | ".join(cell(result["cells"][n].get(arm), "accuracy") for n in names) + " |")
    lines += ["", "| distrusted: precision / recall; relabelled right | " + " | ".join(names) + " |"]
    lines.append("| --- |" + " --- |" * len(names))
    for arm in ("co-teaching", "confident learning", "SupCon", "FoPro", "CAPro", "CAPro, no text"):
        found = []
        for n in names:
            runs = result["cells"][n].get(arm)
            parts = [cell(runs, k, sd=False) for k in ("precision", "recall", "relabelled_right", "chosen_right")]
            found.append(
                f"{parts[0]} / {parts[1]}"
                + (f"; {parts[2]}" if parts[2] else "")
                + (f" ({parts[3]})" if parts[3] else "")
            )
        lines.append(f"| {arm} | " + " | ".join(found) + " |")
    for encoder, arms in result.get("time", {}).items():
        said = ", ".join(f"{a} {v['ms']:g} ms ({v['of cross-entropy']:g}×)" for a, v in arms.items())
        lines += ["", f"{encoder}: {said}"]
    return "\n".join([*lines, "", f"rates: {result['rates']}"])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("table", "time"))
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "residency-noisy-images")
    given = parser.parse_args()
    if given.show:
        print(markdown(json.loads(OUT.read_text())))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    if given.only != "time":
        w = world(given.work, given.quick)
        result |= {"data": w.name, **table(w, given.work, given.quick)}
    if given.only != "table":
        result["time"] = timed(given.quick)
    try:
        import cleanlab

        result["cleanlab"] = cleanlab.__version__
    except ModuleNotFoundError:
        result["cleanlab"] = None
    result["when"] = datetime.now(UTC).strftime("%Y-%m-%d")
    result["setting"] = {
        "noisy": NOISY, "test": TEST, "pixels": PIXELS, "views": VIEWS, "seeds": len(SEEDS), "epochs": PARAMS.epochs,
        "batch": PARAMS.batch, "torch": torch.__version__, "threads": 1,
    }  # fmt: skip
    if not given.quick:
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Dialogue states: how turns add up to them, and how often they are right.

A turn says of each slot none, "dontcare", or a value; the state of a dialogue starts empty, and whatever a turn says
that is not none overwrites it. A turn (or a state) is right when all of its slots are: joint accuracy, and joint goal
accuracy where it is taken of states (Henderson, Thomson & Williams, "The Second Dialog State Tracking Challenge",
SIGDIAL 2014). Values are compared as text, upper and lower case and runs of blanks aside, and not by where they stand:
a value copied from another place of the text is as good.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

CLASSES = ("none", "dontcare", "copy")
"""What a turn can say of a slot."""
State = dict[str, str]
"""Slot → value; "dontcare" is a value; a slot that is missing is none."""


def accumulate(dialogues: Sequence[Any], turns: Sequence[State]) -> list[State]:
    """The state after each turn, from what each turn says.

    Args:
        dialogues: Which dialogue a turn belongs to; turns of one follow one another.
        turns: What every turn says.
    """
    states: list[State] = []
    for i, said in enumerate(turns):
        before = states[-1] if i and dialogues[i] == dialogues[i - 1] else {}
        states.append(before | said)
    return states


def joint(predicted: Sequence[State], gold: Sequence[State], chosen: Iterable[int] | None = None) -> float:
    """Share of the (chosen) turns or states in which all slots are right, values compared as text; NaN without any."""
    picked = range(len(gold)) if chosen is None else list(chosen)
    right = [_plain(predicted[i]) == _plain(gold[i]) for i in picked]
    return sum(right) / len(right) if right else float("nan")


def per_class(predicted: Sequence[State], gold: Sequence[State], slots: Sequence[str]) -> dict[str, float]:
    """For each class, the share of its (turn, slot) pairs in which class and value are right; NaN without any."""
    right: dict[str, list[bool]] = {name: [] for name in CLASSES}
    for guess, truth in zip(map(_plain, predicted), map(_plain, gold), strict=True):
        for slot in slots:
            value = truth.get(slot, CLASSES[0])
            right[value if value in CLASSES else CLASSES[2]].append(guess.get(slot) == truth.get(slot))
    return {name: sum(found) / len(found) if found else float("nan") for name, found in right.items()}


def _plain(state: State) -> State:
    return {slot: " ".join(value.lower().split()) for slot, value in state.items()}

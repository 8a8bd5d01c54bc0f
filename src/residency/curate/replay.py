"""InsCL: which rows of the tasks learnt before to learn again beside a new one, so that they are not forgotten.

Tasks 1 … i − 1 have been learnt and task i is next. Every task is a set of instructions, each with its embedding and
its share of the task's rows; a row belongs to one instruction.

    W_j        cost of turning the instructions of task j into those of task i: optimal transport under 1 − cosine
    quota_j    (i − 1) α · W_j / Σ W, whole numbers that sum to (i − 1) α; what is left over goes to the largest W first
    InsInfo    of an instruction with tags t:  Σ_t log(N / f_t),  N instructions of tasks 1 … i, f_t of them tagged t
    rows       of task j with n_j instructions and quota m:  m < n_j: one row of each of the m highest InsInfo;
               else instruction k gets max(1, ⌊m · its share of the task's InsInfo⌋) rows at random, then rows are added
               or taken away at random, never an instruction's last one, until there are m

So **more is replayed of what is less like the new task**, and within a task of the instructions with many rare tags.

The paper's are the equations; its instructions come from Super-NaturalInstructions and its tags from GPT-4. Here tags
are whatever the caller has (`tagging.keywords` needs no model). Our choices: a quota never exceeds what a task has, and
what cannot be used goes to the others in proportion; equal distances (all 0 too) give equal quotas; an instruction
never gets more rows than it has; tasks whose InsInfo is 0 throughout share evenly; instructions of equal InsInfo are
taken by lot (from the seed and their text).

Paper: Wang, Liu, Shi et al., "InsCL: A Data-efficient Continual Learning Paradigm for Fine-tuning Large Language Models
with Instructions", NAACL 2024, arXiv 2403.11435. Official code: OPPO-Mente-Lab/InsCL @3ad357c (read for facts; it does
not run as published, and its quotas can exceed a task).

Cost: a transport problem per learnt task (`transport`), linear otherwise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency import transport
from residency.curate.scoring import Array, Selection, Selector

Tags = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Replayed(Selection):
    """What is replayed, and why so much of it.

    Args:
        indices: [n] rows, task by task, the less alike first.
        score: [N] InsInfo of every row's instruction.
        reasons: For every row, why it is replayed or not.
        distances: Task → W, by which quotas were made; 0 where quotas are equal by choice.
        quotas: Task → rows.
    """

    distances: dict[str, float]
    quotas: dict[str, int]


class Replay(Selector):
    """Rows of earlier tasks for a new one."""

    needs = (
        *("tasks", "instructions", "embeddings", "tags"),
        *("example_instructions", "example_embeddings", "example_tags"),
    )

    per_task: int = Field(200, ge=1)
    """α: rows per learnt task before they are dealt out anew by distance."""
    quota: Literal["transport", "equal"] = "transport"
    """Deal rows out by distance to the new task, or evenly."""
    rows: Literal["insinfo", "random"] = "insinfo"
    """Within a task: instructions with rare tags first, or any rows."""
    weights: Literal["frequency", "uniform"] = "frequency"
    """What an instruction weighs in the transport: its share of the task's rows, or as much as any other."""
    solver: Literal["exact", "sinkhorn"] = "exact"
    """Linear programming, or its smoothed form (for thousands of instructions)."""
    seed: int = Field(0, ge=0)
    """Of the random draws of rows."""

    def select(
        self,
        tasks: Sequence[str],
        instructions: Sequence[str],
        embeddings: NDArray[Any],
        tags: Tags,
        new_instructions: Sequence[str],
        new_embeddings: NDArray[Any],
        new_tags: Tags,
    ) -> Replayed:
        """Choose what to replay.

        Args:
            tasks: [N] the task of every row learnt before.
            instructions: [N] its instruction; rows with the same instruction have the same embedding and tags.
            embeddings: [N, D] of the instructions.
            tags: [N] of the instructions.
            new_instructions: [K] of the rows of the new task.
            new_embeddings: [K, D].
            new_tags: [K].

        Returns:
            The selection; deterministic.

        Raises:
            ValueError: When lengths differ, the new task is empty, or an embedding is not finite or all zeros.
        """
        for name, n, each in (
            ("task", len(tasks), (instructions, embeddings, tags)),
            ("new row", len(new_instructions), (new_embeddings, new_tags)),
        ):
            if any(len(x) != n for x in each):
                raise ValueError(f"every {name} needs an instruction, an embedding and tags, and their numbers differ")
        if not len(new_instructions):
            raise ValueError("the new task has no rows")
        info = insinfo([*instructions, *new_instructions], [*tags, *new_tags])[: len(tasks)]
        members = {task: np.flatnonzero([t == task for t in tasks]) for task in dict.fromkeys(tasks)}
        if self.quota == "equal":
            distances = dict.fromkeys(members, 0.0)
        else:
            new = self._weighted(new_instructions, new_embeddings)
            distances = {
                task: self._distance(self._weighted([instructions[i] for i in rows.tolist()], embeddings[rows]), new)
                for task, rows in members.items()
            }
        sizes = [len(rows) for rows in members.values()]
        dealt = quotas(list(distances.values()), self.per_task, sizes)
        shares = dict(zip(members, dealt, strict=True))

        reasons = np.full(len(tasks), "", object)
        chosen: list[int] = []
        for place, (task, rows) in sorted(enumerate(members.items()), key=lambda e: (-distances[e[1][0]], e[0])):
            said = f"{task}: {shares[task]:,} of {len(rows):,} rows"
            said += f", distance {distances[task]:.3f}" if self.quota == "transport" else ""
            reasons[rows] = f"dropped: not replayed ({said})"
            # a stream of random numbers per task: another task's rows do not change this one's
            rng = np.random.default_rng([self.seed, place])
            taken = rows[self._drawn(info[rows], [instructions[i] for i in rows.tolist()], shares[task], rng)]
            for i in taken.tolist():
                reasons[i] = f"kept: replayed (InsInfo {info[i]:.2f}; {said})"
            chosen += taken.tolist()
        return Replayed(np.array(chosen, np.int64), info, reasons.tolist(), distances=distances, quotas=shares)

    def _weighted(self, instructions: Sequence[str], embeddings: NDArray[Any]) -> tuple[NDArray[Any], Array]:
        """Different instructions' embeddings, and their weights."""
        counts = Counter(instructions)
        first = {text: i for i, text in reversed(list(enumerate(instructions)))}
        weights = [counts[text] if self.weights == "frequency" else 1 for text in counts]
        return np.asarray(embeddings)[[first[text] for text in counts]], np.array(weights, float)

    def _distance(self, old: tuple[NDArray[Any], Array], new: tuple[NDArray[Any], Array]) -> float:
        solve = transport.exact if self.solver == "exact" else transport.sinkhorn
        return max(0.0, solve(transport.cosine_costs(old[0], new[0]), old[1], new[1]))

    def _drawn(self, info: Array, instructions: Sequence[str], m: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Places of m rows of one task."""
        if self.rows == "random":
            return np.sort(rng.choice(len(info), m, replace=False))
        groups: dict[str, list[int]] = {}
        for i, text in enumerate(instructions):
            groups.setdefault(text, []).append(i)
        # among equals, not the first in the file: rows of one source stand together
        order = [groups[text] for text in sorted(groups, key=lambda t: (-info[groups[t][0]], _lot(self.seed, t)))]
        shuffled = [rng.permutation(group).tolist() for group in order]
        if m < len(order):
            return np.array([group[0] for group in shuffled[:m]], np.int64)
        scores = np.array([info[group[0]] for group in order])
        share = scores / scores.sum() if scores.sum() > 0 else np.full(len(order), 1 / len(order))
        sizes = np.array([len(group) for group in order])
        take = np.minimum(np.maximum(1, np.floor(share * m).astype(int)), sizes)
        while take.sum() != m:
            if take.sum() < m:
                unused = np.repeat(np.arange(len(order)), sizes - take)
                take[rng.choice(unused)] += 1
            else:
                spare = np.repeat(np.arange(len(order)), take - 1)
                take[rng.choice(spare)] -= 1
        return np.array([i for group, n in zip(shuffled, take, strict=True) for i in group[:n]], np.int64)


def _lot(seed: int, text: str) -> bytes:
    return blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def quotas(distances: Sequence[float], per_task: int, sizes: Sequence[int]) -> list[int]:
    """Rows of every task.

    Args:
        distances: W of every learnt task, at least 0.
        per_task: α.
        sizes: Rows every task has.

    Returns:
        Whole numbers, none above its task's size, that sum to α · tasks or to all there is.
    """
    w, room = np.asarray(distances, float), np.asarray(sizes, int)
    given = np.zeros(len(w), int)
    left = min(per_task * len(w), int(room.sum()))
    open_ = room > 0
    while left:
        share = np.where(open_, w, 0.0)
        if not share.sum() > 0:
            share = open_.astype(float)
        exact = left * share / share.sum()
        part = np.floor(exact + 1e-9).astype(int)
        full = open_ & (given + part > room)
        if full.any():
            # fill those first, then deal what is left out among the others
            left -= int((room - given)[full].sum())
            given[full] = room[full]
            open_ &= ~full
            continue
        given += part
        left -= int(part.sum())
        for j in sorted(np.flatnonzero(open_ & (given < room)), key=lambda j: (-share[j], j)):
            if not left:
                break
            given[j] += 1
            left -= 1
        open_ = given < room
    return given.tolist()


def insinfo(instructions: Sequence[str], tags: Tags) -> Array:
    """How informative the instruction of every row is.

    Args:
        instructions: [N] of rows; the same text is one instruction.
        tags: [N] its tags, the first row's where they differ.

    Returns:
        [N], at least 0.
    """
    own: dict[str, set[str]] = {}
    for text, its in zip(instructions, tags, strict=True):
        own.setdefault(text, set(its))
    times = Counter(tag for its in own.values() for tag in its)
    info = {text: sum(math.log(len(own) / times[tag]) for tag in sorted(its)) for text, its in own.items()}
    return np.array([info[text] for text in instructions])

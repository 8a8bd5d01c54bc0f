"""The polluted pool of `selection.py`: real questions and answers of MedQuAD, and five kinds of planted faults.

    clean           60 subjects (MedQuAD's foci) × 3 questions
    mismatched      a question with the answer to a question about another subject
    near-duplicate  copies of a few clean rows, with two words gone and two others swapped: a fluent reader sees that
    boilerplate     MedQuAD's own: "These resources address the diagnosis or management of …", a list of links
    off-topic       good answers about building permits and repairs (the embedded construction FAQ)
    word salad      the words of an answer in random order

Answers are cut at the end of a sentence after at most 45 words. MedQuAD answers whose first five words begin eight or
more answers are templates, and never count as clean. Trusted and held-out rows are clean, of subjects that the pool
does not have. A planted row without a question type and a source of its own (off-topic) claims those of a clean row.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from residency import embedded
from residency.rows import Row

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
FAULTS = ("mismatched", "near-duplicate", "boilerplate", "off-topic", "word salad")
WORDS, FEWEST, TEMPLATE, PER_SUBJECT = 45, 12, 8, 3
BOILERPLATE = "These resources address the diagnosis or management"


@dataclass(frozen=True)
class Pool:
    """What the benchmark works on.

    Args:
        rows: N rows, shuffled; `label` is the question type, `tag` question type and source.
        fault: [N] one of `FAULTS`, or "" for a clean row.
        subject: [N] the focus of a clean row or of the row that a near-duplicate copies, else "".
        trusted: K clean rows held apart.
        held_out: M clean rows held apart.
    """

    rows: list[Row]
    fault: list[str]
    subject: list[str]
    trusted: list[Row]
    held_out: list[Row]


def cut(text: str) -> str:
    """Whole sentences of at most `WORDS` words; "" where they are fewer than `FEWEST`."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if len(" ".join([*kept, sentence]).split()) > WORDS:
            break
        kept.append(sentence)
    result = " ".join(kept)
    return result if len(result.split()) >= FEWEST else ""


def make(subjects: int, per_fault: int, trusted: int, held_out: int, seed: int = 0) -> Pool:
    """A pool of subjects · 3 clean rows and per_fault rows of every fault."""
    file = DATA / "medquad.jsonl.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        raw = [json.loads(line) for line in handle]
    rng = random.Random(seed)
    rng.shuffle(raw)
    begins = Counter(" ".join(r["answer"].split()[:5]).lower() for r in raw)
    by_subject: dict[str, dict[str, dict[str, str]]] = {}
    met: set[str] = set()
    for r in raw:
        short = cut(r["answer"])
        if short and begins[" ".join(r["answer"].split()[:5]).lower()] < TEMPLATE and not {short, r["question"]} & met:
            met |= {short, r["question"]}
            by_subject.setdefault(r["focus"].lower(), {})[r["type"]] = {**r, "answer": short}
    rich = [list(found.values())[:PER_SUBJECT] for found in by_subject.values() if len(found) >= PER_SUBJECT]
    clean = [r for some in rich[:subjects] for r in some]
    tests = -(-held_out // PER_SUBJECT)
    held = [r for some in rich[subjects : subjects + tests] for r in some][:held_out]
    single = [rng.choice(some) for some in rich[subjects + tests :]]  # one question of every other subject
    if len(single) < trusted + 2 * per_fault:
        sys.exit(f"{len(rich)} subjects with {PER_SUBJECT} clean rows are too few for this pool")
    friends, asked, salad = single[:trusted], single[trusted:][:per_fault], single[trusted + per_fault :][:per_fault]
    used = {r["focus"].lower() for r in (*clean, *held, *friends, *asked, *salad)}

    planted: list[tuple[str, dict[str, str]]] = []
    for i, r in enumerate(asked):
        planted.append(("mismatched", {**r, "answer": asked[(i + 1) % len(asked)]["answer"]}))
    originals = rng.sample(clean, max(1, per_fault // 3))
    for i in range(per_fault):
        r = originals[i % len(originals)]
        planted.append(("near-duplicate", {**r, "answer": edited(r["answer"], rng)}))
    links = [r for r in raw if r["answer"].startswith(BOILERPLATE) and r["focus"].lower() not in used]
    planted += [("boilerplate", {**r, "answer": " ".join(r["answer"].split()[:WORDS])}) for r in links[:per_fault]]
    other = [{"question": r["instruction"], "answer": cut(r["output"])} for r in _construction()]
    other = [r for r in other if r["answer"]]
    for r in rng.sample(other, per_fault):
        claimed = rng.choice(clean)
        planted.append(("off-topic", {**r, "type": claimed["type"], "source": claimed["source"]}))
    for r in salad:
        words = r["answer"].split()
        rng.shuffle(words)
        planted.append(("word salad", {**r, "answer": " ".join(words)}))

    every = [("", r) for r in clean] + planted
    rng.shuffle(every)
    return Pool(
        [_row(f"row-{i}", r) for i, (_, r) in enumerate(every)],
        [fault for fault, _ in every],
        [r["focus"].lower() if fault in ("", "near-duplicate") else "" for fault, r in every],
        [_row(f"trusted-{i}", r) for i, r in enumerate(friends)],
        [_row(f"held-out-{i}", r) for i, r in enumerate(held)],
    )


def edited(text: str, rng: random.Random) -> str:
    """Two words gone, and two neighbours swapped."""
    words = text.split()
    for _ in range(2):
        del words[rng.randrange(1, len(words) - 1)]
    at = rng.randrange(1, len(words) - 2)
    words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def _construction() -> list[dict[str, str]]:
    rows = [*embedded.data("construction-faq/pool"), *embedded.data("construction-faq/test")]
    return [r for r in rows if not r["category"].startswith("chatter")]


def _row(name: str, r: dict[str, str]) -> Row:
    turns = (("user", r["question"]), ("assistant", r["answer"]))
    return Row(name, turns, label=r["type"], tag=f"{r['type']}, {r['source']}")

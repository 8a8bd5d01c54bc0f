"""WoZ 2.0 (Wen et al., EACL 2017; Mrkšić et al., ACL 2017; Apache-2.0) as rows with spans: what benchmarks read.

A row is a turn: {text, spans, dontcare, said, dialogue, copyable}; its text is what the system said, [SEP], what the
user said. The span of a value is its last occurrence, the user's side first. `copyable` is false where a value stands
nowhere in the text ("American" for "north american"): such turns cannot be trained on, but are examined.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("RESIDENCY_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data"))
SEPARATOR = " [SEP] "


def turns(split: str, slots: tuple[str, ...] = ("food",)) -> list[dict[str, Any]]:
    """The turns of "train", "validate" or "test"."""
    file = DATA / f"woz2_en_{split}.json.gz"
    if not file.exists():
        sys.exit(f"skipped: {file} is not there (set RESIDENCY_BENCH_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        dialogues = json.load(handle)
    return [
        _row(turn, slots, f"{split}-{dialogue['dialogue_idx']}")
        for dialogue in dialogues
        for turn in dialogue["dialogue"]
    ]


def _row(turn: dict[str, Any], slots: tuple[str, ...], dialogue: str) -> dict[str, Any]:
    system = turn["system_transcript"].strip()
    text = system + SEPARATOR + turn["transcript"].strip()
    user = len(system) + len(SEPARATOR)
    said = {slot: value.lower() for slot, value in turn["turn_label"] if slot in slots}
    spans = []
    for slot, value in said.items():
        found = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)]
        if value != "dontcare" and found:
            start, end = max(found, key=lambda place: (place[0] >= user, place[0]))
            spans.append({"slot": slot, "start": start, "end": end, "value": value})
    dontcare = [slot for slot, value in said.items() if value == "dontcare"]
    return {
        "text": text,
        "spans": spans,
        "dontcare": dontcare,
        "said": said,
        "dialogue": dialogue,
        "copyable": len(spans) + len(dontcare) == len(said),
    }

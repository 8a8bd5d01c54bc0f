"""What a draft brings on questions it has not learnt from: which guesses come true, and what that is in wall time.

Every decoder answers every question in turn, greedily and with packed weights: plain decoding on the same loop (the
baseline that isolates what drafting buys), the drafter, and where the lookup is wanted the lookup alone and both. A
table says where a step's time goes, figures which guesses were accepted; that all decoders give one answer is counted
and not assumed. Prompts are not in the rates, which are of decoding alone.

Our choice, all of it; the measures (tokens per step, wall time against plain decoding) are those of the papers.
Cost: two to four answers per question.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from residency.infer.drafted import Drafted
from residency.infer.drafter import Drafter
from residency.infer.draftstats import DraftStats
from residency.infer.lookup import PromptLookup, WithLookup
from residency.infer.tree import TreePolicy
from residency.measure import now
from residency.packed import packed
from residency.progress import Progress


@dataclass(frozen=True)
class Comparison:
    """Decoders on the same questions.

    Args:
        chosen: The decoder a recipe leaves behind.
        stats: Decoder → what it did, over all questions.
        seconds: Decoder → wall time, prompts included.
        same: Questions that the chosen decoder answers as plain decoding does.
        questions: How many there were.
        head_ms: Milliseconds of one LM head at one position, over the draft vocabulary and over all tokens.
    """

    chosen: str
    stats: dict[str, DraftStats]
    seconds: dict[str, float]
    same: int
    questions: int
    head_ms: dict[str, float]

    @property
    def found(self) -> DraftStats:
        """What the chosen decoder did."""
        return self.stats[self.chosen]

    def measured(self) -> dict[str, Any]:
        """For a step's record, with a table."""
        return {
            "decode_tokens_per_second": {name: round(_rate(s), 2) for name, s in self.stats.items()},
            "seconds_with_prompts": {name: round(s, 3) for name, s in self.seconds.items()},
            "same_answers": f"{self.same} of {self.questions}",
            "head_ms": self.head_ms,
            "figures": [self._table()],
        }

    def _table(self) -> dict[str, Any]:
        plain = max(_rate(self.stats["plain"]), 1e-9)
        lines = []
        for name, s in self.stats.items():
            steps, rate = max(1, s.steps), _rate(s)
            row = [name, round(s.tokens_per_step, 2), round(s.nodes / steps, 1)]
            row += [round(1e3 * s.decode_seconds / steps, 1), round(1e3 * s.draft_seconds / steps, 1)]
            lines.append([*row, round(rate, 1), round(rate / plain, 2)])
        columns = ["tokens per step", "nodes per step", "ms per step", "of it drafting", "tokens/s", "× plain"]
        return {
            "kind": "table",
            "title": "Decoding with and without the draft, on held-out questions",
            "columns": ["", *columns],
            "rows": lines,
            "note": f"One LM head at one position: {self.head_ms['draft vocabulary']} ms over the draft vocabulary, "
            f"{self.head_ms['all tokens']} ms over all tokens. Same answers: {self.same} of {self.questions}.",
        }


def compare(
    model: Any,
    drafter: Drafter,
    tree: TreePolicy,
    prompts: Sequence[Sequence[int]],
    *,
    name: str,
    lookup: bool,
    new_tokens: int,
    ends: Sequence[int],
    progress: Progress,
) -> Comparison:
    """Answer questions with and without a draft.

    Args:
        model: The target, on its device.
        drafter: Trained; brought to the model's precision here.
        tree: To decode with.
        prompts: Token ids of the questions.
        name: Of the drafter, for the record.
        lookup: Whether the recipe joins the lookup to it.
        new_tokens: Longest answer.
        ends: Tokens that end one.
        progress: Told about every answer.
    """
    drafter.to(model.dtype).attach(model)
    arms = {"plain": Drafted(None), name: Drafted(drafter, tree)}
    if lookup:
        arms |= {"lookup alone": Drafted(PromptLookup()), "both": Drafted(WithLookup(drafter), tree)}
    chosen = "both" if lookup else name
    texts: dict[str, list[list[int]]] = {arm: [] for arm in arms}
    seconds = dict.fromkeys(arms, 0.0)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": list(ends) or None}
    settings["pad_token_id"] = (list(ends) or [0])[0]
    with packed(model, rough=drafter.parts()), progress.task("measuring", len(arms) * len(prompts)) as advance:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            for arm, decode in arms.items():
                began = time.perf_counter()
                said = model.generate(ids, custom_generate=decode, attention_mask=torch.ones_like(ids), **settings)
                seconds[arm] += time.perf_counter() - began
                texts[arm].append(said[0].tolist())
                advance(1)
        heads = head_ms(model, drafter)
    same = sum(a == b for a, b in zip(texts["plain"], texts[chosen], strict=True))
    return Comparison(chosen, {arm: decode.stats for arm, decode in arms.items()}, seconds, same, len(prompts), heads)


def head_ms(model: Any, drafter: Drafter) -> dict[str, float]:
    """Milliseconds of one LM head at one position: over the draft vocabulary, and over all tokens."""
    head = model.get_output_embeddings()
    x = torch.zeros(1, 1, head.weight.shape[1], device=head.weight.device, dtype=head.weight.dtype)
    found = {}
    with torch.inference_mode():
        for name, call in (("draft vocabulary", drafter.logits), ("all tokens", head)):
            times = []
            for _ in range(6):
                began = now(x.device)
                call(x)
                times.append(now(x.device) - began)
            found[name] = round(1e3 * statistics.median(times[1:]), 3)
    return found


def accepted(stats: DraftStats) -> list[dict[str, Any]]:
    """Figures: how many guesses a step took, and how often the guess at each position came true."""
    most = max([*stats.lengths, *stats.offered, 1])
    positions = [level for level in range(1, most + 1) if stats.offered.get(level)]
    steps = max(1, stats.rows)
    share = [round(stats.accepted.get(level, 0) / steps, 4) for level in positions]
    given = [
        round(stats.accepted.get(level, 0) / max(1, stats.accepted.get(level - 1, 0) if level > 1 else steps), 4)
        for level in positions
    ]
    figures: list[dict[str, Any]] = [
        {
            "kind": "bars",
            "title": "Guesses accepted per step",
            "xlabel": "guesses accepted",
            "ylabel": "share of steps",
            "x": [str(n) for n in range(most + 1)],
            "y": [round(stats.lengths.get(n, 0) / steps, 4) for n in range(most + 1)],
        }
    ]
    lines = [("this guess and all before it", share), ("this guess where those before it did", given)]
    if positions:
        figures.append(
            {
                "kind": "lines",
                "title": "Guesses that came true, by position",
                "xlabel": "tokens after the last certain one",
                "ylabel": "share of steps",
                "series": [{"name": name, "x": positions, "y": y} for name, y in lines],
            }
        )
    return figures


def _rate(stats: DraftStats) -> float:
    """Tokens per second behind the prompt."""
    return stats.tokens / max(stats.decode_seconds, 1e-9)

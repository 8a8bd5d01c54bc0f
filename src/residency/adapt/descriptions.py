"""What a label means, in a sentence: asked of any chat callable once and kept, with a fixed text to fall back on.

    said = Descriptions(folder, ask=chat, name="smollm2").of(["food_food", "parking"])

`ask` maps a prompt to an answer (text → text): a local model, an HTTP client, a lambda. Its answers are kept in one
JSON file per provider, replaced as a whole after every answer (a killed process loses the answer under way and nothing
else). An answer is used only for the very prompt it answered; with another prompt, the label is asked again. A call
that raises, or an answer without words, falls back and is noted in the file with its reason; the next use asks again.
Without `ask`, nothing is asked and every description is the fallback's: a text given for the label, or the template
with the label's readable name.

Describing categories with a language model to build better prototypes: Guan, Zhu, Bai, Wang, "Label-Guided Prompt for
Multi-label Few-shot Aspect Category Detection", 2024, arXiv 2407.20673; its prompt and its model are unknown, so
prompt, fallback and cleaning are our choice. Official code: none released. Cost: one call per label, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residency import store
from residency.adapt.episodes import readable
from residency.errors import StoreError

Ask = Callable[[str], str]

PROMPT = (
    'In customer reviews, some sentences are about the category "{label}". In one sentence, say what such sentences '
    "talk about and which words they use."
)
"""What is asked for each label."""
FALLBACK = "It is about {label}."
"""What is said of a label that nothing else describes."""


@dataclass(frozen=True)
class Description:
    """What is said of a label, and whence: an `answer`, a text that was `given`, or the `template`."""

    text: str
    source: Literal["answer", "given", "template"]
    error: str | None = None


class Descriptions:
    """Descriptions of labels from one provider.

    Args:
        folder: Where the provider's file stands; None keeps nothing.
        ask: The provider; None asks nobody.
        name: The provider's name, which is its file's.
        prompt: Text with {label}.
        given: Texts for labels, used where there is no answer.
        fallback: Text with {label}, used where there is nothing else.
        most: Longest description, in characters; an answer is cut at the end of a sentence where it has one.
    """

    def __init__(
        self,
        folder: Path | None = None,
        ask: Ask | None = None,
        *,
        name: str = "provider",
        prompt: str = PROMPT,
        given: Mapping[str, str] | None = None,
        fallback: str = FALLBACK,
        most: int = 400,
    ) -> None:
        for what, template in (("prompt", prompt), ("fallback", fallback)):
            if "{label}" not in template:
                raise ValueError(f"the {what} {template!r} does not say {{label}}")
        self.ask, self.name, self.prompt, self.fallback, self.most = ask, name, prompt, fallback, most
        self.given = dict(given or {})
        self.file = (
            None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or '_'}.json"
        )

    def of(self, labels: Sequence[str]) -> dict[str, Description]:
        """The description of each label, asking for those that are not kept.

        Raises:
            StoreError: When the file cannot be read or written.
        """
        kept: dict[str, Any] = {"provider": self.name, "answers": {}, "failed": {}}
        if self.file is not None and self.file.exists():
            kept |= _checked(store.read_json(self.file), self.file)
        return {label: self._one(label, kept) for label in dict.fromkeys(labels)}

    def _one(self, label: str, kept: dict[str, Any]) -> Description:
        prompt = self.prompt.replace("{label}", readable(label))
        found = kept["answers"].get(label)
        if found and found["prompt"] == prompt:
            return Description(found["text"], "answer")
        if self.ask is None:
            return self._fallback(label, None)
        try:
            answer = self.ask(prompt)
            if not isinstance(answer, str):
                raise TypeError(f"the answer is {type(answer).__name__}, not text")
            text = clean(answer, self.most)
            if not re.search(r"\w", text):
                raise ValueError("the answer has no words")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            kept["failed"][label] = reason
            self._keep(kept)
            return self._fallback(label, reason)
        kept["answers"][label] = {"prompt": prompt, "text": text}
        kept["failed"].pop(label, None)
        self._keep(kept)
        return Description(text, "answer")

    def _fallback(self, label: str, error: str | None) -> Description:
        if self.given.get(label, "").strip():
            return Description(clean(self.given[label], self.most), "given", error)
        return Description(self.fallback.replace("{label}", readable(label)), "template", error)

    def _keep(self, kept: dict[str, Any]) -> None:
        if self.file is not None:
            store.write_json(self.file, kept)


def _checked(kept: Any, file: Path) -> dict[str, Any]:
    """What a provider's file holds, if it has the form that this module writes."""
    parts = [kept.get(name) for name in ("answers", "failed")] if isinstance(kept, dict) else [None]
    entries = list(parts[0].values()) if isinstance(parts[0], dict) else [None]
    whole = all(isinstance(p, dict) for p in parts)
    if not whole or not all(isinstance(e, dict) and {"prompt", "text"} <= set(e) for e in entries):
        raise StoreError(
            "this file holds no descriptions", where=str(file), hint="delete it, and labels are asked again"
        )
    return kept


def clean(answer: str, most: int) -> str:
    """An answer on one line, at most `most` characters, ending with a whole sentence or else with a whole word."""
    text = " ".join(answer.encode("utf-8", "replace").decode("utf-8").split())
    if len(text) <= most:
        return text
    cut = text[:most]
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)", text[: most + 1])]
    return cut[: ends[-1]] if ends else cut.rsplit(" ", 1)[0]

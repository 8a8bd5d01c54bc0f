"""Talk to a specialist: the conversation, streamed piece by piece."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from residency import bases, decoding
from residency.errors import PlanError


class Chat:
    """One conversation with one model, greedy.

    Args:
        folder: The model's folder.
        name: What to call it.
        max_tokens: Longest answer.
        device: Where to compute.
    """

    def __init__(self, folder: Path, name: str, max_tokens: int = 256, device: str = "cpu") -> None:
        if (kind := bases.facts(folder).kind) != "causal-lm":
            raise PlanError(f"this specialist is a {kind}; only a language model can chat", where=str(folder))
        self.name, self.max_tokens, self.device = name, max_tokens, device
        self.tokenizer = bases.load_tokenizer(folder)
        self.model = bases.load_causal_lm(folder, device)
        self._fast = contextlib.ExitStack()  # for as long as the conversation lives, not anew for each answer
        self.options = self._fast.enter_context(decoding.prepared(folder, self.model))
        self.budget = decoding.has_budget(folder)
        self.turns: list[dict[str, str]] = []

    @classmethod
    def open(cls, folder: Path, *, base: bool = False, max_tokens: int = 256) -> Chat:
        """Open a run's specialist (or its base), or a model folder.

        Raises:
            StoreError, DataError: When there is no model.
        """
        from residency.compat import pick_device
        from residency.run import final_model, load_record

        if (folder / "config.json").exists():
            return cls(folder, folder.name, max_tokens, pick_device())
        record = load_record(folder)
        if base:
            found = Path(record["machine"]["measured"]["base_folder"])
            return cls(found, record["base"]["name"], max_tokens, pick_device())
        return cls(
            final_model(folder), f"{record['name']} (specialist of {record['base']['name']})", max_tokens, pick_device()
        )

    def forget(self) -> None:
        """Start a new conversation."""
        self.turns.clear()

    def _question_tokens(self, text: str, turn: str) -> int | None:
        """How many tokens at the end of a prompt are its question: from the turn's last paragraph on."""
        paragraph = turn.strip().rsplit("\n\n", 1)[-1].strip()
        at = text.rfind(paragraph) if paragraph else -1
        return len(self.tokenizer(text[at:], add_special_tokens=False)["input_ids"]) if at >= 0 else None

    def ask(self, question: str) -> Iterator[str]:
        """The answer, in pieces as they are generated."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        self.turns.append({"role": "user", "content": question})
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(turn["content"] + "\n" for turn in self.turns)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.device)
        options = dict(self.options)
        if self.budget:
            options["instruction_tokens"] = self._question_tokens(text, question)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        enough = threading.Event()

        class Enough(StoppingCriteria):
            """Stops the generation when nobody listens any more."""

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((len(input_ids),), enough.is_set(), device=input_ids.device)

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        input_ids=ids["input_ids"],
                        attention_mask=ids["attention_mask"],
                        max_new_tokens=self.max_tokens,
                        do_sample=False,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Enough()]),
                        pad_token_id=self.tokenizer.pad_token_id,
                        **options,
                    )
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        pieces: list[str] = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:  # also when the listener leaves before the end: the next answer must not meet this one
            enough.set()
            worker.join()
            said = "".join(pieces).strip()
            if failure and not said:
                self.turns.pop()
            else:
                self.turns.append({"role": "assistant", "content": said or "…"})
        if failure:
            raise failure[0]

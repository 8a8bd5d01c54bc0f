"""Cases of the infer stage: caches that forget. Baseline: a budget of everything is full attention."""

from __future__ import annotations

from typing import Any

from residency.testing.roles import Case
from residency.testing.tinyllama import tiny_llama


class CacheCase(Case):
    """A policy that holds the cache of a long prompt to a budget, inside transformers' own `generate`."""

    role = "Decoder"

    def decoder(self, budget: int, chunk: int) -> Any:
        """What `generate(custom_generate=…)` takes."""
        raise NotImplementedError("abstract: the decoder")

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        """Tokens kept, one list for the layer or one per key/value head, when the context is a single chunk.

        Args:
            attention: transformers' own probabilities [H, T, T] over context and instruction.
            context: Tokens of the context.
            budget: k.
        """
        raise NotImplementedError("abstract: the reference")

    def model(self, implementation: str = "sdpa") -> Any:
        """A tiny random Llama with grouped heads, in evaluation mode."""
        return tiny_llama(attn_implementation=implementation)

    def text(self, length: int, rows: int = 1) -> Any:
        """Random token ids [B, T]."""
        import torch

        return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(length))

    def check_degenerate_limit(self) -> None:
        """A budget of everything answers as full attention does."""
        model, ids = self.model(), self.text(50)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        mine = model.generate(ids, custom_generate=self.decoder(46, 8), instruction_tokens=4, **options)
        assert mine.tolist() == model.generate(ids, **options).tolist()

    def check_reference(self) -> None:
        """What is kept of a text read at once is what transformers' own attention says."""
        import torch

        model, ids = self.model("eager"), self.text(60)
        cache = self.decoder(20, 64).prefill(model, ids, instruction_tokens=6)
        with torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            assert cache.origins(layer)[0].tolist() == self.expected(attention[0], 54, 20), f"layer {layer}"

    def check_budget_is_kept(self) -> None:
        """Entries and bytes are what was promised, and do not grow with the text."""
        sizes = []
        for length in (120, 240):
            decoder = self.decoder(24, 8)
            cache = decoder.prefill(self.model(), self.text(length, 2), instruction_tokens=5)
            cache.check_budget(24, decoder.entries(5))
            assert cache.length == 24
            sizes.append(cache.nbytes())
        assert sizes[0] == sizes[1]

    def check_padding_and_batch(self) -> None:
        """A left-padded row of a batch is answered as it is alone."""
        import torch

        model, ids = self.model(), self.text(70, 2)
        mask = torch.ones_like(ids)
        mask[1, :33] = 0
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "instruction_tokens": 5}
        both = model.generate(ids, attention_mask=mask, custom_generate=self.decoder(20, 8), **options)
        alone = model.generate(ids[1:, 33:], custom_generate=self.decoder(20, 8), **options)
        assert both[1, 70:].tolist() == alone[0, 37:].tolist()

    def check_deterministic_and_pure(self) -> None:
        """Twice the same, and weights, attention kernel, mode and global random state stay as they were."""
        import torch

        model, ids = self.model(), self.text(90)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        state = torch.get_rng_state()
        caches = [self.decoder(20, 8).prefill(model, ids, instruction_tokens=5) for _ in range(2)]
        for one, two in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(one.keys, two.keys)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert model.config._attn_implementation == "sdpa"

    def check_half_precision(self) -> None:
        """bfloat16 and float16 stay finite over many moves."""
        import torch

        for dtype in (torch.bfloat16, torch.float16):
            model, ids = self.model().to(dtype), self.text(200)
            cache = self.decoder(16, 8).prefill(model, ids, instruction_tokens=5)
            with torch.no_grad():
                logits = model(**cache.inputs(ids[:, -5:])).logits
            assert torch.isfinite(logits.float()).all()

    def check_bad_input(self) -> None:
        """Prompts padded at the right, sizes below 1 and models without rotary positions are refused."""
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        from residency.errors import PlanError

        model, ids = self.model(), self.text(40)
        right = torch.ones_like(ids)
        right[:, -3:] = 0
        gpt2 = GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61, bos_token_id=0, eos_token_id=0)
        )
        for act in (
            lambda: self.decoder(0, 8),
            lambda: self.decoder(20, 0),
            lambda: model.generate(ids, attention_mask=right, custom_generate=self.decoder(20, 8), max_new_tokens=1),
            lambda: self.decoder(20, 8).prefill(gpt2, ids, instruction_tokens=4),
        ):
            try:
                act()
            except (ValueError, PlanError):
                continue
            raise AssertionError("accepted")


def _top(values: Any, count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda j: -float(values[j]))[:count])


class CitrusCase(CacheCase):
    """Reference: the mean over heads and instruction tokens of attention to the context."""

    name = "citrus"

    def decoder(self, budget: int, chunk: int) -> Any:
        from residency.infer.citrus import Citrus

        return Citrus(budget, chunk)

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        return [_top(attention[:, context:, :context].mean((0, 1)), budget)]


class StreamingCase(CacheCase):
    """Reference: the first four and the last k − 4."""

    name = "streaming-llm"

    def decoder(self, budget: int, chunk: int) -> Any:
        from residency.infer.evicting import Evicting
        from residency.infer.eviction import Streaming

        return Evicting(Streaming(), budget, chunk)

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        return [[*range(4), *range(context - budget + 4, context)]]


class H2OCase(CacheCase):
    """Reference: half the budget the most recent, half the largest sums of attention, per key/value head."""

    name = "h2o"

    def decoder(self, budget: int, chunk: int) -> Any:
        from residency.infer.evicting import Evicting
        from residency.infer.eviction import H2O

        return Evicting(H2O(), budget, chunk)

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        older = context - budget // 2
        sums = attention.unflatten(0, (2, 2)).mean(1).sum(1)  # [G, T]
        return [_top(row[:older], budget - budget // 2) + list(range(older, context)) for row in sums]


class TOVACase(CacheCase):
    """Reference: the mean over heads of the last token's attention."""

    name = "tova"

    def decoder(self, budget: int, chunk: int) -> Any:
        from residency.infer.evicting import Evicting
        from residency.infer.eviction import TOVA

        return Evicting(TOVA(), budget, chunk)

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        return [_top(attention[:, -1, :context].mean(0), budget)]


class SnapKVCase(CacheCase):
    """Reference: the instruction's attention, averaged over five neighbours, per key/value head."""

    name = "snapkv"

    def decoder(self, budget: int, chunk: int) -> Any:
        from residency.infer.evicting import Evicting
        from residency.infer.eviction import SnapKV

        return Evicting(SnapKV(), budget, chunk)

    def expected(self, attention: Any, context: int, budget: int) -> list[list[int]]:
        import torch

        share = attention.unflatten(0, (2, 2)).mean(1)[:, context:, :context].mean(1)
        wide = torch.nn.functional.pad(share, (2, 2))
        return [_top(wide.unfold(1, 5, 1).mean(2)[g], budget) for g in range(2)]

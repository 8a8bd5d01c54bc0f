"""Cases of the infer stage: drafters. Baseline: plain greedy decoding, which none of them may change."""

from __future__ import annotations

from typing import Any

from residency.testing.roles import Case
from residency.testing.tinyllama import tiny_llama


class DrafterCase(Case):
    """A drafter inside transformers' own `generate`."""

    role = "Decoder"

    def drafter(self, model: Any) -> Any:
        """The drafter for a model, untrained."""
        assert self.row is not None
        return self.row.load()(model)

    def model(self) -> Any:
        """A tiny random Llama with grouped heads whose greedy text does not loop at once."""
        return tiny_llama()

    def prompts(self) -> tuple[Any, Any]:
        """Three prompts [3, 8], padded on the left, and their mask."""
        import torch

        ids = torch.randint(1, 61, (3, 8), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        for row, pads in enumerate((0, 5, 2)):
            ids[row, :pads], mask[row, :pads] = 0, 0
        return ids, mask

    def trees(self) -> list[Any]:
        """Shapes of guesses."""
        from residency.infer.tree import DynamicTree, StaticTree

        return [DynamicTree(budget=5), StaticTree(), StaticTree.chain(2)]

    def check_greedy_is_unchanged(self) -> None:
        """Whatever is drafted, greedy text is that of transformers, alone and in padded batches."""
        import torch

        from residency.infer.drafted import Drafted

        model, (ids, mask) = self.model(), self.prompts()
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        for tree in self.trees():
            decode = Drafted(self.drafter(model), tree)
            mine = model.generate(ids, attention_mask=mask, custom_generate=decode, **options)
            assert torch.equal(mine, model.generate(ids, attention_mask=mask, **options))
            alone = model.generate(ids[:1], custom_generate=decode, **options)
            assert torch.equal(alone, model.generate(ids[:1], **options))
            assert decode.stats.tokens >= decode.stats.rows

    def check_batches_do_not_matter(self) -> None:
        """A row's guesses, and so its steps, are the same alone and among others."""
        from residency.infer.drafted import Drafted

        model, (ids, mask) = self.model(), self.prompts()
        options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        drafter = self.drafter(model)
        for tree in self.trees():
            whole, parts = Drafted(drafter, tree), Drafted(drafter, tree)
            model.generate(ids, attention_mask=mask, custom_generate=whole, **options)
            for row in range(len(ids)):
                real = ids[row : row + 1, int((mask[row] == 0).sum()) :]
                model.generate(real, custom_generate=parts, **options)
            assert whole.stats.lengths == parts.stats.lengths
            assert whole.stats.rows == parts.stats.rows

    def check_nothing_is_left_behind(self) -> None:
        """The target has its weights, hooks and forward functions as before."""
        from residency.infer.drafted import Drafted

        model, (ids, mask) = self.model(), self.prompts()
        before = {name: p.clone() for name, p in model.named_parameters()}
        model.generate(ids, attention_mask=mask, custom_generate=Drafted(self.drafter(model)), max_new_tokens=4)
        assert all(bool((p == before[name]).all()) for name, p in model.named_parameters())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class TrainedDrafterCase(DrafterCase):
    """A drafter with parameters."""

    def check_gradients(self) -> None:
        """Training reaches every parameter of the drafter and none of the target."""
        import torch

        from residency.infer.draftloss import DraftLoss, collate_thoughts, record
        from residency.objective import Outputs
        from residency.tokens import Encoded

        model = self.model()
        drafter = self.drafter(model).attach(model)
        ids = tuple(torch.randint(1, 61, (14,), generator=torch.Generator().manual_seed(2)).tolist())
        batch = collate_thoughts(record(model, [Encoded("a", ids[:3], ids[3:])], 0), 0)
        total, _ = DraftLoss(drafter)(Outputs(), batch)
        total.backward()
        bare = [name for name, p in drafter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not bare, f"no gradient: {bare}"
        assert all(p.grad is None for p in model.parameters())

    def check_saved_and_loaded(self) -> None:
        """A draft that is saved and loaded guesses the same."""
        import tempfile
        from pathlib import Path

        from residency.infer import saveddraft
        from residency.infer.drafted import Drafted
        from residency.infer.tree import DynamicTree

        model, (ids, mask) = self.model(), self.prompts()
        sizes: dict[str, Any] = {"heads": 3}
        drafter = saveddraft.make(self.name, model, sizes, None).attach(model)
        first = Drafted(drafter, DynamicTree(5))
        with tempfile.TemporaryDirectory() as folder:
            saveddraft.save(Path(folder), drafter, self.name, sizes, DynamicTree(5))
            second = saveddraft.load(Path(folder), model)
        for decode in (first, second):
            model.generate(ids, attention_mask=mask, custom_generate=decode, max_new_tokens=12, do_sample=False)
        assert first.stats.lengths == second.stats.lengths


class Clover2Case(TrainedDrafterCase):
    """Clover-2."""

    name = "clover-2"

    @property
    def params(self) -> Any:
        """Its sizes."""
        from residency.infer.clover import CloverParams

        return CloverParams


class CloverCase(Clover2Case):
    """Clover."""

    name = "clover"


class MedusaCase(TrainedDrafterCase):
    """Medusa."""

    name = "medusa"

    @property
    def params(self) -> Any:
        """Its sizes."""
        from residency.infer.medusa import MedusaParams

        return MedusaParams


class PromptLookupCase(DrafterCase):
    """Prompt lookup."""

    name = "prompt-lookup"

    def drafter(self, model: Any) -> Any:
        """See `DrafterCase.drafter`."""
        from residency.infer.lookup import PromptLookup

        return PromptLookup()

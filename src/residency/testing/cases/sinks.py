"""The case of the attention diagnostics."""

from __future__ import annotations

from typing import Any

from residency.testing.roles import Case


class DiagnosticCase(Case):
    """A look into a model that changes nothing: measures [L, H] of texts."""

    role = "Diagnostic"

    def model(self) -> Any:
        """A tiny random decoder in evaluation mode."""
        raise NotImplementedError("abstract: the model")

    def measure(self, model: Any, batches: list[dict[str, Any]]) -> Any:
        """The measures of some batches."""
        raise NotImplementedError("abstract: the diagnostic")

    def watched(self, model: Any, batch: dict[str, Any]) -> Any:
        """The model's logits while the diagnostic looks on."""
        raise NotImplementedError("abstract: the probe")

    def reference(self, model: Any, texts: list[Any]) -> Any:
        """The measures, computed independently, text by text."""
        raise NotImplementedError("abstract: the reference")

    def _texts(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """Three texts, and batches of them padded on the left and on the right."""
        import torch

        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(3, 61, (n,), generator=generator) for n in (21, 13, 17)]
        batches = []
        for left in (True, False):
            ids = torch.zeros(3, 21, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, text in enumerate(texts):
                where = slice(21 - len(text), 21) if left else slice(0, len(text))
                ids[i, where], mask[i, where] = text, 1
            batches.append({"input_ids": ids, "attention_mask": mask})
        return texts, batches

    def check_reference(self) -> None:
        """The measures equal an independent computation."""
        import torch

        texts, batches = self._texts()
        expected = self.reference(self.model(), texts)
        for batch in batches:
            torch.testing.assert_close(self.measure(self.model(), [batch]), expected, rtol=1e-5, atol=1e-6)

    def check_batches_and_order(self) -> None:
        """Texts one by one, in another order, give the same."""
        import torch

        texts, batches = self._texts()
        whole = self.measure(self.model(), batches[:1])
        apart = self.measure(self.model(), [{"input_ids": text[None]} for text in reversed(texts)])
        torch.testing.assert_close(apart, whole, rtol=1e-5, atol=1e-6)

    def check_logits_untouched(self) -> None:
        """The logits are bit for bit those of the model alone, during and after, and no hook stays."""
        import torch

        model, batch = self.model(), self._texts()[1][0]
        with torch.no_grad():
            before = model(**batch).logits
            assert torch.equal(self.watched(model, batch), before)
            self.measure(model, [batch])
            assert torch.equal(model(**batch).logits, before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class AttentionSinksCase(DiagnosticCase):
    """Reference: transformers' eager attention weights and the norms of W_O^h V, head by head."""

    name = "attention-sinks"

    def model(self) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=24, intermediate_size=32, **sizes)).eval()
        for parameter in model.base_model.layers.parameters():
            if parameter.ndim > 1:
                parameter.data *= 10
        return model

    def measure(self, model: Any, batches: list[dict[str, Any]]) -> Any:
        import torch

        from residency.evaluate.sinks import diagnose

        found = diagnose(model, batches)
        return torch.stack([found.sink_mass, found.value_ratio])

    def watched(self, model: Any, batch: dict[str, Any]) -> Any:
        from residency.evaluate.sinks import SinkProbe

        with SinkProbe(model):
            return model(**batch).logits

    def reference(self, model: Any, texts: list[Any]) -> Any:
        import torch

        model.set_attn_implementation("eager")
        queries = sum(len(text) - 8 for text in texts)
        others = sum(len(text) - 1 for text in texts)
        mass, first, rest = (torch.zeros(2, 4, dtype=torch.float64) for _ in range(3))
        for text in texts:
            with torch.no_grad():
                out = model(text[None], output_attentions=True, output_hidden_states=True)
                for layer, part in enumerate(model.base_model.layers):
                    mass[layer] += out.attentions[layer][0, :, 8:, 0].double().sum(1)
                    v = part.self_attn.v_proj(part.input_layernorm(out.hidden_states[layer]))[0]
                    for h in range(4):
                        w = part.self_attn.o_proj.weight[:, 6 * h : 6 * h + 6]
                        norms = (v[:, 6 * (h // 2) : 6 * (h // 2) + 6] @ w.T).norm(dim=-1).double()
                        first[layer, h] += norms[0]
                        rest[layer, h] += norms[1:].sum()
        return torch.stack([mass / queries, first / len(texts) / (rest / others)])

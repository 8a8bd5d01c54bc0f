"""Recipe step of the infer stage: `draft`, a drafter trained on what the model itself says, saved beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from residency.errors import DataError, PlanError
from residency.infer.families import config_of, undraftable
from residency.step import Forecast, Job, Outcome, State, Step, require_kind
from residency.trainparams import TrainParams, activation_bytes

PAPER_LAYERS = {"clover-2": 2, "clover": 1}
HELD_OUT = 8
"""Every eighth row's question is not trained on but drafted for at the end."""


class DraftParams(TrainParams):
    """Keys of `draft`."""

    method: Literal["clover-2", "clover", "medusa"] = "clover-2"
    """Which drafter."""
    heads: int = Field(4, ge=1, le=16)
    """How many tokens ahead it learns to guess."""
    layers: int | None = Field(None, ge=1, le=8)
    """Decoder layers of Clover's augmenting block; by default the paper's, 2 for clover-2 and 1 for clover."""
    vocabulary: int | None = Field(4096, ge=16)
    """Tokens that may be guessed, the most frequent ones of the training texts; null for all of them."""
    text: Literal["self", "rows"] = "self"
    """What it is trained on: answers the model writes to the rows' questions, or the rows' own answers."""
    samples: int = Field(1, ge=1)
    """Answers the model writes to each question, one greedy, the others at temperature 0.8. Read by text: self."""
    new_tokens: int = Field(96, ge=4)
    """Longest answer it writes. Read by text: self."""
    epochs: float = Field(6.0, gt=0, le=1000)
    """Passes over the texts."""
    learning_rate: float = Field(1e-3, gt=0, le=1)
    """Peak learning rate of AdamW over the drafter's weights; a cosine to zero after the warm-up."""
    clip: float = Field(0.5, gt=0)
    """Largest norm of the gradient."""
    nodes: int = Field(8, ge=1, le=64)
    """Guesses per step, at most; those of the lookup come on top."""
    least: float = Field(0.0, ge=0, lt=1)
    """Guesses on a path less probable than this are not worth the target's time."""
    lookup: bool = True
    """Whether what the text itself said after the same words joins the guesses, at the price of a few nodes."""
    measure: int = Field(6, ge=1)
    """Held-out questions on which acceptance and speed are measured."""

    @model_validator(mode="after")
    def _belong(self) -> DraftParams:
        if self.layers is not None and self.method == "medusa":
            raise ValueError("`layers` belongs to the Clovers; medusa has none")
        if self.text == "rows" and (unread := self.model_fields_set & {"samples", "new_tokens"}):
            raise ValueError(f"`{sorted(unread)[0].replace('_', '-')}` belongs to text: self")
        return self

    def sizes(self) -> dict[str, Any]:
        """What the drafter is made of."""
        if self.method == "medusa":
            return {"heads": self.heads}
        return {"heads": self.heads, "layers": self.layers or PAPER_LAYERS[self.method]}


class Draft(Step):
    """Train a drafter for the model as it is; the model's files stay as they are."""

    Params = DraftParams
    params: DraftParams
    gives = frozenset({"model"})
    beside = True

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return self.params.method

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"draft · {self.params.method}, up to {self.params.nodes} guesses"

    def tiny(self) -> Draft:
        """See `Step.tiny`."""
        update: dict[str, Any] = {"max_steps": 2, "batch": 4, "max_tokens": 1024, "new_tokens": 6, "measure": 1}
        update |= {"samples": 1, "vocabulary": self.params.vocabulary and 64}
        return Draft(self.params.model_copy(update=update))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "draft")
        p, model = self.params, state.model
        if (reason := undraftable(config_of(model.architecture, model.tokenizer_folder))) is not None:
            raise PlanError(
                f"this model cannot be drafted for: {reason}",
                hint="supported are llama-like decoders with full attention: llama, smollm, qwen2, qwen3",
            )
        words = min(p.vocabulary or model.vocabulary, model.vocabulary)
        per_layer = model.layer_parameters / max(1, model.layers)
        own = 6 * model.hidden**2 + per_layer * p.sizes().get("layers", 0)
        per_token = 6 * (own + p.heads * (2 * model.hidden**2 + 2 * words * model.hidden))
        texts = state.rows * (p.samples if p.text == "self" else 1)
        passed = p.max_steps * p.batch * p.accumulate if p.max_steps else texts * p.epochs
        written = texts * p.new_tokens if p.text == "self" else 0
        flops = passed * state.tokens_per_row * per_token
        flops += (texts * state.tokens_per_row + 2 * written) * model.flops_per_token()
        flops += 3 * p.measure * p.new_tokens * 8 * model.flops_per_token()
        peak = 8 * model.parameters + 16 * own + 4 * model.hidden * texts * state.tokens_per_row
        peak += activation_bytes(replace(state, model=model.with_layers(2)), p.batch)
        note = f"about {own / 1e6:.0f} million parameters beside {model.parameters / 1e6:.0f}"
        return Forecast(state, flops=flops, peak_bytes=int(peak), notes=(note,))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        import torch

        from residency import bases, rows, store, tokens, train
        from residency.compat import fast_bf16
        from residency.infer import draftcost, saveddraft
        from residency.infer.drafted import check
        from residency.infer.drafter import frequent_tokens
        from residency.infer.draftloss import DraftLoss, DraftWeights, collate_thoughts, record
        from residency.infer.tree import DynamicTree

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        items, refused = tokens.encode_all(rows.load(job.rows), tokenizer, p.max_tokens)
        job.quarantine += refused
        if not items:
            raise DataError("there are no rows to learn from", hint="check quarantine.jsonl for the reasons")
        model = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code).requires_grad_(False)
        check(model)
        _check_head(model, items[0])
        held = items[HELD_OUT - 1 :: HELD_OUT][: p.measure] or items[-1:]
        names = {item.id for item in held}
        learn = [item for item in items if item.id not in names] or items
        texts = self._texts(model, tokenizer, learn, job)
        if not (texts := [item for item in texts if len(item.answer) > 2 - min(2, len(item.prompt))]):
            raise DataError(
                "the model's own answers are too short to learn from",
                hint="text: rows trains on the rows' answers instead",
            )
        ids = None
        if p.vocabulary is not None:
            seen = [[*item.prompt, *item.answer] for item in (*texts, *learn)]
            size = model.get_output_embeddings().weight.shape[0]
            ids = frequent_tokens(seen, p.vocabulary, size, always=_ends(model, tokenizer)).to(job.device)
        torch.manual_seed(job.seed)
        drafter = saveddraft.make(p.method, model, p.sizes(), ids).to(torch.float32)
        soft = p.method == "clover-2"  # the others learn the text's tokens, as published
        weights = DraftWeights() if soft else DraftWeights(value=0.0, soft=False)
        bf16 = p.precision == "bfloat16" or (p.precision == "auto" and fast_bf16(job.device))
        pad = tokenizer.pad_token_id
        log = train.fit(
            drafter.attach(model),
            DraftLoss(drafter, weights, autocast=bf16),
            record(model, texts, pad, job.progress),
            p,
            pad=pad,
            collator=lambda batch: collate_thoughts(batch, pad),
            scratch=job.scratch,
            seed=job.seed,
            device=job.device,
            progress=job.progress,
            label="learning to draft",
        )
        drafter.eval().requires_grad_(False)
        tree = DynamicTree(budget=p.nodes, levels=p.heads, least=p.least)
        prompts, ends = [item.prompt for item in held], _ends(model, tokenizer)
        settings: dict[str, Any] = {"name": p.method, "lookup": p.lookup, "new_tokens": p.new_tokens, "ends": ends}
        compared = draftcost.compare(model, drafter, tree, prompts, **settings, progress=job.progress)
        target = job.out / "model"
        store.link_folder(job.model, target)
        if (target / saveddraft.FOLDER).exists():  # of an earlier draft step
            import shutil

            shutil.rmtree(target / saveddraft.FOLDER)
        saveddraft.save(target, drafter, p.method, p.sizes(), tree, lookup=p.lookup)
        own = sum(x.numel() for x in drafter.parameters())
        return Outcome(
            gives={"model": "model"},
            summary={
                "rows": len(items),
                "refused": len(refused),
                "texts": len(texts),
                "tokens": sum(len(item.answer) for item in texts),
                "draft_parameters": own,
                "draft_vocabulary": len(ids) if ids is not None else model.get_output_embeddings().weight.shape[0],
                "tokens_per_step": round(compared.found.tokens_per_step, 3),
                "optimiser_steps": log.steps,
                "loss_first": round(log.loss[0], 4),
                "loss_last": round(log.loss[-1], 4),
                "precision": log.precision,
            },
            figures=[*draftcost.accepted(compared.found), train.loss_figure(log, "loss per position")],
            measured=compared.measured(),
        )

    def _texts(self, model: Any, tokenizer: Any, items: list[Any], job: Job) -> list[Any]:
        """What is trained on; the texts the model has written survive a kill in `scratch`."""
        from residency import store, tokens

        p = self.params
        if p.text == "rows":
            return items
        from residency.infer.selftext import answers

        file: Path = job.scratch / "texts.json"  # batches as they are written: a killed step goes on with the next one
        batches = store.read_json(file) if file.exists() else []
        with job.progress.task("writing texts to learn from", len(items) * p.samples) as advance:
            advance(sum(map(len, batches)))
            for batch in answers(
                model,
                [item.prompt for item in items],
                new_tokens=p.new_tokens,
                pad=tokenizer.pad_token_id,
                ends=_ends(model, tokenizer),
                samples=p.samples,
                seed=job.seed,
                skip=len(batches),
            ):
                batches.append(batch)
                store.write_json(file, batches)
                advance(len(batch))
        return [
            tokens.Encoded(f"{items[i].id}/{n}", items[i].prompt, tuple(said))
            for n, (i, said) in enumerate(pair for batch in batches for pair in batch)
        ]


def _check_head(model: Any, item: Any) -> None:
    """Make sure that the model's distribution is its head applied to its last state: that is what a draft learns."""
    import torch

    from residency.objective import Head
    from residency.train import check_head

    head = model.get_output_embeddings()
    with torch.no_grad():
        out = model(torch.tensor([item.prompt], device=head.weight.device), output_hidden_states=True, logits_to_keep=1)
    check_head(Head(head.weight, getattr(head, "bias", None)), out.hidden_states[-1], out.logits)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({i for i in (*found, tokenizer.eos_token_id) if i is not None})

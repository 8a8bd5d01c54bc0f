"""The only training loop: the Hugging Face Trainer, driven by an `Objective` that returns (sum, count).

Before the first forward pass of an optimiser step the counts of all its micro-batches are added up, and every
micro-batch's sum is divided by that total. So batch 8 × 1, 4 × 2 and 2 × 4 give the same gradient whatever the
lengths of the rows, which a mean per micro-batch does not (Hugging Face transformers issue 34191).

Checkpoints are written by time, not by step, into a scratch folder; each is sealed by a manifest, and a resumed
training takes the newest whole one. On a CPU the weights at the end are those of the uninterrupted training, bit
for bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from residency import store
from residency.compat import fast_bf16, quiet_transformers
from residency.errors import DataError, ResidencyError
from residency.objective import Head, Objective, Outputs
from residency.progress import Progress
from residency.sampler import LengthGrouped
from residency.tokens import collate
from residency.trainparams import TrainParams

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "features")
"""Entries of a batch that are the model's; the others are the objective's."""
OBJECTIVE_FILE = "objective.safetensors"
"""What a checkpoint holds beside the model: the objective's parameters and buffers, and the rows of its epoch."""
EPOCH, ROWS = "the epoch begun", "the rows of that epoch"
"""Keys in that file; no parameter's name has spaces."""


@dataclass
class TrainLog:
    """What a training leaves besides the weights.

    Args:
        steps: Optimiser steps.
        loss: Mean loss per item at each step.
        learning_rate: At each step.
        tokens: Trained items in one epoch.
        precision: "float32" or "bfloat16".
        resumed_from: Step of the checkpoint this process started from, or None.
    """

    steps: int = 0
    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    tokens: int = 0
    precision: str = "float32"
    resumed_from: int | None = None


def fit(
    model: nn.Module,
    objective: Objective,
    items: Sequence[Any],
    params: TrainParams,
    *,
    pad: int,
    scratch: Path,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    label: str = "training",
    collator: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
    learning_rates: Mapping[str, float] | None = None,
) -> TrainLog:
    """Train `model` in place.

    Args:
        model: A `PreTrainedModel` or `PeftModel`; only parameters that require a gradient are trained.
        objective: The loss. Those of its own parameters that require a gradient are trained too.
        items: Encoded rows, each with at least one trained token; with a `collator`, anything that has a length.
        params: Optimiser settings.
        pad: Token id of the padding.
        scratch: Folder for checkpoints; what is whole there is resumed from. Remove it to start afresh.
        seed: Order of the rows and dropout.
        device: "cpu", "cuda" or "mps".
        progress: Where progress goes.
        label: What progress lines call it.
        collator: Makes a batch of items; by default the right-padded `input_ids`, `attention_mask`, `labels`.
        learning_rates: Part of a parameter's name → factor on the learning rate; the first that occurs in it counts.

    Returns:
        The log of losses.

    Raises:
        DataError: When there are no rows, or a row trains no token.
        ResidencyError: When the loss stops being a number.
    """
    if not items:
        raise DataError("there are no rows to train on", hint="check quarantine.jsonl for the reasons")
    collator = collator or partial(collate, pad=pad)
    # rows count as one each: no need to decode and change every picture for it
    counts = [1] * len(items) if objective.per_row else [objective.count(collator([item])) for item in items]
    if empty := [getattr(item, "id", f"row {i}") for i, item in enumerate(items) if not counts[i]]:
        raise DataError(f"{len(empty)} rows train no token", where=empty[0], hint="every row needs an answer")
    precision = params.precision
    if precision == "auto":
        precision = "bfloat16" if fast_bf16(device) else "float32"
    arguments = TrainingArguments(
        output_dir=str(scratch / "checkpoints"),
        num_train_epochs=params.epochs,
        max_steps=params.max_steps or -1,
        per_device_train_batch_size=params.batch,
        gradient_accumulation_steps=params.accumulate,
        learning_rate=params.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=params.warmup if params.warmup < 1 else 0.999999,
        weight_decay=params.weight_decay,
        max_grad_norm=params.clip,
        bf16=precision == "bfloat16",
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        average_tokens_across_devices=False,
        optim="adamw_torch",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are accelerate's business, not DataParallel's
    progress = progress or Progress()
    log = TrainLog(precision=precision, tokens=sum(counts))
    with quiet_transformers():
        trainer = _ObjectiveTrainer(
            objective,
            learning_rates or {},
            model=model,
            args=arguments,
            train_dataset=list(items),
            data_collator=collator,
        )
        checkpoint = _newest_whole(scratch / "checkpoints", progress)
        log.resumed_from = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None
        trainer.remove_callback(
            next(type(c) for c in trainer.callback_handler.callbacks if "Printer" in type(c).__name__)
        )
        watcher = _Watcher(trainer, progress, label, params.checkpoint_seconds, log.resumed_from or 0)
        trainer.add_callback(watcher)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            watcher.close()
        # accelerate leaves an autocast wrapper on model.forward; what is measured next must be the model itself
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    log.steps = trainer.state.global_step
    log.loss = [float(entry["loss"]) for entry in history]
    log.learning_rate = [float(entry["learning_rate"]) for entry in history]
    return log


def loss_figure(log: TrainLog, ylabel: str) -> dict[str, Any]:
    """The loss curve of a training, as a figure spec."""
    steps = list(range(1, len(log.loss) + 1))
    return {
        "kind": "lines",
        "title": "Training loss",
        "xlabel": "optimiser step",
        "ylabel": ylabel,
        "series": [{"name": "loss", "x": steps, "y": [round(v, 5) for v in log.loss]}],
    }


class _ObjectiveTrainer(Trainer):
    """The Trainer with our loss contract; nothing else of it is changed."""

    loss_is_scaled_for_ga = True
    objective: Objective

    def __init__(self, objective: Objective, learning_rates: Mapping[str, float], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.objective = objective.to(self.args.device)
        self.learning_rates = learning_rates
        self._head_checked = False
        self.begun = -1
        """The epoch for which the objective has been prepared, and the rows it chose."""
        self.chosen: list[int] | None = None
        self.sampler: LengthGrouped | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the parameters of model and objective, in groups of one weight decay and one learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            own = ((f"objective.{name}", p) for name, p in self.objective.named_parameters())
            for name, parameter in (*model.named_parameters(), *own):
                if parameter.requires_grad:
                    decay = self.args.weight_decay if name in decayed else 0.0
                    factor = next((f for part, f in self.learning_rates.items() if part in name), 1.0)
                    groups.setdefault((decay, factor), []).append(parameter)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            rate = settings.pop("lr")
            self.optimizer = kind(
                [{"params": p, "weight_decay": d, "lr": f * rate} for (d, f), p in groups.items()], lr=rate, **settings
            )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """One norm over all that is trained, the objective's own parameters among it."""
        assert self.optimizer is not None
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.objective.state_dict().items()}
        state[EPOCH] = torch.tensor(self.begun)
        if self.chosen is not None:
            state[ROWS] = torch.tensor(self.chosen)
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        save_file(state, folder / OBJECTIVE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = load_file(Path(resume_from_checkpoint) / OBJECTIVE_FILE, device=str(self.args.device))
        self.begun = int(state.pop(EPOCH))
        self.chosen = state.pop(ROWS).tolist() if ROWS in state else None
        self.objective.load_state_dict(state)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        count = self.objective.rows_per_epoch(len(rows))
        self.sampler = LengthGrouped([len(row) for row in rows], step, self.args.seed, count)
        self.sampler.chosen = self.chosen
        return self.sampler

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Let the objective prepare an epoch, once: what a resumed training finds prepared stays."""
        if epoch == self.begun:
            return
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(((self.args.seed + 1) << 20) + epoch)
            found = self.objective.begin_epoch(epoch, epochs, self.look)
        assert self.sampler is not None
        if found is not None and len(found) != len(self.sampler):
            raise ResidencyError(
                f"{type(self.objective).__name__} chose {len(found)} rows but announced {len(self.sampler)}"
            )
        self.begun, self.chosen = epoch, None if found is None else [int(i) for i in found]
        self.sampler.chosen = self.chosen

    def look(self) -> Iterator[tuple[Outputs, dict[str, Any]]]:
        """All rows in their order, as the model sees them now."""
        model, size = self.model_wrapped, max(32, self.args.train_batch_size)
        rows: Any = self.train_dataset
        assert isinstance(model, nn.Module)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                for start in range(0, len(rows), size):
                    part = [rows[i] for i in range(start, min(start + size, len(rows)))]
                    batch = dict(self._prepare_inputs(self.data_collator(part)))
                    yield self._forward(model, batch), batch
        finally:
            model.train(training)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = torch.tensor(sum(self.objective.count(batch) for batch in batches), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return batches, total

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        outputs = self._forward(model, batch)
        total, count = self.objective(outputs, batch)
        expected = self.objective.count(batch)
        if int(count) != expected:
            raise ResidencyError(f"{type(self.objective).__name__} summed {int(count)} items but announced {expected}")
        if not torch.isfinite(total):
            raise ResidencyError(
                f"the loss is {total.item()} at step {self.state.global_step + 1}",
                hint="lower learning-rate, or set precision: float32",
            )
        # DDP averages gradients over processes; the sum over all of them is wanted
        loss = total / num_items_in_batch.clamp(min=1) * max(1, self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, batch: dict[str, Any]) -> Outputs:
        given = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        if self.objective.wants == "nothing":
            return Outputs()
        if self.objective.wants == "features":
            return Outputs(features=model(**given).features)
        if self.objective.wants == "logits":
            if self.accelerator.unwrap_model(model).get_output_embeddings() is not None:
                given["use_cache"] = False
            return Outputs(logits=model(**given).logits)
        result = model(**given, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        embedding: Any = self.accelerator.unwrap_model(model).get_output_embeddings()
        head = Head(embedding.weight, getattr(embedding, "bias", None))
        hidden = result.hidden_states[-1]
        if not self._head_checked:
            check_head(head, hidden, result.logits)
            self._head_checked = True
        return Outputs(hidden=hidden, head=head)


def check_head(head: Head, hidden: Tensor, logits: Tensor) -> None:
    """Make sure that the model's logits are its head applied to its last hidden state, and nothing more.

    Args:
        head: The model's output embedding.
        hidden: [B, T, D].
        logits: [B, 1, V], the model's own, of the last position.

    Raises:
        ResidencyError: When they differ (a soft cap, a scale): losses that fuse the head would train another model.
    """
    with torch.no_grad():
        mine = head(hidden[:, -1:].to(head.weight.dtype)).float()
        gap = (mine - logits.float()).abs().max().item()
        scale = logits.float().abs().max().item()
    if not gap <= 0.05 * max(scale, 1.0):
        raise ResidencyError(
            f"this model changes its logits after the head (largest difference {gap:.3g})",
            hint="use a loss in its dense form (Objective.wants = 'logits')",
        )


class _Watcher(TrainerCallback):
    """Progress, checkpoints by time, and their seals."""

    def __init__(self, trainer: _ObjectiveTrainer, progress: Progress, label: str, every: float, start: int) -> None:
        self.trainer, self.objective = trainer, trainer.objective
        self.progress, self.label, self.every, self.start = progress, label, every, start
        self.last_save = time.monotonic()
        self.context: Any = None
        self.advance: Any = None
        self.loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context = self.progress.task(self.label, state.max_steps)
        self.advance = self.context.__enter__()
        if self.start:
            self.progress.say(f"  {self.label}: going on from step {self.start} of {state.max_steps}")
            self.advance(self.start)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        steps = max(1, -(-len(train_dataloader) // args.gradient_accumulation_steps))
        self.trainer.begin_epoch(state.global_step // steps, -(-state.max_steps // steps))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.objective.zero_grad()  # the Trainer clears the model's gradients, and no others
        self.objective.begin_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1, self.loss)
        due = time.monotonic() - self.last_save >= self.every
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with store.disk_errors(folder):
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that resuming does not need
            store.seal(folder, folder.name)
            for older in sorted(folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
                if older != folder:
                    shutil.rmtree(older)
        self.last_save = time.monotonic()

    def close(self) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None


def _newest_whole(folder: Path, progress: Progress) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are named and removed."""
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    for checkpoint in reversed(found):
        reason = store.damage(checkpoint, checkpoint.name, thorough=True)
        if reason is None:
            return checkpoint
        progress.say(f"  skipping the unfinished checkpoint {checkpoint.name}: {reason}")
        shutil.rmtree(checkpoint)
    return None

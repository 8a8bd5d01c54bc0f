"""EK-FAC influence of rows on trusted rows, for a whole causal language model: an adapter to kronfluence.

The influence of training row i on trusted row k is g_kᵀ (H + λ)⁻¹ g_i, with the gradients g of their losses and H the
Gauss-Newton Hessian of the model's linear layers. EK-FAC writes H of a layer as a Kronecker product of two small
matrices (covariances of what goes in and of the gradients that come back) with the eigenvalues fitted, so its inverse
is two eigendecompositions. High is a row without which the trusted rows' loss would be larger.

With `strategy: identity` H is 1 and the scores are the inner products of `influence.TracIn`, unprojected: that is how
this adapter is proven. For a linear head no approximation is needed: `ridgeinfluence.py`.

Paper: Grosse, Bae, Anil et al., "Studying Large Language Model Generalization with Influence Functions", 2023, arXiv
2308.03296. Code: pomonam/kronfluence (Apache-2.0), which does all the work (tested by hand with 1.0.1) and is not
among this package's requirements.

Cost: three passes with gradients over the N rows, then one per block of trusted rows; memory two matrices [D, D] per
layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from residency.errors import MissingError
from residency.step import Params
from residency.tokens import Encoded, collate


class EKFAC(Params):
    """Influence of rows on trusted rows by kronfluence."""

    strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac"
    """How the Hessian is approximated."""
    damping: float | None = Field(None, ge=0)
    """λ; by default a tenth of the mean eigenvalue of each layer."""
    batch: int = Field(4, ge=1)
    """Rows per pass."""
    seed: int = Field(0, ge=0)
    """Of the answers that the model gives itself, from which its Hessian is estimated."""

    def pairs(self, model: Any, items: Sequence[Encoded], trusted: Sequence[Encoded], pad: int) -> NDArray[np.float64]:
        """Influence of every row on every trusted row.

        Args:
            model: A causal language model, left as it was; its linear layers are looked at.
            items: N encoded rows.
            trusted: K encoded rows.
            pad: Token id of the padding.

        Returns:
            [N, K].

        Raises:
            MissingError: When kronfluence is not installed.
        """
        try:
            from kronfluence.analyzer import Analyzer, prepare_model
            from kronfluence.arguments import FactorArguments, ScoreArguments
            from kronfluence.utils.dataset import DataLoaderKwargs
        except ImportError:
            raise MissingError(
                "EK-FAC influence needs the package `kronfluence`, which is not installed",
                hint="pip install 'residency[influence]', or use the scores less, tracin or influence",
            ) from None
        import torch

        task = _task()
        device = next(model.parameters()).device
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        devices = [device] if device.type == "cuda" else []
        with TemporaryDirectory() as folder, torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            analyzer = Analyzer(
                "influence", prepared, task, cpu=device.type == "cpu", disable_tqdm=True, output_dir=folder
            )
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=partial(collate, pad=pad)))
            analyzer.fit_all_factors(
                "factors",
                list(items),
                per_device_batch_size=self.batch,
                factor_args=FactorArguments(strategy=self.strategy),
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                query_dataset=list(trusted),
                train_dataset=list(items),
                per_device_query_batch_size=self.batch,
                per_device_train_batch_size=self.batch,
                score_args=ScoreArguments(damping_factor=self.damping),
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"]
        return np.asarray(found.double().cpu().numpy().T)


def _task() -> Any:
    """The loss of a batch of encoded rows, as kronfluence asks for it."""
    import torch
    from kronfluence.task import Task
    from torch.nn.functional import cross_entropy

    from residency.objective import next_token_positions

    class Answers(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            mask, targets = next_token_positions(batch["labels"])
            logits = logits[mask].float()
            if sample:  # labels of the model's own, for the true Fisher information
                targets = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            return cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_attention_mask(self, batch: Any) -> Any:
            return batch["attention_mask"]

    return Answers()

"""A classifier on a frozen encoder: multinomial logistic regression, or the nearest class mean.

    linear      p(c | x) = softmax_c(w_c · z + b_c),  minimising  −mean log p(y | x) + λ/2 ‖w‖²  with L-BFGS
    prototype   p(c | x) = softmax_c(cos(z, μ_c) / T),   μ_c = mean of the unit features of class c

z is the encoder's feature, standardised for the linear head (mean and deviation of the training rows, stored with
it), scaled to length 1 for prototypes. The linear head is convex, so its solution does not depend on a seed;
prototypes have nothing to fit and are the better choice below about five rows a class.

Sources: nearest prototype after Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017,
arXiv 1703.05175 (there with squared Euclidean distance; cosine is our choice, usual for frozen encoders); the
linear probe after Alain and Bengio 2016, arXiv 1610.01644. Cost: one encoder pass over the rows, then milliseconds;
C × D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from residency.errors import DataError
from residency.step import Params

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from residency.classifier import ClassHead


class Probe(Params):
    """How to fit a head on frozen features."""

    head: Literal["linear", "prototype"] = "linear"
    """A linear classifier (logistic regression), or the nearest class mean."""
    regularisation: float = Field(1e-2, gt=0)
    """λ, the L2 penalty of the linear head; prototypes have nothing to fit and do not read it."""
    temperature: float = Field(0.1, gt=0)
    """T, the softmax temperature of the prototypes' cosines; it changes confidences, not decisions."""

    def fit(self, features: np.ndarray, labels: Sequence[str]) -> ClassHead:
        """Fit a head.

        Args:
            features: [N, D].
            labels: [N] class names.

        Returns:
            The head; its classes are sorted by name.

        Raises:
            DataError: When there are fewer than two classes.
        """
        import torch

        from residency.classifier import ClassHead

        classes = sorted(set(labels))
        if len(classes) < 2:
            raise DataError(f"a classifier needs two classes, the rows have {len(classes)}", hint="check the labels")
        x = torch.as_tensor(features, dtype=torch.float64)
        y = torch.tensor([classes.index(label) for label in labels])
        if self.head == "prototype":
            unit = torch.nn.functional.normalize(x, dim=-1)
            means = torch.zeros(len(classes), x.shape[1], dtype=x.dtype).index_add_(0, y, unit)
            weight = torch.nn.functional.normalize(means, dim=-1) / self.temperature
            zero, one = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
            return ClassHead(classes, weight.float(), torch.zeros(len(classes)), zero, one, unit=True)
        mean, deviation = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        weight, bias = _logistic((x - mean) / deviation, y, len(classes), self.regularisation)
        return ClassHead(classes, weight.float(), bias.float(), mean.float(), deviation.float(), unit=False)


def _logistic(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and bias [C] of multinomial logistic regression; the bias is not penalised."""
    import torch

    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), bias.detach()

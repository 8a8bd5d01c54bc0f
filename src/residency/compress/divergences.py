"""The peers of BiLD and SinKD: nine word-by-word distillation losses under one interface.

The idea. Everybody who distils a language model chooses one of these, so they stand here in one dialect and can be
exchanged in a recipe by their name. Notation: p = softmax(t / τ) the teacher's distribution of the next word,
q = softmax(s / τ) the student's; sums over words are per token and then summed over tokens.

    reverse-kl    Σ q log(q / p)                          seeks a mode of the teacher instead of covering all
    js            β KL(p ‖ m) + (1 − β) KL(q ‖ m)         m = β p + (1 − β) q; bounded
    skewed-kl     KL(p ‖ λ p + (1 − λ) q), or reversed    KL whose gradient cannot explode
    tvd           ½ Σ |p − q|                             bounded, insensitive to ratios
    dkd           α KL(b_p ‖ b_q) + β KL(p̂ ‖ q̂)           b: target against the rest; p̂, q̂: the rest alone
    nkd           −p_y log q_y − γ τ² Σ p̂ log q̂           y the target; its two terms at temperature 1 and τ
    normkd        KL at a temperature of its own per token, its standard deviation of logits × τ
    adaptive-kl   h KL(p ‖ q) + (1 − h) KL(q ‖ p)         h: share of |p − q| in the teacher's head
    top-kl        KL on the teacher's k likeliest words, both renormalised

Papers and official code (read for facts, not copied) stand with each class. Ours: the (sum, count) contract; float32
arithmetic; the divergence wherever a paper drops the teacher's entropy (equal gradients, and zero is zero); no factor
τ² unless the paper has it; the target is the reference token where there is one and else the teacher's likeliest
word; a word both models exclude (−inf) contributes nothing. A divergence is +inf where it is so by definition:
reverse KL, and adaptive KL with it, where the teacher alone excludes a word.

Cost. The first four have a closed-form gradient and hold six blocks of `chunk_bytes`, the others about ten, all
of them the matrix products of the dense form (`benchmarks/losses.py`); `adaptive-kl` finds the head by top-k, and
sorts V only where a teacher is so flat that 4,096 words do not hold half its mass.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from residency.compress.divergence import PointwiseDivergence, RowDivergence
from residency.objective import IGNORE
from residency.step import Params

FLOOR = -1e30
"""Stands for log 0 where −inf would give 0 · ∞."""


class Softened(Params):
    """What all of them have: a temperature."""

    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits."""


class ReverseKLParams(Softened):
    """Parameters of `ReverseKL`."""


class ReverseKL(PointwiseDivergence):
    """KL(student ‖ teacher): say nothing the teacher would not say.

    Gu, Dong, Wei, Huang, "MiniLLM", ICLR 2024, arXiv 2306.08543, takes it over whole answers by policy gradient; this
    is its value per token on given answers, as in `distillm/losses.py` (commit 17c0f98). Relations: `KL` covers,
    this one seeks; `SkewedKL` in its reverse direction is finite wherever a model excludes words.
    """

    Params = ReverseKLParams

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The term q log(q / p)."""
        return _times_log(q, log_q, log_p)

    def slope(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Equal to the value, less a multiple of q."""
        return _times_log(q, log_q, log_p)


class JSParams(Softened):
    """Parameters of `JS`."""

    beta: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher in the mixture; 0 is KL(teacher ‖ student) and 1 KL(student ‖ teacher)."""


class JS(PointwiseDivergence):
    """The generalised Jensen-Shannon divergence of GKD.

    Agarwal, Vieillard, Zhou et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv 2306.13649, eq. 1.
    Official code: none; TRL's `generalized_jsd_loss` is its usual form. By the formula the ends of β give zero, and
    only JS / β or JS / (1 − β) tends to a KL; like TRL, the ends are those two divergences themselves.
    """

    Params = JSParams
    params: JSParams

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """β p log(p / m) + (1 − β) q log(q / m)."""
        beta = self.params.beta
        if beta in (0, 1):
            return _times_log(p, log_p, log_q) if beta == 0 else _times_log(q, log_q, log_p)
        log_m = _mixture(p, q, beta).log()
        return beta * _times_log(p, log_p, log_m) + (1 - beta) * _times_log(q, log_q, log_m)

    def slope(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """(1 − β) q log(q / m), less a multiple of q."""
        beta = self.params.beta
        if beta in (0, 1):
            return -p if beta == 0 else _times_log(q, log_q, log_p)
        return _times_log(q, log_q, _mixture(p, q, beta).log_()).mul_(1 - beta)


class SkewedKLParams(Softened):
    """Parameters of `SkewedKL`."""

    skew: float = Field(0.1, gt=0, lt=1)
    """λ, how much of the first distribution is mixed into the second (paper: 0.1)."""
    direction: Literal["forward", "reverse"] = "forward"
    """KL from the teacher to the mixture, or from the student to it."""


class SkewedKL(PointwiseDivergence):
    """KL to a mixture: forward KL(p ‖ λp + (1 − λ)q), reverse KL(q ‖ (1 − λ)p + λq).

    Ko, Kim, Chen, Yun, "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv
    2402.03898; official code jongwooko/distillm, commit 17c0f98, whose forward form drops the teacher's entropy.
    Never above log(1 / λ). λ → 0 is KL, or reverse KL.
    """

    Params = SkewedKLParams
    params: SkewedKLParams

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The term p log(p / m), or q log(q / m)."""
        skew = self.params.skew
        if self.params.direction == "forward":
            return _times_log(p, log_p, _mixture(p, q, skew).log())
        return _times_log(q, log_q, _mixture(p, q, 1 - skew).log())

    def slope(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """−(1 − λ) p q / m, or q log(q / m) − λ q² / m, less a multiple of q."""
        skew = self.params.skew
        if self.params.direction == "forward":
            return (p * q).div_(_mixture(p, q, skew)).mul_(skew - 1)
        m = _mixture(p, q, 1 - skew)
        return q.square().div_(m).mul_(-skew).add_(_times_log(q, log_q, m.log_()))


class TVDParams(Softened):
    """Parameters of `TVD`."""


class TVD(PointwiseDivergence):
    """Total variation distance, ½ Σ |p − q| in [0, 1].

    Wen, Li, Du, Mou, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, arXiv
    2307.15190 (its symmetric, bounded member); official code MANGA-UOFA/fdistill. The gradient at q_v = p_v is
    taken as 0.
    """

    Params = TVDParams

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """½ |p − q|."""
        return (q - p).abs() / 2

    def slope(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """½ q sign(q − p)."""
        return (q - p).sign_().mul_(q).mul_(0.5)


class DKDParams(Params):
    """Parameters of `DKD`; the defaults are those of the official configuration for CIFAR-100."""

    temperature: float = Field(4.0, gt=0)
    """Divisor of both models' logits."""
    alpha: float = Field(1.0, ge=0)
    """Weight of target against rest."""
    beta: float = Field(8.0, ge=0)
    """Weight of the distribution among the rest."""
    scale_by_t2: bool = True
    """Multiply by temperature², as the paper does."""


class DKD(RowDivergence):
    """Decoupled distillation: how sure of the target, and how the rest is shared out, weighted apart.

    Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679; official code
    megvii-research/mdistiller, commit e8c5bb3. With α = 1 and β = 1 − p_y it is KL itself; β free is the point.
    """

    Params = DKDParams
    params: DKDParams

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`."""
        p = self.params
        y = _targets(teacher, targets)
        (target_q, rest_q, among_q), (target_p, rest_p, among_p) = (
            _decouple(logits / p.temperature, y) for logits in (student, teacher)
        )
        sure = _weighted(target_p, target_q) + _weighted(rest_p, rest_q)
        total = p.alpha * sure.sum() + p.beta * _weighted(among_p, among_q).sum()
        return total * p.temperature**2 if p.scale_by_t2 else total


class NKDParams(Params):
    """Parameters of `NKD`; the defaults are those of the official code."""

    temperature: float = Field(1.0, gt=0)
    """Divisor of the logits in the second term only."""
    gamma: float = Field(1.5, ge=0)
    """γ, weight of the second term (1.5 in the official code, 0.25 where BiLD compares with it)."""
    scale_by_t2: bool = True
    """Multiply the second term by temperature², as the paper does."""


class NKD(RowDivergence):
    """Normalised distillation: the target's cross-entropy weighted by the teacher, and the rest renormalised.

    Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation", ICCV 2023, arXiv
    2303.13005; official code yzd-v/cls_KD, commit e21ad37. Cross-entropies, as in the paper: neither the loss nor its
    gradient is zero at q = p, because the first term wants q_y = 1.
    """

    Params = NKDParams
    params: NKDParams

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`."""
        p = self.params
        y = _targets(teacher, targets)
        first = (teacher.log_softmax(1).gather(1, y).exp() * student.log_softmax(1).gather(1, y)).sum()
        among_q, among_p = (_decouple(logits / p.temperature, y)[2] for logits in (student, teacher))
        weight = among_p.exp()
        second = (weight * among_q.where(weight > 0, 0)).sum()
        return -first - p.gamma * (p.temperature**2 if p.scale_by_t2 else 1.0) * second


class NormKDParams(Params):
    """Parameters of `NormKD`."""

    temperature: float = Field(2.0, gt=0)
    """Multiplies each row's standard deviation (official: 2 for CIFAR-100, 1 for ImageNet; BiLD's comparison: 3)."""
    scale_by_t2: bool = True
    """Multiply each row by the square of the teacher's temperature for it, as the paper does."""


class NormKD(RowDivergence):
    """KL at the temperature that every row's own spread asks for, one for each model.

    Chi, Zheng, Li et al., "NormKD: Normalized Logits for Knowledge Distillation", 2023, arXiv 2308.00520; official
    code gizi1/NormKD, commit cb53528: τ_row = τ × standard deviation (n − 1) of the row's logits, the student's
    differentiated. Our choice: excluded words (−inf) do not enter the deviation, which is at least 1e-6.
    """

    Params = NormKDParams
    params: NormKDParams

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`."""
        (log_q, _), (log_p, own) = (self._normalised(logits) for logits in (student, teacher))
        each = _weighted(log_p, log_q).sum(1, keepdim=True)
        return (each * own.square()).sum() if self.params.scale_by_t2 else each.sum()

    def _normalised(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, V] at the rows' own temperatures [n, 1], and those."""
        finite = logits.isfinite()
        n = finite.sum(1, keepdim=True)
        mean = logits.where(finite, 0).sum(1, keepdim=True) / n.clamp_min(1)
        centred = (logits - mean).where(finite, 0)
        variance = centred.square().sum(1, keepdim=True) / (n - 1).clamp_min(1)
        own = variance.clamp_min(1e-12).sqrt() * self.params.temperature
        return (centred / own).masked_fill(~finite, -math.inf).log_softmax(1), own


class AdaptiveKLParams(Softened):
    """Parameters of `AdaptiveKL`."""

    mass: float = Field(0.5, gt=0, lt=1)
    """μ, the teacher's probability that its head may hold (paper: 0.5)."""


class AdaptiveKL(RowDivergence):
    """Forward and reverse KL, weighted per token by where the student is wrong: in the teacher's head or its tail.

    Wu, Tao, Wang et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
    Models", COLING 2025, arXiv 2404.02657; official code wutaiqiang/LLM_KD_AKL, commit 91853fb. Per token, words in
    the teacher's order: the head is the first word and those whose cumulated p does not exceed μ;
    h = Σ_head |p − q| / Σ |p − q|, not differentiated. Our choice: h = ½ where p = q, where that code gives 0 / 0.
    """

    Params = AdaptiveKLParams
    params: AdaptiveKLParams

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`."""
        log_q = (student / self.params.temperature).log_softmax(1)
        log_p = (teacher / self.params.temperature).log_softmax(1)
        head = self.head_share(log_p, log_q.detach())
        forward, reverse = _weighted(log_p, log_q).sum(1), _weighted(log_q, log_p).sum(1)
        return (head * forward + (1 - head) * reverse).sum()

    @torch.no_grad()
    def head_share(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The weight h of forward KL: [n, V] and [n, V] → [n]."""
        V, k = log_p.shape[1], min(64, log_p.shape[1])
        p, q = log_p.exp(), log_q.exp()
        while True:
            top, words = p.topk(k, dim=1)
            cumulated = top.cumsum(1)
            if k == V or bool((cumulated[:, -1] > self.params.mass).all()):
                break
            k = min(k * 8, V) if k < 4096 else V
        inside = cumulated <= self.params.mass
        inside[:, :1] = True
        head = (top - q.gather(1, words)).abs().where(inside, 0).sum(1)
        whole = (p - q).abs().sum(1)
        return torch.where(whole > 0, (head / whole).clamp_max(1), 0.5)


class TopKLParams(Params):
    """Parameters of `TopKL`; the defaults are those of BiLD's comparison."""

    temperature: float = Field(3.0, gt=0)
    """Divisor of both models' logits."""
    k: int = Field(1024, ge=1)
    """Words kept per token; at V and above it is KL."""


class TopKL(RowDivergence):
    """KL on the teacher's k likeliest words only, both distributions renormalised over them.

    The baseline "top-KL" of Li, Zhou, Song, "BiLD", COLING 2025, arXiv 2406.13555; official code fpcsong/BiLD, commit
    c8d40a8. No τ². The student learns nothing about the other words; k cached logits per token are all of the teacher.
    """

    Params = TopKLParams
    params: TopKLParams

    def rows(self, student: Tensor, teacher: Tensor, targets: Tensor | None) -> Tensor:
        """See `RowDivergence.rows`."""
        top, words = teacher.topk(min(self.params.k, teacher.shape[1]), dim=1)
        log_p = (top / self.params.temperature).log_softmax(1)
        return _weighted(log_p, (student.gather(1, words) / self.params.temperature).log_softmax(1)).sum()


def _weighted(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Terms a log(a / b), 0 where a = 0 whatever b is, in value and in gradient."""
    return _times_log(log_a.exp(), log_a, log_b)


def _times_log(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    return a * (log_a - log_b).where(a > 0, 0)


def _mixture(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """The distribution weight · p + (1 − weight) · q; above 0, so that its logarithm has a gradient."""
    return (weight * p + (1 - weight) * q).clamp_min(torch.finfo(p.dtype).tiny)


def _targets(teacher: Tensor, targets: Tensor | None) -> Tensor:
    """[n, 1]: the reference token, or the teacher's likeliest word where there is none."""
    if teacher.shape[1] < 2:
        raise ValueError("this loss sets the target against the other classes, and there is only one class")
    best = teacher.argmax(1)
    return (best if targets is None else targets.where(targets != IGNORE, best)).unsqueeze(1)


def _decouple(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithms of P(target) [n, 1] and P(rest) [n, 1]; among the rest [n, V], −inf at the target."""
    others = logits.scatter(1, y, -math.inf)
    target, rest = logits.gather(1, y), others.logsumexp(1, keepdim=True).clamp_min(FLOOR)
    both = torch.logaddexp(target, rest)
    return target - both, rest - both, others - rest

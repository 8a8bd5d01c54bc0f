"""Claim: a distillation loss need not hold a single [tokens × vocabulary] matrix, and saves time by not doing so.

Forward and backward of every loss of the compress stage, on a student and a teacher head of the size of SmolLM2-135M
(V = 49,152, D = 576) with 8 × 512 trained tokens. Two forms:

- "dense": both logit matrices, and the loss as its research code writes it (softmax, `kl_div`, sort, `torch.cdist` and
  20 unrolled Sinkhorn iterations for SinKD in the same groups), differentiated by autograd. Logits are dropped as soon
  as autograd lets go of them, the best a dense loss can do.
- "fused": this library, from hidden states and heads.
- "trl": `generalized_jsd_loss` of an installed TRL, on the same logits; only for js.

Memory: each variant in a fresh process. `extra_mib` is the peak above the resting state, in which the hidden states and
both heads already exist (peak RSS from /proc with the high-water mark reset just before; CUDA's peak allocation on a
GPU). It includes the gradients the step must hand back (∂hidden, ∂weight), `gradients_mib`.
Time: the forms of a loss alternate in one process; medians, and the ratio of medians. `cpu_seconds` is processor time,
which a loaded machine inflates less. `difference` is how far the two values lie apart, relative.

    python benchmarks/losses.py                     # writes benchmarks/results/losses.json
    python benchmarks/losses.py --quick             # a minute, writes nothing
    python benchmarks/losses.py --only sinkd,js --rounds 5 --output some.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from residency.compress import divergences
from residency.compress.bild import BiLD
from residency.compress.kl import KL
from residency.compress.sinkd import SinKD
from residency.compress.uld import ULD
from residency.fusedhead import GATHER_BYTES, LOGITS_BYTES, cross_entropy_sum
from residency.measure import PeakMemory, machine
from residency.objective import Head

WIDTH = 576
RESULT = Path(__file__).parent / "results" / "losses.json"
MIB = 2**20
FUSED = {
    "kl": KL,
    "bild": BiLD,
    "reverse-kl": divergences.ReverseKL,
    "js": divergences.JS,
    "skewed-kl": divergences.SkewedKL,
    "tvd": divergences.TVD,
    "dkd": divergences.DKD,
    "nkd": divergences.NKD,
    "normkd": divergences.NormKD,
    "adaptive-kl": divergences.AdaptiveKL,
    "top-kl": divergences.TopKL,
    "sinkd": SinKD,
    "uld": ULD,
}


def dense(name: str, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The loss `name` as research code has it: student and teacher logits [N, V], targets [N] → sum."""
    if name == "cross-entropy":
        return F.cross_entropy(s, y, reduction="sum")
    if name == "kl":
        return F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="sum")
    if name == "bild":
        total = s.new_zeros(())
        for leader in (t, s):
            words = leader.topk(8, dim=1).indices
            m, n = torch.triu_indices(8, 8, 1)
            d_s, d_t = ((x := z.gather(1, words) / 3)[:, m] - x[:, n] for z in (s, t))
            total = total + F.kl_div(F.log_softmax(d_s, 1), F.softmax(d_t, 1), reduction="sum")
        return total
    if name == "reverse-kl":
        return F.kl_div(F.log_softmax(t, 1), F.softmax(s, 1), reduction="sum")
    if name == "js":
        log_q, log_p = F.log_softmax(s, 1), F.log_softmax(t, 1)
        log_m = torch.logsumexp(torch.stack([log_q, log_p]), 0) - torch.tensor(2.0).log()
        return sum(F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q)) / 2
    if name == "skewed-kl":
        p, q = F.softmax(t, 1), F.softmax(s, 1)
        return (p * (F.log_softmax(t, 1) - (0.1 * p + 0.9 * q).log())).sum()
    if name == "tvd":
        return (F.softmax(t, 1) - F.softmax(s, 1)).abs().sum() / 2
    if name == "dkd":
        mask = F.one_hot(y, s.shape[1]).bool()
        both = [torch.stack([x[mask], (x * ~mask).sum(1)], 1) for x in (F.softmax(s / 4, 1), F.softmax(t / 4, 1))]
        sure = F.kl_div(both[0].log(), both[1], reduction="sum")
        among = F.kl_div(F.log_softmax(s / 4 - 1000 * mask, 1), F.softmax(t / 4 - 1000 * mask, 1), reduction="sum")
        return 16 * (sure + 8 * among)
    if name == "nkd":
        mask = F.one_hot(y, s.shape[1]).bool()
        first = (F.softmax(t, 1)[mask] * F.log_softmax(s, 1)[mask]).sum()
        rest_s, rest_t = (x[~mask].view(len(x), -1) for x in (s, t))
        return -first - 1.5 * (F.softmax(rest_t, 1) * F.log_softmax(rest_s, 1)).sum()
    if name == "normkd":
        own_s, own_t = (2 * x.std(1, keepdim=True) for x in (s, t))
        each = F.kl_div(F.log_softmax(s / own_s, 1), F.softmax(t / own_t, 1), reduction="none")
        return (each.sum(1, keepdim=True) * own_t.square()).sum()
    if name == "adaptive-kl":
        log_q, log_p = F.log_softmax(s, 1), F.log_softmax(t, 1)
        p, words = log_p.exp().sort(1, descending=True)
        gap = (p - log_q.detach().exp().gather(1, words)).abs()
        tail = p.cumsum(1) > 0.5
        tail[:, 0] = False
        head = gap.masked_fill(tail, 0).sum(1) / gap.sum(1)
        forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
        return (head * forward + (1 - head) * reverse).sum()
    if name == "top-kl":
        top, words = t.topk(min(1024, t.shape[1]), dim=1)
        return F.kl_div(F.log_softmax(s.gather(1, words) / 3, 1), F.softmax(top / 3, 1), reduction="sum")
    if name == "sinkd":
        p, q = (F.softmax(x / 2, 1).view(-1, 16, x.shape[1]) for x in (s, t))
        cost = torch.cdist(p, q, p=1)
        plan = (-cost / 0.1).exp()
        for _ in range(20):
            plan = plan / plan.sum(2, keepdim=True)
            plan = plan / plan.sum(1, keepdim=True)
        return (plan * cost).sum()
    assert name == "uld", name
    return (
        (F.softmax(s, 1).sort(1, descending=True).values - F.softmax(t, 1).sort(1, descending=True).values).abs().sum()
    )


class Problem:
    """Student hidden states and head, teacher hidden states and head, targets: one per process."""

    def __init__(self, tokens: int, vocab: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, device=self.device)  # noqa: E731
        self.hidden = draw(tokens, WIDTH).requires_grad_()
        self.head = Head((0.1 * draw(vocab, WIDTH)).requires_grad_())
        self.teacher_hidden, self.teacher_head = draw(tokens, WIDTH), Head(0.1 * draw(vocab, WIDTH))
        self.targets = torch.randint(vocab, (tokens,), device=self.device)

    def step(self, name: str, form: str, chunk_bytes: int | None) -> tuple[float, float, float]:
        """Forward and backward as a training loop would; seconds, processor seconds, loss."""
        self.hidden.grad = self.head.weight.grad = None
        start, cpu = time.perf_counter(), time.process_time()
        total = self.fused(name, chunk_bytes) if form == "fused" else self.dense(name, form)
        (total / len(self.hidden)).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu, total.item()

    def fused(self, name: str, chunk_bytes: int | None) -> Tensor:
        """The sum, from hidden states."""
        if name == "cross-entropy":
            return cross_entropy_sum(self.hidden, self.head, self.targets, chunk_bytes=chunk_bytes)
        inputs = self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.targets
        return FUSED[name]().fused(*inputs, chunk_bytes=chunk_bytes)[0]

    def dense(self, name: str, form: str) -> Tensor:
        """The sum, from logits."""
        student = self.head(self.hidden)
        if name == "cross-entropy":
            return F.cross_entropy(student, self.targets, reduction="sum")
        teacher = self.teacher_head(self.teacher_hidden)
        if form == "trl":
            return _trl()(student[None], teacher[None], beta=0.5, reduction="sum")
        return dense(name, student, teacher, self.targets)

    def gradient_bytes(self) -> int:
        """What the step hands back."""
        return sum(t.grad.nbytes for t in (self.hidden, self.head.weight) if t.grad is not None)


def _trl() -> Callable[..., Tensor]:
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def forms_of(name: str) -> list[str]:
    """The forms a loss is measured in."""
    return ["dense", "fused", *(["trl"] if name == "js" and importlib.util.find_spec("trl") else [])]


def resting_bytes() -> int:
    """What this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure_memory(name: str, form: str, args: argparse.Namespace) -> dict:
    """In this process: one variant."""
    # thread pools and the BLAS's own buffers belong to the resting state
    Problem(32, 2048).step(name, form, args.chunk_bytes)
    problem = Problem(args.tokens, args.vocab)
    gc.collect()
    with PeakMemory() as peak:
        before = resting_bytes()
        loss = problem.step(name, form, args.chunk_bytes)[2]
    extra = (peak.cuda_bytes or peak.bytes) - before
    gradients = problem.gradient_bytes()
    return {
        "loss": name,
        "form": form,
        "value": loss,
        "extra_mib": round(extra / MIB, 1),
        "gradients_mib": round(gradients / MIB, 1),
    }


def measure_time(name: str, args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """In this process: the forms in turn, so that they share whatever else the machine does."""
    problem = Problem(args.tokens, args.vocab)
    found: dict[str, list] = {form: [] for form in forms_of(name)}
    for round_ in range(args.rounds + 1):  # the first warms up
        for form in found:
            took = problem.step(name, form, args.chunk_bytes)
            if round_:
                found[form].append(took)
    return found


def child(args: argparse.Namespace, name: str, form: str = "") -> dict:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", f"{name}/{form}", "--rounds", str(args.rounds)]
    command += ["--tokens", str(args.tokens), "--vocab", str(args.vocab)]
    if args.chunk_bytes:
        command += ["--chunk-bytes", str(args.chunk_bytes)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(args: argparse.Namespace, names: list[str]) -> list[dict]:
    """All rows, with ratios to fused ("how many times more")."""
    rows = []
    for name in names:
        times = child(args, name)
        group = [child(args, name, form) for form in forms_of(name)]
        fused = next(row for row in group if row["form"] == "fused")
        for row in group:
            seconds, cpu, _ = zip(*times[row["form"]], strict=True)
            row |= {"seconds": round(statistics.median(seconds), 3), "cpu_seconds": round(statistics.median(cpu), 3)}
            row["seconds_all"] = [round(value, 3) for value in seconds]
        for row in group:
            if row is not fused:
                for key in ("extra_mib", "seconds", "cpu_seconds"):
                    row[f"{key.removesuffix('_mib')}_over_fused"] = round(row[key] / max(fused[key], 1e-9), 2)
                row["difference"] = float(f"{abs(row['value'] / fused['value'] - 1):.1e}")
            show(row)
        rows += group
    return rows


def show(row: dict) -> None:
    """One line for the reader."""
    ratio = lambda key: f"(x{row[key]})" if key in row else ""  # noqa: E731
    print(
        f"{row['loss']:14}{row['form']:7}extra {row['extra_mib']:8.1f} MiB {ratio('extra_over_fused'):9}"
        f"{row['seconds']:8.3f} s {ratio('seconds_over_fused'):8}"
        f"processor {row['cpu_seconds']:8.3f} s {ratio('cpu_seconds_over_fused'):8}"
        + (f"differs by {row['difference']:.0e}" if "difference" in row else ""),
        flush=True,
    )


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8 * 512, help="a multiple of 16")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=None, help="names, separated by commas")
    parser.add_argument("--chunk-bytes", type=int, default=None, help="default: the library's")
    parser.add_argument("--quick", action="store_true", help="256 tokens, 8,192 words, one round, no file")
    parser.add_argument("--output", type=Path, default=None, help=f"default: {RESULT.name}")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.vocab, args.rounds = 256, 8192, 1
        args.chunk_bytes = args.chunk_bytes or 2 * MIB  # of the same share as the default has of the full size
    if args.child:
        name, form = args.child.split("/")
        print(json.dumps(measure_memory(name, form, args) if form else measure_time(name, args)))
        return
    names = ["cross-entropy", *FUSED]
    if args.only:
        unknown = set(args.only.split(",")) - set(names)
        if unknown:
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        names = [name for name in names if name in args.only.split(",")]
    load = os.getloadavg()[0]
    record = {
        "claim": "fused losses hold no [N, V] matrix: memory and time of a step, dense over fused",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "load_average": {"before": round(load, 1)},  # above the number of cores: the seconds are inflated
        "date": date.today().isoformat(),
        "tokens": args.tokens,
        "vocab": args.vocab,
        "width": WIDTH,
        "dtype": "float32",
        "rounds": args.rounds,
        "chunk_bytes": args.chunk_bytes
        or {
            "kl and cross-entropy": LOGITS_BYTES,
            "bild": GATHER_BYTES,
            "others": LOGITS_BYTES // 2,
        },
        "peers": {"trl": bool(importlib.util.find_spec("trl")), "liger_kernel": "needs CUDA and Triton: not measured"},
        "rows": compare(args, names),
    }
    record["load_average"]["after"] = round(os.getloadavg()[0], 1)
    output = args.output or (None if args.quick or args.only else RESULT)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {output}")


if __name__ == "__main__":
    main()

"""Claim: a distillation loss need not hold a single [tokens × vocabulary] matrix, and costs no time.

Measures forward + backward of BiLD, KL and cross-entropy, dense against fused, on a student and a teacher
head of the size of SmolLM2-135M (V = 49,152, D = 576) with 4 × 512 trained tokens.

Memory: each variant in a fresh process. Extra memory is the peak above the resting state, in which the
hidden states and both heads already exist (peak RSS from /proc with the high-water mark reset just
before; CUDA's peak allocation on a GPU). Reported

- `extra_mib`: everything, including the gradients the step must hand back (∂hidden, ∂weight);
- `working_mib`: without them. Exact for a variant whose peak is in backward; generous to one whose peak
  is in forward, when no gradient exists yet: hence also the rows with a frozen head, whose only
  gradient is ∂hidden (4.5 MiB).

Dense logits come in two habits: "dense" drops each logit matrix as soon as autograd lets go of it, the
best a dense loss can do; "dense, kept" holds `outputs.logits` until the step is over, as training loops do.

Time: the two forms of a loss alternate in one process; the median of five rounds, and the ratio of medians.

    python benchmarks/bild.py                       # writes benchmarks/results/bild.json
    python benchmarks/bild.py --small               # seconds, writes nothing
    python benchmarks/bild.py --tokens 4096 --vocab 151936
"""

from __future__ import annotations

import argparse
import gc
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
from torch.nn import functional as F

from residency.compress.bild import BiLD
from residency.compress.kl import KL
from residency.fusedhead import GATHER_BYTES, LOGITS_BYTES, cross_entropy_sum
from residency.measure import PeakMemory, machine
from residency.objective import Head

WIDTH = 576
FORMS = ("dense", "dense, kept", "fused")
LOSSES = ("bild", "kl", "ce")
ROUNDS = 5
RESULT = Path(__file__).parent / "results" / "bild.json"
MIB = 2**20


class Problem:
    """Student hidden states and head, teacher hidden states and head, targets: one per process."""

    def __init__(self, tokens: int, vocab: int, trainable: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, device=self.device)  # noqa: E731
        self.hidden = draw(tokens, WIDTH).requires_grad_()
        self.head = Head((0.1 * draw(vocab, WIDTH)).requires_grad_(trainable))
        self.teacher_hidden, self.teacher_head = draw(tokens, WIDTH), Head(0.1 * draw(vocab, WIDTH))
        self.targets = torch.randint(vocab, (tokens,), device=self.device)

    def step(self, loss: str, form: str, chunk_bytes: int | None) -> float:
        """Forward and backward as a training loop would; the gradients stay, as for an optimiser."""
        self.hidden.grad = self.head.weight.grad = None
        start = time.perf_counter()
        kept = []
        if form == "fused":
            total = self.fused(loss, chunk_bytes)
        else:
            total = self.dense(loss, kept if form == "dense, kept" else None)
        (total / len(self.hidden)).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def fused(self, loss: str, chunk_bytes: int | None) -> torch.Tensor:
        """The sum, from hidden states."""
        if loss == "ce":
            return cross_entropy_sum(self.hidden, self.head, self.targets, chunk_bytes=chunk_bytes)
        inputs = self.hidden, self.head, self.teacher_hidden, self.teacher_head
        return (BiLD() if loss == "bild" else KL()).fused(*inputs, chunk_bytes=chunk_bytes)[0]

    def dense(self, loss: str, kept: list[torch.Tensor] | None) -> torch.Tensor:
        """The sum, from logits, which `kept` keeps alive if there is one."""
        student = self.head(self.hidden)
        if kept is not None:
            kept.append(student)
        if loss == "ce":
            return F.cross_entropy(student, self.targets, reduction="sum")
        teacher = self.teacher_head(self.teacher_hidden)
        if kept is not None:
            kept.append(teacher)
        return (BiLD() if loss == "bild" else KL()).dense(student, teacher)[0]

    def gradient_bytes(self) -> int:
        """What the step hands back."""
        return sum(t.grad.nbytes for t in (self.hidden, self.head.weight) if t.grad is not None)


def extra_bytes(step: Callable[[], float]) -> int:
    """Peak of one step above the state before it."""
    gc.collect()
    with PeakMemory() as peak:
        before = resting_bytes()
        step()
    return (peak.cuda_bytes or peak.bytes) - before


def resting_bytes() -> int:
    """What this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def measure_memory(loss: str, form: str, args: argparse.Namespace) -> dict:
    """In this process: one variant."""
    # thread pools and the BLAS's own buffers belong to the resting state
    Problem(8, 1024, True).step(loss, form, args.chunk_bytes)
    problem = Problem(args.tokens, args.vocab, args.head == "trainable")
    extra = extra_bytes(lambda: problem.step(loss, form, args.chunk_bytes))
    gradients = problem.gradient_bytes()
    return {
        "loss": loss,
        "form": form,
        "head": args.head,
        "extra_mib": round(extra / MIB, 1),
        "gradients_mib": round(gradients / MIB, 1),
        "working_mib": round((extra - gradients) / MIB, 1),
    }


def measure_time(loss: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """In this process: dense and fused in turn, so that they share whatever else the machine does."""
    problem = Problem(args.tokens, args.vocab, args.head == "trainable")
    seconds: dict[str, list[float]] = {"dense": [], "fused": []}
    for round_ in range(ROUNDS + 1):  # the first warms up
        for form in seconds:
            elapsed = problem.step(loss, form, args.chunk_bytes)
            if round_:
                seconds[form].append(elapsed)
    return seconds


def child(args: argparse.Namespace, head: str, loss: str, form: str = "") -> dict:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", f"{loss}/{form}", "--head", head]
    command += ["--tokens", str(args.tokens), "--vocab", str(args.vocab)]
    if args.chunk_bytes:
        command += ["--chunk-bytes", str(args.chunk_bytes)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(args: argparse.Namespace) -> list[dict]:
    """All rows: every loss, form and head, with ratios to fused ("how many times more")."""
    rows = []
    for head in ("trainable", "frozen"):
        for loss in LOSSES:
            seconds = child(args, head, loss)
            group = [child(args, head, loss, form) for form in FORMS]
            fused = group[-1]
            for row in group:
                if timed := seconds.get(row["form"]):
                    row["seconds"] = round(statistics.median(timed), 4)
                    row["seconds_all"] = [round(value, 4) for value in timed]
            for row in group[:-1]:
                for key in row.keys() & {"extra_mib", "working_mib", "seconds"}:
                    row[f"{key.removesuffix('_mib')}_over_fused"] = round(row[key] / max(fused[key], 1e-9), 2)
            rows += group
            for row in group:
                show(row)
    return rows


def show(row: dict) -> None:
    """One line for the reader."""
    print(
        f"{row['loss']:5}{row['form']:12} head {row['head']:10}"
        f"extra {row['extra_mib']:8.1f} MiB (x{row.get('extra_over_fused', 1):<6}) "
        f"without gradients {row['working_mib']:8.1f} MiB (x{row.get('working_over_fused', 1):<6}) "
        + (f"{row['seconds']:7.3f} s (x{row.get('seconds_over_fused', 1)})" if "seconds" in row else ""),
        flush=True,
    )


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4 * 512)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--chunk-bytes", type=int, default=None, help="default: the library's")
    parser.add_argument("--small", action="store_true", help="256 tokens, 8,192 words, no file")
    parser.add_argument("--output", type=Path, default=None, help=f"default: {RESULT.name}")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--head", default="trainable", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.tokens, args.vocab = 256, 8192
    if args.child:
        loss, form = args.child.split("/")
        print(json.dumps(measure_memory(loss, form, args) if form else measure_time(loss, args)))
        return
    load = os.getloadavg()[0]
    record = {
        "claim": "fused losses hold no [N, V] matrix: memory of a step, dense over fused",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "load_average": {"before": round(load, 1)},  # above the number of cores: the seconds are inflated
        "date": date.today().isoformat(),
        "tokens": args.tokens,
        "vocab": args.vocab,
        "width": WIDTH,
        "dtype": "float32",
        "chunk_bytes": args.chunk_bytes or {"logits": LOGITS_BYTES, "gather": GATHER_BYTES},
        "rows": compare(args),
    }
    record["load_average"]["after"] = round(os.getloadavg()[0], 1)
    output = args.output or (None if args.small else RESULT)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {output}")


if __name__ == "__main__":
    main()

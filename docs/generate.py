"""Write the generated pages (methods, paper index, pains, keys) from the catalogue and the parameter models."""

from __future__ import annotations

from pathlib import Path

from residency import catalog
from residency.explain import _line, grouped, scores, sections

OUT = Path(__file__).parent / "generated"


def cell(text: str) -> str:
    """A table cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def paper(row: catalog.Method) -> str:
    """A link to the paper, or the title alone."""
    return f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title


def main() -> None:
    """Write all pages."""
    OUT.mkdir(exist_ok=True)
    rows = catalog.METHODS
    methods = ["# The catalogue", ""]
    for stage in dict.fromkeys(r.stage for r in rows):
        methods += [
            f"## {stage}",
            "",
            "| method | role | recipe | object | status |",
            "| --- | --- | --- | --- | --- |",
        ]
        methods += [
            f"| **{r.name}** | {r.role} | `{cell(r.step)}` | `{r.object}` | {r.status} |"
            for r in rows
            if r.stage == stage
        ]
        methods.append("")
    papers = ["# Paper index", "", "| paper | authors, year | method | recipe |", "| --- | --- | --- | --- |"]
    papers += [f"| {cell(paper(r))} | {cell(r.reference)} | {r.name} | `{cell(r.step)}` |" for r in rows]
    pains = ["# Your pain → the method", "", "| your pain | method | in a recipe |", "| --- | --- | --- |"]
    pains += [f"| {cell(r.pain)} | {r.name} | `{cell(r.step)}` |" for r in rows]
    keys = ["# All recipe keys", ""]
    for step in catalog.step_names():
        keys += [f"## {step}", ""]
        for title, lines in grouped(step):
            keys += [f"**{title}**", "", *(f"- {line}" for line in lines), ""]
    keys += ["## Scores of `curate`", ""]
    for score in scores():
        for _, lines in grouped(score.name):
            keys += [f"**{score.name}** · {score.pain}", "", *(f"- {line}" for line in lines), ""]
    for path, model in sections().items():
        if path.split("[")[0] in catalog.step_names() and "." not in path:
            continue
        keys += [f"## {path or 'recipe'}", ""]
        keys += [f"- {_line(f.alias or name, f)}" for name, f in model.model_fields.items()]
        keys.append("")
    for name, lines in {"methods": methods, "paper-index": papers, "pains": pains, "keys": keys}.items():
        (OUT / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

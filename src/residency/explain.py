"""What a recipe key means, from the parameter models themselves: nothing to keep in step by hand."""

from __future__ import annotations

import typing
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from residency import catalog
from residency.errors import RecipeError
from residency.recipe import RecipeModel, _section


def sections() -> dict[str, type[BaseModel]]:
    """Every parameter model by the path of its section: "" for the recipe, "tune[method=lora]", "distill.student"."""
    found: dict[str, type[BaseModel]] = {}

    def add(path: str, model: type[BaseModel]) -> None:
        found[path] = model
        for name, field in model.model_fields.items():
            inner = _section(field.annotation)
            if inner is not None:
                add(f"{path}.{field.alias or name}".lstrip("."), inner)

    add("", RecipeModel)
    for row in catalog.STEPS:
        variant = f"[{row.selector}={row.variant}]" if row.selector else ""
        add(f"{row.name}{variant}", catalog.load(row.object).Params)
    return found


def explain(key: str) -> Iterator[str]:
    """Lines that explain a key: `rank`, `tune.rank`, `task.metric`, or a whole step such as `tune`.

    Raises:
        RecipeError: When no key is called so; the nearest is named.
    """
    step, _, last = key.rpartition(".")
    rows = [*catalog.step_rows(key), *(m for m in scores() if m.name == key)]
    for title, lines in grouped(key):
        yield title
        yield from (f"  {line}" for line in lines)
    found = bool(rows)
    names: list[str] = []
    said: dict[str, list[str]] = {}
    for path, model in sections().items():
        plain = path.split("[")[0] + (path.split("]")[1] if "]" in path else "")
        for name, field in model.model_fields.items():
            alias = field.alias or name
            names.append(f"{plain}.{alias}".lstrip("."))
            if alias == last and (not step or plain == step or plain.endswith(f".{step}")):
                found = True
                said.setdefault(_line(alias, field), []).append(path or "recipe")
    for line, paths in said.items():
        yield f"{paths[0] if len(paths) == 1 else _together(paths)} · {line}"
    if not found:
        guess = catalog.nearest(key, names) or catalog.nearest(last, [n.rsplit(".", 1)[-1] for n in names])
        raise RecipeError(
            f"no key is called `{key}`" + (f"; did you mean `{guess}`?" if guess else ""),
            hint=f"steps: {', '.join(catalog.step_names())}; `residency explain tune` lists a step's keys",
        )


def scores() -> list[catalog.Method]:
    """The scores that `curate` takes by name."""
    return [m for m in catalog.METHODS if m.role == "Scorer" and m.stage == "curate"]


def grouped(step: str) -> Iterator[tuple[str, list[str]]]:
    """The keys of a step as (heading, lines): those that all its variants share first, then each variant's own.

    Args:
        step: The name of a step, or of a score; nothing is yielded for a name that is neither.
    """
    for score in scores():
        if score.name == step:
            keys = [_line(f.alias or name, f) for name, f in score.load().model_fields.items()]
            yield f"{score.step}: {score.title} ({score.reference})", keys or ["no keys of its own"]
    rows = catalog.step_rows(step)
    if not rows:
        return
    models = [catalog.load(row.object).Params for row in rows]
    lines = [[_line(f.alias or name, f) for name, f in model.model_fields.items()] for model in models]
    shared = [line for line in lines[0] if all(line in each for each in lines)] if len(rows) > 1 else []
    if shared:
        yield f"{step}, whatever `{rows[0].selector}` is:", shared
    for row, each in zip(rows, lines, strict=True):
        variant = f" {{{row.selector}: {row.variant}}}" if row.selector else ""
        yield f"{row.name}{variant}: {row.summary}", [line for line in each if line not in shared]


def _together(paths: list[str]) -> str:
    """`curate[by=top]`, `curate[by=dpp]` as one: curate[by=top|dpp]."""
    heads = {path.split("=")[0] for path in paths}
    if len(heads) > 1 or "=" not in paths[0] or not all(path.endswith("]") for path in paths):
        return ", ".join(paths)
    return f"{heads.pop()}={'|'.join(path.split('=')[1][:-1] for path in paths)}]"


def _line(alias: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
    limits = ", ".join(
        f"{_SIGNS[type(m).__name__]} {next(iter(vars_of(m)))}" for m in field.metadata if type(m).__name__ in _SIGNS
    )
    kind = _name(field.annotation)
    text = " ".join((field.description or "").split())
    return f"{alias} ({kind}{', ' + limits if limits else ''}; {default}): {text}"


_SIGNS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def vars_of(constraint: object) -> Iterator[object]:
    """The bound of an annotated-types constraint."""
    for name in ("ge", "gt", "le", "lt"):
        if hasattr(constraint, name):
            yield getattr(constraint, name)


def _name(annotation: object) -> str:
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(o) for o in options)
    if origin is tuple and len(options) == 2 and options[1] is Ellipsis:
        return f"list of {_name(options[0])}"
    if origin is tuple:
        return f"({', '.join(_name(o) for o in options)})"
    if origin is dict:
        return "mapping"
    if options:
        return " | ".join("nothing" if o is type(None) else _name(o) for o in options)
    return getattr(annotation, "__name__", str(annotation))

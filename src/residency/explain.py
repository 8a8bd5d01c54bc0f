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
    steps = [row for row in catalog.STEPS if row.name == key]
    for row in steps:
        variant = f" {{{row.selector}: {row.variant}}}" if row.selector else ""
        yield f"{row.name}{variant}: {row.summary}"
        for name, field in catalog.load(row.object).Params.model_fields.items():
            yield f"  {_line(field.alias or name, field)}"
    found = bool(steps)
    names: list[str] = []
    for path, model in sections().items():
        plain = path.split("[")[0] + (path.split("]")[1] if "]" in path else "")
        for name, field in model.model_fields.items():
            alias = field.alias or name
            names.append(f"{plain}.{alias}".lstrip("."))
            if alias == last and (not step or plain == step or plain.endswith(f".{step}")):
                found = True
                yield f"{path or 'recipe'} · {_line(alias, field)}"
    if not found:
        guess = catalog.nearest(key, names) or catalog.nearest(last, [n.rsplit(".", 1)[-1] for n in names])
        raise RecipeError(
            f"no key is called `{key}`" + (f"; did you mean `{guess}`?" if guess else ""),
            hint=f"steps: {', '.join(catalog.step_names())}; `residency explain tune` lists a step's keys",
        )


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
    options = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(o) for o in options)
    if options:
        return " | ".join("nothing" if o is type(None) else _name(o) for o in options)
    return getattr(annotation, "__name__", str(annotation))

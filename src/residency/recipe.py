"""A recipe: one YAML file → a checked `Recipe`. Every error names file, line and key, and the nearest known key.

Nothing is computed here and no model is touched. Step parameters are validated by the step's own pydantic model,
found through the catalogue, so that a new step needs no change here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from residency import catalog
from residency.errors import RecipeError
from residency.step import Params, Step

MAX_BYTES = 1 << 20
Path_ = tuple[Any, ...]
Places = dict[Path_, tuple[int, int]]


class TaskSection(Params):
    """What the specialist is for and how it is examined."""

    examples: str
    """The K rows you trust: a file (.jsonl, .csv, .parquet), a `datasets` folder, or `embedded:NAME`."""
    test: str
    """The held-out rows of the examination; never trained on."""
    metric: str = "choice-accuracy"
    """The task's score: one of the catalogue's metrics."""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, catalog.METRICS, "metric")


class GuardSection(Params):
    """An ability that must not be lost: it is examined beside the task and always in the report."""

    test: str
    """Rows of the guard."""
    metric: str = "choice-accuracy"
    """The guard's score."""
    name: str = "guard"
    """What the report calls it."""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        return _one_of(value, catalog.METRICS, "metric")


class LimitSection(Params):
    """Read at most so many rows of each source (the first ones); for rehearsals."""

    examples: int | None = Field(None, ge=1)
    """Rows of task.examples."""
    test: int | None = Field(None, ge=1)
    """Rows of task.test."""
    guard: int | None = Field(None, ge=1)
    """Rows of the guard."""
    pool: int | None = Field(None, ge=1)
    """Rows of every other source, such as curate's pool."""


class RecipeModel(Params):
    """The keys of a recipe."""

    residency: Literal[1]
    """Version of the recipe language; 1."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the run: letters, digits, dot, dash, underscore. The run directory is runs/NAME."""
    base: str
    """The model to start from: an embedded name, a local folder, or a hub id."""
    task: TaskSection
    """The task."""
    guard: str | GuardSection | None = None
    """An embedded guard by name (general-knowledge), or test and metric of your own."""
    steps: list[Any]
    """The steps, in order; each `- step: {key: value}`."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of everything random."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    limit: LimitSection = Field(default_factory=LimitSection)
    """Read at most so many rows of each source."""
    max_chars: int = Field(32_768, ge=16)
    """Rows with more characters than this go to quarantine."""
    trust_remote_code: bool = False
    """Let the base run code from its own repository. Never inherited by other models of the recipe."""
    description: str = ""
    """A sentence for the report."""


@dataclass(frozen=True)
class StepEntry:
    """One step of a recipe: its catalogue row, its checked parameters and where it stands in the file."""

    row: catalog.StepRow
    step: Step
    line: int

    @property
    def name(self) -> str:
        """The recipe key."""
        return self.row.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as plain JSON values, defaults included, spelt as in the recipe."""
        values = self.step.params.model_dump(mode="json", by_alias=True)
        return ({self.row.selector: self.row.variant} if self.row.selector else {}) | values


@dataclass(frozen=True)
class Recipe:
    """A recipe that reads well.

    Args:
        keys: The checked keys.
        steps: The checked steps.
        file: Where it was read from.
        text: The file as it stands.
        places: Key path → (line, column), for later errors.
    """

    keys: RecipeModel
    steps: tuple[StepEntry, ...]
    file: Path
    text: str
    places: Places = field(repr=False, default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that relative paths are relative to."""
        return self.file.parent

    def where(self, *path: Any) -> str:
        """`recipe.yaml:12:5` for a key path (or its nearest parent that stands in the file)."""
        return _where(self.file, self.places, path)

    def resolved(self) -> dict[str, Any]:
        """All keys with their defaults, as plain JSON values: what was really run."""
        values = self.keys.model_dump(mode="json", by_alias=True)
        values["steps"] = [{entry.name: entry.params} for entry in self.steps]
        return values

    def tiny(self) -> Recipe:
        """The same recipe as a rehearsal of seconds: a tiny random base, few rows, every step at its smallest."""
        from residency.embedded import tiny_twin

        limit = LimitSection(examples=8, test=8, guard=8, pool=48)
        keys = self.keys.model_copy(
            update={"base": tiny_twin(self.keys.base), "limit": limit, "name": f"{self.keys.name}-tiny"[:64]}
        )
        steps = tuple(replace(entry, step=entry.step.tiny()) for entry in self.steps)
        return replace(self, keys=keys, steps=steps)


def load(file: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: With file, line and the nearest known key, for anything that is wrong with it.
    """
    path = Path(file)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError("there is no such recipe", where=str(path), hint="give the path of a YAML file") from None
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"a recipe has at most {MAX_BYTES:,} bytes; this file has {len(raw):,}", where=str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError("the recipe is not UTF-8 text", where=f"{path}:{line}", hint="save it as UTF-8") from None
    return parse(text, path)


def parse(text: str, file: Path = Path("recipe.yaml")) -> Recipe:
    """Check the text of a recipe (see `load`)."""
    data, places = _read_yaml(text, file)
    if not isinstance(data, dict):
        raise RecipeError(
            "a recipe is a mapping of keys", where=f"{file}:1", hint="start with `residency: 1` and `name: …`"
        )
    keys = _validate(RecipeModel, data, (), file, places)
    assert isinstance(keys, RecipeModel)
    if not keys.steps:
        raise RecipeError("`steps` is empty", where=_where(file, places, ("steps",)), hint="add at least one step")
    if len(keys.steps) > 99:
        raise RecipeError("a recipe has at most 99 steps", where=_where(file, places, ("steps",)))
    steps = tuple(_step(item, ("steps", i), file, places) for i, item in enumerate(keys.steps))
    return Recipe(keys, steps, file, text, places)


def _step(item: Any, path: Path_, file: Path, places: Places) -> StepEntry:
    where = _where(file, places, path)
    if isinstance(item, str):
        item = {item: None}
    if not isinstance(item, dict) or len(item) != 1:
        raise RecipeError(
            "each step is one key with its parameters", where=where, hint="for example `- tune: {method: lora}`"
        )
    (name, values), names = next(iter(item.items())), catalog.step_names()
    where = _where(file, places, (*path, name))
    if name not in names:
        raise RecipeError(_unknown("step", name, names), where=where, hint=f"steps: {', '.join(names)}")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"the parameters of `{name}` are a mapping", where=where, hint=f"`- {name}: {{key: value}}`")
    rows = catalog.step_rows(name)
    row = rows[0]
    if row.selector:
        variants = [r.variant or "" for r in rows]
        chosen = values.get(row.selector, row.variant)
        if chosen not in variants:
            at = _where(file, places, (*path, name, row.selector))
            raise RecipeError(
                _unknown(f"`{row.selector}` of `{name}`", chosen, variants),
                where=at,
                hint=f"one of {', '.join(variants)}",
            )
        row = rows[variants.index(chosen)]
        values = {k: v for k, v in values.items() if k != row.selector}
    cls: type[Step] = catalog.load(row.object)
    extra = [row.selector] if row.selector else []
    params = _validate(cls.Params, values, (*path, name), file, places, extra)
    return StepEntry(row, cls(params), places.get((*path, name), (0, 0))[0])


# ------------------------------------------------------------------ validation messages


def _validate(
    model: type[BaseModel], data: dict, path: Path_, file: Path, places: Places, also_known: list[str] | None = None
) -> Any:
    """Validate one section; all its problems in one error, each with its place."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            loc = tuple(p for p in item["loc"] if not (isinstance(p, str) and p in _UNION_TAGS))
            problems.append((_where(file, places, (*path, *loc)), *_explain(model, item, loc, also_known or [])))
    (where, what, hint), rest = problems[0], problems[1:]
    more = "".join(f"\n{w}: {text}" for w, text, _ in rest)
    raise RecipeError(what + more, where=where, hint=hint) from None


_UNION_TAGS = {"GuardSection", "str", "int", "float", "bool", "StudentSection"}


def _explain(model: type[BaseModel], item: Any, loc: Path_, also_known: list[str]) -> tuple[str, str | None]:
    key = ".".join(str(p) for p in loc) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, loc[:-1]) + (also_known if len(loc) == 1 else [])
        return _unknown("key", loc[-1], known), f"known keys: {', '.join(known)}"
    if item["type"] == "missing":
        return f"the key `{key}` is missing", None
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict | list) else f" (given: {str(item['input'])[:60]!r})"
    return f"`{key}`: {message[0].lower()}{message[1:]}{given}", None


def _known_keys(model: type[BaseModel], loc: Path_) -> list[str]:
    """The keys of the section at `loc` inside `model`."""
    current = model
    for part in loc:
        info = next((f for n, f in current.model_fields.items() if part in (n, f.alias)), None)
        inner = _section(info.annotation) if info else None
        if inner is None:
            break
        current = inner
    return [f.alias or n for n, f in current.model_fields.items()]


def _section(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _unknown(what: str, word: Any, known: list[str] | tuple[str, ...]) -> str:
    guess = catalog.nearest(str(word), known)
    return f"unknown {what} `{str(word)[:60]}`" + (f"; did you mean `{guess}`?" if guess else "")


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise ValueError(f"{_unknown(what, value, known)} Known: {', '.join(known)}")
    return value


def _where(file: Path, places: Places, path: Path_) -> str:
    while path and path not in places:
        path = path[:-1]
    line, column = places.get(path, (1, 1))
    return f"{file}:{line}:{column}"


# ------------------------------------------------------------------ YAML with places


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-4 is a number and dates stay text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rx) for tag, rx in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(text: str, file: Path) -> tuple[Any, Places]:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError("the recipe is empty", where=f"{file}:1", hint="see recipes/ for examples")
        places: Places = {}
        return _plain(loader, node, (), file, places, set()), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise RecipeError(f"this is not YAML: {error.problem or error.context}", where=where) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise RecipeError(f"this is not YAML: {error.reason}", where=f"{file}:{line}") from None
    except RecursionError:
        raise RecipeError("the recipe is nested too deeply", where=str(file)) from None
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"a value cannot be read: {str(error)[:120]}", where=str(file)) from None
    finally:
        if loader is not None:
            loader.dispose()


def _plain(loader: Any, node: yaml.Node, path: Path_, file: Path, places: Places, above: set[int]) -> Any:
    places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if id(node) in above or len(places) > 10_000:
        raise RecipeError("an alias repeats too much of the recipe", where=_where(file, places, path))
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key, str):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "…"
                raise RecipeError(f"a key is a word, not `{shown}`", where=f"{file}:{place[0]}:{place[1]}")
            if key in result:
                raise RecipeError(f"the key `{key}` stands here twice", where=f"{file}:{place[0]}:{place[1]}")
            places[(*path, key)] = place
            result[key] = _plain(loader, value_node, (*path, key), file, places, above)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, (*path, i), file, places, above) for i, child in enumerate(node.value)]
    return loader.construct_object(node)

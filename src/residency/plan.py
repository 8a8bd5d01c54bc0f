"""Recipe → ordered nodes with content addresses, legality, expected time and memory. Nothing is computed.

The plan is a line of nodes: the data are read, the base is examined, each step runs, and each step that changes the
model is followed by the same examination, so that the record shows what every step bought. A node's address covers
everything its result depends on: the step and its version, its parameters, the addresses of what it reads, the
data's fingerprints and the seed. Equal address, equal result: that is how a finished run computes nothing and a
changed step recomputes only itself and what follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from residency import bases, catalog, embedded, sources, store
from residency.errors import PlanError, RecipeError, ResidencyError
from residency.recipe import GuardSection, Recipe, StepEntry
from residency.step import Examination, Forecast, State, Step

DATA_FORM = 1
"""Version of how data are read; part of every address that depends on rows."""


@dataclass(frozen=True)
class Node:
    """One thing to compute.

    Args:
        label: `01-curate`, or `01-curate.exam` for the examination that follows a step.
        step: The step that computes it; None for the data.
        address: Content address (see the module).
        inputs: Port or source → the address it comes from.
        forecast: What the step expects.
        params: As recorded in run.json.
        of: For an examination, the label of the step it examines.
        where: `recipe.yaml:12:5`.
    """

    label: str
    step: Step | None
    address: str
    inputs: dict[str, str]
    forecast: Forecast
    params: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    variant: str | None = None
    of: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Plan:
    """A recipe that can be run.

    Args:
        recipe: The recipe.
        base: Its resolved base.
        data: Source name → source: examples, test, guard, and each step's own as `pool`.
        guard: The guard's settings, or None.
        nodes: What to compute, in order; the first reads the data.
        final: The state at the end.
        counts: Rough number of rows of every source.
    """

    recipe: Recipe
    base: bases.Base
    data: dict[str, sources.Source]
    guard: GuardSection | None
    exam: Examination
    nodes: tuple[Node, ...]
    final: State
    counts: dict[str, int]

    def seconds(self, gflops: float, done: frozenset[str] = frozenset()) -> float:
        """Expected seconds of the nodes not in `done`, on a machine that multiplies matrices at `gflops`."""
        rate = gflops * 1e9 * EFFICIENCY
        return sum(n.forecast.flops / rate + n.forecast.seconds for n in self.nodes if n.address not in done)

    def peak_bytes(self) -> int:
        """Expected peak memory of the hungriest node, the libraries themselves included."""
        return LIBRARIES + max(n.forecast.peak_bytes for n in self.nodes)


EFFICIENCY = 0.6
"""Share of the machine's matrix speed that a small model reaches; our choice, from SmolLM2 on two cores (0.5-0.7)."""

LIBRARIES = 700 << 20
"""Resident bytes of Python with torch and transformers imported, measured."""


def make(recipe: Recipe) -> Plan:
    """Check that a recipe can work and lay out its nodes.

    Raises:
        PlanError: When steps cannot work in this order or with this model.
        RecipeError, DataError, MissingError: When a base or a data source cannot be found.
    """
    keys = recipe.keys
    base = bases.resolve(keys.base, recipe.folder, recipe.where("base"), remote_code=keys.trust_remote_code)
    guard = _guard(recipe)
    data = _sources(recipe, guard)
    exam_entry = _exam_entry(recipe)
    exam = exam_entry.step if exam_entry else _default_exam()
    assert isinstance(exam, Examination)

    counts = {name: source.size() for name, source in data.items()}
    state = State(
        model=base.facts,
        rows=counts["examples"][0],
        tokens_per_row=counts["examples"][1] // 4 + 30,
        test_rows=counts["test"][0],
        guard_rows=counts["guard"][0] if guard else 0,
        metrics=(keys.task.metric, *([guard.metric] if guard else [])),
    )
    read: dict[str, str] = {name: data[name].fingerprint for name in ("examples", "test", "guard") if name in data}
    limits = {name: data[name].limit for name in read}
    data_address = store.address_of(["data", DATA_FORM, read, limits, keys.max_chars])
    nodes = [Node("00-data", None, data_address, read, Forecast(state, seconds=1.0), name="data")]
    ports = {"model": base.fingerprint, "rows": f"{data_address}:examples", "data": data_address}

    def examine(of: str, state: State) -> None:
        address = store.address_of(
            ["exam", exam.version, _params(exam), state.metrics, ports["model"], data_address, keys.seed, keys.device]
        )
        try:
            forecast = exam.plan(state)
        except PlanError as error:
            where = recipe.where("task", "metric")
            raise PlanError(error.what, where=where, hint=error.hint) from None
        inputs = {"model": ports["model"], "data": data_address}
        nodes.append(Node(f"{of}.exam", exam, address, inputs, forecast, _params(exam), name=catalog.EXAM_STEP, of=of))

    examine("00-base", state)
    beside = ""  # the first step that put something beside the model's weights
    for i, entry in enumerate(e for e in recipe.steps if e.name != catalog.EXAM_STEP):
        index = recipe.steps.index(entry)
        where = recipe.where("steps", index, entry.name)
        label = f"{i + 1:02d}-{entry.name}"
        if beside and "model" in entry.step.gives and not entry.step.beside:
            raise PlanError(
                f"`{entry.name}` makes another model, and what `{beside}` puts beside this one would be lost",
                where=where,
                hint=f"move `{entry.name}` before `{beside}`",
            )
        beside = beside or (entry.name if entry.step.beside else "")
        inputs = {port: ports[port] for port in sorted(entry.step.reads & {"model", "rows"})}
        if {"examples", "test"} & entry.step.reads or entry.step.sources():
            inputs["data"] = data_address
        inputs |= {name: data[f"{index}:{name}"].fingerprint for name in entry.step.sources()}
        others = _further_bases(recipe, entry, index)
        inputs |= {f"base:{name}": other.fingerprint for name, other in others.items()}
        pools = {name: data[f"{index}:{name}"] for name in entry.step.sources()}
        address = store.address_of(
            [
                [entry.name, entry.row.variant, entry.step.version, entry.params, inputs, keys.seed],
                [
                    keys.max_chars,
                    keys.device,
                    keys.trust_remote_code,
                    {name: pool.limit for name, pool in pools.items()},
                ],
            ]
        )
        sizes = {name: counts[f"{index}:{name}"][0] for name in pools}
        try:
            facts = {name: other.facts for name, other in others.items()}
            forecast = entry.step.plan(replace(state, source_rows=sizes, others=facts))
        except ResidencyError as error:
            raise type(error)(error.what, where=error.where or where, hint=error.hint) from None
        nodes.append(
            Node(label, entry.step, address, inputs, forecast, entry.params, entry.name, entry.row.variant, None, where)
        )
        state = forecast.after
        ports |= dict.fromkeys(entry.step.gives, address)
        if "model" in entry.step.gives:
            examine(label, state)
    return Plan(recipe, base, data, guard, exam, tuple(nodes), state, {k: v[0] for k, v in counts.items()})


def _params(step: Step) -> dict[str, Any]:
    return step.params.model_dump(mode="json", by_alias=True)


def _default_exam() -> Examination:
    cls = catalog.load(catalog.step_rows(catalog.EXAM_STEP)[0].object)
    return cls(cls.Params())


def _exam_entry(recipe: Recipe) -> StepEntry | None:
    """The recipe's `evaluate` step, which must be the last and the only one."""
    found = [(i, e) for i, e in enumerate(recipe.steps) if e.name == catalog.EXAM_STEP]
    if not found:
        return None
    index, entry = found[0]
    if len(found) > 1 or index != len(recipe.steps) - 1:
        raise PlanError(
            "`evaluate` stands once and last: it says how the base and the model after every step are examined",
            where=recipe.where("steps", index, catalog.EXAM_STEP),
            hint="move it to the end; every step that changes the model is examined anyway",
        )
    return entry


def _guard(recipe: Recipe) -> GuardSection | None:
    value = recipe.keys.guard
    if not isinstance(value, str):
        return value
    if value not in embedded.GUARDS:
        guess = catalog.nearest(value, list(embedded.GUARDS))
        raise RecipeError(
            f"no embedded guard is called `{value}`" + (f"; did you mean `{guess}`?" if guess else ""),
            where=recipe.where("guard"),
            hint=f"embedded guards: {', '.join(embedded.GUARDS)}; or guard: {{test: FILE, metric: NAME}}",
        )
    return GuardSection(test=embedded.GUARDS[value], name=value)


def _sources(recipe: Recipe, guard: GuardSection | None) -> dict[str, sources.Source]:
    keys, limit = recipe.keys, recipe.keys.limit
    wanted: dict[str, tuple[str, tuple[Any, ...], int | None]] = {
        "examples": (keys.task.examples, ("task", "examples"), limit.examples),
        "test": (keys.task.test, ("task", "test"), limit.test),
    }
    if guard:
        wanted["guard"] = (guard.test, ("guard", "test"), limit.guard)
    free = set()
    for i, entry in enumerate(recipe.steps):
        for name, ref in entry.step.sources().items():
            wanted[f"{i}:{name}"] = (ref, ("steps", i, entry.name, name), limit.pool)
            if name in entry.step.unlabelled:
                free.add(f"{i}:{name}")
    return {
        name: sources.resolve(
            ref,
            recipe.folder,
            where=recipe.where(*path),
            limit=most,
            max_chars=keys.max_chars,
            labelled=name not in free,
        )
        for name, (ref, path, most) in wanted.items()
    }


def _further_bases(recipe: Recipe, entry: StepEntry, index: int) -> dict[str, bases.Base]:
    """The models a step loads besides the current one."""
    return {
        name: bases.resolve(ref, recipe.folder, recipe.where("steps", index, entry.name))
        for name, ref in entry.step.bases().items()
    }


def key_of(plan: Plan, node: Node, name: str) -> str:
    """The key in `Plan.data` of the source that a node's step calls `name`."""
    index = next(i for i, e in enumerate(plan.recipe.steps) if e.step is node.step)
    return f"{index}:{name}"


def base_folder(plan: Plan, ref: str) -> Path:
    """The folder of a further base that a step names."""
    return bases.resolve(ref, plan.recipe.folder).folder

"""The contract between the spine and a step.

A step declares its parameters (a strict pydantic model whose keys are the recipe's), what it reads and gives
(ports), what it can tell before anything is computed (`plan`), and what it does (`run`). The spine never imports a
step's module by name: it finds the class through `residency.catalog`. Step modules import torch and the method
modules inside `run`, so that planning stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from residency.errors import PlanError

if TYPE_CHECKING:
    from residency.progress import Progress
    from residency.rows import Refused, Row

Kind = Literal["causal-lm", "text-encoder", "image-encoder", "classifier"]
"""What a model is: a step says which kinds it can work on (`require_kind`)."""


class Params(BaseModel):
    """Base of every parameter model: unknown keys refused, frozen, keys spelt with hyphens as in the recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model from its config and safetensors headers, before any weight is loaded.

    Sizes are counts unless their name says bytes. A planned model (the student of a later step) has the same facts,
    computed.
    """

    kind: Kind
    architecture: str
    parameters: int
    bytes_on_disk: int
    layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    kv_bytes_per_token: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    activation: str = ""
    layer_parameters: int = 0
    classes: int = 0
    max_tokens: int = 0
    tokenizer: str = ""
    tokenizer_folder: str = ""
    license: str | None = None
    exportable: dict[str, str | None] = field(default_factory=dict)

    def flops_per_token(self) -> float:
        """Multiply-adds of one forward pass for one token, times two (the usual 2 × parameters)."""
        return 2.0 * self.parameters

    def with_layers(self, layers: int) -> ModelFacts:
        """The facts after keeping `layers` of the decoder layers (embeddings and head stay)."""
        if not self.layers:
            return self
        within = self.layer_parameters * layers // self.layers
        parameters = self.parameters - self.layer_parameters + within
        return replace(
            self,
            layers=layers,
            layer_parameters=within,
            parameters=parameters,
            bytes_on_disk=int(self.bytes_on_disk * parameters / max(1, self.parameters)),
            kv_bytes_per_token=self.kv_bytes_per_token * layers // self.layers,
        )

    def with_width(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> ModelFacts:
        """The facts of a decoder in the llama layout after cutting (or merging) it to these sizes."""
        if not (self.layers and self.hidden and self.heads and self.kv_heads and self.ffn):
            return self

        def blocks(hidden: int, heads: int, kv_heads: int, ffn: int) -> int:
            return self.layers * hidden * (2 * (heads + kv_heads) * self.head_dim + 3 * ffn)

        rest = self.parameters - blocks(self.hidden, self.heads, self.kv_heads, self.ffn)
        smaller = blocks(hidden, heads, kv_heads, ffn)
        parameters = int(rest * hidden / self.hidden) + smaller
        return replace(
            self,
            layer_parameters=smaller,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            ffn=ffn,
            parameters=parameters,
            bytes_on_disk=int(self.bytes_on_disk * parameters / max(1, self.parameters)),
            kv_bytes_per_token=self.kv_bytes_per_token * kv_heads // self.kv_heads,
        )


@dataclass(frozen=True)
class State:
    """What the recipe holds at one point of the plan.

    Args:
        model: Facts of the current model.
        rows: Number of rows the next training step would see.
        tokens_per_row: Rough mean, for the time estimate.
        test_rows, guard_rows: Number of rows of the examination.
        source_rows: Rows of each of the sources that the step itself reads.
        metrics: The task's metric, and the guard's if there is one.
        others: Facts of the further models that the step names in `bases`.
    """

    model: ModelFacts
    rows: int
    tokens_per_row: int = 100
    test_rows: int = 0
    guard_rows: int = 0
    source_rows: dict[str, int] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    others: dict[str, ModelFacts] = field(default_factory=dict)

    @property
    def pool_rows(self) -> int:
        """Rows of all sources together."""
        return sum(self.source_rows.values())


@dataclass(frozen=True)
class Forecast:
    """What a step expects: the state after it, its work in floating-point operations, extra seconds and peak bytes."""

    after: State
    flops: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass
class Job:
    """Everything a running step may touch.

    Args:
        model: Folder of the current model.
        rows: JSONL of the rows to train on.
        examples: JSONL of the trusted K rows.
        test: JSONL of the test rows (read by the examination only).
        guard: JSONL of the guard rows or None.
        out: Empty folder for the step's outputs; becomes the step directory.
        scratch: Folder that survives a kill.
        seed: Seed of everything random.
        device: "cpu", "cuda" or "mps".
        read: Streams a data source named in the step's `sources` (use `stream`).
        base: Folder of a further model named in the step's `bases`, by its reference.
        progress: Where progress goes.
        task: The metric names of the task and the guard.
        quarantine: Takes the rows a step refuses.
        remote_code: Whether the recipe allows this base's remote code.
        sizes: Rough row counts of the step's sources, for progress.
    """

    model: Path
    rows: Path
    examples: Path
    test: Path
    guard: Path | None
    out: Path
    scratch: Path
    seed: int
    device: str
    read: Any
    base: Any
    progress: Progress
    task: dict[str, Any]
    quarantine: list[Refused] = field(default_factory=list)
    remote_code: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    def stream(self, source: str) -> Iterator[Row]:
        """The good rows of one of the step's sources; refused ones go to quarantine."""
        return self.read(source, self.quarantine)


@dataclass
class Outcome:
    """What a step leaves: files in `out` by port, deterministic figures for the report, and measured ones.

    Args:
        gives: Port → path relative to `out` ("rows": "rows.jsonl", "model": "model").
        summary: Flat, deterministic numbers and strings.
        figures: Figure specs (see docs/run-directory.md).
        measured: Seconds, bytes of memory: whatever differs from run to run.
        extra: Further deterministic content of the record (an examination's scores).
    """

    gives: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


ParamsModel = Params


class Step(ABC):
    """One kind of step.

    Class attributes:
        version: Part of the content address; raised when the same parameters would give another result.
        Params: The step's keys.
        reads: Ports whose content the result depends on, of "model", "rows", "examples", "test", "guard".
        gives: Ports it replaces, of "model", "rows".
        method: Name of the catalogue row of the method it applies, or None.
        beside: Whether it puts something beside weights it leaves alone; a step that made another model would lose it.
        unlabelled: Names of sources whose rows need no label.
    """

    version: ClassVar[int] = 1
    Params: ClassVar[type[ParamsModel]]
    reads: ClassVar[frozenset[str]] = frozenset({"model", "rows"})
    gives: ClassVar[frozenset[str]] = frozenset()
    beside: ClassVar[bool] = False
    unlabelled: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, params: ParamsModel) -> None:
        self.params = params

    @property
    def method(self) -> str | None:
        """The catalogue name of the method this step applies."""
        return None

    @property
    def title(self) -> str:
        """A few words for progress lines and the report."""
        return type(self).__name__.lower()

    def sources(self) -> dict[str, str]:
        """Data references the step reads besides the ports: name → reference as written in the recipe."""
        return {}

    def bases(self) -> dict[str, str]:
        """Further models the step loads: name → reference (a student checkpoint, an encoder)."""
        return {}

    def tiny(self) -> Step:
        """The same step at its smallest, for `--tiny` rehearsals."""
        return self

    @abstractmethod
    def plan(self, state: State) -> Forecast:
        """Say what would come out and what it costs, without computing.

        Raises:
            PlanError: When the step cannot work here.
        """

    @abstractmethod
    def run(self, job: Job) -> Outcome:
        """Do it. Write only below `job.out` and `job.scratch`."""


class Examination(Step):
    """The step that scores models; the spine asks it, and nobody else, what scores mean."""

    @abstractmethod
    def properties(self, metric: str) -> dict[str, Any]:
        """Unit, direction and chance level of a metric."""

    @abstractmethod
    def compare(self, after: dict[str, Any], before: dict[str, Any], task: str, guard: str | None) -> dict[str, Any]:
        """One entry of run.json's `comparisons`, from two entries of its `exams`."""


def require_kind(state: State, kinds: tuple[str, ...], step: str) -> None:
    """Refuse a step whose model is of another kind, with what would help."""
    if state.model.kind not in kinds:
        raise PlanError(
            f"`{step}` needs a {' or '.join(kinds)}, but at this point the model is a {state.model.kind}",
            hint=f"choose a base of kind {kinds[0]}, or move the step",
        )

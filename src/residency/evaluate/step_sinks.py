"""Recipe step of the evaluate stage: `sinks`, which looks into the current model and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from residency.errors import DataError, PlanError
from residency.step import Forecast, Job, Outcome, Params, State, Step, require_kind

if TYPE_CHECKING:
    from residency.evaluate.sinkcosts import EvictionCost, QuantisationCost
    from residency.evaluate.sinks import SinkMap

ARCHITECTURES = tuple(
    f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
)
"""Those of `sinks.FAMILIES`, so that a plan can refuse others before weights are read."""


class SinksParams(Params):
    """Keys of `sinks`."""

    rows: int = Field(16, ge=1)
    """Texts per domain: the first of the task's examples, and of the guard if there is one."""
    max_tokens: int = Field(256, ge=16)
    """Longer texts are cut here."""
    dormant: float = Field(0.5, gt=0, lt=1)
    """Mean attention on the first token above which a head counts as dormant."""
    draws: int = Field(3, ge=1)
    """How many other tokens are dropped from the cache in turn, to compare with dropping the first."""


class Sinks(Step):
    """Map where attention rests, and measure what the first token means for eviction and quantisation."""

    Params = SinksParams
    params: SinksParams
    reads = frozenset({"model", "examples", "guard"})

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return "attention-sinks"

    @property
    def title(self) -> str:
        """See `Step.title`."""
        return f"sinks · {self.params.rows} texts per domain"

    def tiny(self) -> Sinks:
        """See `Step.tiny`."""
        return Sinks(self.params.model_copy(update={"rows": 3, "max_tokens": 48, "draws": 1}))

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "sinks")
        p, model = self.params, state.model
        if model.architecture not in ARCHITECTURES:
            raise PlanError(
                f"the attention of a {model.architecture} is not known to the sink probe",
                hint=f"supported: {', '.join(ARCHITECTURES)}",
            )
        domains = 1 + bool(state.guard_rows)
        tokens = domains * p.rows * min(p.max_tokens, state.tokens_per_row) * (7.5 + p.draws / 2)
        wide = max(512, (4 + p.draws) * p.max_tokens // 2)  # tokens whose logits are held at once, twice
        peak = 4 * (model.parameters + 2 * wide * model.vocabulary) + (256 << 20)
        note = f"{domains} domain{'s' * (domains > 1)}: the task's examples{' and the guard' * (domains > 1)}"
        return Forecast(state, flops=tokens * model.flops_per_token(), peak_bytes=peak, notes=(note,))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases
        from residency.evaluate import sinkcosts, sinks

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        texts = {"task": _texts(job.examples, tokenizer, p, job)}
        if job.guard is not None:
            texts["guard"] = _texts(job.guard, tokenizer, p, job)
        model = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code)
        maps: dict[str, SinkMap] = {}
        evicted, rounded, rested = {}, {}, {}
        with job.progress.task("attention sinks", 4 * len(texts)) as advance:
            for name, ids in texts.items():
                batches = [sinkcosts.padded(group) for group in sinkcosts.groups(ids, 8 * p.max_tokens)]
                maps[name] = sinks.diagnose(model, batches, name)
                advance(note=f"{name}: map")
                evicted[name] = sinkcosts.eviction_cost(model, ids, draws=p.draws, seed=job.seed)
                advance(note=f"{name}: eviction")
                rounded[name] = sinkcosts.quantisation_cost(model, ids)
                advance(note=f"{name}: quantisation")
                with _at_rest(model, maps[name].dormant(p.dormant)):
                    rested[name] = sinkcosts.mean_nats(model, ids) - rounded[name].nats
                advance(note=f"{name}: dormant heads")
        summary: dict[str, Any] = {}
        for name, found in maps.items():
            cost, error = evicted[name], rounded[name]
            summary |= {
                f"{name}_texts": found.rows,
                f"{name}_tokens": found.tokens,
                f"{name}_attention_on_first_token": round(found.share, 4),
                f"{name}_dormant_heads": f"{len(found.dormant(p.dormant))} of {found.gap.numel()}",
                f"{name}_dormant_heads_at_rest_nats": round(rested[name], 4),
                f"{name}_residual_peak": _number(float(found.residual_ratio.max())),
                f"{name}_dropping_first_token_nats": round(cost.without_first - cost.whole, 4),
                f"{name}_dropping_another_token_nats": round(cost.without_another - cost.whole, 4),
                f"{name}_int8_nats": round(error.nats_shared - error.nats, 4),
                f"{name}_int8_first_token_apart_nats": round(error.nats_apart - error.nats, 4),
            }
        return Outcome(summary=summary, figures=_figures(maps, evicted, rounded, rested, p))


@contextmanager
def _at_rest(model: Any, heads: list[tuple[int, int]]) -> Iterator[None]:
    """All attention of some heads on the first token."""
    from residency.evaluate.ablate import move_to_first

    with ExitStack() as blocks:
        for layer in sorted({layer for layer, _ in heads}):
            blocks.enter_context(move_to_first(model, layer, [h for at, h in heads if at == layer]))
        yield


def _texts(file: Any, tokenizer: Any, params: SinksParams, job: Job) -> list[list[int]]:
    """The first rows of a file as token ids, cut at `max_tokens`."""
    from residency import rows, tokens

    items, refused = tokens.encode_all(rows.load(file)[: params.rows], tokenizer, 1 << 40)
    job.quarantine += refused
    texts = [[*item.prompt, *item.answer][: params.max_tokens] for item in items]
    if not any(len(text) > 8 for text in texts):
        raise DataError(
            "no text is longer than 8 tokens, so there is no attention to look at",
            where=file.name,
            hint="give longer rows, or more of them (`rows`)",
        )
    return texts


# ------------------------------------------------------------------ figures


def _number(value: float) -> float | None:
    """Four significant digits, or None where there is no finite number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _advice(dormant: int, nats: float) -> str:
    if not dormant:
        return "no head to spare"
    return "candidates for removal, on texts like these" if nats < 0.05 else "together they still do something"


def _signed(nats: float) -> str:
    """Three digits with a sign, and no minus before a zero."""
    return f"{round(nats, 3) + 0.0:+.3f}"


def _figures(
    maps: dict[str, SinkMap],
    evicted: dict[str, EvictionCost],
    rounded: dict[str, QuantisationCost],
    rested: dict[str, float],
    p: SinksParams,
) -> list[dict[str, Any]]:
    figures = []
    for name, found in maps.items():
        figures.append(_map(f"Attention on the first token · {name}", found.sink_mass, [0.0, 1.0]))
        note = "Norm of the first token's value as written to the residual stream; 1 is that of the other tokens."
        figures.append(_map(f"Value of the first token · {name}", found.value_ratio, [0.0, 2.0]) | {"note": note})
    figures += [_residuals(maps), _meaning(maps, evicted, rounded, rested, p)]
    if len(maps) == 2:
        figures.append(_changed(maps["task"], maps["guard"], p.dormant))
    return [*figures, _evictions(evicted), _errors(rounded)]


def _map(title: str, values: Any, ends: list[float]) -> dict[str, Any]:
    return {
        "kind": "heatmap",
        "title": title,
        "xlabel": "head",
        "ylabel": "decoder layer",
        "x": list(range(values.shape[1])),
        "y": list(range(values.shape[0])),
        "z": [[_number(v) for v in row] for row in values.tolist()],
        "range": ends,
    }


def _residuals(maps: dict[str, SinkMap]) -> dict[str, Any]:
    series = []
    for name, found in maps.items():
        for who, norms in (("first token", found.residual_first), ("other tokens", found.residual_others)):
            y = [_number(math.log10(max(v, 1e-30))) for v in norms.tolist()]
            series.append({"name": f"{who} · {name}", "x": list(range(len(y))), "y": y})
    return {
        "kind": "lines",
        "title": "Residual stream",
        "xlabel": "after layer (0: the embedding)",
        "ylabel": "log10 of the norm",
        "series": series,
    }


def _changed(a: SinkMap, b: SinkMap, dormant: float) -> dict[str, Any]:
    from residency.evaluate.sinks import changed_heads

    def state(mass: float) -> str:
        return "dormant" if mass > dormant else "active"

    heads = changed_heads(a, b)
    return {
        "kind": "table",
        "title": "Heads that differ most between the domains",
        "columns": ["layer", "head", f"on the first token · {a.domain}", f"on the first token · {b.domain}", "state"],
        "rows": [[layer, h, round(x, 3), round(y, 3), f"{state(x)} → {state(y)}"] for layer, h, x, y in heads],
        "note": f"State from {a.domain} to {b.domain}; dormant: more than {dormant:g} of the attention is on the first "
        "token.",
    }


def _meaning(
    maps: dict[str, SinkMap],
    evicted: dict[str, EvictionCost],
    rounded: dict[str, QuantisationCost],
    rested: dict[str, float],
    p: SinksParams,
) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for name, found in maps.items():
        cost, error = evicted[name], rounded[name]
        first, another = cost.without_first - cost.whole, cost.without_another - cost.whole
        shared, apart = error.nats_shared - error.nats, error.nats_apart - error.nats
        dormant = len(found.dormant(p.dormant))
        heads = f"{dormant} of {found.gap.numel()}"
        rows += [
            [
                name,
                "dormant heads",
                f"{heads}, {_signed(rested[name])} nats if they rest for good",
                _advice(dormant, rested[name]),
            ],
            [name, "attention on the first token", f"{found.share:.1%}", "what the model spends on doing nothing"],
            [
                name,
                "dropping the first token from the cache",
                f"{_signed(first)} nats, another token {_signed(another)}",
                "any eviction policy must keep it" if first > 10 * max(another, 0.001) else "it is a token like others",
            ],
            [
                name,
                "int8 activations, one scale per tensor",
                f"{_signed(shared)} nats, first token apart {_signed(apart)}",
                "keep the first token out of the scale"
                if shared > 2 * max(apart, 0.001)
                else "the first token is not what costs",
            ],
        ]
    return {"kind": "table", "title": "What it means", "columns": ["domain", "", "measured", "so"], "rows": rows}


def _evictions(evicted: dict[str, EvictionCost]) -> dict[str, Any]:
    names = {
        "without another": "without_another",
        "without the first": "without_first",
        "newest half": "newest",
        "first + newest half": "first_and_newest",
    }
    x, y, group = [], [], []
    for domain, cost in evicted.items():
        for label, name in names.items():
            x.append(label)
            y.append(round(getattr(cost, name) - cost.whole, 4))
            group.append(domain)
    return {
        "kind": "bars",
        "title": "What dropping entries of the cache costs",
        "xlabel": "cache of the text's first half",
        "ylabel": "nats per token above the whole cache",
        "x": x,
        "y": y,
        "group": group,
    }


def _errors(rounded: dict[str, QuantisationCost]) -> dict[str, Any]:
    series = []
    for domain, cost in rounded.items():
        for who, errors in (("one scale", cost.error_shared), ("first token apart", cost.error_apart)):
            y = [_number(v) for v in errors.tolist()]
            series.append({"name": f"{who} · {domain}", "x": list(range(len(y))), "y": y})
    return {
        "kind": "lines",
        "title": "Error of int8 activations per layer",
        "xlabel": "decoder layer",
        "ylabel": "squared error of the other tokens, share of their squares",
        "series": series,
        "note": "Simulated int8 arithmetic, one scale per tensor and text.",
    }

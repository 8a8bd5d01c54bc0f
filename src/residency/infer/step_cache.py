"""Recipe step of the infer stage: `cache`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from residency.errors import PlanError
from residency.infer.families import config_of, unevictable
from residency.step import Forecast, Job, Outcome, Params, State, Step, require_kind

FILE = "cache.json"
"""Where a model folder says how its cache is to be held; `citrus.from_json` reads it."""

METHODS = {"citrus": "citrus", "streaming": "streaming-llm", "h2o": "h2o", "tova": "tova", "snapkv": "snapkv"}
"""Value of the key `method` → name in the catalogue."""


class CacheParams(Params):
    """Keys of `cache`."""

    method: Literal["citrus", "streaming", "h2o", "tova", "snapkv"] = "citrus"
    """Who decides what is kept: the question (citrus), recency, summed attention, the last token, the prompt's end."""
    budget: int = Field(768, ge=8)
    """Entries per layer that remain of a prompt, besides the question itself and the answer."""
    chunk: int = Field(256, ge=1)
    """Tokens read at once; between chunks the cache holds at most budget + chunk entries (snapkv: everything)."""
    mode: Literal["shared", "standard", "individual"] | None = None
    """Of citrus: whose attention judges. By default shared; standard is blind to the question, individual costs twice
    the memory.
    """
    window: int = Field(64, ge=1)
    """The last tokens of a prompt that count as its question where nobody says how long it is."""
    sinks: int | None = Field(None, ge=0)
    """Of streaming: how many of the first tokens always stay; by default 4."""
    bounded: bool = False
    """Of streaming, h2o and tova: whether the answer's own tokens count against budget + chunk too."""
    rows: int = Field(4, ge=1)
    """Documents on which cost and saving are measured: the task's rows joined, with one's question at the end."""
    context: int = Field(1024, ge=64)
    """Tokens of each of those documents, if there are enough rows."""
    compressions: tuple[int, ...] = (2, 4, 8, 16)
    """For the figure: a document is also read with a budget of its own length divided by each of these."""

    @model_validator(mode="after")
    def _belong(self) -> CacheParams:
        if self.mode is not None and self.method != "citrus":
            raise ValueError(f"`mode` belongs to method: citrus, and the method is {self.method}")
        if self.sinks is not None and self.method != "streaming":
            raise ValueError(f"`sinks` belongs to method: streaming, and the method is {self.method}")
        if self.sinks is not None and self.sinks >= self.budget:
            raise ValueError(f"{self.sinks} first tokens leave nothing of a budget of {self.budget} for recent ones")
        if self.bounded and self.method in ("citrus", "snapkv"):
            raise ValueError(f"{self.method} judges by a question, and while an answer is written there is none")
        if any(factor < 2 for factor in self.compressions):
            raise ValueError(f"a compression is at least 2, got {self.compressions}")
        return self

    def settings(self) -> dict[str, Any]:
        """The content of cache.json."""
        own: dict[str, Any] = {"method": self.method, "budget": self.budget, "chunk": self.chunk, "window": self.window}
        if self.method == "citrus":
            own["mode"] = self.mode or "shared"
        if self.method == "streaming":
            own["sinks"] = 4 if self.sinks is None else self.sinks
        if self.method in ("streaming", "h2o", "tova"):
            own["bounded"] = self.bounded
        return own


class Cache(Step):
    """Hold the cache of long prompts to a budget; weights stay as they are."""

    Params = CacheParams
    params: CacheParams
    gives = frozenset({"model"})
    beside = True

    @property
    def method(self) -> str:
        """See `Step.method`."""
        return METHODS[self.params.method]

    @property
    def title(self) -> str:
        """See `Step.title`."""
        p = self.params
        name = f"citrus, {p.mode or 'shared'}" if p.method == "citrus" else p.method
        return f"cache · {name}, {p.budget:,} entries"

    def tiny(self) -> Cache:
        """See `Step.tiny`."""
        return Cache(
            self.params.model_copy(update={"rows": 1, "context": 96, "compressions": self.params.compressions[:1]})
        )

    def plan(self, state: State) -> Forecast:
        """See `Step.plan`."""
        require_kind(state, ("causal-lm",), "cache")
        p, model = self.params, state.model
        if (reason := unevictable(config_of(model.architecture, model.tokenizer_folder))) is not None:
            raise PlanError(f"entries of this model's cache cannot be evicted: {reason}", hint="leave out `cache`")
        entries = p.budget + 2 * p.chunk + p.window
        held = entries * model.kv_bytes_per_token * (2 if p.mode == "individual" else 1)
        note = f"at most {held / 2**20:,.0f} MiB of keys and values ({entries:,} entries) however long the prompt"
        if p.method == "snapkv":
            note = (
                f"{p.budget * model.kv_bytes_per_token / 2**20:,.0f} MiB of keys and values behind a prompt; "
                "while it is read they grow with its length, for snapkv judges once, at its end"
            )
        elif p.mode == "individual":
            note += ", two caches of it while the prompt is read"
        passes = (2 + len(p.compressions)) * p.rows * p.context
        peak = 4 * model.parameters + 4 * model.kv_bytes_per_token * p.context
        return Forecast(state, flops=1.5 * passes * model.flops_per_token(), peak_bytes=peak, notes=(note,))

    def run(self, job: Job) -> Outcome:
        """See `Step.run`."""
        from residency import bases, rows, store
        from residency.infer.cachecost import Document, answer_loss, documents, savings, tightened
        from residency.infer.citrus import from_json
        from residency.infer.evicting import Evicting
        from residency.infer.eviction import Full

        p = self.params
        tokenizer = bases.load_tokenizer(job.model, remote_code=job.remote_code)
        model = bases.load_causal_lm(job.model, job.device, remote_code=job.remote_code)
        decoder, full = from_json(p.settings()), Evicting(Full(), chunk=p.chunk)
        texts = documents(rows.load(job.rows), tokenizer, p.rows, p.context, job.seed)

        def losses(of: Callable[[Document], Evicting], label: str) -> list[float]:
            found = []
            with job.progress.task(label, len(texts)) as advance:
                for text in texts:
                    found.append(answer_loss(model, of(text), text))
                    advance()
            return found

        before = losses(lambda _: full, "reading with the full cache")
        after = losses(lambda _: decoder, f"reading with {p.budget:,} entries")
        sweep: dict[int, list[float]] = {}
        for factor in p.compressions:

            def shrunk(text: Document, factor: int = factor) -> Evicting:
                return tightened(decoder, max(8, 2 * (p.sinks or 0), len(text.context) // factor))

            sweep[factor] = losses(shrunk, f"reading at 1/{factor}")
        longest = max(texts, key=lambda text: len(text.context))
        promise = p.budget, decoder.entries(len(longest.instruction))
        costs = {"full": savings(model, full, longest), p.method: savings(model, decoder, longest, promise)}
        held = costs[p.method]
        store.link_folder(job.model, job.out / "model")
        store.write_json(job.out / "model" / FILE, p.settings())
        mean = statistics.mean
        return Outcome(
            gives={"model": "model"},
            summary={
                "documents": len(texts),
                "context_tokens": round(mean(len(text.context) for text in texts)),
                "loss_full": round(mean(before), 4),
                "loss_held": round(mean(after), 4),
                **{f"loss_1_{factor}": round(mean(found), 4) for factor, found in sweep.items()},
                "entries": held.entries,
                "bytes": held.bytes,
                "bytes_full": costs["full"].bytes,
            },
            figures=_figures(self.title, before, sweep, texts),
            measured={
                "prefill_seconds": {name: round(cost.prefill_seconds, 3) for name, cost in costs.items()},
                "decode_ms_per_token": {name: round(cost.decode_ms, 2) for name, cost in costs.items()},
            },
        )


def _figures(title: str, before: list[float], sweep: dict[int, list[float]], texts: list[Any]) -> list[dict[str, Any]]:
    if not sweep:
        return []
    x = [1, *sweep]
    rows = [before, *sweep.values()]
    lines = {
        "kind": "lines",
        "title": "What a smaller cache costs",
        "xlabel": "tokens of the text per entry kept",
        "ylabel": "nats per token of an answer that stands in the text",
        "series": [
            {
                "name": title.removeprefix("cache · ").rsplit(",", 1)[0],
                "x": x,
                "y": [round(statistics.mean(r), 4) for r in rows],
            },
            {"name": "full cache", "x": x, "y": [round(statistics.mean(before), 4)] * len(x)},
        ],
    }
    order = sorted(range(len(texts)), key=lambda i: texts[i].depth)
    depths = {
        "kind": "heatmap",
        "title": "Loss of the answer by where it stood",
        "xlabel": "depth in the text",
        "ylabel": "tokens per entry kept",
        "x": [round(texts[i].depth, 2) for i in order],
        "y": x,
        "z": [[round(r[i], 4) for i in order] for r in rows],
    }
    return [lines, depths]

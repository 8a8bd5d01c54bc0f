"""CItruS: a long text is read chunk by chunk, and what is kept of it is chosen by what the question attends to.

The idea. A cache of fixed size must forget, and forgetting by what the document itself attends to keeps its language
fluent but loses the facts somebody will ask for ("information neglect"). The question is known: so it is run over the
cache at every chunk, and what it attends to stays. With P entries per layer, instruction tokens X and a budget k:

    s_j   = mean over heads h and tokens x ∈ X of A[h, x, j],     A the softmax over [cache ; X], read off at the cache
    keep  = the k entries of largest s_j, in their old order; the chunk is appended whole

One choice serves all heads of a layer. An entry is judged again at every chunk (a cascade), and never returns.

    standard     X is the chunk: eviction by the document, the paper's baseline for its own idea
    shared       X is the instruction, in the same pass as the chunk (`prefill`); the paper's recommendation, and ours
    individual   the document is read through a standard cache; the instruction keeps a second one, fed with the same
                 states: twice the memory

In all modes the instruction is at the end run over what is left, the k entries it attends to most remain, and it is
run again behind them to answer: k + M entries when generation starts, growing by the answer. Positions are compact:
they never pass (k + c) + max(c, M), so that texts longer than the model was trained for can be read.

The paper's: all of the above, with k = 768 and c = 256. Ours: one pass instead of two, scores from q · K of the
instruction alone instead of all attention, a buffer instead of copies, batches, GQA, sampling, conversations, contexts
of any length (`prefill`, `evicting`); and where nobody says how long the instruction is, the last `window` tokens of
the prompt.

Measured (`benchmarks/eviction.py`, SmolLM2-135M, Moby Dick, 8 to 50 tokens per entry): names of planted facts are
likelier than behind any question-blind policy in 9 of 9 comparisons with each; keys of digits are not (H2O is ahead in
5 of 6).

Cost and memory: see `prefill`. Limits: what the question does not attend to when a chunk goes by is gone, so a
second question about the same text needs it read again; facts that only make sense together are judged alone.

Paper: Bai, Zou, Huang, Chen, Rondeau, Gao, Cheung, "CItruS: Chunked Instruction-aware State Eviction for Long Sequence
Modeling", EMNLP 2024, arXiv 2406.12018. Official code: github.com/ybai-nlp/CItruS (no licence file: read for facts,
not copied; transformers 4.34 only, crashes on contexts of one chunk).

Example:
    >>> model.generate(ids, custom_generate=Citrus(budget=768, chunk=256), instruction_tokens=40, max_new_tokens=64)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from residency.errors import DataError
from residency.infer.evicting import WINDOW, Evicting
from residency.infer.eviction import H2O, TOVA, Asks, Policy, SnapKV, Streaming

Mode = Literal["shared", "standard", "individual"]


class Shared(Policy):
    """What the instruction attends to, all heads of a layer together."""

    asks: ClassVar[Asks | None] = "instruction"


class Standard(Policy):
    """What the newest chunk attends to, all heads of a layer together."""

    asks: ClassVar[Asks | None] = "chunk"


class Individual(Policy):
    """What the instruction attends to, in a cache that the document is not read through."""

    asks: ClassVar[Asks | None] = "instruction"
    separate: ClassVar[bool] = True


_MODES: dict[str, type[Policy]] = {"shared": Shared, "standard": Standard, "individual": Individual}


class Citrus(Evicting):
    """A decoder for `generate(custom_generate=…)` that reads long prompts with instruction-aware eviction.

    Args:
        budget: k; the paper's 768.
        chunk: c; the paper's 256.
        mode: Who judges: see the module.
        window: Instruction tokens where `generate` is not told `instruction_tokens`: the prompt's last.

    Raises:
        ValueError: For an unknown mode, or sizes below 1.
    """

    def __init__(self, budget: int = 768, chunk: int = 256, mode: Mode = "shared", *, window: int = WINDOW) -> None:
        if mode not in _MODES:
            raise ValueError(f"the mode is one of {', '.join(get_args(Mode))}, not {mode!r}")
        self.mode = mode
        super().__init__(_MODES[mode](), budget, chunk, window=window)


def from_json(settings: Mapping[str, Any]) -> Evicting:
    """The decoder that a model folder's cache.json asks for.

    Args:
        settings: "method" (citrus, streaming, h2o, tova, snapkv), and the parameters of that method: "budget", "chunk",
            "window"; "mode" of citrus; "sinks" of streaming; "bounded" of streaming, h2o and tova.

    Returns:
        What `generate(custom_generate=…)` takes. Without `instruction_tokens`, the prompt's last `window` tokens judge.

    Raises:
        DataError: For an unknown method or parameter, or values that do not fit.
    """
    given = dict(settings)
    method = given.pop("method", None)
    policy: dict[str, Any] = {k: given.pop(k) for k in ("sinks",) if k in given and method == "streaming"}
    try:
        if method == "citrus":
            return Citrus(**given)
        kinds: dict[Any, type[Policy]] = {"streaming": Streaming, "h2o": H2O, "tova": TOVA, "snapkv": SnapKV}
        if method not in kinds:
            raise ValueError(f"the method is one of citrus, {', '.join(kinds)}, not {method!r}")
        return Evicting(kinds[method](**policy), **given)
    except (TypeError, ValueError) as error:
        raise DataError(f"the cache settings do not fit: {error}", where="cache.json") from None

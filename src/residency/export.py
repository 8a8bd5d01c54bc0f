"""A specialist for another program: Hugging Face folder, GGUF file (llama.cpp, Ollama) or ONNX folder, with parity.

An export that was never read back is a guess. Each format is written beside its destination, read back by a reader
that is not ours, and run on the same probe (two batches of random tokens, one of them padded) as the original in
fp32. Only when the logits agree does it get its name:

    max |z' - z| <= tolerance x max |z|        over all probed positions;  hf 0,  gguf 1e-2,  onnx 1e-3 (our choice)

hf     Weights, configuration and tokenizer, without what training left lying about. Read back by
       AutoModelForCausalLM, with no weight missing, unexpected or of another shape.
gguf   Written by `ggufwriter`; read back by transformers' GGUF reader, which proves tensors, names and sizes.
onnx   torch.onnx.export(dynamo=True) of (input_ids, attention_mask) [B, T] → logits [B, T, V]; B and T free, no
       cache, fp32. Read back by ONNX Runtime.

Cost: the model twice in fp32 and a few forward passes; tracing ONNX takes about two seconds per layer.
`exportable` answers from config.json alone, without torch: the planner asks it before anything is computed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency import ggufwriter
from residency.errors import ExportError, MissingError

FORMATS = ("hf", "gguf", "onnx")
PACKAGES = {"hf": (), "gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = {"hf": 0.0, "gguf": 1e-2, "onnx": 1e-3}
"""Largest difference of logits, as a share of the largest logit."""

ONNX_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2"),
    *("gpt2", "gpt_neox", "opt"),
)
"""Model types of which a random model was exported and compared; mixtral and mamba fail under torch 2.13."""

KEEP = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "vocab.*", "merges.txt", "*.model", "README*", "LICENSE*"),
)
"""What belongs to a model besides its weights."""

Forward = Callable[[Any, Any], Any]
"""Token ids and attention mask [B, T] → logits [B, T, V]."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how closely it answers like the original.

    Args:
        path: The file (gguf) or folder.
        bytes: Its size.
        parity: max_abs_difference of logits, top1_agreement (share of positions with the same likeliest token),
            n_positions compared.
    """

    path: Path
    bytes: int
    parity: dict[str, float]


def exportable(config: Mapping[str, Any]) -> dict[str, str | None]:
    """Which formats a config.json allows: format → None, or the reason why not. Needs neither torch nor weights."""
    architecture = (config.get("architectures") or [""])[0]
    if "residency_kind" in config or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        what = config.get("residency_kind") or architecture or "a config without `architectures`"
        return dict.fromkeys(FORMATS, f"only language models are exported, and this is {what}")
    kind = config.get("model_type", "")
    tried = None if kind in ONNX_TYPES else f"ONNX was not tried with `{kind}`; it was with {', '.join(ONNX_TYPES)}"
    return {"hf": None, "gguf": ggufwriter.refusal(config), "onnx": tried}


def export(
    model_dir: Path | str,
    out: Path | str,
    to: str = "hf",
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    tolerance: float | None = None,
) -> ExportReport:
    """Write a model in another format and prove that it still gives the same logits.

    Args:
        model_dir: A folder in standard form: config.json, *.safetensors, tokenizer.
        out: The folder (hf, onnx) or file (gguf) to make.
        to: "hf", "gguf" or "onnx".
        dtype: gguf only: "f32", "f16" or "bf16"; None keeps the precision of the weights, which loses nothing.
        overwrite: Replace an earlier export at `out`; a folder that holds no model is never replaced.
        tolerance: Largest difference of logits as a share of the largest logit; None means `TOLERANCE`.

    Raises:
        ExportError: The model cannot take this form, `out` is taken, or the logits differ. Nothing is left behind.
        MissingError: A package of the extra `gguf` or `onnx` is not installed.
    """
    model_dir, out = Path(model_dir), Path(out)
    if to not in FORMATS:
        raise ExportError(f"there is no format `{to}`", hint=f"formats: {', '.join(FORMATS)}")
    if dtype is not None and (to != "gguf" or dtype not in ("f32", "f16", "bf16")):
        raise ExportError(f"{to} takes no dtype `{dtype}`", hint="gguf takes f32, f16 or bf16; hf and onnx take none")
    if not (model_dir / "config.json").is_file():
        raise ExportError("there is no config.json", where=str(model_dir), hint="give a folder that holds a model")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    possible = exportable(config)
    if reason := possible[to]:
        others = ", ".join(name for name, no in possible.items() if no is None)
        raise ExportError(f"no {to}: {reason}", where=str(model_dir), hint=f"possible: {others}" if others else None)
    for package in PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"{to} needs the package `{package}`", hint=f"pip install 'residency[{to}]'")
    with _appears(out, model_dir, overwrite) as temporary, _quiet():
        original = _load(model_dir)
        if to == "gguf":
            ggufwriter.write(model_dir, temporary, config, dtype)
            other = _forward(_load(temporary.parent, gguf_file=temporary.name))
        elif to == "onnx":
            other = _onnx(original, model_dir, temporary)
        else:
            temporary.mkdir()
            _copy(model_dir, temporary, ("*.safetensors", "*.safetensors.index.json", *KEEP))
            other = _forward(_load(temporary))
        parity = _parity(original, other)
        limit = (TOLERANCE[to] if tolerance is None else tolerance) * parity.pop("largest")
        if parity["max_abs_difference"] > limit:
            raise ExportError(
                f"the {to} export answers differently: logits differ by up to {parity['max_abs_difference']:.2e} where "
                f"{limit:.2e} is tolerated; the likeliest token is the same at {parity['top1_agreement']:.1%}",
                where=str(model_dir),
                hint="nothing was written; give a higher precision (dtype), or a tolerance if you can live with it",
            )
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    return ExportReport(out, sum(file.stat().st_size for file in files), parity)


def _load(folder: Path, **options: Any) -> Any:
    """The model in fp32, with every weight accounted for."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
    except Exception as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"transformers cannot load it: {what}", where=str(folder)) from error
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            what = f"{len(names)} {kind.replace('_keys', '')} weights, such as `{names[0]}`"
            raise ExportError(f"the weights do not fit the configuration: {what}", where=str(folder))
    return model.eval()


def _forward(model: Any) -> Forward:
    import torch

    def run(ids: Any, mask: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    return run


def _parity(model: Any, other: Forward) -> dict[str, float]:
    """Compare a model with another's logits on the probe; `largest` is the largest logit."""
    import torch

    vocabulary, generator, original = model.config.get_text_config().vocab_size, torch.Generator(), _forward(model)
    generator.manual_seed(0)
    difference = largest = 0.0
    same = positions = 0
    for rows, length, padding in ((1, 7, 0), (3, 20, 6)):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        a, b = (torch.as_tensor(logits)[mask.bool()] for logits in (original(ids, mask), other(ids, mask)))  # [N, V]
        gap = (a - b).abs().max().item()
        difference = max(difference, gap if gap == gap else float("inf"))
        largest = max(largest, a.abs().max().item())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions += len(a)
    parity = {"max_abs_difference": difference, "top1_agreement": same / positions, "n_positions": positions}
    return parity | {"largest": largest}


def _onnx(original: Any, source: Path, target: Path) -> Forward:
    """Write an ONNX folder and return what ONNX Runtime makes of it."""
    import onnxruntime
    import torch

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # so that the export does not take "no padding" for granted
    names, free = ["input_ids", "attention_mask"], {0: "batch", 1: "sequence"}
    options: dict[str, Any] = {"dynamo": True, "input_names": names, "output_names": ["logits"], "verbose": False}
    model = Logits(original)
    target.mkdir()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            program: Any = torch.onnx.export(model, (ids, mask), dynamic_shapes=(free, free), **options)
        program.save(target / "model.onnx")
        session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"torch could not translate it to ONNX: {first}", where=str(source), hint="export to hf or gguf"
        ) from error
    _copy(source, target, KEEP)
    return lambda ids, mask: session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def _appears(out: Path, model_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `out` when the block ends well, and vanishes when it does not."""
    here, source = out.resolve(), model_dir.resolve()
    if here == source or here in source.parents:
        raise ExportError("the export would replace the model itself", where=str(out), hint="choose another place")
    taken = out.exists() or out.is_symlink()
    if taken and not overwrite:
        raise ExportError("there is something here already", where=str(out), hint="choose another place, or overwrite")
    if taken and out.is_dir() and not (out / "config.json").is_file():
        raise ExportError("this folder holds no model, so it is not replaced", where=str(out), hint="choose another")
    token = uuid.uuid4().hex[:8]
    temporary, old = (out.with_name(f".{word}-{token}-{out.name}") for word in ("tmp", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if taken:
            out.rename(old)
        temporary.rename(out)
    except OSError as error:
        raise ExportError(
            f"cannot write: {error.strerror or error}", where=str(out), hint="is the disk full?"
        ) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep other libraries' advice off the terminal."""
    from residency.compat import quiet_transformers

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "gguf.gguf_writer")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

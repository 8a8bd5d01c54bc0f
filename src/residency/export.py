"""A specialist for another program: Hugging Face folder, GGUF file (llama.cpp, Ollama) or ONNX folder, with parity.

An export that was never read back is a guess. Each format is written beside its destination, read back by a reader
that is not ours, and run on the same probe (two batches of random tokens, one of them padded) as the original in
fp32. Only when the logits agree does it get its name; what is there already is replaced only when told to.

    max |z' - z| <= tolerance x max |z|        over all probed positions;  hf 0,  gguf 1e-2,  onnx 1e-3 (our choice)

hf     The weights, the configuration and the tokenizer, without what training left lying about. Loaded by
       AutoModelForCausalLM with no missing, unexpected or misshapen weight.
gguf   Written with the gguf package; tensors as bf16, f16 or f32 (vectors always f32). llama.cpp rotates pairs of
       neighbours where transformers rotates halves, so the rows of each query and key head of a Llama are interleaved:
       row (2, d/2) → (d/2, 2). Qwen2 is rotated by halves in both. Read back by transformers' own GGUF reader. That
       proves tensors, names and sizes; the tokenizer is carried over by rules, because llama.cpp knows
       pre-tokenizers by name only: one that has none is refused.
onnx   torch.onnx.export(dynamo=True) of (input_ids, attention_mask) [B, T] → logits [B, T, V], B and T free, without a
       cache, in fp32. Read back by ONNX Runtime.

Formats: the GGUF specification and llama.cpp's convert_hf_to_gguf.py, with which a converted SmolLM2 was compared
tensor by tensor; ONNX opset of torch's exporter. Cost: the model twice in fp32, a few forward passes; ONNX tracing
takes seconds per layer of depth. `exportable` answers from config.json alone, without torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency.errors import ExportError, MissingError

FORMATS = ("hf", "gguf", "onnx")
TOLERANCE = {"hf": 0.0, "gguf": 1e-2, "onnx": 1e-3}
"""Largest difference of logits, as a share of the largest logit. f16 of a 30-layer model differs by about 1e-3."""

GGUF_ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
ONNX_TYPES = frozenset(
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 granite smollm3 olmo2 gpt2 gpt_neox opt".split()
)
"""Model types whose tiny random models were exported and compared; mixtral and mamba fail in torch 2.13."""

_KEEP = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "*.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "README*", "LICENSE*")  # fmt: skip
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
"""Regular expressions of tokenizer.json → llama.cpp's names for them (llama-vocab.cpp)."""


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
        what = config.get("residency_kind") or architecture or "a model without `architectures`"
        return dict.fromkeys(FORMATS, f"only language models are exported, and this is {what}")
    kind = config.get("model_type", "")
    onnx = None if kind in ONNX_TYPES else f"ONNX was never tried with `{kind}`; tried: {', '.join(sorted(ONNX_TYPES))}"
    return {"hf": None, "gguf": _no_gguf(config, architecture), "onnx": onnx}


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
        overwrite: Replace an earlier export at `out`; any other folder is never replaced.
        tolerance: Largest difference of logits as a share of the largest logit; None means `TOLERANCE`.

    Raises:
        ExportError: The model cannot take this form, `out` is taken, or the logits differ. Nothing is left behind.
        MissingError: A package of the extra `gguf` or `onnx` is not installed.
    """
    model_dir, out = Path(model_dir), Path(out)
    if to not in FORMATS:
        raise ExportError(f"there is no format `{to}`", hint=f"formats: {', '.join(FORMATS)}")
    if dtype is not None and (to != "gguf" or dtype not in ("f32", "f16", "bf16")):
        raise ExportError(
            f"dtype `{dtype}` does not go with {to}", hint="gguf takes f32, f16 or bf16; others take none"
        )
    if not (model_dir / "config.json").is_file():
        raise ExportError("there is no config.json", where=str(model_dir), hint="give a folder that holds a model")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if reason := exportable(config)[to]:
        raise ExportError(f"cannot write {to}: {reason}", where=str(model_dir), hint=_alternative(config))
    for package in {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}.get(to, ()):
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"{to} needs the package `{package}`", hint=f"pip install 'residency[{to}]'")
    write: dict[str, Callable[[Path, Path], Callable[..., Any]]] = {
        "hf": _write_hf,
        "gguf": lambda source, target: _write_gguf(source, target, config, dtype),
        "onnx": _write_onnx,
    }
    with _appears(out, model_dir, overwrite) as temporary, _quiet():
        read_back = write[to](model_dir, temporary)
        parity = _parity(_load(model_dir), read_back)
        limit = (TOLERANCE[to] if tolerance is None else tolerance) * parity.pop("largest")
        if not parity["max_abs_difference"] <= limit:
            raise ExportError(
                f"the {to} export answers differently: logits differ by {parity['max_abs_difference']:.2e}, at most "
                f"{limit:.2e} was expected; the likeliest token agrees at {parity['top1_agreement']:.1%} of positions",
                where=str(model_dir),
                hint="give a higher precision (dtype) or a tolerance if you can live with it; nothing was written",
            )
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    return ExportReport(out, sum(file.stat().st_size for file in files), parity)


# ------------------------------------------------------------------ parity


def _load(folder: Path, **options: Any) -> Any:
    """The model in fp32, with every weight accounted for."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    wrong = {
        kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if found := [f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items() if names]:
        raise ExportError(f"the weights do not fit the configuration ({'; '.join(found)})", where=str(folder))
    return model.eval()


def _logits(model: Any) -> Callable[..., Any]:
    import torch

    def run(ids: Any, mask: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()

    return run


def _parity(model: Any, other: Callable[..., Any]) -> dict[str, float]:
    """Compare two functions (ids, mask) → logits [B, T, V] on the probe."""
    import torch

    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    difference, largest, same, positions = 0.0, 0.0, 0, 0
    for rows, length, padding in ((1, 7, 0), (3, 20, 6)):
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        real = mask.bool()
        a, b = _logits(model)(ids, mask)[real], torch.as_tensor(other(ids, mask))[real]  # [N, V]
        gap = (a - b).abs().max().item()
        difference = max(difference, gap if gap == gap else float("inf"))
        largest = max(largest, a.abs().max().item())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions += len(a)
    return {
        "max_abs_difference": difference,
        "top1_agreement": same / positions,
        "n_positions": positions,
        "largest": largest,
    }


# ------------------------------------------------------------------ hf and onnx


def _write_hf(source: Path, target: Path) -> Callable[..., Any]:
    target.mkdir()
    _copy(source, target, _KEEP)
    return _logits(_load(target))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copy2(file, target / file.name)


def _write_onnx(source: Path, target: Path) -> Callable[..., Any]:
    import onnxruntime
    import torch

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    target.mkdir()
    ids = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # so that the export does not take "no padding" for granted
    names, free = ["input_ids", "attention_mask"], {0: "batch", 1: "sequence"}
    try:
        program = torch.onnx.export(
            Logits(_load(source)),
            (ids, mask),
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(free, free),
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch returned no program")
        program.save(target / "model.onnx")
    except Exception as error:
        raise ExportError(
            f"torch could not translate this model to ONNX ({str(error).splitlines()[0]})",
            where=str(source),
            hint="export to hf or gguf",
        ) from error
    _copy(source, target, tuple(pattern for pattern in _KEEP if "safetensors" not in pattern))
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(["logits"], dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))[0]


# ------------------------------------------------------------------ gguf


def _no_gguf(config: Mapping[str, Any], architecture: str) -> str | None:
    """Why llama.cpp's graph of this architecture would compute something else; None if it would not."""
    if architecture not in GGUF_ARCHITECTURES:
        return f"no GGUF writer for {architecture}; there is one for {', '.join(GGUF_ARCHITECTURES)}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config.get("num_attention_heads") or 1
    checks = {
        "attention biases": bool(config.get("attention_bias")) or bool(config.get("mlp_bias")),
        f"the activation {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        f"rope of type {rope.get('rope_type', rope.get('type'))}": rope.get("rope_type", rope.get("type", "default"))
        != "default",
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": bool(config.get("sliding_window")) and config.get("use_sliding_window", True),
        "heads of another size than hidden_size / num_attention_heads": architecture == "Qwen2ForCausalLM"
        and config.get("head_dim", config.get("hidden_size", 0) // heads) * heads != config.get("hidden_size", 0),
    }
    found = next((what for what, there in checks.items() if there), None)
    return f"llama.cpp's {GGUF_ARCHITECTURES[architecture]} graph has no place for {found}" if found else None


def _write_gguf(source: Path, target: Path, config: Mapping[str, Any], dtype: str | None) -> Callable[..., Any]:
    import gguf
    import torch

    name = GGUF_ARCHITECTURES[config["architectures"][0]]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    stored = {"float16": "f16", "bfloat16": "bf16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")
    kind = gguf.GGMLQuantizationType[(dtype or stored).upper()]
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}

    writer = gguf.GGUFWriter(target, name)
    writer.add_type("model")
    writer.add_name(source.resolve().name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(
        gguf.LlamaFileType.ALL_F32 if kind.name == "F32" else gguf.LlamaFileType[f"MOSTLY_{kind.name}"]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_tokenizer(writer, source, config)

    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors: list[tuple[str, Callable[[], torch.Tensor], Any]] = []
    for key, shape, read in _weights(source):
        if key == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # llama.cpp takes the embeddings where there is no output.weight
        new = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ExportError(f"llama.cpp has no name for the weight `{key}`", where=str(source), hint="export to hf")
        tensors.append((new, _rotated(read, key, heads, groups) if name == "llama" else read, shape))
        raw = kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        size = gguf.GGML_QUANT_SIZES[raw][1]
        writer.add_tensor_info(new, shape, _numpy_type(raw.name), size * _product(shape), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, read, shape in tensors:  # one tensor in memory at a time
        target_type = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[
            kind.name if len(shape) > 1 else "F32"
        ]
        tensor = read().to(target_type).contiguous()
        writer.write_tensor_data((tensor.view(torch.int16) if target_type == torch.bfloat16 else tensor).numpy())
    writer.close()
    return _logits(_load(target.parent, gguf_file=target.name))


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _numpy_type(raw: str) -> Any:
    import numpy as np

    return np.dtype({"F32": "float32", "F16": "float16", "BF16": "int16"}[raw])


def _weights(source: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """Name, shape and a reader of every weight of a folder."""
    from safetensors import safe_open

    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield key, tuple(handle.get_slice(key).get_shape()), _reader(file, key)


def _reader(file: Path, key: str) -> Callable[[], Any]:
    from safetensors import safe_open

    def read() -> Any:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(key)

    return read


def _rotated(read: Callable[[], Any], key: str, heads: int, groups: int) -> Callable[[], Any]:
    """From halves to neighbours: the row order llama.cpp's rotary embedding of a Llama expects."""
    n = heads if ".q_proj." in key else groups if ".k_proj." in key else 0
    if not n:
        return read

    def turned() -> Any:
        weight = read()  # [n d, D]
        return weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    return turned


def _write_tokenizer(writer: Any, source: Path, config: Mapping[str, Any]) -> None:
    """The vocabulary, merges, special tokens and chat template of a byte-level BPE tokenizer."""
    import gguf
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    if not file.is_file():
        raise ExportError(
            "there is no tokenizer.json", where=str(source), hint="save a fast tokenizer beside the model"
        )
    data = json.loads(file.read_text(encoding="utf-8"))
    settings = _json(source / "tokenizer_config.json")
    model = data["model"]
    tokens = {i: (token, gguf.TokenType.NORMAL) for token, i in model.get("vocab", {}).items()} if _is_bpe(data) else {}
    for added in data.get("added_tokens") or []:
        type_ = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], type_)
    pre = _pre_tokenizer(data, source)
    size = config["vocab_size"]
    if max(tokens) >= size:
        raise ExportError(
            f"the tokenizer has the token {max(tokens)} and the model only {size}", where=str(file), hint="resize one"
        )
    filled = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in filled])
    writer.add_token_types([type_ for _, type_ in filled])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    writer.add_token_merges(merges or [" ".join([filled[0][0]] * 2)])  # an empty array cannot be written; never applies
    ids = {token: i for i, (token, _) in tokens.items()}
    special: dict[str, int | None] = {}
    for role in ("bos", "eos", "unk", "pad"):
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        other = config.get(f"{role}_token_id")
        special[role] = ids.get(named, (other[0] if isinstance(other, list) else other) if named is None else None)
        if special[role] is not None:
            getattr(writer, f"add_{role}_token_id")(special[role])
    encoded = Tokenizer.from_file(str(file)).encode("a").ids
    writer.add_add_bos_token(special["bos"] is not None and encoded[:1] == [special["bos"]])
    writer.add_add_space_prefix(False)
    template = source / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)


def _is_bpe(data: Mapping[str, Any]) -> bool:
    return data["model"].get("type") == "BPE" and not data["model"].get("byte_fallback")


def _pre_tokenizer(data: Mapping[str, Any], source: Path) -> str:
    """llama.cpp's name for a tokenizer.json's way of cutting text before merging.

    Raises:
        ExportError: It has none; named with what it is.
    """
    outer = data.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer]) if outer else []
    shape = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            shape.append("bytes+words" if step.get("use_regex", True) else "bytes")
        elif kind == "Digits" and step.get("individual_digits"):
            shape.append("digits")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            shape.append(_SPLITS.get(step["pattern"].get("Regex", ""), "an unknown expression"))
        else:
            shape.append(kind)
    normaliser = (data.get("normalizer") or {}).get("type")
    known = {("bytes+words",): "gpt-2", ("digits", "bytes+words"): "smollm"}
    known |= {(name, "bytes"): name for name in _SPLITS.values()}
    if _is_bpe(data) and normaliser in (None, "NFC"):
        if tuple(shape) in known:
            return known[tuple(shape)]
        if shape == ["bytes"] and not data["model"].get("merges"):
            return "gpt-2"  # every byte stays a token, wherever the text is cut
    what = f"{data['model'].get('type')}, normaliser {normaliser}, pre-tokeniser {' + '.join(shape) or 'none'}"
    raise ExportError(
        f"llama.cpp has no name we know for this tokenizer ({what})", where=str(source / "tokenizer.json"),
        hint="export to hf or onnx, or convert the hf export with llama.cpp's own convert_hf_to_gguf.py",
    )  # fmt: skip


# ------------------------------------------------------------------ files


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _alternative(config: Mapping[str, Any]) -> str | None:
    possible = [name for name, reason in exportable(config).items() if reason is None]
    return f"possible: {', '.join(possible)}" if possible else None


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
        raise ExportError("this folder is no earlier export", where=str(out), hint="it is not replaced; choose another")
    token = uuid.uuid4().hex[:8]
    temporary, old = (out.with_name(f".{word}-{token}-{out.name}") for word in ("tmp", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if taken:
            out.rename(old)
        temporary.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise ExportError(
            f"cannot write: {error.strerror or error}", where=str(out), hint="is the disk full?"
        ) from error
    finally:
        for path in (temporary, old):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep other libraries' advice and progress bars off the terminal."""
    from residency.compat import quiet_transformers

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "gguf.gguf_writer")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

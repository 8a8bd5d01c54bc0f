"""Models in: a hub id, a local folder or an embedded name → a folder in standard form with its fingerprint and facts.

Facts (architecture, parameters, layers, bytes, KV bytes per token, what it can be exported to) are read from
config.json and the safetensors headers, so that a plan costs no weights. `load_causal_lm` is the one place where
weights of a language model are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency import embedded, store
from residency.catalog import nearest
from residency.errors import DataError, MissingError, RecipeError
from residency.step import Kind, ModelFacts

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|layer)\.\d+\.")
"""Names of parameters that belong to one of a model's repeated layers."""


@dataclass(frozen=True)
class Base:
    """A resolved base model.

    Args:
        name: As the recipe names it.
        folder: Its files in standard Hugging Face form.
        fingerprint: Content address: same fingerprint, same weights and tokenizer.
        facts: What is known without loading it.
    """

    name: str
    folder: Path
    fingerprint: str
    facts: ModelFacts


def resolve(name: str, beside: Path = Path(), where: str | None = None, *, remote_code: bool = False) -> Base:
    """Find a base by embedded name, folder (relative to `beside`) or hub id; its code only when `remote_code`.

    Raises:
        RecipeError: When nothing is called so; the nearest embedded name is given.
        MissingError: When its package or hub files are not on this machine.
    """
    if name in embedded.BASES:
        folder = embedded.base_folder(name)
        fingerprint = store.read_json(folder / store.MANIFEST)["address"]
        return Base(name, folder, fingerprint, facts(folder, license=embedded.BASES[name]["license"]))
    local = Path(name).expanduser()
    local = local if local.is_absolute() else beside / local
    if local.is_dir():
        return Base(name, local, fingerprint_of(local), facts(local))
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        folder = _from_hub(name, remote_code)
        return Base(name, folder, f"hub:{name}@{folder.name}", facts(folder))
    guess = nearest(name, list(embedded.BASES))
    raise RecipeError(
        f"no base is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""),
        where=where,
        hint=f"embedded: {', '.join(embedded.BASES)}; or a folder; or a hub id like org/model",
    )


def _from_hub(name: str, remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # hub 2.x raises offline, HTTP and cache errors from three hierarchies
        raise MissingError(
            f"the hub model `{name}` is not on this machine and could not be fetched ({type(error).__name__})",
            hint=f"with a network: hf download {name}; then run again (HF_HUB_OFFLINE=1 works from then on)",
        ) from None


def fingerprint_of(folder: Path) -> str:
    """Content address of a folder or file; remembered by size and modification time, so that asking again is free."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    stats = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    memo = embedded.cache() / "fingerprints" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    if memo.exists():
        try:
            known = store.read_json(memo)
            if known["stats"] == stats:
                return known["fingerprint"]
        except Exception:
            memo.unlink(missing_ok=True)
    fingerprint = store.hash_file(folder) if folder.is_file() else store.hash_tree(folder)
    if sum(p.stat().st_size for p in files) > 1 << 20:
        store.write_json(memo, {"stats": stats, "fingerprint": fingerprint})
    return fingerprint


# ------------------------------------------------------------------ facts


def facts(folder: Path, license: str | None = None) -> ModelFacts:
    """What a model folder says of itself.

    Raises:
        DataError: When it is no model folder, or its files are damaged.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        raise DataError("there is no config.json", where=str(folder), hint="a base is a folder in Hugging Face form")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"config.json is damaged: {error}", where=str(config_file)) from None
    architecture = (config.get("architectures") or ["unknown"])[0]
    text = config.get("text_config", config)
    named = [entry for f in sorted(folder.glob("*.safetensors")) for entry in read_header(f).items()]
    headers = [header for _, header in named]
    parameters = sum(math.prod(h["shape"]) for h in headers)
    within = sum(math.prod(h["shape"]) for name, h in named if _IN_LAYER.search(name))
    hidden = int(text.get("hidden_size") or config.get("features") or config.get("num_features") or 0)
    heads = int(text.get("num_attention_heads") or 0)
    layers = int(text.get("num_hidden_layers") or 0)
    head_dim = int(text.get("head_dim") or (hidden // heads if heads else 0))
    kind = _kind(config, architecture)
    element = max((_BYTES.get(h["dtype"], 4) for h in headers), default=4)
    groups = int(text.get("num_key_value_heads") or heads)
    return ModelFacts(
        kind=kind,
        architecture=architecture,
        parameters=parameters,
        bytes_on_disk=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        layers=layers,
        hidden=hidden,
        vocabulary=int(text.get("vocab_size") or 0),
        kv_bytes_per_token=2 * layers * groups * head_dim * element if kind == "causal-lm" else 0,
        heads=heads,
        kv_heads=groups,
        head_dim=head_dim,
        ffn=int(text.get("intermediate_size") or 0),
        layer_parameters=within,
        classes=len(config.get("id2label") or ()) if architecture.endswith("ForSequenceClassification") else 0,
        activation=str(text.get("hidden_act") or text.get("hidden_activation") or ""),
        max_tokens=int(text.get("max_position_embeddings") or 0),
        tokenizer=tokenizer_fingerprint(folder),
        tokenizer_folder=str(folder),
        license=license,
        exportable=_exportable(config),
    )


def _kind(config: dict[str, Any], architecture: str) -> Kind:
    if "residency_kind" in config:
        return config["residency_kind"]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    return "image-encoder" if is_vision(config) else "text-encoder"


def is_vision(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of an image encoder: an embedded one, transformers', or timm's."""
    sees = {"num_channels", "image_size", "pretrained_cfg"} & set(config)
    return "residency_encoder" in config or bool(sees and not {"vocab_size", "text_config"} & set(config))


def _exportable(config: dict[str, Any]) -> dict[str, str | None]:
    from residency.export import exportable

    return exportable(config)


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of a safetensors file, without its data.

    Raises:
        DataError: When the header is damaged.
    """
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= 100 << 20:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        return header
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the safetensors file is damaged: {error}", where=str(file)) from None


def vocabulary(folder: Path) -> dict[str, int]:
    """Token → id of a folder's tokenizer.json (added tokens included); empty when there is none."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"tokenizer.json is damaged: {error}", where=str(file)) from None
    tokens = content.get("model", {}).get("vocab", {})
    if isinstance(tokens, list):  # Unigram: [[token, score], …]
        tokens = {entry[0]: i for i, entry in enumerate(tokens)}
    return dict(tokens) | {t["content"]: t["id"] for t in content.get("added_tokens", [])}


def tokenizer_fingerprint(folder: Path) -> str:
    """A digest of token → id: two models with the same digest may share logits."""
    tokens = vocabulary(folder)
    return hashlib.sha256(store.canonical(tokens).encode()).hexdigest()[:16] if tokens else ""


# ------------------------------------------------------------------ weights


def load_causal_lm(folder: Path, device: str = "cpu", *, remote_code: bool = False, dtype: str | None = None) -> Any:
    """Load a language model for computing.

    Args:
        folder: Standard form.
        device: "cpu", "cuda" or "mps".
        remote_code: Only when the recipe says so for this base.
        dtype: "float32", "bfloat16"; by default float32 (training adds autocast where it helps).

    Returns:
        The model in evaluation mode.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from residency.compat import quiet_transformers

    with quiet_transformers():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype or "float32"), trust_remote_code=remote_code
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"transformers cannot load this model: {str(error).splitlines()[0]}",
                where=str(folder),
                hint="if it needs code of its own and you trust it, say trust-remote-code: true in the recipe",
            ) from error
    if hasattr(model.config.get_text_config(), "fatrelu_threshold"):
        from residency.compress.relufy import install_thresholds

        install_thresholds(model)
    return model.to(device=device).eval()


def load_classifier(folder: Path, device: str = "cpu", *, remote_code: bool = False, **config: Any) -> Any:
    """Load a sequence classifier, or an encoder under a new head, in float32 and evaluation mode.

    Args:
        folder: Standard form.
        device: "cpu", "cuda" or "mps".
        remote_code: Only when the recipe says so for this base.
        config: Settings of a new head: `num_labels`, `id2label`, `label2id`, `problem_type`. Its weights are drawn from
            torch's global random state.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from residency.compat import quiet_transformers

    with quiet_transformers():
        try:
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=remote_code, **config
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"transformers cannot put a classification head on this model: {str(error).splitlines()[0]}",
                where=str(folder),
            ) from error
    return model.to(device=device).eval()


def load_tokenizer(folder: Path, *, remote_code: bool = False) -> Any:
    """Load a folder's tokenizer; a missing pad token becomes the end-of-text token."""
    from transformers import AutoTokenizer

    from residency.compat import quiet_transformers

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Save a model in standard form and in the base's precision, with its tokenizer.

    Args:
        model: A `PreTrainedModel` (no adapters left in it).
        tokenizer: Saved beside it.
        folder: Made when missing.
        dtype: "float32", "bfloat16", "float16": what the weights are rounded to.
    """
    import torch

    from residency.compat import quiet_transformers

    with quiet_transformers():
        model.to(dtype=getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def saved_dtype(folder: Path) -> str:
    """The precision in which a folder's weights are saved."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in ("float32", "bfloat16", "float16") else "float32"

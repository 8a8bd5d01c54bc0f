"""A Llama-like checkpoint as one GGUF file, for llama.cpp and what is built on it.

Three things must be right, and only the first two can be read back and compared (`export` does):

1. Numbers and names: sizes and constants as `llama.*` keys, weights under llama.cpp's names, as bf16, f16 or f32
   (vectors always f32). Tied embeddings are written once.
2. Rotation: transformers rotates the first half of a head against the second, llama.cpp's Llama rotates neighbours.
   The rows of each query and key head are therefore interleaved, [2, d/2] → [d/2, 2]. Qwen2 rotates halves in both.
3. The tokenizer: vocabulary, merges, special tokens and chat template of a byte-level BPE. How text is cut before
   merging is known to llama.cpp by name only, so the name is found from the structure of tokenizer.json, and a
   tokenizer without a known name is refused: a wrong one would run and be worse, silently.

Format: GGUF version 3, and the conventions of llama.cpp's convert_hf_to_gguf.py, whose file of SmolLM2-135M-Instruct
holds the same 272 tensors, byte for byte. Cost: one tensor in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from residency.errors import ExportError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""Architectures → llama.cpp's names. Mistral without a sliding window is a Llama."""

KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_CONTRACTIONS, _LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
"""Regular expressions of a tokenizer.json → llama.cpp's names for them (llama-vocab.cpp)."""


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why llama.cpp would compute something else from this config.json; None if it would not."""
    architecture = (config.get("architectures") or [""])[0]
    if architecture not in ARCHITECTURES:
        return f"no GGUF writer for {architecture}; there is one for {', '.join(ARCHITECTURES)}"
    name, act = ARCHITECTURES[architecture], config.get("hidden_act", "silu")
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    turns = [(config.get(key) or {}) for key in ("rope_parameters", "rope_scaling")]
    turn = next((t for r in turns if (t := r.get("rope_type", r.get("type", "default"))) != "default"), "default")
    width, heads = config.get("hidden_size", 0), config.get("num_attention_heads") or 1
    odd_heads = (config.get("head_dim") or width // heads) * heads != width
    checks = {
        "attention or MLP biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
        f"the activation `{act}`": act != "silu",
        f"rotary embeddings of type `{turn}`": turn != "default",
        "partial rotary embeddings": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "a sliding window": bool(config.get("sliding_window")) and config.get("use_sliding_window", True),
        "heads that do not add up to hidden_size": name == "qwen2" and odd_heads,
    }
    found = next((what for what, there in checks.items() if there), None)
    return f"our GGUF writer for {name} has no place for {found}" if found else None


def write(source: Path, target: Path, config: Mapping[str, Any], dtype: str | None = None) -> None:
    """Write a folder's model and tokenizer as a GGUF file.

    Args:
        source: A folder with config.json, *.safetensors and tokenizer.json, for which `refusal` is None.
        target: The file to make.
        config: The folder's config.json.
        dtype: "f32", "f16" or "bf16" of matrices; None keeps what the config says they are.

    Raises:
        ExportError: A weight or the tokenizer has no counterpart in llama.cpp.
    """
    import gguf
    import torch

    name = ARCHITECTURES[config["architectures"][0]]
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    matrices = gguf.GGMLQuantizationType[dtype.upper() if dtype else KINDS.get(stored, "F32")]
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    writer = gguf.GGUFWriter(target, name)
    _constants(writer, config, groups)
    writer.add_name(source.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if matrices.name == 'F32' else 'MOSTLY'}_{matrices.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _tokenizer(writer, source, config)

    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = []
    for key, shape, read in _weights(source):
        if key == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # llama.cpp takes the embeddings where there is no output.weight
        new = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ExportError(f"llama.cpp has no name for the weight `{key}`", where=str(source), hint="export to hf")
        kind = matrices if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        turned = {"q_proj": heads, "k_proj": groups}.get(key.split(".")[-2], 0) if name == "llama" else 0
        tensors.append((read, kind.name, turned))
        blank = torch.empty(0, dtype=_carrier(torch, kind.name)).numpy().dtype
        writer.add_tensor_info(new, shape, blank, math.prod(shape) * blank.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for read, kind_name, turned in tensors:
        tensor = interleave(read(), turned) if turned else read()
        wanted = {value: getattr(torch, key) for key, value in KINDS.items()}[kind_name]
        writer.write_tensor_data(tensor.to(wanted).contiguous().view(_carrier(torch, kind_name)).numpy())
    writer.close()


def interleave(weight: Any, heads: int) -> Any:
    """From halves to neighbours: rows [heads, 2, d/2] of a query or key matrix → [heads, d/2, 2]."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, pairs, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _carrier(torch: Any, kind: str) -> Any:
    """The type in which numpy carries a kind: it has no bf16."""
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.int16}[kind]


def _constants(writer: Any, config: Mapping[str, Any], groups: int) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(groups)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _weights(source: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """Name, shape and a reader of every weight of a folder."""
    from safetensors import safe_open

    def reader(file: Path, key: str) -> Callable[[], Any]:
        def read() -> Any:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(key)

        return read

    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        for key, shape in shapes.items():
            yield key, shape, reader(file, key)


def _tokenizer(writer: Any, source: Path, config: Mapping[str, Any]) -> None:
    """Vocabulary, merges, special tokens and chat template."""
    import gguf
    from tokenizers import Tokenizer

    file = source / "tokenizer.json"
    if not file.is_file():
        raise ExportError(
            "there is no tokenizer.json", where=str(source), hint="save a fast tokenizer beside the model"
        )
    data, settings = _json(file), _json(source / "tokenizer_config.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(data, str(file)))
    tokens = {i: (token, gguf.TokenType.NORMAL) for token, i in data["model"]["vocab"].items()}
    for added in data.get("added_tokens") or []:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    size = config["vocab_size"]
    if max(tokens) >= size:
        what = f"the tokenizer's highest id is {max(tokens)}, but the model knows {size} tokens"
        raise ExportError(what, where=str(file), hint="resize the model's embeddings")
    filled = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    writer.add_token_list([token for token, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in data["model"].get("merges") or []]
    # llama.cpp insists on merges and GGUF knows no empty array: this one can never apply
    writer.add_token_merges(merges or [f"{filled[0][0]} {filled[0][0]}"])
    ids = {token: i for i, (token, _) in tokens.items()}
    bos = None
    for role in ("bos", "eos", "unk", "pad"):
        named, other = settings.get(f"{role}_token"), config.get(f"{role}_token_id")
        named = named.get("content") if isinstance(named, dict) else named
        id = ids.get(named) if named is not None else other[0] if isinstance(other, list) else other
        if id is not None:
            getattr(writer, f"add_{role}_token_id")(id)
            bos = id if role == "bos" else bos
    encoded = Tokenizer.from_file(str(file)).encode("a").ids
    writer.add_add_bos_token(bos is not None and encoded[:1] == [bos])
    writer.add_add_space_prefix(False)
    template = source / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)


def pre_tokenizer(data: Mapping[str, Any], where: str = "tokenizer.json") -> str:
    """llama.cpp's name for how a tokenizer.json cuts text before merging.

    Raises:
        ExportError: It has none that we know; the message says what the tokenizer is.
    """
    model, outer = data["model"], data.get("pre_tokenizer") or {}
    shape = []
    for step in outer.get("pretokenizers", [outer] if outer else []):
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            kind = "bytes and words" if step.get("use_regex", True) else "bytes"
        elif kind == "Digits" and step.get("individual_digits"):
            kind = "single digits"
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            kind = SPLITS.get(step["pattern"].get("Regex", ""), "Split by an unknown expression")
        shape.append(kind)
    known = {("bytes and words",): "gpt-2", ("single digits", "bytes and words"): "smollm"}
    known |= {(name, "bytes"): name for name in SPLITS.values()}
    if not model.get("merges"):
        known |= {("bytes",): "gpt-2"}  # every byte stays a token, wherever the text is cut
    normaliser = (data.get("normalizer") or {}).get("type")
    bytewise = model.get("type") == "BPE" and not model.get("byte_fallback") and normaliser in (None, "NFC")
    if bytewise and tuple(shape) in known:
        return known[tuple(shape)]
    what = f"{model.get('type')}, normaliser {normaliser}, cut by {' + '.join(shape) or 'nothing'}"
    hint = "export to hf or onnx, or convert the hf export with llama.cpp's own convert_hf_to_gguf.py"
    raise ExportError(f"llama.cpp has no name that we know for this tokenizer ({what})", where=where, hint=hint)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

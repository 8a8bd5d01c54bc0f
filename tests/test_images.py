"""Image networks: transformers' own models and preprocessing, random views, adapters behind an encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from residency import bases, encoders, images
from residency.compat import quiet_transformers
from residency.errors import DataError
from residency.trainable import Adapter

PIL = pytest.importorskip("PIL.Image")


def pictures(n=3, size=(50, 40)):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (*size[::-1], 3), dtype=np.uint8) for _ in range(n)]


def save(name: str, folder):
    import transformers as hf

    torch.manual_seed(0)
    with quiet_transformers():
        if name == "vit":
            config = hf.ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            )
            hf.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
            hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        else:
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
            hf.ResNetModel(hf.ResNetConfig(**sizes)).save_pretrained(folder)
            hf.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_any_vision_model_of_transformers_is_an_encoder(name, tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    folder = save(name, tmp_path / name)
    facts = bases.facts(folder)
    assert facts.kind == "image-encoder"
    encoder = encoders.load(folder)
    found = encoder.encode(pictures(), batch=2)
    with quiet_transformers(), torch.no_grad():
        model = AutoModel.from_pretrained(folder).eval()
        pixels = AutoImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")["pixel_values"]
        out = model(pixel_values=pixels)
    expected = out.last_hidden_state[:, 0] if name == "vit" else out.pooler_output.flatten(1)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
    again = tmp_path / "again"
    encoder.model.save(again)
    np.testing.assert_array_equal(encoders.load(again).encode(pictures()), encoder.encode(pictures()))


def test_a_vision_folder_without_preprocessing_says_so(tmp_path):
    folder = save("vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="cannot load this image encoder"):
        encoders.load(folder)


def test_views_differ_and_keep_their_size():
    image = images.open_image(pictures(1)[0])
    first = images.changed(image, np.random.default_rng(1))
    assert first.size == image.size
    assert np.array_equal(np.asarray(first), np.asarray(images.changed(image, np.random.default_rng(1))))
    assert not np.array_equal(np.asarray(first), np.asarray(images.changed(image, np.random.default_rng(2))))
    assert not np.array_equal(np.asarray(first), np.asarray(image))
    for size in ((1, 1), (2, 50)):
        assert images.changed(PIL.new("RGB", size), np.random.default_rng(0)).size == size


def test_a_turned_image_is_filled_with_its_own_edge():
    white = PIL.new("RGB", (20, 20), (255, 255, 255))
    for seed in range(5):
        view = np.asarray(images.changed(white, np.random.default_rng(seed))).astype(int)
        assert view.max() - view.min() <= 2


def test_data_uris_come_back():
    image = images.open_image(pictures(1)[0])
    np.testing.assert_array_equal(np.asarray(images.open_image(images.data_uri(image))), np.asarray(image))
    assert max(images.open_image(images.data_uri(image, 16)).size) == 16
    assert image.size == (50, 40)


def test_an_adapter_beside_an_encoder_is_found(tmp_path):
    folder = save("vit", tmp_path / "vit")
    frozen = encoders.load(folder).encode(pictures())
    adapter = Adapter(32, 8).standardise(torch.from_numpy(frozen))
    torch.nn.init.normal_(adapter.inner[2].weight)
    adapter.save(folder)
    found = encoders.load(folder)
    with torch.no_grad():
        expected = adapter(torch.from_numpy(frozen)).features.numpy()
    np.testing.assert_allclose(found.encode(pictures()), expected, rtol=1e-5, atol=1e-5)
    assert found.width == 32
    assert bases.facts(folder).kind == "image-encoder"


def test_pooling_is_what_the_folder_says(tmp_path):
    import shutil

    from residency import embedded

    plain = embedded.base_folder("tiny-text-encoder")
    folder = tmp_path / "first"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"residency_pooling": "first", "residency_max_tokens": 9}))
    encoder = encoders.load(folder)
    assert (encoder.pooling, encoder.max_tokens) == ("first", 9)
    ids = encoder.tokenizer("a permit", return_tensors="pt")
    with torch.no_grad():
        first = encoder.model(**{k: ids[k] for k in ("input_ids", "attention_mask")}).last_hidden_state[0, 0]
    expected = (first / first.norm()).numpy()
    np.testing.assert_allclose(encoder.encode(["a permit", "a much longer text"])[0], expected, atol=1e-5)

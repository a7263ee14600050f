"""Zero-shot classification is search in an index of classes."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.model.lit import LitModel
from data.errors import UsageError
from retrieval.evaluation.classify import ZeroShotClassifier, close_calls, embed_classes

NAMES = ["cat", "red bicycle", "rain {c}", "ship", "piano", "pizza", "owl"]
TEMPLATES = ["{c}", "a photo of a {c}.", "a drawing of a {c}"]


def test_class_embedding_is_the_renormalised_mean_over_templates(tiny_model: LitModel) -> None:
    rows = torch.tensor(embed_classes(tiny_model, NAMES, TEMPLATES))
    for name, row in zip(NAMES, rows, strict=True):
        prompts = [template.replace("{c}", name) for template in TEMPLATES]
        mean = tiny_model.encode_text(prompts).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)


def test_batches_of_prompts_do_not_change_the_classes(tiny_model: LitModel) -> None:
    whole = embed_classes(tiny_model, NAMES, TEMPLATES)
    for batch_size in (1, 4, 7):
        parts = embed_classes(tiny_model, NAMES, TEMPLATES, batch_size=batch_size)
        assert abs(whole - parts).max() < 1e-5


def test_prediction_is_the_order_of_cosine_similarities(tiny_model: LitModel) -> None:
    images = torch.randn(6, 3, tiny_model.image_size, tiny_model.image_size)
    classifier = ZeroShotClassifier(tiny_model, NAMES, TEMPLATES)
    classes = torch.tensor(embed_classes(tiny_model, NAMES, TEMPLATES))
    for size in tiny_model.patch_sizes[:2]:
        labels, scores = classifier.predict(images, patch_size=size, k=3)
        expected = (tiny_model.encode_image(images, patch_size=size) @ classes.T).topk(3)
        torch.testing.assert_close(torch.tensor(scores), expected.values, rtol=0, atol=1e-5)
        assert (torch.tensor(labels) == expected.indices).all()


def test_fewer_classes_than_k_gives_all_of_them(tiny_model: LitModel) -> None:
    classifier = ZeroShotClassifier(tiny_model, NAMES[:2])
    labels, scores = classifier.classify_embeddings(tiny_model.encode_text(["cat"]).numpy(), k=5)
    assert labels.shape == scores.shape == (1, 2)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [([], TEMPLATES, "0 class names"), (NAMES, [], "0 templates"), (NAMES, ["a photo"], "{c}")],
)
def test_what_cannot_classify_is_refused(
    names: list[str], templates: list[str], message: str, tiny_model: LitModel
) -> None:
    with pytest.raises(UsageError, match=message):
        ZeroShotClassifier(tiny_model, names, templates)


def test_only_close_calls_are_encoded_again(
    tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    images = torch.randn(12, 3, tiny_model.image_size, tiny_model.image_size)
    classifier = ZeroShotClassifier(tiny_model, NAMES, TEMPLATES)
    coarse, fine = tiny_model.patch_sizes[0], tiny_model.patch_sizes[3]
    labels, scores = classifier.predict(images, coarse, k=3)
    embeds = [tiny_model.encode_image(images, patch_size=p).numpy() for p in (coarse, fine)]
    both = (embeds[0] + 2 * embeds[1]) / 3
    fine_labels, fine_scores = classifier.classify_embeddings(both, k=3)
    margins = np.sort(scores[:, 0] - scores[:, 1])
    margin = float(margins[4:6].mean())  # five of twelve are closer
    close = close_calls(scores, margin)
    assert close.sum() == 5

    encoded = []
    encode = tiny_model.encode_image
    monkeypatch.setattr(
        tiny_model,
        "encode_image",
        lambda x, patch_size: encoded.append((patch_size, len(x))) or encode(x, patch_size),
    )
    pictures = [Image.fromarray(np.uint8(255 * p.numpy().clip(0, 1)).T) for p in images]
    for given in (images, pictures):  # the pictures are cut to 8 bits, so their margins are others
        own_scores = classifier.predict(given, coarse, k=3)[1]
        own_margin = float(np.sort(own_scores[:, 0] - own_scores[:, 1])[4:6].mean())
        encoded.clear()
        mixed, mixed_scores = classifier.predict(
            given, coarse, k=3, refine_patch_size=fine, margin=own_margin
        )
        assert encoded == [(coarse, 12), (fine, 5)]
        if given is images:
            np.testing.assert_array_equal(mixed, np.where(close[:, None], fine_labels, labels))
            np.testing.assert_allclose(
                mixed_scores, np.where(close[:, None], fine_scores, scores), atol=1e-5
            )
    everything = classifier.predict(images, coarse, k=3, refine_patch_size=fine, margin=9.0)
    np.testing.assert_array_equal(everything[0], fine_labels)


def test_one_class_is_never_a_close_call(tiny_model: LitModel) -> None:
    images = torch.randn(2, 3, tiny_model.image_size, tiny_model.image_size)
    classifier = ZeroShotClassifier(tiny_model, NAMES[:1])
    labels, _ = classifier.predict(images, k=1, refine_patch_size=tiny_model.patch_sizes[0])
    assert labels.tolist() == [[0], [0]]


def test_a_saved_class_set_classifies_alike(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    classifier = ZeroShotClassifier(tiny_model, NAMES, TEMPLATES)
    classifier.save(tmp_path / "classes")
    loaded = ZeroShotClassifier.load(tmp_path / "classes", tiny_model)
    assert (loaded.class_names, loaded.templates) == (NAMES, TEMPLATES)
    queries = tiny_model.encode_text(["cat", "a ship"]).numpy()
    for got, expected in zip(
        loaded.classify_embeddings(queries), classifier.classify_embeddings(queries), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    other = LitModel.from_pretrained(model_dir)
    other.text.logit_scale.data += 1
    with pytest.raises(UsageError, match="another text tower"):
        ZeroShotClassifier.load(tmp_path / "classes", other)
    (tmp_path / "classes" / "classes.npy").write_bytes(b"")
    with pytest.raises(UsageError, match="is damaged; embed the names again"):
        ZeroShotClassifier.load(tmp_path / "classes", tiny_model)


@pytest.mark.slow
def test_a_flipped_bit_of_a_saved_class_set_is_noticed(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    ZeroShotClassifier(tiny_model, ["a cat", "a dog"], ["{c}"]).save(tmp_path / "set")
    for file in (tmp_path / "set").iterdir():
        whole = file.read_bytes()
        for place in range(9, len(whole), len(whole) // 9):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with suppress(UsageError):  # the name of the digest itself matters to nobody
                found = ZeroShotClassifier.load(tmp_path / "set", tiny_model)
                assert b'"blake2b"' not in file.read_bytes()
                assert found.class_names == ["a cat", "a dog"]
        file.write_bytes(whole)
    ZeroShotClassifier.load(tmp_path / "set", tiny_model)


def test_a_hundred_thousand_classes_each_find_themselves(tiny_model: LitModel) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100_000, tiny_model.embed_dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"class {number}" for number in range(len(vectors))]
    classifier = ZeroShotClassifier(tiny_model, names, ["{c}"], vectors)
    chosen = rng.integers(0, len(names), 200)
    labels, scores = classifier.classify_embeddings(vectors[chosen], k=5)
    np.testing.assert_array_equal(labels[:, 0], chosen)
    assert (np.diff(scores, axis=1) <= 0).all()

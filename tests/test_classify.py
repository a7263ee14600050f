"""Zero-shot classification is search in an index of classes."""

import pytest
import torch

from contrastive.lit import LitModel
from data.errors import UsageError
from retrieval.classify import ZeroShotClassifier, embed_classes

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

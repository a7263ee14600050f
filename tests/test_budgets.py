"""Budgets of tokens, from shards to search: what is stored is what `encode_image` gives."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from server_thread import Served, serving
from shard_maker import encode, write_tar

from contrastive.model.lit import LitModel
from contrastive.model.with_fit import with_fit
from data.errors import UsageError
from launch.search import Args, budget_of, search
from retrieval.detail import MaxTokens, as_key, from_key, of_manifest, said, said_pair
from retrieval.embed.bulk import embed_shards
from retrieval.embed.partitions import open_vectors
from retrieval.evaluation.datasets import load_dataset
from retrieval.evaluation.evaluate import evaluate
from retrieval.index.build import add_embeddings, build_index
from retrieval.index.manifest import read_index_manifest
from retrieval.photos.indexing import index_photos
from retrieval.search.config import Budget
from retrieval.search.searcher import Searcher
from retrieval.server.api.classification import answer_classify
from retrieval.server.config import ServeConfig
from retrieval.server.loading import load_service
from retrieval.server.patch_sizes import kept_detail
from retrieval.server.requests import ClassifyRequest

SHAPES = [(40, 48), (96, 30), (20, 90), (64, 64), (1, 50)]  # height, width


def pictures(seed: int = 0) -> list[Image.Image]:
    draw = np.random.default_rng(seed)
    shapes = [(*shape, 3) for shape in SHAPES]
    return [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def write_shard(path: Path) -> str:
    return write_tar(
        path, [(f"{n}.png", encode(image, "PNG")) for n, image in enumerate(pictures())]
    )


@pytest.fixture(scope="module")
def index(
    tiny_model: LitModel, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Embeddings, and an index of them, at most 9 and 20 tokens, of whole pictures."""
    root = tmp_path_factory.mktemp("budgets")
    shard = write_shard(root / "a.tar")
    made = embed_shards(
        tiny_model, [shard], (), root / "emb", batch_size=3, num_workers=1, model_dir=model_dir,
        max_tokens=(20, 9, 20), fit="aspect",
    )  # fmt: skip
    assert (made["format"], made["patch_sizes"], made["max_tokens"]) == (2, [], [20, 9])
    build_index(root / "emb", root / "index", device="cpu")
    return root / "emb", root / "index"


@pytest.mark.parametrize(("fit", "version"), [("crop", 2), ("squash", 1), ("aspect", 2)])
def test_stored_vectors_are_those_of_encode_image(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path, fit: str, version: int
) -> None:
    model = LitModel.from_pretrained(model_dir)
    model.vision.use_transform(version)
    shard = write_shard(tmp_path / "a.tar")
    embed_shards(model, [shard], (), tmp_path / "emb", num_workers=0, max_tokens=(30, 36), fit=fit)
    embed_shards(model, [shard], (48,), tmp_path / "sizes", num_workers=0, fit=fit)
    fitted = with_fit(model, fit)
    for count in (30, 36):
        wanted = fitted.encode_image(pictures(), max_tokens=count).numpy()
        np.testing.assert_allclose(
            open_vectors(tmp_path / "emb", MaxTokens(count), 0), wanted, atol=1e-5
        )
    wanted = fitted.encode_image(pictures(), patch_size=48).numpy()
    np.testing.assert_allclose(open_vectors(tmp_path / "sizes", 48, 0), wanted, atol=1e-5)


def test_another_fit_shares_the_weights_and_leaves_the_model_as_it_is(
    tiny_model: LitModel,
) -> None:
    before = tiny_model.image_fingerprint
    other = with_fit(tiny_model, "aspect")
    assert (tiny_model.transform.fit, other.transform.fit) == ("crop", "aspect")
    assert other.vision.net is tiny_model.vision.net
    assert tiny_model.image_fingerprint == before != other.image_fingerprint
    assert with_fit(tiny_model, "crop") is tiny_model is with_fit(tiny_model, None)


def test_an_index_of_budgets_finds_its_pictures_by_any_budget(index: tuple[Path, Path]) -> None:
    searcher = Searcher.load(index[1], device="cpu")
    assert searcher.model.transform.fit == "aspect"
    assert searcher.patch_sizes == (MaxTokens(20), MaxTokens(9))
    found = searcher.search(pictures(), k=1)
    assert [hits[0].key for hits in found] == list("01234")
    np.testing.assert_allclose([hits[0].similarity for hits in found], 1, atol=1e-5)
    coarse = searcher.search(pictures(), k=1, patch_size=MaxTokens(12))  # the finest within
    assert [hits[0].similarity for hits in coarse] == pytest.approx(
        [hits[0].similarity for hits in searcher.search(pictures(), k=1, patch_size=MaxTokens(9))]
    )
    refined = searcher.search(pictures(), 1, MaxTokens(9), refine_patch_size=MaxTokens(30),
                              query_patch_size=MaxTokens(9), candidates=5)  # fmt: skip
    assert [hits[0].key for hits in refined] == list("01234")
    again = Searcher.load(index[1], device="cpu")  # the refined vectors are kept
    again.search(["a"], 1, refine_patch_size=MaxTokens(30), candidates=5)
    assert again.fine.num_encoded == 0


def test_what_an_image_may_cost_buys_tokens(index: tuple[Path, Path]) -> None:
    searcher = Searcher.load(index[1], device="cpu")
    profile = searcher.profile
    least, most = (profile.gflops(MaxTokens(count)) for count in (9, 900))
    asked = [Budget(max_gflops=share * most + (1 - share) * least) for share in (0.3, 0.7)]
    bought = [profile.encoding(budget, searcher.encodable) for budget in asked]
    assert all(isinstance(size, MaxTokens) for size in bought)
    assert bought == sorted(set(bought))
    assert all(profile.gflops(b) <= a.max_gflops for a, b in zip(asked, bought, strict=True))
    assert bought[-1] not in searcher.encodable
    with pytest.raises(UsageError, match="too little: a budget of 9 tokens costs"):
        profile.encoding(Budget(max_gflops=least / 2), searcher.encodable)


def test_what_does_not_fit_is_refused_by_a_sentence(
    index: tuple[Path, Path], tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    emb, out = index
    searcher = Searcher.load(out, device="cpu")
    for size, sentence in (
        (MaxTokens(8), "max_tokens 8 is too little: the coarsest is 9 tokens"),
        (48, "patch size 48 is not in .*; allowed: 20 tokens, 9 tokens"),
    ):
        with pytest.raises(UsageError, match=sentence):
            searcher.search(["a"], patch_size=size)
    for count in (0, -3):
        with pytest.raises(UsageError, match=f"max_tokens {count}: allowed are 1 and more"):
            MaxTokens(count)
    shard = write_shard(tmp_path / "a.tar")
    for kwargs, sentence in (
        ({"patch_sizes": (48,), "max_tokens": (9,)}, "patch sizes or max_tokens, not both"),
        ({"max_tokens": (0,)}, "max_tokens 0: allowed are 1 and more"),
        ({"max_tokens": (240**2 + 1,)}, "max_tokens 57601: allowed are 1 to 57600"),
        ({"patch_sizes": (7,)}, "patch size 7 does not divide .* allowed at 240 px: 48, 40"),
    ):
        given = {"patch_sizes": (), **kwargs}
        with pytest.raises(UsageError, match=sentence):
            embed_shards(tiny_model, [shard], out=tmp_path / "emb", **given)
    with pytest.raises(UsageError, match="made with another fit: aspect, not crop"):
        embed_shards(tiny_model, [str(emb.parent / "a.tar")], (), emb, max_tokens=(20, 9))
    embed_shards(tiny_model, [shard], (), tmp_path / "nine", num_workers=0, max_tokens=(9,),
                 fit="aspect", model_dir=model_dir)  # fmt: skip
    with pytest.raises(UsageError, match=r"lacks 20 tokens, which .* has; embed at 20, 9 tokens"):
        add_embeddings(out, tmp_path / "nine")
    crop = tmp_path / "crop"
    embed_shards(tiny_model, [shard], (), crop, num_workers=0, max_tokens=(20, 9))
    with pytest.raises(UsageError, match=r"was made with fit crop, .* with aspect"):
        add_embeddings(out, crop)


def test_files_of_patch_sizes_are_written_as_ever(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar")
    made = embed_shards(
        tiny_model, [shard], (48,), tmp_path / "emb", num_workers=0, model_dir=model_dir
    )
    build_index(tmp_path / "emb", tmp_path / "index", device="cpu")
    held = json.loads((tmp_path / "index" / "manifest.json").read_text())
    for manifest in (made, held):
        assert manifest["format"] == 1
        assert not manifest.keys() & {"fit", "max_tokens"}
    manifest = read_index_manifest(tmp_path / "index")
    assert (manifest.patch_sizes, manifest.fit) == ((48,), None)


def test_names_of_sizes_are_read_as_they_were_written() -> None:
    for size, key in ((28, 28), (MaxTokens(64), "tokens_64")):
        assert as_key(size) == key
        assert from_key(key) == from_key(str(key)) == size
    assert of_manifest({"patch_sizes": [56, 28]}) == (56, 28)
    assert said(56, 28) == "patch 56, 28"
    assert said(MaxTokens(16), MaxTokens(64)) == "16, 64 tokens"
    assert said_pair(MaxTokens(16), MaxTokens(64)) == "16 to 64 tokens"
    with pytest.raises(ValueError, match="invalid literal"):
        from_key("tokens_")


# ---- the service ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searcher(index: tuple[Path, Path]) -> Searcher:
    return Searcher.load(index[1], device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"whole": searcher}) as one:
        yield one


def test_the_service_reads_images_within_any_budget(served: Served, searcher: Searcher) -> None:
    image = pictures()[1]
    encoded = base64.b64encode(encode(image, "PNG")).decode()
    for count, answers in ((9, 9), (20, 20), (33, 20), (18, 20)):
        found = served.post("/v1/search", {"image": encoded, "max_tokens": count, "k": 5}).json
        (hits,) = searcher.search([image], 5, MaxTokens(answers), query_patch_size=MaxTokens(count))
        assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in hits]
        similarities = [hit["similarity"] for hit in found["hits"]]
        assert similarities == pytest.approx([hit.similarity for hit in hits], abs=1e-5)
        sizes = (found["patch_size"], found["max_tokens"], found["query_max_tokens"])
        assert sizes == (None, answers, count)
        labelled = served.form(
            "/v1/classify", image=encode(image, "PNG"), labels=["a cat", "rain"], max_tokens=count
        ).json
        assert (labelled["patch_size"], labelled["max_tokens"]) == (None, count)
        assert len(labelled["labels"]) == 2
    refined = {"text": "a", "max_tokens": 9, "refine_max_tokens": 30, "candidates": 5, "k": 5}
    found = served.post("/v1/search", refined).json
    (hits,) = searcher.search(["a"], 5, MaxTokens(9), refine_patch_size=MaxTokens(25), candidates=5)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in hits]
    assert found["refine_max_tokens"] == 25


def test_few_budgets_keep_fine_vectors(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever clients ask for: square numbers, those of the index and of its calibration."""
    kept = {kept_detail(MaxTokens(count), searcher) for count in range(9, 901)}
    assert kept == {MaxTokens(side**2) for side in range(3, 31)} | {MaxTokens(20)}
    assert kept_detail(48, searcher) == 48
    ranks: dict[Any, Any] = {(MaxTokens(9), MaxTokens(60)): None, (48, 24): None}
    monkeypatch.setattr(Searcher, "calibration", SimpleNamespace(ranks=ranks))
    found = [kept_detail(MaxTokens(count), searcher) for count in (59, 60, 63, 64)]
    assert found == [MaxTokens(49), MaxTokens(60), MaxTokens(60), MaxTokens(64)]


def test_an_image_is_answered_by_the_budget_that_its_cost_buys(
    served: Served, searcher: Searcher, index: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encode(pictures()[1], "PNG"))
    for count in (9, 20):
        cost = searcher.profile.gflops(MaxTokens(count))
        asked = {"image": base64.b64encode(file.read_bytes()).decode(), "max_gflops": cost}
        found = served.post("/v1/search", asked).json
        assert (found["max_tokens"], found["query_max_tokens"]) == (count, count)
        args = Args((str(file),), str(index[1]), max_gflops=cost, device="cpu")
        ((hit, *_),), _ = search(args, [True], budget_of(args))
        assert hit.similarity == pytest.approx(1, abs=1e-5)  # of the same budget


def test_indexes_of_several_fits_share_a_model_and_class_sets(
    tiny_model: LitModel, model_dir: Path, index: tuple[Path, Path], tmp_path: Path
) -> None:
    shard = write_shard(tmp_path / "a.tar")
    embed_shards(tiny_model, [shard], (48,), tmp_path / "emb", num_workers=0, model_dir=model_dir)
    build_index(tmp_path / "emb", tmp_path / "squares", device="cpu")
    (tmp_path / "pets.txt").write_text("cat\ndog\n")
    config = ServeConfig(
        index=(str(index[1]), str(tmp_path / "squares")), classes=(str(tmp_path / "pets.txt"),),
        device="cpu",
    )  # fmt: skip
    service = load_service(config)
    whole, squares = (service.indexes[name].searcher.model for name in ("index", "squares"))
    assert (whole.transform.fit, squares.transform.fit) == ("aspect", "crop")
    assert whole.vision.net is squares.vision.net
    image = base64.b64encode(encode(pictures()[1], "PNG")).decode()
    for name in ("index", "squares"):
        asked = ClassifyRequest(index=name, image=image, class_set="pets")
        assert len(asyncio.run(answer_classify(service, asked)).labels) == 2
    service.close()


def test_the_service_says_what_budgets_there_are(served: Served, searcher: Searcher) -> None:
    (described,) = served.get("/v1/indices").json["indices"]
    assert (described["fit"], described["budgets"]) == ("aspect", True)
    offered = [size["max_tokens"] for size in described["patch_sizes"]]
    assert offered == sorted({9, 20, *((240 // size) ** 2 for size in searcher.model.patch_sizes)})
    assert [s["max_tokens"] for s in described["patch_sizes"] if s["in_index"]] == [9, 20]
    assert all(size["patch_size"] is None for size in described["patch_sizes"])
    scale = served.get("/v1/indices/whole/scale?max_tokens=9").json
    assert (scale["patch_size"], scale["max_tokens"]) == (None, 9)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"text": "a", "max_tokens": 8}, "max_tokens 8 is too little: the coarsest is 9 tokens"),
        ({"text": "a", "max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
        ({"text": "a", "max_tokens": "9"}, "max_tokens: input should be a valid integer"),
        ({"text": "a", "max_tokens": 9, "index_patch_size": 48}, "give one"),
        ({"text": "a", "max_tokens": 9, "max_ms": 5}, "give one"),
        (
            {"text": "a", "patch_size": 48},
            "patch_size: 48 is not one of index whole; allowed: 9 to",
        ),
        ({"text": "a", "refine_max_tokens": 10**9}, "refine_max_tokens: 1000000000; allowed: 9 to"),
        ({"text": "a", "refine_max_tokens": 9, "refine_patch_size": 48}, "give one"),
        ({"image": "strip", "max_tokens": 5}, "max_tokens: 5; allowed: 9 to 900"),
        ({"image": "strip", "max_tokens": 901}, "max_tokens: 901; allowed: 9 to 900"),
    ],
)
def test_the_service_refuses_by_a_sentence(
    served: Served, body: dict[str, Any], sentence: str
) -> None:
    strip = base64.b64encode(encode(Image.new("RGB", (1, 300)), "PNG")).decode()
    body = {name: strip if value == "strip" else value for name, value in body.items()}
    answer = served.post("/v1/search", body)
    assert answer.status == 400
    assert sentence in answer.json["error"]


# ---- evaluation, photos --------------------------------------------------------------------


def test_evaluation_measures_budgets_as_the_patch_sizes_that_they_are(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    for number, image in enumerate([*pictures(), *pictures(1)]):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        image.save(tmp_path / str(number % 2) / f"{number}.png")
    dataset = load_dataset("folder", str(tmp_path))
    sizes = evaluate(tiny_model, dataset, (48, 40), num_workers=0)
    found = evaluate(tiny_model, dataset, (MaxTokens(25), MaxTokens(36)), num_workers=0)
    assert [*found.accuracy] == [MaxTokens(25), MaxTokens(36)]
    assert [*found.accuracy.values()] == [*sizes.accuracy.values()]
    assert "tokens_25/top1" in {name.split("/", 1)[1] for name in found.figures()}


def test_an_album_is_read_by_the_fit_that_it_was_made_with(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    images = pictures()
    for number, image in enumerate(images[:4]):
        image.save(photos / f"{number}.png")
    index_photos(photos, model_dir, out, device="cpu", num_workers=0, max_tokens=(9,), fit="aspect")
    images[4].save(photos / "4.png")
    index_photos(photos, out / "model", out, device="cpu", num_workers=0)
    searcher = Searcher.load(out, device="cpu")
    wanted = with_fit(tiny_model, "aspect").encode_image(images, max_tokens=9).numpy()
    ids = searcher.snapshot.ids().tolist()
    keys = [row["key"] for row in searcher.rows(ids)]
    order = [keys.index(f"{number}.png") for number in range(5)]
    stored = searcher.vectors(ids, MaxTokens(9))[order]
    np.testing.assert_allclose(stored, wanted, atol=1e-5)
    with pytest.raises(UsageError, match="was made with fit aspect, not crop"):
        index_photos(photos, model_dir, out, device="cpu", num_workers=0, fit="crop")
    with pytest.raises(UsageError, match="has budgets of 9 tokens, not 48; give these"):
        index_photos(photos, model_dir, out, (48,), device="cpu", num_workers=0)


def test_an_album_of_a_model_that_squashes_is_no_other_than_one_asked_to(
    tiny_model: LitModel, tmp_path: Path
) -> None:
    photos, out, squashes = tmp_path / "photos", tmp_path / "index", tmp_path / "squashes"
    photos.mkdir()
    pictures()[0].save(photos / "0.png")
    with_fit(tiny_model, "squash").save_pretrained(squashes)
    index_photos(photos, squashes, out, (48,), device="cpu", num_workers=0)
    again = index_photos(photos, squashes, out, device="cpu", num_workers=0, fit="squash")
    assert (again.unchanged, again.added) == (1, 0)
    for model_dir in (squashes, out / "model"):
        with pytest.raises(UsageError, match="was made with fit squash, not crop"):
            index_photos(photos, model_dir, out, device="cpu", num_workers=0, fit="crop")

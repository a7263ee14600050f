"""The service over HTTP gives what `Searcher` and `ZeroShotClassifier` give."""

import base64
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_maker import PATCH, clustered, write_embeddings
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval import ZeroShotClassifier, ZeroShotSegmenter, build_index, delete_ids
from retrieval.embed.partitions import vector_file
from retrieval.search.config import Budget
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher
from retrieval.server import service
from retrieval.server.duplicates import distinct
from retrieval.server.page import PAGE

TEMPLATES = ["a drawing of {c}", "{c}"]
LABELS = ["a cat", "a dog", "the sun", "rain"]


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of an index are looked for often, as tests wait for them."""
    monkeypatch.setattr(service, "WATCH_S", 0.1)


@pytest.fixture(scope="module")
def searcher(emoji_index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(emoji_index, tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher, tiny_model: LitModel) -> Iterator[Served]:
    classes = ZeroShotClassifier(tiny_model, LABELS, TEMPLATES)
    indexes = {"drawings": searcher, "same again": searcher}
    with serving(indexes, {"weather": classes}) as one:
        yield one


@pytest.fixture(scope="module")
def picture(searcher: Searcher) -> bytes:
    """A drawing's file, not one that is at the head of every list."""
    return searcher.search(["rain"], k=7)[0][6].image_bytes()


def assert_same(found: list[dict[str, Any]], hits: list[Hit]) -> None:
    assert [hit["id"] for hit in found] == [hit.id for hit in hits]
    for one, hit in zip(found, hits, strict=True):
        assert one["similarity"] == pytest.approx(hit.similarity, abs=1e-5)
        assert one["caption"] == hit.caption


def search(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.post("/v1/search", body)
    assert answer.status == 200, answer.body
    return answer.json


def test_words_find_what_the_searcher_finds_at_every_patch_size(
    served: Served, searcher: Searcher
) -> None:
    for size in searcher.patch_sizes:
        found = search(served, text="a happy cat", k=5, patch_size=size)
        assert_same(found["hits"], searcher.search(["a happy cat"], k=5, patch_size=size)[0])
        assert found["patch_size"] == size
        assert found["query_patch_size"] is None
        assert found["ms"]["text"] > 0


def test_a_picture_is_encoded_at_one_patch_size_and_looked_up_at_another(
    served: Served, searcher: Searcher, picture: bytes
) -> None:
    image = Image.open(io.BytesIO(picture))
    coarse, fine = searcher.patch_sizes
    other = min(searcher.model.patch_sizes)  # no index has it
    for query, index in ((coarse, fine), (fine, fine), (other, coarse)):
        (hits,) = searcher.search([image], k=6, patch_size=index, query_patch_size=query)
        asked = {"query_patch_size": query, "index_patch_size": index, "k": 6}
        found = search(served, image=base64.b64encode(picture).decode(), **asked)
        assert_same(found["hits"], hits)
        assert (found["patch_size"], found["query_patch_size"]) == (index, query)
        assert found["ms"]["image"] > 0
        assert_same(served.form("/v1/search", image=picture, **asked).json["hits"], hits)


def test_vectors_of_any_length_and_stored_images_are_queries(
    served: Served, searcher: Searcher
) -> None:
    hit = searcher.search(["rain"], k=3)[0][2]
    size = min(searcher.patch_sizes)
    vector = searcher.vectors([hit.id], size)[0]
    (hits,) = searcher.search_embeds(vector[None], k=4)
    assert hits[0].id == hit.id
    long = 1e200 * vector.astype(np.float64)
    queries = [{"vector": vector.tolist()}, {"vector": long.tolist()}, {"id": hit.id}]
    for query in (*queries, {"id": str(hit.id)}):
        assert_same(search(served, k=4, **query)["hits"], hits)


def test_a_mix_is_the_weighted_sum_of_unit_vectors(
    served: Served, searcher: Searcher, picture: bytes
) -> None:
    model = searcher.model
    size = min(searcher.patch_sizes)
    words = model.encode_text(["a cat"]).numpy()[0]
    image = model.encode_image([Image.open(io.BytesIO(picture))], patch_size=size).numpy()[0]
    mixed = 2 * words - 0.5 * image
    (hits,) = searcher.search_embeds((mixed / np.linalg.norm(mixed))[None], k=9)
    encoded = base64.b64encode(picture).decode()
    mix = [{"text": "a cat", "weight": 2}, {"image": encoded, "weight": -0.5}]
    assert_same(search(served, mix=mix, k=9)["hits"], hits)


def test_a_budget_stands_for_a_patch_size(
    served: Served, searcher: Searcher, picture: bytes
) -> None:
    coarse = searcher.patch_sizes[0]
    budget = searcher.profile.gflops(coarse)
    found = search(served, text="a cat", max_gflops=budget, k=3)
    expected = searcher.search(["a cat"], k=3, patch_size=Budget(max_gflops=budget))
    assert found["patch_size"] == coarse
    assert_same(found["hits"], expected[0])
    encoded = base64.b64encode(picture).decode()
    found = search(served, image=encoded, max_gflops=budget, k=3)
    assert (found["query_patch_size"], found["patch_size"]) == (coarse, min(searcher.patch_sizes))


def test_a_text_that_is_longer_than_the_model_reads_is_said(served: Served) -> None:
    assert not search(served, text="a cat", k=1)["text_cut"]
    assert search(served, text="a cat " * 30, k=1)["text_cut"]
    mix = [{"text": "a cat " * 30}, {"text": "the sun"}]
    assert search(served, mix=mix, k=1)["text_cut"]


def test_a_refined_search_is_the_searchers(served: Served, searcher: Searcher) -> None:
    asked: dict[str, Any] = {"k": 5, "patch_size": 48, "refine_patch_size": 20, "candidates": 12}
    (hits,) = searcher.search(["the sun"], **asked)
    found = search(served, text="the sun", **asked)
    assert_same(found["hits"], hits)
    assert found["refine_patch_size"] == 20


def test_filters_narrow_and_pages_join_to_the_whole(served: Served, searcher: Searcher) -> None:
    where = {"size": {">": 1500}}
    (hits,) = searcher.search(["a cat"], k=2048, where=where)
    assert 20 < len(hits) < len(searcher)
    pages: list[dict[str, Any]] = []
    offset: int | None = 0
    while offset is not None:
        found = search(served, text="a cat", where=where, k=11, offset=offset)
        pages += found["hits"]
        offset = found["next_offset"]
    assert_same(pages, hits)


def test_of_near_duplicates_the_best_stays(served: Served, searcher: Searcher) -> None:
    (hits,) = searcher.search(["a cat"], k=2048)
    vectors = searcher.vectors([hit.id for hit in hits], min(searcher.patch_sizes))
    expected = [hits[n] for n in distinct(vectors)]
    assert len(expected) < len(hits)
    found = search(served, text="a cat", deduplicate=True, k=2000)
    assert_same(found["hits"], expected)
    assert found["near_duplicates"] == len(hits) - len(expected)
    assert search(served, text="a cat", k=5)["near_duplicates"] == 0


def test_near_duplicates_are_told_by_what_is_better_alone() -> None:
    angles = np.radians([0, 90, 15, 30, 100, 200, 75])  # 15 is like 0, 30 like 15, 75 like 90
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert distinct(vectors, np.cos(np.radians(16))).tolist() == [0, 1, 5]
    for count in range(1, 8):  # however many follow
        assert set(distinct(vectors[:count], np.cos(np.radians(16)))) <= {0, 1, 5}


def test_pages_without_duplicates_join_and_end_with_the_index(
    tiny_model: LitModel, model_dir: Path, tmp_path: Path
) -> None:
    """29 of 30 images are copies: one look a little further than the page would miss the rest."""
    folder = write_embeddings(tmp_path / "emb", tiny_model, model_dir, [900])
    different = clustered(900, tiny_model.embed_dim)[:30]
    copies = np.repeat(different + 0.0, 30, axis=0)
    copies += 1e-3 * np.random.default_rng(0).standard_normal(copies.shape)
    copies /= np.linalg.norm(copies, axis=1, keepdims=True)
    np.save(vector_file(folder, PATCH, 0), copies.astype(np.float32))
    build_index(folder, tmp_path / "index", kind="flat", device="cpu")
    searcher = Searcher.load(tmp_path / "index", tiny_model, device="cpu")
    expected = [hit.id // 60 for hit in searcher.search(["a cat"], k=900)[0]]
    with serving({"copies": searcher}) as served:
        groups: list[int] = []
        left_out: list[int] = []
        offset: int | None = 0
        while offset is not None:
            body = {"text": "a cat", "k": 7, "offset": offset, "deduplicate": True}
            answer = served.post("/v1/search", body).json
            groups += [hit["id"] // 60 for hit in answer["hits"]]
            left_out.append(answer["near_duplicates"])
            offset = answer["next_offset"]
    firsts = [expected.index(group) for group in dict.fromkeys(expected)]
    assert left_out == [firsts[n] - n for n in (7, 14, 21, 28)] + [900 - 30]
    assert groups == list(dict.fromkeys(expected))


def test_labels_are_ranked_as_by_the_classifier(
    served: Served, tiny_model: LitModel, picture: bytes
) -> None:
    image = Image.open(io.BytesIO(picture))
    encoded = base64.b64encode(picture).decode()
    for size in (48, 8):
        classifier = ZeroShotClassifier(tiny_model, LABELS, TEMPLATES)
        (rows,), (similarities,) = classifier.predict([image], patch_size=size)
        for what in ({"labels": LABELS, "templates": TEMPLATES}, {"class_set": "weather"}):
            body = {"image": encoded, "patch_size": size, **what}
            found = served.post("/v1/classify", body).json
            assert [one["label"] for one in found["labels"]] == [LABELS[row] for row in rows]
            for one, similarity in zip(found["labels"], similarities, strict=True):
                assert one["similarity"] == pytest.approx(similarity, abs=1e-5)
            assert sum(one["share"] for one in found["labels"]) == pytest.approx(1)
            shares = [one["share"] for one in found["labels"]]
            assert shares == sorted(shares, reverse=True)
    form = served.form("/v1/classify", image=picture, labels=LABELS, templates=TEMPLATES, k=2)
    assert [one["label"] for one in form.json["labels"]] == [
        LABELS[row] for row in classifier.predict([image], k=2)[0][0]
    ]


def test_a_mask_is_the_segmenters(served: Served, tiny_model: LitModel) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 9]]], np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(colours).resize((330, 130), Image.Resampling.NEAREST)
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    for background in (None, 1.0):
        segmenter = ZeroShotSegmenter(tiny_model, LABELS, TEMPLATES, background=background)
        (expected,) = segmenter.predict(image, 24)
        body = {"image": encoded, "labels": LABELS, "templates": TEMPLATES, "patch_size": 24}
        found = served.post("/v1/segment", {**body, "background": background}).json
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]))))
        assert (found["width"], found["height"]) == (330, 130)
        assert (mask == expected).mean() > 0.99
        shares = {one["label"]: one["share"] for one in found["regions"]}
        for number, label in enumerate(LABELS, 1):
            assert shares.get(label, 0) == pytest.approx((mask == number).mean())
        assert sum(shares.values()) == pytest.approx((mask > 0).mean())
    form = served.form("/v1/segment", image=file.getvalue(), labels=LABELS)
    assert form.json["patch_size"] == 8
    wide = io.BytesIO()
    Image.new("RGB", (3000, 20)).save(wide, "PNG")
    found = served.form("/v1/segment", image=wide.getvalue(), labels=LABELS, patch_size=48).json
    assert (found["width"], found["height"]) == (1024, 7)


def test_only_close_calls_are_looked_at_again(served: Served, picture: bytes) -> None:
    body = {"image": base64.b64encode(picture).decode(), "labels": LABELS, "patch_size": 48}
    for margin, refined in ((0, False), (2, True)):
        found = served.post("/v1/classify", {**body, "refine_patch_size": 8, "margin": margin}).json
        assert found["refined"] == refined
        assert found["patch_size"] == (8 if refined else 48)
        sizes = {48: 1 / 3, 8: 2 / 3} if refined else {48: 1}
        expected = dict.fromkeys(LABELS, 0.0)
        for size, share in sizes.items():
            for one in served.post("/v1/classify", {**body, "patch_size": size}).json["labels"]:
                expected[one["label"]] += share * one["similarity"]
        for one in found["labels"]:
            assert one["similarity"] == pytest.approx(expected[one["label"]], abs=1e-5)
        ranked = [one["label"] for one in found["labels"]]
        assert ranked == sorted(LABELS, key=lambda label: -expected[label])


# ---- clip-retrieval's endpoints ------------------------------------------------------------


def knn(served: Served, **body: Any) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("text", "image", "image_url", "embedding_input"))
    settings = {"modality": "image", "num_images": 40, "num_result_ids": 40, "use_mclip": False,
                "aesthetic_score": "", "indice_name": "drawings", "deduplicate": False}  # fmt: skip
    answer = served.post("/knn-service", {**empty, **settings, **body})
    assert answer.status == 200, answer.body
    return answer.json


def test_knn_service_answers_by_words_picture_and_vector(
    served: Served, searcher: Searcher, picture: bytes
) -> None:
    (hits,) = searcher.search(["a red bicycle"], k=40)
    assert_same(knn(served, text="a red bicycle"), hits)
    assert_same(knn(served, text="a red bicycle", indice_name=""), hits)
    vector = searcher.model.encode_text(["a red bicycle"])[0].tolist()
    assert_same(knn(served, embedding_input=vector), hits)
    (alike,) = searcher.search([Image.open(io.BytesIO(picture))], k=40)
    assert_same(knn(served, image=base64.b64encode(picture).decode()), alike)


def test_knn_service_gives_metadata_and_pictures_for_num_images_only(served: Served) -> None:
    found = knn(served, text="rain", num_images=3, num_result_ids=5000)
    assert len(found) == served.get("/v1/indices").json["indices"][0]["count"]
    for hit in found[:3]:
        with Image.open(io.BytesIO(base64.b64decode(hit["image"]))) as picture:
            assert picture.format == "JPEG"
        assert not {"shard", "offset"} & set(hit)  # where it lies on this machine
    assert all(set(hit) == {"id", "similarity"} for hit in found[3:])
    assert all(type(hit["id"]) is int for hit in found)


def test_metadata_is_found_by_id_and_what_is_gone_is_left_out(served: Served) -> None:
    hits = knn(served, text="rain", num_images=3)[:3]
    ids = [hit["id"] for hit in hits]
    asked = {"ids": [ids[2], 12345678, ids[0]], "indice_name": "drawings"}
    found = served.post("/metadata", asked).json
    assert [one["id"] for one in found] == [ids[2], ids[0]]
    assert found[0]["metadata"] == {name: hits[2][name] for name in ("key", "caption", "image")}
    assert served.post("/metadata", {"ids": [], "indice_name": "drawings"}).json == []


def test_indexes_are_listed_and_prometheus_can_read_the_counts(served: Served) -> None:
    assert served.get("/indices-list").json == ["drawings", "same again"]
    search(served, text="rain", index="same again")
    families = {
        f.name: f for f in text_string_to_metric_families(served.get("/metrics").body.decode())
    }
    counts = {s.name: s.value for s in families["full_knn_request_time"].samples}
    assert counts["full_knn_request_time_count"] > 0
    requests = {tuple(s.labels.values()): s.value for s in families["http_requests"].samples}
    assert requests["/v1/search", "200"] > 0


# ---- pictures, page, description -----------------------------------------------------------


def test_thumbnails_fit_the_size_asked_for_and_are_not_sent_twice(
    served: Served, searcher: Searcher
) -> None:
    hit = searcher.search(["rain"], k=1)[0][0]
    path = f"/v1/images/drawings/{hit.id}"
    for side in (16, 64):
        answer = served.get(f"{path}?size={side}")
        with Image.open(io.BytesIO(answer.body)) as picture:
            assert max(picture.size) == side
        again = served.get(f"{path}?size={side}", {"If-None-Match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
    assert search(served, text="rain", k=1)["hits"][0]["image"] == path


def test_a_sample_shows_what_an_index_holds(served: Served, searcher: Searcher) -> None:
    hits = served.get("/v1/indices/same%20again/sample?n=7").json["hits"]
    assert len({hit["id"] for hit in hits}) == 7
    assert {hit["caption"] for hit in hits} == {
        r["caption"] for r in searcher.rows([h["id"] for h in hits])
    }
    assert served.get(hits[0]["image"]).status == 200


def test_what_patch_sizes_cost_is_told(served: Served, searcher: Searcher) -> None:
    index = served.get("/v1/indices").json["indices"][0]
    assert index["count"] == len(searcher)
    costs = {one["patch_size"]: one for one in index["patch_sizes"]}
    assert set(costs) == set(searcher.model.patch_sizes)
    assert {size for size, one in costs.items() if one["in_index"]} == set(searcher.patch_sizes)
    assert costs[8]["gflops"] > costs[48]["gflops"]
    assert all(one["ms"] > 0 for one in costs.values())


def test_the_page_and_all_that_it_loads_come_from_the_server(served: Served) -> None:
    page = served.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    todo, seen = ["/"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        answer = served.get(path)
        assert answer.status == 200, path
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search("https?://", text)
        names = re.findall(r'(?:from "\./|src="|href=")([\w.]+)"', text)
        todo += [f"/{name}" for name in names if f"/{name}" not in seen]
    assert {"/app.js", "/style.css", "/icon.svg", "/api.js"} <= seen


def test_the_page_is_small_and_so_are_its_files() -> None:
    scripts = {path: text for path, (_, text) in PAGE.items() if path.endswith((".js", ".css"))}
    assert sum(map(len, scripts.values())) < 150_000
    assert max(text.count(b"\n") for _, text in PAGE.values()) <= 300


def test_every_reference_of_the_openapi_document_leads_somewhere(served: Served) -> None:
    document = served.get("/openapi.json").json
    for path in ("/v1/search", "/v1/classify", "/knn-service", "/metadata"):
        assert document["paths"][path]["post"]["requestBody"]["required"]
    assert "/healthz" in document["paths"]
    references = re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])
    body = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    fields = document["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
    assert {"text", "image", "mix", "where", "query_patch_size"} <= set(fields["properties"])


def test_the_openapi_document_describes_bodies_answers_and_refusals(served: Served) -> None:
    document = served.get("/openapi.json").json
    form = "multipart/form-data"
    for path, contents, answer in (
        ("/v1/search", {"application/json", form}, "SearchAnswer"),
        ("/v1/classify", {"application/json", form}, "ClassifyAnswer"),
        ("/v1/segment", {"application/json", form}, "SegmentAnswer"),
        ("/v1/detect", {"application/json", form}, "DetectAnswer"),
        ("/v1/map", {"application/json", form}, "MapAnswer"),
        ("/knn-service", {"application/json"}, "KnnEntry"),
        ("/metadata", {"application/json"}, "MetadataEntry"),
    ):
        told = document["paths"][path]["post"]
        assert set(told["requestBody"]["content"]) == contents
        assert answer in json.dumps(told["responses"]["200"])
        assert "Refusal" in json.dumps(told["responses"]["4XX"])
        assert "422" not in told["responses"]


def test_odd_metadata_becomes_plain_json(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {"score": float("nan"), "blob": b"\xff", "url": None, "tags": [None, float("inf")]}
    rows = searcher.snapshot.rows
    monkeypatch.setattr(
        type(searcher.snapshot), "rows", lambda self, ids: [{**row, **odd} for row in rows(ids)]
    )
    plain = {"score": None, "blob": "_w==", "tags": [None, None]}
    with serving({"drawings": searcher}) as served:
        hit = search(served, text="rain", k=1)["hits"][0]
        assert hit["columns"] == {**plain, "url": None}
        (entry,) = knn(served, text="rain", num_images=1, num_result_ids=1)
        assert {name: entry.get(name) for name in plain} == plain
        assert "url" not in entry
        asked = {"ids": [hit["id"]], "indice_name": "drawings"}
        (found,) = served.post("/metadata", asked).json
        assert {name: found["metadata"].get(name) for name in plain} == plain
        assert "url" not in found["metadata"]


def test_health(served: Served) -> None:
    assert served.get("/healthz").status == 200
    assert served.get("/readyz").json == "ready"


# ---- together ------------------------------------------------------------------------------


def test_requests_together_share_forwards_and_change_no_answer(
    searcher: Searcher, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"{thing} {n}" for n in range(8) for thing in ("a cat", "rain", "two big dogs")]
    forwards: list[int] = []
    encode = searcher.model.encode_text
    encoded = base64.b64encode(picture).decode()

    def counted(texts: Any) -> Any:
        forwards.append(len(texts))
        return encode(texts)

    with serving({"drawings": searcher}) as served:
        alone = [search(served, text=text, k=4)["hits"] for text in words]
        alone_images = search(served, image=encoded, k=4)["hits"]
        monkeypatch.setattr(searcher.model, "encode_text", counted)
        with ThreadPoolExecutor(len(words) + 1) as pool:
            image = pool.submit(search, served, image=encoded, k=4)
            together = list(pool.map(lambda text: search(served, text=text, k=4)["hits"], words))
        assert image.result()["hits"] == alone_images
    assert sum(forwards) == len(words)
    assert len(forwards) < len(words) / 2
    for one, other in zip(alone, together, strict=True):
        assert [hit["id"] for hit in one] == [hit["id"] for hit in other]
        for a, b in zip(one, other, strict=True):
            assert a["similarity"] == pytest.approx(b["similarity"], abs=1e-5)


def test_an_index_changes_under_requests_and_none_fails(
    emoji_index: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    shutil.copytree(emoji_index, tmp_path / "changing")
    searcher = Searcher.load(tmp_path / "changing", tiny_model, device="cpu")
    count = len(searcher)
    gone = [hit.id for hit in searcher.search(["a cat"], k=3)[0]]
    failures: list[Any] = []
    stop = threading.Event()

    def ask(served: Served) -> None:
        while not stop.is_set():
            answer = served.post("/v1/search", {"text": "a cat", "k": 5, "deduplicate": True})
            if answer.status != 200:
                failures.append(answer.body)

    with serving({"changing": searcher}) as served:
        threads = [threading.Thread(target=ask, args=(served,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for id in gone:
                delete_ids(tmp_path / "changing", [id])
                left = count - gone.index(id) - 1
                for _ in range(200):
                    if served.get("/v1/indices").json["indices"][0]["count"] == left:
                        break
                    stop.wait(0.05)
            ids = [hit["id"] for hit in search(served, text="a cat", k=5)["hits"]]
            # what comes next is damaged: the server stays with what it has
            manifest = tmp_path / "changing" / "manifest.json"
            manifest.write_text("{")
            stop.wait(10 * service.WATCH_S)
            assert [hit["id"] for hit in search(served, text="a cat", k=5)["hits"]] == ids
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert served.get("/v1/indices").json["indices"][0]["count"] == count - 3
    assert not failures
    assert not set(ids) & set(gone)


def test_an_index_with_a_flipped_bit_is_not_served_for_long(
    searcher: Searcher, emoji_index: Path, tiny_model: LitModel, tmp_path: Path
) -> None:
    """Until it is built again; others are served on."""
    folder = tmp_path / "damaged"
    shutil.copytree(emoji_index, folder)
    file = folder / "patch_40" / "image.index"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    damaged = Searcher.load(folder, tiny_model, device="cpu")
    with serving({"damaged": damaged, "drawings": searcher}) as served:

        def names_become(names: list[str]) -> bool:
            return any(
                served.get("/indices-list").json == names or time.sleep(0.05) for _ in range(200)
            )

        assert names_become(["drawings"])
        for ask in ({"index": "damaged", "text": "rain"}, {"text": "rain"}):
            answer = served.post("/v1/search", ask)
            assert (answer.status, answer.json) == (
                503, {"error": "index: damaged is damaged and not served any more"},
            )  # fmt: skip
        assert [one["name"] for one in served.get("/v1/indices").json["indices"]] == ["drawings"]
        assert search(served, index="drawings", text="rain")["hits"]
        file.write_bytes(whole)
        delete_ids(folder, [int(damaged.snapshot.ids()[0])])
        assert names_become(["damaged", "drawings"])


def refuses(served: Served) -> bool:
    """Whether a server takes no new connections, soon."""
    for _ in range(400):
        try:
            served.get("/healthz")
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_server_that_stops_answers_what_is_under_way(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    encode = searcher.model.encode_text

    def slow(texts: Any) -> Any:
        begun.set()
        go_on.wait(20)
        return encode(texts)

    monkeypatch.setattr(searcher.model, "encode_text", slow)
    with ThreadPoolExecutor(1) as pool, serving({"drawings": searcher}) as served:
        answer = pool.submit(search, served, text="rain", k=2)
        begun.wait(20)
        served.server.should_exit = True
        assert refuses(served)
        go_on.set()
        assert len(answer.result()["hits"]) == 2


def test_whatever_fails_while_an_index_is_taken_up_the_old_one_is_served(
    served: Served, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> bool:
        raise RuntimeError("no room on the GPU")

    def refused() -> int:
        text = served.get("/metrics").body.decode()
        found = re.findall(r'index_reloads_total{index="drawings",outcome="refused"} (\d+)', text)
        return int(found[0]) if found else 0

    manifest = searcher.folder / "manifest.json"
    monkeypatch.setattr(searcher, "reload", fail)
    for turn in (1, 2):  # a second time: the first did not end the watch
        manifest.write_bytes(manifest.read_bytes())
        end = time.monotonic() + 20
        while refused() < turn and time.monotonic() < end:
            time.sleep(0.1)
        assert refused() == turn
    assert len(search(served, text="a happy cat", k=3)["hits"]) == 3

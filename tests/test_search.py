"""Search by words and pictures over real drawings, the contact sheet and the command line."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw, ImageFont
from shard_maker import png

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.shards.names import expand_shards
from retrieval.embed.bulk import embed_shards
from retrieval.index.build import build_index
from retrieval.search.config import Budget
from retrieval.search.contact_sheet import contact_sheet, wrap
from retrieval.search.hit import Hit
from retrieval.search.query_images import Mix
from retrieval.search.searcher import Searcher

LAUNCH = Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def index(tiny_model: LitModel, model_dir: Path, emoji_shards: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    shards = expand_shards([f"{emoji_shards}/heldout_captions/*.tar"])
    embed_shards(
        tiny_model,
        shards,
        tiny_model.patch_sizes[:2],
        folder / "embeddings",
        num_workers=0,
        model_dir=model_dir,
    )
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--embeddings", str(folder / "embeddings"), "--out", str(folder / "index")]
        patch.setattr(sys, "argv", ["index.py", *arguments, "--device", "cpu"])
        runpy.run_path(str(LAUNCH / "index.py"), run_name="__main__")
    return folder / "index"


@pytest.fixture(scope="module")
def searcher(index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(index, tiny_model, device="cpu")


def test_a_picture_finds_itself_at_every_patch_size(searcher: Searcher) -> None:
    (hits,) = searcher.search(["anything"], k=5)
    pictures = [hit.image() for hit in hits]
    for size in searcher.patch_sizes:
        found = searcher.search(pictures, k=1, patch_size=size)
        assert [row[0].id for row in found] == [hit.id for hit in hits]
        assert all(row[0].similarity == pytest.approx(1, abs=1e-4) for row in found)


def test_a_flipped_bit_is_found_by_a_check(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "index"
    shutil.copytree(index, folder)
    (file, *_) = folder.glob("patch_*/image.index")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(sys, "argv", ["search.py", "--index", str(folder), "a cat", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCH / "search.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {file} is damaged; build the index again\n"


def test_hits_are_the_most_similar_images_to_the_text(
    searcher: Searcher, tiny_model: LitModel
) -> None:
    everything = searcher.search(["a cat"], k=2048)[0]
    assert len(everything) == len(searcher)  # fewer than k: what there is
    text = tiny_model.encode_text(["a cat"])
    finest = min(searcher.patch_sizes)
    images = tiny_model.encode_image([hit.image() for hit in everything], patch_size=finest)
    expected = (images @ text.T)[:, 0]
    for hit, similarity in zip(everything, expected.tolist(), strict=True):
        assert hit.similarity == pytest.approx(similarity, abs=1e-4)
    assert [h.id for h in searcher.search(["a cat"], k=3)[0]] == [h.id for h in everything[:3]]


def test_each_query_gets_its_own_row(searcher: Searcher) -> None:
    together = searcher.search(["a cat", "rain"], k=4)
    alone = [searcher.search([query], k=4)[0] for query in ("a cat", "rain")]
    assert [[h.id for h in row] for row in together] == [[h.id for h in row] for row in alone]
    assert searcher.search([], k=4) == []


def test_a_mix_is_the_weighted_sum_of_its_parts(searcher: Searcher, tiny_model: LitModel) -> None:
    coarse, fine = searcher.patch_sizes
    picture = searcher.search(["rain"], k=1)[0][0].image()
    weights = np.array([[1.0, 0.5, -0.25]])
    mix = Mix([(picture, 1.0), ("at night", 0.5), ("people", -0.25)])
    texts = tiny_model.encode_text(["at night", "people"])

    def row(size: int) -> np.ndarray:
        sums = weights @ np.concatenate([tiny_model.encode_image(picture, size), texts])
        return (sums / np.linalg.norm(sums)).astype(np.float32)

    found, by_words = searcher.search([mix, "rain"], k=5)
    (wanted,) = searcher.search_embeds(row(fine), k=5)
    assert [hit.id for hit in found] == [hit.id for hit in wanted]
    similarities = [hit.similarity for hit in wanted]
    assert [hit.similarity for hit in found] == pytest.approx(similarities, abs=1e-5)
    assert [hit.id for hit in by_words] == [hit.id for hit in searcher.search("rain", k=5)[0]]
    refine = {"k": 5, "patch_size": coarse, "refine_patch_size": fine}
    (found,) = searcher.search(mix, **refine)
    (wanted,) = searcher.search_embeds(row(coarse), refine_embeds=row(fine), **refine)
    assert [hit.id for hit in found] == [hit.id for hit in wanted]
    least = searcher.search(Mix([("rain", -1.0)]), k=len(searcher))[0]
    most = searcher.search("rain", k=len(searcher))[0]
    assert [hit.similarity for hit in least] == pytest.approx(
        [-hit.similarity for hit in reversed(most)], abs=1e-5
    )
    with pytest.raises(UsageError, match="cancel out"):
        searcher.search(Mix([("rain", 1.0), ("rain", -1.0)]))
    with pytest.raises(UsageError, match="at least one"):
        Mix([])
    with pytest.raises(UsageError, match="a text has no parts"):
        searcher.search(mix, box=(0.0, 0.0, 1.0, 0.5))


def test_words_of_a_mix_count_by_their_weights(searcher: Searcher) -> None:
    caption = searcher.search(["rain"], k=1)[0][0].caption
    assert searcher.search(Mix([(caption, 1.0)]), words=1.0)[0][0].words > 0
    (hits,) = searcher.search(Mix([("rain", 1.0), (caption, -1.0)]), words=0.5)
    assert caption not in {hit.caption for hit in hits if hit.words > 0}


def test_impossible_requests_say_what_is_allowed(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="allowed: 1 to 2048"):
        searcher.search(["a cat"], k=0)
    sizes = ", ".join(map(str, searcher.patch_sizes))
    with pytest.raises(UsageError, match=f"allowed: {sizes}"):
        searcher.search(["a cat"], patch_size=7)
    with pytest.raises(UsageError, match="candidates 5: allowed are k"):
        searcher.search(["a cat"], k=6, candidates=5, refine_patch_size=24)
    with pytest.raises(UsageError, match="patch size 7 does not divide"):
        searcher.search(["a cat"], refine_patch_size=7)
    with pytest.raises(UsageError, match="nprobe 0"):
        searcher.search(["a cat"], nprobe=0)
    with pytest.raises(UsageError, match="width 3"):
        searcher.search_embeds(np.zeros((1, 3), np.float32))
    with pytest.raises(UsageError, match="not finite"):
        searcher.search_embeds(np.full((1, searcher.model.embed_dim), np.nan, np.float32))


def test_a_query_picture_has_a_patch_size_of_its_own(
    searcher: Searcher, tiny_model: LitModel
) -> None:
    (hits,) = searcher.search(["anything"], k=3)
    pictures = [hit.image() for hit in hits]
    coarse, fine = searcher.patch_sizes
    found = searcher.search(pictures, k=4, patch_size=fine, query_patch_size=coarse)
    embeds = tiny_model.encode_image(pictures, patch_size=coarse).numpy()
    assert found == searcher.search_embeds(embeds, k=4, patch_size=fine)
    same = searcher.search(pictures, k=4, patch_size=fine, query_patch_size=fine)
    assert same == searcher.search(pictures, k=4, patch_size=fine) != found
    other = min(set(tiny_model.patch_sizes) - set(searcher.patch_sizes))  # needs no index
    assert len(searcher.search(pictures, k=4, patch_size=fine, query_patch_size=other)) == 3
    with pytest.raises(UsageError, match="a text is not cut into patches"):
        searcher.search(["a cat"], query_patch_size=fine)


def test_a_budget_stands_for_a_patch_size(searcher: Searcher) -> None:
    (hits,) = searcher.search(["anything"], k=2)
    pictures = [hit.image() for hit in hits]
    coarse, fine = searcher.patch_sizes
    budget = Budget(max_gflops=searcher.profile.gflops(coarse))
    assert searcher.search(["a cat"], patch_size=budget) == searcher.search(
        ["a cat"], patch_size=coarse
    )
    assert searcher.search(pictures, patch_size=fine, query_patch_size=budget) == searcher.search(
        pictures, patch_size=fine, query_patch_size=coarse
    )


def test_a_filter_narrows_the_hits(searcher: Searcher) -> None:
    (everything,) = searcher.search(["a cat"], k=2048)
    shard = everything[0].shard
    (hits,) = searcher.search(["a cat"], k=2048, where={"shard": shard, "size": {">": 1500}})
    expected = [hit for hit in everything if hit.shard == shard and hit.size > 1500]
    assert hits == expected
    assert 0 < len(hits) < len(everything)


def test_index_of_another_tower_is_refused_but_another_text_tower_is_not(
    index: Path, model_dir: Path, tmp_path: Path
) -> None:
    other = LitModel.from_pretrained(model_dir)
    other.text.logit_scale.data += 1
    Searcher.load(index, other)
    other.feature_mean += 1
    with pytest.raises(UsageError, match="another image tower"):
        Searcher.load(index, other)


def test_what_an_earlier_transform_made_is_continued_with_it(
    emoji_shards: Path, model_dir: Path, tmp_path: Path
) -> None:
    first, second = (LitModel.from_pretrained(model_dir) for _ in range(2))
    first.vision.use_transform(1)
    made = tmp_path / "embeddings"
    shard = str(next(emoji_shards.glob("*/*.tar")))
    manifest = embed_shards(first, [shard], (48,), made, num_workers=0)
    assert second.image_fingerprint != manifest["image_fingerprint"]
    assert embed_shards(second, [shard], (48,), made, num_workers=0) == manifest
    assert second.transform.version == 1
    first.save_pretrained(tmp_path / "first")
    build_index(made, tmp_path / "index", tmp_path / "first", kind="flat", device="cpu")
    third = LitModel.from_pretrained(model_dir)
    Searcher.load(tmp_path / "index", third, device="cpu")
    assert third.image_fingerprint == manifest["image_fingerprint"]


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no index"):
        Searcher.load(tmp_path)


def test_contact_sheet_shows_every_picture_once(searcher: Searcher, tmp_path: Path) -> None:
    hits = searcher.search(["a cat", "rain"], k=6)
    sheet = contact_sheet(["a cat", "rain"], hits, tmp_path / "hits.png")
    with Image.open(tmp_path / "hits.png") as written:
        assert not ImageChops.difference(written.convert("RGB"), sheet).getbbox()
    one = contact_sheet(["a cat"], hits[:1], tmp_path / "one.png")
    assert one.width == sheet.width
    assert sheet.height > 1.8 * one.height
    credited = contact_sheet(["a cat"], hits[:1], tmp_path / "credited.png", "whose " * 200)
    assert credited.size[0] == one.width
    assert one.height < credited.height < one.height + 100  # two lines at most


@pytest.mark.parametrize(
    ("name", "kind"), [("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"), ("a.png", "PNG")]
)
def test_contact_sheet_has_the_format_that_its_name_asks_for(
    name: str, kind: str, tmp_path: Path
) -> None:
    contact_sheet(["a cat"], [[]], tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.format == kind
    with pytest.raises(
        UsageError, match=r"picture a.tga: allowed are names that end in .png, .jpg"
    ):
        contact_sheet(["a cat"], [[]], "a.tga")


@pytest.mark.parametrize("count", [0, 1, 11])
def test_contact_sheet_of_lost_pictures_still_draws(count: int, tmp_path: Path) -> None:
    lost = Hit(1, 0.5, "key", "a caption " * 20, "/nowhere/at-all.tar", 0, 10)
    for queries in (1, 20):
        sheet = contact_sheet(
            ["query " * 50] * queries, [[lost] * count] * queries, tmp_path / "s.png"
        )
        assert min(sheet.size) > 100
        assert sheet.info["lost"] == count * queries


def test_a_contact_sheet_counts_the_pictures_it_lacks(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hits,) = searcher.search(["a cat"], k=3)
    whole = contact_sheet(["a cat"], [hits], tmp_path / "whole.png")
    lines = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, at, line, **how: lines.append(line) or text(self, at, line, **how),
    )
    away = hits[1]._replace(shard="/away/1.png")
    sheet = contact_sheet(["a cat"], [[hits[0], away, hits[2]]], tmp_path / "sheet.png")
    assert (whole.info["lost"], sheet.info["lost"]) == (0, 1)
    assert sheet.info["sought"] == "/away/1.png"
    assert "1 of 3 images cannot be found or read: /away/1.png" in lines
    assert sheet.height > whole.height


def test_wrapped_lines_fit() -> None:
    font = ImageFont.load_default(16)
    for text in ("", "cat", "a man in a motorised wheelchair facing right", "Donaudampfschiff" * 5):
        lines = wrap(text, font, 120, 2)
        assert 1 <= len(lines) <= 2
        assert all(font.getlength(line) <= 120 for line in lines)
        assert text.startswith(" ".join(lines).rstrip("…"))


def launch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py", *arguments])
    runpy.run_path(str(LAUNCH / "search.py"), run_name="__main__")


def test_command_line_prints_json_and_draws(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "sheets" / "hits.png"
    arguments = ["--index", str(index), "a cat", "rain", "-k", "3", "--json"]
    launch(monkeypatch, *arguments, "--picture", str(picture))
    found = json.loads(capsys.readouterr().out)
    assert [row["query"] for row in found] == ["a cat", "rain"]
    assert [len(row["hits"]) for row in found] == [3, 3]
    assert {"id", "key", "caption", "similarity", "shard"} <= set(found[0]["hits"][0])
    assert picture.is_file()


def test_command_line_takes_pictures_filters_and_patch_sizes(
    index: Path,
    searcher: Searcher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (hits,) = searcher.search(["anything"], k=1)
    hits[0].image().save(tmp_path / "query.png")
    coarse, fine = searcher.patch_sizes
    arguments = ["a cat", str(tmp_path / "query.png"), "--index", str(index), "-k", "3", "--json"]
    arguments += ["--patch-size", str(coarse), "--refine-patch-size", str(fine)]
    arguments += ["--candidates", "20", "--where", '{"size": {">": 0}}']
    launch(monkeypatch, *arguments)
    found = json.loads(capsys.readouterr().out)
    assert [len(row["hits"]) for row in found] == [3, 3]
    assert found[1]["hits"][0]["id"] == hits[0].id
    assert found[1]["hits"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    for wrong in (
        ["--where", "size > 3"],
        ["--max-gflops", "1", "--patch-size", "48"],
        ["--max-gflops", "0.0001"],
        ["--refine-patch-size", "7"],
    ):
        with pytest.raises(SystemExit) as stop:
            launch(monkeypatch, "a cat", "--index", str(index), *wrong)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_command_line_says_which_texts_it_does_not_read_whole(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path)
    launch(monkeypatch, "cats", "a cat " * 30, "rain", "--index", str(index), "-k", "1")
    said = capsys.readouterr().err.splitlines()
    assert "the end of 'a cat a cat" in said[1]
    assert said[1].endswith("is not searched for: the model reads 32 tokens")
    assert said[0].startswith("'cats' is searched for as words; for the images of that folder")
    assert len(said) == 2


def test_command_line_says_where_nothing_is_found(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(monkeypatch, "a cat", "--index", str(index), "--where", '{"key": "no such"}')
    assert capsys.readouterr().out.splitlines() == ["a cat", "  none found"]


def test_command_line_refuses_in_one_sentence(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--index", "nowhere", "a cat"], "there is no folder nowhere"),
        (["--index", str(index)], "nothing to look for"),
        (["--index", str(index), "a cat", " "], "nothing to look for"),
        (["--index", str(index), "typo.png"], "typo.png: there is no such image"),
        (["--index", str(index), f"{tmp_path}/"], "is a folder; name images in it, such as"),
        (["--index", str(index), "a cat", "--picture", "a.bmpp"], "--picture a.bmpp: allowed are"),
        (["--index", str(index), "a cat", "--query-patch-size", "40"], "is for images"),
        (["--index", str(index), str(tmp_path / "a.png"), "--query-patch-size", "0"], "size 0"),
        (
            ["--index", str(index), "a cat", "--picture", str(tmp_path / "file" / "a.png")],
            "cannot be written",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            launch(monkeypatch, *arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error

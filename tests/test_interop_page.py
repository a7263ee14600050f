"""The page in headless Chromium: ask, look closer, filter, choose, compare, drop, name."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from data.files import file_digest
from retrieval import ZeroShotSegmenter, build_index, index_regions
from retrieval.regions.boxes import WHOLE
from retrieval.search.searcher import Searcher
from retrieval.server.config import Limits

pytestmark = pytest.mark.interop

PYTHON = Path(__file__).parents[1] / ".venv-interop/page/bin/python"
DRIVER = Path(__file__).with_name("page_driver.py")
STATES = Path(__file__).with_name("page_states_driver.py")
PAGE = 24  # images of one page
HEIGHT = 844


@pytest.fixture(scope="module")
def searcher(
    emoji_index: Path, tiny_model: LitModel, tmp_path_factory: pytest.TempPathFactory
) -> Searcher:
    """The drawings, with a style and a day each."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(emoji_index.parent / "emb", folder / "emb")
    manifest = json.loads((folder / "emb" / "manifest.json").read_text())
    files = sorted((folder / "emb" / "metadata").glob("*.parquet"))
    for file, partition in zip(files, manifest["partitions"], strict=True):
        table = pq.read_table(file)
        facts = table.schema.metadata
        rows = range(len(table))
        days = [datetime(2024, 1, 1) + timedelta(days=7 * row % 366) for row in rows]
        styles = pa.array([("flat", "round", "old")[row % 3] for row in rows])
        table = table.append_column("style", styles)
        table = table.append_column("drawn_on", pa.array(days, pa.timestamp("s")))
        pq.write_table(table.replace_schema_metadata(facts), file)
        partition["blake2b"]["metadata"] = file_digest(file)
    (folder / "emb" / "manifest.json").write_text(json.dumps(manifest))
    build_index(folder / "emb", folder / "drawings", kind="flat", device="cpu")
    index_regions(folder / "drawings", model=tiny_model)
    return Searcher.load(folder / "drawings", tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"drawings": searcher}, limits=Limits(max_text=500)) as one:
        yield one


def drive(
    served: Served, way: str, width: int, id: int = 0, driver: Path = DRIVER
) -> dict[str, Any]:
    """What the driver saw; no error, and nothing of another site, is among it."""
    if not PYTHON.is_file():
        pytest.fail(f"{PYTHON} is missing; `make interop` installs it")
    url = f"http://127.0.0.1:{served.port}"
    command = [PYTHON, driver, way, url, f"/v1/images/drawings/{id}?size=640", str(width)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout)
    assert seen["errors"] == seen["outside"] == []
    return seen


def captions(searcher: Searcher, query: object, **asked: Any) -> list[str]:
    (hits,) = searcher.search([query], k=PAGE, **asked)  # type: ignore[list-item, arg-type]
    return [hit.caption or hit.key for hit in hits]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_asks_compares_drops_and_names(
    served: Served, searcher: Searcher, width: int
) -> None:
    hit = searcher.search(["rain"], k=4)[0][3]
    seen = drive(served, "ask", width, hit.id)
    assert seen["sample"] > 5
    assert seen["pictures"] > 5
    assert "cat - fence" in seen["hint"]
    finest = min(searcher.patch_sizes)
    asked = {"text": "a happy cat", "k": PAGE, "deduplicate": True}
    distinct = served.post("/v1/search", asked).json
    assert seen["words"] == [hit["caption"] for hit in distinct["hits"]]
    assert seen["left_out"] == f"Show {distinct['near_duplicates']} near-duplicates"
    assert seen["shown"] == captions(searcher, "a happy cat", patch_size=finest)
    assert seen["none_left_out"]
    assert seen["alike"] == captions(searcher, "a happy cat", patch_size=finest)
    assert seen["filter_closed"] == [True, "filter"]
    wanted, less = seen["less"]["mix"]
    assert wanted == {"text": "cat"}
    assert (less["text"], less["weight"] < 0) == ("fence", True)
    assert "away from “fence”" in seen["less_hint"]
    assert (seen["quoted"]["text"], seen["quoted"]["words"]) == ('"face" smile', 0.5)
    assert seen["by_words"] == len(seen["quoted_found"]) > 0
    assert all("face" in caption for caption in seen["quoted_found"])
    assert "searched for these words" in seen["quoted_hint"]
    assert "No caption" in seen["quoted_nothing"]
    assert seen["hyphen"]["text"] == "t-shirt"
    assert "words" not in seen["hyphen"]
    assert not seen["details_at_first"]
    assert seen["details_remembered"]
    if width < 600:
        assert max(seen["top"], seen["top_with_details"]) < HEIGHT / 3
    assert seen["sizes_in_sight"]
    assert seen["words_at_48"] == captions(searcher, "a happy cat", patch_size=48)
    assert seen["beside"] == [
        captions(searcher, "a happy cat", patch_size=size) for size in (48, finest)
    ]
    assert seen["address"] == "q=a+happy+cat&alike=all&patch=48"
    assert seen["dropped"][0] == (hit.caption or hit.key)
    assert "Indexing 1,000" in seen["cost_of_words"]
    assert "read in" in seen["cost_of_picture"]
    assert sorted(seen["bars"]) == ["a cat", "rain", "the sun"]
    assert all(share.endswith("%") for share in seen["shares"])
    assert "at most 500" in seen["notice"]
    assert seen["width"] == width  # nothing sticks out


@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_looks_closer_filters_and_downloads(
    served: Served, searcher: Searcher, width: int
) -> None:
    seen = drive(served, "look", width)
    words = captions(searcher, "rain")
    assert seen["words"] == words
    assert seen["large"] == words[1:3]
    assert seen["focus"] == words[2]  # where the arrow keys led
    assert {"Path", "Style", "Drawn on", "File"} == set(seen["facts"])
    assert seen["trapped"]
    assert seen["in_a_tab"] == words[3]
    hit = searcher.search(["rain"], k=4)[0][3]
    name = hit.key.split("/")[-1] + ".png"
    assert seen["file"] == [name, hit.size]
    assert seen["like_it"][0] == words[3]
    assert seen["like_address"] == f"like={hit.id}&alike=all"
    assert seen["long"] == PAGE
    assert seen["longer"] == len(searcher)
    style = {"style": {"in": [seen["style"]]}}
    assert seen["in_style"] == captions(searcher, "rain", where=style)
    march = {"drawn_on": {">=": "2024-03-01", "<": "2024-04-01"}}
    where = {**style, **march}
    assert seen["in_march"] == captions(searcher, "rain", where=where)
    assert seen["chips"] == [f"Style: {seen['style']}", "Drawn on: 2024-03-01 to 2024-03-31"]
    assert json.loads(parse_qs(seen["where"])["where"][0]) == where
    listed = searcher.rows(searcher.snapshot.ids(where)[:PAGE].tolist())
    assert seen["browsed"] == seen["again"] == [row["caption"] for row in listed]
    assert seen["status"] == f"{len(listed)} of {len(searcher):,} images"
    assert seen["chosen"] == "2 chosen"
    assert seen["zip"] == ["drawings.zip", None, 2]
    assert seen["bar_gone"]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_finds_parts_maps_words_and_draws_a_part(
    served: Served, searcher: Searcher, width: int
) -> None:
    seen = drive(served, "parts", width)
    (hits,) = searcher.search(["rain"], k=len(searcher), regions=True)
    by_id = {hit.id: hit for hit in hits}
    similar = [by_id[id].similarity for id in seen["found"]]
    assert similar == pytest.approx([hit.similarity for hit in hits[:PAGE]], abs=1e-5)
    assert seen["address"] == "q=rain&alike=all&regions=yes"
    parts = [by_id[id] for id in seen["framed"]]
    assert all(hit.box != WHOLE for hit in parts)
    assert seen["asked"] == "Where is “rain”?"
    texts = searcher.model.encode_text(["rain"]).numpy()
    segmenter = ZeroShotSegmenter(searcher.model, ["rain"], class_embeds=texts, windows=(3, 5))
    for size in (48, 24):
        (wanted,) = segmenter.similarities(parts[0].image(), size)
        np.testing.assert_allclose(seen[f"at {size}"], wanted[..., 0], atol=1e-3)
    assert seen["plain"] == ["Off", "Coarse", "Fine"]
    assert seen["over"]
    assert f"{wanted.max():.2f} (full colour)" in seen["range"]
    assert seen["off"]
    asked = seen["by_part"]
    assert asked["box"] == [0.3, 0.25, 0.8, 0.8]
    assert (asked["id"], asked["regions"]) == (str(parts[0].id), True)
    assert "a part of your image" in seen["hint"]
    assert "part=0.3%2C0.25%2C0.8%2C0.8" in seen["part_address"]
    assert seen["again"][0] == parts[0].id
    left, top, right, bottom = seen["drawn"]
    assert (left, top) == pytest.approx((0.5, 0.5), abs=0.01)
    assert (right, bottom) == (1, 1)
    assert "box" not in seen["whole"]
    assert not seen["compared"]
    assert seen["closed"] == [True, "chip-image"]
    assert (seen["quoted"]["text"], "words" in seen["quoted"]) == ("rain", False)
    assert "quotes look for no words" in seen["quoted_hint"]


@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_that_keeps_people_out(served: Served, width: int) -> None:
    seen = drive(served, "check", width)
    for view in ("sample", "search", "choosing", "viewer", "part", "naming"):
        assert seen[view] == [], view


def test_an_index_that_grows_says_how_far_it_is(served: Served) -> None:
    seen = drive(served, "wait", 390, driver=STATES)
    assert seen["empty"] == "The first photos will be here in a moment."
    first, *others = seen["told"]
    assert first == "Indexing begins …"
    problem = "the program that indexes has ended"
    counts = [f"{done} of 1,500 photos indexed" for done in ("12", "1,500", "1,234")]
    new = "1,500 of 1,501 photos indexed"
    assert others == [*counts[:2], problem, counts[2], new]
    assert seen["bar"] == [True, True, True, False, True, True]


def test_an_open_page_takes_up_a_finer_patch_size(served: Served, searcher: Searcher) -> None:
    seen = drive(served, "wait", 1280, driver=STATES)
    assert seen["patch_size"] == min(searcher.patch_sizes)
    assert seen["address"] == "q=rain+and+wind"


def test_odd_addresses_and_columns_do_no_harm(served: Served) -> None:
    seen = drive(served, "odd", 1280, driver=STATES)
    assert seen["kept"] == ["Style: flat", "File changed: from 1970-01-02"]
    assert seen["dropped"] == []
    text, equator = seen["places"]
    assert "59.9 N" in text
    assert "0.00000, 10.50000" in equator
    assert seen["last_days"][-2:] == ["", ""]  # by UTC it would be a day too early
    assert all(seen["last_days"][:2])
    assert seen["chosen"] == "2 chosen, which is the most"


def test_a_token_opens_images_and_downloads_too(searcher: Searcher) -> None:
    with serving({"drawings": searcher}, token="sesame") as guarded:
        seen = drive(guarded, "enter", 390)
    assert seen["words"] == captions(searcher, "rain")
    assert seen["pictures"] > 5
    assert seen["held"] == [True, True]  # in memory is what is looked at, and then nothing
    hit = searcher.search(["rain"], k=2)[0][1]
    assert seen["file"] == [hit.key.split("/")[-1] + ".png", hit.size]

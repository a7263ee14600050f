"""clip-retrieval's page as published (in .venv-interop/clip-retrieval) in headless Chromium
searches our server."""

import base64
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval import build_index
from retrieval.search.hit import Hit
from retrieval.search.searcher import Searcher

pytestmark = pytest.mark.interop

INTEROP = Path(__file__).parents[1] / ".venv-interop"
PYTHON = INTEROP / "page/bin/python"
DRIVER = Path(__file__).with_name("clip_front_driver.py")
PAGE = 40  # pictures that the page asks for at a time
CAPTION = 50  # characters of one that it shows
FAR = 2**60  # ids of more than 15 digits are no numbers to the page


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def published_page() -> Iterator[str]:
    """The origin of a plain file server over the page."""
    folders = list(INTEROP.glob("clip-retrieval/lib/python3*/site-packages/front/build"))
    if not folders or not PYTHON.is_file():
        pytest.fail(f"{INTEROP} misses clip-retrieval or page; `make interop` installs them")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folders[0])) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)


@pytest.fixture(scope="module")
def far_index(emoji_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same drawings under large ids, with a column `url` that holds nothing."""
    folder = tmp_path_factory.mktemp("far")
    shutil.copytree(emoji_index.parent / "emb", folder / "emb")
    for file in folder.glob("emb/metadata/*.parquet"):
        table = pq.read_table(file)
        ids = pa.array(table["id"].to_numpy() + FAR)
        table = table.set_column(table.schema.get_field_index("id"), table.field("id"), ids)
        pq.write_table(table.append_column("url", pa.nulls(len(table), pa.string())), file)
    manifest = json.loads((folder / "emb/manifest.json").read_text())
    for partition in manifest["partitions"]:  # its files are others now
        del partition["blake2b"]["metadata"]
    (folder / "emb/manifest.json").write_text(json.dumps(manifest))
    build_index(folder / "emb", folder / "far", kind="flat", device="cpu")
    return folder / "far"


@pytest.fixture(scope="module")
def searchers(emoji_index: Path, far_index: Path, tiny_model: LitModel) -> dict[str, Searcher]:
    folders = (emoji_index, far_index)
    return {folder.name: Searcher.load(folder, tiny_model, device="cpu") for folder in folders}


@pytest.fixture(scope="module")
def site(searchers: dict[str, Searcher]) -> Iterator[tuple[str, Served]]:
    """The page's origin, and a server that lets it read answers."""
    with published_page() as origin, serving(searchers, cors=[origin]) as served:
        yield origin, served


@pytest.fixture(scope="module")
def picture(searchers: dict[str, Searcher], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("picture") / "query.png"
    searchers["drawings"].search(["rain"], k=4)[0][3].image().save(file)
    return file


@pytest.fixture(scope="module")
def seen(site: tuple[str, Served], picture: Path) -> dict[str, Any]:
    """What a visitor saw."""
    origin, served = site
    command = [PYTHON, DRIVER, f"{origin}/", f"http://127.0.0.1:{served.port}", picture]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def own(site: tuple[str, Served], searchers: dict[str, Searcher]) -> Callable[..., list[Hit]]:
    """The hits of our own endpoint."""

    def search(index: str = "drawings", image: bytes | None = None, **query: Any) -> list[Hit]:
        asked = {"index": index, "k": len(searchers[index]), **query}
        served = site[1]
        answer = (
            served.post("/v1/search", asked)
            if image is None
            else served.form("/v1/search", image=image, **asked)
        )
        ids = [hit["id"] for hit in answer.json["hits"]]
        return [Hit.of(0.0, row) for row in searchers[index].snapshot.rows(ids)]

    return search


def decoded(source: str) -> bytes:
    """The file in a data URL."""
    return base64.b64decode(source.partition(",")[2])


def assert_shown(figures: list[dict[str, Any]], hits: list[Hit]) -> None:
    """These pictures with their captions, in this order."""
    assert [figure["caption"] for figure in figures] == [hit.caption for hit in hits]
    originals = np.stack([np.asarray(hit.image(), np.float32) for hit in hits])
    for number, (figure, hit) in enumerate(zip(figures, hits, strict=True)):
        cut = hit.caption[:CAPTION] + "..." * (len(hit.caption) > CAPTION)
        assert figure["under"] == cut
        assert figure["seen"]
        with Image.open(io.BytesIO(decoded(figure["source"]))) as shown:
            pixels = np.asarray(shown.convert("RGB"), np.float32)
        differences = np.abs(pixels - originals).mean((1, 2, 3))
        assert differences[number] == differences.min() < 15  # JPEG


def test_pictures_and_captions_come_in_our_order(
    seen: dict[str, Any], own: Callable[..., list[Hit]]
) -> None:
    assert seen["indexes"] == ["drawings", "far"]
    assert_shown(seen["words"], own(text="a happy cat")[:PAGE])
    assert_shown(seen["rain"], own(text="rain")[:PAGE])
    assert_shown(seen["distinct"], own(text="a happy cat", deduplicate=True)[:PAGE])


def test_scrolling_brings_every_picture(
    seen: dict[str, Any], own: Callable[..., list[Hit]]
) -> None:
    assert len(seen["scrolled"]) > 2 * PAGE
    assert_shown(seen["scrolled"], own(text="a happy cat"))


def test_a_result_a_caption_and_a_file_are_searched_with(
    seen: dict[str, Any], own: Callable[..., list[Hit]], picture: Path
) -> None:
    third = decoded(seen["words"][2]["source"])
    assert_shown(seen["like_it"], own(image=third)[:PAGE])
    assert_shown(seen["its_caption"], own(text=seen["like_it"][1]["caption"])[:PAGE])
    assert_shown(seen["file"], own(image=picture.read_bytes())[:PAGE])


def test_settings_of_other_models_change_nothing(seen: dict[str, Any]) -> None:
    for name in ("Enable aesthetic scoring", "Search with multilingual clip", "Safe mode"):
        assert seen[name] == seen["rain"]


def test_results_are_saved(seen: dict[str, Any], own: Callable[..., list[Hit]]) -> None:
    hits = own(text="rain")
    assert [(hit["id"], hit["caption"]) for hit in seen["saved"]] == [
        (hit.id, hit.caption) for hit in hits
    ]


def test_large_ids_and_empty_urls_are_no_hindrance(
    seen: dict[str, Any], own: Callable[..., list[Hit]]
) -> None:
    hits = own("far", text="rain")
    assert min(hit.id for hit in hits) >= FAR
    assert_shown(seen["far"], hits[:PAGE])
    assert_shown(seen["far_scrolled"], hits)


def test_an_address_without_an_index_searches_the_first(
    seen: dict[str, Any], own: Callable[..., list[Hit]]
) -> None:
    assert_shown(seen["address"], own(text="rain", deduplicate=True)[:PAGE])


def test_nothing_is_refused(seen: dict[str, Any]) -> None:
    assert seen["errors"] == seen["outside"] == []
    assert [one for one in seen["asked"] if one[1] != 200] == []
    assert {one[0] for one in seen["asked"]} == {"/indices-list", "/knn-service", "/metadata"}
    bodies = [json.loads(body) for _, _, body in seen["asked"] if body]
    asked_ids = [id for body in bodies for id in body.get("ids", ())]
    assert {type(id) for id in asked_ids} == {int, str}  # large ids come as texts
    assert "" in [body["indice_name"] for body in bodies]

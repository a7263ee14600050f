"""The page in headless Chromium: type, see pictures, change the patch size, drop one, classify."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval.search.searcher import Searcher
from retrieval.server import Limits

pytestmark = pytest.mark.interop

PYTHON = Path(__file__).parents[1] / ".venv-interop/page/bin/python"
DRIVER = Path(__file__).with_name("page_driver.py")
PAGE = 24  # pictures of one page


@pytest.fixture(scope="module")
def searcher(emoji_index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(emoji_index, tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"drawings": searcher}, limits=Limits(max_text=500)) as one:
        yield one


def captions(searcher: Searcher, query: object, **sizes: int) -> list[str]:
    (hits,) = searcher.search([query], k=PAGE, **sizes)  # type: ignore[list-item, arg-type]
    return [hit.caption or hit.key for hit in hits]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_visitor_finds_compares_drops_and_names(
    served: Served, searcher: Searcher, width: int
) -> None:
    if not PYTHON.is_file():
        pytest.fail(f"{PYTHON} is missing; `make interop` installs it")
    hit = searcher.search(["rain"], k=4)[0][3]
    url = f"http://127.0.0.1:{served.port}"
    command = [PYTHON, DRIVER, url, f"/v1/images/drawings/{hit.id}?size=640", str(width)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout)
    assert seen["errors"] == seen["outside"] == []
    assert seen["sample"] > 5
    assert seen["pictures"] > 5
    finest = min(searcher.patch_sizes)
    assert seen["words"] == captions(searcher, "a happy cat", patch_size=finest)
    assert seen["words_at_48"] == captions(searcher, "a happy cat", patch_size=48)
    assert seen["beside"] == [
        captions(searcher, "a happy cat", patch_size=size) for size in (48, finest)
    ]
    assert seen["address"] == "q=a+happy+cat&patch=48"
    assert seen["chosen"] == seen["words_at_48"][1]
    assert seen["like_it"][0] == seen["chosen"]
    assert seen["dropped"][0] == (hit.caption or hit.key)
    assert "Indexing 1,000" in seen["cost_of_words"]
    assert "read in" in seen["cost_of_picture"]
    assert sorted(seen["bars"]) == ["a cat", "rain", "the sun"]
    assert all(share.endswith("%") for share in seen["shares"])
    assert "at most 500" in seen["notice"]
    assert seen["width"] == width  # nothing sticks out

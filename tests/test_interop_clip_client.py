"""`ClipClient` as published (in .venv-interop/clip-retrieval) searches our server."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_thread import Served, serving

from contrastive.model.lit import LitModel
from retrieval.search.searcher import Searcher

pytestmark = pytest.mark.interop

PYTHON = Path(__file__).parents[1] / ".venv-interop/clip-retrieval/bin/python"
# The package's __init__ imports its server; the client's module stands alone.
CLIENT = """
import importlib.util, json, pathlib, sys, sysconfig
file = pathlib.Path(sysconfig.get_path("purelib"), "clip_retrieval", "clip_client.py")
spec = importlib.util.spec_from_file_location("clip_client", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
url, query = sys.argv[1], json.loads(sys.argv[2])
client = module.ClipClient(url=url, indice_name="drawings", num_images=12, deduplicate=False)
print(json.dumps(client.query(**query)))
"""


@pytest.fixture(scope="module")
def searcher(emoji_index: Path, tiny_model: LitModel) -> Searcher:
    return Searcher.load(emoji_index, tiny_model, device="cpu")


@pytest.fixture(scope="module")
def served(searcher: Searcher) -> Iterator[Served]:
    with serving({"drawings": searcher}) as one:
        yield one


def ask(served: Served, **query: Any) -> list[dict[str, Any]]:
    if not PYTHON.is_file():
        pytest.fail(f"{PYTHON} is missing; `make interop` installs it")
    url = f"http://127.0.0.1:{served.port}/knn-service"
    command = [PYTHON, "-c", CLIENT, url, json.dumps(query)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_clip_client_finds_what_our_own_endpoint_finds(
    served: Served, searcher: Searcher, tmp_path: Path
) -> None:
    hit = searcher.search(["rain"], k=4)[0][3]
    file = tmp_path / "query.png"
    hit.image().save(file)
    vector = searcher.vectors([hit.id], min(searcher.patch_sizes))[0].tolist()
    own = {
        "text": served.post("/v1/search", {"text": "a happy cat", "k": 12}),
        "image": served.form("/v1/search", image=file.read_bytes(), k=12),
        "embedding_input": served.post("/v1/search", {"vector": vector, "k": 12}),
    }
    queries = {"text": "a happy cat", "image": str(file), "embedding_input": vector}
    for name, ours in own.items():
        theirs = ask(served, **{name: queries[name]})
        expected = ours.json["hits"]
        assert [one["id"] for one in theirs] == [one["id"] for one in expected]
        assert [one["caption"] for one in theirs] == [one["caption"] for one in expected]
        for one, other in zip(theirs, expected, strict=True):
            assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-5)
    assert theirs[0]["id"] == hit.id

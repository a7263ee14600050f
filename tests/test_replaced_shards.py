"""A shard replaced under its name: what was made of the old one says so, and shows no picture of
the new one."""

import shutil
from pathlib import Path

import pytest
from server_thread import serving
from shard_maker import png, sample, write_shards, write_tar

from contrastive.model.lit import LitModel
from data.errors import UsageError
from data.shards.location import ImageChangedError, ImageLocation, image_digest, read_images
from retrieval.embed.bulk import embed_shards
from retrieval.index.build import add_embeddings, build_index
from retrieval.search.searcher import Searcher


@pytest.fixture(scope="module")
def embedded(
    tiny_model: LitModel, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two shards of two images, their embeddings and an index; the second shard was replaced by one
    of equal size."""
    folder = tmp_path_factory.mktemp("replaced")
    shards = write_shards(folder, [2, 2])
    embed_shards(tiny_model, shards, [48], folder / "emb", num_workers=0, model_dir=model_dir)
    build_index(folder / "emb", folder / "index", index_type="flat", device="cpu")
    shutil.copytree(folder / "emb", folder / "kept")
    members = [m for i in range(2) for m in sample(f"s1_{i:03d}", 1000 + i)]
    write_tar(Path(shards[1]), [(name, data[::-1]) for name, data in members])
    return folder


def test_a_hit_shows_its_own_image_or_says_that_it_has_changed(
    embedded: Path, tiny_model: LitModel
) -> None:
    searcher = Searcher.load(embedded / "index", tiny_model, device="cpu")
    (hits,) = searcher.search(["a cat"], k=4)
    images = {hit.key: hit for hit in hits}
    assert images["s0_000"].image_bytes() == png(0)
    with pytest.raises(ImageChangedError, match=r"0001\.tar has changed: it holds another image"):
        images["s1_000"].image_bytes()
    read = list(read_images([images["s1_000"].location, images["s0_001"].location]))
    assert read == [None, png(1)]
    refined = searcher.search(["a cat"], k=4, refine_patch_size=40)[0]  # as where it is gone
    assert [hit.key[:2] for hit in refined] == ["s0", "s0", "s1", "s1"]


def test_a_served_image_is_refused_once_its_shard_has_changed(
    embedded: Path, tiny_model: LitModel
) -> None:
    searcher = Searcher.load(embedded / "index", tiny_model, device="cpu")
    good, changed = (next(i for i in searcher.snapshot.ids() if i >> 32 == n) for n in (0, 1))
    with serving({"one": searcher}) as served:
        assert served.get(f"/v1/images/one/{good}").status == 200
        answer = served.get(f"/v1/images/one/{changed}")
    assert answer.status == 404
    assert "has changed since it was indexed" in answer.body.decode()


def test_embeddings_older_than_their_shard_are_not_indexed(embedded: Path) -> None:
    words = r"0001\.tar was replaced since it was embedded in .*kept; embed it again"
    with pytest.raises(UsageError, match=words):
        build_index(embedded / "kept", embedded / "x", device="cpu")
    with pytest.raises(UsageError, match=words):
        add_embeddings(embedded / "index", embedded / "kept")


def test_without_a_digest_only_a_shorter_file_is_noticed(tmp_path: Path) -> None:
    """Indexes of version 0.1 have none."""
    file = tmp_path / "a.png"
    file.write_bytes(png(1))
    place = ImageLocation(str(file), 0, len(png(1)))
    file.write_bytes(png(2)[:-1])
    assert list(read_images([place, place._replace(digest=image_digest(png(1)))])) == [None, None]
    file.write_bytes(png(2))
    assert list(read_images([place, place._replace(digest=image_digest(png(1)))])) == [png(2), None]

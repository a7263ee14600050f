"""Fixtures: small real shards, a tiny text encoder and a tiny model, all without a network."""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from contrastive import LitModel

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARITY = Path(__file__).parent / "parity"
TINY_TOWER = f"bigvision:{PARITY / 'bigvision_flexi_tok_p32_g7.npz'}"
"""A real FlexiViT of width 32 and depth 2, 240 px: quick at any patch size."""


@pytest.fixture(scope="session")
def emoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default data, a tenth of its concepts or fewer."""
    from data.emoji.build import build_emoji

    return build_emoji(tmp_path_factory.mktemp("data") / "emoji", size=96, limit=40)


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of 64 px of each split, of 20 classes."""
    from data.scenes.build import build_scenes

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    return build_scenes(folder, count=3, size=64, num_classes=20, progress=False)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformers folder with a two-layer BERT of width 32 and a real WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-text")
    words = ["a red bicycle", "a happy cat", "two dogs", "an emoji of the sun", "smile"]
    trainer = BertWordPieceTokenizer()
    trainer.train_from_iterator(words, vocab_size=200, min_frequency=1, show_progress=False)
    trainer.save_model(str(folder))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=200, intermediate_size=64, max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="session")
def tiny_model(tiny_text: str) -> "LitModel":
    """An untrained `LitModel` at 240 px with patch sizes 48 to 8."""
    from contrastive import LitModel, load_vision_tower
    from contrastive.model.config import LossConfig
    from contrastive.model.text_side import TextSide
    from contrastive.text.config import TextConfig
    from contrastive.text.encoder import TextEncoder
    from contrastive.text.load import load_text_tower

    torch.manual_seed(0)
    tower = load_vision_tower(TINY_TOWER)
    encoder = TextEncoder(load_text_tower(TextConfig(tower=tiny_text)), tower.embed_dim)
    return LitModel(tower, TextSide(encoder, LossConfig())).eval()


@pytest.fixture(scope="session")
def model_dir(tiny_model: "LitModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` as a folder, which no test changes."""
    folder = tmp_path_factory.mktemp("tiny-model") / "model"
    tiny_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def emoji_index(
    tiny_model: "LitModel",
    model_dir: Path,
    emoji_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An index of some drawings at patch sizes 48 and 40, built from shards."""
    from retrieval import build_index, embed_shards

    folder = tmp_path_factory.mktemp("emoji-index")
    shards = sorted(str(file) for file in emoji_shards.glob("*/*.tar"))
    sizes = tiny_model.patch_sizes[:2]
    embed_shards(tiny_model, shards, sizes, folder / "emb", num_workers=0, model_dir=model_dir)
    build_index(folder / "emb", folder / "drawings", kind="flat", device="cpu")
    return folder / "drawings"


def pytest_configure(config: pytest.Config) -> None:
    """Tests say what a CPU computes, and how ranks share it; those marked `gpu` are asked for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: DeepSpeed collects garbage for every training, and would go
    through all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Else libraries complain at the end of what was not freed."""
    gc.unfreeze()

"""Data made on the spot: JPEG tars, captions of a given length, BERTs with random weights."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from contrastive import VisionTower
from contrastive.vision.build import build_vision_tower
from contrastive.vision.tower_config import TowerConfig
from data.shards.tar import add_member
from lib.gpu.scale import DEVICE, DTYPE, Scale, TextShape

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
DISTINCT = 256  # images; tars repeat their bytes
# Tokens with [CLS] and [SEP]: mean, spread of the logarithm, most. CC12M's captions have 22 word
# pieces on average, from 4 to 64 and more.
LENGTHS = {22: (0.55, 64), 16: (0.4, 32), 7: (0.35, 16)}


def image_tower(scale: Scale) -> VisionTower:
    """Locked, with random weights, which change no time."""
    torch.manual_seed(0)
    config = TowerConfig(scale.vision, dict(scale.vision_args), image_size=scale.image_size)
    return build_vision_tower(config).to(DEVICE, DTYPE).lock()


def text_folder(shape: TextShape, vocabulary: int, folder: Path) -> str:
    """A transformers folder: a BERT without dropout, and word pieces that are words."""
    if not folder.is_dir():
        whole, folder = folder, folder.with_name(folder.name + ".part")
        folder.mkdir(parents=True, exist_ok=True)
        words = [f"w{number}" for number in range(vocabulary - len(SPECIAL))]
        (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *words)) + "\n")
        tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        tokenizer |= {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        tokenizer |= {"sep_token": "[SEP]", "mask_token": "[MASK]", "model_max_length": 512}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        transformers.BertModel(config).save_pretrained(folder)
        folder = folder.rename(whole)
    return str(folder.resolve())


def captions(count: int, mean_tokens: int, vocabulary: int, seed: int = 0) -> list[str]:
    """Captions of random words; a word is one token, and two are special."""
    spread, most = LENGTHS[mean_tokens]
    draw = np.random.default_rng(seed)
    middle = np.log(mean_tokens - 2) - spread**2 / 2
    lengths = np.exp(draw.normal(middle, spread, count)).round().clip(2, most - 2).astype(int)
    words = draw.integers(0, vocabulary - len(SPECIAL), lengths.sum())
    parts = np.split(words, lengths.cumsum()[:-1])
    return [" ".join(f"w{word}" for word in part) for part in parts]


def context(mean_tokens: int) -> int:
    """The longest caption in tokens."""
    return LENGTHS[mean_tokens][1]


def tars(folder: Path, scale: Scale, mean_tokens: int) -> tuple[str, ...]:
    """Shards of 340x256 JPEGs and captions, made where they are missing."""
    done = folder / "done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = jpegs(min(DISTINCT, scale.samples))
        texts = captions(scale.samples, mean_tokens, scale.vocabulary)
        for number in range(scale.tars):
            rows = range(number, scale.samples, scale.tars)
            _write_tar(folder / f"{number:04d}.tar", rows, images, texts)
        done.touch()
    return (f"{folder}/*.tar",)


def jpegs(count: int) -> list[bytes]:
    """Smooth noise, which compresses about as photos do."""
    draw, found = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(draw.integers(0, 256, (32, 43, 3), np.uint8))
        image, file = small.resize((340, 256), Image.Resampling.BICUBIC), io.BytesIO()
        image.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def _write_tar(file: Path, rows: range, images: Sequence[bytes], texts: Sequence[str]) -> None:
    with tarfile.open(file, "w") as tar:
        for row in rows:
            add_member(tar, f"{row:08d}.jpg", images[row % len(images)])
            add_member(tar, f"{row:08d}.txt", texts[row].encode())

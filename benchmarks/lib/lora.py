"""LoRA (arXiv:2106.09685) of a text tower by `peft`, measured here alone: no part of the project.

pip install --no-deps peft accelerate
"""

from pathlib import Path

from safetensors.torch import load_file, save_file

import contrastive.train.loop
from contrastive.text.config import TextConfig
from contrastive.text.load import load_text_tower
from contrastive.text.tower import TextTower
from contrastive.train.config import TrainConfig


def train_lora(cfg: TrainConfig, rank: int) -> Path:
    """As `train`, but of the text tower only matrices of this rank beside its linear layers train.
    The model that is saved has them added."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value", "dense"])

    def load(text: TextConfig) -> TextTower:
        tower = load_text_tower(text)
        inject_adapter_in_model(lora, tower.net)  # which freezes all else
        return tower

    contrastive.train.loop.load_text_tower = load  # type: ignore[attr-defined]
    try:
        folder = contrastive.train.loop.train(cfg)
    finally:
        contrastive.train.loop.load_text_tower = load_text_tower  # type: ignore[attr-defined]
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if ".base_layer." in name]:
        own = weights.pop(name)
        place, _, kind = name.rpartition(".base_layer.")
        if kind == "weight":
            down = weights.pop(f"{place}.lora_A.default.weight")
            up = weights.pop(f"{place}.lora_B.default.weight")
            own = own + lora.lora_alpha / rank * up @ down
        weights[f"{place}.{kind}"] = own
    save_file(weights, file)
    return folder

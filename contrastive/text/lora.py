"""LoRA (Hu et al., arXiv:2106.09685): a tower's weights W stay, and beside each linear layer's two
narrow matrices A and B train, so that the layer is W + B A.

By the package peft. B starts at 0, so that the tower starts as it is.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from contrastive.text.tower import TextTower
from data.errors import UsageError

ADAPTER = "default"  # peft's name for the one that there is


def check_peft() -> None:
    """Raise `UsageError` where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "text.lora needs the package peft, which is not installed; run: "
            "pip install 'flexilit[lora]'"
        )


def add_lora(tower: TextTower, rank: int) -> None:
    """Freeze the tower and put matrices of this rank beside all its linear layers, in place.

    Raises `UsageError` for a tower that has none, or whose attention is torch's own module: there
    peft puts new parameters in place of the frozen ones at every forward, rounded (0.21).
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    if any(isinstance(module, nn.MultiheadAttention) for module in tower.modules()):
        raise UsageError(
            "text.lora cannot train a text transformer of open_clip's own, where peft would not "
            "keep the frozen weights; allowed: a tower of transformers, such as hf:FOLDER of a CLIP"
        )
    found = False
    for part in tower.children():  # the library's network, and what open_clip has after it
        linear = [name for name, module in part.named_modules() if isinstance(module, nn.Linear)]
        if linear:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=linear)
            inject_adapter_in_model(config, part, ADAPTER)
            found = True
    if not found:
        raise UsageError(
            f"text.lora finds no linear layer in {type(tower.net).__name__}; leave it out"
        )


@contextmanager
def merged(tower: TextTower) -> Iterator[None]:
    """Within this context the tower is an ordinary one of the same function, W + B A in place of
    each layer; what trains is untouched. Without LoRA nothing changes.

    Parameters must be whole (`whole_parameters`). Takes the memory of the layers' weights again.
    """
    layers = {name: m for name, m in tower.named_modules() if hasattr(m, "get_delta_weight")}
    for name, layer in layers.items():
        plain = copy.copy(layer.get_base_layer())
        weight = plain.weight + layer.get_delta_weight(ADAPTER)
        plain._parameters = {**plain._parameters, "weight": nn.Parameter(weight.detach())}
        tower.set_submodule(name, plain)
    try:
        yield
    finally:
        for name, layer in layers.items():
            tower.set_submodule(name, layer)

"""Attention within each picture of a sequence that holds many, without a mask of n x n."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.varlen import KERNEL_DTYPES, attend_within, has_kernel


class WithinPictures:
    """Given as `attn_mask` to a block whose attention is torch's: each token attends to the tokens
    of its own picture.

    torch hands it the call of `scaled_dot_product_attention` (`__torch_function__`), so that
    projections, norms and rotary positions stay the network's own. On GPUs in half precision
    torch's kernel for sequences of several lengths computes it, elsewhere one call for each length.
    """

    def __init__(self, runs: Sequence[tuple[int, int]], device: torch.device) -> None:
        """runs: (pictures, tokens of each), in the order of the sequence."""
        self.runs = list(runs)
        self.longest = max(length for _, length in self.runs)
        lengths = [length for count, length in self.runs for _ in range(count)]
        self.bounds: Tensor | None = None
        if has_kernel(device):
            bounds = torch.tensor([0, *lengths]).cumsum(0).int()
            bounds = bounds.pin_memory() if device.type == "cuda" else bounds
            self.bounds = bounds.to(device, non_blocking=True)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        within = options.pop("attn_mask", None)
        if func is not F.scaled_dot_product_attention or not isinstance(within, cls):
            return NotImplemented
        query, key, value = args
        return within.attend(query, key, value, options.get("scale"))

    def attend(
        self,
        query: Float[Tensor, "1 h n w"],
        key: Float[Tensor, "1 h n w"],
        value: Float[Tensor, "1 h n w"],
        scale: float | None = None,
    ) -> Float[Tensor, "1 h n w"]:
        """What a block-diagonal mask gives."""
        fits = value.dtype in KERNEL_DTYPES and value.shape[-1] % 8 == 0
        if self.bounds is None or not fits:
            return self._attend_by_length(query, key, value, scale)
        # a norm of queries and keys under autocast leaves them in float32
        q, k, v = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
        return attend_within(q, k, v, self.bounds, self.longest, scale).transpose(0, 1)[None]

    def _attend_by_length(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None
    ) -> Float[Tensor, "1 h n w"]:
        sizes = [count * length for count, length in self.runs]
        parts = (part[0].split(sizes, dim=1) for part in (query, key, value))
        found = []
        for run, *of_run in zip(self.runs, *parts, strict=True):
            q, k, v = (part.unflatten(1, run).transpose(0, 1) for part in of_run)
            attended = F.scaled_dot_product_attention(q, k, v, scale=scale)
            found.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(found).transpose(0, 1)[None]


def can_pack(blocks: nn.Module) -> bool:
    """Whether `WithinPictures` can be given to these blocks: each takes an `attn_mask`, all their
    attention is torch's, and none is compiled."""
    if not all(_takes_mask(type(block).forward) for block in blocks.children()):
        return False
    fused = []
    for part in blocks.modules():
        own = vars(part)
        if own.get("_compiled_call_impl") is not None:
            return False
        if "fused_attn" in own:
            fused.append(own["fused_attn"])
    return bool(fused) and all(fused)


@lru_cache
def _takes_mask(forward: Callable[..., Any]) -> bool:
    return "attn_mask" in inspect.signature(forward).parameters

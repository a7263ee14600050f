"""Attention within each of several sequences that lie one after another, by torch's kernel."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16)

# cuDNN's attention, which torch prefers where it is, plans anew for every number of tokens. It is
# turned off here, for good: torch's switches are the process's, so what one thread turned off for a
# while would be off, or stay off, for another, and results would depend on what ran before.
torch.backends.cuda.enable_cudnn_sdp(False)


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs there: in builds of torch that have it, and unless somebody has
    turned it off."""
    flash = torch.backends.cuda
    return (
        device.type == "cuda"
        and flash.is_flash_attention_available()
        and flash.flash_sdp_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_within(
    query: Float[Tensor, "n h w"],
    key: Float[Tensor, "n h w"],
    value: Float[Tensor, "n h w"],
    bounds: Int[Tensor, " bounds"],
    longest: int,
    scale: float | None = None,
) -> Float[Tensor, "n h w"]:
    """Attention of each token to the tokens of its own sequence, on a device that `has_kernel`.

    query, key, value: of `KERNEL_DTYPES`, their width w a multiple of 8. bounds: int32, where each
    sequence begins and the last one ends. longest: tokens of the longest.
    """
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale)
    assert isinstance(found, Tensor)
    return found

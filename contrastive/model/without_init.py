"""Building networks whose weights are read from a file afterwards, without drawing random ones.

Drawing takes longer than reading them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

SKIPPED = frozenset(
    {
        "uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_",
        "xavier_uniform_", "xavier_normal_",
        "erfinv_", "mul_", "add_", "clamp_",  # with which timm makes a truncated normal
    }
)  # fmt: skip


class WithoutInit(TorchFunctionMode):
    """A context in which parameters are left as the memory was; buffers get their values. Every
    parameter must be loaded."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in SKIPPED:
            return target
        return func(*args, **kwargs)

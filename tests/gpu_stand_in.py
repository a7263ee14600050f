"""A stand-in for a GPU that finds mixed devices and types. No GPU: kernels, streams and memory are
not tried.

A `Gpu` holds real values in the CPU's memory and says that it is on `cuda:0`. Within
`gpu_stand_in()` what is sent or made there is one, and what raises on a GPU raises: operators
between it and a CPU tensor (unless that has no axes, or only indexes), `.numpy()`, pinning it, and
products of integers. Autocast to "cuda" gives the types that it gives there, torch's attention for
packed sequences is computed in parts. What C++ makes on the device of a tensor follows that tensor.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch._dynamo  # before anything is replaced that it looks at
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from contrastive.text import packing
from retrieval.index.gpu_check import find_gpus

aten = torch.ops.aten
THERE = torch.device("cuda", 0)
COPIES = {aten._to_copy, aten.copy_, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.dot}
HALF = (torch.bfloat16, torch.float16)
FLOAT32 = """exp expm1 log log1p pow.Tensor_Scalar pow.Tensor_Tensor rsqrt reciprocal softplus
layer_norm group_norm rms_norm cosine_similarity logsumexp cdist nll_loss softmax.int
log_softmax.int binary_cross_entropy_with_logits cumsum sum sum.dim_IntList upsample_bilinear2d
linalg_vector_norm"""
"""What autocast computes in float32 on a GPU alone (AT_FORALL_FP32 of ATen/autocast_mode.h)."""


class Gpu(Tensor):
    """To C++ it is on the CPU, as autograd would want a driver."""

    held: Tensor
    device = property(lambda self: THERE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Gpu":
        made = Tensor._make_subclass(cls, inner.detach())
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return call(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        args = _as_of(args)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if (device or THERE).type == "cpu":
            here: Any = _ToCpu.apply(self)
            return here.to(dtype or self.dtype)
        if copy or dtype not in (None, self.dtype):
            return aten._to_copy(self, dtype=dtype, memory_format=layout)
        return self

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, "device": THERE, **kwargs})

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Gpu({self.held})"

    def record_stream(self, stream: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        kept = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = copied = torch.nn.Parameter(copied) if kept else copied
        return copied.requires_grad_(self.requires_grad)


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Gpu) -> Tensor:
        return there.held.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gpu:  # type: ignore[override]
        return Gpu(grad.clone())


class _Everything(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU where a GPU would run it."""
    packet = func.overloadpacket
    given = (args[0], *args[2:]) if packet in INDEXED and isinstance(args[0], Gpu) else args
    tensors = [t for t in tree_leaves((given, kwargs)) if isinstance(t, Tensor)]
    back = {id(t.held): t for t in tree_leaves((args, kwargs)) if isinstance(t, Gpu)}
    if back and packet not in COPIES and any(t.dim() and not isinstance(t, Gpu) for t in tensors):
        found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}, {found}")
    if back and packet in PRODUCTS and not tensors[0].is_floating_point():
        raise NotImplementedError(f"{func} not implemented for integers on a GPU")
    device, there = kwargs.get("device"), bool(back)
    if packet is aten.copy_:
        there = isinstance(args[0], Gpu)
    elif device is not None and not back:
        there = torch.device(device).type == "cuda"
    args, kwargs = tree_map_only(Gpu, lambda t: t.held, (args, dict(kwargs)))
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if func is aten.mm.dtype:  # with sums in another precision, which a CPU does not have
        out = (args[0].double() @ args[1].double()).to(args[2])
    else:
        out = func(*args, **kwargs)
    wrapped = Gpu if there else (lambda t: t)
    return tree_map_only(Tensor, lambda t: back[id(t)] if id(t) in back else wrapped(t), out)


def _as_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `Tensor.to` where the first is a tensor."""
    other = args[0] if args and isinstance(args[0], Tensor) else None
    return args if other is None else (other.device, other.dtype, *args[1:])


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, Gpu):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors")
    return tensor.clone()


_one_hot, _share, _run = F.one_hot, torch._has_compatible_shallow_copy_type, threading.Thread.run
_to, _enter, _exit = Tensor.to, torch.autocast.__enter__, torch.autocast.__exit__


def _share_type(input: Tensor, from_: Tensor) -> bool:
    """Whether `Module.to` may change a parameter in place: not to, from or on the stand-in."""
    return input is from_ or (not {type(input), type(from_)} & {Gpu} and _share(input, from_))


def _enter_both(self: Any) -> Any:
    """Autocast to CUDA, which casts nothing here, and to the CPU in its place."""
    if self.device == "cuda":
        self.twin = torch.autocast("cpu", self.fast_dtype, enabled=self._enabled)
        _enter(self.twin)
    return _enter(self)


def _exit_both(self: Any, *error: Any) -> Any:
    if self.device == "cuda":
        _exit(self.twin, *error)
    return _exit(self, *error)


def _in_float32(name: str) -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        def wide(t: Tensor) -> Tensor:
            return t.float() if isinstance(t, Gpu) and t.dtype in HALF else t

        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map_only(Tensor, wide, (args, kwargs))
            packet, _, overload = name.partition(".")
            return getattr(getattr(aten, packet), overload or "default")(*args, **kwargs)

    return run


class _Event(torch.cuda.Event):
    def synchronize(self) -> None:
        pass


class _Stream:
    def record_event(self) -> _Event:
        return _Event()

    def wait_event(self, event: _Event) -> None:
        pass


def _run_thread(thread: threading.Thread) -> None:
    """Modes, and how `torch.tensor` makes tensors, are a thread's own."""
    torch._C._set_only_lift_cpu_tensors(True)
    with _Everything():
        _run(thread)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, **more: Any) -> Tensor:
    assert all(t.is_cuda and t.dtype in HALF for t in (q, k, v))
    assert bounds.is_cuda
    assert bounds.dtype == torch.int32
    parts = []
    for a, b in pairwise(bounds.tolist()):
        query, key, value = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        found = F.scaled_dot_product_attention(query, key, value, scale=more["scale"])
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


@contextmanager
def gpu_stand_in(capability: tuple[int, int] = (8, 0)) -> Iterator[torch.device]:
    """Within, torch says that there is one GPU of this compute capability."""
    torch._C._ensureCUDADeviceGuardSet()
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
        "get_device_capability": capability, "is_bf16_supported": True, "set_device": None,
        "get_device_name": "stand-in", "mem_get_info": (2**33, 2**34), "empty_cache": None,
        "memory_allocated": 0, "max_memory_allocated": 2**20, "reset_peak_memory_stats": None,
        "synchronize": None, "Stream": _Stream(), "current_stream": _Stream(),
        "stream": nullcontext(),
    }  # fmt: skip
    lift, library = torch._C._only_lift_cpu_tensors(), torch.library.Library("aten", "IMPL")
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, MagicMock(return_value=answer)))
        for owner, name, new in (
            (torch, "_has_compatible_shallow_copy_type", _share_type),
            (torch.autocast, "__enter__", _enter_both),
            (torch.autocast, "__exit__", _exit_both),
            (torch.nn.attention.varlen, "varlen_attn", _varlen),
            (packing, "compiled_blocks", lambda _: None),  # kernels are the CPU's
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (Tensor, "to", lambda t, *args, **kwargs: _to(t, *_as_of(args), **kwargs)),
            (Tensor, "pin_memory", _pinned),
            (threading.Thread, "run", _run_thread),
            (F, "one_hot", lambda t, n: _one_hot(t.cpu(), n).to(t.device)),
        ):
            stack.enter_context(patch.object(owner, name, new))
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
        stack.callback(library._destroy)
        for name in FLOAT32.split():
            library.impl(name, _in_float32(name), "AutocastCPU")
        find_gpus.cache_clear()
        stack.callback(find_gpus.cache_clear)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Everything())
        yield THERE

"""Counts the bytes of collectives where torch hands them to the backend.

Every collective, from Python or from DDP's C++ reducer, passes torch's dispatcher as an operation
of the namespace `c10d`. An operation that the table below does not list raises an error, so none
goes uncounted.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Collective:
    """One call by one rank."""

    op: str
    payload_bytes: int  # of the tensors that the rank hands in
    sent_bytes: int  # that leave the rank, by the algorithms that send the least
    gloo_bytes: int  # that leave it with gloo, which reduces and scatters by an all-reduce
    floating: bool
    numel: int
    places: tuple[tuple[str, str], ...]  # file and function of the calling frames, innermost first
    in_backward: bool


@dataclass(frozen=True)
class _Rule:
    """Which argument a rank hands in, and its share that leaves the rank."""

    argument: int
    sent: Callable[[int], float]  # of the number of ranks
    gloo: Callable[[int], float] | None = None  # where it is another share
    root: int | None = None  # the argument that names the one rank which hands in


def _others(ranks: int) -> float:
    return ranks - 1


def _part(ranks: int) -> float:
    return (ranks - 1) / ranks


def _twice(ranks: int) -> float:
    return 2 * _part(ranks)


_RULES = {
    "allreduce_": _Rule(0, _twice),
    "allgather_": _Rule(1, _others),
    "_allgather_base_": _Rule(1, _others),
    "allgather_into_tensor_coalesced_": _Rule(1, _others),
    "reduce_scatter_": _Rule(1, _part, gloo=_twice),
    "_reduce_scatter_base_": _Rule(1, _part, gloo=_twice),
    "reduce_scatter_tensor_coalesced_": _Rule(1, _part, gloo=_twice),
    "alltoall_": _Rule(1, _part),
    "alltoall_base_": _Rule(1, _part),
    "broadcast_": _Rule(0, _others, root=2),
    "scatter_": _Rule(1, _part, root=3),
    "reduce_": _Rule(0, _part),  # mean over the ranks: all but the root send
    "send": _Rule(0, lambda ranks: 1.0),
}
_SILENT = {"recv_", "barrier", "check_for_nan"}


class CountCollectives(TorchDispatchMode):
    """`with CountCollectives() as counted:` collects this rank's calls in `counted.calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple) -> None:
        op = func._schema.name.partition("::")[2]
        if op in _SILENT:
            return
        if op not in _RULES:
            raise NotImplementedError(f"collective {func} is not counted yet")
        rule = _RULES[op]
        if rule.root is not None and args[rule.root] != dist.get_rank():
            return
        tensors = list(_tensors(args[rule.argument]))
        payload = sum(t.numel() * t.element_size() for t in tensors)
        ranks = dist.get_world_size()
        self.calls.append(
            Collective(
                op,
                payload,
                round(payload * rule.sent(ranks)),
                round(payload * (rule.gloo or rule.sent)(ranks)),
                all(t.is_floating_point() for t in tensors),
                sum(t.numel() for t in tensors),
                tuple(_places()),
                torch._C._current_graph_task_id() != -1,
            )
        )


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for item in argument:
            yield from _tensors(item)


def _places() -> Iterator[tuple[str, str]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name
        frame = frame.f_back


def loopback_bytes() -> int | None:
    """All that was ever sent over the loopback interface; None where the kernel does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    counts = [line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:")]
    return int(counts[0][8]) if counts else None

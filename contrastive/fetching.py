"""What a GPU computes, fetched while it works on what comes next."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def start_fetch(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Start copying tensors to the processor's memory; call the result to wait for them, and for
    nothing that the GPU is asked for from now on. Those of a CPU are there already."""
    if not any(tensor.is_cuda for tensor in tensors):
        return lambda: tensors
    # page-locked, or the copy would wait; and torch keeps such memory for the next ones
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[Tensor]:
        done.synchronize()
        return [copy.clone() for copy in copies]

    return wait


def one_ahead(started: Iterable[tuple[T, Callable[[], R]]]) -> Iterator[tuple[T, R]]:
    """Each item with its result, awaited once the next item is started.

    started: makes an item when asked for one, and starts the work on it. What that raises is raised
    here, after the result before it.
    """
    items = iter(started)
    waiting: tuple[T, Callable[[], R]] | None = None
    more, error = True, None
    while more:
        before = waiting
        try:
            waiting = next(items, None)
        except Exception as problem:
            waiting, error = None, problem
        if before is not None:
            yield before[0], before[1]()
        if error is not None:
            raise error
        more = waiting is not None

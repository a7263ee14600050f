"""The only module that talks to `torch.distributed`. Everything works on one process without it."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from contrastive.launch_context import end_with_launcher, take_arguments
from data.errors import DataError, UsageError

T = TypeVar("T")

# How long ranks wait for one that hangs: above any step, save or compilation. DeepSpeed's variable.
TIMEOUT = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
PATIENCE = timedelta(days=7)  # at the end of work of which some ranks have more than others
ROLL_CALL = timedelta(seconds=20)

_patient_group: Any = None


@contextmanager
def launched() -> Iterator[None]:
    """Within this context this process is one of the ranks that the launcher started.

    Raises `DataError` where another rank hangs or is gone. (On GPUs NCCL's own watchdog ends a
    process that waits for a hanging one, in its own words.)
    """
    try:
        init_from_launcher()
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise DataError(_silence(str(error))) from error
    shutdown()


def init_from_launcher() -> None:
    """Join the ranks that the `deepspeed` launcher started; nothing to do without a launcher."""
    take_arguments()
    if "RANK" not in os.environ or dist.is_initialized():
        return
    end_with_launcher()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cores = len(os.sched_getaffinity(0))  # ranks of one machine share its cores
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_SIZE", "1"))))
    import deepspeed

    _spare_kernel()
    try:
        deepspeed.init_distributed(dist_backend=_backend(), timeout=TIMEOUT)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT", "29500")
        raise UsageError(
            f"port {port} is taken, maybe by another training on this machine; give this one its "
            f"own: deepspeed --master_port {int(port) + 1} ..."
        ) from error
    if world_size() > 1:
        global _patient_group
        _patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)


def _silence(error: str) -> str:
    """One sentence for what a collective met: which ranks do not answer, and what to do."""
    if "imed out" not in error:
        return "another rank is gone, whose own message says why; what was saved is kept"
    silent = "another rank"
    if _patient_group is not None:
        try:
            dist.monitored_barrier(_patient_group, ROLL_CALL, wait_all_ranks=True)
        except RuntimeError as names:
            if found := re.search(r"Ranks? ([\d, ]+) failed to pass", str(names)):
                silent = f"rank {found[1]}"
    return (
        f"{silent} did not answer for {TIMEOUT.total_seconds() / 60:g} minutes (DEEPSPEED_TIMEOUT "
        "sets how many); it hangs or its machine is gone; what was saved is kept"
    )


def ensure_group() -> None:
    """Make the process group that DeepSpeed wants even for one rank, unless a launcher did."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        _spare_kernel()
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def _spare_kernel() -> None:
    """Keep DeepSpeed from compiling a CPU kernel that nothing here uses: it takes a minute, and a
    process killed meanwhile leaves a lock on which later ones wait."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def shutdown() -> None:
    """Leave the launcher's process group. That of a single process stays, as DeepSpeed knows one
    group per process."""
    if dist.is_initialized() and "RANK" in os.environ:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's device."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def synchronize() -> None:
    """Wait for all that this rank's GPU was asked for, on every stream."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On a device, by a copy for which the processor does not wait."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16`, or for `fastest` bfloat16 where the hardware supports it."""
    if name != "fastest":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def barrier(patient: bool = False) -> None:
    """Wait for all ranks. patient: after work that takes some of them much longer than others."""
    if patient and _patient_group is not None:
        dist.barrier(_patient_group)
    elif world_size() > 1:
        dist.barrier()


@torch.no_grad()
def start_all_gather(tensor: Shaped[Tensor, "b ..."]) -> Callable[[], Shaped[Tensor, "B ..."]]:
    """Start an `all_gather` in the background; call the result to wait for it."""
    if world_size() == 1:
        return lambda: tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    work = dist.all_gather(parts, tensor.contiguous(), async_op=True)

    def wait() -> Tensor:
        work.wait()
        return torch.cat(parts)

    return wait


def all_gather(tensor: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
    """Concatenate equal-sized tensors of all ranks along the first axis, without gradient."""
    return start_all_gather(tensor)()


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks; the argument is unchanged."""
    if world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


class LaggingMax:
    """The largest of all ranks' numbers, as they were a call ago, so that nobody waits.

    It crosses by a group of CPUs of its own, beside what the GPUs exchange.
    """

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size() > 1 else None
        self._group: Any = group
        self._under_way: tuple[Any, Tensor] | None = None

    def __call__(self, own: int) -> int:
        """0 at the first call of several ranks. After another value it is not to be called."""
        if self._group is None:
            return own
        if found := self.finish():
            return found
        value = torch.tensor([own])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True)
        self._under_way = (work, value)
        return 0

    def finish(self) -> int:
        """The value of the last call; 0 where there was none."""
        if self._under_way is None:
            return 0
        work, value = self._under_way
        self._under_way = None
        work.wait()
        return int(value)


def from_main(find: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; a `UsageError` that it meets is raised on all of them."""
    found: list = [None, None]
    if is_main():
        try:
            found[0] = find()
        except UsageError as error:
            found[1] = str(error)
    value, problem = gather_objects(found)[0]
    if problem is not None:
        raise UsageError(problem)
    return cast("T", value)


def gather_objects(value: object) -> list:
    """Small Python objects of all ranks, in rank order. Pickled, which is safe within a run."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_lists(own: list) -> list:
    """The lists of all ranks, joined in their order."""
    return [item for items in gather_objects(own) for item in items]


def own_share(items: Sequence) -> list:
    """This rank's part: every `world_size`-th."""
    return list(items[rank() :: world_size()])

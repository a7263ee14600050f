"""What a run says: a progress bar, metrics.jsonl and TensorBoard, all from rank 0."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from contrastive import distributed
from data.errors import DataError
from data.files import write_text_atomically
from data.progress import Progress

DIVERGED = "start again with a lower optim.lr, or more optim.warmup_steps"


class RunLog:
    """Collects figures of every step on all ranks; rank 0 writes a line every `log_every` steps."""

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        log_every: int,
        skipped: dict[str, int],
        unit: str = "pairs",
    ) -> None:
        """`first_step`: where the run goes on; later lines of an earlier try are cut off."""
        self.steps, self.log_every, self.unit = steps, log_every, unit
        self.main = distributed.is_main()
        self._skipped = dict(skipped)  # in the shards' headers; the same on all ranks
        self._met: dict[str, int] = {}  # this rank's bad samples since the last line
        self._loss = torch.zeros((), device=distributed.device())
        self._pairs = self._steps_since = 0
        self._since = time.perf_counter()
        if not self.main:
            return
        self._file = folder / "metrics.jsonl"
        self._cut(first_step)
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = Progress(
            total=steps, initial=first_step, unit="step", desc="train", mininterval=1,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        if skipped:
            Progress.write(f"skipped in the shards: {_counts(skipped)}")

    def step(self, step: int, loss_share: torch.Tensor, pairs: int, errors: dict[str, int]) -> bool:
        """Count one finished step; True when a line is due (then call `line`)."""
        self._loss = self._loss + loss_share  # read only when a line is due
        self._pairs += pairs
        self._steps_since += 1
        for kind, count in errors.items():
            self._met[kind] = self._met.get(kind, 0) + count
        if self.main:
            self._bar.update()
        return step % self.log_every == 0 or step == self.steps

    def line(self, step: int, **figures: float | int) -> None:
        """Write the means since the last line. All ranks call it. Raises `DataError` on all of them
        where the loss is not finite."""
        seconds = time.perf_counter() - self._since
        own_pairs = torch.full_like(self._loss, self._pairs, dtype=torch.float64)
        sums = torch.stack([self._loss.double(), own_pairs])
        loss, pairs = distributed.all_reduce_sum(sums).tolist()
        loss /= self._steps_since
        if not math.isfinite(loss):
            raise DataError(f"step {step}: the loss is {loss}; {DIVERGED}")
        for met in distributed.gather_objects(self._met):
            for kind, count in met.items():
                self._skipped[kind] = self._skipped.get(kind, 0) + count
        self._loss, self._met = torch.zeros_like(self._loss), {}
        self._pairs = self._steps_since = 0
        self._since = time.perf_counter()
        if self.main:
            said = f"loss {loss:.4f}, {pairs / seconds:.0f} {self.unit}/s"
            self._bar.set_postfix_str(said)
            if self._bar.disable:  # a log, which has lines instead
                print(f"step {step} of {self.steps}: {said}", flush=True)
            values = {"loss": loss, f"{self.unit}_per_s": pairs / seconds, **figures}
            self.write(step, values, skipped=self._skipped)
            if self._skipped and step == self.steps:
                Progress.write(f"skipped samples: {_counts(self._skipped)}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within this context does not count in pairs/s; what a GPU was asked for before does.

        The image tower may be at work on the next batch, on a stream of its own, and hold resized
        kernels that are still to be computed: here others may read them.
        """
        distributed.synchronize()
        started = time.perf_counter()
        yield
        distributed.synchronize()
        self._since += time.perf_counter() - started

    def write(self, step: int, figures: Mapping[str, float | int], **more: object) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if not self.main:
            return
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **figures, **more}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.main:
            self._bar.close()
            self._board.close()

    def _cut(self, step: int) -> None:
        """Drop lines of steps after `step`, and a line that was cut short by a kill."""
        kept = []
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["step"] <= step:
                kept.append(line + "\n")
                self._skipped = entry.get("skipped", self._skipped)
        write_text_atomically(self._file, "".join(kept))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(counts.items()))

"""A rank of test_distributed.py: meets the others, and waits for one that hangs or is gone.

MASTER_ADDR=... MASTER_PORT=... WORLD_SIZE=2 RANK=0 python tests/silent_program.py 3 SIGSTOP

The last rank sends itself the signal; the others wait for it for so many seconds.
"""

import os
import signal
import sys
from datetime import timedelta

import torch

from contrastive import distributed
from data.errors import exit_on_usage_error


def main() -> None:
    distributed.TIMEOUT = timedelta(seconds=float(sys.argv[1]))
    distributed.ROLL_CALL = timedelta(seconds=1)
    with exit_on_usage_error(), distributed.launched():
        distributed.barrier(patient=True)
        if distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        distributed.all_reduce_sum(torch.ones(1))


if __name__ == "__main__":
    main()

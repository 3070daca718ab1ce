"""Two ranks that add numbers up; at the third sum rank 1 meets WHAT: python tests/runs/one_rank_fails.py WHAT.

``nothing``; ``error``: a UserError; ``disk``: a full one; ``bug``: a ValueError; ``killed``: SIGKILL; ``stuck``:
SIGKILL, while rank 0 waits where neither gloo nor a signal reaches it, as for a GPU.
"""

import errno
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from nitp_titan.errors import UserError
from nitp_titan.machine import exits
from nitp_titan.training.preemption import ends_with_others, PreemptionSignal

WHAT, RANK = sys.argv[1], int(os.environ["RANK"])


def meet() -> None:
    if WHAT != "nothing":
        print(f"at {time.time()}", flush=True)
    if WHAT == "error":
        raise UserError("part-1.jsonl, line 7: no text.")
    if WHAT == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part-1.arrow")
    if WHAT == "bug":
        raise ValueError("a bug of rank 1")
    if WHAT in ("killed", "stuck"):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    with ends_with_others(group), PreemptionSignal(group) as stop:
        for number in range(4):
            assert not stop.should_stop()
            if number == 2 and RANK == 1:
                meet()
            if number == 2 and WHAT == "stuck":
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
                time.sleep(100)
            dist.all_reduce(torch.ones(1))
    # In one write: the ranks share the pipe.
    sys.stdout.write(f"rank {RANK} is done\n")
    sys.stdout.flush()
    dist.destroy_process_group()


exits.run(main, kept="nothing")

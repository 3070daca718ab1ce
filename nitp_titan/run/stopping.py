"""SIGTERM (preemption): all ranks stop after the same step, save and exit with a status of their own."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

STOPPED = 75
"""Exit status of a run that saved a checkpoint because it was told to stop; ``EX_TEMPFAIL`` of sysexits.h."""

STOPPED_FILE = "NITP_STOPPED_FILE"
"""Environment variable: file that is made when a run has stopped so, for `nitp_titan.torchrun`."""


class StopSignal:
    """Whether any rank was sent SIGTERM, known to all ranks at the same step.

    Signals reach ranks at different times. Each step sums a flag over the ranks on the CPU while the step computes, and
    the sum is looked at one step later: no rank waits for it, nor does any device.

        with StopSignal(group) as stop:
            while not stop.agreed():
                ...

    Args:
        group: CPU group of all ranks; None for a run of one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        self._received = False
        self._work: dist.Work | None = None
        self._num_ranks = torch.zeros((), dtype=torch.int64)
        self._before = None
        self._file = Path(os.environ[STOPPED_FILE]) if STOPPED_FILE in os.environ else None

    def __enter__(self) -> "StopSignal":
        if self._file is not None:
            # torchrun may have restarted a run that had stopped.
            self._file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if exception[0] is None and self._work is not None:
            self._work.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Called once a step by every rank: whether some rank had received the signal one step ago."""
        if self._group is None:
            return self._received
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._num_ranks > 0)
        self._num_ranks = torch.tensor(int(self._received))
        self._work = dist.all_reduce(self._num_ranks, group=self._group, async_op=True)
        return agreed

    def announce(self) -> None:
        """Tell the launcher of this node that its ranks have saved and stop."""
        if self._file is not None:
            self._file.touch()

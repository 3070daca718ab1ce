"""How ranks stop together: told to by a signal they save after the same step; without one of them they end."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from nitp_titan.machine import exits

EXIT_PREEMPTED = 75
"""Exit status of a run that saved a checkpoint because it was told to stop; ``EX_TEMPFAIL`` of sysexits.h."""

PREEMPTED_FILE = "NITP_PREEMPTED_FILE"
"""Environment variable: file that is made when a run has stopped so, for `nitp_titan.torchrun`."""

# TorchTitan's, which the launcher does not import.
logger = logging.getLogger()

_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# A launcher passes on what it was sent itself; Slurm sends it to launcher and ranks alike.
_SECONDS_PASSED_ON = 3.0
# In which a rank that has lost another one may say what it was doing.
_SECONDS_TO_END = 5.0
# Of messages; any number but 0.
_TAG = 75


class PreemptionSignal:
    """Whether any rank was sent SIGTERM or SIGINT (Ctrl-C), known to all ranks at the same step.

    Signals reach ranks at different times. Each step sums a flag over the ranks on the CPU while the step computes, and
    the sum is looked at one step later: no rank waits for it, nor does any device. A second signal ends the process at
    once, whatever it is doing.

        with PreemptionSignal(group) as stop:
            while not stop.should_stop():
                ...

    Args:
        group: CPU group of all ranks; None for a run of one rank.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.reason = "a signal to another rank"
        """Cause of the stop, in the words of messages."""
        self.number = signal.SIGTERM
        """The signal, as far as this rank knows."""
        self._group = group
        self.received = False
        """Whether this rank was sent a signal."""
        self._work: dist.Work | None = None
        self._num_ranks = torch.zeros((), dtype=torch.int64)
        self._before: dict[int, object] = {}
        self._file = Path(os.environ[PREEMPTED_FILE]) if PREEMPTED_FILE in os.environ else None

    def __enter__(self) -> "PreemptionSignal":
        if self._file is not None:
            # torchrun may have restarted a run that had stopped.
            self._file.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait for the main thread, which may wait for a device; a thread reads this pipe.
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            self._wakeup = signal.set_wakeup_fd(writing), reading, writing
            threading.Thread(target=_count_signals, args=(reading,), daemon=True).start()
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            before, _, writing = self._wakeup
            signal.set_wakeup_fd(before)
            # The thread ends, and closes its own end.
            os.close(writing)
        if exception[0] is None and self._work is not None:
            self._work.wait()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received, self.number = True, signal.Signals(number)
        self.reason = _SIGNALS[self.number]

    def should_stop(self) -> bool:
        """Called once a step by every rank: whether some rank had received the signal one step ago."""
        if self._group is None:
            return self.received
        agreed = False
        if self._work is not None:
            self._work.wait()
            agreed = bool(self._num_ranks > 0)
        self._num_ranks = torch.tensor(int(self.received))
        self._work = dist.all_reduce(self._num_ranks, group=self._group, async_op=True)
        return agreed

    def mark_saved(self) -> None:
        """Tell the launcher of this node that its ranks have saved and stop."""
        if self._file is not None:
            self._file.touch()


def _count_signals(pipe: int) -> None:
    """Say that the first signal was understood, and end the process at a second one."""
    first = None
    while numbers := os.read(pipe, 1):
        name = _SIGNALS.get(numbers[0])
        if name is None:
            continue
        now = time.monotonic()
        if first is None:
            first, first_name = now, name
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.info(f"{name}: this step is finished and saved; a second one ends training at once.")
        elif now - first > _SECONDS_PASSED_ON:
            again = " again" if name == first_name else ""
            _end_at_once(f"{name}{again}: training ends at once, and this step is not saved.", 128 + numbers[0])
    os.close(pipe)


@contextlib.contextmanager
def ends_with_others(group: dist.ProcessGroup | None):
    """End this rank soon after another one has ended without reaching the end of the block.

    A device may wait for a rank that is gone until a time limit of minutes, and torchrun's signal does not reach a
    process that waits there. Every rank expects a message of the one before it, which comes at the end of the block:
    a connection that closes before has lost its process. So the end of one rank goes round.

    Args:
        group: CPU group of all ranks; None for a run of one rank.
    """
    if group is None:
        yield
        return
    rank, num_ranks = group.rank(), group.size()
    message = torch.zeros(1)
    expected = dist.irecv(message, group=group, group_src=(rank - 1) % num_ranks, tag=_TAG)
    over = threading.Event()
    thread = threading.Thread(target=_wait_for_message, args=(expected, over), daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        over.set()
        raise
    dist.isend(torch.ones(1), group=group, group_dst=(rank + 1) % num_ranks, tag=_TAG).wait()
    thread.join()


def _wait_for_message(expected: dist.Work, over: threading.Event) -> None:
    try:
        expected.wait(timedelta(days=365))
    except RuntimeError:
        if not over.wait(_SECONDS_TO_END):
            message = exits.lost_message()
            exits.tell_torchrun(message, delay=exits.LATER)
            _end_at_once(message, 1)


def _end_at_once(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(status)

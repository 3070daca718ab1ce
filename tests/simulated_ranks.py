"""Ranks as threads of one process, for tests of several ranks without a process group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class SimulatedRanks:
    """Lets ranks agree as a process group would; a rank that the others wait for in vain is an error after 60 s."""

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self._values = [0] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        """Values of all ranks; called by each."""
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def largest(self, rank: int, value: int) -> int:
        return max(map(int, self.gather(rank, value)))

    def run(self, work: list[Callable[[], Any]]) -> list[Any]:
        """Results of the work of every rank, done at the same time."""
        with ThreadPoolExecutor(self.num_ranks) as threads:
            futures = [threads.submit(one) for one in work]
            return [future.result() for future in futures]

"""How far long work is, how fast it goes and when it ends. Imports no torch."""

import sys
import time


def log_line(line: str) -> None:
    """Print a line on stderr, at once: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def time_left(seconds: float) -> str:
    """Duration as the two largest units, for example ``3m05s``."""
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


class Progress:
    """Units of work that are done, out of a known total.

    Args:
        total: units in all.
        unit: their name in `str`, for example ``runs``; empty for none.
        done: units that were done before; they count for neither the speed nor the time left.
        seconds_between_lines: see `line_is_due`.
    """

    def __init__(self, total: int, unit: str = "", *, done: int = 0, seconds_between_lines: float = 0.0):
        self.total, self.unit, self.done = total, unit, done
        self._before = done
        self._interval = seconds_between_lines
        self._start = self._last_line = time.monotonic()

    def add(self, units: int = 1, *, from_before: bool = False) -> None:
        """Count units that are done now, or turn out to have been done before."""
        self.done += units
        self._before += units if from_before else 0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def speed(self) -> float:
        """Units per second since the start."""
        return (self.done - self._before) / max(self.seconds, 1e-9)

    def left(self) -> str:
        """``left 3m05s`` at the speed since the start; empty before the first unit."""
        speed = self.speed()
        return f"left {time_left((self.total - self.done) / speed)}" if speed else ""

    def __str__(self) -> str:
        """``3 of 10 runs, left 3m05s``."""
        count = f"{self.done:,} of {self.total:,} {self.unit}".rstrip()
        return ", ".join(filter(None, [count, self.left()]))

    def seconds_to_line(self) -> float:
        """Until the next line is due; 0 if it is."""
        return max(0.0, self._last_line + self._interval - time.monotonic())

    def line_is_due(self) -> bool:
        """True every ``seconds_between_lines``: asking starts the next interval."""
        is_due = self.seconds_to_line() == 0
        if is_due:
            self._last_line = time.monotonic()
        return is_due

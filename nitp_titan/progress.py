"""How far work is and how long the rest takes. Imports no torch."""

import time


def time_left(seconds: float) -> str:
    """Duration as the two largest units, for example ``3m05s``."""
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


class Progress:
    """Work in equal units: how many are done, how fast, and how long the others take at that speed.

    Args:
        total: number of units.
        done: units that an earlier command has done; they do not count for the speed.
    """

    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done
        self._found_done = done
        self._started = self._logged = time.monotonic()

    def skip(self, units: int = 1) -> None:
        """Count units as done that took no time."""
        self.done += units
        self._found_done += units

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    @property
    def speed(self) -> float:
        """Units per second."""
        return (self.done - self._found_done) / max(self.seconds, 1e-9)

    @property
    def left(self) -> str:
        """The time that the rest takes, as ``left 3m05s``; empty before the first unit."""
        return f"left {time_left((self.total - self.done) / self.speed)}" if self.speed else ""

    def seconds_to_line(self, interval: float) -> float:
        """Until the next line of the log is due, if there is one every ``interval`` seconds."""
        return max(0.0, self._logged + interval - time.monotonic())

    def line_due(self, interval: float) -> bool:
        """Whether it is time for the next line of the log; the next interval begins then."""
        if self.seconds_to_line(interval) > 0:
            return False
        self._logged = time.monotonic()
        return True

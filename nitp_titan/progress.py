"""How long work takes. Imports no torch."""


def time_left(seconds: float) -> str:
    """Duration as the two largest units, for example ``3m05s``."""
    minutes, secs = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"

"""Which mechanisms show on a small model: the study. `python scripts/study`."""

"""The study of the paper's mechanisms on a small model. `python scripts/study`."""

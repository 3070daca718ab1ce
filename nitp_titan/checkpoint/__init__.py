"""Checkpoints of a run: written whole or not at all, read without running what they contain."""

"""Kills at random moments: does a run lose anything? `python tests/chaos`."""

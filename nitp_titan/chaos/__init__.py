"""Kill training and export with SIGKILL, start them again, and see whether anything was lost (scripts/chaos.py).

A `campaign.Campaign` kills runs at moments (moments.py) that it sees from outside and compares each with a run that
nothing stopped (same_run.py). Imports no torch until states are compared.
"""

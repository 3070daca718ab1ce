"""Benchmarks of Hugging Face models: lm-evaluation-harness, MTEB on frozen states, and packed text as in training.

Needs the packages of the extra ``eval``. A suite becomes a `Plan` of tasks and table rows (plan.py); `run.evaluate`
runs what the result store does not hold yet (store.py), and tables.py writes it side by side.
"""

import os

if not os.environ.get("HF_TOKEN"):
    # Else the hub's libraries would send the token of a login that is cached on the machine.
    os.environ.setdefault("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")

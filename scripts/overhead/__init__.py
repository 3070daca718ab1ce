"""What NITP costs: the benchmark. `python scripts/overhead`."""

"""Compare training runs by their run folders: statistics, plots, a page. Imports no torch."""

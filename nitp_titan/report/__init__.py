"""Compare training runs by their run folders: statistics, figures, a page. Imports no torch."""

"""Text data: sources, mixtures, packing and the loader."""

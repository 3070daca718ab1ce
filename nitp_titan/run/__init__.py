"""A run as a whole: its folder, what it is started with, and how it ends."""

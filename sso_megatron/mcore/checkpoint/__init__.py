"""Checkpoints that are complete or absent, fit the run, and end all ranks together where they do not."""

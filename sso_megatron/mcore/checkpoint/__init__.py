"""Keeps checkpoints complete, and ends all ranks together where one is damaged or does not fit the run."""

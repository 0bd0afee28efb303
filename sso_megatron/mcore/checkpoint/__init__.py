"""Keeps checkpoints complete, checks that they fit the run, and ends all ranks together where not."""

"""Checkpoints outside of a run: as one model in one process, exported, or as singular values."""

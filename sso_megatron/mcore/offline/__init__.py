"""Reads checkpoints outside of a run: as one model in one process, for export, or for singular values."""

"""Pure functions on batches of matrices: torch only, no state, no process groups."""

"""Pure functions on batches of matrices, written with torch: no state, no process groups."""

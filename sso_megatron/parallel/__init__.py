"""How batches of logical matrices are spread over process groups, for any algorithm."""

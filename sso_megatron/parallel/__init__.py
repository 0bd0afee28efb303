"""How batches of logical matrices are spread over process groups; knows no algorithm."""

"""Norms of matrices, and the ranks that are ratios of them."""

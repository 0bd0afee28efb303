"""Spreads batches of logical matrices over process groups, for any algorithm."""

"""Validation: what sequences were predicted to cost against what a power meter saw of them."""

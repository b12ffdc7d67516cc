"""Sparse formats of weights: find a pattern, pack, unpack, and what each costs."""

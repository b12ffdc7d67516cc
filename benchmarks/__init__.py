"""Benchmarks of `torch.compile(backend="sparse")` against Inductor and DeepSparse.

`python -m benchmarks` runs a selection of all of them; each module can also be run alone, with more
options: `python -m benchmarks.linear --help`.
"""

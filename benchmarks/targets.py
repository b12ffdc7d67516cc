"""The targets of the project, as ratios, for the cells in which they are stated.

All come from the project's performance table: linear layers of [8192, 2048] on a 2-core AVX-512
machine, and SmolLM2. Where a cell has no target of its own, the promise "never slower than
Inductor" remains: 0.98, which is 2 % of noise.
"""

NEVER_SLOWER = 0.98
DEEPSPARSE_EACH_CELL = 1.25
DEEPSPARSE_GEOMETRIC_MEAN = 1.5

TARGET_SHAPE = (8192, 2048)
_FP32 = {
    0.50: {1: 4.5, 16: 3.5, 64: 3.0, 512: 2.0},
    0.80: {1: 8.0, 16: 8.0, 64: 6.5, 512: 4.6},
    0.90: {1: 16.0, 16: 16.0, 64: 12.0, 512: 8.5},
    0.95: {1: 32.0, 16: 28.0, 64: 22.0, 512: 14.0},
}
_BF16 = {0.50: {1: 2.5}, 0.90: {1: 8.0, 16: 5.0, 128: 4.0, 512: 3.5}}


def linear_target(
    shape: tuple[int, int], dtype: str, pattern: str, zeros: float, rows: int
) -> float:
    """Least ratio against Inductor for one cell.

    Args:
        shape: (out_features, in_features).
        dtype: "fp32" or "bf16".
        pattern: "unstructured", "2:4" (held to the target of 50 % unstructured) or "16x16".
        zeros: fraction of zeros.
        rows: rows of the input.
    """
    if zeros == 0.0 or shape != TARGET_SHAPE:
        return NEVER_SLOWER
    if "x" in pattern:
        large = all(int(side) >= 16 for side in pattern.split("x"))
        return 0.85 / (1.0 - zeros) if large and rows >= 64 else NEVER_SLOWER
    table = _FP32 if dtype == "fp32" else _BF16
    return table.get(zeros, {}).get(rows, NEVER_SLOWER)


# (pattern, phase) -> least ratio against Inductor on the same pruned model.
END_TO_END = {
    ("dense", "decode"): 0.98,
    ("dense", "prefill"): 0.98,
    ("2:4", "decode"): 2.0,
    ("2:4", "prefill"): 1.3,
    ("80 %", "decode"): 3.0,
    ("80 %", "prefill"): 2.0,
}
# Compile time may be at most this many times Inductor's.
COMPILE_TIME_SPARSE = 2.0
COMPILE_TIME_DENSE = 1.15

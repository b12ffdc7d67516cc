"""How weights are cut into blocks, and what the packers share.

The sizes were measured (``docs/performance.md``): a k-block's panel of x has to stay in L1 where
many rows of x share it, and has to be long enough to fill a vector where they do not.
"""

from __future__ import annotations

import numpy as np
import torch

# Units (32 bits) that a row may have: columns are stored in 16 bits.
MAX_UNITS = 65535


def n_block(out_features: int) -> int:
    """Rows of the weight in an n-block, which is also the width of an output tile."""
    return 128 if out_features >= 1024 else 64


def k_block(density: float, units: int, *, group: int, rows: int | None) -> int:
    """Units of a k-block of a csr weight.

    Args:
        density: share of units that are stored.
        units: units in a row.
        group: rows that share a column list.
        rows: rows of x, or None if any number may come.
    """
    if group > 1:
        wanted = 2048
    elif rows == 1:
        wanted = MAX_UNITS
    elif rows is not None and rows <= 16:
        wanted = 128 if density >= 0.4 else 256 if density >= 0.15 else 512
    else:
        wanted = 128 if density >= 0.07 else 256
    return max(1, min(wanted, units))


def flat_nonzero(kept: torch.Tensor) -> torch.Tensor:
    """Positions of the true elements, in memory order: int64."""
    # torch.nonzero and masked_select are five to ten times slower on CPUs.
    return torch.from_numpy(np.flatnonzero(kept.numpy()))

"""Making a model sparse: `prune_` and what it returns."""

from sparse_compiler.pruning.errors import PruningError
from sparse_compiler.pruning.prune import LayerReport, PruningReport, prune_

__all__ = ["LayerReport", "PruningError", "PruningReport", "prune_"]

"""The passes: graph in, graph out. Each finds one kind of region and makes it sparse."""

from __future__ import annotations

from sparse_compiler.passes.attention import Attention
from sparse_compiler.passes.base import Pass, PassContext, PassManager, Rewrite
from sparse_compiler.passes.dead_channels import DeadChannels
from sparse_compiler.passes.fold_static import FoldStatic
from sparse_compiler.passes.linear_attention import LinearAttention
from sparse_compiler.passes.moe import Moe
from sparse_compiler.passes.sparse_linear import SparseLinear

PASSES: dict[str, type[Pass]] = {
    Attention.name: Attention,
    DeadChannels.name: DeadChannels,
    FoldStatic.name: FoldStatic,
    LinearAttention.name: LinearAttention,
    Moe.name: Moe,
    SparseLinear.name: SparseLinear,
}

__all__ = [
    "PASSES",
    "Attention",
    "DeadChannels",
    "FoldStatic",
    "LinearAttention",
    "Moe",
    "Pass",
    "PassContext",
    "PassManager",
    "Rewrite",
    "SparseLinear",
]

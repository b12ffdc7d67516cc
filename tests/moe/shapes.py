"""The shapes of research/moe.md, section 4, as small modules, and what has to happen to each."""

import dataclasses
from collections.abc import Callable

import graph_shapes as graph
import loop_shapes as loop
import torch
from torch import Tensor, nn

EXPERTS, K, DIM, HIDDEN = 4, 2, 32, 48


@dataclasses.dataclass(frozen=True)
class Shape:
    """One way of writing a mixture of experts.

    Attributes:
        name: its key in ``SHAPES``.
        section: of research/moe.md.
        factory: called with ``experts=``, ``k=``, ``dim=``, ``hidden=``.
        door: ``"graph"`` if the backend sees it whole, ``"prepare"`` if it has to be prepared.
        rewritten: whether it has to be.
        reason: part of the sentence that refuses it; empty where nothing is to be reported.
        batched: whether tokens are [2, T / 2, dim], not [T, dim].
        dtype: to test it in. Where PyTorch traces ``_grouped_mm`` without a GPU in bfloat16 alone,
            that one.
        k: choices, if they are not free.
    """

    name: str
    section: str
    factory: Callable[..., nn.Module]
    door: str
    rewritten: bool = True
    reason: str = ""
    batched: bool = False
    dtype: torch.dtype = torch.float64
    k: int | None = None

    def make(self, **sizes: int) -> nn.Module:
        return self.factory(
            **{"experts": EXPERTS, "k": self.k or K, "dim": DIM, "hidden": HIDDEN, **sizes}
        )

    def inputs(
        self, tokens: int = 10, dim: int = DIM, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        x = torch.randn(2, tokens // 2, dim) if self.batched else torch.randn(tokens, dim)
        extra = (torch.randint(0, EXPERTS, (tokens,)),) if self.name == "assigned" else ()
        return (x.to(dtype), *extra)


def _graph(name: str, section: str, factory: Callable[..., nn.Module], **options: object) -> Shape:
    return Shape(name, section, factory, "graph", **options)  # type: ignore[arg-type]


def _loop(name: str, section: str, factory: Callable[..., nn.Module], **options: object) -> Shape:
    return Shape(name, section, factory, "prepare", **{"batched": True, **options})  # type: ignore[arg-type]


_ALL = [
    _graph("grouped_mm", "4.4", graph.GroupedMm, dtype=torch.bfloat16),
    _graph("batched_mm", "4.4", graph.BatchedMm),
    _graph("shared_expert", "4.5", graph.SharedExpert),
    _graph("group_limited", "4.6", graph.GroupLimited),
    _graph("clamped_grouped", "4.11", graph.ClampedGrouped, dtype=torch.bfloat16),
    _graph("clamped_dense", "4.11", graph.ClampedDense),
    _graph("weight_on_input", "4.12", graph.WeightOnInput),
    _graph("gathered_weights", "4.18", graph.GatheredWeights),
    _graph("dense_stack", "4.19", graph.DenseStack),
    _graph("dense_slices", "4.19", graph.DenseSlices),
    _graph("dense_compared", "4.19", graph.DenseCompared),
    _graph("assigned", "4.19", graph.Assigned, k=1),
    _graph("masked_softmax", "4.19", graph.MaskedSoftmax),
    _graph("soft_gates", "4.19", graph.SoftGates, rewritten=False, reason="the gates are soft"),
    _graph("dense_einsum", "4.20", graph.DenseEinsum),
    _graph("one_hot_dispatch", "4.21", graph.OneHotDispatch, k=2),
    _graph("ranked_dispatch", "4.22", graph.RankedDispatch),
    _graph("expert_choice", "4.24", graph.ExpertChoice, rewritten=False),
    _graph("soft_moe", "4.24", graph.SoftMoE, rewritten=False),
    _graph("product_keys", "4.24", graph.ProductKeys, rewritten=False),
    _graph("trainer_grouped", "4.25", graph.TrainerGrouped, dtype=torch.bfloat16),
    _loop("static_loop", "4.1", loop.StaticLoop),
    _loop("hit_loop", "4.2", loop.HitLoop),
    _loop("stacked_loop", "4.3", loop.StackedLoop),
    _loop("sorted_slices", "4.7", loop.SortedSlices),
    _loop("bincount", "4.8", loop.Bincount),
    _loop("where_loop", "4.9", loop.WhereLoop, batched=False),
    _loop("any_loop", "4.10", loop.AnyLoop),
    _loop("capacity_loop", "4.10", loop.CapacityLoop, rewritten=False, reason="differs"),
    _loop("flat_loop", "4.13", loop.FlatLoop),
    _loop("parallel_experts", "4.14", loop.ParallelExperts, rewritten=False, reason="sorted"),
    _loop("mixer_loop", "4.15", loop.MixerLoop),
    _loop("switch", "4.16", loop.Switch, k=1),
    _loop("switch_before", "4.16", loop.SwitchBefore, k=1),
    _loop("identity_loop", "4.17", loop.IdentityLoop),
    _loop("guarded_pairs", "4.19", loop.GuardedPairs, batched=False),
    _loop("dispatched", "4.23", loop.Dispatched, batched=False),
    _loop("normed_loop", "refused", loop.NormedLoop, rewritten=False, reason="between"),
    _loop(
        "counting_loop",
        "refused",
        loop.CountingLoop,
        batched=False,
        rewritten=False,
        reason="self.seen",
    ),
]
SHAPES = {shape.name: shape for shape in _ALL}

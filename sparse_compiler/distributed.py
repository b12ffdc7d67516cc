"""Experts on several ranks: tokens travel to the experts they are routed to, and back.

``parallelize_experts(model, mesh)`` gives each rank of a one-dimensional mesh an equal share of
every ``nn.MoE`` layer's experts, as DTensors sharded over experts. Then, in each layer: pairs of a
token and an expert are sorted by the rank that has the expert; one all-to-all tells how many come,
one takes the tokens there; the operator ``moe`` runs the rank's own experts on what arrived; one
all-to-all brings the results back, where each token's are weighted and summed. Ranks may hold
different numbers of tokens, and a rank to which none are routed takes part with none.

How many tokens travel is known at run time only, so the exchange is a graph break under
``torch.compile``; what is before and behind it is compiled, and the experts run on this package's
kernels either way.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sparse_compiler.errors import ExchangeError
from sparse_compiler.nn.moe import MoE
from sparse_compiler.ops import moe as _operators  # noqa: F401  registers the operators
from sparse_compiler.score.expr import Expr, K, add, erf, load, mul, relu, sigmoid, to_text

_STACKED = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


def parallelize_experts(model: nn.Module, mesh: DeviceMesh, *, average: bool = True) -> nn.Module:
    """Shards the experts of every ``nn.MoE`` in a model over a mesh, in place.

    All ranks call it with the same model; rank 0's weights count. ``state_dict`` keys stay, their
    values are DTensors. ``DistributedDataParallel`` leaves the sharded parameters alone; to
    ``fully_shard`` give ``ignored_params=set(expert_parameters(model))``.

    Args:
        model: any model; without ``nn.MoE`` layers it stays as it is.
        mesh: of one dimension, such as ``mesh["experts"]`` of a larger one.
        average: whether the experts' gradients are divided by the number of ranks, as
            ``DistributedDataParallel`` does with all others.

    Returns:
        The model.

    Raises:
        ValueError: a mesh of several dimensions, or fewer experts than ranks. Nothing was changed.
    """
    if mesh.ndim != 1:
        raise ValueError(
            f"the mesh has {mesh.ndim} dimensions: pass one of them, as mesh['experts']."
        )
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
    for name, layer in layers.items():
        if layer.experts < mesh.size():
            raise ValueError(
                f"{name or 'the layer'} has {layer.experts} experts for {mesh.size()} ranks: "
                "use a mesh of at most as many ranks."
            )
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in layers.items():
        for key in _STACKED:
            parameter = getattr(layer, key)
            if parameter is None or isinstance(parameter, DTensor):
                continue
            shards = nn.Parameter(
                distribute_tensor(parameter.detach(), mesh, [Shard(0)]),
                requires_grad=parameter.requires_grad,
            )
            if average and shards.requires_grad:
                shards.register_hook(functools.partial(torch.mul, other=1 / mesh.size()))
            setattr(layer, key, shards)
            ignored.append(f"{name}.{key}" if name else key)
        layer.run_experts = functools.partial(_exchanged, mesh)
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return model


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``parallelize_experts`` has sharded."""
    return [
        getattr(layer, key)
        for layer in model.modules()
        if isinstance(layer, MoE)
        for key in _STACKED
        if isinstance(getattr(layer, key), DTensor)
    ]


@torch.compiler.disable
def _exchanged(mesh: DeviceMesh, layer: MoE, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer's result for this rank's tokens x [T, width]."""
    choices = ids.shape[1]
    flat = ids.reshape(-1)
    # As DTensor shards: all ranks but the last ones have this many.
    share = -(-layer.experts // mesh.size())
    owner = torch.where((flat >= 0) & (flat < layer.experts), flat // share, mesh.size())
    counts = torch.bincount(owner, minlength=mesh.size() + 1)[: mesh.size()]
    order = owner.argsort(stable=True)[: int(counts.sum())]
    try:
        arriving = collectives.wait_tensor(collectives.all_to_all_single(counts, None, None, mesh))
        sent, received = counts.tolist(), arriving.tolist()
        numbers = (flat - owner * share)[order]
        local = collectives.wait_tensor(
            collectives.all_to_all_single(numbers, received, sent, mesh)
        )
        rows = _moved(x[order // choices], received, sent, mesh)
        back = _moved(_own_experts(layer, rows, local), sent, received, mesh)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {mesh.get_local_rank()} of {mesh.size()} could not exchange tokens: another "
            f"rank has failed or does not answer ({error}). Look at its output first; "
            "init_process_group(timeout=...) sets how long ranks wait."
        ) from error
    results = back.new_zeros(flat.shape[0], back.shape[1]).index_copy(0, order, back)
    return (results.view(*ids.shape, back.shape[1]) * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _moved(rows: Tensor, received: list[int], sent: list[int], mesh: DeviceMesh) -> Tensor:
    """All-to-all with gradients."""
    moved = collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, mesh)
    return collectives.wait_tensor(moved)


def _own_experts(layer: MoE, x: Tensor, ids: Tensor) -> Tensor:
    """Each row through one of this rank's experts."""
    if x.device.type == "cpu":
        # Here, not above: Inductor is loaded when it is needed.
        from sparse_compiler.codegen import moe as kernels

        kernels.register_all()

    def own(*keys: str) -> list[Tensor]:
        found = [getattr(layer, key) for key in keys]
        return [shards.to_local() for shards in found if shards is not None]

    inner, outer = own("gate", "up"), own("down")
    last = own("down_bias")
    call = (
        x, ids.unsqueeze(1), x.new_ones(len(x), 1), inner, own("gate_bias", "up_bias"), outer,
        last[0] if last else None,        to_text(_body(layer)), len(outer[0]), 0, False,
    )  # fmt: skip
    if torch.is_grad_enabled():
        result: Tensor = torch.ops.sparse_compiler.moe_training(*call)[0]
        return result
    result = torch.ops.sparse_compiler.moe(*call)
    return result


def _body(layer: MoE) -> Expr:
    first, second = load(0, "f32", K), load(1, "f32", K)
    silu = mul(first, sigmoid(first))
    gelu = mul(mul(first, 0.5), add(erf(mul(first, 0.5**0.5)), 1.0))
    return {
        "swiglu": mul(silu, second),
        "geglu": mul(gelu, second),
        "silu": silu,
        "gelu": gelu,
        "relu": relu(first),
    }[layer.activation]

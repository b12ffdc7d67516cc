"""Experts on several ranks: processes with gloo, against all experts in one process."""

from __future__ import annotations

import datetime
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import sparse_compiler as sc
from sparse_compiler.distributed import expert_parameters, parallelize_experts

WIDTH, HIDDEN, EXPERTS = 16, 24, 6

Task = Callable[[int, int], None]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _entry(rank: int, world: int, port: int, task: Task, seconds: float, errors: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group(
            "gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=seconds)
        )
        task(rank, world)
        dist.barrier()
        dist.destroy_process_group()
        errors.put((rank, None))
    except BaseException:
        errors.put((rank, traceback.format_exc()))


def on_ranks(task: Task, world: int, seconds: float = 60.0) -> dict[int, str | None]:
    """Runs a task in ``world`` processes; tracebacks by rank."""
    context = processes.get_context("spawn")
    errors, port = context.SimpleQueue(), free_port()
    started = [
        context.Process(target=_entry, args=(rank, world, port, task, seconds, errors))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(150)
        assert not process.is_alive(), "a rank hangs"
    found: dict[int, str | None] = {}
    while not errors.empty():
        rank, error = errors.get()
        found[rank] = error
    return found


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layer = sc.nn.MoE.mixtral(WIDTH, HIDDEN, EXPERTS, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.first(x))[0]


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


def tokens(rank: int) -> torch.Tensor:
    """As many as no other rank has."""
    return torch.randn(5 + 3 * rank, WIDTH, generator=torch.Generator().manual_seed(rank))


def _check(rank: int, world: int, sharded: nn.Module, compiled: bool = False, **how: Any) -> None:
    """Outputs of this rank's tokens, and gradients of the mean over ranks of each one's sum."""
    reference = model(**how)
    losses = [reference(tokens(other)).square().sum() for other in range(world)]
    torch.stack(losses).mean().backward()
    want = reference(tokens(rank))
    call = torch.compile(sharded, backend="sparse") if compiled else sharded
    got = call(tokens(rank))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        want_grad = expected[name.removeprefix("module.")].grad
        torch.testing.assert_close(grad, want_grad, rtol=1e-3, atol=1e-4, msg=name)


def _ddp(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for how in ({}, {"bias": True, "activation": "gelu"}):
        sharded = parallelize_experts(model(**how), mesh)
        assert all(isinstance(p, DTensor) for p in expert_parameters(sharded))
        assert list(sharded.state_dict()) == list(model(**how).state_dict())
        _check(rank, world, DistributedDataParallel(sharded), **how)


def _fsdp(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    sharded = parallelize_experts(model(), mesh)
    fully_shard(sharded, mesh=mesh, ignored_params=set(expert_parameters(sharded)))
    _check(rank, world, sharded)


def _compiled(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sharded = parallelize_experts(model(), mesh)
    want = model()(tokens(rank))
    got = torch.compile(sharded, backend="sparse")(tokens(rank))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _one_rank_gets_all(rank: int, world: int) -> None:
    def skewed() -> Model:
        made = model()
        with torch.no_grad():
            # Of equal scores top-k takes whichever it likes: these are not equal.
            falling = -torch.arange(EXPERTS).unsqueeze(1).float()
            made.layer.router.weight.copy_(falling.expand(-1, WIDTH))
        return made

    x = tokens(rank).abs()
    reference = skewed()
    nn.init.eye_(reference.first.weight)
    nn.init.zeros_(reference.first.bias)
    sharded = skewed()
    sharded.first.load_state_dict(reference.first.state_dict())
    ids = reference.layer.router(reference.first(x)).ids
    assert int(ids.max()) < EXPERTS // world
    parallelize_experts(sharded, init_device_mesh("cpu", (world,)))
    torch.testing.assert_close(sharded(x), reference(x), rtol=1e-4, atol=1e-5)
    empty = sharded(x[:0])
    assert empty.shape == (0, WIDTH)


def _bad_meshes(rank: int, world: int) -> None:
    made = model()
    with pytest.raises(ValueError, match=r"2 dimensions: pass one of them, as mesh\['experts'\]"):
        parallelize_experts(made, init_device_mesh("cpu", (1, world)))
    torch.manual_seed(0)
    few = sc.nn.MoE.switch(WIDTH, HIDDEN, 1)
    with pytest.raises(ValueError, match="has 1 experts for 2 ranks"):
        parallelize_experts(few, init_device_mesh("cpu", (world,)))
    assert not expert_parameters(few) and not expert_parameters(made)


def _dies(rank: int, world: int) -> None:
    sharded = parallelize_experts(model(), init_device_mesh("cpu", (world,)))
    sharded(tokens(rank))
    if rank == 1:
        os._exit(1)
    sharded(tokens(rank))


@pytest.mark.parametrize(
    ("task", "world"),
    [
        pytest.param(_ddp, 2, id="ddp"),
        pytest.param(_one_rank_gets_all, 2, id="one rank gets all", marks=pytest.mark.slow),
        pytest.param(_fsdp, 2, id="fsdp", marks=pytest.mark.slow),
        pytest.param(_compiled, 2, id="compiled", marks=pytest.mark.slow),
        pytest.param(_bad_meshes, 2, id="bad meshes", marks=pytest.mark.slow),
        pytest.param(_ddp, 4, id="ddp, 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_with_one_process(task, world):
    assert on_ranks(task, world) == dict.fromkeys(range(world))


@pytest.mark.slow
def test_a_dying_rank_is_told():
    found = on_ranks(_dies, 2, seconds=20.0)
    assert 1 not in found
    assert found[0] is not None and "rank 0 of 2 could not exchange tokens" in found[0]

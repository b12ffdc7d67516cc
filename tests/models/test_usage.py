"""The backend in the hands of users: what models do besides multiplying by their weights."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparse_compiler
from sparse_compiler import backend
from sparse_compiler.region import Region
from sparse_compiler.static import is_mutated, mutated_nodes
from tests.helpers import compiled

ALWAYS = {"selection": "always", "on_error": "raise"}


@pytest.fixture
def records() -> Iterator[list[backend.CompiledGraph]]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    found: list[backend.CompiledGraph] = []
    backend.listeners.append(found.append)
    yield found
    backend.listeners.remove(found.append)
    torch._dynamo.reset()


def sparse(model: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sparse", options=ALWAYS, **kwargs)


def pruned(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.mul_((torch.rand(tensor.shape) > 0.7).to(tensor.dtype))


def linear(in_features: int = 64, out_features: int = 48) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    pruned(layer.weight)
    return layer


def masked_mlp() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.8)
    return model


def applied(records: list[backend.CompiledGraph]) -> int:
    return sum(rewrite.applied for record in records for rewrite in record.rewrites)


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)


class Fused(nn.Module):
    """One parameter, used in slices: as many transformers hold query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(pruned(torch.randn(192, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv.chunk(3)
        return F.linear(x, query) * F.linear(x, key) + F.linear(x, value)


def test_slices_of_one_parameter(records):
    model, x = Fused(), torch.randn(5, 64)
    with torch.no_grad():
        fast = sparse(model)
        close(fast(x), model(x), 1e-3)
        model.qkv[70:140] *= 2
        close(fast(x), model(x), 1e-3)
    assert applied(records) == 3


def test_parameters_that_share_storage(records):
    storage, x = pruned(torch.randn(128, 64)), torch.randn(5, 64)
    model = nn.Module()
    model.a, model.b = nn.Parameter(storage[:64]), nn.Parameter(storage[64:])
    model.forward = lambda x: F.linear(x, model.a) + F.linear(x, model.b)
    with torch.no_grad():
        fast = sparse(model)
        close(fast(x), model(x))
        storage[:64] *= 3
        close(fast(x), model(x))
    assert applied(records) == 2


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64, 5).t(),
        torch.randn(1, 64).expand(5, 64),
        torch.randn(5, 1).expand(5, 64),
        torch.randn(5, 128)[:, ::2],
        torch.randn(2, 5, 128)[:, 1:4, 64:],
    ],
    ids=["transposed", "repeated row", "repeated column", "every other column", "window"],
)
def test_strides_of_the_input(x, records):
    model = linear()
    with torch.no_grad():
        close(sparse(model)(x), model(x))
    assert applied(records) == 1


def test_literals_in_forward(records):
    """AOTAutograd took the literal for a buffer of the model and asked for its source."""
    layer, x = linear(), torch.randn(5, 64)

    def model(x: torch.Tensor) -> torch.Tensor:
        return layer(x) * torch.tensor(2.5) + torch.tensor([1.0, 2.0] * 24)

    with torch.no_grad():
        close(sparse(model)(x), model(x))
    assert applied(records) == 1


def reads_data(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    y.data.mul_(2)
    return y + 1


def under_vmap(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x) + torch.vmap(lambda row: row.sum() * 2)(x)[:, None]


def under_grad(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x) + torch.func.grad(lambda x: x.sin().sum())(x)[:, :48]


@pytest.mark.parametrize("function", [reads_data, under_vmap, under_grad])
def test_what_retracing_cannot_see_leaves_the_graph_to_inductor(function, records):
    """Such values became constants of the graph: the example's, for ever."""
    layer = linear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = sparse(lambda x: function(layer, x))
        for _ in range(2):
            x = torch.randn(5, 64)
            close(fast(x), function(layer, x))
    (rewrite,) = records[0].rewrites
    assert not rewrite.applied and "leave no trace in a graph" in rewrite.reason


def test_a_chain_longer_than_the_recursion_limit(records):
    layer, x = linear(16, 16), torch.randn(5, 16)

    def model(x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight
        for _ in range(1100):
            x, weight = x * 1.0001, weight * 1.0001
        return F.linear(x, weight)

    torch.compile(model, backend=passes_only(records))(x)
    assert applied(records) == 1


def passes_only(records: list[backend.CompiledGraph]) -> Callable[..., Any]:
    """Run the passes as for inference, and what comes out eagerly: nothing is compiled."""

    def compile(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        from sparse_compiler.formats.cost import AlwaysSelector
        from sparse_compiler.options import Options
        from sparse_compiler.passes import PassContext

        context = PassContext(Options.parse(ALWAYS), False, AlwaysSelector())
        records.append(backend._rewrite(gm, inputs, context))
        return records[-1].after

    return compile


def test_the_graph_before_the_passes_is_kept(records):
    model = nn.Sequential(linear(), nn.GELU(), linear(48, 16))
    torch.compile(model, backend=passes_only(records))(torch.randn(5, 64))
    (record,) = records
    before = [str(node.target) for node in record.before.graph.nodes]
    after = [str(node.target) for node in record.after.graph.nodes]
    assert sum("aten.linear" in target for target in before) == 2
    assert not any("sparse" in target for target in before)
    assert sum("sparse_compiler.linear" in target for target in after) == 2


def test_a_module_called_self(records):
    inner = nn.Module()
    inner.add_module("self", nn.Sequential(linear()))
    inner.forward = lambda x: getattr(inner, "self")(x)  # noqa: B009
    model = nn.Sequential(inner)
    torch.compile(model, backend=passes_only(records))(torch.randn(5, 64))
    assert [rewrite.target for rewrite in records[0].rewrites if rewrite.applied] == ["0.self.0"]


def test_empty_weights(records):
    for shape in ((0, 64), (48, 0)):
        weight = nn.Parameter(torch.empty(shape))
        model = torch.compile(lambda x, w=weight: x @ w.t(), backend=passes_only(records))
        assert model(torch.randn(5, shape[1])).shape == (5, shape[0])


def test_frozen_pruned_base_with_adapters(records):
    class Adapted(nn.Module):
        def __init__(self, in_features: int, out_features: int) -> None:
            super().__init__()
            self.base = linear(in_features, out_features).requires_grad_(False)
            self.down = nn.Linear(in_features, 4, bias=False)
            self.up = nn.Linear(4, out_features, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.up(self.down(x))

    model = nn.Sequential(Adapted(64, 48), nn.GELU(), Adapted(48, 32))
    x = torch.randn(5, 64, requires_grad=True)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    want = torch.autograd.grad(model(x).sin().sum(), wanted)
    got = torch.autograd.grad(sparse(model)(x).sin().sum(), wanted)
    for a, b in zip(got, want, strict=True):
        close(a, b)
    assert applied(records) == 2


@pytest.mark.slow
def test_checkpointing_and_autocast_have_the_gradients_of_eager(records):
    from torch.utils.checkpoint import checkpoint

    def checkpointed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False).sin().sum()

    def cast(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().sin().sum()

    x = torch.randn(5, 64)
    for loss, bound in ((checkpointed, 1e-4), (cast, 5e-2)):
        model, reference = masked_mlp(), masked_mlp()
        sparse(loss)(model, x).backward()
        loss(reference, x).backward()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            close(a.grad, b.grad, bound)


@pytest.mark.slow
def test_distributed_data_parallel(records, tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, reference, x = masked_mlp(), masked_mlp(), torch.randn(5, 64)
        sparse(nn.parallel.DistributedDataParallel(model))(x).sin().sum().backward()
        reference(x).sin().sum().backward()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            close(a.grad, b.grad)
        # Dynamo leaves the hooks of torch.nn.utils.prune outside of DDP's graphs: their weights
        # arrive there without a mask, stay dense, and say so.
        reasons = [rewrite.reason for graph in records for rewrite in graph.rewrites]
        assert len(reasons) == 2 and applied(records) == 0
        assert all("nothing in the model keeps its zeros" in reason for reason in reasons)
    finally:
        dist.destroy_process_group()


def test_weights_written_inside_forward_stay_dense(records):
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(pruned(torch.randn(32, 64)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, self.weight)
            self.weight.mul_(1.5)
            return y + F.linear(x, self.weight)

    model = Decays()
    reference, x = copy.deepcopy(model), torch.randn(5, 64)
    with torch.no_grad():
        fast = sparse(model)
        for _ in range(3):
            close(fast(x), reference(x), 1e-3)
    assert applied(records) == 0


def test_inputs_written_inside_forward(records):
    layer = linear(64, 64)

    def model(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        x.add_(1)
        return layer(x) + y

    a, b = (torch.ones(5, 64) for _ in range(2))
    with torch.no_grad():
        close(sparse(model)(a), model(b))
    close(a, b)
    assert applied(records) == 2


def test_copies_and_pickles_of_a_compiled_model(records):
    model, x = nn.Sequential(linear(), nn.ReLU(), linear(48, 32)), torch.randn(5, 64)
    with torch.no_grad():
        fast = sparse(model)
        want = fast(x)
        other = copy.deepcopy(fast)
        close(other(x), want)
        other._orig_mod[0].weight.mul_(3)
        close(other(x), other._orig_mod(x))
        close(fast(x), want)
        model.compile(backend="sparse", options=ALWAYS)
        close(model(x), want)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        close(torch.load(file, weights_only=False)(x), want)


def test_compiled_inside_compiled(records):
    a, b, x = linear(), linear(48, 32), torch.randn(5, 64)
    inner = sparse(a)
    with torch.no_grad():
        close(sparse(lambda x: b(inner(x)))(x), b(a(x)))
    assert applied(records) == 2


def test_inference_mode_before_and_after(records):
    model, x = linear(), torch.randn(5, 64)
    fast = sparse(model)
    with torch.inference_mode():
        close(fast(x), model(x))
        inside = torch.randn(5, 64)
    with torch.no_grad():
        close(fast(inside), model(inside))
    close(fast(x), model(x))
    assert applied(records)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode, records):
    model, x = nn.Sequential(linear(), nn.GELU(), linear(48, 32)), torch.randn(5, 64)
    with torch.no_grad():
        fast = torch.compile(model, backend="sparse", mode=mode, fullgraph=True)
        close(fast(x), model(x))
    assert len(records[0].rewrites) == 2


def test_weights_from_outside_the_model(records):
    """Nothing is known about a weight that comes as an argument: right, and dense."""
    layer, x = linear(), torch.randn(5, 64)

    def model(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, state, (x,))

    with torch.no_grad():
        fast = sparse(model)
        for factor in (1.0, 2.0):
            state = {name: p.detach() * factor for name, p in layer.named_parameters()}
            close(fast(state, x), model(state, x))
        xs = torch.randn(3, 5, 64)
        close(sparse(lambda xs: torch.vmap(layer)(xs))(xs), layer(xs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selektion": "always"}, "Did you mean 'selection'"),
        ({"selection": "allways"}, "Did you mean 'always'"),
        ({"passes": ["sparse_linaer"]}, "Did you mean 'sparse_linear'"),
        ({"fuel": -1}, "a number of rewrites"),
        (5, "write a dict"),
    ],
)
def test_wrong_options_say_what_to_write(options, message):
    with pytest.raises(sparse_compiler.OptionError, match=message):
        sparse_compiler.Options.parse(options)


def test_a_model_without_zeros_gets_dynamos_own_graph(records):
    x = torch.randn(5, 64)
    model = nn.Linear(64, 48)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        close(sparse(model)(x), model(x))
    (record,) = records
    assert not record.after.meta.get("edits")
    assert [rewrite.reason for rewrite in record.rewrites] == ["the weight has no zeros"]


def test_local_and_global_mutation_checks_agree():
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        base = x * 2
        view = base.view(-1)[3:]
        other = base.t()
        view.add_(1)
        return other + y.t() + torch.relu(y)

    gm = sparse_compiler.canonicalize(torch.fx.symbolic_trace(function), *torch.randn(2, 4, 4))
    written = mutated_nodes(gm.graph)
    assert written and {node for node in gm.graph.nodes if is_mutated(node)} == written
    (doubled,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    (relu,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default]
    assert "written to in place" in str(Region.of([doubled]).why_not_movable())
    assert Region.of([relu]).why_not_movable() is None


def test_nothing_in_and_nothing_out():
    layer = nn.Linear(64, 64)
    layer.weight.data *= torch.rand(64, 64) < 0.1
    for shape in ((0, 64), (2, 0, 64), (2, 0, 3, 64)):
        torch._dynamo.reset()
        with torch.no_grad():
            assert sparse(layer)(torch.randn(shape)).shape == shape


@pytest.mark.slow
def test_the_cpp_wrapper():
    """Inductor puts all kernels of a graph into one file."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    for layer in (model[0], model[2]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    x = torch.randn(5, 64)
    with torch.no_grad():
        options = {**ALWAYS, "inductor": {"cpp_wrapper": True}}
        found = torch.compile(model, backend="sparse", options=options)(x)
        torch.testing.assert_close(found, model(x))


def test_an_unknown_setting_of_inductor():
    options = {"inductor": {"max_autotun": True}}
    graph = torch.fx.symbolic_trace(nn.Linear(4, 4))
    with pytest.raises(sparse_compiler.OptionError, match="no setting 'max_autotun'"):
        backend.sparse(graph, [], options=options)


@pytest.mark.filterwarnings("ignore")
class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x * grad  # not what autograd would find


def test_autograd_functions_keep_their_backward(records):
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    torch.nn.utils.prune.custom_from_mask(second, "weight", torch.rand(64, 64) < 0.2)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return second(_Square.apply(first(x))).square().sum()

    x, weights = torch.randn(5, 64), [first.weight, second.weight_orig]
    want = torch.autograd.grad(loss(x), weights)
    got = torch.autograd.grad(compiled(loss)(x), weights)
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    assert "torch.autograd.Function" in records[0].rewrites[0].reason
    with torch.no_grad():
        compiled(loss)(x)
    assert any(rewrite.applied for rewrite in records[1].rewrites)


def test_checkpointed_blocks_stay_dense_and_say_why(records):
    layer = nn.Linear(16, 16)
    layer.weight.data *= torch.rand(16, 16) < 0.2

    def forward(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = torch.randn(4, 16, requires_grad=True)
    torch.testing.assert_close(sparse(forward)(x), layer(x))
    assert "activation checkpointing cannot be traced" in records[0].rewrites[0].reason


@pytest.mark.parametrize("density", [0.15, 0.5], ids=["csr", "bitmap"])
@pytest.mark.parametrize("train", [False, True])
def test_inputs_that_begin_inside_another_tensor(density, train):
    """Slices of inputs and of what a kernel just wrote; likewise of gradients and of weights."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    first, second, full = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 96)
    for layer in (first, second):
        prune.custom_from_mask(layer, "weight", torch.rand(64, 64) < density)

    def forward(x):
        hidden = first(x)
        parts = (hidden[:, 3:5], hidden[:, 2], hidden[1], x[1, 2:3], hidden[-1, -1:])
        heads = F.linear(parts[-1], full.weight[32:], full.bias[32:])
        return hidden, *(second(part) for part in parts), heads

    x = torch.randn(4, 8, 64)
    parameters = [first.weight_orig, second.weight_orig, full.weight]

    def results(function):
        if not train:
            with torch.no_grad():
                return function(x)
        found = function(x)
        loss = sum((y * torch.linspace(0, 1, y.numel()).view_as(y)).sum() for y in found)
        return [*found, *torch.autograd.grad(loss, parameters)]

    got = results(sparse(forward))
    for have, want in zip(got, results(forward), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_tensors_that_are_no_inputs_of_the_graph(records):
    weight = linear().weight.requires_grad_(False)
    torch._dynamo.mark_static_address(weight, guard=True)

    def forward(x):
        return F.linear(x, weight)

    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(sparse(forward)(x), forward(x))
    assert "belongs to Dynamo's graph itself" in records[0].rewrites[0].reason

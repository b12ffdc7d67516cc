"""Regions: what may be replaced, what may not, and that a refused edit leaves no trace."""

import pytest
import torch
from helpers import targets
from torch import fx, nn

import sparse_compiler as sc
from sparse_compiler.region import Region, dominators, region_graph, replace_region

aten = torch.ops.aten


def graph_of(function, *inputs) -> fx.GraphModule:
    class Wrapped(nn.Module):
        def forward(self, *args):
            return function(*args)

    return sc.canonicalize(Wrapped(), *inputs)


def named(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


@pytest.fixture
def diamond() -> fx.GraphModule:
    """exp -> (sin, cos) -> add, then neg."""

    def function(x):
        y = x.exp()
        return (y.sin() + y.cos()).neg()

    return graph_of(function, torch.randn(4))


def test_the_networkx_view(diamond):
    digraph = region_graph(diamond.graph)
    nodes = named(diamond)
    assert set(digraph.successors(nodes["exp"])) == {nodes["sin"], nodes["cos"]}
    assert digraph.nodes[nodes["add"]]["target"] == "aten.add.Tensor"


def test_dominators(diamond):
    nodes = named(diamond)
    immediate = dominators(diamond.graph)
    assert immediate[nodes["add"]] is nodes["exp"]
    assert immediate[nodes["neg"]] is nodes["add"]
    assert immediate[nodes["sin"]] is nodes["exp"]


def test_dominators_of_several_inputs():
    gm = graph_of(lambda x, y: (x.exp() + y).neg(), torch.randn(4), torch.randn(4))
    nodes = named(gm)
    immediate = dominators(gm.graph)
    assert immediate[nodes["add"]] is next(iter(gm.graph.nodes))
    assert immediate[nodes["neg"]] is nodes["add"]


def test_inputs_and_outputs(diamond):
    nodes = named(diamond)
    region = Region.of([nodes["add"], nodes["sin"]])
    assert region.nodes == (nodes["sin"], nodes["add"])
    assert region.inputs == (nodes["exp"], nodes["cos"])
    assert region.outputs == (nodes["add"],)
    assert region.is_convex() and region.why_not_movable() is None


def test_a_region_that_is_not_convex_is_refused(diamond):
    nodes = named(diamond)
    region = Region.of([nodes["exp"], nodes["sin"], nodes["add"]])  # cos lies between
    assert not region.is_convex()
    assert region.why_not_movable() == "a path leaves the region and comes back to it"
    with pytest.raises(sc.RegionError, match="a path leaves the region"):
        replace_region(diamond, region, lambda b, x: b.call(aten.neg.default, x), rule="r")


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda nodes, other: [], "at least one node"),
        (lambda nodes, other: [nodes["exp"], other["exp"]], "one graph"),
        (lambda nodes, other: [nodes["output"]], "only operators"),
    ],
)
def test_what_is_no_region(diamond, pick, message):
    other = graph_of(torch.exp, torch.randn(2))
    with pytest.raises(sc.RegionError, match=message):
        Region.of(pick(named(diamond), named(other)))


def mutated_between(x):
    y = x * 2
    z = y + 1
    y.add_(1)
    return z * y


def mutated_through_a_view(x):
    y = x * 2
    z = y + 1
    y[0:1].mul_(3)
    return z * y


@pytest.mark.parametrize("function", [mutated_between, mutated_through_a_view])
def test_mutation_between_is_refused_with_the_reason(function):
    gm = graph_of(function, torch.randn(4))
    nodes = named(gm)
    inside = [nodes["add"], nodes[[n for n in nodes if n.startswith("mul")][-1]]]
    reason = Region.of(inside).why_not_movable()
    assert reason == "mul, which it reads, is written to in place"


def test_a_region_may_not_write():
    gm = graph_of(mutated_between, torch.randn(4))
    assert Region.of([named(gm)["mul"]]).why_not_movable() == "mul is written to in place"


def test_mutation_before_and_after_is_no_obstacle():
    def function(x):
        y = x * 2
        y.add_(1)
        z = (y + 1).exp()
        return z.sin(), y.mul_(2)

    gm = graph_of(function, torch.randn(4))
    nodes = named(gm)
    assert Region.of([nodes["add"], nodes["exp"]]).why_not_movable() is None


def test_a_user_in_the_middle_is_refused(diamond):
    nodes = named(diamond)
    # sin is needed by nobody else, but cos (outside) stands between exp and sin.
    with diamond.graph.inserting_before(nodes["sin"]):
        extra = diamond.graph.call_function(aten.neg.default, (nodes["exp"],))
    extra.meta["val"] = nodes["exp"].meta["val"]
    reason = Region.of([nodes["exp"], nodes["sin"]]).why_not_movable()
    assert reason == f"{extra.name} needs exp before the region ends"


def test_replace_region(diamond):
    nodes, x = named(diamond), torch.randn(4)
    expected = diamond(x)
    region = Region.of([nodes["sin"], nodes["cos"], nodes["add"]])

    def build(builder, y):
        # sin y + cos y = sqrt(2) sin(y + pi / 4)
        shifted = builder.call(aten.add.Tensor, y, torch.pi / 4)
        scale = builder.constant("scale", torch.full((4,), 2.0**0.5))
        return builder.call(aten.mul.Tensor, builder.call(aten.sin.default, shifted), scale)

    (result,) = replace_region(diamond, region, build, rule="angle sum")
    diamond.graph.lint()
    diamond.recompile()
    torch.testing.assert_close(diamond(x), expected)
    assert result.meta["val"].shape == (4,)
    assert targets(diamond) == [
        f"aten.{name}"
        for name in ("exp.default", "add.Tensor", "sin.default", "mul.Tensor", "neg.default")
    ]
    (edit,) = diamond.meta["edits"]
    assert edit.rule == "angle sum"
    assert len(edit.before) == 3 and "aten.cos" in edit.before[1]
    assert len(edit.after) == 4 and "_sparse_0_scale" in edit.after[1]
    assert diamond.meta["constants"] == ["_sparse_0_scale"]


def test_provenance_is_carried_over():
    model = nn.Sequential(nn.Linear(4, 4))
    gm = sc.canonicalize(model, torch.randn(2, 4))
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    stack = linear.meta["nn_module_stack"]
    x, weight, bias = linear.args

    def build(builder, *inputs):
        return builder.call(aten.addmm.default, bias, x, builder.call(aten.t.default, weight))

    (made,) = replace_region(gm, Region.of([linear]), build, rule="r")
    assert made.meta["nn_module_stack"] == stack


def wrong_shape(builder, y):
    builder.constant("unused", torch.zeros(3))
    return builder.call(aten.sum.default, y)


def wrong_dtype(builder, y):
    return builder.call(aten.to.dtype, y, torch.float64)


def too_many(builder, y):
    return [builder.call(aten.neg.default, y)] * 2


def fails(builder, y):
    builder.constant("unused", torch.zeros(3))
    builder.call(aten.neg.default, y)
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (wrong_shape, sc.RegionError, r"r: \(\) torch.float32 cannot stand for add"),
        (wrong_dtype, sc.RegionError, r"r: \(4,\) torch.float64 cannot stand for add"),
        (too_many, sc.RegionError, "r: 2 results for 1 outputs"),
        (fails, ZeroDivisionError, ""),
    ],
)
def test_a_failed_edit_leaves_no_trace(diamond, build, error, message):
    nodes, x = named(diamond), torch.randn(4)
    before, expected = str(diamond.graph), diamond(x)
    region = Region.of([nodes["sin"], nodes["cos"], nodes["add"]])
    with pytest.raises(error, match=message):
        replace_region(diamond, region, build, rule="r")
    assert str(diamond.graph) == before
    assert not diamond.meta.get("edits") and not diamond.meta.get("constants")
    assert not [name for name, _ in diamond.named_buffers() if "sparse" in name]
    diamond.graph.lint()
    diamond.recompile()
    assert torch.equal(diamond(x), expected)


def test_a_failed_verification_leaves_no_trace(diamond):
    def verify(region, created, results):
        assert [str(node.target) for node in created] == ["aten.neg.default"]
        raise sc.VerificationError("no")

    before = str(diamond.graph)
    with pytest.raises(sc.VerificationError):
        replace_region(
            diamond,
            Region.of([named(diamond)["sin"]]),
            lambda b, y: b.call(aten.neg.default, y),
            rule="r",
            verify=verify,
        )
    assert str(diamond.graph) == before


def test_a_graph_without_example_values_is_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.neg.default, (x,))
    graph.output(node)
    gm = fx.GraphModule({}, graph)
    with pytest.raises(sc.RegionError, match="canonicalize the graph first"):
        replace_region(gm, Region.of([node]), lambda b, x: x, rule="r")

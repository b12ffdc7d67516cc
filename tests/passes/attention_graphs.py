"""Graphs with attention in them, and whether what was found in them is what they compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from sparse_compiler.canonical import canonicalize_dynamo
from sparse_compiler.passes.attention.site import Refusal, Site, find_sites
from sparse_compiler.passes.attention.softmaxes import read_sink, read_softmax
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import to_text
from sparse_compiler.static import StaticValues


@dataclasses.dataclass
class Traced:
    """A canonical graph as the backend sees it, with the inputs of the call it came from."""

    gm: fx.GraphModule
    inputs: list[Any]
    training: bool

    def find(self) -> Iterator[Site | Refusal]:
        return find_sites(self.gm, StaticValues(self.gm, training=self.training))

    def sites(self) -> list[Site | Refusal]:
        found = list(self.find())
        for item in found:
            if isinstance(item, Refusal) and item.error is not None:
                raise item.error
        return found

    def run(self) -> list[torch.Tensor]:
        torch.manual_seed(0)  # stochastic depth
        result = fx.Interpreter(self.gm).run(*self.inputs)
        return [item for item in result if isinstance(item, torch.Tensor)]

    def values(self) -> dict[fx.Node, Any]:
        """The value of each node."""
        return _Recorder(self.gm).record(self.inputs)


class _Recorder(fx.Interpreter):
    def record(self, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
        self.found: dict[fx.Node, Any] = {}
        self.run(*inputs)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # What is written to in place later has to be kept as it was.
        self.found[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def traced(
    model: Callable[..., Any], *args: Any, training: bool = False, dynamic: bool = False, **kw: Any
) -> list[Traced]:
    """The canonical graphs of a call under ``torch.compile``."""
    found: list[Traced] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        record = Traced(canonicalize_dynamo(gm, inputs), [], training)
        found.append(record)

        def call(*values: Any) -> Any:
            record.inputs = list(values)
            return gm.forward(*values)

        return call

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kw)
    return found


def only_site(model: Callable[..., Any], *args: Any, **kw: Any) -> Site:
    """The one site of a model's only graph, checked against what the graph computes."""
    (site,) = all_sites(model, *args, **kw)
    return site


def all_sites(model: Callable[..., Any], *args: Any, **kw: Any) -> list[Site]:
    """Every site of a model's only graph, each checked; there are no refusals."""
    (record,) = traced(model, *args, **kw)
    sites = record.sites()
    for site in sites:
        assert isinstance(site, Site), site.reason
    assert_true(record, sites)
    return sites


def refusal(model: Callable[..., Any], *args: Any, **kw: Any) -> str:
    """The reason of a model's only attention not to be a site."""
    (record,) = traced(model, *args, **kw)
    (found,) = record.sites()
    assert isinstance(found, Refusal), to_text(found.score)
    return found.reason


def assert_true(record: Traced, sites: Sequence[Site]) -> None:
    """Sites say what the graph computes: its scores, and its outputs if it is made of sites."""
    dropout = any(site.dropout for site in sites)
    if not dropout:
        _assert_scores(record, sites)
        expected = record.run()
    for site in record.find():
        assert isinstance(site, Site)
        _replace(record.gm, site)
    record.gm.graph.lint()
    record.gm.recompile()
    if not dropout:
        for got, want in zip(record.run(), expected, strict=True):
            bound = 3e-2 if want.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, want, rtol=bound, atol=bound, equal_nan=True)


def _assert_scores(record: Traced, sites: Sequence[Site]) -> None:
    """Each written-out softmax sees the values of its site's expression."""
    values = record.values()
    for site in sites:
        softmax = read_softmax(site.node)
        if softmax is None:
            continue
        want = values[softmax.scores].float()
        sink = read_sink(softmax) if site.sink is not None else None
        if sink is not None:
            want = want[..., 1:] if sink.first else want[..., :-1]
        builder = _Eager(values)
        q, k = site.q(builder), site.k(builder)
        got = _scores(site, q, k, [leaf.build(builder) for leaf in site.leaves], builder)
        if softmax.dim != want.dim() - 1:
            continue
        if site.empty_row == "zero":  # a fill may have become one that leaves rows empty
            want, got = (x.masked_fill(x < -1e30, -math.inf) for x in (want, got))
        bound = _bound(site)
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=bound, atol=bound)


def _bound(site: Site) -> float:
    return 6e-2 if site.dtype is torch.bfloat16 else 1e-5


class _Eager:
    """Runs what a ``Builder`` would make nodes of: its nodes are tensors."""

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self._values = values

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = fx.node.map_arg((args, kwargs), lambda node: self._values[node])
        args = pytree.tree_map(lambda x: x.value if isinstance(x, _Value) else x, args)
        return _Value(target(*args, **kwargs))

    def value(self, item: Any) -> Any:
        return item.value if isinstance(item, _Value) else self._values[item]


class _Value:
    """A tensor that answers what builders ask of nodes."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.meta = {"val": value}


def _scores(site: Site, q: Any, k: Any, leaves: Sequence[Any], eager: _Eager) -> torch.Tensor:
    integers = [int(eager.value(integer.build(eager))) for integer in site.integers]
    return dense_scores(
        site, eager.value(q), eager.value(k), [eager.value(x) for x in leaves], integers
    )


def dense_scores(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    integers: Sequence[int],
) -> torch.Tensor:
    """The site's expression at every (b, h, q, k)."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.float() @ k.transpose(-1, -2)
    return evaluate(site.score, s, leaves, integers, *s.shape)


def _replace(gm: fx.GraphModule, site: Site) -> None:
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        leaves: list[torch.Tensor],
        integers: list[int],
        sink: torch.Tensor | None,
    ) -> torch.Tensor:
        shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        if isinstance(q, FakeTensor):
            return q.new_empty(shape).transpose(1, 2)
        assert tuple(q.shape) == tuple(map(int, (site.batch, site.heads, site.queries, q.shape[3])))
        assert k.shape[:3] == v.shape[:3] == (q.shape[0], int(site.kv_heads), int(site.keys))
        scores = dense_scores(site, q, k, leaves, integers)
        if sink is not None:
            columns = [scores, sink.float().expand(scores.shape[:3]).unsqueeze(-1)]
            weights = torch.cat(columns, -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        if site.empty_row == "zero":
            weights = weights.masked_fill((scores == -math.inf).all(-1, True), 0)
        v = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
        out = (weights @ v).to(q.dtype)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
        leaves = [leaf.build(builder) for leaf in site.leaves]
        integers = [integer.build(builder) for integer in site.integers]
        operands = site.q(builder), site.k(builder), site.v(builder)
        result = builder.call(attention, *operands, leaves, integers, site.sink_node(builder))
        return site.restore(builder, result)

    replace_region(gm, Region.of(site.region), build, rule="test", fresh=True)


class Heads(nn.Module):
    """A function of queries, keys and values [2, 4, 10, 8], with the projections around it.

    Args:
        attend: called with q, k, v and what ``forward`` is given besides.
        kv_heads: heads of keys and values.
        keys: how many, if not as many as queries.
    """

    def __init__(self, attend: Callable[..., torch.Tensor], kv_heads: int = 4) -> None:
        super().__init__()
        self.attend = attend
        self.kv_heads = kv_heads

    def forward(self, x: torch.Tensor, *rest: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        wide = x.view(batch, length, 4, 8).transpose(1, 2)
        few = wide[:, : self.kv_heads]
        out = self.attend(wide * 1.25 + 0.5, few.sin(), few.cos(), *rest, **named)
        return out.transpose(1, 2).flatten(2).tanh()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X = noise(2, 10, 32)

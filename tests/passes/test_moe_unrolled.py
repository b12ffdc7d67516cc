"""Experts that are modules of their own, each run on every token: loops that a trace unrolls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_sites import ROUTED, apply, check, found_in, refusals, results_for, the_site
from torch import nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.dispatch import MoeProblem
from sparse_compiler.formats.cost import AlwaysSelector, Decision
from sparse_compiler.passes import Moe, PassContext
from sparse_compiler.passes.moe import unrolled
from sparse_compiler.static import StaticValues

E, K, D, H, T = 5, 2, 6, 8, 9
SOFT = "every expert has a weight for every token: the gates are soft"


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate, approximate="tanh") * up)


def mlp(hidden: int = H, act: type[nn.Module] = nn.GELU, out: int = D) -> nn.Module:
    return nn.Sequential(nn.Linear(D, hidden), act(), nn.Dropout(0.1), nn.Linear(hidden, out))


class Base(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = mlp, experts: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, experts)
        self.experts = nn.ModuleList(make() for _ in range(experts))
        self.shared = make()
        self.eval()

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, ids = torch.topk(self.router(x), K, dim=-1)
        return values.softmax(-1), ids

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.route(x)
        shape = (*x.shape[:-1], len(self.experts))
        return torch.zeros(shape, dtype=x.dtype).scatter(-1, ids, weights)


class Spelled(Base):
    def __init__(
        self,
        forward: Callable[[Base, torch.Tensor], torch.Tensor],
        make: Callable[[], nn.Module] = mlp,
        experts: int = E,
    ) -> None:
        super().__init__(make, experts)
        self.spelled = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelled(self, x)


def stacked(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (y * m.gates(x).unsqueeze(-1)).sum(dim=1)


def stacked_last(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = torch.stack([expert(x) for expert in m.experts], dim=-1)
    return (y @ m.gates(x).unsqueeze(-1)).squeeze(-1)


def concatenated(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat([expert(x).unsqueeze(0) for expert in m.experts])
    return torch.einsum("etd,te->td", y, m.gates(x))


def columns(m: Base, x: torch.Tensor) -> torch.Tensor:
    gates, out = m.gates(x), torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out += expert(x) * gates[..., i : i + 1]
    return out


def selected(m: Base, x: torch.Tensor) -> torch.Tensor:
    gates = m.gates(x)
    return sum(gates[..., i].unsqueeze(-1) * e(x) for i, e in enumerate(m.experts))  # type: ignore[return-value]


def unbound(m: Base, x: torch.Tensor) -> torch.Tensor:
    terms = [g[..., None] * e(x) for g, e in zip(m.gates(x).unbind(-1), m.experts, strict=True)]
    return sum(terms[1:], terms[0])


def split(m: Base, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor | None = None
    for gate, expert in zip(m.gates(x).split(1, dim=-1), m.experts, strict=True):
        part = expert(x) * gate
        out = part if out is None else out + part
    assert out is not None
    return out


def compared(m: Base, x: torch.Tensor) -> torch.Tensor:
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out = out + expert(x) * ((ids == i) * weights).sum(-1, keepdim=True)
    return out


def compared_in_place(m: Base, x: torch.Tensor) -> torch.Tensor:
    weights, ids = m.route(x)
    out = torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        weight = torch.where(ids == i, weights, 0.0).sum(-1)
        out.add_(expert(x).mul_(weight.unsqueeze(-1)))
    return out


def chosen(m: Base, x: torch.Tensor) -> torch.Tensor:
    best, out = m.router(x).argmax(-1), torch.zeros_like(x)
    for i, expert in enumerate(m.experts):
        out = out + torch.where((best == i).unsqueeze(-1), expert(x), 0.0)
    return out


def backwards(m: Base, x: torch.Tensor) -> torch.Tensor:
    gates, out = m.gates(x), torch.zeros_like(x)
    for i in reversed(range(len(m.experts))):
        out = m.experts[i](x) * gates[..., i : i + 1] + out
    return out


def with_shared(m: Base, x: torch.Tensor) -> torch.Tensor:
    gates, out = m.gates(x), m.shared(x)
    for i, expert in enumerate(m.experts):
        out = out + expert(x) * gates[..., i : i + 1]
    return out + x


def added_to_shared(m: Base, x: torch.Tensor) -> torch.Tensor:
    gates, out = m.gates(x), m.shared(x)
    for i, expert in enumerate(m.experts):
        out += expert(x) * gates[..., i : i + 1]
    return out


SPELLINGS = (
    stacked, stacked_last, concatenated, columns, selected, unbound, split, compared,
    compared_in_place, chosen, backwards, with_shared, added_to_shared,
)  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(spelled: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
    site = check(unrolled.find, Spelled(spelled), torch.randn(T, D), runs=[(torch.randn(T, D),)])
    assert (site.form, site.experts, site.tokens) == ("dense", E, T)
    assert site.choices == (1 if spelled is chosen else K)
    assert len(site.inner) == len(site.outer) == E


@pytest.mark.parametrize("make", [mlp, Glu, Fused], ids=["mlp", "glu", "fused"])
def test_kinds_of_experts(make: Callable[[], nn.Module]) -> None:
    for spelled in (columns, stacked):
        site = check(unrolled.find, Spelled(spelled, make), torch.randn(T, D))
        assert len(site.inner) == (E if make is mlp else 2 * E)
        assert bool(site.inner_bias) == (make is not Glu)


def test_batches_of_tokens() -> None:
    for spelled in (columns, selected, compared, with_shared):
        site = check(unrolled.find, Spelled(spelled), torch.randn(2, 4, D))
        assert site.tokens == 8


def test_one_token_and_none() -> None:
    for spelled in (stacked, columns, compared):
        check(unrolled.find, Spelled(spelled), torch.randn(1, D))
        check(unrolled.find, Spelled(spelled), torch.randn(0, D))


def test_each_token_brings_its_expert() -> None:
    class Assigned(Base):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                out = out + expert(x) * (index == i).view(-1, 1)
            return out

    index = torch.randint(0, E, (T,))
    nobody = (torch.randn(T, D), torch.full((T,), -1))
    beyond = (torch.randn(T, D), index + 2)
    site = check(unrolled.find, Assigned(), torch.randn(T, D), index, runs=[nobody, beyond])
    assert site.choices == 1


@given(
    tokens=st.integers(1, 6),
    experts=st.integers(3, 6),
    form=st.sampled_from([columns, compared, stacked]),
    act=st.sampled_from([nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus]),
    skew=st.floats(0, 20),
)
@settings(max_examples=12, deadline=None)
def test_sizes_activations_and_loads(
    tokens: int,
    experts: int,
    form: Callable[[Base, torch.Tensor], torch.Tensor],
    act: type[nn.Module],
    skew: float,
) -> None:
    model = Spelled(form, lambda: mlp(act=act), experts)
    with torch.no_grad():
        model.router.bias[0] = skew  # one expert for all, others empty
    check(unrolled.find, model, torch.randn(tokens, D))


def test_dynamic_number_of_tokens() -> None:
    for spelled in (columns, compared, stacked, added_to_shared):
        assert results_for(unrolled.find, Spelled(spelled), T, (2, 5, 40)) == [2, 5, 40]


def test_time_grows_with_the_nodes_and_no_faster() -> None:
    times = {}
    for experts in (16, 128):
        gm = canonicalize(Spelled(columns, experts=experts), torch.randn(T, D))
        static = StaticValues(gm, training=False)
        best = []
        for _ in range(3):
            start = time.perf_counter()
            site = the_site(list(unrolled.find(gm, static)))
            best.append(time.perf_counter() - start)
        times[experts] = min(best)
    assert site.experts == 128
    apply(gm, site)
    assert sum(node.target in ROUTED for node in gm.graph.nodes) == 1
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.gelu.default]
    assert times[128] < 24 * times[16]  # 8 times the nodes


class Soft(Base):
    def gates(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x).softmax(-1)


@pytest.mark.parametrize("spelled", [stacked, stacked_last, columns, selected, with_shared])
def test_soft_gates_are_refused(spelled: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
    class Model(Soft):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return spelled(self, x)

    assert refusals(unrolled.find, Model(), torch.randn(T, D)) == [SOFT]


class Mixed(Base):
    """Experts of which the last is another one."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.experts[-1] = last
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return stacked(self, x)


def test_experts_that_are_not_alike_are_refused() -> None:
    (reason,) = refusals(unrolled.find, Mixed(mlp(act=nn.ReLU)), torch.randn(T, D))
    assert reason == "its experts are not alike: they have different activations"
    (reason,) = refusals(unrolled.find, Mixed(mlp(hidden=H + 1)), torch.randn(T, D))
    assert reason == "its experts are not alike: they differ in size"


def test_dropout_in_training_is_refused() -> None:
    model = Spelled(stacked).train()
    (reason,) = refusals(unrolled.find, model, torch.randn(T, D))
    assert "dropout in training is random" in reason


def test_experts_of_their_own_tokens_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([expert(x + i) for i, expert in enumerate(m.experts)], dim=1)
        return (y * m.gates(x).unsqueeze(-1)).sum(dim=1)

    (reason,) = refusals(unrolled.find, Spelled(forward), torch.randn(T, D))
    assert reason == "its experts do not read the same tokens"


def test_experts_of_three_layers_are_refused() -> None:
    deep = lambda: nn.Sequential(mlp(), nn.ReLU(), nn.Linear(D, D))  # noqa: E731
    (reason,) = refusals(unrolled.find, Spelled(stacked, deep), torch.randn(T, D))
    assert reason == "an expert has more than two linear layers one behind the other"


def test_norms_inside_of_experts_are_refused() -> None:
    normed = lambda: nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D))  # noqa: E731
    (reason,) = refusals(unrolled.find, Spelled(stacked, normed), torch.randn(T, D))
    assert "not pointwise" in reason
    assert "layer_norm" in reason


def test_gates_of_other_experts_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        gates = m.gates(x)
        return sum(gates[:, [0, 1, 2, 3, 3][i], None] * e(x) for i, e in enumerate(m.experts))  # type: ignore[return-value]

    (reason,) = refusals(unrolled.find, Spelled(forward), torch.randn(T, D))
    assert reason == "two of its experts have the same gate, or one has none"


def test_experts_that_read_what_others_wrote_are_no_mixture() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        gates = m.gates(x)
        out = x
        for i, expert in enumerate(m.experts):
            out += expert(x) * gates[..., i : i + 1]
        return out

    assert found_in(unrolled.find, Spelled(forward), torch.randn(T, D))[1] == []


def test_results_added_to_an_input_in_place_are_refused() -> None:
    class Added(Base):
        def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            gates = self.gates(x)
            for i, expert in enumerate(self.experts):
                out += expert(x) * gates[..., i : i + 1]
            return out * 2

    (reason,) = refusals(unrolled.find, Added(), torch.randn(T, D), torch.randn(T, D))
    assert reason == "the experts' results are added to out in place"


def test_rotary_embeddings_are_no_mixture() -> None:
    class Rotary(Base):
        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            q = self.shared(F.layer_norm(self.experts[0](x), (D,)))
            turned = torch.cat([-q[..., D // 2 :], q[..., : D // 2]], dim=-1)
            return q * cos + turned * sin

    inputs = (torch.randn(T, D), torch.randn(T, D), torch.randn(T, D))
    assert found_in(unrolled.find, Rotary(), *inputs)[1] == []


def test_residual_layers_are_no_mixture() -> None:
    class Plain(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for expert in self.experts:
                x = x + expert(x)
            return x + self.shared(x) * self.router(x).sum(-1, keepdim=True)

    assert found_in(unrolled.find, Plain(), torch.randn(T, D))[1] == []


def test_a_mixture_that_the_model_adds_up_is_named_after_its_experts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Spelled(stacked), Spelled(stacked)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    for model, names in ((Spelled(stacked), ["experts"]), (Net(), ["first", "second"])):
        graph = canonicalize(model.double().eval(), torch.randn(5, D, dtype=torch.float64))
        context = PassContext(selector=AlwaysSelector())
        Moe(context)(graph)
        assert [rewrite.target for rewrite in context.rewrites] == names


def test_experts_with_many_zeros_are_left_to_the_sparse_kernels() -> None:
    for kept, applied in ((0.1, False), (0.6, True)):
        model = Spelled(columns)
        with torch.no_grad():
            for expert in model.experts:
                for layer in (expert[0], expert[3]):
                    layer.weight.mul_(torch.rand_like(layer.weight) < kept)
        model.requires_grad_(False)
        graph = canonicalize(model, torch.randn(T, D))
        context = PassContext(selector=AlwaysSelector())
        Moe(context)(graph)
        (rewrite,) = context.rewrites
        assert rewrite.applied is applied
        assert applied or "zeros: skipping those on every token saves more" in rewrite.reason


@dataclasses.dataclass(frozen=True)
class SlowAt(AlwaysSelector):
    """Refuses one number of tokens."""

    tokens: int
    asked: list[int] = dataclasses.field(default_factory=list)

    def dispatch(self, problem: MoeProblem) -> Decision:
        self.asked.append(problem.tokens)
        if problem.tokens == self.tokens:
            return Decision(None, f"slower at {self.tokens} tokens", 0.5)
        return Decision("routed", f"faster at {problem.tokens}", 2.0 + problem.tokens)


@pytest.mark.parametrize("tokens", [128, None])
def test_any_number_of_tokens_is_judged_at_the_worst(tokens: int | None) -> None:
    dims = ({0: torch.export.Dim("T", min=2)},)
    x = torch.randn(T, D)
    graph = canonicalize(
        torch.export.export(Spelled(columns), (x,), dynamic_shapes=dims, strict=False)
    )
    context = PassContext(selector=SlowAt(tokens or -1))
    Moe(context)(graph)
    (rewrite,) = context.rewrites
    assert rewrite.applied is (tokens is None)
    assert ("slower at 128 tokens" if tokens else "faster at 1") in rewrite.reason
    assert context.selector.asked == [1, T, 16, 128] + ([] if tokens else [1024])
    fixed = PassContext(selector=SlowAt(tokens or -1))
    Moe(fixed)(canonicalize(Spelled(columns), x))
    assert fixed.selector.asked == [T] and fixed.rewrites[0].applied

"""Stacked experts that run on every token: what is rewritten, and why something is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from moe_sites import ROUTED, apply, check, found_in, refusals, results_for, the_site
from torch import nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext
from sparse_compiler.passes.moe import Moe, dense, unrolled
from sparse_compiler.passes.moe.site import Site
from sparse_compiler.static import StaticValues

E, K, D, H, OUT = 5, 2, 6, 8, 7
T = 9


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


class Base(nn.Module):
    """A router and stacked weights, [E, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, E)
        self.up, self.gate, self.down = weight(E, H, D), weight(E, H, D), weight(E, OUT, H)
        self.both = weight(E, 2 * H, D)
        self.up_bias, self.down_bias = weight(E, H), weight(E, OUT)
        self.both_bias = weight(E, 2 * H)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.router(x)
        values, ids = logits.topk(K, dim=-1)
        return torch.zeros_like(logits).scatter(-1, ids, values.softmax(-1))


class Spelled(Base):
    def __init__(self, forward: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.spelled = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelled(self, x)


def einsum(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = F.gelu(torch.einsum("td,ehd->teh", x, m.up))
    y = torch.einsum("teh,eoh->teo", h, m.down)
    return torch.einsum("teo,te->to", y, m.gates(x))


def einsum_experts_first(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = F.relu(torch.einsum("td,ehd->eth", x, m.up) + m.up_bias[:, None])
    y = torch.einsum("eth,eoh->eto", h, m.down) + m.down_bias.unsqueeze(1)
    return torch.einsum("eto,te->to", y, m.gates(x))


def bmm(m: Base, x: torch.Tensor) -> torch.Tensor:
    rows = x.unsqueeze(0).expand(E, -1, -1)
    h = torch.tanh(torch.bmm(rows, m.up.transpose(1, 2)))
    y = torch.bmm(h, m.down.transpose(1, 2))
    return (y * m.gates(x).t().unsqueeze(-1)).sum(dim=0)


def baddbmm(m: Base, x: torch.Tensor) -> torch.Tensor:
    rows = x.repeat(E, 1, 1)
    h = F.silu(torch.baddbmm(m.up_bias[:, None], rows, m.up.mT))
    y = torch.baddbmm(m.down_bias[:, None], h, m.down.mT)
    return (m.gates(x).t()[..., None] * y).sum(0)


def matmul(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = F.silu(x @ m.gate.mT) * (x @ m.up.mT)  # x is broadcast over the experts
    y = h @ m.down.mT
    return (y.permute(1, 0, 2) * m.gates(x).unsqueeze(2)).sum(1)


def one_product(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = F.gelu(F.linear(x, m.up.reshape(E * H, D), m.up_bias.flatten()).view(-1, E, H))
    y = torch.einsum("teh,eoh->teo", h, m.down)
    return torch.bmm(m.gates(x).unsqueeze(1), y).squeeze(1)


def chunked(m: Base, x: torch.Tensor) -> torch.Tensor:
    gate, up = (torch.einsum("td,ehd->teh", x, m.both) + m.both_bias).chunk(2, -1)
    y = torch.einsum("teh,eoh->teo", F.silu(gate) * up, m.down)
    return (y * m.gates(x)[..., None]).sum(-2)


def interleaved(m: Base, x: torch.Tensor) -> torch.Tensor:
    both = torch.einsum("td,ehd->eth", x, m.both) + m.both_bias[:, None, :]
    gate, up = both[..., ::2].clamp(max=2.0), both[..., 1::2].clamp(-2.0, 2.0)
    y = ((up + 1) * gate * torch.sigmoid(1.7 * gate)) @ m.down.mT
    return (y * m.gates(x).t()[..., None]).sum(0)


def glu(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = F.glu(torch.einsum("td,ehd->teh", x, m.both))
    return (torch.einsum("teh,eoh->teo", h, m.down) * m.gates(x)[..., None]).sum(1)


def split_by_view(m: Base, x: torch.Tensor) -> torch.Tensor:
    both = torch.einsum("td,ehd->teh", x, m.both).view(-1, E, 2, H)
    gate, up = both.unbind(2)
    return (torch.einsum("teh,eoh->teo", F.silu(gate) * up, m.down) * m.gates(x)[..., None]).sum(1)


def scaled(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("teh,eoh->teo", torch.einsum("td,ehd->teh", x, m.up).relu(), m.down)
    return (y * m.gates(x).unsqueeze(-1) * 2.5 * x.mean(-1)[:, None, None].sigmoid()).sum(1)


def chosen(m: Base, x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("teh,eoh->teo", torch.einsum("td,ehd->teh", x, m.up).relu(), m.down)
    best = m.router(x).argmax(-1)
    return torch.where(F.one_hot(best, E).bool().unsqueeze(-1), y, 0.0).sum(1)


def in_place(m: Base, x: torch.Tensor) -> torch.Tensor:
    h = torch.einsum("td,ehd->teh", x, m.up)
    h += m.up_bias
    y = torch.einsum("teh,eoh->teo", h.relu_(), m.down)
    y *= m.gates(x).unsqueeze(-1)
    return y.sum(1)


SPELLINGS = (
    einsum, einsum_experts_first, bmm, baddbmm, matmul, one_product, chunked, interleaved, glu,
    split_by_view, scaled, chosen, in_place,
)  # fmt: skip


@pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(spelled: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
    site = check(dense.find, Spelled(spelled), torch.randn(T, D), runs=[(torch.randn(T, D),)])
    assert (site.form, site.experts, site.tokens) == ("dense", E, T)
    assert site.choices == (1 if spelled is chosen else K)
    assert (site.features, site.hidden, site.out_features) == (D, H, OUT)
    assert not site.gates_on_input


@pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda f: f.__name__)
def test_one_token_and_none(spelled: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
    model = Spelled(spelled)
    check(dense.find, model, torch.randn(1, D))
    check(dense.find, model, torch.randn(0, D))


def test_batches_of_tokens() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsd,ehd->bseh", x, m.up))
        y = torch.einsum("bseh,eoh->bseo", h, m.down)
        return (y * m.gates(x).unsqueeze(-1)).sum(2)

    site = check(dense.find, Spelled(forward), torch.randn(2, 3, D))
    assert site.tokens == 6


def test_gates_of_whole_sequences() -> None:
    """One choice for all tokens of a sequence."""

    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsd,ehd->bseh", x, m.up))
        y = torch.einsum("bseh,eoh->bseo", h, m.down)
        return torch.einsum("bseo,be->bso", y, m.gates(x.mean(1)))

    check(dense.find, Spelled(forward), torch.randn(3, 4, D))


def test_results_in_another_order() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsd,ehd->ebsh", x, m.up))
        y = torch.einsum("ebsh,eoh->ebso", h, m.down)
        return torch.einsum("ebso,bse->obs", y, m.gates(x)).contiguous()

    check(dense.find, Spelled(forward), torch.randn(2, 3, D))


def test_sums_in_float32_of_bfloat16() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("teh,eoh->teo", torch.einsum("td,ehd->teh", x, m.up).relu(), m.down)
        return (y.float() * m.gates(x).float().unsqueeze(-1)).sum(1).to(x.dtype)

    model = Spelled(forward).bfloat16()
    x = torch.randn(T, D, dtype=torch.bfloat16)
    gm, found = found_in(dense.find, model, x)
    site = the_site(found)
    assert site.dtype is torch.bfloat16
    apply(gm, site)
    torch.testing.assert_close(gm(x), model(x), rtol=3e-2, atol=3e-2)


def test_dynamic_number_of_tokens() -> None:
    for spelled in (einsum, bmm, matmul, one_product, interleaved):
        assert results_for(dense.find, Spelled(spelled), T, (2, 5, 40)) == [2, 5, 40]


class OnInput(Base):
    """Llama 4: the tokens are weighted, and every expert is zero for zeros."""

    bias = False
    act: Callable[[torch.Tensor], torch.Tensor] = staticmethod(F.silu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.repeat(E, 1) * self.gates(x).transpose(0, 1).reshape(-1, 1)
        both = torch.bmm(rows.view(E, -1, D), self.both.mT)
        if self.bias:
            both = both + self.both_bias[:, None]
        gate, up = both.chunk(2, dim=-1)
        y = torch.bmm(self.act(gate) * up, self.down.mT)
        return y.view(-1, OUT).reshape(E, -1, OUT).sum(dim=0)


def test_weights_on_the_input() -> None:
    site = check(dense.find, OnInput(), torch.randn(T, D))
    assert site.gates_on_input
    assert "weights on the input" in site.spelling


def test_weights_on_the_input_of_experts_with_biases_are_refused() -> None:
    model = OnInput()
    model.bias = True
    (reason,) = refusals(dense.find, model, torch.randn(T, D))
    assert "result for zeros is not zero: it has biases" in reason


def test_weights_on_the_input_of_another_activation_are_refused() -> None:
    class Cosine(OnInput):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.repeat(E, 1) * self.gates(x).transpose(0, 1).reshape(-1, 1)
            h = torch.exp(torch.bmm(rows.view(E, -1, D), self.up.mT))
            return torch.bmm(h, self.down.mT).sum(dim=0)

    (reason,) = refusals(dense.find, Cosine(), torch.randn(T, D))
    assert "result for zeros is not zero: its activation" in reason


def test_llama4() -> None:
    llama = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    configuration = pytest.importorskip("transformers.models.llama4.configuration_llama4")
    for choices in (1, 2):
        config = configuration.Llama4TextConfig(
            hidden_size=16,
            intermediate_size=24,
            intermediate_size_mlp=24,
            num_local_experts=4,
            num_experts_per_tok=choices,
        )
        model = llama.Llama4TextMoe(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        site = check(dense.find, model, torch.randn(2, 5, 16))
        assert (site.choices, site.experts, site.gates_on_input) == (choices, 4, True)


class Soft(Base):
    def gates(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x).softmax(-1)


@pytest.mark.parametrize("spelled", [einsum, bmm, matmul, chunked], ids=lambda f: f.__name__)
def test_soft_gates_are_refused(spelled: Callable[[Base, torch.Tensor], torch.Tensor]) -> None:
    class Model(Soft):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return spelled(self, x)

    assert refusals(dense.find, Model(), torch.randn(T, D)) == [
        "every expert has a weight for every token: the gates are soft"
    ]


def test_experts_that_are_used_otherwise_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = F.gelu(torch.einsum("td,ehd->teh", x, m.up))
        y = torch.einsum("teh,eoh->teo", h, m.down)
        return torch.einsum("teo,te->to", y, m.gates(x)), h.mean()

    assert refusals(dense.find, Spelled(forward), torch.randn(T, D)) == [
        "what an expert computes is used elsewhere as well"
    ]


def test_gates_that_are_written_to_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        gates = m.gates(x)
        h = F.gelu(torch.einsum("td,ehd->teh", x, m.up))
        y = torch.einsum("teh,eoh->teo", h, m.down) * gates.unsqueeze(-1)
        gates.add_(1.0)
        return y.sum(1)

    (reason,) = refusals(dense.find, Spelled(forward), torch.randn(T, D))
    assert "is written to in place" in reason


def test_norms_inside_of_experts_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(torch.einsum("td,ehd->teh", x, m.up), (H,))
        y = torch.einsum("teh,eoh->teo", h, m.down)
        return torch.einsum("teo,te->to", y, m.gates(x))

    (reason,) = refusals(dense.find, Spelled(forward), torch.randn(T, D))
    assert "not pointwise" in reason
    assert "layer_norm" in reason


def test_experts_of_three_layers_are_refused() -> None:
    def forward(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = torch.einsum("td,ehd->teh", x, m.up).relu()
        h = torch.einsum("teh,egh->teg", h, m.up @ m.up.mT).relu()
        y = torch.einsum("teh,eoh->teo", h, m.down)
        return torch.einsum("teo,te->to", y, m.gates(x))

    assert refusals(dense.find, Spelled(forward), torch.randn(T, D)) == [
        "an expert has more than two linear layers one behind the other"
    ]


def test_biases_of_tokens_are_refused() -> None:
    class Positions(Base):
        def __init__(self) -> None:
            super().__init__()
            self.position = weight(T, 1, H)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.gelu(torch.einsum("td,ehd->teh", x, self.up) + self.position)
            return torch.einsum("teo,te->to", torch.einsum("teh,eoh->teo", h, self.down),
                                self.gates(x))  # fmt: skip

    (reason,) = refusals(dense.find, Positions(), torch.randn(T, D))
    assert reason == "an expert adds another bias to each token"


def test_axes_of_one_size_are_not_confused() -> None:
    """As many sequences as tokens in each: only the order of the axes tells them apart."""

    def gated(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsd,ehd->bseh", x, m.up))
        y = torch.einsum("bseh,eoh->bseo", h, m.down)
        return torch.einsum("bseo,bse->bso", y, m.gates(x.transpose(0, 1)))

    def turned(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.einsum("bsd,ehd->bseh", x, m.up))
        y = torch.einsum("bseh,eoh->bseo", h, m.down)
        return torch.einsum("bseo,bse->sbo", y, m.gates(x))

    def crossed(m: Base, x: torch.Tensor) -> torch.Tensor:
        gate = torch.einsum("bsd,ehd->bseh", x.transpose(0, 1), m.gate)
        h = F.silu(gate) * torch.einsum("bsd,ehd->bseh", x, m.up)
        y = torch.einsum("bseh,eoh->bseo", h, m.down)
        return torch.einsum("bseo,bse->bso", y, m.gates(x))

    x = torch.randn(E, E, D)
    check(dense.find, Spelled(gated), x)
    check(dense.find, Spelled(turned), x)
    assert not any(isinstance(item, Site) for item in found_in(dense.find, Spelled(crossed), x)[1])


def test_products_with_sizes_are_read() -> None:
    class Sized(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * x.shape[0]).sum(0) + (x * x.mean()).sum(0)

    program = torch.export.export(
        Sized(),
        (torch.randn(T, D),),
        dynamic_shapes=({0: torch.export.Dim("T", min=2)},),
        strict=False,
    )
    gm = canonicalize(program)
    static = StaticValues(gm, training=False)
    assert [*dense.find(gm, static), *unrolled.find(gm, static)] == []


def test_what_is_no_mixture_is_not_mentioned() -> None:
    class Plain(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.down[0] @ F.gelu(self.up[0] @ x.t())
            heads = torch.einsum("td,ehd->teh", x, self.up)
            return y.t() + (heads * self.gates(x)[..., None]).sum(1)[:, :OUT] + x.sum(-1)[:, None]

    for find in (dense.find, unrolled.find):
        _, found = found_in(find, Plain(), torch.randn(T, D))
        assert found == []


def test_no_dense_product_is_left() -> None:
    gm, found = found_in(dense.find, Spelled(einsum), torch.randn(T, D))
    site = the_site(found)
    assert isinstance(site, Site)
    apply(gm, site)
    assert sum(node.target in ROUTED for node in gm.graph.nodes) == 1
    assert not [node for node in gm.graph.nodes if node.target is torch.ops.aten.einsum.default]


@pytest.mark.parametrize("model", [Spelled(einsum), Spelled(interleaved), OnInput()])
def test_the_pass_verifies_its_rewrite(model: nn.Module) -> None:
    """Ids and gates belong together: they are computed, from tokens that are random."""
    options = Options(verify=True, on_error="raise")
    context = PassContext(options=options, selector=AlwaysSelector())
    x = torch.randn(T, D)
    gm = canonicalize(model, x)
    Moe(context)(gm)
    (rewrite,) = context.rewrites
    assert rewrite.applied, rewrite.reason
    assert rewrite.reason.startswith(f"{T * K} of {T * E} pairs are computed")
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_part_turned_against_the_other_is_left() -> None:
    """As many tokens as hidden features: shapes do not tell one from the other."""

    def turned(m: Base, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(x @ m.gate.mT) * (x @ m.up.mT).transpose(1, 2)
        return ((h @ m.down.mT) * m.gates(x).t()[..., None]).sum(0)

    assert found_in(dense.find, Spelled(turned), torch.randn(H, D))[1] == []

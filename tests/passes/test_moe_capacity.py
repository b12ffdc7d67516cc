"""One-hot dispatch with a capacity: the same tokens are dropped, and no [T, E, C] is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_sites import apply, check, compare, found_in, refusals, results_for, the_site
from torch import nn

from sparse_compiler.passes.moe import capacity, dense, unrolled
from sparse_compiler.passes.moe.slots import UNPROVED

E, D, H = 4, 6, 8


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


class Base(nn.Module):
    """A router, stacked experts [E, in, out], and slots for each."""

    def __init__(self, slots: int = 5, k: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(D, E)
        self.slots, self.k = slots, k
        self.up, self.down = weight(E, D, H), weight(E, H, D)
        self.up_bias, self.down_bias = weight(E, 1, H), weight(E, 1, D)

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(torch.baddbmm(self.up_bias, x, self.up))
        return torch.baddbmm(self.down_bias, h, self.down)


class Switch(Base):
    """One choice; the position is the running count of its expert."""

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        p = self.router(x).softmax(-1)
        gate, index = p.max(-1)
        mask = F.one_hot(index, E)
        position = (mask.cumsum(0) - 1) * mask
        mask = mask * (position < self.slots)
        place = F.one_hot((position * mask).sum(-1), self.slots)
        return gate[:, None, None] * mask[:, :, None] * place[:, None, :]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        combine = self.combine(x)
        dispatch = (combine != 0).to(x.dtype)
        y = self.experts(torch.einsum("tec,td->ecd", dispatch, x))
        return torch.einsum("tec,ecd->td", combine, y)


class GShard(Base):
    """Two choices, the second behind the first; ``count`` says what is counted as the first."""

    count = "all"

    def places(self, mask: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return F.one_hot((position * mask).sum(-1).long(), self.slots).to(mask.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.router(x).softmax(-1)
        mask1 = F.one_hot(p.argmax(-1), E).to(x.dtype)
        rest = p.masked_fill(mask1.bool(), 0.0)
        mask2 = F.one_hot(rest.argmax(-1), E).to(x.dtype)
        position1 = mask1.cumsum(0) - mask1
        kept1 = mask1 * (position1 < self.slots)
        before = {"all": mask1, "kept": kept1, "none": mask1 * 0}[self.count]
        position2 = mask2.cumsum(0) - mask2 + before.sum(0, keepdim=True)
        kept2 = mask2 * (position2 < self.slots)
        gate1, gate2 = (p * kept1).sum(-1), (p * kept2).sum(-1)
        total = (gate1 + gate2).clamp(min=1e-9)
        first = torch.einsum("te,tc->tec", (gate1 / total)[:, None] * kept1,
                             self.places(kept1, position1))  # fmt: skip
        second = torch.einsum("te,tc->tec", (gate2 / total)[:, None] * kept2,
                              self.places(kept2, position2))  # fmt: skip
        combine = first + second
        y = self.experts(torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x))
        return torch.einsum("tec,ecd->td", combine, y)


class Ranked(Base):
    """nanoMoE: ranks over choices, then tokens; capacity a number that T decides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        tokens = batch * length
        slots = max(2 * math.floor(self.k * 0.8 * tokens / E / 2), 2)
        logits = self.router(x)
        values, ids = logits.topk(self.k, dim=-1)
        p = torch.full_like(logits, -math.inf).scatter_(-1, ids, values).softmax(-1)
        mask = F.one_hot(ids, E).view(tokens, self.k, E).permute(1, 0, 2)
        rank = mask.reshape(self.k * tokens, E).cumsum(0) - 1
        rank = rank.reshape(self.k, tokens, E)
        mask = mask * torch.lt(rank, slots)
        place = F.one_hot((mask * rank).sum(-1), slots)
        weights = mask * p.view(tokens, E)[None]
        combine = (weights.unsqueeze(3) * place.unsqueeze(2)).sum(0)
        flat = x.view(tokens, D)
        inputs = combine.bool().permute(1, 2, 0).type_as(flat) @ flat
        y = self.experts(inputs)
        return (combine.view(tokens, -1) @ y.view(-1, D)).view(batch, length, D)


class Grouped(Base):
    """Slots for each sequence of a batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p = self.router(x).softmax(-1)
        mask = F.one_hot(p.argmax(-1), E).to(x.dtype)
        position = mask.cumsum(1) - mask
        kept = mask * (position < self.slots)
        place = F.one_hot((position * kept).sum(-1).long(), self.slots).to(x.dtype)
        combine = (p * kept)[..., None] * place[..., None, :]
        inputs = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(x.dtype))
        h = F.relu(torch.einsum("ebcd,edh->ebch", inputs, self.up))
        y = torch.einsum("ebch,eho->ebco", h, self.down)
        return torch.einsum("ebco,bnec->bno", y, combine)


def leaves_no_slots(model: nn.Module, x: torch.Tensor) -> None:
    """No tensor of three dimensions [tokens, experts, slots] is in the graph."""
    gm, found = found_in(capacity.find, model, x)
    site = the_site(found)
    sizes = {site.tokens, site.experts, site.slots}
    apply(gm, site)
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            assert set(value.shape) != sizes or value.dim() < 3, node.format_node()


@pytest.mark.parametrize("model", [Switch, GShard], ids=lambda m: m.__name__)
@pytest.mark.parametrize("slots", [2, 3, 11])
def test_one_hot_dispatch(model: type[Base], slots: int) -> None:
    x = torch.randn(11, D)
    site = check(capacity.find, model(slots), x, runs=[(torch.randn(11, D),)])
    assert (site.form, site.slots, site.tokens) == ("capacity", slots, 11)
    assert site.choices == (1 if model is Switch else 2)
    leaves_no_slots(model(7), x)


def test_tokens_are_dropped() -> None:
    """Everything to one expert: all but the first tokens get nothing."""
    model = Switch(3).double()
    with torch.no_grad():
        model.router.bias[1] = 100.0
    x = torch.randn(9, D, dtype=torch.float64)
    gm, found = found_in(capacity.find, model, x)
    apply(gm, the_site(found))
    out = gm(x)
    assert (out[:3].abs().sum(-1) > 0).all()
    assert torch.equal(out[3:], torch.zeros(6, D, dtype=torch.float64))
    compare(model, gm, (x,))


def test_second_choices_behind_the_kept_first() -> None:
    model = GShard(3)
    model.count = "kept"
    check(capacity.find, model, torch.randn(12, D))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ranks_over_choices(k: int) -> None:
    x = torch.randn(2, 8, D)
    site = check(capacity.find, Ranked(k=k), x, runs=[(torch.randn(2, 8, D) * 5,)])
    assert (site.choices, site.form) == (k, "capacity")
    leaves_no_slots(Ranked(k=k), x)


def test_slots_of_each_sequence() -> None:
    site = check(capacity.find, Grouped(2), torch.randn(3, 7, D), runs=[(torch.randn(3, 7, D),)])
    assert (site.tokens, site.choices) == (21, 1)


@given(
    tokens=st.integers(1, 12),
    slots=st.integers(2, 6),
    model=st.sampled_from([Switch, GShard]),
    skew=st.floats(0, 20),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_loads_and_capacities(
    tokens: int, slots: int, model: type[Base], skew: float, seed: int
) -> None:
    torch.manual_seed(seed)
    made = model(slots)
    with torch.no_grad():
        made.router.bias[0] = skew
    check(capacity.find, made, torch.randn(tokens, D))


def test_dynamic_number_of_tokens() -> None:
    assert results_for(capacity.find, Switch(4), 9, (2, 5, 40)) == [2, 5, 40]


def test_second_choices_that_begin_at_the_first_slot_are_refused() -> None:
    model = GShard(3)
    model.count = "none"
    (reason,) = refusals(capacity.find, model, torch.randn(12, D))
    assert reason == UNPROVED


WRONG: dict[str, Callable[[Switch, torch.Tensor], torch.Tensor]] = {}


def wrong(function: Callable[[Switch, torch.Tensor], torch.Tensor]) -> None:
    WRONG[function.__name__] = function


@wrong
def counted_over_experts(m: Switch, x: torch.Tensor) -> torch.Tensor:
    """Two tokens of one expert have one position."""
    p = m.router(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), E)
    position = mask.cumsum(1) - 1
    place = F.one_hot((position * mask).sum(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@wrong
def counts_of_others(m: Switch, x: torch.Tensor) -> torch.Tensor:
    p = m.router(x).softmax(-1)
    mask, other = F.one_hot(p.argmax(-1), E), F.one_hot(p.argmin(-1), E)
    position = (other.cumsum(0) - 1) % m.slots
    place = F.one_hot((position * mask).sum(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@wrong
def wrapped(m: Switch, x: torch.Tensor) -> torch.Tensor:
    """Positions begin again: a slot is the sum of its tokens."""
    p = m.router(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), E)
    position = (mask.cumsum(0) - 1).remainder(m.slots)
    place = F.one_hot((position * mask).sum(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@wrong
def dropped_for_the_place_only(m: Switch, x: torch.Tensor) -> torch.Tensor:
    """What is over capacity goes into the first slot, with others."""
    p = m.router(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), E)
    position = mask.cumsum(0) - 1
    kept = mask * (position < m.slots)
    place = F.one_hot((position * kept).sum(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@wrong
def clamped(m: Switch, x: torch.Tensor) -> torch.Tensor:
    """What is over capacity shares the last slot."""
    p = m.router(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), E)
    position = (mask.cumsum(0) - 1).clamp(max=m.slots - 1)
    place = F.one_hot((position * mask).sum(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@wrong
def places_of_the_token(m: Switch, x: torch.Tensor) -> torch.Tensor:
    p = m.router(x).softmax(-1)
    mask = F.one_hot(p.argmax(-1), E)
    place = F.one_hot(p.argmin(-1), m.slots)
    return p[..., None] * mask[..., None] * place[:, None]


@pytest.mark.parametrize("name", WRONG)
def test_slots_that_tokens_may_share_are_refused(name: str) -> None:
    class Model(Switch):
        def combine(self, x: torch.Tensor) -> torch.Tensor:
            return WRONG[name](self, x)

    assert refusals(capacity.find, Model(5), torch.randn(5, D)) == [UNPROVED]


def test_positions_counted_in_half_precision_are_refused() -> None:
    class Model(Switch):
        def combine(self, x: torch.Tensor) -> torch.Tensor:
            p = self.router(x).softmax(-1)
            mask = F.one_hot(p.argmax(-1), E).to(torch.bfloat16)
            place = F.one_hot(((mask.cumsum(0) - mask) * mask).sum(-1).long(), self.slots)
            return p[..., None] * mask[..., None] * place[:, None]

    (reason,) = refusals(capacity.find, Model(11), torch.randn(11, D))
    assert reason == "positions are counted in bfloat16, which is not exact"


def test_gates_on_the_dispatch_are_refused() -> None:
    class Model(Switch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            combine = self.combine(x)
            y = self.experts(torch.einsum("tec,td->ecd", combine, x))
            return torch.einsum("tec,ecd->td", combine, y)

    (reason,) = refusals(capacity.find, Model(), torch.randn(9, D))
    assert reason == "tokens are multiplied by their gates when they are dispatched"


def test_another_dispatch_than_the_combine_tensor_is_refused() -> None:
    class Model(Switch):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            combine = self.combine(x)
            dispatch = self.combine(x.flip(0)).bool().to(x.dtype)
            y = self.experts(torch.einsum("tec,td->ecd", dispatch, x))
            return torch.einsum("tec,ecd->td", combine, y)

    (reason,) = refusals(capacity.find, Model(), torch.randn(9, D))
    assert reason == "its dispatch tensor is not where its combine tensor is not zero"


class SoftMixture(Base):
    """Puigcerver et al., 2023."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.router(x)[..., None] * torch.ones(self.slots, dtype=x.dtype)
        y = self.experts(torch.einsum("td,tec->ecd", x, logits.softmax(0)))
        combine = logits.flatten(1).softmax(-1).view_as(logits)
        return torch.einsum("ecd,tec->td", y, combine)


def test_soft_mixtures_are_left_alone() -> None:
    (reason,) = refusals(capacity.find, SoftMixture(), torch.randn(9, D))
    assert "a soft mixture" in reason


def test_expert_choice_is_left_alone() -> None:
    class Chosen(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values, chosen = self.router(x).softmax(-1).t().topk(3, dim=-1)
            y = self.experts(x[chosen]) * values.unsqueeze(-1)
            return torch.zeros_like(x).index_add(0, chosen.reshape(-1), y.reshape(-1, D))

    (reason,) = refusals(capacity.find, Chosen(), torch.randn(9, D))
    assert "expert choice" in reason


def test_other_finders_leave_slots_alone() -> None:
    for model, x in ((Switch(), torch.randn(9, D)), (GShard(), torch.randn(9, D))):
        for find in (dense.find, unrolled.find):
            assert found_in(find, model, x)[1] == []

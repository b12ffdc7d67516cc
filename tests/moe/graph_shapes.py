"""Mixtures of experts that Dynamo traces as one graph. Sections are those of research/moe.md."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def random_weight(*shape: int) -> nn.Parameter:
    """Not tiny, so that a wrong expert is seen: results have about the size of the input."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        for layer in (self.w1, self.w2, self.w3):
            layer.weight = random_weight(*layer.weight.shape)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mlp(nn.Sequential):
    def __init__(self, dim, hidden, act=nn.GELU):
        super().__init__(nn.Linear(dim, hidden), act(), nn.Linear(hidden, dim))


class Base(nn.Module):
    """A router, and the arguments that every shape takes."""

    bias = False

    def __init__(self, experts=4, k=2, dim=32, hidden=48):
        super().__init__()
        self.num_experts, self.top_k, self.dim, self.hidden = experts, k, dim, hidden
        self.gate = nn.Linear(dim, experts, bias=self.bias)
        self.build(experts, k, dim, hidden)

    def build(self, experts, k, dim, hidden):
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(experts))

    def route(self, x):
        """Softmax, top-k, normalised: ids and weights [T, K]."""
        weights, ids = torch.topk(self.gate(x).softmax(-1), self.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)


class Stacked(Base):
    """Hugging Face's way of storing experts."""

    def build(self, experts, k, dim, hidden):
        self.gate_up_proj = random_weight(experts, 2 * hidden, dim)
        self.down_proj = random_weight(experts, dim, hidden)


class GroupedMm(Stacked):
    """4.4: sort, grouped product, inverse permutation."""

    def forward(self, x):
        ids, weights = self.route(x)
        order = torch.argsort(ids.reshape(-1))
        back = torch.argsort(order)
        sorted_ids = ids.reshape(-1)[order]
        counts = torch.histc(
            sorted_ids.float(), bins=self.num_experts, min=0, max=len(self.gate.weight) - 1
        )
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = x[order // self.top_k]
        gate, up = torch._grouped_mm(rows, self.gate_up_proj.transpose(-2, -1), offs=offsets).chunk(
            2, -1
        )
        y = torch._grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        return y[back].view(x.shape[0], self.top_k, -1).sum(1)


class BatchedMm(Stacked):
    """4.4: each pair gets its own copy of its expert's weights."""

    def forward(self, x):
        return self.dispatch(x, *self.route(x))

    def dispatch(self, x, ids, weights):
        rows, chosen = x.repeat_interleave(self.top_k, 0), ids.reshape(-1)
        both = torch.bmm(self.gate_up_proj[chosen], rows.unsqueeze(-1)).squeeze(-1)
        gate, up = both.chunk(2, -1)
        y = torch.bmm(self.down_proj[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = y * weights.reshape(-1, 1)
        return y.view(x.shape[0], self.top_k, -1).sum(1)


class SharedExpert(BatchedMm):
    """4.5: next to the routed experts, one that all tokens use."""

    def build(self, experts, k, dim, hidden):
        super().build(experts, k, dim, hidden)
        self.shared_expert = SwiGLU(dim, hidden)
        self.shared_gate = nn.Linear(dim, 1)

    def forward(self, x):
        return super().forward(x) + self.shared_gate(x).sigmoid() * self.shared_expert(x)


class GroupLimited(BatchedMm):
    """4.6: sigmoid scores, a bias for the choice alone, groups of experts, a scaling factor."""

    def build(self, experts, k, dim, hidden):
        super().build(experts, k, dim, hidden)
        self.register_buffer("correction", torch.randn(experts) * 0.1)

    def route(self, x):
        scores = self.gate(x).sigmoid()
        choice = scores + self.correction
        groups = choice.view(-1, 2, self.num_experts // 2)
        best = groups.topk(min(2, self.num_experts // 2), -1).values.sum(-1).topk(1, -1).indices
        mask = torch.zeros(groups.shape[:2], dtype=x.dtype).scatter_(1, best, 1.0)
        mask = mask.unsqueeze(-1).expand_as(groups).reshape(choice.shape)
        ids = choice.masked_fill(mask == 0, -math.inf).topk(self.top_k, -1, sorted=False).indices
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5


class ClampedGrouped(Base):
    """4.11: transposed, interleaved, with biases, clamped; softmax over the chosen."""

    bias = True

    def build(self, experts, k, dim, hidden):
        self.gate_up_proj = random_weight(experts, dim, 2 * hidden)
        self.gate_up_bias = random_weight(experts, 2 * hidden)
        self.down_proj = random_weight(experts, hidden, dim)
        self.down_bias = random_weight(experts, dim)

    def route(self, x):
        values, ids = self.gate(x).topk(self.top_k, -1)
        return ids, values.softmax(-1)

    def activation(self, both):
        gate, up = both[..., ::2], both[..., 1::2]
        gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def forward(self, x):
        ids, weights = self.route(x)
        chosen, order = torch.sort(ids.reshape(-1))
        counts = torch.histc(chosen.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        both = torch._grouped_mm(x[order // self.top_k], self.gate_up_proj, offs=offsets)
        both = both + self.gate_up_bias[chosen]
        y = torch._grouped_mm(self.activation(both), self.down_proj, offs=offsets)
        y = (y + self.down_bias[chosen]) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return y[back].view(x.shape[0], self.top_k, -1).sum(1)


class ClampedDense(ClampedGrouped):
    """4.11 before version 5: every expert on every token, then weights that are mostly zero."""

    def forward(self, x):
        ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter_(1, ids, weights)
        rows = x.repeat(self.num_experts, 1).view(self.num_experts, -1, self.dim)
        both = torch.bmm(rows, self.gate_up_proj) + self.gate_up_bias[:, None, :]
        y = torch.bmm(self.activation(both), self.down_proj) + self.down_bias[:, None, :]
        return (y * gates.transpose(0, 1)[..., None]).sum(0)


class WeightOnInput(Base):
    """4.12: every expert on every token, which is zero where the token is not routed to it."""

    def build(self, experts, k, dim, hidden):
        self.gate_up_proj = random_weight(experts, dim, 2 * hidden)
        self.down_proj = random_weight(experts, hidden, dim)
        self.shared_expert = SwiGLU(dim, hidden)

    def forward(self, x):
        logits = self.gate(x)
        values, ids = torch.topk(logits, self.top_k, dim=1)
        scores = torch.full_like(logits, -math.inf).scatter_(1, ids, values).sigmoid()
        rows = x.repeat(self.num_experts, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(self.num_experts, -1, self.dim), self.gate_up_proj).chunk(
            2, -1
        )
        y = torch.bmm(up * F.silu(gate), self.down_proj)
        out = self.shared_expert(x)
        out.add_(y.reshape(self.num_experts, -1, self.dim).sum(0))
        return out


class GatheredWeights(Base):
    """4.18: weights indexed by id, then einsum."""

    def build(self, experts, k, dim, hidden):
        self.w1 = random_weight(experts, hidden, dim)
        self.w2 = random_weight(experts, dim, hidden)
        self.w3 = random_weight(experts, hidden, dim)

    def forward(self, x):
        ids, weights = self.route(x)
        gate = F.silu(torch.einsum("ti,taoi->tao", x, self.w1[ids]))
        up = torch.einsum("ti,taoi->tao", x, self.w3[ids])
        y = torch.einsum("tao,taio->tai", gate * up, self.w2[ids])
        return torch.einsum("tai,ta->ti", y, weights)


class Unrolled(Base):
    """The experts of 4.19: modules in a list, each run on every token."""

    def build(self, experts, k, dim, hidden):
        self.experts = nn.ModuleList(Mlp(dim, hidden) for _ in range(experts))

    def gates(self, x):
        ids, weights = self.route(x)
        return torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, ids, weights)


class DenseStack(Unrolled):
    """4.19 a."""

    def forward(self, x):
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return (y * self.gates(x).unsqueeze(-1)).sum(1)


class DenseSlices(Unrolled):
    """4.19 b."""

    def forward(self, x):
        gates, out = self.gates(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out += expert(x) * gates[:, i : i + 1]
        return out


class DenseCompared(Unrolled):
    """4.19 c."""

    def forward(self, x):
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * ((ids == i) * weights).sum(-1, keepdim=True)
        return out


class Assigned(Unrolled):
    """4.19, ViTPose: each token brings the number of its expert."""

    def forward(self, x, index):
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = out + expert(x) * (index == i).view(-1, 1)
        return out


class MaskedSoftmax(Unrolled):
    """4.10's gates, softmax over -inf outside of the top-k, with 4.19's experts."""

    def gates(self, x):
        logits = self.gate(x)
        values, ids = logits.topk(self.top_k, -1)
        return torch.full_like(logits, -math.inf).scatter(-1, ids, values).softmax(-1)

    def forward(self, x):
        y = torch.stack([expert(x) for expert in self.experts], -1)
        return torch.einsum("tde,te->td", y, self.gates(x))


class SoftGates(DenseStack):
    """4.19, MMoE: every expert counts for every token."""

    def gates(self, x):
        return self.gate(x).softmax(-1)


class DenseEinsum(Base):
    """4.20: stacked experts over dense gates."""

    def build(self, experts, k, dim, hidden):
        self.up = random_weight(experts, hidden, dim)
        self.down = random_weight(experts, dim, hidden)

    def forward(self, x):
        ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter_(1, ids, weights)
        h = F.gelu(torch.einsum("td,ehd->teh", x, self.up))
        y = torch.einsum("teh,edh->ted", h, self.down)
        return torch.einsum("ted,te->td", y, gates)


class OneHotDispatch(Base):
    """4.21: top-2 with a capacity, dispatch and combine tensors [T, E, C]."""

    capacity = 5

    def build(self, experts, k, dim, hidden):
        self.up = random_weight(experts, dim, hidden)
        self.down = random_weight(experts, hidden, dim)

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        first = probs.argmax(-1)
        mask1 = F.one_hot(first, self.num_experts).to(x.dtype)
        gate1 = (probs * mask1).sum(-1)
        rest = probs * (1 - mask1)
        mask2 = F.one_hot(rest.argmax(-1), self.num_experts).to(x.dtype)
        gate2 = (rest * mask2).sum(-1)
        total = gate1 + gate2
        position1 = mask1.cumsum(0) - mask1
        position2 = mask2.cumsum(0) - mask2 + mask1.sum(0, keepdim=True)
        mask1 = mask1 * (position1 < self.capacity)
        mask2 = mask2 * (position2 < self.capacity)
        combine = self.slots(gate1 / total, mask1, position1) + self.slots(
            gate2 / total, mask2, position2
        )
        dispatch = combine.bool().to(x.dtype)
        inputs = torch.einsum("td,tec->ecd", x, dispatch)
        hidden = F.relu(torch.einsum("ecd,edh->ech", inputs, self.up))
        outputs = torch.einsum("ech,ehd->ecd", hidden, self.down)
        return torch.einsum("ecd,tec->td", outputs, combine)

    def slots(self, gate, mask, position):
        place = F.one_hot((position * mask).sum(-1).long(), self.capacity).to(gate.dtype)
        return gate[:, None, None] * mask[..., None] * place[:, None, :]


class RankedDispatch(Base):
    """4.22: ranks by a running sum over choices, then tokens; a capacity."""

    capacity = 5

    def build(self, experts, k, dim, hidden):
        self.up = random_weight(experts, dim, hidden)
        self.down = random_weight(experts, hidden, dim)

    def forward(self, x):
        tokens = x.shape[0]
        logits = self.gate(x)
        values, ids = logits.topk(self.top_k, -1)
        probs = torch.full_like(logits, -math.inf).scatter_(-1, ids, values).softmax(-1)
        mask = F.one_hot(ids, self.num_experts).view(tokens, self.top_k, -1).permute(1, 0, 2)
        rank = mask.reshape(self.top_k * tokens, -1).cumsum(0) - 1
        rank = rank.reshape(self.top_k, tokens, -1)
        mask = mask * torch.lt(rank, self.capacity)
        place = F.one_hot((mask * rank).sum(-1), self.capacity)
        weights = probs.unsqueeze(0) * mask
        combine = (weights.unsqueeze(3) * place.unsqueeze(2)).sum(0)
        dispatch = combine.bool().permute(1, 2, 0).to(x.dtype)
        y = torch.bmm(F.gelu(torch.bmm(dispatch @ x, self.up)), self.down)
        return combine.view(tokens, -1) @ y.view(-1, self.dim)


class ExpertChoice(Base):
    """4.24: experts choose tokens."""

    def build(self, experts, k, dim, hidden):
        self.up = random_weight(experts, dim, hidden)
        self.down = random_weight(experts, hidden, dim)

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        values, chosen = scores.t().topk(2, dim=-1)
        h = F.gelu(torch.einsum("ecd,edh->ech", x[chosen], self.up))
        y = torch.einsum("ech,ehd->ecd", h, self.down) * values.unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, chosen.reshape(-1), y.reshape(-1, self.dim))


class SoftMoE(Base):
    """Puigcerver et al., 2023: slots are averages of tokens."""

    def build(self, experts, k, dim, hidden):
        self.up = random_weight(experts, dim, hidden)
        self.down = random_weight(experts, hidden, dim)
        self.slots = random_weight(experts, 2, dim)

    def forward(self, x):
        logits = torch.einsum("td,esd->tes", x, self.slots)
        inputs = torch.einsum("td,tes->esd", x, logits.softmax(0))
        h = F.gelu(torch.einsum("esd,edh->esh", inputs, self.up))
        y = torch.einsum("esh,ehd->esd", h, self.down)
        combine = logits.flatten(1).softmax(-1)
        return combine @ y.reshape(-1, self.dim)


class ProductKeys(Base):
    """4.24, PEER: experts of one neuron, rows of embeddings."""

    def build(self, experts, k, dim, hidden):
        self.down_embed = nn.Embedding(experts * experts, dim)
        self.up_embed = nn.Embedding(experts * experts, dim)
        self.keys = random_weight(2, experts, dim // 2)

    def forward(self, x):
        a = x.view(-1, 2, self.dim // 2).transpose(0, 1) @ self.keys.transpose(1, 2)
        (va, vb), (ia, ib) = (pair.unbind(0) for pair in a.topk(self.top_k, -1))
        values = (va.unsqueeze(-1) + vb.unsqueeze(-2)).flatten(1)
        ids = (ia.unsqueeze(-1) * self.num_experts + ib.unsqueeze(-2)).flatten(1)
        best, place = values.topk(self.top_k, -1)
        ids = ids.gather(-1, place)
        h = F.gelu(torch.einsum("td,tkd->tk", x, self.down_embed(ids))) * best.softmax(-1)
        return torch.einsum("tk,tkd->td", h, self.up_embed(ids))


class TrainerGrouped(Base):
    """4.25: torchtitan's, stable sort, three grouped products, scatter_add."""

    def build(self, experts, k, dim, hidden):
        self.w1 = random_weight(experts, hidden, dim)
        self.w2 = random_weight(experts, dim, hidden)
        self.w3 = random_weight(experts, hidden, dim)

    def forward(self, x):
        ids, scores = self.route(x)
        counts = torch.histc(
            ids.view(-1).float(), bins=self.num_experts, min=0, max=self.num_experts
        )
        order = torch.argsort(ids.view(-1), stable=True)
        weights = scores.view(-1)[order]
        index = (order // self.top_k).reshape(-1, 1).expand(-1, self.dim)
        rows = torch.gather(x, 0, index)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(rows, self.w1.transpose(-2, -1), offs=offsets))
        h = h * torch._grouped_mm(rows, self.w3.transpose(-2, -1), offs=offsets)
        y = torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=offsets)
        return torch.zeros_like(x).scatter_add(0, index, y * weights.reshape(-1, 1))

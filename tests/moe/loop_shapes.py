"""Mixtures of experts that loop in Python. Sections are those of research/moe.md."""

import math

import torch
from graph_shapes import Base, Mlp, SwiGLU, random_weight
from torch import nn
from torch.nn import functional as F


class StaticLoop(Base):
    """4.1: Mixtral before version 5. Returns the router's logits too."""

    def forward(self, hidden_states):
        batch, length, dim = hidden_states.shape
        hidden_states = hidden_states.view(-1, dim)
        logits = self.gate(hidden_states)
        weights = F.softmax(logits, dim=1)
        weights, chosen = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden_states.dtype)
        final = torch.zeros((batch * length, dim), dtype=hidden_states.dtype)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            layer = self.experts[e]
            index, top = torch.where(mask[e])
            state = hidden_states[None, top].reshape(-1, dim)
            result = layer(state) * weights[top, index, None]
            final.index_add_(0, top, result.to(hidden_states.dtype))
        return final.reshape(batch, length, dim), logits


class HitLoop(Base):
    """4.2: only experts that a token chose, and 4.5's shared expert behind the loop."""

    def build(self, experts, k, dim, hidden):
        super().build(experts, k, dim, hidden)
        self.shared_expert = SwiGLU(dim, hidden)
        self.shared_gate = nn.Linear(dim, 1)

    def forward(self, x):
        batch, length, dim = x.shape
        x = x.view(-1, dim)
        chosen, weights = self.route(x)
        final = torch.zeros((batch * length, dim), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            layer = self.experts[expert]
            index, top = torch.where(mask[expert].squeeze(0))
            result = layer(x[None, top].reshape(-1, dim)) * weights[top, index, None]
            final.index_add_(0, top, result.to(x.dtype))
        shared = F.sigmoid(self.shared_gate(x)) * self.shared_expert(x)
        return (final + shared).reshape(batch, length, dim)


class StackedExperts(nn.Module):
    """4.3: Hugging Face's Experts class, its loop."""

    def __init__(self, experts, dim, hidden):
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = random_weight(experts, 2 * hidden, dim)
        self.down_proj = random_weight(experts, dim, hidden)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            expert = expert[0]
            if expert == self.num_experts:
                continue
            position, token = torch.where(mask[expert])
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            result = result * top_k_weights[token, position, None]
            final.index_add_(0, token, result.to(final.dtype))
        return final


class StackedLoop(Base):
    def build(self, experts, k, dim, hidden):
        self.experts = StackedExperts(experts, dim, hidden)

    def forward(self, x):
        tokens = x.view(-1, self.dim)
        return self.experts(tokens, *self.route(tokens)).view(x.shape)


class SortedSlices(Base):
    """4.7: DeepSeek's remote code: slices of sorted tokens, and another loop for training."""

    def forward(self, hidden_states):
        shape = hidden_states.shape
        identity = hidden_states
        ids, weights = self.route(hidden_states.view(-1, self.dim))
        hidden_states = hidden_states.view(-1, shape[-1])
        flat = ids.view(-1)
        if self.training:
            hidden_states = hidden_states.repeat_interleave(self.top_k, dim=0)
            y = torch.empty_like(hidden_states)
            for i, expert in enumerate(self.experts):
                y[flat == i] = expert(hidden_states[flat == i])
            y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
            y = y.view(*shape)
        else:
            y = self.moe_infer(hidden_states, ids, weights).view(*shape)
        return y + identity

    @torch.no_grad()
    def moe_infer(self, x, ids, weights):
        counts = ids.new_zeros((ids.shape[0], len(self.experts)))
        counts.scatter_(1, ids, 1)
        per_expert = counts.sum(dim=0)
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        per_expert = per_expert.cpu().numpy()
        outputs = []
        start = 0
        for i, number in enumerate(per_expert):
            end = start + number
            if number == 0:
                continue
            expert = self.experts[i]
            outputs.append(expert(rows[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if len(outputs) else rows.new_empty(0)
        back = torch.empty_like(outs)
        back[order] = outs
        return (
            back.view(*ids.shape, -1)
            .type(weights.dtype)
            .mul_(weights.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(back.dtype)
        )


class Bincount(Base):
    """4.8: DeepSeek's inference code."""

    def build(self, experts, k, dim, hidden):
        super().build(experts, k, dim, hidden)
        self.shared_experts = SwiGLU(dim, hidden)

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, self.dim)
        indices, weights = self.route(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.num_experts).tolist()
        for i in range(0, self.num_experts):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(indices == i)
            y[idx] += expert(x[idx]) * weights[idx, top, None]
        z = self.shared_experts(x)
        return (y + z).view(shape)


class WhereLoop(Base):
    """4.9: mistral-inference and LitGPT; softmax behind the top-k."""

    def forward(self, inputs):
        logits = self.gate(inputs)
        weights, selected = torch.topk(logits, self.top_k)
        weights = F.softmax(weights, dim=1).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch, nth = torch.where(selected == i)
            results[batch] += weights[batch, nth, None] * expert(inputs[batch])
        return results


class NoisyRouter(nn.Module):
    def __init__(self, dim, experts, k):
        super().__init__()
        self.top_k = k
        self.logits = nn.Linear(dim, experts)
        self.noise = nn.Linear(dim, experts)

    def forward(self, x):
        logits = self.logits(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        values, ids = logits.topk(self.top_k, dim=-1)
        sparse = torch.full_like(logits, -math.inf).scatter(-1, ids, values)
        return F.softmax(sparse, dim=-1), ids


class AnyLoop(Base):
    """4.10: the tutorials': dense gates, a mask of each expert, ``if mask.any()``."""

    def build(self, experts, k, dim, hidden):
        self.router = NoisyRouter(dim, experts, k)
        self.experts = nn.ModuleList(Mlp(dim, hidden, nn.ReLU) for _ in range(experts))

    def forward(self, x):
        gating, indices = self.router(x)
        final = torch.zeros_like(x)
        flat = x.view(-1, x.size(-1))
        flat_gating = gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            expert_mask = (indices == i).any(dim=-1)
            flat_mask = expert_mask.view(-1)
            if flat_mask.any():
                output = expert(flat[flat_mask])
                scores = flat_gating[flat_mask, i].unsqueeze(1)
                final[expert_mask] += (output * scores).squeeze(1)
        return final


class CapacityLoop(AnyLoop):
    """4.10 with a capacity: an expert takes its first tokens."""

    def forward(self, x):
        batch, length, _ = x.shape
        gating, indices = self.router(x)
        flat = x.view(-1, x.size(-1))
        flat_gating = gating.view(-1, gating.size(-1))
        capacity = int(batch * length * self.top_k / self.num_experts)
        updates = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1).view(-1)
            selected = torch.nonzero(mask).squeeze(-1)
            limited = selected[:capacity] if selected.numel() > capacity else selected
            if limited.numel() > 0:
                output = expert(flat[limited])
                updates.index_add_(0, limited, output * flat_gating[limited, i].unsqueeze(1))
        return updates.view(batch, length, -1)


class FlatExperts(nn.Module):
    """4.13: DBRX: weights stored in two dimensions, the second product untransposed."""

    def __init__(self, experts, dim, hidden):
        super().__init__()
        self.num_experts, self.dim, self.hidden = experts, dim, hidden
        self.w1 = random_weight(experts * hidden, dim)
        self.v1 = random_weight(experts * hidden, dim)
        self.w2 = random_weight(experts * hidden, dim)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        batch = hidden_states.shape[0]
        hidden_states = hidden_states.reshape(-1, self.dim)
        result = torch.zeros_like(hidden_states)
        w1, v1, w2 = (
            w.view(self.num_experts, self.hidden, self.dim) for w in (self.w1, self.v1, self.w2)
        )
        with torch.no_grad():
            mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            expert = expert[0]
            idx, token = torch.where(mask[expert])
            state = hidden_states[token]
            state = (F.silu(state.matmul(w1[expert].t())) * state.matmul(v1[expert].t())).matmul(
                w2[expert]
            )
            state = state.view(-1, self.dim) * top_k_weights[token, idx, None]
            result.index_add_(0, token, state)
        return result.reshape(batch, -1, self.dim)


class FlatLoop(Base):
    def build(self, experts, k, dim, hidden):
        self.experts = FlatExperts(experts, dim, hidden)

    def forward(self, x):
        return self.experts(x, *self.route(x.view(-1, self.dim)))


class SplitLinear(nn.Module):
    """4.14: sorted tokens, split to experts."""

    def __init__(self, experts, inputs, outputs):
        super().__init__()
        self.num_experts = experts
        self.weight = random_weight(experts, outputs, inputs)

    def forward(self, inputs, sizes):
        parts = inputs.split(sizes, dim=0)
        outputs = []
        for i in range(self.num_experts):
            outputs.append(F.linear(parts[i], self.weight[i]))
        return torch.cat(outputs, dim=0)


class SplitRouter(nn.Module):
    def __init__(self, dim, experts, k):
        super().__init__()
        self.num_experts, self.top_k = experts, k
        self.layer = nn.Linear(dim, experts, bias=False)

    def forward(self, x):
        logits = self.layer(x)
        values, ids = logits.topk(self.top_k, dim=1)
        gates = torch.softmax(values, dim=1).type_as(x)
        zeros = torch.zeros([gates.size(0), self.num_experts], dtype=gates.dtype)
        sizes = zeros.scatter(1, ids, 1).long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        tokens = order.div(self.top_k, rounding_mode="trunc")
        return tokens, gates.flatten()[order], sizes, logits


class ParallelExperts(Base):
    """4.14: JetMoE and GraniteMoE before version 5."""

    def build(self, experts, k, dim, hidden):
        self.router = SplitRouter(dim, experts, k)
        self.out_bias = random_weight(dim)
        self.input_linear = SplitLinear(experts, dim, 2 * hidden)
        self.output_linear = SplitLinear(experts, hidden, dim)

    def forward(self, x):
        batch, length, dim = x.size()
        x = x.reshape(-1, dim)
        tokens, gates, sizes, logits = self.router(x)
        h = self.input_linear(x[tokens], sizes).chunk(2, dim=-1)
        y = self.output_linear(F.silu(h[0]) * h[1], sizes) * gates[:, None]
        out = torch.zeros((batch * length, dim), dtype=y.dtype).index_add(0, tokens, y)
        return out.view(batch, length, dim) + self.out_bias, logits


class ThresholdRouter(nn.Module):
    """4.15: SparseMixer: one argmax after the other, each with weights of its own."""

    def __init__(self, dim, experts, k):
        super().__init__()
        self.top_k = k
        self.layer = nn.Linear(dim, experts, bias=False)

    def forward(self, x):
        scores = self.layer(x)
        ids, weights, left = [], [], scores
        for _ in range(self.top_k):
            top, chosen = left.max(-1, keepdim=True)
            far = (top - scores) / scores.abs().clamp(min=top) > 0.02
            weights.append(left.masked_fill(far, -math.inf).softmax(-1).gather(-1, chosen))
            ids.append(chosen)
            left = left.scatter(-1, chosen, -math.inf)
        return torch.cat(ids, -1), torch.cat(weights, -1)


class MixerLoop(Base):
    """4.15: PhiMoE: the router is opaque, the experts as in 4.3."""

    def build(self, experts, k, dim, hidden):
        self.router = ThresholdRouter(dim, experts, k)
        self.experts = StackedExperts(experts, dim, hidden)

    def forward(self, x):
        tokens = x.view(-1, self.dim)
        return self.experts(tokens, *self.router(tokens)).view(x.shape)


class ModuleDictLoop(nn.ModuleDict):
    """4.16: Switch: experts with names, a mask of the chosen one that a capacity may empty."""

    def __init__(self, experts, dim, hidden):
        super().__init__({f"expert_{i}": Mlp(dim, hidden, nn.ReLU) for i in range(experts)})

    def forward(self, hidden_states, selected, weights):
        final = torch.zeros_like(hidden_states)
        mask = selected.permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert in hit:
            index, top = torch.where(mask[expert].squeeze(0))
            state = hidden_states[None, top].reshape(-1, hidden_states.shape[-1])
            result = self[f"expert_{expert[0]}"](state) * weights[top, index, None]
            final.index_add_(0, top, result.to(hidden_states.dtype))
        return final


class Switch(Base):
    capacity = 3

    def build(self, experts, k, dim, hidden):
        self.experts = ModuleDictLoop(experts, dim, hidden)

    def forward(self, x):
        probs = self.gate(x).softmax(-1)
        chosen = F.one_hot(probs.argmax(-1), num_classes=self.num_experts)
        chosen = chosen * (chosen.cumsum(-2) <= self.capacity)
        weights = probs.max(-1).values.view(-1, 1)
        tokens = x.view(-1, self.dim)
        y = self.experts(tokens, chosen.view(-1, 1, self.num_experts), weights)
        return y.view(x.shape)


class SwitchBefore(Base):
    """4.16: Switch before version 5: tokens that no expert takes stay as they are."""

    capacity = 3

    def build(self, experts, k, dim, hidden):
        self.experts = nn.ModuleDict(
            {f"expert_{i}": Mlp(dim, hidden, nn.ReLU) for i in range(experts)}
        )

    def forward(self, hidden_states):
        probs = self.gate(hidden_states).softmax(-1)
        router_mask = F.one_hot(probs.argmax(-1), num_classes=self.num_experts)
        router_mask = router_mask * (router_mask.cumsum(-2) <= self.capacity)
        weights = probs.max(-1, keepdim=True).values
        next_states = hidden_states.clone()
        router_mask = router_mask.bool()
        batch, length, experts = router_mask.shape
        idx_mask = router_mask.reshape(batch * length, experts).sum(dim=0)
        idx_mask = torch.nonzero(idx_mask, as_tuple=True)[0].tolist()
        for idx in idx_mask:
            next_states[router_mask[:, :, idx]] = getattr(self.experts, f"expert_{idx}")(
                hidden_states[router_mask[:, :, idx]]
            )
        return weights * next_states


class IdentityExperts(StackedExperts):
    """4.17: LongCat-Flash: behind the experts, some that return the token."""

    def __init__(self, experts, dim, hidden):
        super().__init__(experts, dim, hidden)
        self.total = experts + 2
        self.identity = nn.Identity()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        final = torch.zeros_like(hidden_states)
        if top_k_index.numel() == 0:
            return final
        mask = F.one_hot(top_k_index, num_classes=self.total).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero(as_tuple=False)
        for found in hit:
            expert = int(found.item())
            position, token = torch.where(mask[expert].squeeze(0))
            if token.numel() == 0:
                continue
            state = hidden_states[token]
            if expert >= self.num_experts:
                result = self.identity(state)
            else:
                gate, up = F.linear(state, self.gate_up_proj[expert]).chunk(2, dim=-1)
                result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            result = result * top_k_weights[token, position, None]
            final.index_add_(0, token, result.to(hidden_states.dtype))
        return final


class IdentityLoop(Base):
    def build(self, experts, k, dim, hidden):
        self.gate = nn.Linear(dim, experts + 2, bias=False)
        self.experts = IdentityExperts(experts, dim, hidden)

    def forward(self, x):
        tokens = x.view(-1, self.dim)
        return self.experts(tokens, *self.route(tokens)).view(x.shape)


class GuardedPairs(Base):
    """4.19 d: for each choice, for each expert."""

    def forward(self, x):
        ids, weights = self.route(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e in range(self.num_experts):
                mask = ids[:, k] == e
                if mask.any():
                    out[mask] += weights[mask, k, None] * self.experts[e](x[mask])
        return out


class Dispatcher:
    """4.23: splits a batch by dense gates, and puts the results together again."""

    def __init__(self, experts, gates):
        self.gates = gates
        _, index = torch.nonzero(gates).sort(0)
        self.expert_index = torch.nonzero(gates)[index[:, 1]][:, 1:]
        self.batch_index = torch.nonzero(gates)[index[:, 1], 0]
        self.part_sizes = (gates > 0).sum(0).tolist()
        self.nonzero_gates = torch.gather(gates[self.batch_index], 1, self.expert_index)

    def dispatch(self, x):
        return torch.split(x[self.batch_index], self.part_sizes, dim=0)

    def combine(self, outputs):
        stitched = torch.cat(outputs, 0).mul(self.nonzero_gates)
        zeros = torch.zeros(self.gates.size(0), outputs[-1].size(1), dtype=stitched.dtype)
        return zeros.index_add(0, self.batch_index, stitched)


class Dispatched(Base):
    """4.23: with the balancing loss that comes along."""

    def build(self, experts, k, dim, hidden):
        self.experts = nn.ModuleList(Mlp(dim, hidden, nn.ReLU) for _ in range(experts))

    def forward(self, x):
        ids, weights = self.route(x)
        gates = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype).scatter(1, ids, weights)
        importance = gates.sum(0)
        loss = importance.var() / (importance.mean() ** 2 + 1e-10)
        dispatcher = Dispatcher(self.num_experts, gates)
        inputs = dispatcher.dispatch(x)
        outputs = [self.experts[i](inputs[i]) for i in range(self.num_experts)]
        y = dispatcher.combine(outputs)
        return y, loss


class NormedLoop(StaticLoop):
    """An expert that ends in a norm: no two matrices with a function between them."""

    def build(self, experts, k, dim, hidden):
        self.experts = nn.ModuleList(
            nn.Sequential(Mlp(dim, hidden), nn.LayerNorm(dim)) for _ in range(experts)
        )


class CountingLoop(WhereLoop):
    """A loop that also counts what it saw, which nobody may take away."""

    def build(self, experts, k, dim, hidden):
        super().build(experts, k, dim, hidden)
        self.register_buffer("seen", torch.zeros(experts))

    def forward(self, inputs):
        weights, selected = torch.topk(self.gate(inputs).softmax(-1), self.top_k)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch, nth = torch.where(selected == i)
            self.seen[i] += len(batch)
            results[batch] += weights[batch, nth, None] * expert(inputs[batch])
        return results

"""A mixture-of-experts layer in the spellings that models use, and how large one is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_compiler.nn.router import Routing, TopKRouter

Activation = Literal["swiglu", "geglu", "gelu", "relu", "silu"]
Spelling = Literal["dense", "gathered", "grouped"]
SPELLINGS: tuple[Spelling, ...] = ("dense", "gathered", "grouped")
_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class MoE(nn.Module):
    """Each token through the K of E experts that a router chooses, weighted sum.

    ``y = Σ_k w_k · expert_{i_k}(x)``, with ``expert(x) = down · act(up · x)``, or
    ``down · (act(gate · x) * up · x)`` for ``"swiglu"`` and ``"geglu"``.

        MoE(512, 1024, TopKRouter(512, experts=8, k=2, normalize=True))
        MoE.mixtral(512, 1024, experts=8)
        MoE.switch(512, 1024, experts=8)

    Parameters are stacked: ``up`` and ``gate`` [E, hidden, width], ``down`` [E, width, hidden].
    Cost for T tokens, in products of a token and an expert: T·E as ``"dense"`` is written (every
    expert runs on every token and most results are multiplied by 0), T·K compiled with
    ``backend="sparse"``, in all spellings.

    Args:
        width: size of a token.
        hidden: size between an expert's layers.
        router: says which experts; its E and K are the layer's.
        activation: ``"swiglu"``, ``"geglu"``, ``"gelu"``, ``"relu"`` or ``"silu"``.
        bias: whether experts have biases.
        shared: size of an expert that all tokens use besides; 0 for none.
        spelling: ``"dense"`` is two einsums over all experts and gates that are mostly 0;
            ``"gathered"`` indexes the weights by expert, for few tokens; ``"grouped"`` sorts tokens
            by expert and calls ``grouped_mm`` (no float64, sizes that are multiples of 16 bytes;
            compiled without a GPU, PyTorch takes bfloat16 alone).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown activation or spelling.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        router: TopKRouter,
        *,
        activation: Activation = "swiglu",
        bias: bool = False,
        shared: int = 0,
        spelling: Spelling = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in (*_GATED, *_PLAIN):
            known = (*_GATED, *_PLAIN)
            raise ValueError(f"activation={activation!r} is unknown: write one of {known}.")
        if spelling not in SPELLINGS:
            raise ValueError(f"spelling={spelling!r} is unknown: write one of {SPELLINGS}.")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        experts = router.experts
        self.width, self.hidden, self.experts = width, hidden, experts
        self.activation: Activation = activation
        self.spelling: Spelling = spelling
        self.router = router
        # What runs instead of the spelling, (layer, tokens, ids, weights): experts on other ranks.
        self.run_experts: Callable[[MoE, Tensor, Tensor, Tensor], Tensor] | None = None
        self.up = nn.Parameter(torch.empty(experts, hidden, width, **made))
        self.down = nn.Parameter(torch.empty(experts, width, hidden, **made))
        gated = activation in _GATED
        self.gate = nn.Parameter(torch.empty(experts, hidden, width, **made)) if gated else None
        self.up_bias = nn.Parameter(torch.zeros(experts, hidden, **made)) if bias else None
        self.gate_bias = (
            nn.Parameter(torch.zeros(experts, hidden, **made)) if bias and gated else None
        )
        self.down_bias = nn.Parameter(torch.zeros(experts, width, **made)) if bias else None
        for weight in (self.up, self.gate, self.down):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.shared_up = nn.Linear(width, shared, bias=bias, **made) if shared else None
        self.shared_gate = nn.Linear(width, shared, bias=bias, **made) if shared and gated else None
        self.shared_down = nn.Linear(shared, width, bias=bias, **made) if shared else None

    @classmethod
    def switch(
        cls,
        width: int,
        hidden: int,
        experts: int,
        *,
        capacity_factor: float | None = 1.25,
        **options: Any,
    ) -> MoE:
        """Switch Transformers: one expert a token, with a capacity, ReLU (Fedus et al., 2021)."""
        router = TopKRouter(width, experts, 1, capacity_factor=capacity_factor, **_placed(options))
        return cls(width, hidden, router, **{"activation": "relu", **options})

    @classmethod
    def mixtral(cls, width: int, hidden: int, experts: int = 8, k: int = 2, **options: Any) -> MoE:
        """Mixtral: two experts a token, weights that sum to 1, SwiGLU (Jiang et al., 2024)."""
        router = TopKRouter(width, experts, k, normalize=True, **_placed(options))
        return cls(width, hidden, router, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Routes tokens and runs their experts.

        Args:
            x: [..., width].

        Returns:
            [..., width] in x's dtype, and what the router decided, for the losses.
        """
        tokens = x.reshape(-1, self.width)
        routing = self.router(tokens)
        if self.run_experts is not None:
            y = self.run_experts(self, tokens, routing.ids, routing.weights)
        else:
            run = {"dense": self._dense, "gathered": self._gathered, "grouped": self._grouped}
            y = run[self.spelling](tokens, routing.ids, routing.weights)
        if self.shared_up is not None and self.shared_down is not None:
            gate = None if self.shared_gate is None else self.shared_gate(tokens)
            y = y + self.shared_down(self._act(self.shared_up(tokens), gate))
        return y.reshape(x.shape), routing

    def _act(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return _PLAIN[self.activation](up) if gate is None else _GATED[self.activation](gate) * up

    def _dense(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gates = torch.zeros(len(x), self.experts, device=x.device, dtype=x.dtype)
        gates = gates.scatter(1, ids, weights)

        def first(weight: Tensor, bias: Tensor | None) -> Tensor:
            y = torch.einsum("td,ehd->teh", x, weight)
            return y if bias is None else y + bias

        gate = None if self.gate is None else first(self.gate, self.gate_bias)
        hidden = self._act(first(self.up, self.up_bias), gate)
        y = torch.einsum("teh,edh->ted", hidden, self.down)
        if self.down_bias is not None:
            y = y + self.down_bias
        return torch.einsum("ted,te->td", y, gates)

    def _gathered(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        def first(weight: Tensor, bias: Tensor | None) -> Tensor:
            y = torch.einsum("td,tkhd->tkh", x, weight[ids])
            return y if bias is None else y + bias[ids]

        gate = None if self.gate is None else first(self.gate, self.gate_bias)
        hidden = self._act(first(self.up, self.up_bias), gate)
        y = torch.einsum("tkh,tkdh->tkd", hidden, self.down[ids])
        if self.down_bias is not None:
            y = y + self.down_bias[ids]
        return torch.einsum("tkd,tk->td", y, weights)

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        k = ids.shape[1]
        chosen, order = ids.reshape(-1).sort()
        counts = torch.histc(chosen.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // k]

        def first(weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
            return y if bias is None else y + bias[chosen]

        gate = None if self.gate is None else first(self.gate, self.gate_bias)
        hidden = self._act(first(self.up, self.up_bias), gate)
        y = F.grouped_mm(hidden, self.down.transpose(-2, -1), offs=ends)
        if self.down_bias is not None:
            y = y + self.down_bias[chosen]
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        # Each pair back to its place: a sum in a fixed order, unlike index_add.
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(-1, k, self.width).sum(1)


def _placed(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("device", "dtype") if name in options}


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameter_count(model: nn.Module) -> int:
    """How many parameters one token uses: of each ``MoE``'s routed experts K / E, all others.

    Mixtral 8x7B has 46.7 billion and uses 12.9 billion.

    Args:
        model: with ``MoE`` layers, on any device (``meta`` will do).
    """
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            stacked = (layer.up, layer.gate, layer.down)
            biases = (layer.up_bias, layer.gate_bias, layer.down_bias)
            held = sum(p.numel() for p in (*stacked, *biases) if p is not None)
            idle += held // layer.experts * (layer.experts - layer.router.k)
    return parameter_count(model) - idle

"""Routers: which experts a token goes to, with which weights; and the losses that balance them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Scoring = Literal["softmax", "softmax of chosen", "sigmoid"]
Noise = Literal["gaussian", "gumbel"]
SCORINGS: tuple[Scoring, ...] = ("softmax", "softmax of chosen", "sigmoid")
NOISES: tuple[Noise, ...] = ("gaussian", "gumbel")


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        ids: experts of each token, int64 [T, K], no expert twice in a row.
        weights: their weights [T, K], 0 for a choice that its expert has no room for.
        probabilities: of all experts [T, E], for ``load_balancing_loss``.
        logits: [T, E], for ``router_z_loss``.
    """

    ids: Tensor
    weights: Tensor
    probabilities: Tensor
    logits: Tensor


class TopKRouter(nn.Module):
    """Sends each token to the K experts with the largest scores.

    With h = W x, noise included:

    - ``"softmax"``: p = softmax(h), weights p of the K largest (Switch; with ``normalize``
      divided by their sum: Mixtral);
    - ``"softmax of chosen"``: softmax over the K largest h (Shazeer et al., mistral-inference,
      gpt-oss). Equal to ``"softmax"`` with ``normalize``;
    - ``"sigmoid"``: p = sigmoid(h), weights p of the K largest of p + b; with ``normalize``
      divided by their sum. b is not trained: ``update_bias`` moves it (DeepSeek-V3).

    Noise in training: ``"gaussian"``: h + N(0, 1) · softplus(W_noise x) (Shazeer et al., 2017);
    ``"gumbel"``: h + Gumbel(0, 1), so that top-k draws without replacement by softmax(h).

    With ``capacity_factor`` c, an expert takes its first ⌈c · T · K / E⌉ choices, all first choices
    before all second ones (GShard, Switch); the others have weight 0.

    Args:
        width: size of a token.
        experts: E.
        k: K.
        scoring: see above.
        normalize: whether a token's weights are divided by their sum.
        noise: see above.
        capacity_factor: c; None for experts that take all.
        scale: factor of all weights, with no effect on probabilities.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: K that is not in 1 .. E, an unknown ``scoring`` or ``noise``.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        scoring: Scoring = "softmax",
        normalize: bool = False,
        noise: Noise | None = None,
        capacity_factor: float | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise ValueError(f"k={k}: a token goes to 1 to {experts} of {experts} experts.")
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring!r} is unknown: write one of {SCORINGS}.")
        if noise is not None and noise not in NOISES:
            raise ValueError(f"noise={noise!r} is unknown: write one of {NOISES}, or None.")
        self.experts, self.k = experts, k
        self.scoring, self.normalize, self.noise = scoring, normalize, noise
        self.capacity_factor, self.scale = capacity_factor, scale
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        self.noise_weight = None
        if noise == "gaussian":
            # Zero: softplus(0) = 0.69 to begin with, for all tokens.
            self.noise_weight = nn.Parameter(
                torch.zeros(experts, width, device=device, dtype=dtype)
            )
        bias = torch.zeros(experts, device=device) if scoring == "sigmoid" else None
        self.register_buffer("selection_bias", bias)
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Routing:
        """The experts of each token.

        Args:
            x: [T, width].

        Returns:
            Ids, weights, probabilities and logits.
        """
        # Weights of experts are small differences: in float32, as all that train them do it.
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        noisy = self._noisy(x.to(wide), logits) if self.training else logits
        if self.scoring == "sigmoid":
            probabilities = noisy.sigmoid()
            choice = probabilities.detach()
            if self.selection_bias is not None:
                choice = choice + self.selection_bias
            ids = choice.topk(self.k, -1).indices
            weights = probabilities.gather(-1, ids)
        elif self.scoring == "softmax":
            probabilities = noisy.softmax(-1)
            weights, ids = probabilities.topk(self.k, -1)
        else:
            probabilities = noisy.softmax(-1)
            values, ids = noisy.topk(self.k, -1)
            weights = values.softmax(-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.capacity_factor is not None:
            weights = weights * self._has_room(ids)
        return Routing(ids, (weights * self.scale).to(x.dtype), probabilities, logits)

    def _noisy(self, x: Tensor, logits: Tensor) -> Tensor:
        if self.noise_weight is not None:
            deviation = F.softplus(F.linear(x, self.noise_weight.to(x.dtype)))
            return logits + torch.randn_like(logits) * deviation
        if self.noise == "gumbel":
            exponential = -torch.rand_like(logits).clamp(1e-9, 1 - 1e-7).log()
            return logits - exponential.log()
        return logits

    def _has_room(self, ids: Tensor) -> Tensor:
        """Whether an expert still takes a choice, bool [T, K]."""
        assert self.capacity_factor is not None
        room = -(-ids.numel() * self.capacity_factor // self.experts)
        chosen = F.one_hot(ids.t().reshape(-1), self.experts)
        place = (chosen.cumsum(0) * chosen).sum(-1).view(ids.shape[1], -1).t()
        return place <= room

    @torch.no_grad()
    def update_bias(self, ids: Tensor, rate: float = 1e-3) -> None:
        """Moves the bias of the choice: up for experts with less than their share, else down.

        b += rate · sign(T·K/E - count). Source: Auxiliary-Loss-Free Load Balancing (Wang et al.,
        2024), DeepSeek-V3.

        Args:
            ids: the ids of a step, [T, K].
            rate: how far.

        Raises:
            ValueError: a router without this bias.
        """
        if self.selection_bias is None:
            raise ValueError('only scoring="sigmoid" has a bias of the choice.')
        fractions = expert_fractions(ids, self.experts)
        self.selection_bias += rate * torch.sign(1 / self.experts - fractions)


def expert_fractions(ids: Tensor, experts: int) -> Tensor:
    """f_i, the share of all choices that went to expert i.

    Args:
        ids: [T, K]; any shape.
        experts: E.

    Returns:
        [E], with sum 1; zeros if there are no tokens.
    """
    counts = F.one_hot(ids.reshape(-1), experts).sum(0)
    return counts / max(ids.numel(), 1)


def load_balancing_loss(probabilities: Tensor, ids: Tensor, *, alpha: float = 0.01) -> Tensor:
    """``α · N · Σ f_i P_i``: smallest, α, when all N experts get the same.

    f_i is the share of choices that went to expert i (no gradient), P_i its mean probability. For
    K > 1, f_i counts pairs, so Σ f_i = 1 for any K; libraries that divide by tokens get K times
    as much.

    Source: Switch Transformers (Fedus et al., 2021), equation 4.

    Args:
        probabilities: [T, N].
        ids: [T, K].
        alpha: α.

    Returns:
        A scalar.
    """
    experts = probabilities.shape[-1]
    fractions = expert_fractions(ids, experts).to(probabilities.dtype)
    return alpha * experts * (fractions * probabilities.mean(0)).sum()


def router_z_loss(logits: Tensor, *, coefficient: float = 1e-3) -> Tensor:
    """``c · mean over tokens of log² Σ exp(h_i)``: keeps a router's logits small.

    Source: ST-MoE (Zoph et al., 2022), equation 5.

    Args:
        logits: [T, N].
        coefficient: c.

    Returns:
        A scalar.
    """
    return coefficient * logits.logsumexp(-1).square().mean()

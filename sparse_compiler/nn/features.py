"""Feature maps φ for linear attention: φ(q)·φ(k) stands where exp(q·k/√d) stood.

Each is a module called with the queries and with the keys, [batch, heads, n, d] in and
[batch, heads, n, features] out. ``normalized`` says whether the weights that come out of
φ(q)·φ(k) already sum to one, so that linear attention has nothing to divide by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EluFeatures(nn.Module):
    """``φ(x) = elu(x) + 1``, d features, all positive.

    Source: Transformers are RNNs (Katharopoulos et al., 2020).
    """

    normalized = False

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        return F.elu(x) + 1


class ReluFeatures(nn.Module):
    """``φ(x) = relu(x) + epsilon``, d features.

    Source: Performer's generalized attention (Choromanski et al., 2021).

    Args:
        epsilon: keeps the normaliser away from zero where no feature is active.
    """

    normalized = False

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        return F.relu(x) + self.epsilon


class PositiveFeatures(nn.Module):
    """``φ(x) = (exp(W x - |x|²/2 - m) + epsilon) / √f`` with x / d^¼ for x, f features.

    The mean of φ(q)·φ(k) over W is exp(q·k/√d) (for epsilon = 0), and no feature is negative. The
    rows of W are Gaussian and orthogonal in groups of d. m is the largest exponent, of each query
    or of all keys: it keeps exp in range and cancels when the weights are normalised.

    Source: FAVOR+, Performer (Choromanski et al., 2021).

    Args:
        head_dim: d.
        features: f; d·log d of them are recommended.
        seed: of W, a buffer that is saved with the model.
        epsilon: keeps the normaliser away from zero.
    """

    normalized = False
    projection: Tensor

    def __init__(
        self, head_dim: int, features: int | None = None, *, seed: int = 0, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        features = head_dim if features is None else features
        _check(head_dim, features, "PositiveFeatures(head_dim=64, features=256)")
        self.register_buffer("projection", _orthogonal(features, head_dim, seed))
        self.epsilon = epsilon

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        exponent = x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2
        largest = exponent.amax((-2, -1) if keys else -1, keepdim=True).detach()
        count = self.projection.shape[0]
        return ((exponent - largest).exp() + self.epsilon) * count**-0.5


class FourierFeatures(nn.Module):
    """``φ(x) = [sin(W u), cos(W u)] / √(f/2)`` with u = x / |x|, f features.

    The mean of φ(q)·φ(k) over W is exp(-|u_q - u_k|²/(2σ²)), which is exp(u_q·u_k/σ²) up to a
    constant. Features may be negative, so a row of weights may sum to nearly nothing.

    Source: Random Features (Rahimi & Recht, 2007); Random Feature Attention (Peng et al., 2021).

    Args:
        head_dim: d.
        features: f, even: half of them sines, half cosines.
        sigma: width of the kernel.
        seed: of W, a buffer that is saved with the model.
    """

    normalized = False
    projection: Tensor

    def __init__(
        self, head_dim: int, features: int | None = None, *, sigma: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        features = 2 * head_dim if features is None else features
        _check(head_dim, features, "FourierFeatures(head_dim=64, features=128)")
        if features % 2:
            raise ValueError(
                f"features={features} is odd, but sines and cosines come in pairs: "
                f"write features={features + 1}."
            )
        self.register_buffer("projection", _orthogonal(features // 2, head_dim, seed) / sigma)

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        angle = F.normalize(x, dim=-1) @ self.projection.to(x.dtype).T
        return torch.cat([angle.sin(), angle.cos()], -1) * self.projection.shape[0] ** -0.5


class TaylorFeatures(nn.Module):
    """``φ(x) = [1, x, vec(x xᵀ)/√2]`` with x / d^¼ for x, 1 + d + d² features.

    φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√d: exp(s) to second order, and never below 1/2.

    Source: Keles et al. (2023), "On the Computational Complexity of Self-Attention"; Based (Arora
    et al., 2024).
    """

    normalized = False

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 2**-0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


class SoftmaxFeatures(nn.Module):
    """``φ(q) = softmax of q over its features``, ``φ(k) = softmax of k over the keys``; d features.

    The weights sum to one by construction. The softmax over keys looks at the whole sequence, so
    there is no causal form.

    Source: Efficient Attention (Shen et al., 2021).
    """

    normalized = True

    def forward(self, x: Tensor, *, keys: bool = False) -> Tensor:
        return x.softmax(-2 if keys else -1)


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian rows, orthogonal to each other in groups of ``columns``: float32 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for start in range(0, rows, columns):
        square = torch.randn(columns, columns, generator=generator)
        q, r = torch.linalg.qr(square)
        # LAPACK fixes the signs of R, which would leave the rows with a preferred direction.
        groups.append((q * r.diagonal().sign()).T[: rows - start])
    # The lengths of independent Gaussian vectors, so that each row alone is Gaussian.
    lengths = torch.randn(rows, columns, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(groups) * lengths


def _check(head_dim: int, features: int, example: str) -> None:
    for name, value in (("head_dim", head_dim), ("features", features)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, not {value!r}: write {example}.")

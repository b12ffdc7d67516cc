"""Mixtures of experts trained with the balancing loss: the experts' shares f_i go to 1 / N.

Two small models learn to continue sequences: Switch (one expert a token, with a capacity) and
Mixtral (two experts a token). Their routers start unbalanced; the loss α·N·Σ f_i·P_i (Switch
Transformers, equation 4) evens them out while the model learns.

    python examples/moe_training.py
    python examples/moe_training.py --compile     # with backend="sparse"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from _common import progress
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_compiler import nn as sn


class Model(nn.Module):
    """Embeds two tokens, sends their sum through a mixture of experts, names the next."""

    def __init__(self, layer: sn.MoE, vocabulary: int) -> None:
        super().__init__()
        self.first = nn.Embedding(vocabulary, layer.width)
        self.second = nn.Embedding(vocabulary, layer.width)
        self.norm = nn.LayerNorm(layer.width)
        self.moe = layer
        self.head = nn.Linear(layer.width, vocabulary)

    def forward(self, tokens: Tensor) -> tuple[Tensor, sn.Routing]:
        x = self.norm(self.first(tokens[:, 0]) + self.second(tokens[:, 1]))
        y, routing = self.moe(x)
        return self.head(x + y), routing


def train(layer: sn.MoE, steps: int, alpha: float, compiled: bool) -> tuple[list[float], Tensor]:
    """Trains one model.

    Returns:
        The distance of the shares from 1 / N, max |f_i - 1/N| · N, at each step; the last shares.
    """
    vocabulary = 64
    model = Model(layer, vocabulary)
    with torch.no_grad():  # a favourite: all tokens have something that expert 0 likes
        model.norm.bias.fill_(0.5)
        layer.router.weight[0] += 3 / layer.width
    run = torch.compile(model, backend="sparse") if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rule = torch.randperm(2 * vocabulary) % vocabulary
    distances, shares = [], torch.zeros(layer.experts)
    for _ in progress(range(steps), "training"):
        tokens = torch.randint(vocabulary, (256, 2))
        target = rule[tokens.sum(1)]
        logits, routing = run(tokens)
        loss = F.cross_entropy(logits, target)
        loss = loss + sn.load_balancing_loss(routing.probabilities, routing.ids, alpha=alpha)
        loss = loss + sn.router_z_loss(routing.logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = sn.expert_fractions(routing.ids, layer.experts)
        shares = 0.9 * shares + 0.1 * now
        distances.append(float((now * layer.experts - 1).abs().max()))
    return distances, shares / shares.sum()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints shares of the experts; returns how far from even the last ones are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other
    width, hidden, experts = 16, 32, 4
    layers = {
        "Switch, top 1": lambda: sn.MoE.switch(width, hidden, experts),
        "Mixtral, top 2": lambda: sn.MoE.mixtral(width, hidden, experts),
    }
    found = {}
    for name, make in layers.items():
        for alpha in (0.0, options.alpha):
            distances, shares = train(make(), options.steps, alpha, options.compile)
            text = ", ".join(f"{share:.3f}" for share in shares)
            print(f"{name:15} alpha {alpha:<5} shares {text} (even: {1 / experts:.3f})")
            found[f"{name}, alpha {alpha}"] = float((shares * experts - 1).abs().max())
        print(f"{'':15} first step {distances[0]:.2f} from even, last {distances[-1]:.2f}")
    layer = layers["Mixtral, top 2"]()
    total, active = sn.parameter_count(layer), sn.active_parameter_count(layer)
    print(f"a Mixtral layer of this size has {total} parameters; a token uses {active}")
    return found


if __name__ == "__main__":
    main()

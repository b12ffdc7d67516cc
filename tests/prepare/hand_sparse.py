"""Tiny random models with hand-written sparse attention, their inputs, and a counting backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

transformers.logging.set_verbosity_error()

Inputs = dict[str, Any]


def longformer(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    config = transformers.LongformerConfig(
        # A window of each layer's own.
        attention_window=[4 * (i + 1) for i in range(layers)],
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=70,
        pad_token_id=1,
        sep_token_id=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.LongformerModel(config), _inputs()


def led(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    config = transformers.LEDConfig(
        attention_window=8,
        d_model=32,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=50,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        dropout=dropout,
        attention_dropout=dropout,
    )
    inputs = _inputs()
    return transformers.LEDModel(config), {
        **inputs,
        "decoder_input_ids": inputs["input_ids"][:, :5],
        "use_cache": False,
    }


def bigbird(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    config = transformers.BigBirdConfig(
        block_size=4,
        num_random_blocks=2,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    inputs = _inputs(64)
    del inputs["global_attention_mask"]
    return transformers.BigBirdModel(config), inputs


def pegasus(layers: int = 2, dropout: float = 0.0) -> tuple[nn.Module, Inputs]:
    config = transformers.BigBirdPegasusConfig(
        block_size=4,
        num_random_blocks=2,
        d_model=32,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=50,
        max_position_embeddings=128,
        dropout=dropout,
        attention_dropout=dropout,
    )
    inputs = _inputs(64)
    del inputs["global_attention_mask"]
    return transformers.BigBirdPegasusModel(config), {
        **inputs,
        "decoder_input_ids": inputs["input_ids"][:, :5],
        "use_cache": False,
    }


MODELS: dict[str, Callable[..., tuple[nn.Module, Inputs]]] = {
    "longformer": longformer,
    "led": led,
    "bigbird": bigbird,
    "pegasus": pegasus,
}


def _inputs(n: int = 32) -> Inputs:
    """Two sequences of n tokens, one of them padded; both have global tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (2, n), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, n // 2 + 3 :] = 0
    flags = torch.zeros_like(ids)
    flags[:, 0] = 1
    flags[0, [7, 20]] = 1
    return {"input_ids": ids, "attention_mask": attention_mask, "global_attention_mask": flags}


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: Any, inputs: Inputs, gradients: bool = True) -> list[Tensor]:
    """Outputs, and the gradients of all parameters."""
    model.zero_grad()
    outputs = tensors(model(**inputs))
    if not gradients:
        return outputs
    total = sum((o * torch.linspace(-1, 1, o.numel()).to(o).view(o.shape)).sum() for o in outputs)
    total.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return [o.detach() for o in outputs] + [g.clone() for g in found]


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(gm)
        return gm

    def attentions(self) -> int:
        """How many scaled_dot_product_attention calls with a mask there are."""
        name = torch.nn.functional.scaled_dot_product_attention
        calls = [n for g in self.graphs for n in g.graph.nodes if n.target is name]
        return sum(len(n.args) > 3 or n.kwargs.get("attn_mask") is not None for n in calls)


def compiled(model: nn.Module, **options: Any) -> tuple[Any, Counting]:
    torch._dynamo.reset()
    backend = Counting()
    return torch.compile(model, backend=backend, **options), backend


@contextlib.contextmanager
def unchanged(model: nn.Module):
    """Nothing that prepare() may not touch differs afterwards."""
    state = {
        key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()
    }
    modes = [module.training for module in model.modules()]
    modules = list(model.modules())
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(id(after[key]) == state[key][0] for key in state)
    assert all(torch.equal(after[key], state[key][1]) for key in state)
    assert list(model.modules()) == modules
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
